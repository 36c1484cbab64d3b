"""Frozen weights kept in fewer bits, and made whole where they are used.

Storage only: a matrix becomes a `qwix.QArray` of small integers and scales, and
each dense layer turns it back into floats before it multiplies. Activations
stay as they are: one scale for a whole tensor of them would depend on later
tokens, and leak what comes next. qwix (the extra `quantized`) is imported
when a weight is quantised, and not before.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from calm_jax import sharding, trees
from calm_jax.array_types import Array, DType

# What qwix calls each kind: a dtype, or for NF4 (arXiv 2305.14314) its name.
QTYPES = {'int8': jnp.int8, 'int4': jnp.int4, 'nf4': 'nf4'}
LEAVES = ('kernels', 'kernels_and_table')

_BLOCK_KERNEL = re.compile(r'blocks?_\d+(_\d+)?/.*/kernel')


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
  """How the weights of a frozen model are stored.

  Attributes:
    kind: 'int8', 'int4' or 'nf4'; two 4-bit numbers share a byte.
    group_size: so many inputs of an output channel share a float32 scale;
      None is all of them.
    leaves: 'kernels' are the matrices of the blocks, 'kernels_and_table' also
      the embedding table and the head.
  """

  kind: Literal['int8', 'int4', 'nf4'] = 'int8'
  group_size: int | None = None
  leaves: Literal['kernels', 'kernels_and_table'] = 'kernels'

  def __post_init__(self):
    for field, allowed in (('kind', tuple(QTYPES)), ('leaves', LEAVES)):
      if getattr(self, field) not in allowed:
        raise ValueError(
          f'QuantizationConfig.{field} = {getattr(self, field)!r} is not one of'
          f' {allowed}.'
        )
    if self.group_size is not None and self.group_size < 2:
      raise ValueError(
        f'QuantizationConfig.group_size = {self.group_size}: a group has at'
        ' least 2 inputs; None is one group for all.'
      )
    _qwix()

  def check_widths(self, widths: Sequence[int]) -> None:
    """Raises ValueError if a matrix with one of these input widths has a rest.

    Args:
      widths: numbers of inputs of the matrices of a model.
    """
    wrong = [n for n in widths if self.group_size and n % self.group_size]
    if wrong:
      raise ValueError(
        f'QuantizationConfig.group_size = {self.group_size} does not divide the'
        f' width {wrong[0]} of this model, whose matrices read {list(widths)}'
        ' inputs. Choose a divisor of all, or None.'
      )


def quantize_leaf(
  config: QuantizationConfig | None, name: str, array: Array
) -> Any:
  """Quantises one placed leaf if it is chosen, and frees what it was made of.

  The integers are sharded as the leaf is, and the scales as its channels are.
  Returns when that is done: who loads leaf by leaf never holds two of them
  unquantised.

  Args:
    config: None returns the array as it is.
    name: of the leaf in the model's tree, 'block_0/mlp/up/kernel'.
    array: [in, out] or stacked [L, in, out], a table [V, D]; deleted if chosen.
  """
  axis = _input_axis(name, config)
  if axis is None:
    return array
  quantized = _jitted(config, axis, array.ndim, array.sharding)(array)
  jax.block_until_ready(quantized)
  array.delete()
  return quantized


def quantize_tree(config: QuantizationConfig | None, params: Any) -> Any:
  """Quantises one model's parameters; pure, and so fit for `eval_shape`."""

  def one(path, leaf):
    axis = _input_axis(trees.path_name(path), config)
    return leaf if axis is None else _quantize(leaf, config=config, axis=axis)

  return jax.tree_util.tree_map_with_path(one, params)


def check_places(
  config: QuantizationConfig | None, shapes: Any, places: Any
) -> None:
  """Raises ValueError if the mesh would split a group of inputs.

  Args:
    config: of the model; None has no groups.
    shapes: shapes of one model's parameters.
    places: their shardings.
  """
  places = trees.flatten(places)
  for name, leaf in trees.flatten(shapes).items():
    axis = _input_axis(name, config)
    if axis is None or config.group_size is None:
      continue
    shape, place = list(leaf.shape), places[name]
    shape[axis] //= config.group_size
    try:
      _scale_place(place, config, axis, len(shape)).shard_shape(tuple(shape))
    except ValueError as error:
      raise ValueError(
        f'{name} of shape {leaf.shape}: {shape[axis]} groups of'
        f' QuantizationConfig.group_size = {config.group_size} inputs cannot be'
        f' split as the leaf is, by {place.spec} over {dict(place.mesh.shape)}.'
        ' Choose smaller groups, or another mesh.'
      ) from error


