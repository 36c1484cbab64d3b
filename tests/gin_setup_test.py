"""gin files: what is accepted, what is refused, and what each refusal says.

Run: pytest tests/gin_setup_test.py
"""

import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys

from flax import linen as nn
import jax
import numpy as np
import pytest

from calm_jax import assembly, evaluate, gin_setup, run_stages, train_state
from calm_jax.models import families, sizes
from calm_jax.tasks import key_value_tables
from tests import tiny, toys

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / 'gin').glob('experiments/**/*.gin'))


class Reached(Exception):
  """All checks are behind us, and nothing has been allocated."""


def stop(*args, **kwargs):
  raise Reached


@pytest.fixture
def donor(tmp_path):
  toys.model_directory(tmp_path / 'donor', tiny.ANCHOR)
  return tmp_path / 'donor'


@pytest.fixture
def run_file(tmp_path, donor):
  """A whole training run of a composition, without SeqIO."""
  file = tmp_path / 'run.gin'
  rows = tmp_path / 'rows.npz'
  np.savez(rows, **tiny.batch_of(tiny.tokens((16, 8))))
  file.write_text(f"""
MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = 20
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
train.model_dir = %MODEL_DIR
train.anchor = @pretrained_model()
train.augmenting = {{'code': @pretrained_model()}}
train.composition = @CompositionConfig()
train.make_batches = @npz_batches
train.train_steps = %TRAIN_STEPS
train.batch_size = %BATCH_SIZE
train.optimizer = @OptimizerConfig()
OptimizerConfig.learning_rate = %LEARNING_RATE
CompositionConfig.mapping = @LayerMapping.every()
LayerMapping.every.augmenting_stride = 2
pretrained_model.path = '{donor}'
npz_batches.path = '{rows}'
""")
  return file


def configure(file, *bindings, **settings):
  bindings = ("MODEL_DIR = '/nowhere'", *bindings)
  return gin_setup.configure(
    'train', gin_files=[str(file)], bindings=bindings, **settings
  )


# --- What is shipped ---------------------------------------------------------


def entry_of(file):
  """Which program a gin file is for: the one whose run file it includes."""
  text = file.read_text()
  run = re.search(r"^include 'runs/([a-z]+)", text, re.M)
  if run:
    return run[1]
  return entry_of(ROOT / 'gin' / re.search(r"^include '(.*)'", text, re.M)[1])


@pytest.mark.slow
@pytest.mark.parametrize('file', EXPERIMENTS, ids=lambda file: file.stem)
def test_every_shipped_experiment_builds(file, monkeypatch, tmp_path):
  """Up to the shapes and the shardings of all parameters."""
  bindings = ["MODEL_DIR = '/nowhere'"]
  if 'AUGMENTING_PATH = %gin.REQUIRED' in file.read_text():
    bindings += pieces_donor(tmp_path)
  if 'MAPPING = %gin.REQUIRED' in file.read_text():
    bindings += ['MAPPING = @LayerMapping.late()', 'LayerMapping.late.n = 1']
  for module, name in (
    (assembly, 'load_all'),  # a composition
    (train_state, 'shardings'),  # a decoder from scratch
    (evaluate, 'load_systems'),
  ):
    monkeypatch.setattr(module, name, stop)
  entry = gin_setup.configure(
    entry_of(file), gin_files=[str(file)], bindings=bindings
  )
  with pytest.raises(Reached):
    entry()


@pytest.mark.slow
@pytest.mark.parametrize('baseline', ['lora', 'finetuned', 'random', 'encoder'])
@pytest.mark.parametrize(
  'experiment',
  [
    'kv_quick_direct',
    'kv_quick_scratchpad',
    'kv_quick_direct_pieces',
    'kv_paper',
  ],
)
def test_every_baseline_is_one_file_more(
  experiment, baseline, monkeypatch, tmp_path
):
  """On any experiment, with the batches of the composition."""
  bindings = ["MODEL_DIR = '/nowhere'"]
  if experiment.endswith('pieces'):
    bindings += pieces_donor(tmp_path)
  if (experiment, baseline) == ('kv_paper', 'random'):
    pytest.skip('its augmenting model is random already')
  built, read = [], []
  build, build_readers = assembly.build_trained, assembly.build_readers

  def build_and_keep(*args, **kwargs):
    built.append((*build(*args, **kwargs), kwargs['augmenting']))
    return built[-1][:2]

  def readers_and_keep(*args, **kwargs):
    read.append(build_readers(*args, **kwargs))
    return read[-1]

  monkeypatch.setattr(assembly, 'build_trained', build_and_keep)
  monkeypatch.setattr(assembly, 'build_readers', readers_and_keep)
  monkeypatch.setattr(run_stages, 'load_frozen', stop)
  entry = gin_setup.configure(
    'train',
    gin_files=[f'experiments/{experiment}.gin', f'baselines/{baseline}.gin'],
    bindings=bindings,
  )
  with pytest.raises(Reached):
    entry()
  ((model, specs, described),) = built
  is_random = baseline == 'random' or experiment == 'kv_paper'
  weights = 'random' if is_random else 'pretrained'
  assert described['augmenting'].weights == weights
  is_encoder, is_alone = (
    baseline == 'encoder',
    baseline in ('lora', 'finetuned'),
  )
  assert model.prompt_only == ({'augmenting'} if is_encoder else set())
  assert (not model.connections, not specs) == (is_alone, is_alone)
  assert (model.lora is not None) == (baseline == 'lora')
  has_reader = is_encoder or experiment.endswith('pieces')
  assert set(read[0]) == ({'augmenting'} if has_reader else set())


