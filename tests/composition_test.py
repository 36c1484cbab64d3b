"""The invariants of composed models. Run: pytest tests/composition_test.py

Numbers are those of docs/design.md, "Invariants".
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax import composition, connections, cross_attention
from calm_jax.models import stacking
from tests import tiny, toys

DTYPES = ['float32', 'bfloat16']
STACKS = ['loop', 'scan']


def with_random_output(params, seed=5):
  """Makes a zero-initialised composition speak."""

  def one(path, leaf):
    if path[-2].key != 'out':
      return leaf
    return 0.3 * jax.random.normal(jax.random.key(seed), leaf.shape, leaf.dtype)

  theta = jax.tree_util.tree_map_with_path(one, params['composition'])
  return {**params, 'composition': theta}


# --- 1. Identity at initialisation -------------------------------------------


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('stack', STACKS)
def test_composed_is_the_anchor_at_step_0(dtype, stack):
  model = tiny.composed(
    anchor=tiny.with_dtype(tiny.ANCHOR, dtype),
    augmenting={'code': tiny.with_dtype(tiny.AUGMENTING, dtype)},
    output_init='zeros',
    stack=stack,
  )
  params = tiny.init(model)
  batch = tiny.batch_of(tiny.tokens((3, 11)))
  alone = composition.ComposedLM(model.anchor)
  # The same cuts, so that scanned parameters are the same tree.
  alone.anchor = model.anchor
  expected = tiny.logits(alone, {'anchor': params['anchor']}, batch)
  np.testing.assert_array_equal(tiny.logits(model, params, batch), expected)
  trained = with_random_output(params)
  assert np.any(tiny.logits(model, trained, batch) != expected)


@pytest.mark.parametrize(
  ('family', 'dtype'),
  [(name, 'float32') for name in tiny.FAMILIES] + [('gemma', 'bfloat16')],
)
def test_families_mixed_begin_as_the_anchor(family, dtype):
  """Each family as anchor of another and of an encoder, and the other way."""
  names = [*tiny.FAMILIES]
  at = names.index(family)
  chosen = [names[(at + 4) % len(names)], [*tiny.ENCODERS][at % 2]]
  switches = {**tiny.FAMILIES, **tiny.ENCODERS}

  def config(base, name):
    base = dataclasses.replace(tiny.with_dtype(base, dtype), num_layers=1)
    return dataclasses.replace(base, **switches[name])

  model = tiny.composed(
    anchor=config(tiny.ANCHOR, family),
    augmenting={name: config(tiny.AUGMENTING, name) for name in chosen},
    mapping=[
      tiny.connection(at, 0, name) for at, name in enumerate(chosen, -1)
    ],
    output_init='zeros',
  )
  params = toys.params(model, zero_output=True)
  batch = tiny.batch_of(tiny.tokens((2, 9)))
  alone = composition.ComposedLM(model.anchor)
  expected = tiny.logits(alone, {'anchor': params['anchor']}, batch)
  own = tiny.batch_of(tiny.tokens((2, 5), seed=1))  # of the encoder
  for key in ('input_tokens', 'positions', 'segment_ids'):
    batch[f'{chosen[1]}_{key}'] = own[f'decoder_{key}']
  batch[f'{chosen[1]}_visible_from'] = np.full((2, 5), 4, np.int32)
  run = jax.jit(model.__call__)
  np.testing.assert_array_equal(run(params, batch), expected)
  speaking = with_random_output(params)['composition']
  for key in speaking:  # each one is heard
    theta = {**params['composition'], key: speaking[key]}
    assert np.any(run({**params, 'composition': theta}, batch) != expected)


def test_paper_setting_is_not_the_anchor_at_step_0():
  model = tiny.composed(norm='none', output_init='fan_in')
  params = toys.params(model)
  batch = tiny.batch_of(tiny.tokens((3, 11)))
  alone = composition.ComposedLM(model.anchor)
  expected = tiny.logits(alone, {'anchor': params['anchor']}, batch)
  assert np.any(tiny.logits(model, params, batch) != expected)
  assert 'query_norm' not in params['composition']['code_1_into_1']


# --- 2. Causality and isolation of segments ----------------------------------


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('position_encoding', ['rotary', 'none'])
def test_changing_a_token_changes_nothing_before_it(dtype, position_encoding):
  model = tiny.composed(
    anchor=tiny.with_dtype(tiny.ANCHOR, dtype),
    augmenting={'code': tiny.with_dtype(tiny.AUGMENTING, dtype)},
    position_encoding=position_encoding,
  )
  params = toys.params(model)
  tokens_BT = tiny.tokens((2, 12))
  before = tiny.logits(model, params, tiny.batch_of(tokens_BT))
  for t in (0, 5, 11):
    changed_BT = tokens_BT.copy()
    changed_BT[:, t] = (changed_BT[:, t] + 1) % tiny.VOCAB
    after = tiny.logits(model, params, tiny.batch_of(changed_BT))
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert np.all(np.any(after[:, t:] != before[:, t:], axis=-1))


@pytest.mark.parametrize('dtype', DTYPES)
def test_only_the_composition_sees_a_changed_augmenting_token(dtype):
  """Feeds the augmenting model tokens of its own: the cross mask alone."""
  model = tiny.composed(
    anchor=tiny.with_dtype(tiny.ANCHOR, dtype),
    augmenting={'code': tiny.with_dtype(tiny.AUGMENTING, dtype)},
  )
  params = toys.params(model)
  batch = tiny.batch_of(tiny.tokens((2, 8)))
  own = tiny.batch_of(tiny.tokens((2, 6), seed=1))
  batch |= {
    'augmenting_input_tokens': own['decoder_input_tokens'],
    'augmenting_positions': own['decoder_positions'],
    'augmenting_segment_ids': own['decoder_segment_ids'],
    # Six augmenting tokens, read from these anchor positions on.
    'augmenting_visible_from': np.array([[0, 0, 2, 5, 5, 7]] * 2, np.int32),
  }
  before = tiny.logits(model, params, batch)
  for s, first_reader in enumerate([0, 0, 2, 5, 5, 7]):
    changed = batch['augmenting_input_tokens'].copy()
    changed[:, s] = (changed[:, s] + 1) % tiny.VOCAB
    after = tiny.logits(
      model, params, {**batch, 'augmenting_input_tokens': changed}
    )
    # Positions before `first_reader` may read nothing at or after s.
    np.testing.assert_array_equal(
      after[:, :first_reader], before[:, :first_reader]
    )
    assert np.any(after[:, first_reader:] != before[:, first_reader:])


@pytest.mark.parametrize('dtype', DTYPES)
def test_segments_do_not_see_each_other(dtype):
  model = tiny.composed(
    anchor=tiny.with_dtype(tiny.ANCHOR, dtype),
    augmenting={'code': tiny.with_dtype(tiny.AUGMENTING, dtype)},
  )
  params = toys.params(model)
  segments = np.array([[1] * 5 + [2] * 4 + [3] * 2 + [0]] * 2)
  tokens_BT = tiny.tokens((2, 12))
  before = tiny.logits(model, params, tiny.batch_of(tokens_BT, segments))
  changed_BT = tokens_BT.copy()
  changed_BT[:, 6] = (changed_BT[:, 6] + 1) % tiny.VOCAB  # in segment 2
  after = tiny.logits(model, params, tiny.batch_of(changed_BT, segments))
  other = np.r_[0:6, 9:12]
  np.testing.assert_array_equal(after[:, other], before[:, other])
  assert np.all(np.any(after[:, 6:9] != before[:, 6:9], axis=-1))


# --- 3. Padding and packing --------------------------------------------------


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_padding_and_packing_change_no_real_logit(family):
  anchor = dataclasses.replace(tiny.ANCHOR, **tiny.FAMILIES[family])
  model = tiny.composed(anchor=anchor)
  params = toys.params(model)
  first, second = tiny.tokens((1, 7)), tiny.tokens((1, 5), seed=1)
  alone = [
    tiny.logits(model, params, tiny.batch_of(x))[0] for x in (first, second)
  ]
  junk = tiny.tokens((1, 4), seed=2)
  right = tiny.batch_of(np.concatenate([first, junk], 1), [[1] * 7 + [0] * 4])
  left = tiny.batch_of(np.concatenate([junk, first], 1), [[0] * 4 + [1] * 7])
  packed = tiny.batch_of(
    np.concatenate([first, second, junk], 1), [[1] * 7 + [2] * 5 + [0] * 4]
  )
  tiny.assert_close(tiny.logits(model, params, right)[0, :7], alone[0])
  tiny.assert_close(tiny.logits(model, params, left)[0, 4:], alone[0])
  both = tiny.logits(model, params, packed)[0]
  tiny.assert_close(both[:7], alone[0])
  tiny.assert_close(both[7:12], alone[1])


# --- 4. Prefill and decode steps ---------------------------------------------


# Scanning changes how layers are fed, not what they compute: two families do.
@pytest.mark.parametrize(
  ('family', 'stack'),
  [(name, 'loop') for name in tiny.FAMILIES]
  + [('gemma3', 'scan'), ('qwen2', 'scan')],
)
def test_prefill_and_decode_equal_the_full_forward(family, stack):
  anchor = dataclasses.replace(tiny.ANCHOR, **tiny.FAMILIES[family])
  model = tiny.composed(anchor=anchor, stack=stack)
  params = toys.params(model)
  tokens_BT = tiny.tokens((3, 13))
  full = tiny.logits(model, params, tiny.batch_of(tokens_BT))
  lengths_B = np.array([4, 7, 2])  # prompts of unequal length, padded right
  prompt_BT = np.where(np.arange(7) < lengths_B[:, None], tokens_BT[:, :7], 9)
  extend = jax.jit(model.extend)
  cache = model.empty_cache(batch=3, slots=16)
  positions_BT = np.broadcast_to(np.arange(7), (3, 7))
  logits_B1V, cache = extend(
    params, prompt_BT, positions_BT, cache, logits_at_BM=lengths_B[:, None] - 1
  )
  rows = np.arange(3)
  tiny.assert_close(logits_B1V[:, 0], full[rows, lengths_B - 1])
  for step in range(6):
    at_B = lengths_B + step
    logits_B1V, cache = extend(
      params, tokens_BT[rows, at_B][:, None], at_B[:, None], cache
    )
    tiny.assert_close(logits_B1V[:, 0], full[rows, at_B])


# --- 6. The order of connections ---------------------------------------------


def test_order_of_connections_changes_nothing():
  mapping = [
    tiny.connection(1, 3),
    tiny.connection(1, 0),
    tiny.connection(1, 2, 'math'),
    tiny.connection(4, 1, 'math'),
  ]
  augmenting = {'code': tiny.AUGMENTING, 'math': tiny.AUGMENTING}
  backwards = dict(reversed(augmenting.items()))
  one = tiny.composed(mapping=mapping, augmenting=augmenting)
  two = tiny.composed(mapping=mapping[::-1], augmenting=backwards)
  batch = tiny.batch_of(tiny.tokens((2, 9)))
  params = tiny.init(one)
  jax.tree.map(np.testing.assert_array_equal, params, tiny.init(two))
  np.testing.assert_array_equal(
    tiny.logits(one, params, batch), tiny.logits(two, params, batch)
  )


# --- Further -----------------------------------------------------------------


def test_scanned_and_looped_stacks_agree():
  loop, scan = tiny.composed(), tiny.composed(stack='scan')
  params = toys.params(loop)
  restacked = {
    'anchor': stacking.restack(
      params['anchor'], source=loop.anchor, target=scan.anchor
    ),
    'augmenting': {
      'code': stacking.restack(
        params['augmenting']['code'],
        source=loop.augmenting['code'],
        target=scan.augmenting['code'],
      )
    },
    'composition': params['composition'],
  }
  shapes = jax.eval_shape(lambda: tiny.init(scan))
  jax.tree.map(
    lambda x, y: np.testing.assert_equal(x.shape, y.shape), restacked, shapes
  )
  batch = tiny.batch_of(tiny.tokens((2, 9)))
  tiny.assert_close(
    tiny.logits(scan, restacked, batch), tiny.logits(loop, params, batch)
  )
  back = stacking.restack(
    restacked['anchor'], source=scan.anchor, target=loop.anchor
  )
  jax.tree.map(np.testing.assert_array_equal, back, params['anchor'])


def test_cross_attention_is_the_papers_formula():
  """A 10-line numpy version of section 3.1 in the `paper` setting."""
  D, E, N, T, S = 8, 6, 2, 4, 5
  module = cross_attention.CrossAttention(
    embed_dim=D,
    num_heads=N,
    config=connections.CompositionConfig(
      mapping=connections.LayerMapping.every(),
      norm='none',
      output_init='fan_in',
      position_encoding='none',
    ),
  )
  rng = np.random.default_rng(0)
  h_B, h_A = rng.normal(size=(T, D)), rng.normal(size=(S, E))
  mask = np.tril(np.ones((T, S), bool))
  variables = module.init(
    jax.random.key(0), jnp.asarray(h_B[None]), jnp.asarray(h_A[None])
  )
  import flax.linen as nn

  theta = nn.unbox(variables)['params']
  w = {name: np.asarray(value['kernel']) for name, value in theta.items()}
  source = h_A @ w['projection']
  heads = []
  for n in range(N):
    part = slice(n * D // N, (n + 1) * D // N)
    q, k, v = (
      h_B @ w['query'][:, part],
      source @ w['key'][:, part],
      source @ w['value'][:, part],
    )
    scores = np.where(mask, q @ k.T / np.sqrt(D // N), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    heads.append(weights / weights.sum(-1, keepdims=True) @ v)
  expected = np.concatenate(heads, -1) @ w['out']
  read = module.apply(
    variables, jnp.asarray(h_A[None]), jnp.zeros((1, S), int), method='read'
  )
  actual = module.apply(
    variables,
    jnp.asarray(h_B[None]),
    read,
    positions_BT=jnp.zeros((1, T), int),
    mask_BTS=jnp.asarray(mask[None]),
    method='attend',
  )
  np.testing.assert_allclose(actual[0], expected, atol=1e-5)


def test_augmenting_models_run_to_their_last_tap_only():
  """Weights above the last tap, and the final norm, are never read."""
  model = tiny.composed(mapping=[tiny.connection(2, 1)])
  params = toys.params(model)
  batch = tiny.batch_of(tiny.tokens((2, 6)))
  expected = tiny.logits(model, params, batch)
  tower = dict(params['augmenting']['code'])
  for name in ('block_2', 'block_3', 'final_norm'):
    tower[name] = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tower[name])
  broken = {**params, 'augmenting': {'code': tower}}
  np.testing.assert_array_equal(tiny.logits(model, broken, batch), expected)


def test_gates_start_at_their_bias():
  model = tiny.composed(gate='sigmoid', gate_bias=-3.0)
  theta = nn.unbox(model.init_composition(jax.random.key(0)))
  for one in theta.values():
    np.testing.assert_array_equal(one['gate']['bias'], -3.0)
  with pytest.raises(ValueError, match="no effect with gate = 'none'"):
    tiny.composed(gate='none', gate_bias=-3.0)


def test_a_closed_gate_leaves_the_anchor_alone():
  model = tiny.composed(gate='sigmoid')
  params = toys.params(model)
  batch = tiny.batch_of(tiny.tokens((2, 6)))
  alone = tiny.logits(
    composition.ComposedLM(model.anchor), {'anchor': params['anchor']}, batch
  )
  assert np.abs(tiny.logits(model, params, batch) - alone).max() > 1e-2
  theta = {
    key: {
      **one,
      'gate': jax.tree.map(lambda x: jnp.full_like(x, -1e4), one['gate']),
    }
    for key, one in params['composition'].items()
  }
  for one in theta.values():  # the bias alone decides
    one['gate']['kernel'] = jnp.zeros_like(one['gate']['kernel'])
  closed = tiny.logits(model, {**params, 'composition': theta}, batch)
  np.testing.assert_allclose(closed, alone, atol=1e-6)
