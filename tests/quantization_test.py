"""Frozen weights in fewer bits: their bytes, their errors, their uses.

Run: pytest tests/quantization_test.py

The numbered invariants are those of docs/design.md, section 3.
"""

import dataclasses
import functools
import re
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from calm_jax import (
  assembly,
  composition,
  evaluate,
  flops,
  gin_setup,
  hlo,
  metrics,
  optimizers,
  quantization,
  sharding,
  train,
  train_state,
  train_step,
  trees,
)
from calm_jax.models import pretrained, transformer
from calm_jax.quantization import QuantizationConfig
from tests import tiny, toys

KINDS = tuple(quantization.QTYPES)
BITS = {'int8': 8, 'int4': 4, 'nf4': 4}
# Half of the widest step, in units of the largest number of a group.
HALF_STEP = {'int8': 0.5 / 127.5, 'int4': 0.5 / 7.5, 'nf4': (1 - 0.69619) / 2}
VOCAB = 40
ANCHOR = dataclasses.replace(
  tiny.ANCHOR, vocab_size=VOCAB, num_layers=2, init_stddev=0.3
)
AUGMENTING = dataclasses.replace(
  tiny.AUGMENTING,
  vocab_size=VOCAB,
  num_layers=2,
  num_kv_heads=2,
  init_stddev=0.3,
)
MAPPING = (tiny.connection(-1, 1), tiny.connection(1, 0))
SETTINGS = [
  QuantizationConfig(kind, group_size=group)
  for kind in KINDS
  for group in (None, 8)
]


def name_of(config):
  return f'{config.kind}-{config.group_size}-{config.leaves}'


def each_setting(test):
  return pytest.mark.parametrize('config', SETTINGS, ids=name_of)(test)


