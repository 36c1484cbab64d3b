"""The stages of a training run around the training: check, load, export."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import pathlib
import time
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh

from calm_jax import (
  assembly,
  checkpoints,
  evaluation,
  guards,
  metrics,
  paths,
  run_files,
  sharding,
  train_state,
  train_step,
)
from calm_jax.array_types import Params
from calm_jax.batches import BatchIterator, num_streams
from calm_jax.composition import ComposedLM
from calm_jax.model import Model
from calm_jax.models import export, stacking, weights
from calm_jax.models.pretrained import ModelSpec
from calm_jax.prefetch import Prefetcher


def say(text: str) -> None:
  """Prints a line, on process 0 only."""
  if jax.process_index() == 0:
    print(text, flush=True)


@contextlib.contextmanager
def closing(*resources: Any) -> Iterator[None]:
  """Closes all of them in the end, the last one first."""
  with contextlib.ExitStack() as stack:
    for one in resources:
      stack.callback(one.close)
    yield


def check(
  train_steps: int,
  batch_size: int,
  step_config: train_step.StepConfig,
  trainable: str,
  mesh: Mesh,
) -> None:
  """Raises ValueError for settings that cannot work together."""
  check_counts(TRAIN_STEPS=train_steps, BATCH_SIZE=batch_size)
  if step_config.loss_chunk is not None and trainable == 'anchor':
    raise ValueError(
      f'StepConfig.loss_chunk = {step_config.loss_chunk} needs a frozen head,'
      " and trainable = 'anchor' trains it. Leave one of them out."
    )
  microbatches = step_config.microbatches
  if batch_size % microbatches:
    raise ValueError(
      f'BATCH_SIZE = {batch_size} cannot be split into {microbatches}'
      ' microbatches. Choose a multiple.'
    )
  sharding.check_batch_size(batch_size // microbatches, mesh)


def check_counts(**counts: int) -> None:
  """Raises ValueError unless each is at least 1."""
  for name, count in counts.items():
    if count < 1:
      raise ValueError(f'{name} = {count}: it must be at least 1.')


def describe(
  model: ComposedLM,
  specs: Mapping[str, ModelSpec],
  mesh: Mesh,
  trainable: str,
) -> tuple[Params, Params]:
  """Prints what is trained of what; checks that all of it fits the mesh.

  Returns:
    The shapes of all parameters, and the shardings of those that are trained.
  """
  shapes, places = arrange(model, specs, mesh, trainable)
  say(metrics.describe(model, shapes, trainable=trainable))
  return shapes, {trainable: places[trainable]}


def arrange(
  model: ComposedLM,
  specs: Mapping[str, ModelSpec],
  mesh: Mesh,
  trainable: str,
) -> tuple[Params, Params]:
  """Returns the shapes of all parameters, and their shardings by model.

  The second has the models of `specs`, 'anchor' and augmenting ones by name,
  and the trained subtree.
  """
  boxed = jax.eval_shape(model.init_params, jax.random.key(0))
  shapes = nn.unbox(boxed)
  places = {
    name: assembly.places_of(spec, model.tower(name), mesh)
    for name, spec in specs.items()
  }
  if trainable != 'anchor':
    places[trainable] = sharding.param_shardings(boxed[trainable], mesh)
  return shapes, places


def load_frozen(
  directory: pathlib.Path,
  model: ComposedLM,
  specs: Mapping[str, ModelSpec],
  mesh: Mesh,
  seed: int,
) -> Params:
  """Loads the frozen models, which must be those of the run in `directory`."""
  if not specs:
    return {}
  run_files.check_run(directory, model, specs)
  loaded = assembly.load_all(model, specs, mesh=mesh, seed=seed)
  for name, one in loaded.items():
    say(f'{name}: {one.origin}, fingerprint {one.fingerprint[:16]}, frozen')
    say(f'{name}: {one.report}')
  fingerprints = {name: one.fingerprint for name, one in loaded.items()}
  if (directory / run_files.CONFIG_FILE).exists():
    expected = run_files.read_fingerprints(directory)
    run_files.check_fingerprints(expected, fingerprints, where=directory)
  elif jax.process_index() == 0:
    run_files.write_config(directory, model, fingerprints)
  return assembly.frozen_tree(loaded)


def summarize(
  write: Callable[[pathlib.Path], None] | None, directory: pathlib.Path
) -> None:
  """Lets the configuration be written to a directory, on process 0."""
  if write is not None and jax.process_index() == 0:
    write(directory)


def open_state(
  saved: checkpoints.Checkpoints,
  batches: BatchIterator,
  create: Callable[[Params], train_state.TrainState],
  *,
  shapes: Params,
  places: Params,
  start: Callable[[], Params],
) -> tuple[train_state.TrainState, train_state.TrainState]:
  """Returns the state to train from, and the sharding of each leaf of it.

  Args:
    saved: the newest good checkpoint is taken, if there is one.
    batches: set to the checkpoint's position.
    create: from the trained subtree to the state at step 0.
    shapes: of the trained subtree.
    places: its shardings.
    start: returns the subtree that training begins with.
  """
  state_shapes = jax.eval_shape(create, shapes)
  mesh = jax.tree.leaves(places)[0].mesh
  state_places = train_state.shardings(state_shapes, places, mesh)
  wanted = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    state_shapes,
    state_places,
  )
  restored = saved.restore(wanted, warn=say)
  if restored is not None:
    state, data_state = restored
    batches.restore(data_state)
    return state, state_places
  trained = dict.fromkeys(places, start())
  return jax.jit(create, out_shardings=state_places)(trained), state_places


def position(feed: Prefetcher) -> dict:
  """Returns where the data stand; of streams, each process knows its own."""
  state = feed.state()
  return state if num_streams(state) == 1 else sharding.largest(state)


def save(
  saved: checkpoints.Checkpoints,
  log: metrics.Log,
  state: train_state.TrainState,
  feed: Prefetcher,
) -> None:
  """Saves a step, and before it what was logged until there."""
  log.flush()
  saved.save(state, data_state=position(feed))


def start(
  model: ComposedLM, anchor: ModelSpec, trainable: str, mesh: Mesh, seed: int
) -> Params:
  """Returns what training begins with: fresh, or the anchor's own weights."""
  if trainable != 'anchor':
    return assembly.init_trained(trainable, model, mesh=mesh, seed=seed)
  loaded = assembly.load(anchor, model.anchor, mesh=mesh, seed=seed)
  say(f'anchor: {loaded.origin}, to be trained')
  say(f'anchor: {loaded.report}')
  return loaded.params


