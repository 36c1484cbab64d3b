"""Time and memory of loading a large random checkpoint.

  python benchmarks/load_pretrained.py --sizes=0.1,1

Writes a Llama of about so many billion parameters (bfloat16, files of at most
1 GB), then loads it in a fresh process for each row of the table. Times are of
the clock, and in brackets of all cores together. Memory is the peak of RssAnon,
sampled every 5 ms: pages of the mapped files are not in it, for the system can
drop them at any time. Limit: size x 1.2 + 600 MB.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

SIZES = {  # layers, width, heads, kv heads, feed-forward, vocabulary
  '0.03': (8, 512, 8, 4, 1024, 20_000),  # 60 MB, for a test
  '0.1': (12, 768, 12, 4, 2048, 32_000),
  '1': (16, 2048, 32, 8, 8192, 128_256),  # as Llama 3.2 1B
}
ROWS = (  # stack, param_dtype, devices, fsdp
  ('loop', None, 1, 1),
  ('scan', None, 1, 1),
  ('loop', 'float32', 1, 1),
  ('loop', None, 8, 8),
  ('scan', None, 8, 8),
)


def write(directory: pathlib.Path, size: str) -> int:
  """Writes the checkpoint, one tensor at a time; returns its bytes."""
  from flax import linen as nn
  import jax
  import ml_dtypes
  import numpy as np

  from calm_jax import trees, vocabularies
  from calm_jax.models import (
    directories,
    families,
    transformer,
    weight_files,
    weights,
  )

  layers, width, heads, kv_heads, mlp, vocab = SIZES[size]
  fields = {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': vocab,
    'hidden_size': width,
    'intermediate_size': mlp,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16',
  }
  config = families.config_from(fields, where='benchmark')
  model = transformer.DecoderLM(config)
  shapes = nn.unbox(jax.eval_shape(model.init_params, jax.random.key(0)))
  rng = np.random.default_rng(0)

  def fill(out, index):  # numbers of either sign, from 1/64 to 1/32
    bits = rng.integers(0, 1 << 16, out.shape, np.uint16)
    out[...] = ((bits & 0x807F) | 0x3C80).view(ml_dtypes.bfloat16)

  names = families.sources(config, model_type='llama')
  tensors = {}
  for name, leaf in trees.flatten(shapes).items():
    source = names[name]
    shape = leaf.shape[::-1] if source.transposed else leaf.shape
    tensors[source.name] = weights.Tensor(
      shape, np.dtype(ml_dtypes.bfloat16), fill
    )
  directory.mkdir()
  directories.write_json(directory / 'config.json', fields)
  weight_files.write_directory(directory, tensors, shard_bytes=1_000_000_000)
  vocabularies.word_vocabulary(['a', 'b']).save(directory)
  return sum(tensor.nbytes for tensor in tensors.values())


def anonymous() -> int:
  """Returns the bytes of this process that no file backs."""
  with open('/proc/self/status') as status:
    line = next(line for line in status if line.startswith('RssAnon'))
  return int(line.split()[1]) * 1024


class Peak:
  """The most anonymous memory while it is entered."""

  def __enter__(self):
    self.bytes, self._done = 0, threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self):
    while not self._done.wait(0.005):
      self.bytes = max(self.bytes, anonymous())

  def __exit__(self, *error):
    self._done.set()
    self._thread.join()
    self.bytes = max(self.bytes, anonymous())


def now() -> tuple[float, float]:
  """Returns seconds on the clock, and of this process on all cores."""
  return time.perf_counter(), time.process_time()


def between(start: tuple[float, float], stop: tuple[float, float]) -> list:
  return [round(b - a, 2) for a, b in zip(start, stop, strict=True)]


def load(path: str, stack: str, param_dtype: str | None, fsdp: int) -> dict:
  """Loads once in this process, and measures."""
  with Peak() as peak:
    import jax

    from calm_jax import assembly, sharding, trees
    from calm_jax.models import pretrained

    mesh = sharding.make_mesh(fsdp=fsdp)
    before = anonymous()
    spec = pretrained.pretrained_model(path, param_dtype=param_dtype)
    model = assembly.build_model(spec, stack=stack)
    described = now()
    pretrained.fingerprint(spec)
    hashed = now()
    loaded = assembly.load(spec, model.anchor, mesh=mesh)
    jax.block_until_ready(loaded.params)
    placed = now()
  return {
    'hashed': between(described, hashed),
    'placed': between(hashed, placed),
    'before': before,
    'peak': peak.bytes,
    'params': trees.num_bytes(loaded.params),
    'report': loaded.report,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--sizes', default='0.1,1')
  parser.add_argument('--rows', default='', help='some rows, as 0,2')
  parser.add_argument('--load', help='loads as this JSON says, and prints')
  flags = parser.parse_args()
  if flags.load:
    print(json.dumps(load(**json.loads(flags.load))))
    return
  rows = [ROWS[int(i)] for i in flags.rows.split(',') if i] or ROWS
  print(
    '| params | stack | dtype | devices | hash | read, place | peak | limit'
  )
  with tempfile.TemporaryDirectory() as root:
    for size in flags.sizes.split(','):
      directory = pathlib.Path(root) / size
      nbytes = write(directory, size)
      for stack, param_dtype, devices, fsdp in rows:
        settings = {
          'path': str(directory),
          'stack': stack,
          'param_dtype': param_dtype,
          'fsdp': fsdp,
        }
        command = [sys.executable, __file__, '--load', json.dumps(settings)]
        environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices)}
        done = subprocess.run(
          command, env=environment, capture_output=True, text=True
        )
        if done.returncode:
          sys.exit(done.stderr)
        got = json.loads(done.stdout.splitlines()[-1])
        limit = max(nbytes, got['params']) * 1.2 + 600e6
        print(
          f'| {nbytes / 2e9:.2f} B | {stack} | {param_dtype or "bfloat16"}'
          f' | {devices}'
          f' | {got["hashed"][0]} s ({got["hashed"][1]})'
          f' | {got["placed"][0]} s ({got["placed"][1]})'
          f' | {got["peak"] / 1e6:,.0f} MB | {limit / 1e6:,.0f} MB',
          flush=True,
        )


if __name__ == '__main__':
  main()