def pieces_donor(directory):
  """Writes an m_A of another vocabulary; returns the binding that names it."""
  words = key_value_tables.pieces_vocabulary(key_value_tables.SIZES['quick'])
  config = dataclasses.replace(
    tiny.AUGMENTING, vocab_size=words.size, num_layers=3
  )
  toys.model_directory(directory, config, words=words)
  return [f"AUGMENTING_PATH = '{directory}'"]


@pytest.mark.parametrize('setting', [None, 'paper', 'no_positions'])
@pytest.mark.parametrize('place', ['early', 'even', 'middle', 'late'])
def test_every_ablation_is_one_file_more(place, setting, monkeypatch):
  built = []

  def keep_and_stop(*args, composition, **kwargs):
    built.append(composition)
    raise Reached

  monkeypatch.setattr(assembly, 'build_trained', keep_and_stop)
  settings = [f'ablations/{setting}.gin'] if setting else []
  entry = gin_setup.configure(
    'train',
    gin_files=[
      'experiments/kv_quick_ablation.gin',
      f'ablations/{place}.gin',
      *settings,
    ],
    bindings=["MODEL_DIR = '/nowhere'", 'CONNECTIONS = 3'],
  )
  with pytest.raises(Reached):
    entry()
  (composition,) = built
  kind = {'even': 'evenly_spaced'}.get(place, place)
  assert (composition.mapping.kind, composition.mapping.number) == (kind, 3)
  assert (composition.norm == 'none') == (setting == 'paper')
  assert (composition.position_encoding == 'none') == (setting is not None)


def test_no_baseline_is_forgotten():
  files = (ROOT / 'gin' / 'baselines').glob('*.gin')
  assert {file.stem for file in files} == {
    'lora',
    'finetuned',
    'random',
    'encoder',
  }


def test_there_are_experiments():
  assert EXPERIMENTS


PAIRS = {  # connections and trained parameters: those of the files' headers
  'gemma_7b_gemma_2b': (4, 176_185_344),
  'llama3_8b_llama3.2_1b': (4, 302_022_656),
  'llama3_70b_llama3_8b': (8, 2_416_050_176),
  'qwen3_8b_qwen3_0.6b': (7, 499_179_520),
  'llama2_7b_tinyllama_1.1b': (5, 377_528_320),
}


