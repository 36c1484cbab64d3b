"""The device mesh, and the one table from logical axes to mesh axes."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flax import linen as nn
import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from calm_jax import trees

MESH_AXES = ('data', 'fsdp', 'tensor')

# Parameters are named by the first group, activations by the second. A
# logical name that is not in the table is an error, never a silent replicate.
LOGICAL_AXIS_RULES = (
  ('vocab', 'tensor'),
  ('embed', 'fsdp'),
  ('augmenting_embed', None),
  ('mlp', 'tensor'),
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('head_dim', None),
  ('layers', None),
  ('lora_rank', None),
  ('batch', ('data', 'fsdp')),
  ('length', None),
  ('activation_embed', None),
)


AxisRules = Literal['replicated'] | Mapping[str, str | None]


def make_mesh(
  *,
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  slices: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Arranges the devices as a mesh with the axes data, fsdp and tensor.

  Args:
    data: size of the data axis; -1 takes what the other two leave.
    fsdp: over how many devices parameters are split by their width.
    tensor: over how many devices heads, feed-forward and vocabulary are split.
    slices: of TPUs that are joined by the slower data-centre network; only the
      data axis reaches over it, so `data` must be a multiple.
    devices: defaults to all devices of all processes.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
    raise ValueError(
      f'A mesh of data={data} x fsdp={fsdp} x tensor={tensor}: each must be at'
      ' least 1, or data=-1 for the rest.'
    )
  if data == -1:
    data = max(1, len(devices) // (fsdp * tensor))
  if data * fsdp * tensor != len(devices):
    raise ValueError(
      f'A mesh of data={data} x fsdp={fsdp} x tensor={tensor} needs'
      f' {data * fsdp * tensor} devices, and there are {len(devices)}. Choose'
      f' sizes whose product is {len(devices)}, or data=-1 for the rest.'
    )
  if slices < 1 or data % slices:
    raise ValueError(
      f'slices = {slices} does not divide data = {data}: only the data axis'
      ' reaches over several slices. Choose data as a multiple of it.'
    )
  return Mesh(
    arrange(devices, data=data, fsdp=fsdp, tensor=tensor, slices=slices),
    MESH_AXES,
  )


def arrange(
  devices: Sequence[Any], *, data: int, fsdp: int, tensor: int, slices: int
) -> np.ndarray:
  """Returns the devices as [data, fsdp, tensor], neighbours side by side."""
  if slices == 1:
    return mesh_utils.create_device_mesh((data, fsdp, tensor), devices)
  return mesh_utils.create_hybrid_device_mesh(
    (data // slices, fsdp, tensor), (slices, 1, 1), devices
  )


def rules_of(axis_rules: AxisRules | None) -> Sequence[tuple[str, Any]]:
  """Returns the table for one model's parameters.

  Args:
    axis_rules: 'replicated' keeps the model whole on every device; a mapping
      replaces single rules, as in {'embed': None}; None is the table itself.

  Raises:
    ValueError: for an axis or a mesh axis that there is not.
  """
  table = dict(LOGICAL_AXIS_RULES)
  if axis_rules is None:
    return LOGICAL_AXIS_RULES
  if axis_rules == 'replicated':
    return tuple(dict.fromkeys(table).items())
  if not isinstance(axis_rules, Mapping):
    raise ValueError(
      f"axis_rules = {axis_rules!r}: expected 'replicated' or a mapping."
    )
  for axis, mesh_axis in axis_rules.items():
    if axis not in table or mesh_axis not in (None, *MESH_AXES):
      raise ValueError(
        f'axis_rules has {axis!r}: {mesh_axis!r}; the axes are'
        f' {sorted(table)}, and they can go to {(*MESH_AXES, None)}.'
      )
  return tuple({**table, **axis_rules}.items())


def param_shardings(
  boxed_shapes: Any,
  mesh: Mesh,
  rules: Sequence[tuple[str, Any]] = LOGICAL_AXIS_RULES,
) -> Any:
  """Returns the sharding of every parameter, from its logical axes.

  Args:
    boxed_shapes: `jax.eval_shape` of an init, with partitioning metadata.
    mesh: the device mesh.
    rules: the table from logical to mesh axes.

  Returns:
    A tree like the unboxed parameters, with `NamedSharding` leaves.

  Raises:
    ValueError: if a logical axis is not in the table, or if the mesh does not
      divide a parameter.
  """
  table = dict(rules)

  def one(path, leaf):
    name = trees.path_name(path)
    logical_axes = leaf.names if isinstance(leaf, nn.Partitioned) else ()
    shape = nn.unbox(leaf).shape
    spec = []
    for size, axis in zip(shape, logical_axes, strict=bool(logical_axes)):
      if axis is not None and axis not in table:
        raise ValueError(
          f'{name} has the logical axis {axis!r}, which the rules do not'
          f' name. Known: {sorted(table)}.'
        )
      mesh_axis = table.get(axis)
      spec.append(mesh_axis)
      if mesh_axis is not None and size % axis_size(mesh, mesh_axis):
        raise ValueError(
          f'{name} of shape {shape}: axis {axis!r} of size {size} cannot be'
          f' split over mesh axis {mesh_axis!r} of size'
          f' {axis_size(mesh, mesh_axis)}. Choose a mesh that divides it.'
        )
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(
    one, boxed_shapes, is_leaf=lambda x: isinstance(x, nn.Partitioned)
  )


def axis_size(mesh: Mesh, mesh_axis: str | tuple[str, ...]) -> int:
  """Returns over how many devices a mesh axis (or several) splits."""
  axes = (mesh_axis,) if isinstance(mesh_axis, str) else mesh_axis
  return int(np.prod([mesh.shape[axis] for axis in axes]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: rows over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Raises ValueError unless the mesh divides the batch."""
  parts = axis_size(mesh, ('data', 'fsdp'))
  if batch_size % parts:
    raise ValueError(
      f'BATCH_SIZE = {batch_size} cannot be split over data x fsdp ='
      f' {parts} devices. Choose a multiple of {parts}.'
    )


