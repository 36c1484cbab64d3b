"""What `calm_jax.report` is made of."""
