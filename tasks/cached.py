"""Makes SeqIO know the tasks that `calm_jax.cache` caches.

SeqIO's tool imports this in each of its processes, and in those of Beam.
"""

import os

from calm_jax import cache, gin_setup

if cache.CONFIG not in os.environ:
  raise ValueError(
    f'{cache.CONFIG} is not set: the configuration of `python -m'
    ' calm_jax.cache`, which sets it for what it starts. Hand it on to workers'
    ' that run elsewhere.'
  )
gin_setup.configure(
  'cache', gin_files=[], bindings=[os.environ[cache.CONFIG]]
)()
