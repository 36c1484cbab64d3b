# shellcheck shell=bash disable=SC2154 # of launch/backends.sh
# Backend tpu-vm: the same program on all workers of a TPU VM.
#
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/describe
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/delete

readonly POLL_SECONDS="${CALM_JAX_POLL_SECONDS:-30}"
readonly LOST=255 # of ssh, when the machine has gone

prepare() {
  take name
  take zone
  take project
  take create
  take accelerator_type
  take runtime_version
  take spot
  take setup
  take remote_dir calm_jax
  take remote_python .venv/bin/python
  require name zone
  [[ -z "$create" ]] || require accelerator_type runtime_version
  [[ -n "$create" || -z "$spot$setup" ]] \
    || fail '--spot and --setup are said of a TPU that --create makes'
  need gcloud 'See https://cloud.google.com/sdk/docs/install; then gcloud auth
login, which keeps what it is told to itself.'
  place=("--zone=$zone")
  [[ -z "$project" ]] || place+=("--project=$project")
  [[ -z "$create" ]] || create_tpu
}

# Asks for the TPU, waits for its turn, and sets up each worker.
create_tpu() {
  local command=(gcloud compute tpus queued-resources create "$name"
    "--node-id=$name" "--accelerator-type=$accelerator_type"
    "--runtime-version=$runtime_version" "${place[@]}")
  [[ -z "$spot" ]] || command+=(--spot)
  run "${command[@]}" \
    || fail "gcloud has not accepted the request for $name; see above. One that" \
      "exists is used without --create."
  local describe=(gcloud compute tpus queued-resources describe "$name"
    "${place[@]}" '--format=value(state.state)')
  if (( dry_run )); then
    show "${describe[@]}"
  else
    wait_until_active
  fi
  [[ -z "$setup" ]] || on_all "$setup" \
    || fail "the --setup command has failed on a worker of $name; see above"
}

wait_until_active() {
  local state='' before=''
  while [[ "$state" != ACTIVE ]]; do
    (( ! stopped )) || exit 143
    state="$("${describe[@]}")" || state=''
    [[ "$state" == "$before" ]] || echo "$name: $state" >&2
    before="$state"
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "the request for $name is $state. See 'gcloud compute tpus" \
          "queued-resources describe $name ${place[*]}', and delete it before" \
          'you ask again.'
        ;;
    esac
    sleep "$POLL_SECONDS" || true
  done
}

# Runs a command of the shell on all workers at once; the code is that of the
# first worker, in their order, whose code is not 0.
on_all() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
    ${rest[@]+"${rest[@]}"} "--command=$1"
}

run_once() {
  local variables program code=0
  variables_of auto
  variables+=("JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-.jax_cache}")
  program="$(quote env "${variables[@]}" TF_CPP_MIN_LOG_LEVEL=3 \
    "$remote_python" -m "calm_jax.$entry" ${flags[@]+"${flags[@]}"})"
  # Which worker says what: hosts are called ...-w-0, ...-w-1.
  local script="set -o pipefail; cd $remote_dir && "
  script+="$program 2>&1 | sed -u \"s/^/[worker \${HOSTNAME##*-w-}] /\""
  on_all "$script" || code=$?
  # A spot TPU that is taken away takes the connection with it.
  if (( code == LOST )) && [[ -n "$create" ]] && ! is_ready; then
    gone=1
    return "$PREEMPTED"
  fi
  return "$code"
}

is_ready() {
  [[ "$(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" \
    '--format=value(state)')" == READY ]]
}

after_preemption() {
  [[ -n "${gone:-}" ]] || return 0
  gone=''
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" \
    --force --quiet || fail "$name could not be deleted; see above"
  create_tpu
}
