"""What quantised frozen weights cost in accuracy, and save in bytes.

  python benchmarks/quantization.py [--model_dir runs/direct] [--prompts 300]

First table, on the shipped donors: bytes kept, and the mean KL divergence (in
nats) of the next-token distributions from those of float32 weights, over all
positions of prompts and at their ends, where the answer begins; with
--model_dir also for the composition trained there. Second table, on random
weights of width 512: time of a decode step and of a forward pass, as a ratio to
float32. The variants take turns, and the fastest of all rounds counts: on a
machine that does other work that is the one least disturbed. Needs
`calm_jax[quantized]`.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

import calm_jax
from calm_jax import assembly, sharding, trees
from calm_jax.models.config import TransformerConfig
from calm_jax.models.pretrained import ModelSpec
from calm_jax.quantization import QuantizationConfig
from calm_jax.tasks import key_value_generator
from calm_jax.vocabularies import word_vocabulary

DONORS = 'calm_jax://tasks/donors/kv_quick'
CONFIGS = {
  'float32': None,
  'int8': QuantizationConfig('int8'),
  'int4': QuantizationConfig('int4'),
  'int4, groups of 64': QuantizationConfig('int4', 64),
  'nf4': QuantizationConfig('nf4'),
  'nf4, groups of 64': QuantizationConfig('nf4', 64),
  'int8, table too': QuantizationConfig('int8', None, 'kernels_and_table'),
  'nf4 of 64, table too': QuantizationConfig('nf4', 64, 'kernels_and_table'),
}
# Name, dtype of storage and of the computation, quantisation.
SPEEDS = [
  ('float32', 'float32', None),
  ('bfloat16', 'bfloat16', None),
  ('int8', 'float32', QuantizationConfig('int8')),
  ('int8 to bfloat16', 'bfloat16', QuantizationConfig('int8')),
  ('int4 of 64', 'float32', QuantizationConfig('int4', 64)),
  ('nf4 of 64', 'float32', QuantizationConfig('nf4', 64)),
]


# --- Accuracy -----------------------------------------------------------------


def load(
  config: QuantizationConfig | None, model_dir: str | None
) -> dict[str, calm_jax.Model]:
  """Loads the donors, and what was trained between them."""
  models = {
    name: calm_jax.load_pretrained(
      f'{DONORS}/{name}',
      param_dtype='float32',
      dtype='float32',
      quantization=config,
    )
    for name in ('anchor', 'augmenting')
  }
  if model_dir is not None:
    models['composed'] = calm_jax.load_composition(
      model_dir,
      anchor=models['anchor'],
      augmenting={'augmenting': models['augmenting']},
    )
  return models


def log_probs(
  model: calm_jax.Model, task: str, split: str, count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns log p [B, T, V] of each next token, and the lengths of prompts."""
  examples = key_value_generator.examples(task, 'quick', split)
  texts = [one['inputs'] for one in itertools.islice(examples, count)]
  vocabulary = model.vocabulary
  bos = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
  rows = [bos + row for row in vocabulary.encode_batch(texts)]
  lengths_B = np.array([len(row) for row in rows])
  tokens_BT = np.zeros((len(rows), lengths_B.max()), np.int32)
  for row, tokens in zip(tokens_BT, rows, strict=True):
    row[: len(tokens)] = tokens
  # What pads a row on the right is read by no position before it.
  return np.asarray(jax.nn.log_softmax(model.logits(tokens_BT))), lengths_B


def divergences(
  exact: np.ndarray, coarse: np.ndarray, lengths_B: np.ndarray
) -> tuple[float, float]:
  """Returns the mean KL over all positions, and over the ends of prompts."""
  kl_BT = np.sum(np.exp(exact) * (exact - coarse), axis=-1)
  real_BT = np.arange(kl_BT.shape[1]) < lengths_B[:, None]
  ends_B = kl_BT[np.arange(len(kl_BT)), lengths_B - 1]
  return float(kl_BT[real_BT].mean()), float(ends_B.mean())