def matrix(shape=(64, 24), seed=0):
  """Rows of very different size: what groups are for."""
  rng = np.random.default_rng(seed)
  sizes = np.repeat(4.0 ** rng.integers(0, 4, shape[-2] // 8), 8)
  return (rng.normal(size=shape) * sizes[:, None]).astype(np.float32)


def stored(array):
  """Returns the bytes that the compiler gives an array on this device."""
  compiled = jax.jit(lambda x: x + x).lower(array).compile()
  return compiled.memory_analysis().argument_size_in_bytes


# --- One leaf -----------------------------------------------------------------


@each_setting
def test_a_leaf_takes_the_bytes_it_should(config, one_device):
  array = jax.device_put(matrix(), sharding.replicated(one_device))
  leaf = quantization.quantize_leaf(config, 'block_0/mlp/up/kernel', array)
  assert array.is_deleted()
  scales = 24 * (64 // 8 if config.group_size else 1)
  expected = 64 * 24 * BITS[config.kind] // 8 + 4 * scales
  assert trees.num_bytes(leaf) == expected
  assert stored(leaf.qvalue) + stored(leaf.scale) == expected
  assert metrics.bytes_per_device(leaf) == expected
  assert trees.num_params(leaf) == 64 * 24


@each_setting
def test_no_number_is_off_by_more_than_half_a_step(config):
  array = matrix()
  leaf = quantization.quantize_tree(config, {'block_0': {'kernel': array}})
  assert leaf['block_0']['kernel'] is array  # not a matrix of a layer
  params = {'block_0': {'up': {'kernel': array}}}
  leaf = quantization.quantize_tree(config, params)['block_0']['up']['kernel']
  back = quantization.dequantize(leaf, jnp.float32)
  assert back.dtype == jnp.float32
  groups = (-1, config.group_size or 64, 24)
  largest = np.abs(array.reshape(groups)).max(axis=1, keepdims=True)
  error = np.abs(np.asarray(back) - array).reshape(groups) / largest
  assert error.max() <= HALF_STEP[config.kind] + 2**-22  # float32 rounds too
  assert error.max() >= HALF_STEP[config.kind] * 0.9


@each_setting
def test_stacked_layers_are_quantised_one_by_one(config):
  stacked = matrix((3, 64, 24))
  leaf = quantization.quantize_tree(
    config, {'blocks_0_3': {'up': {'kernel': stacked}}}
  )['blocks_0_3']['up']['kernel']
  for i in range(3):
    one = quantization.quantize_tree(
      config, {'block_0': {'up': {'kernel': stacked[i]}}}
    )['block_0']['up']['kernel']
    np.testing.assert_array_equal(one.qvalue, leaf.qvalue[i])
    np.testing.assert_array_equal(one.scale, leaf.scale[i])


@pytest.mark.parametrize('leaves', quantization.LEAVES)
@pytest.mark.parametrize('stack', ['loop', 'scan'])
def test_which_leaves_are_chosen(leaves, stack):
  config = dataclasses.replace(
    ANCHOR, tie_embeddings=False, attention_bias='all', query_key_norm='rms'
  )
  model = transformer.DecoderLM(config, stack=stack)
  shapes = nn.unbox(toys.boxed_shapes(model))
  quantized = jax.eval_shape(
    functools.partial(
      quantization.quantize_tree, QuantizationConfig(leaves=leaves)
    ),
    shapes,
  )
  names = trees.flatten(shapes)
  chosen = {name for name in names if name.startswith('block')}
  chosen = {name for name in chosen if name.endswith('/kernel')}
  if leaves == 'kernels_and_table':
    chosen |= {'embedder/table', 'head/kernel'}
  found = {
    name.removesuffix('/qvalue')
    for name in trees.flatten(quantized)
    if name.endswith('/qvalue')
  }
  assert found == chosen
  assert trees.num_params(quantized) == trees.num_params(shapes)


# --- Whole models -------------------------------------------------------------


def composed(stack='loop', **settings):
  return tiny.composed(
    anchor=ANCHOR,
    augmenting={'code': AUGMENTING},
    mapping=MAPPING,
    stack=stack,
    **settings,
  )


def quantized_params(model, config, **settings):
  """All towers quantised, the composition as it is."""
  params = toys.params(model, **settings)
  quantize = functools.partial(quantization.quantize_tree, config)
  towers = {k: quantize(one) for k, one in params['augmenting'].items()}
  return {
    **params,
    'anchor': quantize(params['anchor']),
    'augmenting': towers,
  }


@pytest.mark.parametrize(
  ('config', 'most'),
  [
    (QuantizationConfig('int8'), 1e-3),
    (QuantizationConfig('int4', group_size=8), 0.2),
    (QuantizationConfig('nf4', group_size=8), 0.2),
    (QuantizationConfig('int8', leaves='kernels_and_table'), 2e-3),
  ],
  ids=lambda x: name_of(x) if isinstance(x, QuantizationConfig) else '',
)
def test_logits_change_little(config, most):
  model = transformer.DecoderLM(ANCHOR)
  tower, params = composition.ComposedLM(model), toys.params(model)
  batch = tiny.batch_of(tiny.tokens((4, 16)))
  exact, coarse = (
    jax.nn.log_softmax(tiny.logits(tower, {'anchor': tree}, batch))
    for tree in (params, quantization.quantize_tree(config, params))
  )
  divergence = float(jnp.mean(jnp.sum(jnp.exp(exact) * (exact - coarse), -1)))
  assert most / 30 < divergence < most


@pytest.mark.parametrize(('tied', 'group_size'), [(True, 8), (False, None)])
def test_a_quantised_table_is_looked_up_and_multiplied(tied, group_size):
  model = transformer.DecoderLM(
    dataclasses.replace(ANCHOR, num_layers=1, tie_embeddings=tied)
  )
  params = quantization.quantize_tree(
    QuantizationConfig('int4', group_size, 'kernels_and_table'),
    toys.params(model),
  )
  whole = jax.tree.map(lambda x: x, params)
  axis = {'embedder': -1, 'head': -2}
  for name in ('embedder',) if tied else ('embedder', 'head'):
    (leaf,) = trees.leaves(params[name])
    whole[name] = {
      key: quantization.dequantize(leaf, jnp.float32, axis=axis[name])
      for key in params[name]
    }
  tower = composition.ComposedLM(model)
  batch = tiny.batch_of(tiny.tokens((2, 9)))
  tiny.assert_close(
    tiny.logits(tower, {'anchor': params}, batch),
    tiny.logits(tower, {'anchor': whole}, batch),
  )


@pytest.mark.parametrize(
  ('kind', 'stack', 'dtype'),
  [
    ('int8', 'loop', 'bfloat16'),
    ('int4', 'scan', 'float32'),
    ('nf4', 'loop', 'float32'),
    ('nf4', 'scan', 'bfloat16'),
  ],
)
def test_composed_is_the_quantised_anchor_at_step_0(kind, stack, dtype):
  """Invariant 1."""
  model = tiny.composed(
    anchor=tiny.with_dtype(ANCHOR, dtype),
    augmenting={'code': tiny.with_dtype(AUGMENTING, dtype)},
    mapping=MAPPING,
    stack=stack,
  )
  config = QuantizationConfig(kind, leaves='kernels_and_table')
  params = quantized_params(model, config, zero_output=True)
  alone = composition.ComposedLM(model.anchor)
  alone.anchor = model.anchor  # the same cuts
  batch = tiny.batch_of(tiny.tokens((3, 11)))
  np.testing.assert_array_equal(
    tiny.logits(model, params, batch),
    tiny.logits(alone, {'anchor': params['anchor']}, batch),
  )


@pytest.mark.parametrize(
  ('kind', 'stack'), [('int8', 'scan'), ('int4', 'loop'), ('nf4', 'loop')]
)
def test_prefill_and_decode_equal_the_full_forward(kind, stack):
  """Invariant 4."""
  model = composed(stack)
  params = quantized_params(model, QuantizationConfig(kind, group_size=8))
  tokens_BT = tiny.tokens((2, 10))
  expected = tiny.logits(model, params, tiny.batch_of(tokens_BT))
  extend = jax.jit(model.extend)
  positions_BT = np.broadcast_to(np.arange(10), (2, 10))
  cache, parts = model.empty_cache(batch=2, slots=10), []
  for part in [slice(0, 6), *(slice(t, t + 1) for t in range(6, 10))]:
    logits, cache = extend(
      params, tokens_BT[:, part], positions_BT[:, part], cache
    )
    parts.append(logits)
  tiny.assert_close(np.concatenate(parts, axis=1), expected)


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'stack'), [('int4', 'scan'), ('nf4', 'loop')])
def test_a_composition_of_quantised_models_trains(kind, stack):
  """Invariants 5, 8 and 10: what is frozen stays, one compilation, the cost."""
  model = composed(stack)
  params = quantized_params(model, QuantizationConfig(kind, group_size=8))
  theta = {'composition': params.pop('composition')}
  frozen = jax.tree.map(jnp.asarray, params)
  before = trees.digests(jax.device_get(frozen))
  update = optimizers.OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
  update = update.make(100)
  state = jax.tree.map(jnp.asarray, train_state.create(theta, update, seed=0))
  slots = {name.split('/')[0] for name in trees.flatten(state.params)}
  assert slots == {'composition'}
  step = jax.jit(train_step.make_train_step(model, update), donate_argnums=0)
  batch = tiny.jnp_batch(tiny.batch_of(tiny.tokens((8, 8))))
  seen = []
  for _ in range(8):
    state, measured = step(state, frozen, batch)
    seen.append(float(measured['loss']))
  assert seen[-1] < 0.9 * seen[0]
  assert trees.digests(jax.device_get(frozen)) == before
  assert step._cache_size() == 1
  if stack == 'loop':
    plain = toys.params(model)
    del plain['composition']
    costs = [
      hlo.flops(step.lower(state, tree, batch).compile().as_text())
      for tree in (frozen, plain)
    ]
    assert costs[0] == costs[1]


@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_a_chunked_loss_reads_quantised_heads(kind):
  model = composed('loop')
  config = QuantizationConfig(kind, leaves='kernels_and_table')
  params = quantized_params(model, config)
  theta = {'composition': params.pop('composition')}
  frozen = jax.tree.map(jnp.asarray, params)
  batch = tiny.jnp_batch(tiny.batch_of(tiny.tokens((4, 8))))
  found = []
  for chunk in (None, 3):
    loss = functools.partial(train_step.loss_fn, model=model, loss_chunk=chunk)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found.append(step(theta, frozen, batch))
  (whole, _), gradients = found[0]
  (chunked, _), others = found[1]
  np.testing.assert_allclose(chunked, whole, rtol=1e-5)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(gradients))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * largest),
    others,
    gradients,
  )


