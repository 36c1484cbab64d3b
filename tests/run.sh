#!/usr/bin/env bash
# Makes an environment, installs calm_jax with its test extras, runs the tests.
#
#   bash tests/run.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."

venv="${CALM_JAX_VENV:-.venv}"
python="${PYTHON:-python3}"
stamp="$venv/calm_jax_installed_test"
if [[ ! -f "$stamp" || setup.py -nt "$stamp" || constraints.txt -nt "$stamp" ]]
then
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  "$venv/bin/python" -m pip install --quiet --constraint constraints.txt \
    --editable '.[test]'
  touch "$stamp" "$venv/calm_jax_installed"
fi
export TF_CPP_MIN_LOG_LEVEL=3
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
exec "$venv/bin/python" -m pytest -n 2 -q "$@"
