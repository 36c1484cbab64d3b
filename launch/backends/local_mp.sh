# shellcheck shell=bash disable=SC2154 # of launch/backends.sh
# Backend local-mp N: N processes on this machine, on a GPU each or on the CPU.
#
# The variables are those of calm_jax/distributed.py, which hands them to
# https://docs.jax.dev/en/latest/_autosummary/jax.distributed.initialize.html

prepare() {
  count="${rest[0]:-}"
  [[ "$count" =~ ^[1-9][0-9]*$ ]] \
    || fail "local-mp is followed by the number of processes: local-mp 2 $entry"
  rest=("${rest[@]:1}")
  no_more_options
  if [[ "$entry" != train ]] && (( count > 1 )); then
    echo "$entry works in one process; so one is started." >&2
    count=1
  fi
  find_python "$dry_run"
  check_model_dir
  gpus=0
  if [[ "${JAX_PLATFORMS:-}" != cpu ]] && command -v nvidia-smi > /dev/null
  then
    gpus="$(nvidia-smi -L 2> /dev/null | grep -c '^GPU ' || true)"
    gpu_ids="${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
    IFS=, read -ra gpu_ids <<< "$gpu_ids"
    (( gpus == 0 )) || gpus="${#gpu_ids[@]}"
    if (( gpus > 0 && gpus < count )); then
      fail "local-mp $count: there are $gpus GPUs here, and a process takes" \
        "one. Start $gpus, or set JAX_PLATFORMS=cpu."
    fi
  fi
}

free_port() {
  "$python" -c 'import socket
with socket.socket() as s:
  s.bind(("127.0.0.1", 0))
  print(s.getsockname()[1])'
}

run_once() {
  local port=PORT i code
  (( dry_run )) || port="$(free_port)"
  local variables command
  if (( ! dry_run )); then
    pipes="$(mktemp -d)"
    trap 'rm -rf "$pipes"' EXIT
  fi
  variables_of "127.0.0.1:$port"
  workers=()
  local readers=()
  for (( i = 0; i < count; i++ )); do
    command=(env "${variables[@]}" "CALM_JAX_NUM_PROCESSES=$count"
      "CALM_JAX_PROCESS_ID=$i")
    if (( gpus > 0 )); then
      command+=("CUDA_VISIBLE_DEVICES=${gpu_ids[i]}")
    else
      command+=(JAX_PLATFORMS=cpu)
    fi
    command+=("$python" -m "calm_jax.$entry" ${flags[@]+"${flags[@]}"})
    if (( dry_run )); then
      show "${command[@]}"
      continue
    fi
    mkfifo "$pipes/$i"
    with_prefix "[worker $i] " < "$pipes/$i" &
    readers+=($!)
    "${command[@]}" > "$pipes/$i" 2>&1 &
    workers+=($!)
  done
  (( ! dry_run )) || return 0
  code=0
  wait_for_all || code=$?
  for i in "${readers[@]}"; do
    wait "$i" || true
  done
  rm -rf "$pipes"
  return "$code"
}

with_prefix() {
  local line
  trap '' TERM INT # it ends when the worker does
  while IFS= read -r line || [[ -n "$line" ]]; do
    printf '%s%s\n' "$1" "$line"
  done
}

# Waits until all have ended, and returns the code of the first that failed. The
# others then end too: they have time to save if it was preempted.
wait_for_all() {
  local left=("${workers[@]}") deadline=0 first=0 pid still code i
  while (( ${#left[@]} )); do
    still=()
    for pid in "${left[@]}"; do
      if is_running "$pid"; then
        still+=("$pid")
        continue
      fi
      code=0
      wait "$pid" || code=$?
      if (( code && ! first )); then
        first="$code"
        for (( i = 0; i < count; i++ )); do
          [[ "${workers[i]}" != "$pid" ]] \
            || echo "[worker $i] ended with code $code" >&2
        done
        deadline=$((SECONDS + GRACE))
        if (( code != PREEMPTED )); then
          deadline=$((SECONDS + FAILED_GRACE))
          kill_all TERM
        fi
      fi
    done
    left=(${still[@]+"${still[@]}"})
    (( ${#left[@]} )) || break
    if (( stopped && ! deadline )); then
      deadline=$((SECONDS + GRACE))
    fi
    if (( deadline && SECONDS > deadline )); then
      kill_all KILL
    fi
    sleep 0.3 || true
  done
  workers=()
  return "$first"
}

# Whether a process has not ended; one that has is a zombie until waited for.
is_running() { kill -0 "$1" 2> /dev/null; }

kill_all() {
  local pid
  for pid in "${workers[@]}"; do
    kill "-$1" "$pid" 2> /dev/null || true
  done
}
