#!/usr/bin/env bash
# Measures fedgrove on a machine with one GPU and torch, in about ten minutes: bench/gpu.py says what.
#   bash bench/gpu.sh [--out FOLDER] [--parts …] [--cpu-check]
# What is missing there may lie beside it as wheels, in .whl/; PYTHON names the Python that has torch.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if compgen -G '.whl/*.whl' > /dev/null && [ "$PYTHON" = python3 ]; then
  site=$(mktemp -d)
  $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
  export PYTHONPATH=$site
fi
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
exec "$PYTHON" bench/gpu.py "$@"
