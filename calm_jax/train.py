"""Trains a composition of frozen models, or one decoder from scratch.

  python -m calm_jax.train --gin_file=runs/train.gin --gin.MODEL_DIR="'/tmp/x'"

Read `train` from top to bottom: its stages are in the order of execution.
"""

from collections.abc import Callable, Mapping
import functools
import pathlib
from typing import Literal

from flax import linen as nn
import jax
from jax.sharding import Mesh

from calm_jax import (
  assembly,
  checkpoints,
  flops,
  metrics,
  optimizers,
  run_files,
  sharding,
  train_state,
  train_step,
)
from calm_jax.array_types import Params
from calm_jax.batches import BatchIterator
from calm_jax.composition import ComposedLM
from calm_jax.connections import CompositionConfig
from calm_jax.models import export, stacking, weights
from calm_jax.models.pretrained import ModelSpec
from calm_jax.prefetch import Prefetcher


def train(
  *,
  model_dir: str,
  anchor: ModelSpec,
  make_batches: Callable[..., BatchIterator],
  train_steps: int,
  batch_size: int,
  augmenting: Mapping[str, ModelSpec] | None = None,
  composition: CompositionConfig | None = None,
  trainable: Literal['composition', 'anchor'] = 'composition',
  optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig(),
  random_seed: int = 0,
  microbatches: int = 1,
  z_loss: float = 0.0,
  embedding_noise: float = 0.0,
  targets_per_row: int | None = None,
  stack: Literal['loop', 'scan'] = 'loop',
  make_mesh: Callable[[], Mesh] = sharding.make_mesh,
  log_every: int = 50,
  checkpoint_every: int = 500,
  keep_checkpoints: int = 3,
  export_dtype: str | None = None,
  summarize_config: Callable[[pathlib.Path], None] | None = None,
) -> dict[str, float]:
  """Trains the declared subtree to `train_steps`, resuming if it can.

  Args:
    model_dir: where everything is written; a second call continues there.
    anchor: the model that is extended, or trained from scratch.
    make_batches: returns global batches; called as `npz_batches` is.
    train_steps: updates in the whole run, resumed parts included.
    batch_size: rows of a global batch.
    augmenting: frozen models that are read, by name.
    composition: mapping and form of the cross-attention.
    trainable: the subtree that is trained; all others are frozen.
    optimizer: AdamW, Adafactor or Muon with its schedule.
    random_seed: of initialisation and data.
    microbatches: slices of a batch whose gradients are added.
    z_loss: weight of (log Z)^2.
    embedding_noise: the most noise on embeddings; see `make_train_step`.
    targets_per_row: if set, only so many positions of a row get logits.
    stack: whether blocks are a loop or scanned segments.
    make_mesh: arranges the devices.
    log_every: steps between progress lines and rows of metrics.jsonl.
    checkpoint_every: steps between checkpoints; the last step is always saved.
    keep_checkpoints: how many of the newest stay.
    export_dtype: stored dtype of a decoder trained from scratch.
    summarize_config: writes the configuration into a directory.

  Returns:
    The last logged metrics.

  Raises:
    ValueError: for settings that do not fit, before anything is allocated.
    FloatingPointError: at the first logged step whose loss is not finite.
  """
  # --- Check and describe, without allocating -------------------------------
  directory = pathlib.Path(model_dir).expanduser()
  augmenting = augmenting or {}
  model = assembly.build_model(
    anchor, augmenting=augmenting, composition=composition, stack=stack
  )
  mesh = make_mesh()
  assembly.check_trainable(trainable, model, anchor)
  _check(train_steps, batch_size, microbatches, embedding_noise, mesh)
  boxed = jax.eval_shape(model.init_params, jax.random.key(random_seed))
  places = sharding.param_shardings(boxed, mesh)
  batches = make_batches(
    batch_size=batch_size,
    seed=random_seed,
    vocabulary=anchor.vocabulary,
    readers=assembly.build_readers(anchor, augmenting, composition),
    targets_per_row=targets_per_row,
  )
  shapes = nn.unbox(boxed)
  say(metrics.describe(model, shapes, trainable=trainable))

  # --- Frozen weights --------------------------------------------------------
  frozen = {}
  if trainable == 'composition':
    specs = {'anchor': anchor, **augmenting}
    frozen = _load_frozen(directory, model, specs, mesh=mesh, seed=random_seed)
  if summarize_config is not None and jax.process_index() == 0:
    summarize_config(directory)

  # --- Trained state: newest good checkpoint, or fresh -----------------------
  update = optimizer.make(train_steps)
  create = functools.partial(
    train_state.create, optimizer=update, seed=random_seed
  )
  state_shapes = jax.eval_shape(create, {trainable: shapes[trainable]})
  state_places = train_state.shardings(
    state_shapes, {trainable: places[trainable]}, mesh
  )
  kept = directory / 'checkpoints'
  saved = checkpoints.Checkpoints(kept, keep=keep_checkpoints)
  state = _restore(saved, state_shapes, state_places, batches)
  if state is None:
    fresh = _start(model, anchor, trainable, mesh=mesh, seed=random_seed)
    state = jax.jit(create, out_shardings=state_places)({trainable: fresh})
  first_step = int(state.step)
  say(f'{trainable}: trained from step {first_step}, seed {random_seed}')
  say(metrics.memory_report(frozen=frozen, trained=state))

  # --- Train: the step, and the loop -----------------------------------------
  step_fn = jax.jit(
    train_step.make_train_step(
      model,
      update,
      microbatches=microbatches,
      z_loss=z_loss,
      embedding_noise=embedding_noise,
      targets_per_row=targets_per_row,
    ),
    donate_argnums=0,
    out_shardings=(state_places, sharding.replicated(mesh)),
  )
  feed = Prefetcher(batches)
  log = metrics.Log(
    directory,
    first_step=first_step,
    last_step=train_steps,
    schedule=optimizer.schedule(train_steps),
    step_flops=functools.partial(
      flops.least, model, shapes, trainable=trainable
    ),
  )
  try:
    with jax.set_mesh(mesh):
      for step in range(first_step + 1, train_steps + 1):
        batch = next(feed)
        placed = sharding.put_batch(batch, mesh)
        state, measured = step_fn(state, frozen, placed)
        if step == first_step + 1:  # compiled: the clock starts here
          jax.block_until_ready(state.step)
          log.start(batch, feed.wait_seconds)
        if step % log_every == 0 or step == train_steps:
          log.write(step, measured, wait_seconds=feed.wait_seconds)
        if step % checkpoint_every == 0 or step == train_steps:
          log.check(step, measured)  # never save a broken state
          saved.save(state, data_state=feed.state())
  finally:
    feed.close()
    log.close()
    saved.close()

  # --- Export ----------------------------------------------------------------
  _export(directory, model, anchor, state.params, export_dtype)
  say(f'Done: step {train_steps} in {directory}')
  return log.last


