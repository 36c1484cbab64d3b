"""What a run would hold, and where: shapes and shardings, nothing allocated."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import inspect
import re
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np
import optax

from calm_jax import (
  assembly,
  metrics,
  quantization,
  sharding,
  train,
  train_state,
  trees,
)
from calm_jax import run_stages as stages
from calm_jax.array_types import Params
from calm_jax.composition import ComposedLM


@dataclasses.dataclass(frozen=True)
class Layout:
  """One training step with all that it is given; leaves are shape structs.

  Attributes:
    settings: the arguments of `train.train`.
    model: that is trained in part or whole.
    mesh: over which it is placed.
    shapes: of all parameters, as floats.
    frozen: the frozen trees, as they are kept.
    state: the train state.
    batch: a global batch.
    update: the optimizer.
  """

  settings: Mapping[str, Any]
  model: ComposedLM
  mesh: Mesh
  shapes: Params
  frozen: Params
  state: train_state.TrainState
  batch: Mapping[str, Any]
  update: optax.GradientTransformation

  @property
  def trainable(self) -> str:
    return self.settings['trainable']

  def bytes_per_device(self) -> dict[str, int]:
    """Returns what one device holds between two steps, and the batch."""
    return {
      'frozen': metrics.bytes_per_device(self.frozen),
      'trained': metrics.bytes_per_device(self.state.params),
      'optimizer': metrics.bytes_per_device(self.state.opt_state),
      'batch': metrics.bytes_per_device(dict(self.batch)),
    }


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arguments of `train.train`, defaults among them."""
  bound = inspect.signature(train.train).bind(**settings)
  bound.apply_defaults()
  return dict(bound.arguments)


def lay_out(
  settings: Mapping[str, Any],
  devices: Sequence[Any],
  *,
  axes: Mapping[str, int] | None = None,
) -> Layout:
  """Describes the step that `train.train` would run with these arguments.

  Args:
    settings: all arguments of `train.train`.
    devices: that the mesh is made of; stand-ins are enough.
    axes: sizes of the mesh, instead of those that `make_mesh` is set to.

  Raises:
    ValueError: as `train.train` would, before it allocates anything.
  """
  anchor, trainable = settings['anchor'], settings['trainable']
  model, kept = assembly.build_trained(
    trainable,
    anchor,
    augmenting=settings['augmenting'] or {},
    composition=settings['composition'],
    lora=settings['lora'],
    stack=settings['stack'],
    remat=settings['remat'],
  )
  if axes is None:
    mesh = settings['make_mesh'](devices=devices)
  else:
    mesh = sharding.make_mesh(devices=devices, **axes)
  stages.check(
    settings['train_steps'],
    settings['batch_size'],
    settings['step_config'],
    trainable,
    mesh,
  )
  specs = {'anchor': anchor, **kept}
  shapes, places = stages.arrange(model, specs, mesh, trainable)
  update = settings['optimizer'].make(settings['train_steps'])
  state = jax.eval_shape(
    functools.partial(
      train_state.create, optimizer=update, seed=settings['random_seed']
    ),
    {trainable: shapes[trainable]},
  )
  return Layout(
    settings,
    model,
    mesh,
    shapes,
    _frozen(specs, shapes, places) if trainable != 'anchor' else {},
    _placed(
      state,
      train_state.shardings(state, {trainable: places[trainable]}, mesh),
    ),
    _batch(settings, kept, mesh),
    update,
  )


def _placed(shapes: Any, places: Any) -> Any:
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    places,
  )


def _frozen(specs: Mapping[str, Any], shapes: Params, places: Params) -> Params:
  towers = {'anchor': shapes['anchor'], **shapes.get('augmenting', {})}
  kept = {
    name: quantization.describe_tree(
      spec.quantization, towers[name], places[name]
    )
    for name, spec in specs.items()
  }
  tree = {'anchor': kept.pop('anchor')}
  return {**tree, 'augmenting': kept} if kept else tree


def _batch(
  settings: Mapping[str, Any], kept: Mapping[str, Any], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns a batch as `make_batches` shapes it, without data if it can."""
  make, anchor = settings['make_batches'], settings['anchor']
  augmenting = settings['augmenting'] or {}
  arguments = {
    'batch_size': settings['batch_size'],
    'seed': settings['random_seed'],
    'vocabulary': anchor.vocabulary,
    'readers': assembly.build_readers(
      anchor, augmenting, settings['composition']
    ),
    'targets_per_row': settings['step_config'].targets_per_row,
  }
  if 'shapes_only' in inspect.signature(make).parameters:
    batch = make(**arguments, shapes_only=True)
  else:
    batch = next(make(**arguments))
  place = sharding.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=place)
    for name, rows in batch.items()
  }


def table(layout: Layout) -> str:
  """Lists the parameters with shape, dtype and sharding; equal ones together.

  A leaf of several blocks or connections stands in one row, with how many of
  it there are. Bytes are of all of them, and of what one device holds.
  """
  rows: dict[tuple[str, ...], list[int]] = {}
  for name, leaf in trees.flatten(
    {
      **layout.frozen,
      **layout.state.params,
    }
  ).items():
    spec = ', '.join(map(_split_over(leaf), leaf.sharding.spec))
    key = (
      _without_numbers(name),
      'x'.join(map(str, leaf.shape)),
      leaf.dtype.name,
      spec if spec.strip('-, ') else 'whole',
    )
    one = leaf.sharding.shard_shape(leaf.shape)
    sums = rows.setdefault(key, [0, 0, 0])
    sums[0] += 1
    sums[1] += trees.stored_bytes(leaf.shape, leaf.dtype)
    sums[2] += trees.stored_bytes(one, leaf.dtype)
  header = (
    'parameter',
    'shape',
    'dtype',
    'split over',
    'count',
    'bytes',
    'on one',
  )
  cells = [header] + [
    (*key, str(sums[0]), f'{sums[1]:,}', f'{sums[2]:,}')
    for key, sums in rows.items()
  ]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.rjust(width) if place > 3 else cell.ljust(width)
      for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in cells
  )


def _split_over(leaf: Any) -> Callable[[Any], str]:
  """Returns what names a mesh axis; those of size 1 split nothing."""
  sizes = leaf.sharding.mesh.shape
  return lambda axis: axis if axis and sizes[axis] > 1 else '-'


def _without_numbers(name: str) -> str:
  """Turns 'anchor/blocks_0_4/...' into 'anchor/blocks_*/...'."""
  return re.sub(r'\d+', '*', name).replace('*_*', '*')


def largest(layout: Layout) -> tuple[str, int]:
  """Returns the name and the bytes on a device of the largest parameter."""
  leaves = trees.flatten({'frozen': layout.frozen, 'state': layout.state})
  sizes = {
    name: trees.stored_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
    for name, leaf in leaves.items()
  }
  name = max(sizes, key=sizes.get)
  return name, sizes[name]


def least_rows(layout: Layout) -> int:
  """Returns how many rows of the batch one device works on at once."""
  parts = sharding.axis_size(layout.mesh, ('data', 'fsdp'))
  rows = layout.batch['decoder_input_tokens'].shape[0]
  return rows // parts // layout.settings['step_config'].microbatches


def tokens(layout: Layout) -> int:
  """Returns the anchor's slots in a global batch."""
  return int(np.prod(layout.batch['decoder_input_tokens'].shape))