def accuracy_table(model_dir: str | None, count: int) -> None:
  probes = {
    'anchor': ('numeric_arithmetic', 'test'),
    'augmenting': ('kv_substitution', 'held_out'),
    'composed': ('numeric_arithmetic', 'test'),
    'composed, keys': ('kv_arithmetic', 'held_out'),
  }
  exact: dict[str, np.ndarray] = {}
  for config_name, config in CONFIGS.items():
    models = load(config, model_dir)
    towers = models['anchor'].params, models['augmenting'].params
    print(f'\n{config_name}: {trees.num_bytes(towers):,} bytes of both donors')
    for probe, (task, split) in probes.items():
      system = probe.split(',')[0]
      if system not in models:
        continue
      found, lengths_B = log_probs(models[system], task, split, count)
      exact.setdefault(probe, found)
      everywhere, at_the_end = divergences(exact[probe], found, lengths_B)
      print(
        f'  {probe:16}{task:20} KL {everywhere:.2e} everywhere,'
        f' {at_the_end:.2e} where the answer begins'
      )


# --- Speed --------------------------------------------------------------------


class Timed:
  """One variant: a compiled decode step and a compiled forward pass."""

  def __init__(self, dtype: str, config: QuantizationConfig | None):
    spec = ModelSpec(
      config=TransformerConfig(
        vocab_size=2048,
        num_layers=8,
        embed_dim=512,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=1536,
        dtype=dtype,
        param_dtype=dtype,
      ),
      vocabulary=word_vocabulary([f'w{i}' for i in range(2045)]),
      quantization=config,
    )
    model = assembly.build_model(spec)
    mesh = sharding.make_mesh()
    self.params = {
      'anchor': assembly.load(spec, model.anchor, mesh=mesh).params
    }
    self.bytes = trees.num_bytes(self.params)
    cache = model.empty_cache(batch=1, slots=128)
    token_11 = jnp.zeros((1, 1), jnp.int32)
    tokens_BT = jnp.zeros((4, 128), jnp.int32)
    batch = {
      'decoder_input_tokens': tokens_BT,
      'decoder_positions': jnp.arange(128) + tokens_BT,
      'decoder_segment_ids': tokens_BT + 1,
    }
    decode, forward = jax.jit(model.extend), jax.jit(model.__call__)
    self.calls = {
      'decode step': lambda: decode(self.params, token_11, token_11, cache),
      'forward': lambda: forward(self.params, batch),
    }
    self.seconds: dict[str, list[float]] = {name: [] for name in self.calls}

  def go(self) -> None:
    for name, call in self.calls.items():
      started = time.perf_counter()
      jax.block_until_ready(call())
      self.seconds[name].append(time.perf_counter() - started)


def speed_table(rounds: int) -> None:
  runs = {name: Timed(*settings) for name, *settings in SPEEDS}
  for _ in range(rounds + 1):  # one compiles
    for run in runs.values():
      run.go()
  print(f'\n{jax.devices()[0].device_kind}, 8 layers of width 512')
  print(f'{"":18}{"MB":>7}{"decode ms":>11}{"/ float32":>11}', end='')
  print(f'{"forward ms":>12}{"/ float32":>11}')
  for name, run in runs.items():
    line = f'{name:18}{run.bytes / 1e6:7.1f}'
    for call, wide in (('decode step', 11), ('forward', 12)):
      mine = min(run.seconds[call])
      ratio = mine / min(runs['float32'].seconds[call])
      line += f'{1e3 * mine:{wide}.1f}{ratio:11.2f}'
    print(line)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model_dir')
  parser.add_argument('--prompts', type=int, default=300)
  parser.add_argument('--rounds', type=int, default=15)
  flags = parser.parse_args()
  accuracy_table(flags.model_dir, flags.prompts)
  speed_table(flags.rounds)


if __name__ == '__main__':
  main()
