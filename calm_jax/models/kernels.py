"""Attention that never holds all weights: splash on TPUs, cuDNN on GPUs.

`attention.attend` is what they compute; docs/kernels.md says which of them does
what, and where XLA is used all the same.
"""

from collections.abc import Callable
import functools
import math
import typing
from typing import Any, Literal

import flax.struct
import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from calm_jax import sharding
from calm_jax.array_types import Array

Kernel = Literal['xla', 'splash', 'cudnn']
KERNELS = typing.get_args(Kernel)
# Where each runs; splash also on the CPU, interpreted, to be compared.
BACKENDS = {'splash': ('tpu', 'cpu'), 'cudnn': ('gpu',)}
DTYPES = {'splash': ('float32', 'bfloat16'), 'cudnn': ('bfloat16', 'float16')}
LANES = 128  # of a TPU's vector unit: blocks are multiples
ROWS = 'data', 'fsdp'
BLOCK = 512  # positions that the kernel has in fast memory at once, at most


@flax.struct.dataclass
class Pattern:
  """What a mask is made of, for a kernel that skips what nobody reads.

  Segments are contiguous, and positions count within them.

  Attributes:
    query_BT: int32 segment ids; only equal ones read one another.
    key_BS: int32 segment ids; S is T.
    window: of `masks.window_mask`; one of `windows`, None if there is none.
    is_causal: whether a query reads no key after it.
    windows: all that the model has; None among them is no window.
  """

  query_BT: Array
  key_BS: Array
  window: Any = None
  is_causal: bool = flax.struct.field(pytree_node=False, default=True)
  windows: tuple[int | None, ...] = flax.struct.field(
    pytree_node=False, default=(None,)
  )


def check(
  kernel: str,
  *,
  softcap: float | None = None,
  has_bias: bool = False,
  dtype: Any,
  head_dim: int,
) -> None:
  """Raises ValueError for what a kernel cannot do."""
  if kernel not in KERNELS:
    raise ValueError(f'attention_kernel = {kernel!r} is not one of {KERNELS}.')
  if kernel == 'xla':
    return
  problem, dtype = None, jnp.dtype(dtype).name
  if has_bias:
    problem = 'has no relative-position bias'
  elif dtype not in DTYPES[kernel]:
    allowed = ' or '.join(DTYPES[kernel])
    problem = f'computes in {allowed}, and dtype = {dtype!r}'
  elif kernel == 'cudnn' and softcap is not None:
    problem = f'has no soft-cap, and attention_softcap = {softcap}'
  elif kernel == 'cudnn' and (head_dim % 8 or head_dim > 256):
    problem = f'has head sizes 8, 16, ..., 256, and head_dim = {head_dim}'
  if problem:
    raise ValueError(
      f"attention_kernel = {kernel!r} {problem}. Set attention_kernel = 'xla'"
      ' for this model.'
    )


def check_backend(kernel: str, backend: str) -> None:
  """Raises ValueError if a kernel does not run on a backend of JAX.

  Over the stand-ins of `planning.chips` ('none') nothing runs.
  """
  if kernel != 'xla' and backend not in (*BACKENDS[kernel], 'none'):
    raise ValueError(
      f'attention_kernel = {kernel!r} runs on {" or ".join(BACKENDS[kernel])},'
      f" and the devices here are {backend}. Set attention_kernel = 'xla'."
    )


