"""The mesh, and where each model's parameters go.

Run: pytest tests/sharding_test.py
"""

import dataclasses
import types

import jax
import numpy as np
import pytest

import calm_jax
from calm_jax import assembly, sharding
from calm_jax.models import pretrained
from tests import tiny, toys


def test_a_mesh_has_all_devices_once():
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert set(mesh.devices.flat) == set(jax.devices())


def test_the_data_axis_alone_reaches_over_slices():
  """Two slices of four: fsdp and tensor stay within one."""

  def device(index):
    return types.SimpleNamespace(
      id=index,
      process_index=index // 4,
      slice_index=index // 4,
      platform='cpu',
      device_kind='cpu',
    )

  devices = [device(index) for index in range(8)]
  grid = sharding.arrange(devices, data=4, fsdp=2, tensor=1, slices=2)
  slices = np.vectorize(lambda one: one.slice_index)(grid)
  assert slices.shape == (4, 2, 1)
  assert np.ptp(slices[:2]) == np.ptp(slices[2:]) == 0
  assert slices[0, 0, 0] != slices[2, 0, 0]


@pytest.mark.parametrize('slices', [0, 3])
def test_slices_must_divide_the_data_axis(slices):
  with pytest.raises(ValueError, match=f'slices = {slices} does not divide'):
    sharding.make_mesh(data=4, fsdp=2, slices=slices)


def describe(directory, config, **settings):
  toys.model_directory(directory, config)
  return pretrained.pretrained_model(directory, **settings)


def parts(params):
  """The shape of each leaf's part on one device, and of the whole leaf."""
  return [
    (x.sharding.shard_shape(x.shape), x.shape) for x in jax.tree.leaves(params)
  ]


EVEN = dataclasses.replace(tiny.ANCHOR, vocab_size=38)


def test_one_model_whole_everywhere_and_another_split(tmp_path):
  config = EVEN
  specs = {
    'split': describe(tmp_path / 'a', config),
    'whole': describe(tmp_path / 'b', config, axis_rules='replicated'),
    'partly': describe(tmp_path / 'c', config, axis_rules={'embed': None}),
  }
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  tower = assembly.build_tower(config)
  loaded = {
    name: parts(assembly.load(spec, tower, mesh=mesh).params)
    for name, spec in specs.items()
  }
  assert any(part != whole for part, whole in loaded['split'])
  assert all(part == whole for part, whole in loaded['whole'])
  sizes = {
    name: sum(int(np.prod(part)) for part, _ in leaves)
    for name, leaves in loaded.items()
  }
  assert sizes['split'] < sizes['partly'] < sizes['whole']


@pytest.mark.slow
def test_a_replicated_augmenting_model_changes_no_logit(tmp_path):
  # The mesh would not divide its table; whole, it need not.
  odd = dataclasses.replace(tiny.AUGMENTING, vocab_size=39)
  toys.model_directory(tmp_path / 'anchor', EVEN)
  toys.model_directory(tmp_path / 'code', odd)
  mapping = calm_jax.LayerMapping.explicit([tiny.connection(0, 1)])
  tokens_BT = tiny.tokens((4, 6))

  def logits(mesh, **rules):
    model = calm_jax.compose(
      anchor=calm_jax.load_pretrained(tmp_path / 'anchor', mesh=mesh),
      augmenting={
        'code': calm_jax.load_pretrained(tmp_path / 'code', mesh=mesh, **rules)
      },
      mapping=mapping,
      output_init='fan_in',
    )
    return np.asarray(model.logits(tokens_BT))

  one = sharding.make_mesh(devices=jax.devices()[:1])
  eight = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  np.testing.assert_allclose(
    logits(eight, axis_rules='replicated'), logits(one), rtol=0, atol=1e-5
  )


def test_rules_that_there_are_not():
  for rules, message in (
    ({'embedd': None}, "axis_rules has 'embedd': None; the axes are"),
    ({'embed': 'fdsp'}, "'embed': 'fdsp'.* can go to"),
    ('whole', "axis_rules = 'whole': expected 'replicated' or a mapping"),
  ):
    with pytest.raises(ValueError, match=message):
      sharding.rules_of(rules)