def test_reports_count_what_the_weights_stand_for():
  model = composed('scan')
  plain = toys.params(model)
  quantized = quantized_params(model, QuantizationConfig('int4', 8))
  line = functools.partial(metrics.parameter_report, trainable='composition')
  assert line(quantized) == line(plain)
  least = functools.partial(
    flops.least,
    model,
    batch=tiny.batch_of(tiny.tokens((4, 16))),
    trainable='composition',
  )
  assert least(quantized) == least(plain)
  digests = trees.digests(quantized['anchor'])
  assert 'blocks_0_2/mlp/up/kernel/scale' in digests


# --- From a directory to the mesh --------------------------------------------


def load(directory, mesh, config, stack='loop'):
  spec = pretrained.pretrained_model(directory, quantization=config)
  model = transformer.DecoderLM(spec.config, stack=stack)
  return model, assembly.load(spec, model, mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('config', 'stack'),
  [
    (QuantizationConfig('int8', leaves='kernels_and_table'), 'loop'),
    (QuantizationConfig('int4', 8, 'kernels_and_table'), 'scan'),
    (QuantizationConfig('nf4', 8), 'loop'),
  ],
  ids=lambda x: name_of(x) if isinstance(x, QuantizationConfig) else x,
)
def test_eight_devices_hold_what_one_does(config, stack, tmp_path, one_device):
  """Invariant 7, and a fingerprint of the source."""
  fingerprint = toys.model_directory(tmp_path, ANCHOR)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  model, sharded = load(tmp_path, mesh, config, stack)
  _, single = load(tmp_path, one_device, config, stack)
  assert sharded.origin.endswith(f', as {config.kind}')
  assert sharded.fingerprint == fingerprint  # of the source, not of what stays
  block = 'block_0' if stack == 'loop' else 'blocks_0_2'
  leaf = sharded.params[block]['mlp']['up']['kernel']
  stacked = (None,) if stack == 'scan' else ()
  grouped = 'fsdp' if config.group_size else None
  assert leaf.qvalue.sharding.spec == PartitionSpec(*stacked, 'fsdp', 'tensor')
  assert leaf.scale.sharding.spec == PartitionSpec(*stacked, grouped, 'tensor')
  assert trees.digests(jax.device_get(sharded.params)) == trees.digests(
    jax.device_get(single.params)
  )
  tower = composition.ComposedLM(model)
  batch = tiny.batch_of(tiny.tokens((8, 6)))
  with jax.set_mesh(mesh):
    arguments = {'anchor': sharded.params}, sharding.put_batch(batch, mesh)
    forward = jax.jit(tower.__call__)
    actual = forward(*arguments)
    text = forward.lower(*arguments).compile().as_text()
  tiny.assert_close(
    actual, tiny.logits(tower, {'anchor': single.params}, batch)
  )
  # 'up' is [32, 48]: collected over fsdp as bytes, and split over tensor.
  collected = re.findall(r'(\w+)\[32,24\]\S* all-gather\(', text)
  assert collected and set(collected) <= {'s8', 'u8'}


