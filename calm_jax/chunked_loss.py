"""Cross-entropy over large vocabularies, a few positions at a time."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from calm_jax import losses
from calm_jax.array_types import Array, Params


def chunked_cross_entropy(
  logits_of: Callable[[Params, Array], Array],
  frozen: Params,
  x_BMD: Array,
  targets_BM: Array,
  weights_BM: Array,
  *,
  chunk: int,
  z_loss: float = 0.0,
) -> tuple[Array, losses.LossSums]:
  """Sums the cross-entropy without ever holding the logits of all positions.

  The gradient of the hidden states is computed along with the loss: the head is
  frozen, so a chunk's logits are needed once, and nothing is computed again.

  Args:
    logits_of: returns logits [B, m, V] of parameters and states [B, m, D].
    frozen: its parameters; they get no gradient.
    x_BMD: hidden states.
    targets_BM: as in `losses.cross_entropy`.
    weights_BM: as there.
    chunk: m, positions of each row whose logits are there at once.
    z_loss: weight of (log Z)^2.

  Returns:
    What is to be differentiated in `x_BMD`, and the sums it is made of.
  """

  def total_of(frozen, x_BmD, targets_Bm, weights_Bm):
    sums = losses.cross_entropy(
      logits_of(frozen, x_BmD), targets_Bm, weights_Bm
    )
    return sums.loss + z_loss * sums.z_loss, sums

  def add_up(one, frozen, *arrays):
    parts = jax.tree.map(functools.partial(_split, chunk=chunk), arrays)
    none = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(total_of, frozen, *(part[0] for part in parts)),
    )

    def add(carry, part):
      result, rest = one(frozen, *part)
      return jax.tree.map(jnp.add, carry, result), rest

    return jax.lax.scan(add, none, parts)

  @jax.custom_vjp
  def run(x_BMD, frozen, targets_BM, weights_BM):
    plain = lambda *part: (total_of(*part), None)
    return add_up(plain, frozen, x_BMD, targets_BM, weights_BM)[0]

  def forward(x_BMD, frozen, targets_BM, weights_BM):
    def with_gradient(frozen, x_BmD, *rest):
      total, pull, sums = jax.vjp(
        lambda x: total_of(frozen, x, *rest), x_BmD, has_aux=True
      )
      return (total, sums), pull(jnp.ones_like(total))[0]

    result, dx_nBmD = add_up(
      with_gradient, frozen, x_BMD, targets_BM, weights_BM
    )
    dx_BMD = jnp.moveaxis(dx_nBmD, 0, 1).reshape(
      len(x_BMD), -1, *x_BMD.shape[2:]
    )
    return result, dx_BMD[:, : x_BMD.shape[1]]

  def backward(dx_BMD, cotangents):
    return dx_BMD * cotangents[0].astype(dx_BMD.dtype), None, None, None

  run.defvjp(forward, backward)
  return run(x_BMD, frozen, targets_BM, weights_BM)


def _split(x_BM: Array, *, chunk: int) -> Array:
  """Returns [n, B, chunk, ...], padded with zeros; rows stay where they are."""
  B, M = x_BM.shape[:2]
  padding = [(0, 0), (0, -M % chunk)] + [(0, 0)] * (x_BM.ndim - 2)
  padded = jnp.pad(x_BM, padding)
  return jnp.moveaxis(padded.reshape(B, -1, chunk, *x_BM.shape[2:]), 1, 0)
