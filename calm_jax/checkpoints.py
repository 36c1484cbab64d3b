"""Orbax checkpoints of what is trained, each with a manifest of hashes.

Orbax commits a step atomically, but does not notice a flipped bit. So every
step also holds the SHA-256 of each array, checked on restore; a step that fails
is named, and the newest good one is taken instead.

Orbax writes to this machine and to gs://, and no arrays to s3://. There a step
is written to a temporary folder, and copied when it is committed.

Restore order of a run: (1) the newest good step in MODEL_DIR/checkpoints,
(2) a fresh state. Frozen weights always come from their own directories.
"""

from collections.abc import Callable
import contextlib
import hashlib
import json
import logging
import pathlib
import tempfile
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from calm_jax import paths, replicas, sharding, trees
from calm_jax.train_state import TrainState

# A damaged step shows itself through any of these, depending on what was hit.
_DAMAGE = (
  ValueError,
  KeyError,
  TypeError,
  AttributeError,
  OSError,
  RuntimeError,
  EOFError,
)
# Orbax writes it into every step; in a bucket it is the last that is copied.
_LAST = '_CHECKPOINT_METADATA'


class _OtherModelError(ValueError):
  """A step is sound, but of another model or optimizer."""


class Checkpoints:
  """The checkpoints of one run, in MODEL_DIR/checkpoints/<step>."""

  def __init__(self, directory: pathlib.Path, keep: int = 3):
    """Opens or makes the directory.

    Args:
      directory: of this run alone.
      keep: how many of the newest steps stay.

    Raises:
      ValueError: if it is to keep none.
    """
    if keep < 1:
      raise ValueError(f'keep_checkpoints = {keep}: it must be at least 1.')
    # Orbax logs every phase of every save at the level of warnings and info.
    logging.getLogger('absl').setLevel(logging.ERROR)
    self._directory = self._here = _absolute(directory)
    self._copied = None
    if str(directory).startswith('s3://'):
      self._copied = tempfile.TemporaryDirectory(prefix='calm_jax_')
      self._here = pathlib.Path(self._copied.name)
      _download(self._directory, self._here)
    self._manager = ocp.CheckpointManager(
      self._here,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=not self._copied
      ),
    )

  def steps(self) -> list[int]:
    """Lists the committed steps, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, *, data_state: dict[str, Any]) -> None:
    """Saves a step in the background; to s3:// before it returns.

    Args:
      state: on any mesh.
      data_state: JSON-serialisable position of the data after this step.

    Raises:
      OSError: if it, or the one before, cannot be written.
      DivergenceError: if devices hold unequal copies; nothing is written.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    replicas.check(state)
    manifest = {
      'arrays': _digests(state),
      'shapes': _shapes(state),
      'data': data_state,
      'step': step,
    }
    with self._told(step):
      is_saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(trees.flatten(state)),
          manifest=ocp.args.JsonSave(
            {'manifest': manifest, 'sha256': _json_digest(manifest)}
          ),
        ),
      )
      if not is_saved:
        raise ValueError(f'Orbax would not save the step {step}')
      if self._copied:
        _upload(self._here, self._directory, step, self.steps())

  @contextlib.contextmanager
  def _told(self, step: int | None):
    """Says what is left if a save fails, this one's or the one before."""
    try:
      yield
    except _DAMAGE as error:
      good = [one for one in self.steps() if one != step]
      reason = _first_line(error)
      raise OSError(
        f'A checkpoint could not be written to {self._directory} ({reason}).'
        f' The steps {good} are there. Make room, or make it writable; the same'
        ' command continues at the last of them.'
      ) from error

  def restore(
    self, shapes: TrainState, *, warn: Callable[[str], None] = print
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """Restores the newest good step onto the shardings of `shapes`.

    Args:
      shapes: `ShapeDtypeStruct` leaves with the shardings wanted.
      warn: told of each step that is damaged and passed over.

    Returns:
      The state and the data position, or None if there is no step at all.

    Raises:
      ValueError: if there are steps, and none of them is good, or if they
        belong to another model.
    """
    steps, reasons = self.steps(), []
    for step in reversed(steps):
      found, reason = None, ''
      try:
        self._look_first(step)
        found = self._restore_step(step, shapes)
      except (_OtherModelError, jax.errors.JaxRuntimeError):
        raise  # memory that is full, or a process that is gone, is no damage
      except _DAMAGE as error:
        reason = _first_line(error)
      if not sharding.largest(int(found is None)):  # of all processes
        self._set_aside([one for one in steps if one > step])
        return found
      reason = reason or 'another process has found it damaged'
      reasons.append(f'{step}: {reason}')
      warn(f'{self._directory / str(step)} is damaged and skipped: {reason}')
    if steps:
      raise ValueError(
        f'None of the steps {steps} in {self._directory} can be restored'
        f' ({"; ".join(reasons)}). Copy them again, if you have them elsewhere;'
        ' or start again in another MODEL_DIR.'
      )
    return None

  def _set_aside(self, damaged: list[int]) -> None:
    """Renames steps, so that those after the restored one can be saved."""
    if not damaged:
      return
    if jax.process_index() == 0:
      for step in damaged:
        folder = self._here / str(step)
        kept = folder.with_name(f'{step}.damaged')
        while kept.exists():
          kept = kept.with_name(f'{kept.name}.1')
        folder.rename(kept)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('damaged steps are set aside')
    self._manager.reload()

  def _look_first(self, step: int) -> None:
    """Lets process 0 read the whole step, if there are others.

    Raises:
      ValueError: on every process, if it is damaged. If one alone found that
        while all restore, the others would wait in Orbax for it.
    """
    if jax.process_count() == 1:
      return
    reason = ''
    if jax.process_index() == 0:
      folder = self._here / str(step)
      try:
        _check_arrays(_read_on_host(folder / 'state'), _read_manifest(folder))
      except _DAMAGE as error:
        reason = _first_line(error)
    if sharding.largest(int(bool(reason))):
      raise ValueError(reason or 'process 0 has found it damaged')

  def _restore_step(
    self, step: int, shapes: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    manifest = _read_manifest(self._here / str(step))
    saved, wanted = manifest['shapes'], _shapes(shapes)
    if saved != wanted:
      raise _OtherModelError(
        f'{self._directory / str(step)} is of another model or optimizer: it'
        f' has {_first_of(saved, wanted)}, this run {_first_of(wanted, saved)}.'
        ' Choose another MODEL_DIR, or the settings it was begun with.'
      )
    wanted = trees.flatten(shapes)
    restored = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
    )['state']
    state = _from_dict(restored, shapes)
    _check_arrays(trees.flatten(state), manifest)
    return state, manifest['data']

  def wait(self) -> None:
    """Waits until the last save is committed, and raises what went wrong."""
    with self._told(None):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits as `wait` does, and lets go of the directory."""
    with self._told(None):
      self._manager.close()
    if self._copied:
      self._copied.cleanup()


def read_tree(directory: pathlib.Path, entry: str) -> dict[str, Any]:
  """Reads one entry of a tree that another program wrote by Orbax.

  Args:
    directory: what Orbax was told to write to.
    entry: a name at the top of the tree; nothing else is read.

  Returns:
    Nested dicts of numpy arrays; no device is touched.

  Raises:
    ValueError: if it cannot be read, or has no such entry.
  """
  logging.getLogger('absl').setLevel(logging.ERROR)
  directory = _absolute(directory)
  try:
    return _read_on_host(directory, entry)[entry]
  except _DAMAGE as error:
    raise ValueError(
      f'{directory} cannot be read as an Orbax checkpoint with the entry'
      f' {entry!r} ({_first_line(error)}). Copy it again from where it came'
      ' from.'
    ) from error


def _absolute(directory: pathlib.Path) -> pathlib.Path:
  return directory if paths.is_remote(directory) else directory.absolute()


def _download(directory: pathlib.Path, here: pathlib.Path) -> None:
  """Copies all whole steps from a bucket."""
  for step in directory.iterdir() if directory.exists() else ():
    if (step / _LAST).exists():
      paths.copy(step, here / step.name)


def _upload(
  here: pathlib.Path, directory: pathlib.Path, step: int, kept: list[int]
) -> None:
  """Copies a committed step to a bucket, and removes what is not kept."""
  target = directory / str(step)
  target.rmtree(missing_ok=True)
  parts = (here / str(step)).iterdir()
  for part in sorted(parts, key=lambda part: part.name == _LAST):
    paths.copy(part, target / part.name)
  for old in directory.iterdir():
    if old.name not in map(str, kept):
      old.rmtree()


def _read_on_host(
  directory: pathlib.Path, entry: str | None = None
) -> dict[str, Any]:
  """Reads a tree, or one entry of it, as numpy; in this process alone."""
  me = jax.process_index()
  alone = {
    'multiprocessing_options': ocp.options.MultiprocessingOptions(
      primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'of_{me}'
    )
  }
  handler = ocp.PyTreeCheckpointHandler(**alone)
  with ocp.Checkpointer(handler, **alone) as checkpointer:
    found = checkpointer.metadata(directory).item_metadata
    if found is None or entry not in (None, *found.tree):
      raise ValueError('no such entry' if found else 'no metadata')
    wanted = found.tree if entry is None else {entry: found.tree[entry]}
    return checkpointer.restore(
      directory,
      args=ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
        ),
        partial_restore=True,
      ),
    )


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """Reads what `save` has written about a step; ValueError if it is damaged."""
  found = json.loads((folder / 'manifest' / 'metadata').read_text())
  if _json_digest(found['manifest']) != found['sha256']:
    raise ValueError('its manifest does not match its own hash')
  return found['manifest']


def _check_arrays(leaves: dict[str, Any], manifest: dict[str, Any]) -> None:
  """Raises ValueError unless all bytes are those that were saved."""
  for name, digest in manifest['arrays'].items():
    if trees.digest(sharding.collect(leaves[name])) != digest:
      raise ValueError(f'the bytes of {name} do not match their hash')


def _first_line(error: Exception) -> str:
  return str(error).strip().split('\n')[0] or type(error).__name__


def _from_dict(leaves: dict[str, Any], like: TrainState) -> TrainState:
  """Puts the leaves of `trees.flatten` back into the structure of `like`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: leaves[trees.path_name(path)], like
  )


def _digests(state: TrainState) -> dict[str, str]:
  return {
    name: trees.digest(sharding.collect(leaf))
    for name, leaf in trees.flatten(state).items()
  }


def _shapes(state: TrainState) -> dict[str, str]:
  """Returns dtype and shape of each array, as in 'float32(8, 2)'."""
  leaves = trees.flatten(state).items()
  return {name: f'{leaf.dtype}{tuple(leaf.shape)}' for name, leaf in leaves}


def _first_of(some: dict[str, str], others: dict[str, str]) -> str:
  """Names the first parameters of `some` that `others` has not so."""
  differ = [f'{k} {v}' for k, v in some.items() if others.get(k) != v]
  differ.sort(key=lambda text: not text.startswith('params/'))
  return f'{", ".join(differ[:2])} ({len(differ)} such)' if differ else 'less'


def _json_digest(tree: Any) -> str:
  text = json.dumps(tree, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
