"""The training step: what it changes, costs and leaks.

Run: pytest tests/train_step_test.py

The numbered invariants are those of docs/design.md, section 3.
"""

import dataclasses
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calm_jax import (
  assembly,
  decoding,
  embedding_noise,
  flops,
  hlo,
  masks,
  optimizers,
  sharding,
  train_state,
  train_step,
  trees,
)
from tests import tiny, toys

VOCAB = 40  # two devices can split it
ANCHOR = dataclasses.replace(
  tiny.ANCHOR, vocab_size=VOCAB, num_layers=3, init_stddev=0.3
)
AUGMENTING = dataclasses.replace(
  tiny.AUGMENTING, vocab_size=VOCAB, num_layers=2, init_stddev=0.3
)
MAPPING = (tiny.connection(-1, 1), tiny.connection(1, 0))
ADAMW = optimizers.OptimizerConfig(learning_rate=1e-2, warmup_steps=0)


SMALL = tiny.composed(
  anchor=ANCHOR, augmenting={'code': AUGMENTING}, mapping=MAPPING
)


@functools.cache
def compiled_step(model, mesh, optimizer, **settings):
  """The step as `train.train` has it, and where its arguments are."""
  update = optimizer.make(1000)
  places = sharding.param_shardings(toys.boxed_shapes(model), mesh)
  theta = {'composition': places.pop('composition')}
  state_places = train_state.shardings(
    jax.eval_shape(
      functools.partial(train_state.create, optimizer=update, seed=0),
      {'composition': nn.unbox(toys.boxed_shapes(model)['composition'])},
    ),
    theta,
    mesh,
  )
  step_fn = jax.jit(
    train_step.make_train_step(
      model, update, train_step.StepConfig(**settings)
    ),
    donate_argnums=0,
    out_shardings=(state_places, sharding.replicated(mesh)),
  )
  return step_fn, update, places, state_places


class Run:
  """State and frozen weights on a mesh."""

  def __init__(
    self, model, mesh, optimizer=ADAMW, *, zero_output=False, **settings
  ):
    params = toys.params(model, zero_output=zero_output)
    theta = {'composition': params.pop('composition')}
    self.step_fn, update, places, state_places = compiled_step(
      model, mesh, optimizer, **settings
    )
    self.mesh = mesh
    self.frozen = assembly.place(params, places)
    state = train_state.create(theta, update, seed=0)
    self.state = assembly.place(state, state_places)

  def step(self, batch):
    with jax.set_mesh(self.mesh):
      self.state, measured = self.step_fn(
        self.state, self.frozen, sharding.put_batch(batch, self.mesh)
      )
    return {name: float(value) for name, value in measured.items()}

  def mean_gradients(self):
    """The first moments of AdamW by name."""
    slots = trees.flatten(jax.device_get(self.state.opt_state))
    return {name: slot for name, slot in slots.items() if '/mu/' in name}


def random_batch(seed, shape=(8, 8), vocab=VOCAB, segments=True):
  rng = np.random.default_rng(seed)
  tokens_BT = rng.integers(0, vocab, shape, np.int32)
  if not segments:
    return tiny.batch_of(tokens_BT)
  # Rows of several segments, with padding: slices differ in their weight.
  segment_ids_BT = 1 + np.cumsum(rng.random(shape) < 0.2, axis=1)
  ends_B = rng.integers(2, shape[1] + 1, shape[0])
  real_BT = np.arange(shape[1]) < ends_B[:, None]
  return tiny.batch_of(tokens_BT, segment_ids_BT * real_BT)


# --- Embedding noise ----------------------------------------------------------