def test_leaves_are_quantised_one_at_a_time(tmp_path, one_device, monkeypatch):
  """No two unquantised matrices are alive when a third is placed."""
  toys.model_directory(tmp_path, ANCHOR)
  alive, most = [], []
  place = jax.make_array_from_callback

  def watch(shape, *args):
    most.append(sum(not x.is_deleted() for x in alive))
    leaf = place(shape, *args)
    if len(shape) == 2 and shape[0] != VOCAB:
      alive.append(leaf)
    return leaf

  monkeypatch.setattr(jax, 'make_array_from_callback', watch)
  load(tmp_path, one_device, QuantizationConfig())
  assert len(alive) == 7 * ANCHOR.num_layers
  assert max(most) == 0


def test_random_weights_are_quantised_too(one_device):
  spec = pretrained.ModelSpec(
    config=ANCHOR,
    vocabulary=toys.vocabulary(VOCAB),
    quantization=QuantizationConfig('nf4'),
  )
  model = transformer.DecoderLM(ANCHOR)
  loaded = assembly.load(spec, model, mesh=one_device)
  leaf = loaded.params['block_0']['mlp']['up']['kernel']
  assert leaf.qvalue.dtype == jnp.uint4
  assert loaded.origin == 'random, seed 0, as nf4'


# --- Refusals, before anything is allocated ----------------------------------


