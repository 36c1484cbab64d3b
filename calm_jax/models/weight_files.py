"""Files of weights: opened, checked, hashed and written.

Whoever wrote a file may be anyone: headers are checked before anything is read
by them, and every byte passes through `digests` before it is used.
"""

from collections.abc import Collection, Mapping
from concurrent import futures
import functools
import hashlib
import itertools
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from calm_jax import paths
from calm_jax.models import directories, weights
from calm_jax.models.weights import Index, Tensor
from calm_jax.text import files

WEIGHTS_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'
THREADS = min(16, os.cpu_count() or 1)
STRIP = 16  # rows transposed at once: the fastest of 4 to 512 on x86
MAX_HEADER = 16 << 20  # 100,000 tensors in one file
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle')
# Names of safetensors; what is not here (float8, float4) numpy cannot read.
DTYPES = {
  'BOOL': np.dtype(bool),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  **{f'F{n}': np.dtype(f'float{n}') for n in (16, 32, 64)},
  **{f'I{n}': np.dtype(f'int{n}') for n in (8, 16, 32, 64)},
  **{f'U{n}': np.dtype(f'uint{n}') for n in (8, 16, 32, 64)},
}
FLOATS = tuple(DTYPES[name] for name in ('BF16', 'F16', 'F32', 'F64'))
# All bits of the exponent: with these set a number is infinite or NaN.
_EXPONENTS = {
  'bfloat16': 0x7F80,
  'float16': 0x7C00,
  'float32': 0x7F800000,
  'float64': 0x7FF0000000000000,
}


# --- Reading -----------------------------------------------------------------


def open_directory(directory: pathlib.Path) -> dict[str, Tensor]:
  """Opens all tensors of a model directory; reads headers only.

  Args:
    directory: with model.safetensors, or with an index and the files it names.

  Raises:
    ValueError: if something is missing, damaged, ambiguous or out of bounds.
  """
  if (directory / WEIGHTS_FILE).is_file():
    return open_file(directory / WEIGHTS_FILE)
  index = directory / INDEX_FILE
  if not index.is_file():
    pickles = [f.name for f in directory.iterdir() if f.suffix in PICKLES]
    also = ''
    if pickles:
      also = (
        f' It has {sorted(pickles)[0]}, and pickled files can run any code'
        ' when they are read, so they never are. Convert the weights to'
        ' safetensors, or take a revision that has them.'
      )
    raise ValueError(
      f'{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}.{also}'
    )
  listed = directories.read_json(index, limit=MAX_HEADER).get('weight_map')
  if not isinstance(listed, dict) or not listed:
    raise ValueError(f'{index} has no weight_map from tensors to files.')
  found: dict[str, Tensor] = {}
  where: dict[str, str] = {}
  for name in sorted({str(file) for file in listed.values()}):
    if pathlib.PurePath(name).name != name or '\\' in name:
      raise ValueError(
        f'{index} names the file {name!r}. Its files must lie beside it.'
      )
    if not name.endswith('.safetensors'):
      raise ValueError(f'{index} names {name!r}, which is not safetensors.')
    if not (directory / name).is_file():
      raise ValueError(f'{index} names {name}, which is not there.')
    tensors = open_file(directory / name)
    for tensor in tensors:
      if tensor in where:
        raise ValueError(
          f'{directory}: the tensor {tensor!r} is in {where[tensor]} and in'
          f' {name}. Only one can be meant.'
        )
      where[tensor] = name
    found |= tensors
  for tensor in sorted(listed.keys() | where.keys()):
    if listed.get(tensor) != where.get(tensor):
      raise ValueError(
        f'{index} has the tensor {tensor!r} in {listed.get(tensor)!r}, and it'
        f' is in {where.get(tensor)!r}. Copy the directory again from where it'
        ' came from.'
      )
  return found


def open_file(file: pathlib.Path) -> dict[str, Tensor]:
  """Opens the tensors of one safetensors file; reads its header only.

  The library checks the header's length, JSON and offsets: each byte belongs
  to one tensor. It lets a name occur twice and the last one win; we do not.

  Raises:
    ValueError: if the file is cut short, or its header is not sound.
  """
  directories.check_contained(file)
  try:
    with paths.to_read(file) as here:
      handle = _safe_open(here)
    tensors = {}
    for name in handle.keys():
      part = handle.get_slice(name)
      dtype = part.get_dtype()
      if dtype not in DTYPES:
        raise ValueError(
          f'{name} has the dtype {dtype}; we read {sorted(DTYPES)}'
        )
      tensors[name] = Tensor(
        tuple(part.get_shape()),
        DTYPES[dtype],
        functools.partial(_fill_from_file, part),
      )
    return tensors
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise ValueError(
      f'{file} cannot be read as safetensors ({error}). Copy it again from'
      ' where it came from.'
    ) from error


def _safe_open(file: pathlib.Path) -> Any:
  """Opens a local file, once its header is checked; it may be removed then."""
  with file.open('rb') as opened:
    size = int.from_bytes(opened.read(8), 'little')
    if size > min(MAX_HEADER, file.stat().st_size):
      raise ValueError(f'its header claims {size:,} bytes')
    files.parse_json(opened.read(size).decode(), file)
  return safetensors.safe_open(file, framework='np')