def test_normal_noise_is_in_units_of_each_embedding():
  noise_BTD = embedding_noise.draw(jax.random.key(0), (64, 32, 128), most=0.5)
  sizes_BT = np.std(noise_BTD, axis=-1)
  assert 0.45 < sizes_BT.max() < 0.65  # uniform in [0, 0.5]
  assert sizes_BT.min() < 0.02
  assert abs(sizes_BT.mean() - 0.25) < 0.01
  x_TD = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32)
  x_TD *= np.array([[0.1], [1.0], [10.0]], np.float32)
  added_T = np.asarray(embedding_noise.add(x_TD, np.ones_like(x_TD)) - x_TD)[
    :, 0
  ]
  rms_T = np.sqrt(np.mean(x_TD**2, axis=-1))
  np.testing.assert_allclose(added_T, rms_T, rtol=1e-3)


@pytest.mark.parametrize(
  'wrong, message',
  [
    ({'microbatches': 0}, 'microbatches = 0: it must be at least 1'),
    ({'loss_chunk': 0}, 'loss_chunk = 0: it must be at least 1'),
    ({'embedding_noise': -1.0}, 'embedding_noise = -1.0: it must not be neg'),
    ({'z_loss': -0.1}, 'z_loss = -0.1: it must not be negative'),
    ({'refuse_loss_above': -2.0}, 'refuse_loss_above = -2.0: it must not'),
  ],
)
def test_what_no_step_is_made_of(wrong, message):
  with pytest.raises(ValueError, match=message):
    train_step.StepConfig(**wrong)


@pytest.mark.parametrize(
  'weights, settings',
  [(np.nan, {}), (1.0, {'refuse_loss_above': 0.5}), (0.0, {})],
)
def test_a_bad_update_is_not_applied(weights, settings, one_device):
  """A loss that is no number, one above the limit, and no target at all."""
  run = Run(SMALL, one_device, **settings)
  limit = Run(SMALL, one_device, refuse_loss_above=50.0)
  batch = random_batch(0)
  if not settings:
    assert run.step(batch)['applied'] == 1
  before = jax.device_get(run.state)
  bad = batch['decoder_loss_weights'] * np.float32(weights)
  measured = run.step({**batch, 'decoder_loss_weights': bad})
  assert measured['applied'] == 0
  after = jax.device_get(run.state)
  assert after.step == before.step + 1
  for name in ('params', 'opt_state'):
    old, new = (
      trees.flatten(getattr(state, name)) for state in (before, after)
    )
    for leaf in old:
      np.testing.assert_array_equal(old[leaf], new[leaf], leaf)
  assert limit.step(batch)['applied'] == 1


def test_embedding_noise_differs_by_step_and_seed_only():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  batch = random_batch(0)
  plain = Run(SMALL, mesh).step(batch)['loss']
  noisy = Run(SMALL, mesh, embedding_noise=0.5)
  first, second = noisy.step(batch)['loss'], noisy.step(batch)['loss']
  again = Run(SMALL, mesh, embedding_noise=0.5)
  assert again.step(batch)['loss'] == first != plain
  # The same parameters and batch at another step: other noise.
  other = Run(SMALL, mesh, embedding_noise=0.5)
  other.state = other.state.replace(step=other.state.step + 1)
  assert other.step(batch)['loss'] != first
  assert again.step(batch)['loss'] == second


# --- 5, 8. What a step leaves alone ------------------------------------------


@pytest.mark.slow
def test_a_step_changes_the_composition_alone_and_compiles_once(one_device):
  run = Run(SMALL, one_device, zero_output=True)
  frozen = trees.digests(jax.device_get(run.frozen))
  before = trees.flatten(jax.device_get(run.state.params))
  slots = [x.shape for x in jax.tree.leaves(run.state.opt_state) if x.ndim]
  assert sorted(slots) == sorted(2 * [x.shape for x in before.values()])
  for seed in range(5):
    measured = run.step(random_batch(seed))
    # At first the output is zero, so that nothing before it has a gradient.
    for name, gradient in run.mean_gradients().items():
      assert np.any(gradient) == (seed > 0 or '/out/' in name), name
  assert run.step_fn._cache_size() == 1
  assert np.isfinite(measured['loss'])
  assert int(run.state.step) == 5
  assert trees.digests(jax.device_get(run.frozen)) == frozen
  for name, leaf in trees.flatten(jax.device_get(run.state.params)).items():
    assert np.any(leaf != before[name]), name


