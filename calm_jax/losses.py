"""The training objective: weighted token cross-entropy."""

import flax.struct
import jax
import jax.numpy as jnp

from calm_jax.array_types import Array


@flax.struct.dataclass
class LossSums:
  """Sums over target tokens; dividing is left to whoever adds them up.

  Attributes:
    loss: float32 scalar, the weighted sum of -log p(target), in nats.
    z_loss: float32 scalar, the weighted sum of (log Z)^2.
    correct: float32 scalar, the weighted count of argmax hits.
    weight: float32 scalar, the sum of the weights.
  """

  loss: Array
  z_loss: Array
  correct: Array
  weight: Array


def cross_entropy(
  logits_BTV: Array, targets_BT: Array, weights_BT: Array
) -> LossSums:
  """Sums the cross-entropy of the targets, in float32.

  Args:
    logits_BTV: any float dtype.
    targets_BT: int32 token ids; every id is a word, 0 too.
    weights_BT: float32, 0 where a position is not supervised.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  weights_BT = weights_BT.astype(jnp.float32)
  log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  target_logits_BT = jnp.take_along_axis(
    logits_BTV, targets_BT[..., None], axis=-1
  )[..., 0]
  hits_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
  return LossSums(
    loss=jnp.sum((log_z_BT - target_logits_BT) * weights_BT),
    z_loss=jnp.sum(log_z_BT**2 * weights_BT),
    correct=jnp.sum(hits_BT * weights_BT),
    weight=jnp.sum(weights_BT),
  )
