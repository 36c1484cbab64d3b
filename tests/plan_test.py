"""What is planned is what is run: bytes, FLOPs, and what would make it fit.

Run: pytest tests/plan_test.py
"""

import dataclasses
import functools
import importlib.util
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax import (
  assembly,
  batches,
  flops,
  gin_setup,
  optimizers,
  plan,
  quantization,
  sharding,
  train_state,
  train_step,
)
from calm_jax import run_stages as stages
from calm_jax.connections import CompositionConfig, LayerMapping
from calm_jax.models import pretrained
from calm_jax.planning import chips, figures, layout, moves, traced
from calm_jax.quantization import QuantizationConfig
from tests import tiny, toys

LENGTHS = {'inputs': 40, 'targets': 24}
INT8 = importlib.util.find_spec('qwix') is not None
V5E = chips.get('v5e')


def blank_batches(*, shapes_only=False, **run):
  assert shapes_only, 'plan must not read data'
  return batches.blank(LENGTHS, **run)


def spec(config, **settings):
  """A model whose sizes eight devices divide."""
  return pretrained.ModelSpec(
    config=dataclasses.replace(
      config, vocab_size=64, num_heads=8, num_kv_heads=8, head_dim=8, **settings
    ),
    vocabulary=toys.vocabulary(64),
  )


def settings(**changes):
  """What train.train would be called with."""
  chosen = {
    'model_dir': 'nowhere',
    'anchor': spec(tiny.ANCHOR, embed_dim=64, mlp_dim=96),
    'augmenting': {'code': spec(tiny.AUGMENTING, embed_dim=32, mlp_dim=64)},
    'composition': CompositionConfig(mapping=LayerMapping.evenly_spaced(2)),
    'make_batches': blank_batches,
    'train_steps': 10,
    'batch_size': 16,
    **changes,
  }
  return layout.complete(chosen)


def planned(chip='a100', num_devices=8, *, run=None, **arguments):
  return plan.plan(
    chip=chip,
    num_devices=num_devices,
    settings_of={'train': run or settings()}.get,
    **arguments,
  )


# --- Bytes -------------------------------------------------------------------


def held(tree):
  """Bytes that the first device really holds of a tree of arrays."""
  return sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == jax.devices()[0]
  )


AXES = {
  'data': {'data': 8},
  'mixed': {'data': 2, 'fsdp': 2, 'tensor': 2},
  'fsdp': {'fsdp': 8},
}


@pytest.mark.parametrize(
  ('stack', 'axes', 'optimizer', 'quantized'),
  [
    ('loop', 'data', 'adamw', False),
    ('scan', 'fsdp', 'adafactor', False),
    ('scan', 'mixed', 'adamw', INT8),
  ],
)
def test_bytes_are_those_that_a_run_holds(stack, axes, optimizer, quantized):
  """On eight simulated devices, for one configuration: all three exact."""
  run = settings(
    stack=stack, optimizer=optimizers.OptimizerConfig(name=optimizer)
  )
  if quantized:
    run['anchor'] = dataclasses.replace(
      run['anchor'], quantization=QuantizationConfig('int8')
    )
  if axes == 'mixed':
    code = dataclasses.replace(
      run['augmenting']['code'], axis_rules='replicated'
    )
    run['augmenting'] = {'code': code}
  mesh = sharding.make_mesh(**AXES[axes])
  found = layout.lay_out(run, chips.stand_ins(V5E, 8), axes=AXES[axes])

  # What train places, of zeros: its own functions, and no init to compile.
  model, specs = found.model, {'anchor': run['anchor'], **run['augmenting']}
  shapes, places = stages.describe(model, specs, mesh, 'composition')
  zeros = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
  towers = {'anchor': shapes['anchor'], **shapes['augmenting']}
  frozen = {
    name: assembly.place(
      zeros(towers[name]),
      assembly.places_of(one, model.tower(name), mesh),
      keep=functools.partial(quantization.quantize_leaf, one.quantization),
    )
    for name, one in specs.items()
  }
  update = run['optimizer'].make(10)
  create = functools.partial(train_state.create, optimizer=update, seed=0)
  wanted = jax.eval_shape(create, {'composition': shapes['composition']})
  state = jax.device_put(
    zeros(wanted), train_state.shardings(wanted, places, mesh)
  )
  batch = sharding.put_batch(batches.blank(LENGTHS, batch_size=16), mesh)
  assert found.bytes_per_device() == {
    'frozen': held(frozen),
    'trained': held(state.params),
    'optimizer': held(state.opt_state),
    'batch': held(batch),
  }


def test_a_decoder_that_is_trained_has_nothing_frozen():
  run = settings(trainable='anchor', augmenting=None, composition=None)
  found = layout.lay_out(run, chips.stand_ins(V5E, 1)).bytes_per_device()
  assert found['frozen'] == 0
  # Two Adam slots, and a counter in each of two transformations.
  assert found['optimizer'] == 2 * found['trained'] + 8


