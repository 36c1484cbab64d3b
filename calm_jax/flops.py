"""FLOPs of a training step: the least possible, and what `remat` adds."""

from typing import Any

import numpy as np

from calm_jax import sources, trees
from calm_jax.array_types import Batch, Params
from calm_jax.composition import ComposedLM
from calm_jax.models.config import TransformerConfig


def least(
  model: ComposedLM, params: Params, batch: Batch, trainable: str
) -> float:
  """Returns F_min, the FLOPs that one step cannot do without.

  Each tower counts its tokens times its matrices: forward through the
  augmenting models up to the last tapped block and through the anchor; backward
  with respect to activations above the lowest composed block; and three passes
  of the composition, less what would flow into frozen inputs. Attention counts
  dense, 4 x length x N x H a token and layer forward, and twice that backward.

  Args:
    model: the composed model, or a decoder alone.
    params: nested parameters, arrays or shapes.
    batch: arrays or shapes; what counts are their shapes, padding included.
    trainable: 'composition', 'lora' or 'anchor'.
  """
  rows, length = batch['decoder_input_tokens'].shape
  anchor, depth = model.anchor, model.anchor.depth
  blocks = _block_sizes(anchor, params['anchor'])
  head = anchor.config.vocab_size * anchor.width
  self_attention = _attention(anchor.config, length)
  forward = 2 * (sum(blocks) + head) + self_attention * depth
  if trainable == 'anchor':
    return rows * length * 3 * forward
  if trainable == 'lora':  # what it reads of the anchor's is not frozen
    updates = _matrices(params['lora'], stacked=anchor.stack == 'scan')
    passes = 2 * forward + self_attention * depth + 6 * updates
    return rows * length * passes
  lowest = model.composed_layers[0] + 1
  backward = 2 * (sum(blocks[lowest:]) + head)
  backward += 2 * self_attention * (depth - lowest)
  total = rows * length * (forward + backward)
  lengths = {}
  for name, tower in model.augmenting.items():
    side = sources.side_of(batch, name, model)
    lengths[name] = batch[f'{side}_input_tokens'].shape[1]
    stop = model.tapped_layers(name)[-1] + 1
    sizes = _block_sizes(tower, params['augmenting'][name])[:stop]
    attention = stop * _attention(tower.config, lengths[name])
    total += rows * lengths[name] * (2 * sum(sizes) + attention)
  for c in model.connections:
    source = lengths[c.augmenting]
    sizes = {
      name: _matrices(one) for name, one in params['composition'][c.key].items()
    }
    # The augmenting states are frozen, and so is the lowest block's query.
    read = 4 * sizes.pop('projection')
    read += 6 * (sizes.pop('key') + sizes.pop('value'))
    attend = 6 * sum(sizes.values()) + 3 * 4 * source * anchor.width
    if c.anchor_layer == model.composed_layers[0]:
      attend -= 2 * sizes['query']
    total += rows * (source * read + length * attend)
  return total


def recomputed(model: ComposedLM, params: Params, batch: Batch) -> float:
  """Returns the FLOPs that `remat` adds to a step.

  What is differentiated runs forward once more: the blocks above the lowest
  composed one, and the reading side of the connections. A last matrix whose
  product nothing nonlinear follows (W_O of the connections; the MLP's, where no
  norm follows) need not.

  Args:
    model: with `remat`.
    params: as in `least`.
    batch: as in `least`.
  """
  rows, length = batch['decoder_input_tokens'].shape
  anchor = model.anchor
  config = anchor.config
  sizes = _block_sizes(anchor, params['anchor'])[anchor.remat_from :]
  if config.norm_placement != 'sandwich':
    sizes = [size - config.mlp_dim * config.embed_dim for size in sizes]
  attention = _attention(config, length) * len(sizes)
  total = rows * length * (2 * sum(sizes) + attention)
  for c in model.connections:
    side = sources.side_of(batch, c.augmenting, model)
    source = batch[f'{side}_input_tokens'].shape[1]
    theta = params['composition'][c.key]
    sizes = [
      _matrices(one)
      for name, one in theta.items()
      if name not in ('projection', 'key', 'value', 'out')
    ]
    total += rows * length * (2 * sum(sizes) + 4 * source * anchor.width)
  return total


def _attention(config: TransformerConfig, length: int) -> int:
  """Returns the FLOPs a token and layer forward over `length` keys."""
  return 4 * length * config.num_heads * config.head_dim


def _block_sizes(tower: Any, params: Params) -> list[int]:
  """Returns the number of elements of the matrices of each block."""
  sizes = []
  for name, first, last in tower.segments():
    total = _matrices(params[name], stacked=tower.stack == 'scan')
    sizes += [total // (last - first)] * (last - first)
  return sizes


def _matrices(params: Params, *, stacked: bool = False) -> int:
  return sum(
    int(np.prod(x.shape))
    for x in trees.leaves(params)
    if len(x.shape) == 2 + stacked
  )
