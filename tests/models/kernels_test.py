"""Splash (interpreted, on the CPU) and cuDNN against XLA.

Run: pytest tests/models/kernels_test.py

float32 on both sides: what differs is the order of sums over keys, block by
block against all at once; 1e-5 of the scale is the 'close' of the design.
"""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from calm_jax import assembly, masks, sharding, train_step
from calm_jax.model import Model
from calm_jax.models import attention, kernels, pretrained
from tests import tiny, toys

T = 150  # two blocks of 128 with padding
# Two packed segments and padding; padding on the left.
SEGMENTS = np.array(
  [[1] * 60 + [2] * 80 + [0] * 10, [0] * 20 + [1] * 130], np.int32
)


def normal(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def arrays(*, heads, kv_heads, head_dim=16, source=T, batch=2):
  return (
    normal(0, batch, T, heads, head_dim),
    normal(1, batch, source, kv_heads, head_dim),
    normal(2, batch, source, kv_heads, head_dim),
  )


def outputs_and_gradients(attend, qkv, real_BT):
  """Of what real queries get, weighted at random."""
  weights = normal(3, *qkv[0].shape) * real_BT[..., None, None]

  def loss(*qkv):
    out_BTNH = attend(*qkv)
    return (out_BTNH * weights).sum(), out_BTNH

  grads, out_BTNH = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
    *qkv
  )
  assert jnp.isfinite(out_BTNH).all()
  return out_BTNH[real_BT], *grads


def assert_equal_to_xla(qkv, mask_BTS, pattern, real_BT, *, softcap=None):
  how = {'scale': 0.3, 'softcap': softcap}
  xla, splash = (
    outputs_and_gradients(
      lambda *qkv, kernel=kernel: attention.attend(
        *qkv, mask_BTS, kernel=kernel, pattern=pattern, **how
      ),
      qkv,
      real_BT,
    )
    for kernel in ('xla', 'splash')
  )
  for actual, expected in zip(splash, xla, strict=True):
    assert_near(actual, expected)


def assert_near(actual, expected):
  bound = 1e-5 * max(1.0, float(jnp.abs(expected).max()))
  assert float(jnp.abs(actual - expected).max()) <= bound


# --- Attention ---------------------------------------------------------------


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_causal_in_segments(kv_heads):
  where = attention.Positions.full(SEGMENTS, SEGMENTS)
  qkv = arrays(heads=4, kv_heads=kv_heads)
  assert_equal_to_xla(qkv, where.mask_BTS, where.pattern, SEGMENTS > 0)


@pytest.mark.parametrize('is_scanned', [False, True])
@pytest.mark.parametrize('window', [20, None])
def test_windows_and_softcap(window, is_scanned):
  where = attention.Positions.full(SEGMENTS, SEGMENTS)
  size = np.int32(2**30 if window is None else window)
  distance_TT = np.arange(T)[:, None] - np.arange(T)
  mask_BTS = masks.window_mask(where.mask_BTS, distance_TT[None], size)
  if is_scanned:  # the layer is not known while tracing
    size = jnp.asarray(size)
  pattern = where.pattern.replace(window=size, windows=(20, None, 2**20))
  qkv = arrays(heads=2, kv_heads=1)
  assert_equal_to_xla(qkv, mask_BTS, pattern, SEGMENTS > 0, softcap=2.0)


@pytest.mark.parametrize('window', [None, 20])
def test_bidirectional(window):
  """A window is of what is behind; what is ahead is read in any case."""
  index_BT = np.broadcast_to(np.arange(T, dtype=np.int32), SEGMENTS.shape)
  where = attention.Positions.bidirectional(index_BT, SEGMENTS)
  if window is not None:
    where = where.within(np.int32(window), (window,))
  qkv = arrays(heads=2, kv_heads=2)
  assert_equal_to_xla(qkv, where.mask_BTS, where.pattern, SEGMENTS > 0)