def test_blank_batches_are_shaped_as_those_of_a_run():
  example = {
    'inputs': [5, 6],
    'targets': [7],
    'readings': {'code': ([1, 2, 3], [0, 0, 1])},
  }
  lengths = {'inputs': 9, 'targets': 4, 'code': 11}
  for given in (lengths, LENGTHS):
    length, augmenting = batches.row_lengths(given, ['code'])
    real = next(
      batches.ExampleBatches(
        lambda start: iter([example] * 20),
        batch_size=3,
        length=length,
        pack=True,
        bos_id=2,
        augmenting_lengths=augmenting,
      )
    )
    blank = batches.blank(given, batch_size=3, readers=['code'])
    shape = lambda batch: {k: (v.shape, v.dtype) for k, v in batch.items()}
    assert shape(blank) == shape(real)


# --- The step ----------------------------------------------------------------


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('stack', ['loop', 'scan'])
def test_estimated_flops_are_the_least_and_what_is_declared(remat, stack):
  run = settings(remat=remat, stack=stack)
  found = layout.lay_out(run, chips.stand_ins(V5E, 4))
  step = figures.estimated(found)
  least = flops.least(found.model, found.shapes, found.batch, 'composition')
  if remat:
    least += flops.recomputed(found.model, found.shapes, found.batch)
  assert 0.97 <= 4 * step.flops / least <= 1.03


def test_estimated_memory_of_a_program():
  """What is elementwise is not stored, unless a product reads it."""

  def f(x, w, v):
    y = x @ w  # stored: y; not 2 * y, nor its exponential
    z = jax.nn.relu(jnp.exp(2 * y))  # stored: z, which a product reads
    return (z @ v).sum() + jnp.tanh(y).sum()

  shapes = [(8, 32), (32, 16), (16, 4)]
  args = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
  found = traced.usage(jax.make_jaxpr(f)(*args).jaxpr, traced.nbytes)
  y, z, product = 8 * 16 * 4, 8 * 16 * 4, 8 * 4 * 4
  assert found.peak == y + z + product
  assert found.flops == 2 * 8 * 32 * 16 + 2 * 8 * 16 * 4


