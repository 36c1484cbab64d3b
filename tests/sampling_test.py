"""Which token is drawn. Run: pytest tests/sampling_test.py"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax import sampling
from calm_jax.sampling import DecodingConfig

LOGITS = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 3


@pytest.mark.convert
@pytest.mark.parametrize('top_k', [None, 1, 7, 100])
@pytest.mark.parametrize('top_p', [0.1, 0.5, 0.9, 0.999, 1.0])
def test_what_can_be_drawn_is_what_transformers_keeps(top_k, top_p):
  torch = pytest.importorskip('torch')
  logits_process = pytest.importorskip('transformers.generation.logits_process')
  kept = torch.tensor(LOGITS)
  if top_k is not None:
    kept = logits_process.TopKLogitsWarper(top_k)(None, kept)
  if top_p < 1:
    kept = logits_process.TopPLogitsWarper(top_p)(None, kept)
  kept = kept.numpy()
  config = DecodingConfig(temperature=1.0, top_k=top_k, top_p=top_p)
  ours = sampling._likeliest(jnp.asarray(LOGITS), config)
  np.testing.assert_array_equal(ours > -1e29, np.isfinite(kept))
  np.testing.assert_array_equal(
    np.where(ours > -1e29, ours, 0), np.where(kept > -1e29, kept, 0)
  )


@pytest.mark.parametrize('top_p', [1e-50, 1e-45, 1e-9])
def test_however_small_top_p_is_the_likeliest_stays(top_p):
  config = DecodingConfig(temperature=1.0, top_p=top_p)
  ours = np.asarray(sampling._likeliest(jnp.asarray(LOGITS), config))
  np.testing.assert_array_equal((ours > -1e29).sum(-1), 1)
  np.testing.assert_array_equal(ours.argmax(-1), LOGITS.argmax(-1))


def test_frequencies_are_the_softmax_of_logits_over_temperature():
  logits_V = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
  config = DecodingConfig(temperature=2.0)
  count = 20_000
  drawn = sampling.choose(
    jnp.broadcast_to(logits_V, (count, 4)),
    jnp.arange(count, dtype=jnp.uint32),
    jnp.int32(3),
    config,
  )
  expected = np.exp(logits_V / 2) / np.exp(logits_V / 2).sum()
  found = np.bincount(drawn, minlength=4) / count
  error = np.sqrt(expected * (1 - expected) / count)
  assert np.all(np.abs(found - expected) < 4 * error)


def test_seeds_and_steps_differ():
  logits_BV = jnp.zeros((64, 1000))
  config = DecodingConfig(temperature=1.0)
  seeds_B = jnp.arange(64, dtype=jnp.uint32)
  draw = jax.jit(
    lambda seeds, step: sampling.choose(logits_BV, seeds, step, config)
  )
  first, second = draw(seeds_B, 0), draw(seeds_B, 1)
  assert len(set(np.asarray(first).tolist())) > 50
  assert np.mean(first == second) < 0.1
  np.testing.assert_array_equal(draw(seeds_B[::-1], 0), first[::-1])
  other = sampling.choose(
    logits_BV, seeds_B, 0, DecodingConfig(temperature=1.0, seed=1)
  )
  assert np.mean(first == other) < 0.1


def test_nothing_that_is_masked_is_drawn_however_cold():
  logits_BV = jnp.array([[-20.0, -21.0, -22.0, -30.0]])
  config = DecodingConfig(temperature=1e-29, top_k=1)
  (chosen,) = sampling.choose(logits_BV, jnp.zeros(1, jnp.uint32), 0, config)
  assert int(chosen) == 0


def test_without_temperature_the_likeliest_is_taken():
  chosen = sampling.choose(
    jnp.asarray(LOGITS), jnp.zeros(5, jnp.uint32), 0, DecodingConfig()
  )
  np.testing.assert_array_equal(chosen, LOGITS.argmax(-1))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'temperature': -1.0},
      'temperature = -1.0: it must be at least 1e-30, or',
    ),
    ({'temperature': 1e-40}, 'temperature = 1e-40: it must be at least 1e-30'),
    ({'temperature': float('nan')}, 'temperature = nan'),
    ({'num_samples': 2.0}, 'num_samples = 2.0: it must be a whole number'),
    ({'seed': 1.5}, 'seed = 1.5: it must be a whole number'),
    ({'temperature': 1.0, 'top_k': 1.5}, 'top_k = 1.5: it must be a whole n'),
    ({'temperature': 1.0, 'top_k': 0}, 'top_k = 0: it must be at least 1, or'),
    ({'temperature': 1.0, 'top_p': 0.0}, 'top_p = 0.0: it must be above 0'),
    ({'temperature': 1.0, 'top_p': 1.5}, 'top_p = 1.5'),
    ({'num_beams': 2, 'length_penalty': float('nan')}, 'nan: it must be fini'),
    ({'num_samples': 0}, 'num_samples = 0: it must be at least 1'),
    ({'num_samples': 2}, 'all samples are the likeliest'),
    ({'top_k': 5}, 'Set a temperature, such as 0.8'),
    ({'top_p': 0.9}, 'Set a temperature, such as 0.8'),
    ({'num_beams': 2, 'temperature': 1.0}, 'beam search draws nothing'),
    ({'num_beams': 2, 'num_samples': 3}, 'at most num_beams continuations'),
  ],
)
def test_settings_that_cannot_be_meant(fields, message):
  with pytest.raises(ValueError, match=message):
    DecodingConfig(**fields)