def test_any_mask_of_another_length_where_some_see_nothing():
  """As two vocabularies have it; what sees nothing reads zeros, as with XLA."""
  visible_from_BS = np.random.default_rng(0).integers(5, T, (2, 200), np.int32)
  mask_BTS = masks.cross_mask(
    segment_ids_BT=jnp.asarray(SEGMENTS),
    augmenting_segment_ids_BS=jnp.ones((2, 200), jnp.int32),
    visible_from_BS=jnp.asarray(visible_from_BS),
  )
  assert not mask_BTS[0, :5].any()
  everywhere_BT = np.ones((2, T), bool)
  qkv = arrays(heads=2, kv_heads=2, source=200)
  assert_equal_to_xla(qkv, mask_BTS, None, everywhere_BT, softcap=2.0)


@pytest.mark.parametrize(
  ('heads', 'kv_heads', 'axis'), [(4, 1, 'tensor'), (3, 3, None)]
)
def test_on_a_mesh_each_device_has_its_rows_and_heads(heads, kv_heads, axis):
  """Also where there are fewer key heads than devices, or heads stay whole."""
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  rows = 'data', 'fsdp'
  segments = jax.device_put(
    jnp.tile(SEGMENTS, (2, 1)), NamedSharding(mesh, PartitionSpec(rows))
  )
  where = attention.Positions.full(segments, segments)
  qkv = arrays(heads=heads, kv_heads=kv_heads, batch=4)
  with jax.set_mesh(mesh):
    placed = jax.device_put(qkv, NamedSharding(mesh, PartitionSpec(rows)))
    assert_equal_to_xla(placed, where.mask_BTS, where.pattern, segments > 0)
    out_BTNH = jax.jit(
      lambda *qkv: kernels.attend(
        'splash', *qkv, where.mask_BTS, where.pattern, scale=0.3
      )
    )(*placed)
  part = 1, T, heads // (1 if axis is None else 2), 16
  assert {s.data.shape for s in out_BTNH.addressable_shards} == {part}


# --- Models ------------------------------------------------------------------

ANCHOR = dataclasses.replace(
  tiny.ANCHOR, num_layers=2, **tiny.FAMILIES['gemma2']
)
AUGMENTING = dataclasses.replace(tiny.AUGMENTING, num_layers=2)
MAPPING = tiny.connection(0, 1), tiny.connection(1, 0)


def composed(kernel, **settings):
  model = tiny.composed(
    anchor=ANCHOR, augmenting={'code': AUGMENTING}, mapping=MAPPING, **settings
  )
  model.anchor = model.anchor.clone(kernel=kernel)
  model.augmenting['code'] = model.augmenting['code'].clone(kernel=kernel)
  return model


def packed_batch():
  segments = [[1] * 9 + [2] * 8 + [0] * 3, [0] * 4 + [1] * 16]
  return tiny.jnp_batch(tiny.batch_of(tiny.tokens((2, 20)), segments))


@pytest.mark.parametrize(
  'settings', [{'stack': 'loop'}, {'stack': 'scan', 'remat': True}], ids=str
)
def test_a_composed_model_and_its_gradient(settings):
  batch = packed_batch()
  found = []
  for kernel in ('xla', 'splash'):
    model = composed(kernel, **settings)
    params = toys.params(model)
    frozen = {k: v for k, v in params.items() if k != 'composition'}
    both = jax.value_and_grad(train_step.loss_fn, has_aux=True)
    trained = {'composition': params['composition']}
    (loss, _), gradient = jax.jit(
      lambda *trees, model=model, both=both: both(*trees, model=model)
    )(trained, frozen, batch)
    found.append((loss, jax.tree.leaves(gradient)))
    logits_BTV = jax.jit(model.__call__)(params, batch)
    found[-1] += (logits_BTV[batch['decoder_segment_ids'] > 0],)
  (loss, gradient, logits), (other_loss, other_gradient, other_logits) = found
  tiny.assert_close(other_logits, logits)
  assert_near(other_loss, loss)
  assert max(float(jnp.abs(g).max()) for g in gradient) > 0.01
  for actual, expected in zip(other_gradient, gradient, strict=True):
    assert_near(actual, expected)