@pytest.mark.slow
@pytest.mark.parametrize('pair', PAIRS)
def test_every_shipped_pair_builds(pair, tmp_path, monkeypatch):
  """Up to the shapes and shardings of all parameters, from real sizes."""
  file = ROOT / 'gin' / 'compositions' / f'{pair}.gin'
  written = re.findall(r"^(\w+)_SIZE = '(.*)'", file.read_text(), re.M)
  named = {who.lower(): size for who, size in written}
  for who, size in named.items():
    directory = tmp_path / who
    toys.vocabulary(64).save(directory)
    fields = families.config_to(
      sizes.config(size), model_type=sizes.model_type(size)
    )
    (directory / 'config.json').write_text(json.dumps(fields))
  built = []
  build = assembly.build_model

  def build_and_keep(*args, **kwargs):
    built.append(build(*args, **kwargs))
    return built[-1]

  monkeypatch.setattr(assembly, 'build_model', build_and_keep)
  monkeypatch.setattr(assembly, 'build_readers', stop)
  bindings = [
    f"ANCHOR_PATH = '{tmp_path}/anchor'",
    f"AUGMENTING_PATH = '{tmp_path}/augmenting'",
    "anchor/pretrained_model.weights = 'random'",
    "AUGMENTING_WEIGHTS = 'random'",
    "MODEL_DIR = '/nowhere'",
    "MIXTURE_OR_TASK_NAME = 'any'",
    "TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 8}",
    'TRAIN_STEPS = 10',
    'BATCH_SIZE = 8',
    "train.stack = 'scan'",
  ]
  entry = gin_setup.configure(
    'train', gin_files=['runs/train.gin', str(file)], bindings=bindings
  )
  with pytest.raises(Reached):
    entry()
  model = built[0]
  shapes = nn.unbox(jax.eval_shape(model.init_params, jax.random.key(0)))

  def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

  assert (len(model.connections), count(shapes['composition'])) == PAIRS[pair]
  assert count(shapes['anchor']) == sizes.parameters(named['anchor'])
  tower = shapes['augmenting']['augmenting']
  assert count(tower) == sizes.parameters(named['augmenting'])

  # The other way round, each directory is of the wrong size.
  swapped = [
    f"ANCHOR_PATH = '{tmp_path}/augmenting'",
    f"AUGMENTING_PATH = '{tmp_path}/anchor'",
  ]
  entry = gin_setup.configure(
    'train',
    gin_files=['runs/train.gin', str(file)],
    bindings=[*bindings, *swapped],
  )
  with pytest.raises(ValueError, match=f'is not a {named["anchor"]}'):
    entry()


def test_no_pair_is_forgotten():
  files = (ROOT / 'gin').glob('compositions/*.gin')
  shipped = {file.stem for file in files if not file.stem.startswith('kv_')}
  assert shipped == set(PAIRS)


# --- What is accepted --------------------------------------------------------


def test_a_run_builds_and_tells_its_configuration(
  run_file, tmp_path, monkeypatch
):
  monkeypatch.setattr(run_stages, 'load_frozen', lambda *args, **kwargs: {})

  def summarize(directory):
    gin_setup.write_operative_config(directory)
    raise Reached

  directory = tmp_path / 'model_dir'
  bindings = [
    f"MODEL_DIR = '{directory}'",
    'LEARNING_RATE = 1',  # an int is a number
    'OptimizerConfig.clip_norm = None',
    'train.make_mesh = @make_mesh',
    'make_mesh.fsdp = 2',
    'TRAIN_STEPS = 30',
    'TRAIN_STEPS = 40',  # the last one counts
  ]
  with pytest.raises(Reached):
    configure(run_file, *bindings)(summarize_config=summarize)
  text = (directory / 'config.gin').read_text()
  assert 'TRAIN_STEPS = 40' in text
  assert 'make_mesh.fsdp = 2' in text
  assert 'OptimizerConfig.learning_rate = %LEARNING_RATE' in text
  # What was written can be run again.
  again = configure(directory / 'config.gin', bindings[0])
  with pytest.raises(Reached):
    again(summarize_config=stop)


@pytest.mark.parametrize('absolute', [True, False])
def test_files_are_sought_in_the_search_paths(absolute, tmp_path, run_file):
  folder = tmp_path / 'my_configs'
  (folder / 'deep').mkdir(parents=True)
  (folder / 'deep' / 'inner.gin').write_text(run_file.read_text())
  (folder / 'outer.gin').write_text(
    "include 'deep/inner.gin'  # a comment\nTRAIN_STEPS = 7\n"
  )
  path = str(folder / 'outer.gin') if absolute else 'outer.gin'
  configure(path, search_paths=['/nowhere', str(folder)])
  assert gin_setup.gin.query_parameter('TRAIN_STEPS/gin.macro.value') == 7
  with pytest.raises(ValueError, match=r'inner.gin|outer.gin'):
    configure(path, search_paths=['/nowhere'])


def test_files_may_lie_in_an_importable_folder(tmp_path, run_file, monkeypatch):
  """gin's own include takes 'configs_of_mine/a.gin' for a module."""
  folder = tmp_path / 'configs_of_mine'
  folder.mkdir()
  (folder / '__init__.py').write_text('')
  (folder / 'inner.gin').write_text(run_file.read_text())
  outer = tmp_path / 'outer.gin'
  outer.write_text("include 'configs_of_mine/inner.gin'")
  monkeypatch.syspath_prepend(str(tmp_path))
  configure(outer, search_paths=[str(tmp_path)])


def test_the_shipped_files_are_found_by_their_short_names():
  assert gin_setup.find_gin_file('runs/train.gin', []).is_file()


# --- What is refused ---------------------------------------------------------


