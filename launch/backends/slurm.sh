# shellcheck shell=bash disable=SC2154 # of launch/backends.sh
# Backend slurm: one task on each GPU, or node, by srun.
#
# https://slurm.schedmd.com/srun.html
# https://docs.jax.dev/en/latest/multi_process.html

prepare() {
  take nodes 1
  take gpus_per_node 0
  is_number "$nodes" || fail "--nodes=$nodes is no number"
  is_number "$gpus_per_node" || fail "--gpus_per_node=$gpus_per_node is no" \
    "number"
  need srun 'Run this where Slurm is, on a login node or in an allocation.'
  if [[ "$entry" != train ]] && (( nodes > 1 )); then
    echo "$entry works in one process; so one node is taken." >&2
    nodes=1
  fi
  find_python "$dry_run"
  check_model_dir
}

run_once() {
  local variables tasks=1
  if [[ "$entry" == train ]] && (( gpus_per_node > 1 )); then
    tasks="$gpus_per_node" # JAX takes a GPU for each task
  fi
  variables=()
  if (( nodes * tasks > 1 )); then
    [[ -n "$num_devices" ]] || (( gpus_per_node == 0 )) \
      || num_devices=$((nodes * gpus_per_node))
    variables_of auto
  fi
  # Not --kill-on-bad-exit: when one task was preempted, the others still save.
  local command=(env ${variables[@]+"${variables[@]}"} srun
    "--nodes=$nodes" "--ntasks-per-node=$tasks" --label
    --kill-on-bad-exit=0 "--wait=$GRACE")
  (( gpus_per_node == 0 )) || command+=("--gpus-per-node=$gpus_per_node")
  run "${command[@]}" ${rest[@]+"${rest[@]}"} "$python" -m "calm_jax.$entry" \
    ${flags[@]+"${flags[@]}"}
}