def test_whole_sequences_run_in_the_kernel_and_steps_of_decoding_do_not(
  monkeypatch,
):
  patterns, original = [], kernels.attend

  def recorded(kernel, q, k, v, mask, pattern, **how):
    patterns.append(pattern)
    return original(kernel, q, k, v, mask, pattern, **how)

  monkeypatch.setattr(kernels, 'attend', recorded)
  model, batch = composed('splash'), packed_batch()
  params = jax.eval_shape(model.init_params, jax.random.key(0))
  assert not patterns
  params = toys.params(model)
  jax.eval_shape(model.__call__, params, batch)
  assert len(patterns) == 2 + 2 + len(MAPPING)
  assert None not in patterns  # no mask is read
  cache = model.empty_cache(batch=2, slots=20)
  tokens, positions = batch['decoder_input_tokens'], batch['decoder_positions']
  jax.eval_shape(model.extend, params, tokens, positions, cache)
  assert len(patterns) == 2 + 2 + len(MAPPING)


# --- cuDNN, of which no more than the call is tested without a GPU -----------


def half(qkv):
  return tuple(x.astype(jnp.bfloat16) for x in qkv)


@pytest.mark.parametrize('cut', [0, 1])
def test_cudnn_is_called_with_what_xla_computes(cut, monkeypatch):
  """And with even lengths: with a mask it takes no others."""
  asked, original = [], jax.nn.dot_product_attention

  def recorded(*args, implementation, **kwargs):
    asked.append(implementation)
    assert not any(x.shape[1] % 2 for x in args)
    return original(*args, implementation='xla', **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', recorded)
  where = attention.Positions.full(SEGMENTS, SEGMENTS)
  mask_BTS = where.mask_BTS.at[:, 30].set(False)
  qkv = half(arrays(heads=4, kv_heads=2))
  length = SEGMENTS.shape[1] - cut
  qkv = tuple(x[:, :length] for x in qkv)
  mask_BTS = mask_BTS[:, :length, :length]
  xla, cudnn = (
    attention.attend(
      *qkv, mask_BTS, scale=0.3, kernel=kernel, pattern=where.pattern
    )
    for kernel in ('xla', 'cudnn')
  )
  assert asked == ['cudnn']
  assert not cudnn[:, 30].any()
  # bfloat16 has 8 bits: weights are rounded once on either side.
  np.testing.assert_allclose(*map(np.float32, (cudnn, xla)), atol=0.03)


def test_cudnn_becomes_a_call_of_its_library(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as stablehlo

  monkeypatch.setattr(stablehlo, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(stablehlo, 'check_compute_capability', lambda _: True)
  monkeypatch.setattr(
    stablehlo, 'is_cuda_compute_capability_equal', lambda _: False
  )
  where = attention.Positions.full(SEGMENTS, SEGMENTS)

  def loss(*qkv):
    mask_BTS = where.mask_BTS
    return attention.attend(*qkv, mask_BTS, scale=0.3, kernel='cudnn').sum()

  traced = jax.jit(jax.grad(loss)).trace(*half(arrays(heads=4, kv_heads=2)))
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert '__cudnn$fmha' in text


@pytest.mark.parametrize(
  ('kernel', 'change', 'message'),
  [
    ('flash', {}, "'flash' is not one of"),
    ('splash', {'has_bias': True}, 'no relative-position bias'),
    ('cudnn', {'has_bias': True}, 'no relative-position bias'),
    ('cudnn', {'softcap': 50.0}, "soft-cap.*50.0.*Set .* = 'xla'"),
    ('cudnn', {'dtype': 'float32'}, "bfloat16 or float16.*'float32'"),
    ('splash', {'dtype': 'float16'}, "float32 or bfloat16.*'float16'"),
    ('cudnn', {'head_dim': 100}, 'head_dim = 100'),
    ('cudnn', {'head_dim': 264}, 'head_dim = 264'),
  ],
)
def test_what_a_kernel_cannot_do_is_refused(kernel, change, message):
  can = {'dtype': 'bfloat16', 'head_dim': 64}
  with pytest.raises(ValueError, match=message):
    kernels.check(kernel, **{**can, **change})
  if kernel in kernels.KERNELS:
    kernels.check(kernel, **can)
    kernels.check('xla', **{**can, **change})


def test_a_kernel_runs_where_it_can():
  kernels.check_backend('splash', 'tpu')
  kernels.check_backend('cudnn', 'gpu')
  kernels.check_backend('cudnn', 'none')  # of a plan
  kernels.check_backend('xla', 'gpu')
  with pytest.raises(ValueError, match='runs on tpu or cpu.*here are gpu'):
    kernels.check_backend('splash', 'gpu')
  with pytest.raises(ValueError, match='runs on gpu.*here are tpu'):
    kernels.check_backend('cudnn', 'tpu')


def described(config, kernel, **changes):
  return pretrained.ModelSpec(
    config=dataclasses.replace(config, **changes),
    vocabulary=toys.vocabulary(tiny.VOCAB),
    attention_kernel=kernel,
  )


@pytest.mark.parametrize(
  ('kernel', 'changes', 'message'),
  [
    ('cudnn', {**tiny.FAMILIES['gemma2'], 'dtype': 'bfloat16'}, 'soft-cap'),
    ('splash', tiny.ENCODERS['t5'], 'relative-position bias'),
    ('fast', {}, "attention_kernel = 'fast'"),
  ],
)
def test_a_model_is_refused_when_it_is_described(kernel, changes, message):
  with pytest.raises(ValueError, match=message):
    described(tiny.ANCHOR, kernel, **changes)


def test_each_tower_has_its_kernel_and_the_composition_its_anchors():
  model = assembly.build_model(
    described(tiny.ANCHOR, 'splash'),
    augmenting={'code': described(tiny.AUGMENTING, 'xla')},
    composition=tiny.composed().composition,
  )
  assert model.anchor.kernel == 'splash'
  assert model.augmenting['code'].kernel == 'xla'


def test_heads_of_the_composition_are_checked_too(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  changes = {'dtype': 'bfloat16', 'embed_dim': 24}
  with pytest.raises(ValueError, match='head_dim = 6'):
    assembly.build_model(
      described(tiny.ANCHOR, 'cudnn', **changes),
      augmenting={'code': described(tiny.AUGMENTING, 'xla')},
      composition=tiny.composed().composition,
    )


def test_only_training_splits_splash_over_devices(one_device):
  spec, composed_model = described(ANCHOR, 'splash'), composed('splash')
  for mesh, kernel in ((one_device, 'splash'), (sharding.make_mesh(), 'xla')):
    found = Model(composed_model, {}, spec=spec, mesh=mesh).composed
    assert found.anchor.kernel == kernel
    assert found.augmenting['code'].kernel == kernel
  assert composed_model.anchor.kernel == 'splash'


# --- TPU ---------------------------------------------------------------------


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="needs libtpu: pip install 'calm_jax[tpu]'",
)
@pytest.mark.parametrize('is_any_mask', [False, True])
def test_it_compiles_for_a_tpu(is_any_mask, monkeypatch):
  """Heads, soft-cap and windows of Gemma 2 9B, on four chips of a v5e."""
  from jax.experimental import topologies

  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  devices = topologies.get_topology_desc('v5e:2x2', 'tpu').devices
  mesh = sharding.make_mesh(data=2, tensor=2, devices=devices)
  rows, heads = PartitionSpec('data'), PartitionSpec('data', None, 'tensor')

  def struct(*shape, dtype='bfloat16', spec=heads):
    place = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def loss(q, k, v, segments):
    where = attention.Positions.full(segments, segments)
    pattern = where.pattern.replace(window=np.int32(512), windows=(512, None))
    return attention.attend(
      *(q, k, v, where.mask_BTS),
      scale=256**-0.5,
      softcap=50.0,
      kernel='splash',
      pattern=None if is_any_mask else pattern,
    ).sum(dtype=jnp.float32)

  key = struct(2, 1000, 8, 256)
  segments = struct(2, 1000, dtype='int32', spec=rows)
  with jax.set_mesh(mesh):
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    lowered = gradient.lower(struct(2, 1000, 16, 256), key, key, segments)
    text = lowered.compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3  # fwd, dq, dkv
  assert 'all-gather' not in text
  # Of a pattern, no mask is ever made.
  assert ('pred[1,1024,1024]' in text or 'pred[1,1000,1000]' in text) == (
    is_any_mask
  )
