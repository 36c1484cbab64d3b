#!/usr/bin/env bash
# Caches tasks by SeqIO's tool on Beam, in an environment of its own that this
# makes (some minutes), and compares them with those that the tests read.
set -euo pipefail
cd "$(dirname "$0")/.."

beam="${CALM_JAX_BEAM_VENV:-.venv_beam}"
venv="${CALM_JAX_VENV:-.venv}"
stamp="$beam/calm_jax_installed"
if [[ ! -f "$stamp" || setup.py -nt "$stamp" || constraints-beam.txt -nt "$stamp" ]]
then
  "${PYTHON:-python3}" -m venv "$beam"
  "$beam/bin/python" -m pip install --quiet --upgrade pip
  "$beam/bin/python" -m pip install --quiet --constraint constraints-beam.txt \
    --editable '.[beam]'
  touch "$stamp"
fi
export TF_CPP_MIN_LOG_LEVEL=3 CALM_JAX_BEAM_PYTHON="$beam/bin/python"
exec "$venv/bin/python" -m pytest -q -m beam tests/cache_test.py "$@"
