"""Times decoding: cached against uncached, composed against its two models.

  python benchmarks/decode.py [--batch 8] [--rounds 5]

Random weights, float32, greedy. Uncached is what a loop without caches pays for
a token at that position: the whole sequence once more. What is compared runs in
turn, in pairs, in one process; the figures are medians, and the ratios medians
of the pairs' ratios with the least and the largest in brackets.
"""

import argparse
from collections.abc import Callable
import functools
import statistics
import time

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from calm_jax import composition, connections, decoding, sampling
from calm_jax.array_types import Params
from calm_jax.models import config, transformer

POSITIONS = (64, 256, 1024)
STEPS = 16  # decoded in one timing
VOCAB = 8192


def sized(layers: int, width: int) -> config.TransformerConfig:
  return config.TransformerConfig(
    vocab_size=VOCAB,
    num_layers=layers,
    embed_dim=width,
    num_heads=width // 64,
    num_kv_heads=width // 64,
    head_dim=64,
    mlp_dim=4 * width,
  )


def models() -> dict[str, composition.ComposedLM]:
  """Returns the anchor alone, m_A alone, and the two composed."""
  anchor = transformer.DecoderLM(sized(12, 512))
  augmenting = transformer.DecoderLM(sized(8, 256))
  return {
    'anchor': composition.ComposedLM(anchor),
    'augmenting': composition.ComposedLM(augmenting),
    'composed': composition.ComposedLM(
      anchor,
      augmenting={'small': augmenting},
      composition=connections.CompositionConfig(
        mapping=connections.LayerMapping.every(4)
      ),
    ),
  }


def cached(
  model: composition.ComposedLM, params: Params, *, position: int, batch: int
) -> Callable[[], float]:
  """Returns a function: seconds a token, for STEPS tokens up to `position`."""
  settings = {
    'model': model,
    'config': sampling.DecodingConfig(),
    'eos_ids': (),
  }
  begin = jax.jit(functools.partial(decoding.start, room=STEPS, **settings))
  advance = jax.jit(
    functools.partial(decoding.advance, **settings), donate_argnums=1
  )
  begun = begin(
    params,
    np.ones((batch, position - STEPS), np.int32),
    np.full(batch, position - STEPS, np.int32),
    np.zeros((batch, 1), np.uint32),
    np.int32(STEPS),
    {},
    {},
  )

  def seconds() -> float:
    state = jax.block_until_ready(jax.tree.map(jnp.copy, begun))
    then = time.perf_counter()
    jax.block_until_ready(advance(params, state, np.int32(STEPS), {}))
    return (time.perf_counter() - then) / (STEPS - 1)  # one is chosen already

  return seconds


def uncached(
  model: composition.ComposedLM, params: Params, *, position: int, batch: int
) -> Callable[[], float]:
  """Returns a function: seconds of one pass over `position` tokens."""
  tokens_BT = jnp.ones((batch, position), jnp.int32)
  rows = {
    'decoder_input_tokens': tokens_BT,
    'decoder_positions': jnp.broadcast_to(
      jnp.arange(position), (batch, position)
    ),
    'decoder_segment_ids': tokens_BT,
  }
  last_B1 = jnp.full((batch, 1), position - 1)
  forward = jax.jit(model.__call__)

  def seconds() -> float:
    then = time.perf_counter()
    jax.block_until_ready(forward(params, rows, logits_at_BM=last_B1))
    return time.perf_counter() - then

  return seconds


def in_turn(
  timers: dict[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
  """Times each in turn, after a first time that compiles."""
  found = {name: [] for name in timers}
  for number in range(rounds + 1):
    for name, timer in timers.items():
      took = timer()
      if number:
        found[name].append(took)
  return found


def ratio(upper: list[float], lower: list[float]) -> str:
  pairs = [a / b for a, b in zip(upper, lower, strict=True)]
  middle = statistics.median(pairs)
  return f'{middle:.2f} [{min(pairs):.2f}, {max(pairs):.2f}]'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--rounds', type=int, default=5)
  flags = parser.parse_args()
  built = models()
  params = {
    name: jax.jit(lambda key, m=model: nn.unbox(m.init_params(key)))(
      jax.random.key(0)
    )
    for name, model in built.items()
  }
  print(
    'position | composed, cached | uncached | cached is faster by |'
    ' composed / (anchor + augmenting)'
  )
  for position in POSITIONS:
    timers = {
      name: cached(model, params[name], position=position, batch=flags.batch)
      for name, model in built.items()
    }
    timers['uncached'] = uncached(
      built['composed'],
      params['composed'],
      position=position,
      batch=flags.batch,
    )
    took = in_turn(timers, flags.rounds)
    speed = {
      name: flags.batch / statistics.median(times)
      for name, times in took.items()
    }
    both = [
      sum(pair) for pair in zip(took['anchor'], took['augmenting'], strict=True)
    ]
    print(
      f'{position} | {speed["composed"]:,.0f} tokens/s |'
      f' {speed["uncached"]:,.0f} tokens/s |'
      f' {ratio(took["uncached"], took["composed"])} |'
      f' {ratio(took["composed"], both)}',
      flush=True,
    )


if __name__ == '__main__':
  main()
