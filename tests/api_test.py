"""The Python interface: load, compose, use, save, load again.

Run: pytest tests/api_test.py
"""

import dataclasses
import functools
import json
import warnings

import jax
import numpy as np
import pytest

import calm_jax
from calm_jax import assembly, evaluate, sharding
from calm_jax.composition import ComposedLM
from calm_jax.models import pretrained
from tests import tiny, toys

ANCHOR = dataclasses.replace(tiny.ANCHOR, num_layers=2)
AUGMENTING = dataclasses.replace(tiny.AUGMENTING, num_layers=2)
MAPPING = calm_jax.LayerMapping.explicit([tiny.connection(0, 1)])


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
  root = tmp_path_factory.mktemp('models')
  toys.model_directory(root / 'anchor', ANCHOR)
  toys.model_directory(root / 'code', AUGMENTING)
  toys.model_directory(root / 'other', AUGMENTING, seed=1)
  return root


@pytest.fixture(scope='module')
def models(paths):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return {
    name: calm_jax.load_pretrained(paths / name, mesh=mesh)
    for name in ('anchor', 'code', 'other')
  }


def compose(models, **settings):
  return calm_jax.compose(
    anchor=models['anchor'],
    augmenting={'code': models['code']},
    mapping=MAPPING,
    **settings,
  )


@pytest.fixture(scope='module')
def trained(models):
  """A composition that says something."""
  return compose(models, output_init='fan_in', num_heads=2, seed=3)


# --- Use ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_fresh_composition_speaks_as_its_anchor(models):
  model = compose(models)
  tokens_BT = tiny.tokens((2, 5))
  expected_BTV = models['anchor'].logits(tokens_BT)
  np.testing.assert_array_equal(model.logits(tokens_BT), expected_BTV)
  prompts = ['a1 a2 a3 a4 a5', 'a7', 'a3 a1']
  settings = {'max_new_tokens': 4, 'batch_size': 2}
  texts = model.generate(prompts, **settings)
  assert texts == models['anchor'].generate(prompts, **settings)
  assert texts[1] == model.generate(prompts[1:2], **settings)[0]
  assert len(set(texts)) > 1
  assert all(set(text.split()) <= WORDS for text in texts)


WORDS = {f'a{i}' for i in range(tiny.VOCAB)} | {'<unk>'}


def test_describe(trained, models):
  connections, parameters = trained.describe().rsplit('\n', 1)
  assert (
    'code: after block   1 of 2  ->  anchor: after block   0' in connections
  )
  size = 24 * 32 + 4 * 32 * 32 + 2 * 32  # f_proj; q, k, v, o; two norms
  total = size + sum(
    x.size
    for name in ('anchor', 'code')
    for x in jax.tree.leaves(models[name].params)
  )
  assert parameters == (
    f'trainable params: {size:,} || all params: {total:,} || trainable%:'
    f' {100 * size / total:.2f}'
  )
  assert models['anchor'].describe().startswith('No connections')


def test_wrong_arguments(models, tmp_path):
  anchor = models['anchor']
  assert anchor.generate([]) == []
  with pytest.raises(ValueError, match='prompts is one text'):
    anchor.generate('a1')
  with pytest.raises(ValueError, match=r'shape \(3,\); expected \[batch, leng'):
    anchor.logits([1, 2, 3])
  with pytest.raises(ValueError, match='ids from 0 to 37; the embedding table'):
    anchor.logits([[1, tiny.VOCAB]])
  with pytest.raises(ValueError, match='has no composition'):
    anchor.save(tmp_path)
  with pytest.raises(ValueError, match="'post' is not one of"):
    compose(models, norm='post')
  with pytest.raises(ValueError, match='anchor_layer = 7 is out of range'):
    calm_jax.compose(
      anchor=anchor,
      augmenting={'code': models['code']},
      mapping=calm_jax.LayerMapping.explicit([tiny.connection(7, 0)]),
    )
  with pytest.raises(ValueError, match="cannot be called 'anchor'"):
    calm_jax.compose(
      anchor=anchor,
      augmenting={'anchor': models['code']},
      mapping=calm_jax.LayerMapping.every(),
    )
  for name in ('org/model', ''):
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
      calm_jax.compose(
        anchor=anchor,
        augmenting={name: models['code']},
        mapping=calm_jax.LayerMapping.every(),
      )
  with pytest.raises(AttributeError, match="calm_jax has no 'composee'"):
    _ = calm_jax.composee


def test_what_is_trained_beside_a_model_is_not_left_out_silently(
  trained, models, tmp_path
):
  updated = ComposedLM(
    models['anchor'].composed.anchor, lora=calm_jax.LoraConfig(rank=1)
  )
  lora = calm_jax.Model(updated, {}, spec=models['anchor'].spec, mesh=None)
  for wrong, message in ((lora, 'has LoRA updates'), (trained, 'is composed')):
    with pytest.raises(ValueError, match=f"compose: 'anchor' {message}"):
      compose({**models, 'anchor': wrong})
    with pytest.raises(ValueError, match=f"compose: 'code' {message}"):
      compose({**models, 'code': wrong})


# --- Save and load -----------------------------------------------------------