def describe_tree(
  config: QuantizationConfig | None, shapes: Any, places: Any
) -> Any:
  """Returns one model's parameters as they are kept; allocates nothing.

  Args:
    config: of the model; None keeps floats.
    shapes: shapes of its parameters.
    places: their shardings.

  Returns:
    Shape structs with shardings.
  """

  def one(path, leaf, place):
    axis = _input_axis(trees.path_name(path), config)
    if axis is None:
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    quantize = functools.partial(_quantize, config=config, axis=axis)
    parts, tree = jax.tree.flatten(jax.eval_shape(quantize, leaf))
    kept = [place, _scale_place(place, config, axis, leaf.ndim)]
    return jax.tree.unflatten(
      tree,
      [
        jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where)
        for part, where in zip(parts, kept, strict=True)
      ],
    )

  return jax.tree_util.tree_map_with_path(one, shapes, places)


def dequantize(
  leaf: Any,
  dtype: DType,
  *,
  axis: int = -2,
  logical_axes: tuple[str | None, ...] = (),
) -> Array:
  """Returns what a leaf stands for, as an array of `dtype`.

  Args:
    leaf: an array, returned as it is but for its dtype, or a QArray.
    dtype: of the computation; products with scales are in the scales' float32.
    axis: of the inputs, along which scales are shared: -2 of a kernel
      [in, out], -1 of rows [..., D] of a table.
    logical_axes: if given, what is split over fsdp is collected as bytes, and
      not as floats.
  """
  if trees.is_quantized(leaf):
    if logical_axes:
      leaf = _gather(leaf, logical_axes)
    leaf = _each_channel(_qwix().dequantize, axis, leaf.ndim)(leaf)
  return leaf.astype(dtype)


def _gather(leaf: Any, logical_axes: tuple[str | None, ...]) -> Any:
  # Not every backend's collectives know numbers of 4 bits.
  wide = jnp.uint8 if leaf.qtype == 'nf4' else jnp.int8

  def one(x):
    axes = zip(x.shape, logical_axes, strict=True)
    return sharding.gather(x, *(None if n == 1 else a for n, a in axes))

  return leaf.replace(
    qvalue=one(leaf.qvalue.astype(wide)), scale=one(leaf.scale)
  )


def _qwix() -> Any:
  try:
    import qwix
  except ImportError as error:
    raise ValueError(
      'Quantised weights need qwix, which is not installed: pip install'
      " 'calm_jax[quantized]'."
    ) from error
  return qwix


def _input_axis(name: str, config: QuantizationConfig | None) -> int | None:
  """Returns along which axis a leaf shares scales; None leaves it as it is."""
  if config is None:
    return None
  if _BLOCK_KERNEL.fullmatch(name):
    return -2
  both = config.leaves == 'kernels_and_table'
  return {'head/kernel': -2, 'embedder/table': -1}.get(name) if both else None


def _quantize(array: Array, *, config: QuantizationConfig, axis: int) -> Any:
  if array.ndim == 3:  # layer by layer: one float32 copy of a layer at a time
    one = functools.partial(_quantize, config=config, axis=axis)
    return jax.lax.map(one, array)
  groups = {0: config.group_size} if config.group_size else None
  qtype = QTYPES[config.kind]
  quantize = functools.partial(_qwix().quantize, qtype=qtype, tiled_axes=groups)
  return _each_channel(quantize, axis, array.ndim)(array.astype(jnp.float32))


def _each_channel(
  function: Callable[[Any], Any], axis: int, ndim: int
) -> Callable[[Any], Any]:
  """Maps a function of a vector along `axis` over all other axes.

  qwix flattens what it looks up in the NF4 table. Of a vector that is nothing;
  a whole matrix that is split over two mesh axes it would gather.
  """
  for _ in range(-1 - axis):
    function = jax.vmap(function, in_axes=-1, out_axes=-1)
  for _ in range(ndim + axis):
    function = jax.vmap(function)
  return function


@functools.cache
def _jitted(
  config: QuantizationConfig, axis: int, ndim: int, place: Sharding
) -> Callable[[Array], Any]:
  quantize = functools.partial(_quantize, config=config, axis=axis)
  inputs = config.group_size or 1
  like = jax.ShapeDtypeStruct((inputs,) * ndim, jnp.float32)
  tree = jax.tree.structure(jax.eval_shape(quantize, like))
  places = [place, _scale_place(place, config, axis, ndim)]
  return jax.jit(quantize, out_shardings=jax.tree.unflatten(tree, places))


def _scale_place(
  place: Sharding, config: QuantizationConfig, axis: int, ndim: int
) -> Sharding:
  """Returns the sharding of a leaf's scales."""
  if not isinstance(place, NamedSharding):
    return place
  spec = [*place.spec, *(None,) * (ndim - len(place.spec))]
  if config.group_size is None:
    spec[axis] = None
  return NamedSharding(place.mesh, PartitionSpec(*spec))
