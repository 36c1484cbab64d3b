#!/usr/bin/env bash
# Runs the key-value experiment, or an entry point anywhere.
#
#   bash launch/run.sh [--from_scratch] [--pieces] [--baselines] [--seeds 0,1,2]
#     [--out DIR]
#
# makes an environment, installs calm_jax into it, trains the composition of two
# shipped frozen models in both answer formats, evaluates, and writes
# results.json, results.md and results.png. A second run reuses what is
# finished; an interrupted one continues.
#
#   bash launch/run.sh BACKEND [OPTIONS] ENTRY [FLAGS OF THE ENTRY POINT]
#
#   ENTRY: train evaluate infer report sweep plan convert import_t5x
#   BACKEND:
#     local        here
#     local-mp N   N processes on this machine; on a GPU each if it has as many
#     tpu-vm       on all workers of a TPU VM: --name= --zone= [--project=]
#                  [--remote_dir= --remote_python=]; to have it made first:
#                  --create --accelerator_type= --runtime_version= [--spot]
#                  [--setup='COMMAND ON EACH WORKER']
#     xpk          on a cluster: --cluster= --tpu_type= [--num_slices=]
#                  [--zone= --project= --workload= --remote_python=]
#     slurm        through srun: [--nodes=] [--gpus_per_node=]
#   OPTIONS of all: --dry_run prints the commands and runs nothing;
#     --max_restarts=3: how often a preempted run (exit code 75) is started
#     again; --num_devices=N: stop unless there are N in all. Other options are
#     handed to gcloud's ssh, to xpk or to srun as they are.
#
# Exit code: 0; 75 if preempted more often than that, with everything saved (the
# same command continues); else that of the first worker that failed.
#
# CALM_JAX_PYTHON names a Python that has calm_jax: nothing is installed then.
# Compiled programs are kept in JAX_COMPILATION_CACHE_DIR, or else in .jax_cache
# of the checkout (docs/kernels.md).
# docs/tpu_pods.md walks through all of it.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Prints words as they would be typed, for a shell to read.
quote() {
  local word typed=()
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    typed+=("$word")
  done
  printf '%s' "${typed[*]}"
}

show() { printf '$ %s\n' "$(quote "$@")"; }

fail() {
  echo "error: $*" >&2
  exit 2
}

# Sets `python`, installing calm_jax if it has changed; prints it if $1 is 1.
# What it compiles is kept for the next time.
find_python() {
  local dry_run="$1" venv="${CALM_JAX_VENV:-$root/.venv}"
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.jax_cache}"
  if [[ -n "${CALM_JAX_PYTHON:-}" ]]; then
    python="$CALM_JAX_PYTHON"
    return
  fi
  local base="${PYTHON:-python3}" stamp="$venv/calm_jax_installed"
  local version='import sys; sys.exit(sys.version_info < (3, 11))'
  if ! "$base" -c "$version"; then
    fail "$("$base" --version) is too old; calm_jax needs Python 3.11 or" \
      "newer. Name one: PYTHON=python3.11 bash launch/run.sh"
  fi
  python="$venv/bin/python"
  # Installed only when setup.py or the constraints have changed since.
  if [[ -f "$stamp" && ! "$root/setup.py" -nt "$stamp" &&
    ! "$root/constraints.txt" -nt "$stamp" ]]; then
    return
  fi
  local install=("$python" -m pip install --quiet
    --constraint "$root/constraints.txt" --editable "$root")
  if (( dry_run )); then
    show "$base" -m venv "$venv"
    show "$python" -m pip install --quiet --upgrade pip
    show "${install[@]}"
    return
  fi
  # On standard error: what an entry point prints may be read by a program.
  echo "Installing into $venv (about three minutes the first time) ..." >&2
  "$base" -m venv "$venv"
  "$python" -m pip install --quiet --upgrade pip
  if ! "${install[@]}"; then
    echo "error: the installation failed; see the lines above. Then run the" \
      "same command again." >&2
    exit 1
  fi
  touch "$stamp"
}

key_value_experiment() {
  cd "$root"
  local python
  find_python 0
  export TF_CPP_MIN_LOG_LEVEL=3
  exec "$python" launch/kv_quick.py "$@"
}

for argument in "$@"; do
  case "$argument" in
    local | local-mp | tpu-vm | xpk | slurm)
      # shellcheck source=launch/backends.sh
      source "$root/launch/backends.sh"
      launch "$@"
      exit
      ;;
    --dry_run | --max_restarts=* | --num_devices=*) ;;  # before a backend
    *) break ;;
  esac
done
key_value_experiment "$@"