def _fill_from_file(part: Any, out: np.ndarray, index: Index) -> None:
  """Copies a slice of a file into `out`, piece by piece."""
  # As integers: numpy copies those without holding the interpreter's lock.
  bits = out.view(f'u{out.itemsize}')

  def copy(inside):
    there = tuple(
      slice(outer.start + inner.start, outer.start + inner.stop)
      for outer, inner in zip(index, inside, strict=True)
    )
    piece = part[there].astype(out.dtype, copy=False).view(bits.dtype)
    target = bits[(*inside, ...)]  # an array, be it of no axes
    if piece.ndim < 2 or target.strides[-1] == target.itemsize:
      target[...] = piece
      return
    for i in range(0, len(piece), STRIP):  # transposed: spares the caches
      target[i : i + STRIP] = piece[i : i + STRIP]

  parts = list(weights.parts(out.shape, out.itemsize))
  if len(parts) < 2:
    for inside in parts:
      copy(inside)
    return
  with futures.ThreadPoolExecutor(min(len(parts), THREADS)) as pool:
    list(pool.map(copy, parts))


# --- Fingerprints ------------------------------------------------------------

_DIGESTS: dict[Any, dict[str, str]] = {}


def digests(tensors: Mapping[str, Tensor], *, what: str) -> dict[str, str]:
  """Returns `trees.digest` of each tensor, reading each byte once.

  Raises:
    ValueError: if a tensor holds NaN or infinity; it names `what` and the
      tensor.
  """

  def one(name):
    tensor = tensors[name]
    sha = hashlib.sha256(f'{tensor.dtype.name} {tensor.shape} '.encode())
    for piece in tensor.pieces():
      if not _is_finite(piece):
        raise ValueError(
          f'{what}: the tensor {name!r} holds NaN or infinity. The checkpoint'
          ' is damaged; take another one.'
        )
      sha.update(piece.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()

  # The large ones first, so that no thread is left with one at the end.
  names = sorted(tensors, key=lambda name: -tensors[name].nbytes)
  with futures.ThreadPoolExecutor(THREADS) as pool:  # hashlib: no lock
    return dict(zip(names, pool.map(one, names), strict=True))


def directory_digests(directory: pathlib.Path) -> dict[str, str]:
  """Returns `digests` of a directory; hashed once while its files stay."""
  files = sorted(directory.glob('*.safetensors*'))
  stats = [(f.name, f.stat()) for f in files]
  key = (
    directory.resolve(),
    *((n, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in stats),
  )
  if key not in _DIGESTS:
    _DIGESTS[key] = digests(open_directory(directory), what=str(directory))
  return _DIGESTS[key]


def _is_finite(piece: np.ndarray) -> bool:
  exponent = _EXPONENTS.get(piece.dtype.name)
  if exponent is None or not piece.size:
    return True
  bits = piece.reshape(-1).view(f'uint{8 * piece.itemsize}')
  mask = bits.dtype.type(exponent)
  return not np.any((bits & mask) == mask)


# --- Writing -----------------------------------------------------------------


def write_directory(
  directory: pathlib.Path,
  tensors: Mapping[str, Tensor],
  *,
  shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes model.safetensors, or several such files with their index.

  Args:
    directory: must exist.
    tensors: by name; they are read one at a time.
    shard_bytes: a file is closed before it would grow larger than this.
  """
  shards: list[dict[str, Tensor]] = [{}]
  for name, tensor in tensors.items():
    held = sum(one.nbytes for one in shards[-1].values())
    if shards[-1] and held + tensor.nbytes > shard_bytes:
      shards.append({})
    shards[-1][name] = tensor
  if len(shards) == 1:
    write_file(directory / WEIGHTS_FILE, shards[0])
    _remove_others(directory, {WEIGHTS_FILE})
    return
  stem = WEIGHTS_FILE.removesuffix('.safetensors')
  listed = {}
  for i, shard in enumerate(shards, start=1):
    file = f'{stem}-{i:05}-of-{len(shards):05}.safetensors'
    write_file(directory / file, shard)
    listed |= dict.fromkeys(shard, file)
  total = sum(tensor.nbytes for tensor in tensors.values())
  directories.write_json(
    directory / INDEX_FILE,
    {'metadata': {'total_size': total}, 'weight_map': listed},
  )
  _remove_others(directory, {INDEX_FILE, *listed.values()})


def _remove_others(directory: pathlib.Path, kept: Collection[str]) -> None:
  """Removes weights that were there before and would be read instead."""
  for file in directory.glob('model*.safetensors*'):
    if file.name not in kept:
      file.unlink()


def read_metadata(file: pathlib.Path) -> dict[str, str]:
  """Returns what `write_file` was given for one that `open_file` accepts."""
  with paths.to_read(file) as here:
    return safetensors.safe_open(here, framework='np').metadata() or {}


def write_file(
  file: pathlib.Path,
  tensors: Mapping[str, Tensor],
  metadata: Mapping[str, str] = {},
) -> None:
  """Writes one safetensors file, holding one tensor at a time.

  The library's own writer takes all of them at once.
  """
  codes = {dtype: code for code, dtype in DTYPES.items()}
  # Wide dtypes first: then every tensor is aligned to its own item size.
  order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
  edges = [0, *itertools.accumulate(tensors[name].nbytes for name in order)]
  header: dict[str, Any] = {'__metadata__': {'format': 'pt', **metadata}}
  for name, start, stop in zip(order, edges[:-1], edges[1:], strict=True):
    header[name] = {
      'dtype': codes[tensors[name].dtype],
      'shape': list(tensors[name].shape),
      'data_offsets': [start, stop],
    }
  text = directories.dump_json(header, indent=None).encode()
  text += b' ' * (-len(text) % 8)
  with paths.to_write(file) as here:
    temporary = here.with_name(here.name + '.tmp')
    with temporary.open('wb') as opened:
      opened.write(len(text).to_bytes(8, 'little') + text)
      for name in order:
        opened.write(tensors[name].read().reshape(-1).view(np.uint8).data)
    temporary.replace(here)