def say(text: str) -> None:
  """Prints a line, on process 0 only."""
  if jax.process_index() == 0:
    print(text, flush=True)


def _check(
  train_steps: int,
  batch_size: int,
  microbatches: int,
  embedding_noise: float,
  mesh: Mesh,
) -> None:
  """Raises ValueError for settings that cannot work together."""
  if train_steps < 1:
    raise ValueError(f'TRAIN_STEPS = {train_steps}: it must be at least 1.')
  if embedding_noise < 0:
    raise ValueError(
      f'embedding_noise = {embedding_noise}: it must not be negative.'
    )
  if batch_size % microbatches:
    raise ValueError(
      f'BATCH_SIZE = {batch_size} cannot be split into {microbatches}'
      ' microbatches. Choose a multiple.'
    )
  sharding.check_batch_size(batch_size // microbatches, mesh)


def _load_frozen(
  directory: pathlib.Path,
  model: ComposedLM,
  specs: Mapping[str, ModelSpec],
  *,
  mesh: Mesh,
  seed: int,
) -> Params:
  """Loads the frozen models, which must be those of the run in `directory`."""
  run_files.check_run(directory, model, specs)
  loaded = assembly.load_all(model, specs, mesh=mesh, seed=seed)
  for name, one in loaded.items():
    say(f'{name}: {one.origin}, fingerprint {one.fingerprint[:16]}, frozen')
    say(f'{name}: {one.report}')
  fingerprints = {name: one.fingerprint for name, one in loaded.items()}
  if (directory / run_files.CONFIG_FILE).exists():
    _, expected = run_files.read_config(directory)
    run_files.check_fingerprints(expected, fingerprints, where=directory)
  elif jax.process_index() == 0:
    run_files.write_config(directory, model, fingerprints)
  return assembly.frozen_tree(loaded)


def _restore(
  saved: checkpoints.Checkpoints,
  shapes: train_state.TrainState,
  places: train_state.TrainState,
  batches: BatchIterator,
) -> train_state.TrainState | None:
  """Returns the newest good checkpoint, its data position set; or None."""
  wanted = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    places,
  )
  restored = saved.restore(wanted, warn=say)
  if restored is None:
    return None
  state, data_state = restored
  batches.restore(data_state)
  return state


def _start(
  model: ComposedLM, anchor: ModelSpec, trainable: str, *, mesh: Mesh, seed: int
) -> Params:
  """Returns what training begins with: fresh, or the anchor's own weights."""
  if trainable == 'composition':
    return assembly.init_composition(model, mesh=mesh, seed=seed)
  loaded = assembly.load(anchor, model.anchor, mesh=mesh, seed=seed)
  say(f'anchor: {loaded.origin}, to be trained')
  say(f'anchor: {loaded.report}')
  return loaded.params


def _export(
  directory: pathlib.Path,
  model: ComposedLM,
  anchor: ModelSpec,
  trained: Params,
  export_dtype: str | None,
) -> None:
  """Writes what was trained as safetensors, on process 0."""
  if jax.process_index():
    return
  if 'composition' in trained:
    run_files.write_composition(directory, trained['composition'])
    _, fingerprints = run_files.read_config(directory)
    run_files.write_card(directory, model, fingerprints)
    return
  export.write_as_it_came(
    directory / 'model',
    spec=anchor,
    params=stacking.restack(
      jax.tree.map(weights.of_array, trained['anchor']),
      source=model.anchor,
      target=model.anchor.clone(stack='loop'),
    ),
    storage_dtype=export_dtype,
  )


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('train')