def test_estimated_costs_of_a_loop():
  def f(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  shapes = [(8, 16), (5, 16, 16)]
  args = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
  found = traced.usage(jax.make_jaxpr(f)(*args).jaxpr, traced.nbytes)
  carry, matrix = 8 * 16 * 4, 16 * 16 * 4
  assert found.flops == 5 * 2 * 8 * 16 * 16
  # A matrix and a product, over which its tanh is written; the result has the
  # memory of what the step was given.
  assert found.peak == carry + matrix


def test_rematerialising_needs_less_memory():
  peaks = [
    figures.estimated(
      layout.lay_out(
        settings(remat=remat, stack='scan'), chips.stand_ins(V5E, 1)
      )
    ).temporaries
    for remat in (True, False)
  ]
  assert peaks[0] < 0.6 * peaks[1]


def compiled_here(run, axes):
  """The same step, compiled for eight simulated devices."""
  found = layout.lay_out(run, jax.devices(), axes=axes)
  return found, figures.compiled(found, V5E)


def test_estimated_collectives_are_near_those_compiled():
  """fsdp sends mainly weights: within a quarter of what XLA makes of it.

  With wide models on few tokens, else XLA rather sends activations.
  """
  run = settings(
    anchor=spec(tiny.ANCHOR, embed_dim=256, mlp_dim=512),
    augmenting={'code': spec(tiny.AUGMENTING, embed_dim=128, mlp_dim=256)},
    stack='scan',
    remat=True,
    batch_size=32,
  )
  found, step = compiled_here(run, {'fsdp': 8})
  estimated = figures.estimated(found)
  assert 0.75 <= estimated.sent / step.sent <= 1.33
  assert 0.97 <= estimated.flops / step.flops <= 1.03


# --- The report --------------------------------------------------------------


def test_the_report(capsys):
  result = planned(config='LEARNING_RATE = 0.5')
  text = capsys.readouterr().out
  for part in (
    'LEARNING_RATE = 0.5',
    'code: after block   1 of 4  ->  anchor: after block   1 of 5',
    'trainable params: ',
    'analytic: counted on the traced step, not compiled',
    'Predicted, never measured',
    'at 312 TFLOP/s',
    'fits: ',
  ):
    assert part in text
  row = re.search(r'anchor/block_\*/mlp/up/kernel +64x96 .*', text)[0].split()
  assert row[-3:] == ['5', f'{5 * 64 * 96 * 4:,}', f'{5 * 64 * 96 * 4:,}']
  predicted = result['prediction']
  assert predicted.compute == pytest.approx(result['flops'] / 8 / 312e12)
  assert predicted.mfu == pytest.approx(
    result['least_flops'] / (8 * 312e12 * predicted.seconds)
  )
  assert result['fits']


def test_mfu_is_against_what_is_needed():
  """A step that computes twice as much has half the MFU."""
  step = figures.Figures('', True, 0, 2e15, 0, {})
  h100 = chips.get('h100')
  found = plan.predict(step, 4e15, h100, 4)
  assert found.mfu == pytest.approx(0.5)
  slow = dataclasses.replace(step, moved=10 * 3350e9)
  assert plan.predict(slow, 4e15, h100, 4).seconds == pytest.approx(10)


# --- What does not fit -------------------------------------------------------


@pytest.fixture
def small_card(monkeypatch):
  """Returns a function that makes a card of so many bytes."""

  def make(memory):
    card = dataclasses.replace(chips.get('l4'), name='small', memory=memory)
    monkeypatch.setitem(chips.CHIPS, 'small', card)
    return card

  return make


def test_what_does_not_fit_says_what_would(small_card, capsys):
  run = settings(stack='scan')
  found = layout.lay_out(run, chips.stand_ins(V5E, 8))
  needed = sum(found.bytes_per_device().values())
  needed += figures.estimated(found).temporaries
  small_card(int(0.8 * needed))
  result = planned('small', run=run)
  text = capsys.readouterr().out
  assert not result['fits']
  assert f'does not fit: {needed:,} of {int(0.8 * needed):,} bytes' in text
  assert 'Largest: temporaries' in text
  said = dict(re.findall(r'^  (.*): ([\d,]+) bytes$', text, re.M))
  assert {
    'train.remat = True',
    'BATCH_SIZE = 8',
    'StepConfig.microbatches = 2',
  } <= set(said)
  # What it says is so.
  changed = settings(stack='scan', batch_size=8)
  again = layout.lay_out(changed, chips.stand_ins(V5E, 8))
  needed = sum(again.bytes_per_device().values())
  needed += figures.estimated(again).temporaries
  assert int(said['BATCH_SIZE = 8'].replace(',', '')) == needed
  assert planned('small', run=changed)['fits']
  assert 'plan.chip: l4 or' not in text or 'as it is' in text


def test_parameters_that_do_not_fit_are_split_or_quantised(small_card, capsys):
  run = settings(batch_size=8)
  found = layout.lay_out(run, chips.stand_ins(V5E, 8))
  held = found.bytes_per_device()
  card = small_card(int(0.7 * sum(held.values())))
  said = moves.that_fit(found, card, available=card.memory, scale=0.0)
  assert any(one.startswith('make_mesh.fsdp = 2:') for one in said)
  assert any('int8' in one for one in said) == INT8
  assert not any('remat' in one or 'BATCH' in one for one in said)


def test_nothing_helps(small_card, capsys):
  small_card(1000)
  assert not planned('small')['fits']
  text = capsys.readouterr().out
  assert 'plan.chip' in text and 'BATCH_SIZE' not in text


# --- Errors ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    ({'chip': 'v5'}, r"plan.chip = 'v5' is not one of \[.*'v5p'.*Did you mean"),
    ({'num_devices': 0}, 'plan.num_devices = 0: it must be at least 1'),
    ({'num_devices': 3}, r'BATCH_SIZE = 16 cannot be split over .*= 3'),
  ],
)
def test_errors_name_the_next_move(arguments, said):
  with pytest.raises(ValueError, match=said):
    planned(**{'chip': 'a100', 'num_devices': 8, **arguments})


def test_a_mesh_that_divides_nothing_is_an_error():
  run = settings(make_mesh=functools.partial(sharding.make_mesh, fsdp=3))
  with pytest.raises(ValueError, match='data=2 x fsdp=3 x tensor=1 needs 6'):
    planned(run=run)
  run['make_mesh'] = functools.partial(sharding.make_mesh, tensor=5)
  with pytest.raises(ValueError, match='of size .* cannot be split .*tensor'):
    planned(num_devices=5, run=run)


@pytest.mark.parametrize('count', [3, 12, 512])
def test_slices_that_there_are_not(count):
  with pytest.raises(
    ValueError, match=f'num_devices = {count}: a slice of v5e'
  ):
    chips.torus(V5E, count)


@pytest.mark.parametrize(
  ('chip', 'count', 'sides'),
  [
    ('v5e', 1, (1, 1, 1)),
    ('v5e', 8, (2, 4, 1)),
    ('v6e', 256, (16, 16, 1)),
    ('v4', 4, (2, 2, 1)),
    ('v5p', 256, (4, 8, 8)),
  ],
)
def test_slices_are_as_even_as_they_can_be(chip, count, sides):
  assert chips.torus(chips.get(chip), count) == sides
  assert math.prod(sides) == count


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'calm_jax\[plan\]'"):
    planned('v5e')
  assert planned('v5e', compile=False)['fits']