@pytest.mark.parametrize(
  ('binding', 'message'),
  [
    # Names.
    ('TRAIN_STEP = 5', 'The macro TRAIN_STEP is set, .* Did you mean TRAIN_S'),
    ('train.batchsize = 8', r'--gin.train.batchsize=8: .*batchsize'),
    ('trian.batch_size = 8', 'trian'),
    ('make_mesh.fsdp = 2', r'make_mesh.fsdp is set, and train does not us'),
    ('evaluate.random_seed = 8', 'evaluate.random_seed is set, and train does'),
    (
      'OptimizerConfig.weight_decay = %Z_LOSS',
      'The macro .*Z_LOSS.* is used and not set',
    ),
    (
      'npz_batches.path = %gin.REQUIRED',
      r'npz_batches.path is required and no',
    ),
    ('MODEL_DIR = %gin.REQUIRED', r"MODEL_DIR is required .*--gin.MODEL_DIR='"),
    ('BATCH_SIZE 8', '--gin.BATCH_SIZE 8: '),
    # Types.
    ("TRAIN_STEPS = '5'", "train.train_steps = '5' has the wrong type: .* int"),
    ('TRAIN_STEPS = 5.0', 'train.train_steps = 5.0 has the wrong type'),
    ('TRAIN_STEPS = True', 'train.train_steps = True has the wrong type'),
    ("LEARNING_RATE = 'fast'", "learning_rate = 'fast' has .* expected float"),
    ('LEARNING_RATE = None', 'learning_rate = None has the wrong type'),
    ('MODEL_DIR = 3', 'train.model_dir = 3 has .* expected str'),
    ('train.trainable = "all"', "train.trainable = 'all' .*Literal.*'anchor'"),
    ('train.export_dtype = 16', 'export_dtype = 16 has the wrong type'),
    ('train.augmenting = 3', 'train.augmenting = 3 has the wrong type'),
    ('OptimizerConfig.b1 = (1,)', r'b1 = \(1,\) has .* expected float'),
  ],
)
def test_a_wrong_binding_is_refused(binding, message, run_file):
  with pytest.raises(ValueError, match=message):
    configure(run_file, binding)


def test_a_boolean_must_be_one(run_file):
  text = run_file.read_text().replace('npz_batches', 'seqio_batches')
  text = text.replace('seqio_batches.path', 'seqio_batches.split')
  run_file.write_text(
    text
    + "seqio_batches.mixture_or_task_name = 'a'\n"
    + "seqio_batches.task_feature_lengths = {'targets': 3}\n"
  )
  configure(run_file, 'seqio_batches.pack = False')
  with pytest.raises(ValueError, match='pack = 1 has .* expected bool'):
    configure(run_file, 'seqio_batches.pack = 1')
  with pytest.raises(ValueError, match="truncate = 'cut' has the wrong type"):
    configure(run_file, "seqio_batches.truncate = 'cut'")


def test_what_is_missing_is_named(run_file, tmp_path):
  text = run_file.read_text()
  run_file.write_text(text.replace('train.batch_size', '# train.batch_size'))
  with pytest.raises(ValueError, match='macro BATCH_SIZE is set, and nothing'):
    configure(run_file)
  run_file.write_text(
    text.replace('train.make_batches', '# ').replace('npz_batches', '# ')
  )
  with pytest.raises(ValueError, match=r'train.make_batches is not set'):
    configure(run_file)
  with pytest.raises(
    ValueError, match=r"'no.gin' was not found. Tried: no.gin"
  ):
    configure('no.gin')
  run_file.write_text("include 'runs/no.gin'")
  with pytest.raises(ValueError, match=r"'runs/no.gin' was not found. Tried:"):
    configure(run_file)


def test_a_syntax_error_names_file_and_line(run_file):
  run_file.write_text("include 'runs/train.gin'\n\nTRAIN_STEPS = = 3\n")
  with pytest.raises(ValueError, match=r'run.gin: .*(?s:.)*line 3'):
    configure(run_file)


# --- Command line ------------------------------------------------------------


@pytest.mark.entry
@pytest.mark.slow
def test_a_mistake_on_the_command_line_is_one_line(run_file, tmp_path):
  command = [sys.executable, '-m', 'calm_jax.train', f'--gin_file={run_file}']
  flags = [
    f"--gin.MODEL_DIR='{tmp_path}/a=b'",  # a value may hold an equals sign
    '--gin.TRAIN_STEPS=3',
    '--gin.TRAIN_STEPS=-1',  # the last one counts
  ]
  done = subprocess.run(
    command + flags, capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 1
  assert 'error: TRAIN_STEPS = -1: it must be at least 1.' in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'a=b').exists()
