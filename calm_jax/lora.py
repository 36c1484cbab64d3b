"""LoRA: low-rank updates of the frozen anchor, as a baseline.

Hu et al. (arXiv 2106.09685): a matrix W is used as W + (alpha / r) A B, with A
[in, r] and B [r, out] all that is trained. B begins at zero, so that the model
begins as the anchor. `layers.Dense` adds x A B where it is given them.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any
import zlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from calm_jax import trees
from calm_jax.array_types import Array, Params
from calm_jax.models import weights
from calm_jax.models.transformer import DecoderLM

MATRICES = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Which matrices are updated, and how.

  Attributes:
    rank: r; None takes the rank whose number of parameters is nearest to that
      of the composition described beside it.
    alpha: the update is multiplied by alpha / r; None is r.
    targets: matrices of each block, by name.
    param_dtype: dtype of storage.
  """

  rank: int | None = None
  alpha: float | None = None
  targets: tuple[str, ...] = MATRICES
  param_dtype: str = 'float32'

  def __post_init__(self):
    object.__setattr__(self, 'targets', tuple(self.targets))
    unknown = [name for name in self.targets if name not in MATRICES]
    if unknown or not self.targets:
      raise ValueError(
        f'LoraConfig.targets = {self.targets}: choose from {MATRICES}.'
      )
    if self.rank is not None and self.rank < 1:
      raise ValueError(f'LoraConfig.rank = {self.rank}: it must be at least 1.')

  @property
  def scale(self) -> float:
    """What the update is multiplied by."""
    return 1.0 if self.alpha is None else self.alpha / self.rank


def match(config: LoraConfig, anchor: DecoderLM, num_params: int) -> LoraConfig:
  """Returns the config with the rank that makes about `num_params`."""
  one = trees.num_params(
    jax.eval_shape(
      lambda key: init(key, anchor, dataclasses.replace(config, rank=1)),
      jax.random.key(0),
    )
  )
  return dataclasses.replace(config, rank=max(1, round(num_params / one)))


def init(rng: Array, anchor: DecoderLM, config: LoraConfig) -> dict[str, Any]:
  """Initialises A and B of each target, boxed with logical axes.

  Returns:
    The anchor's tree of matrices, with {'a': ..., 'b': ...} for 'kernel'.
  """
  boxed = jax.eval_shape(anchor.init_params, jax.random.key(0))
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  kernels = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=is_box)[0]
  found = {}
  for path, kernel in kernels:
    name = trees.path_name(path)
    *place, matrix, last = name.split('/')
    if last != 'kernel' or matrix not in config.targets or not place:
      continue
    *stack, fan_in, fan_out = kernel.value.shape
    *layers, in_axis, out_axis = kernel.names
    key = jax.random.fold_in(rng, zlib.crc32(name.encode()))
    shape = (*stack, fan_in, config.rank)
    a = jax.random.normal(key, shape, config.param_dtype) / np.sqrt(fan_in)
    b = jnp.zeros((*stack, config.rank, fan_out), config.param_dtype)
    where = '/'.join([*place, matrix])
    box = nn.LogicallyPartitioned
    found[f'{where}/a'] = box(a, (*layers, in_axis, 'lora_rank'))
    found[f'{where}/b'] = box(b, (*layers, 'lora_rank', out_axis))
  return trees.unflatten(found)


def scaled(params: Params, config: LoraConfig) -> Params:
  """Returns what `layers.Dense` adds: A times alpha / r, and B."""

  def one(path, leaf):
    is_a = trees.path_name(path).endswith('/a')
    return leaf * config.scale if is_a else leaf

  return jax.tree_util.tree_map_with_path(one, params)


def merge(
  tensors: Mapping[str, weights.Tensor], params: Params, config: LoraConfig
) -> dict[str, weights.Tensor]:
  """Returns the anchor's tensors, the updates added when one is read.

  Args:
    tensors: by name, each block apart (the 'loop' layout); each keeps its
      dtype.
    params: A and B of the same layout.
    config: their scale.

  Raises:
    ValueError: if an update is of no tensor, or of another shape.
  """
  merged, updates = dict(tensors), trees.flatten(params)
  for name, a in updates.items():
    if not name.endswith('/a'):
      continue
    place = name.removesuffix('/a')
    kernel, b = f'{place}/kernel', updates[f'{place}/b']
    shape = (*a.shape[:-1], b.shape[-1])
    if kernel not in tensors or tensors[kernel].shape != shape:
      raise ValueError(
        f'LoRA updates {kernel} {shape}, and the model has no such matrix. Give'
        ' the model that it was trained on.'
      )
    merged[kernel] = _plus(tensors[kernel], config.scale * np.float32(a), b)
  return merged


def _plus(tensor: weights.Tensor, a: np.ndarray, b: np.ndarray):
  """Returns W + A B, slice by slice, in float32 until it is written."""

  def fill(out, index):
    rows, columns = index
    out[...] = tensor.read(index, np.float32) + a[rows] @ b[:, columns]

  return weights.Tensor(tensor.shape, tensor.dtype, fill)