def put_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Puts a global batch on the mesh; each process gives its own rows."""
  sharding = batch_sharding(mesh)
  return {
    key: jax.make_array_from_callback(
      rows.shape, sharding, lambda index, rows=rows: rows[index]
    )
    for key, rows in batch.items()
  }


def needed_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
  """Returns which rows of a batch this process gives; bool [B]."""
  needed_B = np.zeros(batch_size, bool)
  places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  for (rows,) in places.values():
    needed_B[rows] = True
  return needed_B


def largest(numbers: Any) -> Any:
  """Returns a tree of ints, of each the largest that any process has.

  Every process must take part, with a tree of the same form.
  """
  if jax.process_count() == 1:
    return numbers
  leaves, form = jax.tree.flatten(numbers)
  mine = np.array(leaves, np.int64).view(np.uint8)  # JAX would cut them to 32
  every = np.asarray(multihost_utils.process_allgather(mine)).view(np.int64)
  return form.unflatten(every.max(axis=0).tolist())


def collect(array: Any) -> np.ndarray:
  """Copies an array to the host, whole; every process must take part.

  Args:
    array: on the host or on devices, of which other processes may hold parts.
  """
  if (
    isinstance(array, jax.Array)
    and not array.is_fully_addressable
    and not array.is_fully_replicated
  ):
    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(jax.device_get(array))


def ambient_mesh() -> Any:
  """Returns the mesh of `jax.set_mesh` if it has our axes, else None."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if set(MESH_AXES) <= set(mesh.axis_names) else None


def constrain(x: Any, *logical_axes: str | None) -> Any:
  """Pins an activation to the table's sharding; does nothing without a mesh."""
  if ambient_mesh() is None:
    return x
  table = dict(LOGICAL_AXIS_RULES)
  spec = PartitionSpec(*(table[a] if a else None for a in logical_axes))
  return jax.lax.with_sharding_constraint(x, spec)


def gather(x: Any, *logical_axes: str | None) -> Any:
  """Pins a parameter to the table's sharding, collected over fsdp."""
  table = dict(LOGICAL_AXIS_RULES)
  return constrain(
    x, *(None if table.get(a) == 'fsdp' else a for a in logical_axes)
  )
