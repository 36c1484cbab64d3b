"""What the main job does with finished stages of other inputs.

Run: pytest tests/launch_test.py
"""

import importlib
import json
import pathlib
import sys

import pytest

from calm_jax import gin_setup

LAUNCH = pathlib.Path(__file__).parent.parent / 'launch'


@pytest.fixture
def kv_quick(monkeypatch):
  monkeypatch.syspath_prepend(str(LAUNCH))
  return importlib.import_module('kv_quick')


def test_the_inputs_are_both_donors_and_the_gin_files(kv_quick):
  names = [
    file.relative_to(LAUNCH.parent).as_posix() for file in kv_quick.inputs()
  ]
  assert sum(name.endswith('model.safetensors') for name in names) == 2
  for name in ('experiments/kv_quick_direct', 'runs/train', 'models/kv_quick'):
    assert f'gin/{name}.gin' in names


def test_finished_stages_of_other_inputs_are_refused(kv_quick, tmp_path):
  settings, out = tmp_path / 'a.gin', tmp_path / 'out'
  settings.write_text('A = 1')
  kv_quick.refuse_changed([settings], out)
  kv_quick.refuse_changed([settings], out)
  settings.write_text('A = 2')
  with pytest.raises(SystemExit, match='have changed since .*out was begun'):
    kv_quick.refuse_changed([settings], out)
  settings.write_text('A = 1')
  kv_quick.refuse_changed([settings], out)


def test_a_seed_is_named_once(kv_quick, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['kv_quick', '--seeds=0,1,0'])
  with pytest.raises(SystemExit):
    kv_quick.main()
  assert '--seeds=0,1,0 names a seed twice' in capsys.readouterr().err


def test_donors_that_are_not_shipped_are_trained_first(kv_quick, tmp_path):
  def names(chains):
    return [[stage.name for stage in chain] for chain in chains]

  assert kv_quick.donor_chains(tmp_path, None, ()) == ([], {})
  chains, macros = kv_quick.donor_chains(tmp_path, 'augmenting_pieces', ())
  assert names(chains) == [['augmenting_pieces']]
  assert macros == {
    'AUGMENTING_PATH': str(tmp_path / 'donors' / 'augmenting_pieces' / 'model')
  }
  chains, both = kv_quick.donor_chains(
    tmp_path, 'augmenting', kv_quick.ANCHOR_PARTS
  )
  assert names(chains) == [['augmenting'], ['anchor', 'anchor_final']]
  first, last = chains[1]
  flag = f'--gin.ANCHOR_PATH={str(first.products[0].parent)!r}'
  assert flag in last.command and flag not in first.command
  assert both['ANCHOR_PATH'].endswith('anchor_final/model')
  assert both['AUGMENTING_PATH'].endswith('augmenting/model')


def settings_of(stage):
  """What the flags of a stage configure."""
  files, bindings = [], []
  for flag in stage.command[3:]:
    name, _, value = flag.partition('=')
    if name == '--gin_file':
      files.append(value)
    else:
      bindings.append(f'{name.removeprefix("--gin.")} = {value}')
  entry = stage.command[2].removeprefix('calm_jax.')
  return gin_setup.configure(entry, gin_files=files, bindings=bindings)


def test_every_stage_of_every_column_is_configured(kv_quick, tmp_path):
  products = set()
  for baseline in (None, *kv_quick.BASELINES):
    for answer in kv_quick.FORMATS:
      for stage in kv_quick.chain_of(
        tmp_path, 3, answer, {}, baseline=baseline
      ):
        settings_of(stage)
        products.add(stage.products[0].relative_to(tmp_path).as_posix())
  assert len(products) == 2 * 2 * 6
  assert {
    'direct_seed3/composition.safetensors',
    'lora_direct_seed3/lora.safetensors',
    'finetuned_scratchpad_seed3/model/model.safetensors',
    'random_direct_seed3/eval/results.json',
  } < products


def test_the_report_has_all_columns(kv_quick, tmp_path):
  said = tmp_path / 'direct_seed0/eval/kv_arithmetic_quick/held_out/composed'
  said.mkdir(parents=True)
  row = {'inputs': 'ab + c =', 'outputs': ['8']}
  (said / 'predictions.jsonl').write_text(json.dumps(row) + '\n')
  stage = kv_quick.report_of(tmp_path, 'direct', [0, 1], {})
  settings_of(stage)
  columns = [one for one in stage.command if one.startswith('--gin.COLUMNS')]
  assert 'lora_direct_seed1' in columns[0]
  assert columns[0].count('_seed0') == 6
  assert "--gin.PROMPT='ab + c ='" in stage.command
