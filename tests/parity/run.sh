#!/usr/bin/env bash
# Compares what Refinery makes with what the Python peers make of it:  tests/parity/run.sh BUILD_FOLDER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=$(cd "$1" && pwd)
venv=$("$here/environment.sh")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# One small job makes the three things that are compared: the imported model, an adapter and a 4-bit artifact.
"$build/bin/refinery" run --state "$work/state" "$here/../e2e/small.yaml" >"$work/run.log" 2>&1 ||
  { cat "$work/run.log" >&2; exit 1; }
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2 GPTQMODEL_CPU_WORKERS=2 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=0
"$venv/bin/python" "$here/compare.py" "$build/bin/refinery-task" "$work" || failed=1
# Also alone: families.py REFINERY_TASK [--only NAME]
"$venv/bin/python" "$here/families.py" "$build/bin/refinery-task" || failed=1
# Also alone: exports.py REFINERY_TASK EXPORT_PROBE [--only TEXT] [--all]
"$venv/bin/python" "$here/exports.py" "$build/bin/refinery-task" "$build/bin/export_probe" || failed=1
# Also alone: packing.py PACKING_PROBE
"$venv/bin/python" "$here/packing.py" "$build/bin/packing_probe" || failed=1
# Also alone: tokenizer_peers.py PROBE [SMOLLM2.gguf] [TOKENIZERS] [STORIES]
"$venv/bin/python" "$here/tokenizer_peers.py" "$build/bin/tokenizer_probe" \
  "${REFINERY_MODELS_DIR:-$HOME/.cache/refinery/models}/SmolLM2-135M-Instruct.Q4_1.gguf" \
  "${REFINERY_TOKENIZERS_DIR:-$HOME/.cache/refinery/tokenizers}" "$here/../../../shared/data/models/stories260K/tok512.bin" || failed=1
exit $failed
