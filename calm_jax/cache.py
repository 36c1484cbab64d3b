"""Caches the texts of a training run, tokenized, by SeqIO's tool on Beam.

  python -m calm_jax.cache FLAGS_OF_THE_RUN --gin_file=runs/cache.gin \\
      --gin.CACHE_DIR="'cache'"

It needs the extra `beam`, in an environment of its own: docs/data.md.
"""

from collections.abc import Callable, Sequence
from importlib import util
import os
import re
import subprocess
import sys
from typing import Any

from calm_jax.models.pretrained import ModelSpec

# What the processes of Beam are configured by; see `calm_jax.tasks.cached`.
CONFIG = 'CALM_JAX_CACHE_CONFIG'
_TOOL = 'seqio.scripts.cache_tasks_main'


def cache(
  *,
  run: Callable[..., Any],
  anchor: ModelSpec,
  mixture_or_task_name: Any,
  cache_dir: str | None,
  options: Sequence[str] = (),
  config: str | None = None,
) -> list[str]:
  """Caches every task of a mixture that is not in the cache yet.

  Args:
    run: the training that will read the cache; it is not called, but its whole
      configuration is checked with this one's.
    anchor: whose vocabulary a `Mixture` of texts is tokenized with.
    mixture_or_task_name: such a `Mixture`, or a name that SeqIO knows.
    cache_dir: where to, one folder for each task.
    options: further flags of seqio_cache_tasks, as '--min_shards=128' or
      '--pipeline_options=--runner=FlinkRunner,--flink_master=...'.
    config: the configuration as text, for the processes of Beam. Without it,
      as one of them, this only makes SeqIO know the tasks.

  Returns:
    The names of the tasks.

  Raises:
    ValueError: if a part has no text, a task cannot be cached, Beam is not
      installed, or SeqIO's tool fails, which then has told why.
  """
  from calm_jax import seqio_cache, seqio_mixtures

  del run
  if cache_dir is None:
    raise ValueError('CACHE_DIR is not set. Set it: --gin.CACHE_DIR="\'...\'".')
  name = mixture_or_task_name
  if not isinstance(name, str):
    name = seqio_mixtures.register_mixture(name, anchor.vocabulary, cached=True)
  tasks = seqio_cache.cacheable(name)
  names = [task.name for task in tasks]
  if config is None:
    return names
  if mixture_or_task_name != name:
    seqio_mixtures.check_parts(mixture_or_task_name)
  if util.find_spec('apache_beam') is None:
    raise ValueError(
      'apache-beam is not installed here. It wants an environment of its own:'
      " pip install -c constraints-beam.txt -e '.[beam]' (docs/data.md)."
    )
  command = [
    *(sys.executable, '-m', _TOOL),
    f'--tasks={",".join(map(re.escape, names))}',
    f'--output_cache_dir={os.path.expanduser(cache_dir)}',
    '--module_import=calm_jax.tasks.cached',
    '--verbosity=-1',  # else it shows examples
    *options,
  ]
  done = subprocess.run(command, env={**os.environ, CONFIG: config})
  if done.returncode:
    raise ValueError(
      f'seqio_cache_tasks ended with {done.returncode}; what it says stands'
      ' above. What was cached before stays.'
    )
  for task in tasks:
    seqio_cache.open_cache(cache_dir, [task], task.splits[0])
    print(f'cached: {seqio_cache.describe(task)}', flush=True)
  return names


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('cache')
