#!/usr/bin/env bash
# Makes an environment, installs calm_jax into it, and runs the key-value
# experiment: trains the composition of two shipped frozen models in both answer
# formats, evaluates, and writes results.json, results.md and results.png.
#
#   bash launch/run.sh [--from_scratch] [--pieces] [--baselines] [--seeds 0,1,2]
#     [--out DIR]
#
# A second run reuses what is finished; an interrupted one continues.
set -euo pipefail
cd "$(dirname "$0")/.."

venv="${CALM_JAX_VENV:-.venv}"
python="${PYTHON:-python3}"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $("$python" --version) is too old; calm_jax needs Python 3.11" \
    "or newer. Name one: PYTHON=python3.11 bash launch/run.sh" >&2
  exit 2
fi

# Installed only when setup.py or the constraints have changed since.
stamp="$venv/calm_jax_installed"
if [[ ! -f "$stamp" || setup.py -nt "$stamp" || constraints.txt -nt "$stamp" ]]
then
  echo "Installing into $venv (about three minutes the first time) ..."
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  if ! "$venv/bin/python" -m pip install --quiet \
    --constraint constraints.txt --editable .; then
    echo "error: the installation failed; see the lines above. Then run the" \
      "same command again." >&2
    exit 1
  fi
  touch "$stamp"
fi

export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}"
export TF_CPP_MIN_LOG_LEVEL=3
exec "$venv/bin/python" launch/kv_quick.py "$@"
