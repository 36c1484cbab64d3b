"""Strict numerics, eight simulated devices, no network, clean registries."""

import os
import pathlib
import socket

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(__file__).parent.parent / '.jax_cache'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

# Compiling dominates the tests, and what they compute is tiny.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_backend_optimization_level=0'
  + ' --xla_llvm_disable_expensive_passes=true'
)

import gin
import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  """Lets a test open loopback connections only."""
  connect = socket.socket.connect

  def local_only(self, address):
    if isinstance(address, tuple) and address[0] not in ('127.0.0.1', '::1'):
      raise RuntimeError(f'a test tried to reach {address}')
    return connect(self, address)

  monkeypatch.setattr(socket.socket, 'connect', local_only)


@pytest.fixture(autouse=True)
def clean_gin():
  yield
  gin.clear_config()


@pytest.fixture
def key():
  return jax.random.key(0)


@pytest.fixture
def one_device():
  """A mesh of the first device."""
  from calm_jax import sharding

  return sharding.make_mesh(devices=jax.devices()[:1])
