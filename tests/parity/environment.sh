#!/usr/bin/env bash
# Prints the folder of the virtual environment with the peers of quantization (gptqmodel, compressed-tensors, llama.cpp and what they
# need), made once per version of the requirements in ~/.cache/refinery (or REFINERY_PARITY_DIR).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
sum=$(cat "$here"/requirements*.txt | sha256sum | cut -c1-12)
venv=${REFINERY_PARITY_DIR:-$HOME/.cache/refinery}/parity-$sum
if [ ! -f "$venv/complete" ]; then
  echo "== making the peers' environment in $venv" >&2
  rm -rf "$venv"
  python3 -m venv "$venv"
  for try in 1 2 3; do
    if "$venv/bin/pip" install -q --disable-pip-version-check -r "$here/requirements.txt" >&2 &&
      "$venv/bin/pip" install -q --disable-pip-version-check --no-build-isolation -r "$here/requirements_gptqmodel.txt" >&2; then
      touch "$venv/complete"
      break
    fi
    echo "== try $try of 3 failed" >&2
  done
  [ -f "$venv/complete" ] || { echo "environment.sh: the peers could not be installed" >&2; exit 1; }
fi
echo "$venv"
