"""From one layout of blocks to another: a loop, or scanned segments."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax.array_types import Params
from calm_jax.models.transformer import Tower


def restack(
  params: Params,
  *,
  source: Tower,
  target: Tower,
  stack: Callable[[Sequence[Any]], Any] = jnp.stack,
) -> Params:
  """Moves the parameters of one stack layout into another.

  Args:
    params: parameters (arrays of any kind) of `source`.
    source: the layout they have.
    target: the layout wanted, of the same config.
    stack: makes one array of those of a segment's blocks.

  Returns:
    The same numbers in the tree of `target`.
  """
  blocks: list[Any] = []
  for name, first, last in source.segments():
    for i in range(last - first):
      one = params[name]
      if source.stack == 'scan':
        one = jax.tree.map(lambda x, i=i: x[i], one)
      blocks.append(one)
  out = {
    name: leaf
    for name, leaf in params.items()
    if not name.startswith(('block_', 'blocks_'))
  }
  for name, first, last in target.segments():
    if target.stack == 'loop':
      out[name] = blocks[first]
    else:
      out[name] = jax.tree.map(lambda *x: stack(x), *blocks[first:last])
  return out