class Evaluation:
  """Evaluates the model at some steps of a run, in its folder `eval`."""

  def __init__(
    self,
    evaluator: evaluation.Evaluator,
    speaker: Model,
    frozen: Params,
    directory: pathlib.Path,
    is_due: Callable[[int, int], bool],
  ):
    """Does nothing yet.

    Args:
      evaluator: the tasks; without any nothing is ever done.
      speaker: the model, whose parameters are replaced.
      frozen: those that are not trained.
      directory: MODEL_DIR.
      is_due: given a step and a number of steps, whether it is time.
    """
    self._evaluator, self._speaker = evaluator, speaker
    self._frozen, self._is_due = frozen, is_due
    self._directory = directory / 'eval'

  def make_up(self, step: int, trained: Params, log: metrics.Log) -> None:
    """Evaluates the step that a run continues at, if a stop took its place."""
    if step and self._is_wanted(step):
      if self._evaluator.missing(self._directory, str(step)):
        self._run(step, trained, log)

  def __call__(
    self, step: int, trained: Params, log: metrics.Log, guard: guards.Guard
  ) -> None:
    """Evaluates the model as it is after a step, if that is due."""
    if self._is_wanted(step):
      guard.rest()
      self._run(step, trained, log)

  def _is_wanted(self, step: int) -> bool:
    every = self._evaluator.every
    return bool(self._evaluator.tasks) and self._is_due(step, every)

  def _run(self, step: int, trained: Params, log: metrics.Log) -> None:
    begun = time.perf_counter()
    self._speaker.params = {**self._frozen, **trained}
    found = self._evaluator(
      self._speaker.decode, directory=self._directory, label=str(step), say=say
    )
    log.add(step, found, seconds=time.perf_counter() - begun)


def stop(saved: checkpoints.Checkpoints, step: int) -> None:
  """Ends the process after SIGTERM, once the step is committed."""
  saved.wait()
  say(f'Told to stop: saved step {step}; the same command continues there.')
  raise SystemExit(guards.PREEMPTED)


def export_trained(
  directory: pathlib.Path,
  model: ComposedLM,
  anchor: ModelSpec,
  trained: Params,
  export_dtype: str | None,
) -> None:
  """Writes what was trained as safetensors, on process 0.

  The others only give what they hold of it.
  """
  if jax.process_count() > 1:
    trained = jax.tree.map(sharding.collect, trained)
  if jax.process_index():
    return

  def as_loop(params):
    return stacking.restack(
      jax.tree.map(weights.of_array, params),
      source=model.anchor,
      target=model.anchor.clone(stack='loop'),
    )

  if 'lora' in trained:
    updates = as_loop(trained['lora'])
    run_files.write_trained(directory, updates, name=run_files.LORA_FILE)
    return
  if 'composition' in trained:
    run_files.write_trained(directory, trained['composition'])
    fingerprints = run_files.read_fingerprints(directory)
    run_files.write_card(directory, model, fingerprints)
    return
  with paths.to_write(directory / 'model') as folder:
    export.write_as_it_came(
      folder,
      spec=anchor,
      params=as_loop(trained['anchor']),
      storage_dtype=export_dtype,
    )