def attend(
  kernel: Kernel,
  query_BTNH: Array,
  key_BSKH: Array,
  value_BSKH: Array,
  mask_BTS: Array,
  pattern: Pattern | None,
  *,
  scale: float,
  softcap: float | None = None,
  bias_BNTS: Array | None = None,
) -> Array:
  """Computes what `attention.attend` does; equal where a query is real.

  Args:
    kernel: 'splash' or 'cudnn'.
    query_BTNH: N query heads.
    key_BSKH: K key heads; N is a multiple of K.
    value_BSKH: as the keys.
    mask_BTS: bool; not read by splash if there is a pattern.
    pattern: what the mask is made of, or None.
    scale: multiplies the dot products.
    softcap: caps the logits.
    bias_BNTS: refused.
  """
  check(
    kernel,
    softcap=softcap,
    has_bias=bias_BNTS is not None,
    dtype=query_BTNH.dtype,
    head_dim=query_BTNH.shape[-1],
  )
  run = _splash if kernel == 'splash' else _cudnn
  arrays = query_BTNH, key_BSKH, value_BSKH
  return run(*arrays, mask_BTS, pattern, scale=scale, softcap=softcap)


def _opened(mask_BTS: Array) -> tuple[Array, Array]:
  """Lets those who see nothing see all; says who sees something, [B, T].

  A softmax over nothing is NaN in a kernel. What it gives instead is dropped,
  and with it the gradient.
  """
  sees_BT = mask_BTS.any(-1)
  return mask_BTS | ~sees_BT[..., None], sees_BT


# --- cuDNN -------------------------------------------------------------------


def _cudnn(
  query_BTNH, key_BSKH, value_BSKH, mask_BTS, pattern, *, scale, softcap
):
  del pattern, softcap  # segments need the mask, which has the windows too
  T = query_BTNH.shape[1]
  # With a mask it takes even lengths only.
  query_BTNH, key_BSKH, value_BSKH, mask_BTS = (
    _pad(x, axis=1, to=2) for x in (query_BTNH, key_BSKH, value_BSKH, mask_BTS)
  )
  mask_BTS, sees_BT = _opened(_pad(mask_BTS, axis=2, to=2))
  out_BTNH = jax.nn.dot_product_attention(
    query_BTNH,
    key_BSKH,
    value_BSKH,
    mask=mask_BTS[:, None],
    scale=scale,
    implementation='cudnn',
  )
  return jnp.where(sees_BT[..., None, None], out_BTNH, 0)[:, :T]


# --- Splash ------------------------------------------------------------------


def _splash(
  query_BTNH, key_BSKH, value_BSKH, mask_BTS, pattern, *, scale, softcap
):
  T, N = query_BTNH.shape[1:3]
  mesh = sharding.ambient_mesh()
  if mesh is not None:
    # Each device shall have the keys of its queries.
    copies = _copies(N, key_BSKH.shape[2], mesh.shape['tensor'])
    key_BSKH, value_BSKH = (
      jnp.repeat(x, copies, axis=2) for x in (key_BSKH, value_BSKH)
    )
  heads_first = [
    _pad(x.swapaxes(1, 2), axis=2)
    for x in (query_BTNH * scale, key_BSKH, value_BSKH)
  ]
  sees_BT = None
  if pattern is None:
    mask_BTS, sees_BT = _opened(mask_BTS)
    mask_BTS = _pad(_pad(mask_BTS, axis=2), axis=1, value=True)
    which, reading, branches = 0, (mask_BTS,), [_masked(softcap)]
  else:
    reading = _pad(pattern.query_BT, axis=1), _pad(pattern.key_BS, axis=1)
    which, branches = _windowed(pattern, length=T, softcap=softcap)

  def local(which, *arrays):
    return jax.lax.switch(which, branches, *arrays)

  if mesh is not None:
    local = _split(local, mesh, num_heads=N, num_reading=len(reading))
  out_BNTH = local(jnp.int32(which), *heads_first, *reading)
  out_BTNH = out_BNTH[:, :, :T].swapaxes(1, 2)
  if sees_BT is not None:
    out_BTNH = jnp.where(sees_BT[..., None, None], out_BTNH, 0)
  return out_BTNH


def _copies(num_heads: int, num_kv_heads: int, devices: int) -> int:
  """Returns how often a key head is repeated to be split over devices."""
  if num_heads % devices:
    return 1  # every device computes all heads
  return math.lcm(num_kv_heads, devices) // num_kv_heads


