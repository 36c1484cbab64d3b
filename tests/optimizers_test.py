"""Optimizers: schedules, slots, clipping, weight decay.

Run: pytest tests/optimizers_test.py
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax import optimizers, train_state, trees

NAMES = ['adamw', 'adafactor', 'muon']
RNG = np.random.default_rng(0)
PARAMS = {
  'composition': {
    'code_1_into_1': {
      'out': {'kernel': RNG.normal(size=(6, 8)).astype(np.float32)},
      'query_norm': {'scale': np.ones(6, np.float32)},
      'table': RNG.normal(size=(5, 6)).astype(np.float32),
    }
  }
}
KERNEL = 'composition/code_1_into_1/out/kernel'
SCALE = 'composition/code_1_into_1/query_norm/scale'


def config(name='adamw', **settings):
  settings = {'learning_rate': 0.01, 'warmup_steps': 0, **settings}
  return optimizers.OptimizerConfig(name=name, **settings)


@functools.cache
def compiled(one_config):
  update = one_config.make(1000)

  @jax.jit
  def run(gradients):
    state = train_state.create(PARAMS, update, seed=0)
    updates, slots = update.update(gradients, state.opt_state, state.params)
    return updates, slots

  return run


def one_update(one_config, gradients):
  updates, slots = compiled(one_config)(gradients)
  return trees.flatten(updates), trees.flatten(slots)


def full(value):
  return jax.tree.map(lambda x: jnp.full(x.shape, value), PARAMS)


@pytest.mark.parametrize('name', NAMES)
def test_slots_are_those_of_the_trained_parameters(name):
  state = jax.eval_shape(
    lambda: train_state.create(PARAMS, config(name).make(10), seed=0)
  )
  trained = trees.flatten(state.params)
  slots = {
    slot: leaf.shape
    for slot, leaf in trees.flatten(state.opt_state).items()
    if leaf.shape and not slot.endswith('ns_coeffs')  # constants of Muon
  }
  assert slots
  for slot in slots:
    assert any(slot.endswith(f'/{param}') for param in trained), slot
  sizes = {
    param: sum(
      math.prod(shape)
      for slot, shape in slots.items()
      if slot.endswith(param) and shape != (1,)  # Adafactor's placeholders
    )
    for param in trained
  }
  per_element = {'adamw': 2, 'adafactor': 1, 'muon': 2}[name]
  expected = {p: per_element * math.prod(x.shape) for p, x in trained.items()}
  if name == 'muon':  # one momentum for a kernel, AdamW's two for the rest
    expected[KERNEL] //= 2
  assert sizes == expected


def test_adafactor_factors_large_matrices():
  shapes = {'kernel': jax.ShapeDtypeStruct((256, 384), jnp.float32)}
  slots = jax.eval_shape(config('adafactor').make(10).init, shapes)
  assert trees.num_params(slots) < 3 * (256 + 384)


@pytest.mark.parametrize('name', NAMES)
def test_one_step_goes_against_the_gradient(name):
  gradients = jax.tree.map(
    lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), PARAMS
  )
  updates, _ = one_update(config(name, muon_learning_rate=0.02), gradients)
  given = trees.flatten(gradients)
  for param, update in updates.items():
    assert np.all(np.isfinite(update))
    assert float(np.sum(update * given[param])) < 0, param
    if name != 'muon':  # a sign, times the learning rate
      sign = np.sign(given[param])
      np.testing.assert_allclose(update, -0.01 * sign, rtol=0.01)
  if name == 'muon':  # an orthogonal matrix
    scales = np.linalg.svd(updates[KERNEL], compute_uv=False)
    assert scales.max() / scales.min() < 2


@pytest.mark.parametrize('name', NAMES)
def test_weight_decay_is_decoupled_and_for_matrices_only(name):
  """Without a gradient, a kernel shrinks by learning rate x decay."""
  decayed = config(name, weight_decay=0.5, muon_learning_rate=0.01)
  updates, _ = one_update(decayed, full(0.0))
  kernel = trees.flatten(PARAMS)[KERNEL]
  np.testing.assert_allclose(updates[KERNEL], -0.01 * 0.5 * kernel, rtol=1e-4)
  np.testing.assert_array_equal(updates[SCALE], 0.0)


def test_clipping_is_by_the_norm_of_all_trained_gradients():
  size = trees.num_params(PARAMS)
  for norm, expected in ((10.0, 1.0), (0.5, 0.5)):
    _, slots = one_update(config(), full(norm / math.sqrt(size)))
    means = [slot for name, slot in slots.items() if '/mu/' in name]
    total = math.sqrt(sum(float(np.sum(np.square(x))) for x in means))
    assert total == pytest.approx((1 - 0.9) * expected, rel=1e-5)
  _, slots = one_update(config(clip_norm=None), full(10.0))
  name = next(name for name in slots if '/mu/' in name)
  np.testing.assert_allclose(slots[name], 1.0, rtol=1e-6)


def test_schedule():
  schedule = config(
    learning_rate=0.4, warmup_steps=10, final_fraction=0.1
  ).schedule(110)
  values = [float(schedule(step)) for step in (0, 5, 10, 60, 110, 200)]
  # Half way, the cosine is at the mean of its ends, 0.4 and 0.04.
  assert values == pytest.approx([0.0, 0.2, 0.4, 0.22, 0.04, 0.04], abs=1e-6)
  # A warm-up longer than the run ends with it.
  short = config(warmup_steps=100).schedule(5)
  assert float(short(4)) == pytest.approx(0.01)
  assert float(config(warmup_steps=100).schedule(1)(0)) == pytest.approx(0.01)


def test_an_unknown_optimizer_is_named():
  with pytest.raises(ValueError, match=r"'sgd' is not one of .*'adafactor'"):
    config('sgd')