class Allocated(Exception):
  """A refusal came too late."""


@pytest.fixture
def allocate_nothing(monkeypatch):
  def fail(*args, **kwargs):
    raise Allocated

  monkeypatch.setattr(jax, 'make_array_from_callback', fail)
  monkeypatch.setattr(jax, 'device_put', fail)


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'kind': 'int3'}, "kind = 'int3' is not one of"),
    ({'leaves': 'all'}, "leaves = 'all' is not one of"),
    ({'group_size': 1}, 'group_size = 1'),
  ],
)
def test_wrong_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    QuantizationConfig(**settings)


def test_groups_must_divide_the_widths():
  with pytest.raises(ValueError, match='group_size = 10 .* width 32'):
    pretrained.ModelSpec(
      config=ANCHOR,
      vocabulary=toys.vocabulary(VOCAB),
      quantization=QuantizationConfig(group_size=10),
    )


def test_the_mesh_must_divide_the_groups(tmp_path, allocate_nothing):
  toys.model_directory(tmp_path / 'anchor', AUGMENTING)
  toys.model_directory(tmp_path / 'code', ANCHOR)
  specs = {
    'anchor': pretrained.pretrained_model(tmp_path / 'anchor'),
    'code': pretrained.pretrained_model(
      tmp_path / 'code', quantization=QuantizationConfig(group_size=16)
    ),
  }
  model = tiny.composed(
    anchor=AUGMENTING,
    augmenting={'code': ANCHOR},
    mapping=(tiny.connection(1, 1),),
  )
  # 32 inputs are 2 groups of 16: fsdp can be 2, and not 4.
  mesh = sharding.make_mesh(fsdp=4, tensor=1)
  with pytest.raises(ValueError, match=r'2 groups .*fsdp.*smaller groups'):
    assembly.load_all(model, specs, mesh=mesh)
  mesh = sharding.make_mesh(fsdp=2, tensor=1)
  with pytest.raises(Allocated):
    assembly.load_all(model, specs, mesh=mesh)


def test_what_is_trained_cannot_be_quantised(tmp_path, allocate_nothing):
  toys.model_directory(tmp_path / 'donor', ANCHOR)
  spec = pretrained.pretrained_model(
    tmp_path / 'donor', quantization=QuantizationConfig('int4')
  )
  with pytest.raises(ValueError, match='Only frozen weights can be quantised'):
    train.train(
      model_dir=str(tmp_path / 'run'),
      anchor=spec,
      trainable='anchor',
      make_batches=None,
      train_steps=1,
      batch_size=8,
    )


def test_without_qwix_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'qwix', None)
  with pytest.raises(
    ValueError, match=r"pip install\s+'calm_jax\[quantized\]'"
  ):
    QuantizationConfig()
  model = transformer.DecoderLM(ANCHOR)
  tiny.logits(
    composition.ComposedLM(model),
    {'anchor': toys.params(model)},
    tiny.batch_of(tiny.tokens((1, 2))),
  )


def test_gin_files_choose_the_kind(tmp_path, monkeypatch):
  toys.model_directory(tmp_path / 'donor', ANCHOR)
  file = tmp_path / 'run.gin'
  file.write_text(f"""
infer.model_dir = '{tmp_path}'
infer.anchor = @pretrained_model()
pretrained_model.path = '{tmp_path / 'donor'}'
pretrained_model.quantization = @QuantizationConfig()
QuantizationConfig.kind = 'nf4'
QuantizationConfig.group_size = 16
""")
  entry = gin_setup.configure('infer', gin_files=[str(file)])
  seen = {}

  def load_systems(**given):
    seen.update(given)
    raise Allocated

  monkeypatch.setattr(evaluate, 'load_systems', load_systems)
  with pytest.raises(Allocated):
    entry()
  assert seen['anchor'].quantization == QuantizationConfig('nf4', 16)
