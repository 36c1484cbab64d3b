"""Tasks, installed as `calm_jax.tasks`; import them under that name only."""