# --- The loss ----------------------------------------------------------------


@pytest.mark.slow
def test_slices_and_chosen_targets_give_the_same_gradient(one_device):
  """Microbatches, and logits for the supervised positions alone."""
  batch = random_batch(1)
  weights_B = batch['decoder_loss_weights'].sum(axis=1)
  assert len(set(weights_B)) > 2  # else a mean of means would pass
  most = int(weights_B.max())
  assert most < batch['decoder_loss_weights'].shape[1]
  whole = Run(SMALL, one_device)
  sliced = Run(SMALL, one_device, microbatches=4, targets_per_row=most)
  expected, actual = whole.step(batch), sliced.step(batch)
  assert actual == pytest.approx(expected, rel=1e-5)
  assert actual['target_tokens'] == weights_B.sum()
  gradients = sliced.mean_gradients()
  for name, gradient in whole.mean_gradients().items():
    bound = 1e-5 * np.abs(gradient).max()
    np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=bound)


def test_scores_and_losses_are_sums_of_log_probabilities():
  params, batch = toys.params(SMALL), random_batch(2)
  batch['decoder_loss_weights'][0, 1] = 0.5
  targets_BT = batch['decoder_target_tokens']
  weights_BT = batch['decoder_loss_weights']

  @jax.jit
  def everything(params, batch):
    loss, _ = train_step.loss_fn(params, {}, batch, model=SMALL, z_loss=0.1)
    scores = decoding.score_batch(params, batch, model=SMALL)
    measured = train_step.eval_fn(params, batch, model=SMALL)
    return SMALL(params, batch), scores, measured, loss

  logits_BTV, scores, measured, loss = everything(params, batch)
  logits_BTV = np.asarray(logits_BTV, np.float64)
  log_z_BT = np.log(np.exp(logits_BTV).sum(-1))
  chosen_BT = np.take_along_axis(logits_BTV, targets_BT[..., None], 2)[..., 0]
  chances_BT = chosen_BT - log_z_BT
  expected_B = (chances_BT * weights_BT).sum(-1)
  whole_B = (chances_BT * (weights_BT > 0)).sum(-1)
  hits_BT = logits_BTV.argmax(-1) == targets_BT
  weight = weights_BT.sum()
  np.testing.assert_allclose(scores.log_likelihood_B, whole_B, rtol=1e-5)
  assert measured['target_tokens'] == weight
  close = functools.partial(pytest.approx, rel=1e-5)
  assert float(measured['loss']) == close(-expected_B.sum() / weight)
  accuracy = (hits_BT * weights_BT).sum() / weight
  assert float(measured['accuracy']) == close(accuracy)
  z_loss = (log_z_BT**2 * weights_BT).sum()
  assert float(loss) == close(-expected_B.sum() + 0.1 * z_loss)

  # A target of weight 0 is not there at all.
  changed_BT = np.where(weights_BT == 0, 7, targets_BT)
  again = everything(params, {**batch, 'decoder_target_tokens': changed_BT})
  jax.tree.map(
    np.testing.assert_array_equal, again[1:], (scores, measured, loss)
  )


# --- 7. One device and eight -------------------------------------------------


@pytest.mark.slow
def test_eight_devices_train_as_one_does(one_device):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  one, eight = Run(SMALL, one_device), Run(SMALL, mesh)

  # A nontrivial sharding: each axis of the mesh splits something.
  def part(x):
    return x.sharding.shard_shape(x.shape)

  def key(run):
    return run.state.params['composition']['code_1_into_embed']['key']['kernel']

  assert part(eight.frozen['anchor']['embedder']['table']) == (20, 16)
  assert part(key(eight)) == (16, 16)
  slots = [part(x) for x in jax.tree.leaves(eight.state.opt_state)]
  assert (16, 16) in slots
  rows = sharding.put_batch(random_batch(0), mesh)['decoder_input_tokens']
  assert part(rows) == (2, 8)

  for seed in range(20):
    expected, actual = (run.step(random_batch(seed)) for run in (one, eight))
    assert actual['loss'] == pytest.approx(expected['loss'], rel=1e-5)
    assert actual['target_tokens'] == expected['target_tokens']
  assert part(key(eight)) == (16, 16)
  assert eight.step_fn._cache_size() == 1


