"""The training step: gradients of the trained subtree, and of nothing else."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from calm_jax import chunked_loss, embedding_noise, losses
from calm_jax.array_types import Array, Batch, Params
from calm_jax.composition import ComposedLM
from calm_jax.train_state import TrainState

Step = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Any]]]


def loss_fn(
  trainable: Params,
  frozen: Params,
  batch: Batch,
  *,
  model: ComposedLM,
  z_loss: float = 0.0,
  targets_per_row: int | None = None,
  loss_chunk: int | None = None,
) -> tuple[Array, losses.LossSums]:
  """Returns the summed loss of one batch, to be differentiated in `trainable`.

  The subtrees are two arguments so that differentiating in the first costs
  nothing for the second: no gradient of a frozen weight is ever formed, and
  nothing flows back below the lowest composed block.

  Args:
    trainable: the trained subtrees, for example {'composition': ...}.
    frozen: the others, {'anchor': ..., 'augmenting': ...}.
    batch: see `calm_jax.batches`.
    model: what maps parameters and batch to logits.
    z_loss: weight of (log Z)^2.
    targets_per_row: M, at least as many as any row has supervised positions.
      Logits are computed for these alone, not for all T; None is all T.
    loss_chunk: positions of a row whose logits are there at once, which saves
      memory where vocabularies are large; None is all. The head must be frozen.

  Returns:
    The sum over target tokens, in nats, and the sums it is made of.
  """
  targets_BM = batch['decoder_target_tokens']
  weights_BM = batch['decoder_loss_weights']
  chosen_BM = None
  if targets_per_row is not None:
    supervised_first_BT = jnp.argsort(weights_BM == 0, axis=1, stable=True)
    chosen_BM = supervised_first_BT[:, :targets_per_row]
    targets_BM = jnp.take_along_axis(targets_BM, chosen_BM, axis=1)
    weights_BM = jnp.take_along_axis(weights_BM, chosen_BM, axis=1)
  params = {**frozen, **trainable}
  x_BMD = model.hidden(params, batch, states_at_BM=chosen_BM)
  if loss_chunk is None:
    logits_BMV = model.logits(params, x_BMD)
    sums = losses.cross_entropy(logits_BMV, targets_BM, weights_BM)
    return sums.loss + z_loss * sums.z_loss, sums
  return chunked_loss.chunked_cross_entropy(
    model.logits,
    frozen,
    x_BMD,
    targets_BM,
    weights_BM,
    chunk=loss_chunk,
    z_loss=z_loss,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
  """What one update is made of.

  Attributes:
    microbatches: how many slices of the batch are run one after the other,
      their gradients added; must divide the batch.
    targets_per_row: as in `loss_fn`.
    loss_chunk: as in `loss_fn`.
    z_loss: as in `loss_fn`.
    embedding_noise: each embedding of the anchor gets normal noise, of a size
      drawn from [0, embedding_noise] times its root mean square (after NEFTune,
      arXiv 2310.05914).
    refuse_loss_above: an update with a larger loss is not applied.
  """

  microbatches: int = 1
  targets_per_row: int | None = None
  loss_chunk: int | None = None
  z_loss: float = 0.0
  embedding_noise: float = 0.0
  refuse_loss_above: float | None = None

  def __post_init__(self):
    for name in ('microbatches', 'targets_per_row', 'loss_chunk'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'StepConfig.{name} = {value}: it must be at least 1.')
    for name in ('z_loss', 'embedding_noise', 'refuse_loss_above'):
      value = getattr(self, name)
      if value is not None and value < 0:
        raise ValueError(
          f'StepConfig.{name} = {value}: it must not be negative.'
        )


DEFAULT = StepConfig()


def make_train_step(
  model: ComposedLM,
  optimizer: optax.GradientTransformation,
  config: StepConfig = DEFAULT,
) -> Step:
  """Returns the function (state, frozen, batch) -> (state, metrics).

  An update whose loss or gradient is not finite, or whose loss is above the
  limit, is not applied: the step counts, and `applied` in the metrics is False.

  Args:
    model: the model that is trained in part or whole.
    optimizer: for the trained subtree.
    config: what one update is made of.
  """
  differentiate = jax.grad(
    functools.partial(
      loss_fn,
      model=model,
      z_loss=config.z_loss,
      targets_per_row=config.targets_per_row,
      loss_chunk=config.loss_chunk,
    ),
    has_aux=True,
  )

  def step(state, frozen, batch):
    if config.embedding_noise:
      rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
      shape_BTD = *batch['decoder_input_tokens'].shape, model.anchor.width
      noise_BTD = embedding_noise.draw(
        rng, shape_BTD, most=config.embedding_noise
      )
      batch = {**batch, 'decoder_embedding_noise': noise_BTD}
    gradients, sums = _accumulate(
      functools.partial(differentiate, state.params, frozen),
      batch,
      config.microbatches,
    )
    gradients = jax.tree.map(lambda g: g / sums.weight, gradients)
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    loss, norm = sums.loss / sums.weight, optax.tree.norm(gradients)
    is_good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.refuse_loss_above is not None:
      is_good &= loss <= config.refuse_loss_above
    metrics = {
      'loss': loss,
      'accuracy': sums.correct / sums.weight,
      'target_tokens': sums.weight,
      'grad_norm': norm,
      'dropped_targets': jnp.sum(batch['decoder_loss_weights']) - sums.weight,
      'applied': is_good,
    }
    new = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(is_good, new, old),
      new,
      (state.params, state.opt_state),
    )
    state = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    )
    return state, metrics

  return step


def _accumulate(
  differentiate: Callable[[Batch], Any], batch: Batch, microbatches: int
) -> tuple[Params, losses.LossSums]:
  """Returns gradients and loss, both summed over target tokens."""
  if microbatches == 1:
    return differentiate(batch)
  # Rows i, i + microbatches, ...: each slice stays spread over all devices.
  parts = jax.tree.map(
    lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
  )

  def add(total, part):
    return jax.tree.map(jnp.add, total, differentiate(part)), None

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], parts)),
  )
  return jax.lax.scan(add, zeros, parts)[0]


def eval_fn(
  params: Params, batch: Batch, *, model: ComposedLM
) -> dict[str, Array]:
  """Returns mean loss (nats) and accuracy over the target tokens of a batch."""
  _, sums = loss_fn(params, {}, batch, model=model)
  return {
    'loss': sums.loss / sums.weight,
    'accuracy': sums.correct / sums.weight,
    'target_tokens': sums.weight,
  }
