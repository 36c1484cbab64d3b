"""Windows, grouped heads, soft-caps and rotary scaling, against numpy.

Run: pytest tests/models/transformer_test.py
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax import composition
from calm_jax.models import attention, layers, transformer
from calm_jax.models.config import NO_WINDOW
from tests import tiny, toys

SMALL = dataclasses.replace(tiny.ANCHOR, num_layers=2)


@functools.cache
def decoder(**changes):
  return composition.ComposedLM(
    transformer.DecoderLM(dataclasses.replace(SMALL, **changes))
  )


def logits(tokens_BT, **changes):
  model = decoder(**changes)
  return tiny.logits(model, toys.params(model), tiny.batch_of(tokens_BT))


# --- Windows -----------------------------------------------------------------


@pytest.mark.parametrize(
  ('pattern', 'reach'),
  [((1,), 1), ((2,), 3), ((1, None), 9), ((3, 1), 3)],
  ids=str,
)
def test_a_window_reaches_so_far(pattern, reach):
  """A window of w sees itself and w - 1 before; two layers, twice that."""
  tokens_BT = tiny.tokens((1, 9))
  changed_BT = tokens_BT.copy()
  changed_BT[0, 0] = (changed_BT[0, 0] + 1) % tiny.VOCAB
  before, after = (
    logits(x, window_pattern=pattern)[0] for x in (tokens_BT, changed_BT)
  )
  differs_T = np.any(before != after, axis=-1)
  assert differs_T.tolist() == [t < reach for t in range(9)]


def test_what_differs_between_layers():
  config = dataclasses.replace(
    SMALL,
    num_layers=5,
    window_pattern=[4, None],
    rope_theta=1e6,
    rope_theta_local=1e4,
    rope_scaling=layers.RopeScaling('linear', 8.0),
  )
  assert config.windows == (4, None, 4, None, 4)
  inputs = config.layer_inputs(1, 4)
  assert inputs['window'].tolist() == [NO_WINDOW, 4, NO_WINDOW]
  exponent = np.arange(0, 8, 2) / 8
  wide, local = 1e6**-exponent / 8, 1e4**-exponent
  np.testing.assert_allclose(
    inputs['frequencies'], [wide, local, wide], rtol=1e-5
  )


# --- Attention ---------------------------------------------------------------


@pytest.mark.parametrize('softcap', [None, 2.0])
def test_grouped_heads_against_numpy(softcap):
  """Query heads n G to (n + 1) G - 1 read key head n."""
  B, T, S, N, K, H = 2, 3, 4, 6, 2, 4
  rng = np.random.default_rng(0)
  query, key, value = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))
  )
  mask = rng.random((B, T, S)) < 0.6
  mask[0, 1] = False  # this query sees nothing
  mask[..., 0] |= ~mask.any(-1) & (np.arange(T) != 1)
  expected = np.zeros((B, T, N, H))
  for b, t, n in np.ndindex(B, T, N):
    scores = 0.7 * key[b, :, n // (N // K)] @ query[b, t, n]
    if softcap:
      scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores) * mask[b, t]
    if weights.any():
      weights /= weights.sum()
    expected[b, t, n] = weights @ value[b, :, n // (N // K)]
  actual = attention.attend(
    *map(jnp.asarray, (query, key, value, mask)), scale=0.7, softcap=softcap
  )
  np.testing.assert_allclose(actual, expected, atol=1e-5)
  assert not np.any(actual[0, 1])


def test_the_final_softcap():
  tokens_BT = tiny.tokens((2, 5))
  plain = logits(tokens_BT)
  capped = logits(tokens_BT, final_softcap=1.5)
  np.testing.assert_allclose(capped, 1.5 * np.tanh(plain / 1.5), atol=1e-5)
  assert np.abs(plain).max() > 1.5


# --- Rotary positions --------------------------------------------------------


def test_rope_turns_pairs_of_numbers():
  """As complex numbers: first + i second, times exp(i position frequency)."""
  rng = np.random.default_rng(0)
  x_BTNH = rng.normal(size=(2, 3, 2, 8)).astype(np.float32)
  positions_BT = np.array([[0, 1, 2], [7, 100, 3]])
  frequencies = 10_000.0 ** -(np.arange(0, 8, 2) / 8)
  turns = np.exp(1j * positions_BT[:, :, None, None] * frequencies)
  expected = (x_BTNH[..., :4] + 1j * x_BTNH[..., 4:]) * turns
  actual = layers.apply_rope(
    jnp.asarray(x_BTNH),
    jnp.asarray(positions_BT),
    layers.rope_frequencies(8, 10_000.0),
  )
  np.testing.assert_allclose(actual[..., :4], expected.real, atol=1e-4)
  np.testing.assert_allclose(actual[..., 4:], expected.imag, atol=1e-4)


def test_linear_scaling_divides_every_frequency():
  plain = layers.rope_frequencies(64, 500_000.0)
  scaled = layers.rope_frequencies(
    64, 500_000.0, layers.RopeScaling('linear', 4.0)
  )
  np.testing.assert_allclose(scaled, np.asarray(plain) / 4, rtol=1e-6)


def test_llama3_scaling_against_numpy():
  """Llama 3.1: short waves stay, long ones are divided, a ramp between."""
  plain = np.asarray(layers.rope_frequencies(128, 500_000.0), np.float64)
  expected = []
  for frequency in plain:
    waves = 8192 * frequency / (2 * math.pi)  # in the trained length
    if waves < 1:
      frequency /= 8
    elif waves < 4:
      kept = (waves - 1) / (4 - 1)
      frequency = kept * frequency + (1 - kept) * frequency / 8
    expected.append(frequency)
  scaled = layers.rope_frequencies(
    128, 500_000.0, layers.RopeScaling('llama3', 8.0)
  )
  np.testing.assert_allclose(scaled, expected, rtol=1e-5)
  kinds = {round(a / b, 3) for a, b in zip(plain, expected, strict=True)}
  assert {1.0, 8.0} < kinds


# --- Relative positions ------------------------------------------------------


@pytest.mark.parametrize('bidirectional', [False, True])
def test_buckets_of_distances_as_in_t5(bidirectional):
  """The formula of arXiv 1910.10683, section 2.1, distance by distance."""
  buckets, furthest = 12, 20
  bias = layers.RelativeBias(1, buckets, furthest, bidirectional=bidirectional)
  table = jnp.arange(buckets, dtype=jnp.float32)[:, None]
  distance = np.arange(-40, 41)
  actual = bias.apply({'params': {'table': table}}, distance[None, None])
  count = buckets // 2 if bidirectional else buckets
  expected = []
  for back in distance:
    ahead = bidirectional and back < 0
    far = abs(back) if bidirectional else max(back, 0)
    exact = count // 2
    if far >= exact:
      growth = math.log(far / exact) / math.log(furthest / exact)
      far = min(exact + int(growth * (count - exact)), count - 1)
    expected.append(far + count * ahead)
  assert np.asarray(actual)[0, 0, 0].astype(int).tolist() == expected
  assert len(set(expected)) == buckets - bidirectional  # 0 is not ahead


# --- Errors ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_heads': 3}, 'num_heads = 3 must be a multiple of num_kv_heads = 2'),
    ({'head_dim': 7}, 'head_dim = 7 must be even'),
    ({'activation': 'swish'}, "'swish' is not one of .*'silu'"),
    ({'norm_placement': 'post'}, "'post' is not one of .*'sandwich'"),
    ({'query_key_norm': 'l2'}, "'l2' is not one of"),
    ({'attention_bias': 'out'}, "'out' is not one of"),
    ({'window_pattern': (0,)}, 'it must be windows of at least 1'),
    ({'window_pattern': ()}, 'it must be windows of at least 1'),
    ({'window_pattern': (2.5,)}, 'it must be windows of at least 1'),
    ({'num_kv_heads': 0}, 'num_kv_heads = 0: it must be a whole number, at'),
    ({'num_layers': '2'}, "num_layers = '2': it must be a whole number"),
    ({'head_dim': True}, 'head_dim = True: it must be a whole number'),
    ({'tie_embeddings': 'no'}, "tie_embeddings = 'no': it must be true or f"),
    ({'rope_theta': -1}, 'rope_theta = -1: it must be a number above 0'),
    ({'final_softcap': 0}, 'final_softcap = 0: it must be a number above 0'),
    ({'attention_scale': 'x'}, "attention_scale = 'x': it must be a number"),
    ({'norm_epsilon': None}, 'norm_epsilon = None: it must be a number'),
    ({'dtype': 'foo'}, "dtype = 'foo': it must be one of"),
    ({'param_dtype': 'int8'}, "param_dtype = 'int8': it must be one of"),
  ],
)
def test_a_wrong_config_says_what_is_wrong(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SMALL, **changes)


def test_an_unknown_rope_scaling_is_an_error():
  with pytest.raises(ValueError, match="'ntk' is not one of .*'llama3'"):
    layers.RopeScaling('ntk', 4.0)
  with pytest.raises(ValueError, match='factor = -1 must be above 0'):
    layers.RopeScaling('linear', -1)


def test_dynamic_scaling_is_refused_beyond_the_trained_length():
  scaling = layers.RopeScaling('dynamic', 2.0, original_length=8)
  within = tiny.tokens((1, 8))
  np.testing.assert_array_equal(
    logits(within, rope_scaling=scaling), logits(within)
  )
  with pytest.raises(ValueError, match='9 positions is longer than the 8'):
    logits(tiny.tokens((1, 9)), rope_scaling=scaling)


def test_a_scanned_segment_cannot_be_cut():
  model = transformer.DecoderLM(SMALL, stack='scan')
  x_BTD = jnp.zeros((1, 2, 32))
  where = attention.Positions.full(
    jnp.zeros((1, 2), int), jnp.ones((1, 2), int)
  )
  with pytest.raises(ValueError, match=r'run\(0, 1\) cuts .* blocks_0_2'):
    model.apply({}, x_BTD, where, start=0, stop=1, method='run')
