"""Nested dicts of arrays under readable names: 'anchor/block_0/mlp/up'."""

from collections.abc import Iterable, Mapping
import hashlib
from typing import Any

import jax
import numpy as np


def flatten(tree: Any) -> dict[str, Any]:
  """Maps 'a/b/c' to each leaf of a tree, sorted by name."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return dict(sorted((path_name(path), leaf) for path, leaf in leaves))


def path_name(path: tuple[Any, ...]) -> str:
  """Returns the name of a leaf's path, 'a/b/c'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def unflatten(names: Mapping[str, Any]) -> dict[str, Any]:
  """Builds the nested dict whose `flatten` is `names`."""
  tree = {}
  for name, leaf in names.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def is_quantized(leaf: Any) -> bool:
  """Whether this is a `qwix.QArray`; told by its shape, qwix is optional."""
  return hasattr(leaf, 'qvalue')


def leaves(tree: Any) -> list[Any]:
  """Lists the parameters; a quantised one is one leaf, with its own shape."""
  return jax.tree.leaves(tree, is_leaf=is_quantized)


def num_params(tree: Any) -> int:
  """Counts the elements of all parameters (arrays or shape structs)."""
  return sum(int(np.prod(x.shape)) for x in leaves(tree))


def num_bytes(tree: Any) -> int:
  """Adds up the bytes of all arrays or shape structs, as they are stored."""
  return sum(stored_bytes(x.shape, x.dtype) for x in jax.tree.leaves(tree))


def stored_bytes(shape: tuple[int, ...], dtype: Any) -> int:
  """Returns the bytes of an array on a device: two int4 share one.

  `nbytes` of an int4 array says one byte each, which is numpy's layout.
  """
  bits = int(np.prod(shape)) * jax.dtypes.itemsize_bits(np.dtype(dtype))
  return -(-bits // 8)


def digest(array: Any) -> str:
  """Returns the SHA-256 over an array's dtype, shape and bytes."""
  array = np.asarray(array)
  sha = hashlib.sha256(f'{array.dtype.name} {array.shape} '.encode())
  sha.update(np.ascontiguousarray(array).view(np.uint8).data)
  return sha.hexdigest()


def digests(tree: Mapping[str, Any]) -> dict[str, str]:
  """Returns the digest of every leaf by name."""
  return {name: digest(leaf) for name, leaf in flatten(tree).items()}


def fingerprint(tensor_digests: Mapping[str, str], extra: str = '') -> str:
  """Returns one SHA-256 over sorted (name, digest) pairs.

  Args:
    tensor_digests: what `digests` gives; dtype and shape are part of a digest.
    extra: anything else that must match, such as a vocabulary's hash.
  """
  sha = hashlib.sha256(extra.encode())
  for name in sorted(tensor_digests):
    sha.update(f'{name} {tensor_digests[name]}\n'.encode())
  return sha.hexdigest()


def check_same_structure(
  expected: Mapping[str, Any], actual: Mapping[str, Any], *, what: str
) -> None:
  """Raises ValueError unless both trees have equal names and shapes.

  Args:
    expected: tree of arrays or shape structs, as the model wants it.
    actual: tree of arrays or shape structs, as it was found.
    what: says where `actual` comes from, for the message.
  """
  expected, actual = flatten(expected), flatten(actual)
  problems = [
    f'{title}: {_shorten(names)}'
    for title, names in (
      ('only in the model', expected.keys() - actual.keys()),
      (f'only in {what}', actual.keys() - expected.keys()),
    )
    if names
  ]
  for name in expected.keys() & actual.keys():
    wanted, found = expected[name].shape, actual[name].shape
    if tuple(wanted) != tuple(found):
      problems.append(f'{name}: the model has {wanted}, {what} has {found}')
  if problems:
    raise ValueError(
      f'{what} does not fit the model.\n  '
      + '\n  '.join(sorted(problems))
      + '\nCheck that the configuration is the one it was written with.'
    )


def _shorten(names: Iterable[str], limit: int = 8) -> str:
  names = sorted(names)
  rest = f', and {len(names) - limit} more' if len(names) > limit else ''
  return ', '.join(names[:limit]) + rest