def _pad(x: Array, *, axis: int, value: Any = 0, to: int = LANES) -> Array:
  """Pads to whole blocks; of segment ids, with the padding's own, 0."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = 0, -x.shape[axis] % to
  return jnp.pad(x, widths, constant_values=value)


def _split(
  local: Callable[..., Array], mesh: Any, *, num_heads: int, num_reading: int
) -> Callable[..., Array]:
  """Splits rows over data and fsdp, and heads over tensor if it divides."""
  axis = None if num_heads % mesh.shape['tensor'] else 'tensor'
  rows, heads = PartitionSpec(ROWS), PartitionSpec(ROWS, axis)
  return jax.shard_map(
    local,
    in_specs=(PartitionSpec(), *[heads] * 3, *[rows] * num_reading),
    out_specs=heads,
    check_vma=False,  # a Pallas call does not say how its outputs vary
  )


def _masked(softcap: float | None) -> Callable[..., Array]:
  """Returns attention by a mask array [B, T, S], which is read in blocks."""

  def row(q, k, v, mask_TS, interpret):
    kernel = splash_attention.make_splash_mha_single_device(
      mask_TS[None],
      block_sizes=_blocks(*mask_TS.shape),
      attn_logits_soft_cap=softcap,
      interpret=interpret,
    )
    # JAX has made an array of this flag, and then branches on it.
    info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    kernel.fwd_mask_info = info
    return kernel(q, k, v)

  return _on_platform(row)


def _windowed(
  pattern: Pattern, *, length: int, softcap: float | None
) -> tuple[Any, list[Callable[..., Array]]]:
  """Returns a function for each window, and which of them is asked for."""
  # A window that is longer than the text is none.
  sizes = [w if w is None or w < length else None for w in pattern.windows]
  distinct = sorted(set(sizes), key=lambda w: math.inf if w is None else w)
  padded = length + -length % LANES

  def attention_of(window):
    def row(q, k, v, query_T, key_S, interpret):
      kernel = _pattern_kernel(
        padded, window, pattern.is_causal, softcap, interpret
      )
      return kernel(q, k, v, splash_attention.SegmentIds(query_T, key_S))

    return _on_platform(row)

  finite = np.array([w for w in distinct if w is not None], np.int32)
  which = (finite < pattern.window).sum() if len(distinct) > 1 else 0
  if not isinstance(which, jax.Array):  # the layer is known, not scanned
    which, distinct = 0, [distinct[which]]
  return which, [attention_of(window) for window in distinct]


def _pattern_kernel(length, window, is_causal, softcap, interpret):
  shape, right = (length, length), 0 if is_causal else None
  if window is not None:
    mask = splash_attention.LocalMask(shape, (window - 1, right), 0)
  elif is_causal:
    mask = splash_attention.CausalMask(shape)
  else:
    mask = splash_attention.FullMask(shape)
  return splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask]),  # the same for all heads
    block_sizes=_blocks(*shape),
    attn_logits_soft_cap=softcap,
    interpret=interpret,
  )


def _on_platform(row: Callable[..., Array]) -> Callable[..., Array]:
  """Maps over rows; interprets unless it is lowered for a TPU."""

  def of(interpret):
    return jax.vmap(functools.partial(row, interpret=interpret))

  return lambda *arrays: jax.lax.platform_dependent(
    *arrays, tpu=of(False), cpu=of(True)
  )


def _blocks(length: int, source_length: int) -> splash_attention.BlockSizes:
  q, kv = math.gcd(length, BLOCK), math.gcd(source_length, BLOCK)
  return splash_attention.BlockSizes(
    block_q=q,
    block_kv=kv,
    block_kv_compute=kv,
    block_q_dkv=q,
    block_kv_dkv=kv,
    block_kv_dkv_compute=kv,
    block_q_dq=q,
    block_kv_dq=kv,
  )
