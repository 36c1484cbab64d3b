# shellcheck shell=bash disable=SC2034,SC2154 # one program of several files
# What launch/run.sh does with a backend: options, restarts, workers.
# It has set `root`, and defines `show`, `fail` and `find_python`.

readonly PREEMPTED=75 # EX_TEMPFAIL; calm_jax/guards.py names it too
readonly ENTRIES='train evaluate infer report sweep plan convert import_t5x'
# Seconds that others have to save when one was preempted, and to end when one
# has failed.
readonly GRACE="${CALM_JAX_GRACE_SECONDS:-60}"
readonly FAILED_GRACE=5

dry_run=0
max_restarts=3
num_devices=''
rest=()    # what is neither an option of ours nor the entry point
entry=''   # the entry point
flags=()   # and its flags
stopped=0  # whether we were told to end
workers=() # process ids of what runs here

launch() {
  if (( BASH_VERSINFO[0] < 4 )); then
    fail "bash $BASH_VERSION is too old for launch/run.sh BACKEND; 4 or newer"
  fi
  local backend=''
  while [[ -z "$entry" && $# -gt 0 ]]; do
    case "$1" in
      --dry_run) dry_run=1 ;;
      --max_restarts=*) max_restarts="${1#*=}" ;;
      --num_devices=*) num_devices="${1#*=}" ;;
      -*) rest+=("$1") ;;
      *)
        if [[ -z "$backend" ]]; then
          backend="$1"
        elif [[ "$backend" == local-mp && "$1" =~ ^[0-9]+$ ]]; then
          rest+=("$1")
        else
          entry="$1"
        fi
        ;;
    esac
    shift
  done
  flags=("$@")
  if [[ " $ENTRIES " != *" ${entry:-none} "* ]]; then
    fail "'$entry' is no entry point: after $backend and its options comes one" \
      "of: $ENTRIES. Options are written --name=value."
  fi
  is_number "$max_restarts" || fail "--max_restarts=$max_restarts is no number"
  if [[ -n "$num_devices" ]]; then
    is_number "$num_devices" || fail "--num_devices=$num_devices is no number"
  fi
  export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
  trap on_stop TERM INT
  # shellcheck source=/dev/null
  source "$root/launch/backends/${backend//-/_}.sh"
  prepare
  with_restarts
}

is_number() { [[ "$1" =~ ^[0-9]+$ ]]; }

need() {
  (( dry_run )) || command -v "$1" > /dev/null \
    || fail "$1 is not installed. $2"
}

# Sets the variable $1 from the option --$1=... in `rest`, and takes it out; the
# option without a value sets it to 1. $2 is what it is otherwise.
take() {
  local taken="${2-}" left=() one
  for one in ${rest[@]+"${rest[@]}"}; do
    case "$one" in
      "--$1="*) taken="${one#*=}" ;;
      "--$1") taken=1 ;;
      *) left+=("$one") ;;
    esac
  done
  printf -v "$1" '%s' "$taken"
  rest=(${left[@]+"${left[@]}"})
}

require() {
  local one
  for one in "$@"; do
    [[ -n "${!one}" ]] || fail "--$one=... is not given, and is needed here"
  done
}

no_more_options() {
  (( ${#rest[@]} == 0 )) || fail "unknown option ${rest[0]}"
}

# Prints the MODEL_DIR among the flags, if it is a plain string, and no bucket.
model_dir() {
  local one value=''
  for one in ${flags[@]+"${flags[@]}"}; do
    if [[ "$one" == --gin.MODEL_DIR=* ]]; then
      value="${one#*=}"
      if [[ ! "$value" =~ ^(\"(.*)\"|\'(.*)\')$ ]]; then
        value='' # a macro, say
      else
        value="${value:1:-1}"
      fi
    fi
  done
  [[ "$value" == *://* ]] || printf '%s' "$value"
}

# Preflight on this machine: fails unless MODEL_DIR can be written.
check_model_dir() {
  local directory
  directory="$(model_dir)"
  if [[ -z "$directory" ]] || (( dry_run )); then return; fi
  directory="${directory/#\~/$HOME}"
  if ! mkdir -p "$directory" 2> /dev/null || [[ ! -w "$directory" ]]; then
    fail "MODEL_DIR $directory cannot be written. Give another by" \
      "--gin.MODEL_DIR=\"'...'\", or change its permissions."
  fi
}

# Sets `variables` to those by which processes find and compare themselves
# (calm_jax/distributed.py); the rest of preflight happens there.
variables_of() {
  local directory
  directory="$(model_dir)"
  variables=("CALM_JAX_COORDINATOR=$1")
  [[ -z "$num_devices" ]] || variables+=("CALM_JAX_NUM_DEVICES=$num_devices")
  [[ -z "$directory" ]] || variables+=("CALM_JAX_DIRECTORY=$directory")
}

# Runs `run_once` of the backend, again after each preemption.
with_restarts() {
  local restarts=0 code
  while true; do
    code=0
    run_once || code=$?
    if (( code != PREEMPTED || stopped )); then
      exit "$code"
    fi
    if (( restarts >= max_restarts )); then
      echo "Preempted; saved. It was started $((restarts + 1)) times;" \
        "the same command continues." >&2
      exit "$code"
    fi
    restarts=$((restarts + 1))
    echo "Preempted; saved. Restart $restarts of $max_restarts." >&2
    after_preemption
  done
}

# A backend may define another.
after_preemption() { :; }

on_stop() {
  stopped=1
  local pid
  for pid in ${workers[@]+"${workers[@]}"}; do
    kill -TERM "$pid" 2> /dev/null || true
  done
}

# Runs one command, or prints it; stops it if we are stopped.
run() {
  if (( dry_run )); then
    show "$@"
    return
  fi
  (( ! stopped )) || return 143
  "$@" &
  workers=($!)
  wait_for "${workers[0]}"
}

# Returns the exit code of a process; a signal to us does not end the waiting.
wait_for() {
  local code
  while true; do
    code=0
    wait "$1" || code=$?
    if ! kill -0 "$1" 2> /dev/null; then
      # If the signal cut the first wait short, the second has the code.
      if (( stopped && code > 128 )); then
        wait "$1" 2> /dev/null && code=0 || code=$?
      fi
      workers=()
      return "$code"
    fi
  done
}
