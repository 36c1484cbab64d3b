"""Noise on embeddings in training (after NEFTune, arXiv 2310.05914)."""

import jax
import jax.numpy as jnp

from calm_jax.array_types import Array


def draw(rng: Array, shape: tuple[int, int, int], *, most: float) -> Array:
  """Draws normal noise [B, T, D], for each token of a size in [0, most].

  A composition writes vectors into the anchor's stream that are no embedding of
  any token. A small anchor that has only seen clean embeddings is sure of
  itself, and wrong, everywhere between them; one that has seen noise is unsure
  there, and its gradient says what the composition should write.
  """
  size_rng, noise_rng = jax.random.split(rng)
  sizes_BT1 = jax.random.uniform(size_rng, (*shape[:2], 1), maxval=most)
  return sizes_BT1 * jax.random.normal(noise_rng, shape)


def add(x: Array, noise: Array) -> Array:
  """Adds noise in units of each vector's root mean square."""
  mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
  return x + (noise * jnp.sqrt(mean_square + 1e-12)).astype(x.dtype)
