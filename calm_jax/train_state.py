"""What a training run changes: step, trained parameters, optimizer, RNG."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from calm_jax import sharding, trees
from calm_jax.array_types import Array, Params


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint holds; frozen weights are not among it.

  Attributes:
    step: int32 scalar, updates made so far.
    params: the trained subtree alone, {'composition': ...} for example.
    opt_state: of the optimizer, for `params` alone.
    rng: key data of the run, uint32. Each step folds its number in.
  """

  step: Array
  params: Params
  opt_state: Any
  rng: Array


def create(
  params: Params, optimizer: optax.GradientTransformation, *, seed: int
) -> TrainState:
  """Makes the state at step 0."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    rng=jax.random.key_data(jax.random.key(seed)),
  )


def shardings(
  shapes: TrainState, param_shardings: Params, mesh: Mesh
) -> TrainState:
  """Returns the sharding of each leaf of the state.

  An optimizer slot of its parameter's name and shape is split as the parameter
  is; any other, such as Adafactor's row and column means, is replicated.

  Args:
    shapes: the state's `jax.eval_shape`.
    param_shardings: like `shapes.params`, with sharding leaves.
    mesh: the device mesh.
  """
  param_shapes = trees.flatten(shapes.params)
  places = trees.flatten(param_shardings)

  def one(path, leaf):
    name = trees.path_name(path)
    for param, shape in param_shapes.items():
      if name.endswith(f'/{param}') and shape.shape == leaf.shape:
        return places[param]
    return sharding.replicated(mesh)

  return jax.tree_util.tree_map_with_path(one, shapes)
