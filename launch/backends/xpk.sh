# shellcheck shell=bash disable=SC2154 # of launch/backends.sh
# Backend xpk: a workload on a GKE cluster. xpk adds the current directory to an
# image, and JobSet starts the workers again.
#
# https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/workloads.md

prepare() {
  take cluster
  take tpu_type
  take num_slices 1
  take zone
  take project
  take remote_python python3
  take workload "calm-${entry//_/-}-$(date +%m%d-%H%M%S)"
  require cluster tpu_type
  need xpk "Install it where it is alone: python3 -m venv xpk_venv &&
xpk_venv/bin/pip install xpk, and put xpk_venv/bin on PATH."
  place=("--cluster=$cluster")
  [[ -z "$zone" ]] || place+=("--zone=$zone")
  [[ -z "$project" ]] || place+=("--project=$project")
}

run_once() {
  local variables one program code=0
  variables_of auto
  # A pod's own disk is gone with it: a bucket, if one is named.
  [[ -z "${JAX_COMPILATION_CACHE_DIR:-}" ]] \
    || variables+=("JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR")
  program="$(quote "$remote_python" -m "calm_jax.$entry" \
    ${flags[@]+"${flags[@]}"})"
  local command=(xpk workload create "${place[@]}" "--workload=$workload"
    "--tpu-type=$tpu_type" "--num-slices=$num_slices"
    "--max-restarts=$max_restarts" "--restart-on-exit-codes=$PREEMPTED")
  for one in "${variables[@]}"; do
    command+=("--env=$one")
  done
  command+=(${rest[@]+"${rest[@]}"} "--command=$program")
  run "${command[@]}" || return 1
  run xpk workload list "${place[@]}" "--wait-for-job-completion=$workload" \
    || code=$?
  if (( code )); then
    echo "error: the workload $workload has not succeeded. Its workers' logs:" \
      "kubectl logs -l jobset.sigs.k8s.io/jobset-name=$workload --prefix" >&2
    return 1 # 75 would start it again here too
  fi
}