# --- 9. Leak -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('masked', [True, False])
def test_uniform_tokens_cannot_be_learnt(masked, one_device, monkeypatch):
  """The future is all there is to learn, and only a broken mask shows it."""
  vocab = 8
  if not masked:
    everything = lambda *, segment_ids_BT, **_: jnp.ones(
      (*segment_ids_BT.shape, segment_ids_BT.shape[1]), bool
    )
    monkeypatch.setattr(masks, 'cross_mask', everything)
  model = tiny.composed(
    anchor=dataclasses.replace(ANCHOR, vocab_size=vocab, num_layers=2),
    augmenting={
      'code': dataclasses.replace(AUGMENTING, vocab_size=vocab, num_layers=1)
    },
    mapping=[tiny.connection(-1, 0), tiny.connection(1, 0)],
  )
  run = Run(model, one_device, zero_output=True)
  # Every batch is fresh, so every loss is one on tokens never seen.
  losses = [
    run.step(random_batch(seed, (32, 8), vocab, segments=False))['loss']
    for seed in range(250)
  ]
  last = np.array(losses[-100:])
  if masked:
    error = last.std() / math.sqrt(len(last))
    assert last.mean() >= math.log(vocab) - 3 * error
  else:
    assert last.mean() < math.log(vocab) - 0.1


# --- 10. FLOPs ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
  ('stack', 'depths', 'mapping', 'settings'),
  [
    ('loop', (3, 2), [(0, 0), (1, 0)], {}),
    ('scan', (4, 3), [(1, 1)], {}),
    ('loop', (4, 2), [(0, 0), (2, 0)], {'remat': True, 'loss_chunk': 16}),
    ('scan', (4, 3), [(1, 1)], {'remat': True, 'loss_chunk': 16}),
  ],
)
def test_a_step_costs_what_it_must(stack, depths, mapping, settings):
  """Section 4 of the design: at most 1.05 times F_min, and what is declared."""
  settings = dict(settings)
  remat = settings.pop('remat', False)
  wide = {'vocab_size': 512, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 64}
  anchor = dataclasses.replace(
    ANCHOR, embed_dim=256, mlp_dim=512, num_layers=depths[0], **wide
  )
  augmenting = dataclasses.replace(
    AUGMENTING, embed_dim=320, mlp_dim=640, num_layers=depths[1], **wide
  )
  model = tiny.composed(
    anchor=anchor,
    augmenting={'code': augmenting},
    mapping=[tiny.connection(*pair) for pair in mapping],
    stack=stack,
    remat=remat,
  )
  B, T = 2, 64
  shapes = nn.unbox(jax.eval_shape(model.init_params, jax.random.key(0)))
  frozen = {name: shapes[name] for name in ('anchor', 'augmenting')}
  optimizer = optax.adam(1e-3)
  state = jax.eval_shape(
    functools.partial(train_state.create, optimizer=optimizer, seed=0),
    {'composition': shapes['composition']},
  )
  config = train_step.StepConfig(**settings)
  step = jax.jit(train_step.make_train_step(model, optimizer, config))
  batch = random_batch(0, (B, T), segments=False)
  text = step.lower(state, frozen, batch).compile().as_text()
  least = flops.least(model, shapes, batch, trainable='composition')
  if remat:
    again = flops.recomputed(model, shapes, batch)
    assert again > 0.1 * least
    least += again
  assert 0.95 <= hlo.flops(text) / least <= 1.05


