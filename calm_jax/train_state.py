"""What a training run changes: step, trained parameters, optimizer, RNG."""

from typing import Any

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from calm_jax import sharding
from calm_jax.array_types import Array, Params


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint holds; frozen weights are not among it.

  Attributes:
    step: int32 scalar, updates made so far.
    params: the trained subtree alone, {'composition': ...} for example.
    opt_state: of the optimizer, for `params` alone.
    rng: key data of the run, uint32. No layer draws from it yet.
  """

  step: Array
  params: Params
  opt_state: Any
  rng: Array


def create(
  boxed_params: Any, optimizer: optax.GradientTransformation, *, seed: int
) -> TrainState:
  """Makes the state at step 0; boxes of logical axes stay around leaves."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=boxed_params,
    opt_state=optimizer.init(boxed_params),
    rng=jax.random.key_data(jax.random.key(seed)),
  )


def shardings(boxed_shapes: TrainState, mesh: Mesh) -> TrainState:
  """Returns the sharding of each leaf of the state.

  An optimizer slot of its parameter's shape is split as the parameter is; any
  other slot, such as Adafactor's row and column means, is replicated.
  """

  def same_rank_or_unboxed(leaf):
    if isinstance(leaf, nn.Partitioned):
      shape = nn.unbox(leaf).shape
      if len(shape) != len(leaf.names):
        return nn.unbox(leaf)
    return leaf

  boxed_shapes = jax.tree.map(
    same_rank_or_unboxed,
    boxed_shapes,
    is_leaf=lambda x: isinstance(x, nn.Partitioned),
  )
  return sharding.param_shardings(boxed_shapes, mesh)
