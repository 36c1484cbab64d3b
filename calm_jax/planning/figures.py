"""What one step costs a device: compiled for it, or estimated."""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from calm_jax import hlo, sharding, train_step, trees
from calm_jax.planning import layout as layouts
from calm_jax.planning import traced, traffic
from calm_jax.planning.chips import Chip
from calm_jax.planning.layout import Layout

# An estimate of temporaries is believed up to this factor (docs/plan.md).
MARGIN = 1.5
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class DoesNotFitError(Exception):
  """The compiler refuses a program that needs too much memory.

  Attributes:
    needed: bytes on one device, all together; None if it does not say.
    available: bytes that it has, or None.
  """

  def __init__(self, message: str):
    super().__init__(message)
    found = re.search(
      r'[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)', message
    )
    self.needed = self.available = None
    if found:
      self.needed = int(float(found[1]) * _UNITS[found[2]])
      self.available = int(float(found[3]) * _UNITS[found[4]])


@dataclasses.dataclass(frozen=True)
class Figures:
  """One step on one device.

  Attributes:
    how: where these figures come from, for people.
    is_compiled: by a compiler, or else estimated.
    temporaries: bytes beside what is held between steps.
    flops: of matrix products.
    moved: bytes read from its memory and written to it.
    collectives: by kind.
  """

  how: str
  is_compiled: bool
  temporaries: int
  flops: float
  moved: float
  collectives: Mapping[str, traffic.Moved]

  @property
  def sent(self) -> float:
    """Bytes that it sends to other devices."""
    return sum(one.nbytes for one in self.collectives.values())


def compiled(layout: Layout, chip: Chip) -> Figures:
  """Compiles the step for the devices of a mesh, and reads what came out.

  Raises:
    DoesNotFitError: if the compiler says so, which not every backend does.
  """
  mesh = layout.mesh
  step = jax.jit(
    _step(layout),
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda x: x.sharding, layout.state),
      sharding.replicated(mesh),
    ),
  )
  with jax.set_mesh(mesh):
    lowered = step.lower(layout.state, layout.frozen, dict(layout.batch))
  try:
    done = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      raise DoesNotFitError(str(error)) from error
    raise
  text = done.as_text()
  program = hlo.parse(text)
  memory = done.memory_analysis()
  fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Figures(
    f'compiled for {chip.name} ahead of time',
    True,
    memory.temp_size_in_bytes + fresh + memory.generated_code_size_in_bytes,
    hlo.flops(text),
    traffic.hbm_bytes(program),
    traffic.collectives(program, num_devices=mesh.size),
  )


def estimated(layout: Layout) -> Figures:
  """Counts the traced step; compiles nothing.

  Activations have the rows of one device, and are taken to be whole over the
  tensor axis, which is too much. What has the shape of a trained parameter is
  taken to be split as that is; of what is split over fsdp, the two largest
  blocks' parameters are there whole as well.
  """
  mesh = layout.mesh
  rows = sharding.axis_size(mesh, ('data', 'fsdp'))
  batch = {
    name: jax.ShapeDtypeStruct((x.shape[0] // rows, *x.shape[1:]), x.dtype)
    for name, x in layout.batch.items()
  }
  jaxpr = jax.make_jaxpr(_step(layout))(
    *jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
      (layout.state, layout.frozen),
    ),
    batch,
  )
  split = {
    x.shape: _parts(x)
    for x in jax.tree.leaves(layout.state.params)
    if len(x.shape) > 1
  }
  found = traced.usage(
    jaxpr.jaxpr, lambda aval: traced.nbytes(aval) // split.get(aval.shape, 1)
  )
  return Figures(
    'analytic: counted on the traced step, not compiled',
    False,
    int(found.peak) + _gathered(layout),
    found.flops / mesh.shape['tensor'],
    found.moved,
    _collectives(layout),
  )


def _step(layout: Layout) -> train_step.Step:
  return train_step.make_train_step(
    layout.model, layout.update, layout.settings['step_config']
  )


def _parts(leaf: Any) -> int:
  """Returns into how many parts a leaf is split."""
  whole = math.prod(leaf.shape)
  return whole // max(1, math.prod(leaf.sharding.shard_shape(leaf.shape)))


def _is_split(leaf: Any, axis: str) -> bool:
  return axis in jax.tree.leaves(tuple(leaf.sharding.spec))


def _collected(leaf: Any) -> float:
  """Returns the bytes of a leaf once it is collected over fsdp."""
  one = leaf.sharding.shard_shape(leaf.shape)
  return trees.stored_bytes(one, leaf.dtype) * leaf.sharding.mesh.shape['fsdp']


def _gathered(layout: Layout) -> int:
  """Returns the bytes of two blocks that are there whole, and not split."""
  blocks: dict[str, float] = {}
  for name, leaf in trees.flatten(layout.frozen).items():
    block = re.search(r'^(.*?/blocks?_[\d_]+)/', name)
    if block and _is_split(leaf, 'fsdp') and layout.mesh.shape['fsdp'] > 1:
      layers = leaf.shape[0] if block[1].split('/')[-1].count('_') > 1 else 1
      blocks[block[1]] = blocks.get(block[1], 0) + _collected(leaf) / layers
  return int(sum(sorted(blocks.values())[-2:]))


def _collectives(layout: Layout) -> dict[str, traffic.Moved]:
  """Estimates what data, fsdp and tensor parallelism must send.

  Parameters that are split over fsdp are gathered for the forward pass, and
  those above the lowest composed block once more for the backward pass;
  gradients are summed over all devices; over the tensor axis each block sums
  what attention and MLP give, forward and backward.
  """
  mesh, model = layout.mesh, layout.model
  fsdp, tensor = mesh.shape['fsdp'], mesh.shape['tensor']
  times = layout.settings['step_config'].microbatches
  gathers, gathered = 0, 0.0
  for leaf in jax.tree.leaves((layout.frozen, layout.state.params)):
    if fsdp > 1 and _is_split(leaf, 'fsdp'):
      gathers += 2 * times
      gathered += 2 * times * _collected(leaf) * (fsdp - 1) / fsdp
  reduces, reduced, scatters, scattered = 0, 0.0, 0, 0.0
  replicas = mesh.shape['data']
  for leaf in jax.tree.leaves(layout.state.params):
    nbytes = (
      _collected(leaf)
      if _is_split(leaf, 'fsdp')
      else (
        trees.stored_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
      )
    )
    parts = replicas
    if _is_split(leaf, 'fsdp') and fsdp > 1:
      scatters += times
      scattered += times * nbytes * (fsdp - 1) / fsdp
      nbytes /= fsdp
    else:
      parts *= fsdp
    if parts > 1:
      reduces += 1
      reduced += 2 * nbytes * (parts - 1) / parts
  if tensor > 1:
    rows = layouts.least_rows(layout) * times
    for name, tower in (('anchor', model.anchor), *model.augmenting.items()):
      width = tower.width * np.dtype(tower.config.dtype).itemsize
      length = layout.batch['decoder_input_tokens'].shape[1]
      passes = (4 if name == 'anchor' else 2) * tower.depth
      reduces += passes * times
      reduced += passes * rows * length * width * 2 * (tensor - 1) / tensor
  found = {
    'all-gather': traffic.Moved(gathers, gathered),
    'all-reduce': traffic.Moved(reduces, reduced),
    'reduce-scatter': traffic.Moved(scatters, scattered),
  }
  return {kind: one for kind, one in found.items() if one.count}