@pytest.mark.slow
def test_a_saved_composition_is_the_same_model(
  trained, models, paths, tmp_path
):
  trained.save(tmp_path)
  files = {path.name for path in tmp_path.iterdir()}
  assert files == {'calm_config.json', 'composition.safetensors', 'README.md'}
  card = (tmp_path / 'README.md').read_text()
  for name in ('anchor', 'code'):
    assert f'| `{models[name].fingerprint}` |' in card
  assert 'code: after block   1 of 2  ->  anchor: after block   0' in card
  assert "augmenting = {'code': ...}" in card
  for file in ('calm_config.json', 'README.md'):
    assert str(paths) not in (tmp_path / file).read_text()
  again = calm_jax.load_composition(
    tmp_path, anchor=models['anchor'], augmenting={'code': models['code']}
  )
  tokens_BT = tiny.tokens((2, 5))
  expected_BTV = trained.logits(tokens_BT)
  np.testing.assert_array_equal(again.logits(tokens_BT), expected_BTV)
  assert np.any(models['anchor'].logits(tokens_BT) != expected_BTV)

  # What `evaluate` and `infer` load of the same directory.
  specs = {
    name: pretrained.pretrained_model(paths / name)
    for name in ('anchor', 'code')
  }
  systems = evaluate.load_systems(
    model_dir=str(tmp_path),
    anchor=specs['anchor'],
    augmenting={'code': specs['code']},
    systems=['composed', 'code'],
  )
  assert list(systems) == ['composed', 'code']
  assert systems['composed'].fingerprints == trained.fingerprints
  assert systems['code'].fingerprint == models['code'].fingerprint
  theta = systems['composed'].params['composition']
  jax.tree.map(
    np.testing.assert_array_equal, theta, trained.params['composition']
  )


def test_evaluate_refuses_other_models_before_it_allocates(
  trained, paths, tmp_path, monkeypatch
):
  def allocate(*args, **kwargs):
    raise AssertionError('something was allocated')

  monkeypatch.setattr(evaluate.api, 'from_spec', allocate)
  anchor, code, other = (
    pretrained.pretrained_model(paths / name)
    for name in ('anchor', 'code', 'other')
  )

  def load(directory, augmenting, systems=('composed',)):
    evaluate.load_systems(
      model_dir=str(directory),
      anchor=anchor,
      augmenting={'code': augmenting},
      systems=systems,
    )

  with pytest.raises(ValueError, match='holds no calm_config.json'):
    load(tmp_path / 'nothing', code)
  trained.save(tmp_path)
  with pytest.raises(ValueError, match=r"vocabulary of 'code' are not those"):
    load(tmp_path, other)
  for directory, systems in ((tmp_path, ('composed',)), ('x', ('anchor',))):
    with pytest.raises(AssertionError, match='allocated'):  # all is well
      load(directory, code, systems)


def test_what_does_not_belong_together_is_refused(trained, models, tmp_path):
  trained.save(tmp_path)

  def load(**augmenting):
    calm_jax.load_composition(
      tmp_path, anchor=models['anchor'], augmenting=augmenting
    )

  with pytest.raises(ValueError, match=r"vocabulary of 'code' are not those"):
    load(code=models['other'])
  with pytest.raises(ValueError, match=r"the models \['anchor', 'code'\]; the"):
    load(math=models['code'])
  file = tmp_path / 'composition.safetensors'
  content = file.read_bytes()
  file.write_bytes(content[:-1])
  with pytest.raises(
    ValueError, match='composition.safetensors cannot be read'
  ):
    load(code=models['code'])
  file.unlink()
  with pytest.raises(ValueError, match='the run has not ended'):
    load(code=models['code'])
  config = tmp_path / 'calm_config.json'
  fields = json.loads(config.read_text())
  fields['composition']['num_heads'] = 5
  config.write_text(json.dumps(fields))
  file.write_bytes(content)
  with pytest.raises(ValueError, match='width 32 into num_heads = 5'):
    load(code=models['code'])
  for broken in ({'composition': {}}, {**fields, 'connections': [{'to': 3}]}):
    config.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match='is not what this version writes'):
      load(code=models['code'])
  config.unlink()
  with pytest.raises(ValueError, match='holds no calm_config.json'):
    load(code=models['code'])


def test_tokens_that_an_augmenting_model_sees_in_part_are_told():
  class Reader:
    def count_too_long(self, row):
      return row.count(5)

  class Composed:
    readers = {'code': Reader()}

  with pytest.warns(UserWarning, match="3 tokens stand for more .* 'code'"):
    calm_jax.Model._warn_of_cuts(Composed, [[5, 1], [5, 5]])
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    calm_jax.Model._warn_of_cuts(Composed, [[1, 2]])


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_weights_of_sixteen_bits_are_not_trained(dtype):
  spec = pretrained.ModelSpec(
    config=dataclasses.replace(ANCHOR, param_dtype=dtype),
    vocabulary=toys.vocabulary(tiny.VOCAB),
  )
  build = functools.partial(
    assembly.build_trained,
    'anchor',
    augmenting={},
    composition=None,
    lora=None,
    stack='loop',
    remat=False,
  )
  with pytest.raises(ValueError, match=f'ANCHOR keeps its weights in {dtype}'):
    build(spec)
  build(dataclasses.replace(spec, config=ANCHOR))


def test_an_unknown_system_is_named(paths):
  with pytest.raises(
    ValueError, match=r"\['coed'\]; choose from \['anchor', 'c"
  ):
    evaluate.load_systems(
      model_dir='/nowhere',
      anchor=pretrained.pretrained_model(paths / 'anchor'),
      augmenting={'code': pretrained.pretrained_model(paths / 'code')},
      systems=['coed'],
    )
