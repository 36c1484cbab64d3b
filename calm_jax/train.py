"""Trains a composition of frozen models, or one decoder from scratch.

  python -m calm_jax.train --gin_file=runs/train.gin --gin.MODEL_DIR="'/tmp/x'"

Read `train` from top to bottom: its stages are in the order of execution.
"""

from collections.abc import Callable, Mapping
import functools
import pathlib
from typing import Literal

import jax
from jax.sharding import Mesh

from calm_jax import (
  assembly,
  checkpoints,
  evaluation,
  flops,
  metrics,
  optimizers,
  paths,
  profiling,
  sharding,
  train_state,
  train_step,
)
from calm_jax import guards as guards_lib
from calm_jax import run_stages as stages
from calm_jax.batches import BatchIterator
from calm_jax.connections import CompositionConfig
from calm_jax.lora import LoraConfig
from calm_jax.model import Model
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
  trainable: Literal['composition', 'lora', 'anchor'] = 'composition',
  lora: LoraConfig | None = None,
  optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig(),
  random_seed: int = 0,
  step_config: train_step.StepConfig = train_step.DEFAULT,
  stack: Literal['loop', 'scan'] = 'loop',
  remat: bool = False,
  make_mesh: Callable[[], Mesh] = sharding.make_mesh,
  log_every: int = 50,
  profile_steps: tuple[int, int] | None = None,
  checkpoint_every: int = 500,
  evaluator: evaluation.Evaluator = evaluation.Evaluator(),
  keep_checkpoints: int = 3,
  guards: guards_lib.Guards = guards_lib.DEFAULT,
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
    trainable: the subtree; 'lora' and 'anchor' leave a composition out.
    lora: the form of LoRA's updates.
    optimizer: AdamW, Adafactor or Muon with its schedule.
    random_seed: of initialisation and data.
    step_config: microbatches, targets per row, noise, refused losses.
    stack: whether blocks are a loop or scanned segments.
    remat: whether what is differentiated is computed again, not kept.
    make_mesh: arranges the devices.
    log_every: steps between progress lines and rows of metrics.jsonl.
    profile_steps: first and last step of a trace in model_dir/profile.
    checkpoint_every: steps between checkpoints; the last step is always saved.
    evaluator: tasks that are decoded and scored during training.
    keep_checkpoints: how many of the newest stay.
    guards: what is done about hangs and bad steps.
    export_dtype: stored dtype of a decoder trained from scratch.
    summarize_config: writes the configuration into a directory.

  Returns:
    The last logged metrics.

  Raises:
    ValueError: for settings that do not fit, before anything is allocated.
    FloatingPointError: after `guards.tolerated_steps` bad steps.
    SystemExit: with `guards.PREEMPTED`, when told by SIGTERM, and saved.
  """
  # --- Check and describe, without allocating -------------------------------
  directory = paths.of(model_dir)
  model, kept = assembly.build_trained(
    trainable,
    anchor,
    augmenting=augmenting or {},
    composition=composition,
    lora=lora,
    stack=stack,
    remat=remat,
  )
  mesh = make_mesh()
  stages.check(train_steps, batch_size, step_config, trainable, mesh)
  stages.check_counts(log_every=log_every, checkpoint_every=checkpoint_every)
  evaluator.check()
  profiler = profiling.Profiler(directory, profile_steps, train_steps)
  specs = {'anchor': anchor, **kept}
  shapes, places = stages.describe(model, specs, mesh, trainable)
  readers = assembly.build_readers(anchor, augmenting or {}, composition)
  batches = make_batches(
    batch_size=batch_size,
    seed=random_seed,
    vocabulary=anchor.vocabulary,
    readers=readers,
    targets_per_row=step_config.targets_per_row,
    needed_B=sharding.needed_rows(batch_size, mesh),
  )

  with guards_lib.only_run(directory):
    # --- Frozen weights ------------------------------------------------------
    specs = specs if trainable != 'anchor' else {}
    frozen = stages.load_frozen(directory, model, specs, mesh, random_seed)
    stages.summarize(summarize_config, directory)

    # --- Trained state: newest good checkpoint, or fresh ---------------------
    update = optimizer.make(train_steps)
    saved = checkpoints.Checkpoints(directory / 'checkpoints', keep_checkpoints)
    state, state_places = stages.open_state(
      saved,
      batches,
      functools.partial(train_state.create, optimizer=update, seed=random_seed),
      shapes={trainable: shapes[trainable]},
      places=places,
      start=lambda: stages.start(model, anchor, trainable, mesh, random_seed),
    )
    first = int(state.step)
    stages.say(f'{trainable}: trained from step {first}, seed {random_seed}')
    stages.say(metrics.memory_report(frozen=frozen, trained=state))

    # --- Train: the step, and the loop ---------------------------------------
    step_fn = jax.jit(
      train_step.make_train_step(model, update, step_config),
      donate_argnums=0,
      out_shardings=(state_places, sharding.replicated(mesh)),
    )
    feed = Prefetcher(batches)
    speaker = Model(model, {}, spec=anchor, mesh=mesh, readers=readers)
    log = metrics.Log(
      directory,
      steps=(first, train_steps),
      schedule=optimizer.schedule(train_steps),
      step_flops=lambda batch: flops.least(model, shapes, batch, trainable),
    )
    guard = guards_lib.Guard(guards, directory)
    is_due = lambda step, every: step % every == 0 or step == train_steps
    evaluate = stages.Evaluation(evaluator, speaker, frozen, directory, is_due)
    with stages.closing(saved, log, feed, profiler), jax.set_mesh(mesh), guard:
      evaluate.make_up(first, state.params, log)
      for step in range(first + 1, train_steps + 1):
        batch = next(feed)
        placed = sharding.put_batch(batch, mesh)
        state, measured = profiler.run(step, step_fn, state, frozen, placed)
        if step == first + 1:  # compiled: the clock starts here
          log.start(batch, feed.wait_seconds, after=state.step)
        must_stop = guard.after(step, batch, measured)
        if step == 1 or is_due(step, log_every):
          log.write(step, measured, **feed.report())
        if must_stop or is_due(step, checkpoint_every):
          guard.look()  # never save a broken state
          stages.save(saved, log, state, feed)
        if must_stop:
          stages.stop(saved, step)
        evaluate(step, state.params, log, guard)

    # --- Export --------------------------------------------------------------
    stages.export_trained(directory, model, anchor, state.params, export_dtype)
  stages.say(f'Done: step {train_steps} in {directory}')
  return log.last


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('train')
