"""What a composed training step costs, beside full fine-tuning of the anchor.

  python benchmarks/train_step.py [--steps 10] [--batch 8] [--length 256]

For each variant: dot FLOPs of the compiled program over F_min (the gate is
1.05), seconds to compile, tokens/s over the same number of steps, and the peak
temporary memory that XLA plans. The variants take turns step by step, so that
a machine whose speed drifts slows all of them alike.
"""

import argparse
import time

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from calm_jax import flops, hlo, optimizers, train_state, train_step, trees
from calm_jax.composition import ComposedLM
from calm_jax.connections import CompositionConfig, LayerMapping
from calm_jax.models.config import TransformerConfig
from calm_jax.models.transformer import DecoderLM

GATE = 1.05


def towers() -> tuple[TransformerConfig, TransformerConfig]:
  """An anchor and an augmenting model of a quarter of its size."""
  shared = {'vocab_size': 2048, 'head_dim': 64}
  anchor = TransformerConfig(
    num_layers=8,
    embed_dim=512,
    num_heads=8,
    num_kv_heads=8,
    mlp_dim=1536,
    **shared,
  )
  augmenting = TransformerConfig(
    num_layers=8,
    embed_dim=256,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=768,
    **shared,
  )
  return anchor, augmenting


def variants() -> dict[str, tuple[ComposedLM, str]]:
  """Models with the subtree that is trained, by name."""
  anchor, augmenting = towers()
  composition = CompositionConfig(mapping=LayerMapping.every(4))
  found = {}
  for stack in ('loop', 'scan'):
    found[f'composition, {stack}'] = (
      ComposedLM(
        DecoderLM(anchor, stack=stack),
        augmenting={'augmenting': DecoderLM(augmenting, stack=stack)},
        composition=composition,
      ),
      'composition',
    )
    found[f'full fine-tuning, {stack}'] = (
      ComposedLM(DecoderLM(anchor, stack=stack)),
      'anchor',
    )
  return found


def make_batch(batch: int, length: int) -> dict[str, np.ndarray]:
  """Random tokens with a loss on every position."""
  tokens = np.random.default_rng(0).integers(0, 2048, (batch, length), np.int32)
  return {
    'decoder_input_tokens': tokens,
    'decoder_target_tokens': np.roll(tokens, -1, axis=1),
    'decoder_positions': np.broadcast_to(
      np.arange(length, dtype=np.int32), tokens.shape
    ),
    'decoder_segment_ids': np.ones_like(tokens),
    'decoder_loss_weights': np.ones(tokens.shape, np.float32),
  }


class Run:
  """One variant: compiled, with its state."""

  def __init__(self, model: ComposedLM, trainable: str, batch: dict):
    self.batch = {name: jnp.asarray(x) for name, x in batch.items()}
    params = jax.jit(lambda key: nn.unbox(model.init_params(key)))(
      jax.random.key(0)
    )
    optimizer = optimizers.OptimizerConfig().make(1000)
    trained = {trainable: params.pop(trainable)}
    self.frozen = params
    self.state = train_state.create(trained, optimizer, seed=0)
    step = jax.jit(
      train_step.make_train_step(model, optimizer), donate_argnums=0
    )
    started = time.perf_counter()
    self.step = step.lower(self.state, self.frozen, self.batch).compile()
    self.compile_seconds = time.perf_counter() - started
    self.tokens = batch['decoder_input_tokens'].size
    self.flops = hlo.flops(self.step.as_text())
    self.least = flops.least(
      model,
      {**self.frozen, **trained},
      batch,
      trainable=trainable,
    )
    self.temporary = self.step.memory_analysis().temp_size_in_bytes
    self.slots = trees.num_bytes(self.state)
    self.seconds: list[float] = []

  def go(self) -> None:
    started = time.perf_counter()
    self.state, metrics = self.step(self.state, self.frozen, self.batch)
    jax.block_until_ready(metrics)
    self.seconds.append(time.perf_counter() - started)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--length', type=int, default=256)
  flags = parser.parse_args()
  batch = make_batch(flags.batch, flags.length)
  runs = {name: Run(*one, batch) for name, one in variants().items()}
  for _ in range(flags.steps + 1):
    for run in runs.values():
      run.go()
  print(f'{jax.devices()[0].device_kind}, batch {flags.batch} x {flags.length}')
  print(
    f'{"variant":24}{"GFLOP":>8}{"/ F_min":>9}{"compile s":>11}'
    f'{"tokens/s":>10}{"temp MB":>9}{"state MB":>10}'
  )
  for name, run in runs.items():
    speed = run.tokens / np.median(run.seconds[1:])
    print(
      f'{name:24}{run.flops / 1e9:8.1f}{run.flops / run.least:9.3f}'
      f'{run.compile_seconds:11.1f}{speed:10,.0f}'
      f'{run.temporary / 1e6:9.0f}{run.slots / 1e6:10.1f}'
    )
  for stack in ('loop', 'scan'):
    ratios = np.array(runs[f'full fine-tuning, {stack}'].seconds[1:]) / (
      np.array(runs[f'composition, {stack}'].seconds[1:])
    )
    print(
      f'{stack}: a composed step is {np.median(ratios):.2f} x as fast as full'
      f' fine-tuning of the anchor (pairs: {ratios.min():.2f} to'
      f' {ratios.max():.2f})'
    )
  worst = max(
    run.flops / run.least for name, run in runs.items() if 'comp' in name
  )
  if worst > GATE:
    raise SystemExit(f'The FLOP gate fails: {worst:.3f} > {GATE}.')


if __name__ == '__main__':
  main()
