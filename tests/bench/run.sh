#!/usr/bin/env bash
# Runs a benchmark against the Python peers:  tests/bench/run.sh SCRIPT.py [ARGUMENT...]
# The virtual environment is made once per version of requirements.txt, in ~/.cache/refinery (or REFINERY_BENCH_DIR).
# REFINERY_BENCH_THREADS is the number of threads that both sides get (default 2).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] || { echo "usage: run.sh SCRIPT.py [ARGUMENT...]" >&2; exit 2; }
sum=$(cat "$here/requirements.txt" | sha256sum | cut -c1-12)
venv=${REFINERY_BENCH_DIR:-$HOME/.cache/refinery}/bench-$sum

mkdir -p "$(dirname "$venv")"
# Two runs at once make one environment: the second waits for the first.
exec 9>"$venv.lock"
flock 9
if [ ! -f "$venv/complete" ]; then
  echo "== making the peers' environment in $venv" >&2
  rm -rf "$venv"
  python3 -m venv "$venv"
  for try in 1 2 3; do
    if "$venv/bin/pip" install -q --disable-pip-version-check -r "$here/requirements.txt"; then
      touch "$venv/complete"
      break
    fi
    echo "== try $try of 3 failed" >&2
  done
  [ -f "$venv/complete" ] || { echo "run.sh: the peers could not be installed" >&2; exit 1; }
fi
flock -u 9
exec 9>&-

script=$1
shift
[ -f "$script" ] || script=$here/$script
export OMP_NUM_THREADS=${REFINERY_BENCH_THREADS:-2} MKL_NUM_THREADS=${REFINERY_BENCH_THREADS:-2}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$venv/bin/python" "$script" "$@"
