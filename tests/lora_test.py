"""LoRA on the anchor, the baseline. Run: pytest tests/lora_test.py"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from calm_jax import (
  api,
  assembly,
  composition,
  convert,
  evaluate,
  lora,
  optimizers,
  train_state,
  train_step,
  trees,
)
from calm_jax.models import pretrained, stacking, transformer, weights
from tests import tiny, toys, train_test

BATCH = tiny.batch_of(tiny.tokens((2, 7)))
CONFIG = lora.LoraConfig(rank=3, alpha=6.0)
donors, decoder_run = train_test.donors, train_test.decoder_run


def with_lora(config=CONFIG, anchor=tiny.ANCHOR, stack='loop'):
  return composition.ComposedLM(
    transformer.DecoderLM(anchor, stack=stack), lora=config
  )


MODEL = with_lora()
ALONE = composition.ComposedLM(MODEL.anchor)


def fresh(model, seed=0):
  return {
    'anchor': toys.params(ALONE)['anchor'],
    'lora': tiny.nn.unbox(
      lora.init(jax.random.key(seed), model.anchor, model.lora)
    ),
  }


def drawn(model, seed=0):
  """With B at random too, so that the updates are felt."""
  params = fresh(model)
  rng = np.random.default_rng(seed)
  one = lambda x: np.float32(0.3 * rng.normal(size=x.shape))
  return {**params, 'lora': jax.tree.map(one, params['lora'])}


def test_it_begins_as_the_anchor():
  params = fresh(MODEL)
  np.testing.assert_array_equal(
    tiny.logits(MODEL, params, BATCH), tiny.logits(ALONE, params, BATCH)
  )
  assert set(params['lora']) == {f'block_{i}' for i in range(5)}
  a = params['lora']['block_2']['mlp']['down']['a']
  assert a.shape == (48, 3)
  assert 0.7 < np.std(a) * 48**0.5 < 1.3


def merged(model, params):
  tensors = jax.tree.map(weights.of_array, params['anchor'])
  found = lora.merge(trees.flatten(tensors), params['lora'], model.lora)
  return {
    'anchor': trees.unflatten({k: one.read() for k, one in found.items()})
  }


def test_updates_are_those_of_merged_weights():
  """W + (alpha / r) A B, of the targets and of nothing else."""
  params = drawn(MODEL)
  expected = tiny.logits(ALONE, merged(MODEL, params), BATCH)
  actual = tiny.logits(MODEL, params, BATCH)
  tiny.assert_close(actual, expected)
  assert np.abs(expected - tiny.logits(ALONE, params, BATCH)).max() > 0.1
  some = with_lora(lora.LoraConfig(rank=2, targets=('query', 'up')))
  names = {name.split('/')[2] for name in trees.flatten(fresh(some)['lora'])}
  assert names == {'query', 'up'}
  assert some.lora.scale == 1.0


def test_scanned_stacks_are_the_same():
  scanned = with_lora(stack='scan')
  params = drawn(MODEL)
  stacked = {
    key: stacking.restack(
      one, source=MODEL.anchor, target=scanned.anchor, stack=np.stack
    )
    for key, one in params.items()
  }
  tiny.assert_close(
    tiny.logits(scanned, stacked, BATCH), tiny.logits(MODEL, params, BATCH)
  )


@pytest.mark.parametrize('stack', ['loop', 'scan'])
def test_chunks_and_remat_leave_the_gradient_as_it_is(stack):
  model = with_lora(stack=stack)
  again = composition.ComposedLM(model.anchor, lora=CONFIG, remat=True)
  assert again.anchor.remat_from == 0
  params = drawn(MODEL)
  if stack == 'scan':
    params = {
      key: stacking.restack(
        one, source=MODEL.anchor, target=model.anchor, stack=np.stack
      )
      for key, one in params.items()
    }
  theta, frozen = {'lora': params['lora']}, {'anchor': params['anchor']}
  found = []
  for one, chunk in ((model, None), (again, 3)):
    loss = functools.partial(train_step.loss_fn, model=one, loss_chunk=chunk)
    found.append(jax.jit(jax.grad(loss, has_aux=True))(theta, frozen, BATCH)[0])
  largest = max(np.abs(g).max() for g in jax.tree.leaves(found[0]))
  assert largest > 0
  for one, other in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * largest)


def test_only_the_updates_are_trained():
  optimizer = optimizers.OptimizerConfig(learning_rate=0.01).make(10)
  params = fresh(MODEL)
  state = train_state.create(
    {'lora': params['lora']}, optimizer=optimizer, seed=0
  )
  frozen = {'anchor': params['anchor']}
  step = jax.jit(train_step.make_train_step(MODEL, optimizer))
  losses = []
  for _ in range(8):
    state, measured = step(state, frozen, BATCH)
    losses.append(float(measured['loss']))
  alone = tiny.logits(ALONE, params, BATCH)
  assert losses[-1] < losses[0]
  assert set(state.params) == {'lora'}
  np.testing.assert_array_equal(tiny.logits(ALONE, frozen, BATCH), alone)


def test_the_rank_matches_the_composition():
  composed = tiny.composed()
  count = trees.num_params(
    jax.eval_shape(composed.init_composition, jax.random.key(0))
  )
  config = lora.match(lora.LoraConfig(), MODEL.anchor, count)
  shapes = jax.eval_shape(
    lambda key: lora.init(key, MODEL.anchor, config), jax.random.key(0)
  )
  one = trees.num_params(shapes) / config.rank
  assert abs(trees.num_params(shapes) - count) <= one / 2
  assert config.rank > 1


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'rank': 0}, 'LoraConfig.rank = 0: it must be at least 1'),
    ({'targets': ('query', 'head')}, "targets = .* choose from \\('query', "),
    ({'targets': ()}, 'targets = '),
  ],
)
def test_wrong_settings_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    lora.LoraConfig(**fields)


def test_what_can_be_trained():
  spec = pretrained.ModelSpec(
    config=tiny.ANCHOR, vocabulary=toys.vocabulary(tiny.VOCAB)
  )
  settings = {
    'augmenting': {},
    'composition': None,
    'stack': 'loop',
    'remat': False,
  }
  build = lambda trainable, **more: assembly.build_trained(
    trainable, spec, **{**settings, 'lora': None, **more}
  )
  with pytest.raises(ValueError, match='LoraConfig.rank is not set, and no co'):
    build('lora')
  with pytest.raises(ValueError, match="trainable = 'all' is not one of"):
    build('all')
  with pytest.raises(ValueError, match="trainable = 'composition', and there"):
    build('composition')
  model, augmenting = build('lora', lora=CONFIG)
  assert (model.lora, augmenting) == (CONFIG, {})


# --- Whole runs --------------------------------------------------------------


@pytest.mark.entry
@pytest.mark.slow
def test_a_run_with_lora_and_the_same_with_all_of_the_anchor(donors, tmp_path):
  """By one setting each, on the experiment of a composition."""
  updates, whole = tmp_path / 'lora', tmp_path / 'whole'
  rank = {'lora': lora.LoraConfig(), 'trainable': 'lora', 'stack': 'scan'}
  train_test.run(updates, donors, **rank)
  rows = train_test.metrics_of(updates)
  # The rest of it: a second call continues.
  train_test.run(updates, donors, **rank, train_steps=8)
  assert train_test.metrics_of(updates)[: len(rows) - 1] == rows[:-1]
  config = json.loads((updates / 'calm_config.json').read_text())
  assert set(config) == {'lora', 'fingerprints'}
  assert not (updates / 'composition.safetensors').exists()
  with pytest.raises(ValueError, match='holds a run with LoraConfig.rank = '):
    train_test.run(
      updates, donors, trainable='lora', lora=lora.LoraConfig(rank=2)
    )
  with pytest.raises(ValueError, match='is of a run that trained lora, not co'):
    train_test.run(updates, donors)

  anchor = dataclasses.replace(donors[0].config, param_dtype='float32')
  exact = dataclasses.replace(donors[0], config=anchor)
  train_test.run(whole, (exact, donors[1]), trainable='anchor')
  systems = {}
  for place, name in ((updates, 'lora'), (whole, 'finetuned')):
    systems |= evaluate.load_systems(
      model_dir=str(place),
      anchor=exact,
      augmenting={},
      systems=['anchor', name],
    )
  count = trees.num_params(systems['lora'].params['lora'])
  assert f'trainable params: {count:,} ' in systems['lora'].describe()
  tokens_BT = tiny.tokens((1, 6)) % train_test.VOCAB
  logits = {k: np.asarray(m.logits(tokens_BT)) for k, m in systems.items()}
  assert np.abs(logits['lora'] - logits['anchor']).max() > 1e-4
  assert np.abs(logits['finetuned'] - logits['anchor']).max() > 1e-4
  with pytest.raises(ValueError, match="holds no model: 'finetuned' is what a"):
    evaluate.load_systems(
      model_dir=str(updates),
      anchor=exact,
      augmenting={},
      systems=['finetuned'],
    )

  # Merged and exported, it is a model like any other.
  out = tmp_path / 'merged'
  convert.convert(
    model=exact,
    output_dir=str(out),
    model_type='llama',
    lora_dir=str(updates),
    dtype='float32',
  )
  single = api.load_pretrained(out, param_dtype='float32')
  tiny.assert_close(single.logits(tokens_BT), logits['lora'])
  other = dataclasses.replace(
    exact, path=single.spec.path, model_type=single.spec.model_type
  )
  with pytest.raises(ValueError, match="vocabulary of 'anchor' are not those"):
    convert.convert(
      model=other, output_dir=str(tmp_path / 'no'), lora_dir=str(updates)
    )
