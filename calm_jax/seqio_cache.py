"""Tasks that SeqIO's tool has cached: whether they are there, and whole."""

from collections.abc import Sequence
import json
import os

import seqio
import tensorflow as tf


def cacheable(mixture_or_task_name: str) -> list[seqio.Task]:
  """Returns the tasks of a mixture.

  Raises:
    ValueError: if one of them cannot be cached.
  """
  provider = seqio.get_mixture_or_task(mixture_or_task_name)
  tasks = list(seqio.get_subtasks(provider))
  for task in tasks:
    if not task.supports_caching:
      raise ValueError(
        f'The task {task.name!r} cannot be cached: none of its preprocessors is'
        ' a seqio.CacheDatasetPlaceholder(). Put one after those whose work is'
        ' to be kept, or read it without CACHE_DIR.'
      )
  return tasks


def open_cache(cache_dir: str, tasks: Sequence[seqio.Task], split: str) -> None:
  """Lets SeqIO read tasks from a cache.

  Args:
    cache_dir: what SeqIO's tool was given as output_cache_dir.
    tasks: that are to be there.
    split: one that all have.

  Raises:
    ValueError: if one of them is not there, or not whole.
  """
  cache_dir = os.path.expanduser(cache_dir)
  seqio.add_global_cache_dirs([cache_dir])
  for task in tasks:
    folder = os.path.join(cache_dir, seqio.get_task_dir_from_name(task.name))
    if task.cache_dir != folder:
      raise ValueError(
        f'The task {task.name!r} is not cached in {folder}, whole and of this'
        f' text and vocabulary (SeqIO finds it in {task.cache_dir}). Cache it:'
        ' python -m calm_jax.cache, with the flags of this run and'
        ' --gin_file=runs/cache.gin.'
      )
    shards, expected = _files(task, split), _info(task, split)['num_shards']
    if len(shards) != expected:
      raise ValueError(
        f'The cache {folder} has {len(shards)} of the {expected} shards of the'
        f' split {split!r}. Copy it again, or remove it and cache it again.'
      )


def check_streams(
  tasks: Sequence[seqio.Task], split: str, *, streams: int, cached: bool
) -> None:
  """Raises ValueError unless each stream has as many shards as the others."""
  for task in tasks if streams > 1 else ():
    shards = _files(task, split) if cached else task.source.list_shards(split)
    if len(shards) % streams:
      what = 'Its cache' if cached else 'Its source'
      raise ValueError(
        f'{task.name!r} cannot be read in streams = {streams}. {what} has'
        f' {len(shards)} shards; choose a divisor of that, or cache the task'
        ' in more (--min_shards).'
      )


def describe(task: seqio.Task) -> str:
  """Says in a line what the cache of a task holds."""
  found = []
  for split in task.splits:
    stats = task.get_cached_stats(split)
    numbers = ', '.join(f'{stats[name]:,} {name}' for name in sorted(stats))
    found.append(f'{split}: {numbers} in {len(_files(task, split))} shards')
  return f'{task.name}: {"; ".join(found)}'


def _files(task: seqio.Task, split: str) -> list[str]:
  prefix = seqio.get_cached_tfrecord_prefix(task.cache_dir, split)
  return tf.io.gfile.glob(f'{prefix}-*-of-*')


def _info(task: seqio.Task, split: str) -> dict:
  path = seqio.get_cached_info_path(task.cache_dir, split)
  with tf.io.gfile.GFile(path) as file:
    return json.load(file)