def test_a_refusal_of_the_compiler_is_read():
  error = figures.DoesNotFitError(
    'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 26.13G of'
    ' 15.75G hbm. Exceeded hbm capacity by 10.38G.'
  )
  assert error.needed == int(26.13 * 2**30)
  assert error.available == int(15.75 * 2**30)


# --- gin ---------------------------------------------------------------------


def run_by_gin(files, bindings):
  entry = gin_setup.configure('plan', gin_files=files, bindings=bindings)
  return entry(
    settings_of=gin_setup.settings_of, config=gin_setup.gin.config_str()
  )


CARD = ["plan.chip = 'rtx4090'", 'plan.num_devices = 1']


@pytest.mark.slow
@pytest.mark.skipif(not INT8, reason='needs qwix')
def test_a_shipped_plan_needs_no_files(tmp_path, monkeypatch, capsys):
  """Neither a directory nor data nor TensorFlow; and writes nothing."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, 'calm_jax.data', None)
  result = run_by_gin(['plans/int8_7b_1b.gin'], CARD)
  assert result['bytes']['trained'] == 377_528_320 * 4
  text = capsys.readouterr().out
  assert "ANCHOR_SIZE = 'llama2_7b'" in text  # the resolved configuration
  assert 'qvalue' in text
  assert result['fits']
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('bindings', 'said'),
  [
    (['BATCH_SIZES = 3'], 'macro BATCH_SIZES is set.*Did you mean BATCH_SIZE'),
    (['BATCH_SIZE = 3.5'], 'BATCH_SIZE = 3.5 has the wrong type|batch_size'),
    (['plan.chips = 1'], 'chips'),
    (['TRAIN_STEPS = 0', 'make_mesh.fsdp = 1'], 'TRAIN_STEPS = 0: it must'),
  ],
)
def test_the_gin_files_are_checked_as_for_training(bindings, said):
  with pytest.raises(ValueError, match=said):
    run_by_gin(['plans/gemma_7b_gemma_2b.gin'], [*CARD, *bindings])


def test_a_chip_must_be_named():
  with pytest.raises(ValueError, match='plan.chip is not set'):
    run_by_gin(['plans/gemma_7b_gemma_2b.gin'], [])


def test_a_model_by_its_size_alone_is_not_loaded():
  one = pretrained.pretrained_model(None, size='gemma_2b')
  assert one.config.embed_dim == 2048
  with pytest.raises(ValueError, match='it can be planned, not loaded'):
    pretrained.open_weights(one, {})
  with pytest.raises(ValueError, match='path = None and no size'):
    pretrained.pretrained_model(None)


# --- Ahead of time, for a TPU ------------------------------------------------

libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs libtpu'
)


@libtpu
@pytest.mark.slow
def test_a_tpu_is_compiled_for(capsys):
  """Its program computes what must be computed, and says what it sends."""
  wide = {'embed_dim': 256, 'mlp_dim': 512, 'num_layers': 2}
  run = settings(
    anchor=spec(tiny.ANCHOR, **wide, dtype='bfloat16'),
    augmenting={'code': spec(tiny.AUGMENTING, **wide, dtype='bfloat16')},
    composition=CompositionConfig(mapping=LayerMapping.evenly_spaced(1)),
    make_mesh=functools.partial(sharding.make_mesh, fsdp=2),
  )
  result = planned('v5e', 2, run=run)
  assert 'compiled for v5e ahead of time' in capsys.readouterr().out
  assert 0.95 <= result['flops'] / result['least_flops'] <= 1.05
  assert result['collectives'] and result['temporaries'] > 0
  assert result['fits']


@libtpu
@pytest.mark.slow
def test_a_tpu_that_is_too_small_says_so(capsys):
  """The compiler refuses, and that is a verdict."""
  big = spec(tiny.ANCHOR, embed_dim=8192, mlp_dim=98304, num_layers=1)
  run = settings(
    anchor=big, augmenting=None, composition=None, trainable='anchor'
  )
  result = planned('v5e', 1, run=run)
  text = capsys.readouterr().out
  assert not result['fits']
  assert 'the compiler refused it' in text and 'does not fit: ' in text


def test_the_step_that_is_planned_is_the_one_that_is_trained(monkeypatch):
  """plan takes the step from where train does, with the same settings."""
  taken = []
  make = train_step.make_train_step

  def keep(*arguments):
    taken.append(arguments)
    return make(*arguments)

  monkeypatch.setattr(train_step, 'make_train_step', keep)
  config = train_step.StepConfig(microbatches=2)
  planned(run=settings(step_config=config))
  model, _, given = taken[0]
  assert given == config and len(model.connections) == 2
