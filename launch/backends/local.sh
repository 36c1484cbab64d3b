# shellcheck shell=bash disable=SC2154 # of launch/backends.sh
# Backend local: one process, here.

prepare() {
  no_more_options
  find_python "$dry_run"
  check_model_dir
}

run_once() {
  run "$python" -m "calm_jax.$entry" ${flags[@]+"${flags[@]}"}
}
