"""What the main job does with finished stages of other inputs.

Run: pytest tests/launch_test.py
"""

import importlib
import pathlib

import pytest

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


def test_donors_that_are_not_shipped_are_trained_first(
  kv_quick, tmp_path, monkeypatch
):
  asked = []
  monkeypatch.setattr(
    kv_quick, 'run', lambda stages: asked.append([s.name for s in stages])
  )
  assert kv_quick.train_donors(tmp_path, None, ()) == {}
  assert not any(asked)
  asked.clear()
  macros = kv_quick.train_donors(tmp_path, 'augmenting_pieces', ())
  assert asked == [['augmenting_pieces']]
  assert macros == {
    'AUGMENTING_PATH': str(tmp_path / 'donors' / 'augmenting_pieces' / 'model')
  }
  both = kv_quick.train_donors(tmp_path, 'augmenting', kv_quick.ANCHOR_PARTS)
  assert both['ANCHOR_PATH'].endswith('anchor_final/model')
  assert both['AUGMENTING_PATH'].endswith('augmenting/model')