@pytest.mark.parametrize('chunk', [1, 3, 8, 20])
def test_a_chunked_loss_is_the_loss(chunk):
  """Its value, its sums, and its gradient; a chunk need not divide the row."""
  params, batch = toys.params(SMALL), random_batch(4)
  frozen = {k: params[k] for k in ('anchor', 'augmenting')}
  theta = {'composition': params['composition']}

  def differentiate(chunk):
    loss = functools.partial(
      train_step.loss_fn, model=SMALL, z_loss=0.1, loss_chunk=chunk
    )
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return step(theta, frozen, batch)

  (whole, sums), gradients = differentiate(None)
  (chunked, same), others = differentiate(chunk)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  close(chunked, whole)
  jax.tree.map(close, same, sums)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(gradients))
  assert largest > 0
  jax.tree.map(
    functools.partial(
      np.testing.assert_allclose, rtol=0, atol=1e-5 * float(largest)
    ),
    others,
    gradients,
  )


def test_a_chunked_loss_holds_no_logits_of_all_positions():
  """What is planned for temporaries falls by most of the logits."""
  vocab, rows = 4096, 4
  model = tiny.composed(
    anchor=dataclasses.replace(ANCHOR, vocab_size=vocab),
    augmenting={'code': dataclasses.replace(AUGMENTING, vocab_size=vocab)},
    mapping=MAPPING,
  )
  shapes = nn.unbox(jax.eval_shape(model.init_params, jax.random.key(0)))
  theta = {'composition': shapes.pop('composition')}
  batch = random_batch(0, (rows, 64), vocab, segments=False)

  def planned(chunk):
    loss = functools.partial(train_step.loss_fn, model=model, loss_chunk=chunk)
    step = jax.jit(jax.grad(loss, has_aux=True))
    compiled = step.lower(theta, shapes, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 4 * rows * 64 * vocab  # bytes
  assert planned(None) - planned(8) > 1.5 * logits


@pytest.mark.slow
@pytest.mark.parametrize('stack', ['loop', 'scan'])
def test_remat_changes_what_is_kept_and_nothing_else(stack):
  """Same parameters, same gradients; fewer blocks' activations at once."""
  deep = dataclasses.replace(ANCHOR, num_layers=8)
  models = [
    tiny.composed(
      anchor=deep,
      augmenting={'code': AUGMENTING},
      mapping=[tiny.connection(1, 1)],
      stack=stack,
      remat=remat,
    )
    for remat in (False, True)
  ]
  params, batch = toys.params(models[0]), random_batch(3, (4, 64))
  theta = {'composition': params.pop('composition')}
  found, planned = [], []
  for model in models:
    loss = functools.partial(train_step.loss_fn, model=model)
    step = jax.jit(jax.grad(loss, has_aux=True))
    compiled = step.lower(theta, params, batch).compile()
    found.append(compiled(theta, params, batch)[0])
    planned.append(compiled.memory_analysis().temp_size_in_bytes)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *found
  )
  if stack == 'scan':  # XLA:CPU orders a loop without regard to memory
    assert planned[1] < 0.6 * planned[0]


def test_logits_of_supervised_positions_only_give_the_same_loss():
  params = toys.params(SMALL)
  batch = tiny.batch_of(np.random.default_rng(0).integers(0, VOCAB, (3, 8)))
  batch['decoder_loss_weights'][:, [0, 2, 3, 6]] = 0
  loss = jax.jit(
    functools.partial(train_step.loss_fn, frozen={}, model=SMALL),
    static_argnames='targets_per_row',
  )
  everywhere, sums = loss(params, batch=batch, targets_per_row=None)
  supervised, same = loss(params, batch=batch, targets_per_row=4)
  np.testing.assert_allclose(supervised, everywhere, rtol=1e-5)
  assert sums.weight == same.weight and sums.correct == same.correct
  fewer, _ = loss(params, batch=batch, targets_per_row=2)
  assert abs(fewer - everywhere) > 1
