"""A training run small enough to be killed, stopped and repeated many times.

  python -m tests.toy_run MODEL_DIR --steps 200

It needs no files and no TensorFlow: random frozen models, packed sequences of
random ids, two microbatches. Told by `calm_jax.distributed`'s variables, it is
one of several processes. What may be asked for, see `main`.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import sys
from typing import Any

import jax
import numpy as np

from calm_jax import (
  batches,
  checkpoints,
  connections,
  distributed,
  guards,
  optimizers,
  replicas,
  run_files,
  run_stages,
  sharding,
  train,
  train_state,
  train_step,
  trees,
)
from calm_jax.models import pretrained
from tests import tiny, toys

VOCAB = 26
ANCHOR = dataclasses.replace(
  tiny.ANCHOR,
  vocab_size=VOCAB,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=32,
  init_stddev=0.1,
)
AUGMENTING = dataclasses.replace(ANCHOR, num_layers=1, embed_dim=24)
# What of a row in metrics.jsonl is not the same in every run.
_RATES = ('tokens_per_second', 'seconds_per_step', 'data_wait_percent')


def _examples(start: int):
  """Yields sequences of 2 to 9 random ids for ever."""
  rng = np.random.default_rng(0)
  number = 0
  while True:
    lengths = rng.integers(1, 5, 2)
    inputs, targets = (rng.integers(0, VOCAB - 3, n) for n in lengths)
    if number >= start:
      yield {'inputs': inputs.tolist(), 'targets': [*targets.tolist(), 25]}
    number += 1


def toy_batches(*, batch_size, vocabulary, **_):
  """As `npz_batches`, of what is made up on the way."""
  return batches.ExampleBatches(
    _examples,
    batch_size=batch_size,
    length=16,
    pack=True,
    bos_id=vocabulary.bos_id,
  )


@contextlib.contextmanager
def _told_to_stop(at: int | None):
  """Sends SIGTERM to this process after a step has been started."""
  after = guards.Guard.after

  def tell(self, step, *rest):
    if step == at:
      os.kill(os.getpid(), signal.SIGTERM)
    return after(self, step, *rest)

  guards.Guard.after = tell
  try:
    yield
  finally:
    guards.Guard.after = after


def _one_ulp_away(
  state: train_state.TrainState, name: str
) -> train_state.TrainState:
  """Changes the last bit of a parameter's first number, in this process."""

  def change(path, leaf):
    if trees.path_name(path) != name:
      return leaf
    parts = []
    for shard in leaf.addressable_shards:
      part = np.array(shard.data)
      part.flat[0] = np.nextafter(part.flat[0], np.inf, dtype=part.dtype)
      parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(
      leaf.shape, leaf.sharding, parts
    )

  return jax.tree_util.tree_map_with_path(change, state)


@contextlib.contextmanager
def _first_state(diverged: str | None):
  """Tells how much is split; may let this process begin with something else."""
  open_state = run_stages.open_state

  def opened(*arguments, **settings):
    state, places = open_state(*arguments, **settings)
    leaves = jax.tree.leaves(state.params)
    split = sum(x.sharding.shard_shape(x.shape) != x.shape for x in leaves)
    run_stages.say(f'split: {split} of {len(leaves)}')
    return _one_ulp_away(state, diverged) if diverged else state, places

  run_stages.open_state = opened
  try:
    yield
  finally:
    run_stages.open_state = open_state


def _sees_damage() -> None:
  """Lets this process find the first step that it reads damaged."""
  check = checkpoints._check_arrays

  def found(leaves, manifest):
    checkpoints._check_arrays = check
    raise ValueError('as if a bit were flipped')

  checkpoints._check_arrays = found


def run(
  directory: pathlib.Path,
  *,
  mesh: tuple[int, int, int] | None = None,
  sigterm_at: int | None = None,
  diverged: str | None = None,
  **settings: Any,
) -> dict[str, float]:
  """Trains, or continues.

  Args:
    directory: MODEL_DIR.
    mesh: (data, fsdp, tensor); the first device alone if not given.
    sigterm_at: the step at which the process sends SIGTERM to itself.
    diverged: a parameter that this process begins with one ulp away.
    **settings: of `train.train`.
  """
  vocabulary = toys.vocabulary(VOCAB)
  describe = lambda config: pretrained.ModelSpec(
    config=config, vocabulary=vocabulary
  )
  if mesh is None:
    make_mesh = lambda: sharding.make_mesh(devices=jax.devices()[:1])
  else:
    make_mesh = functools.partial(
      sharding.make_mesh, **dict(zip(sharding.MESH_AXES, mesh, strict=True))
    )
  settings = {
    'model_dir': str(directory),
    'anchor': describe(ANCHOR),
    'augmenting': {'code': describe(AUGMENTING)},
    'composition': connections.CompositionConfig(
      mapping=connections.LayerMapping.explicit([tiny.connection(0, 0)])
    ),
    'make_batches': toy_batches,
    'make_mesh': make_mesh,
    'train_steps': 200,
    'batch_size': 16,
    'optimizer': optimizers.OptimizerConfig(warmup_steps=2),
    'step_config': train_step.StepConfig(microbatches=2),
    'log_every': 1,
    'checkpoint_every': 5,
    **settings,
  }
  with _told_to_stop(sigterm_at), _first_state(diverged):
    return train.train(**settings)


def digests_of(directory: pathlib.Path) -> dict[str, str]:
  """Returns the digest of each array of a finished run."""
  return trees.digests(run_files.read_trained(directory))


def result_of(directory: pathlib.Path) -> dict[str, Any]:
  """Returns all that must be the same, however the run came about.

  Bytes of the composition and of every array of the last checkpoint, and the
  logged numbers.
  """
  newest = max(
    (directory / 'checkpoints').iterdir(),
    key=lambda path: int(path.name) if path.name.isdigit() else -1,
  )
  manifest = json.loads((newest / 'manifest' / 'metadata').read_text())
  rows = (directory / 'metrics.jsonl').read_text().splitlines()
  return {
    'composition': (directory / run_files.WEIGHTS_FILE).read_bytes(),
    'checkpoint': manifest['manifest'],
    'logged': [
      {k: v for k, v in json.loads(row).items() if not k.endswith(_RATES)}
      for row in rows
    ],
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('directory', type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--mesh', type=int, nargs=3)
  parser.add_argument('--checkpoint_every', type=int, default=5)
  parser.add_argument('--log_every', type=int, default=1)
  parser.add_argument('--sigterm_at', type=int)
  parser.add_argument('--diverged')
  parser.add_argument('--sees_damage', action='store_true')
  options = parser.parse_args()
  try:
    distributed.initialize(os.environ)
    if options.sees_damage:
      _sees_damage()
    run(
      options.directory,
      mesh=options.mesh,
      sigterm_at=options.sigterm_at,
      diverged=options.diverged,
      train_steps=options.steps,
      checkpoint_every=options.checkpoint_every,
      log_every=options.log_every,
    )
  except replicas.DivergenceError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
