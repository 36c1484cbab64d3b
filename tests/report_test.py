"""A report of small runs written by hand, in the real formats.

Run: pytest tests/report_test.py
"""

import base64
import dataclasses
import html.parser
import io
import json
import re

import matplotlib.image
import numpy as np
import pytest

import calm_jax
from calm_jax import api, gin_setup, report, sharding
from calm_jax.models import pretrained
from calm_jax.reporting import page, pictures, scores
from calm_jax.reporting import runs as runs_lib
from tests import tiny, toys

SUM, KEYS = 'sums/test', 'keys/held_out'
FINGERPRINTS = {'anchor': 'a' * 64, 'augmenting': 'b' * 64}
COMPOSITION = {
  'num_heads': None,
  'norm': 'rms',
  'output_init': 'zeros',
  'gate': 'none',
  'gate_bias': 0.0,
  'position_encoding': 'rotary',
  'augmenting_context': 'all',
  'tokens_per_anchor_token': 8,
  'param_dtype': 'float32',
}


def write_weights(file, **tensors):
  """Writes safetensors of zeros: a header, then bytes."""
  header, at = {}, 0
  for name, shape in tensors.items():
    size = 4 * int(np.prod(shape))
    header[name] = {
      'dtype': 'F32',
      'shape': shape,
      'data_offsets': [at, at + size],
    }
    at += size
  head = json.dumps(header).encode()
  file.write_bytes(len(head).to_bytes(8, 'little') + head + bytes(at))


def write_run(
  directory, *, kind='composed', losses=(4.0, 2.0), layers=(0, 2), **results
):
  """Writes a run; `results` are {'task/split': score} by system."""
  directory.mkdir(parents=True)
  connections = [
    {'anchor_layer': j, 'augmenting_layer': 1, 'augmenting': 'augmenting'}
    for j in layers
  ]
  config = {
    'composed': {'composition': COMPOSITION, 'connections': connections},
    'lora': {'lora': {'rank': 3, 'alpha': None}},
  }
  if kind in config:
    (directory / 'calm_config.json').write_text(
      json.dumps(config[kind] | {'fingerprints': FINGERPRINTS})
    )
  if kind == 'composed':
    write_weights(directory / 'composition.safetensors', a=[5, 200], b=[234])
  elif kind == 'lora':
    write_weights(directory / 'lora.safetensors', a=[5, 7])
  else:
    toys.model_directory(directory / 'model', tiny.ANCHOR)
  rows = [
    {
      'step': 1 if not i else 50 * i,
      'train/loss': loss,
      'train/accuracy': 0.5,
    }
    for i, loss in enumerate(losses)
  ]
  for row in rows[1:]:
    row |= {'train/tokens_per_second': 1000.0 * row['step'] / 50}
    row |= {'train/flops_per_step': 2e9}
  rows.append({'step': rows[-1]['step'], f'eval/{KEYS}/exact_match': 1.0})
  (directory / 'metrics.jsonl').write_text(
    ''.join(json.dumps(row) + '\n' for row in rows)
  )
  (directory / 'config.gin').write_text("MODEL_DIR = '<b>&amp;'\n")
  if results:
    (directory / 'eval').mkdir()
    written = {
      system: {
        row: {
          'num_examples': 40,
          'signature': 'v1',
          'correct': 7,
          'exact_match': value,
          'other': 3 * value,
        }
        for row, value in tasks.items()
      }
      for system, tasks in results.items()
    }
    (directory / 'eval' / 'results.json').write_text(json.dumps(written))
  return str(directory)


@pytest.fixture
def columns(tmp_path):
  frozen = {'anchor': {SUM: 90.0, KEYS: 0.0}, 'augmenting': {KEYS: 30.0}}
  return {
    'CALM': (
      write_run(tmp_path / 'c0', **frozen, composed={SUM: 88.0, KEYS: 70.0}),
      write_run(
        tmp_path / 'c1',
        losses=(6.0, 3.0),
        **frozen,
        composed={SUM: 85.0, KEYS: 74.0},
      ),
    ),
    'LoRA': (
      write_run(
        tmp_path / 'l0', kind='lora', layers=(), lora={SUM: 50.0, KEYS: 10.0}
      ),
    ),
    'fully fine-tuned': (
      write_run(
        tmp_path / 'f0',
        kind='finetuned',
        anchor={SUM: 91.0},
        finetuned={SUM: 95.0, KEYS: 12.5},
      ),
    ),
  }


class Page(html.parser.HTMLParser):
  """The cells of each row, sources of resources, and whether tags match."""

  VOID = {'meta', 'img', 'wbr', 'link', 'br'}

  def __init__(self, text):
    super().__init__()
    self.tables, self.images, self.text, self.tags = [], [], '', []
    self.open, self.best = [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.tags.append((tag, attributes))
    if tag not in self.VOID:
      self.open.append(tag)
    if tag == 'img':
      self.images.append(attributes['src'])
    if tag == 'table':
      self.tables.append([])
    if tag == 'tr':
      self.tables[-1].append([])
      self.best.append([])
    if tag in ('td', 'th'):
      self.tables[-1][-1].append('')
      self.best[-1].append(attributes.get('class') == 'best')
    if tag == 'small' and self.tables:
      self.tables[-1][-1][-1] += ' | '

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data
    if 'td' in self.open or 'th' in self.open:
      self.tables[-1][-1][-1] += data


def make(tmp_path, columns, **settings):
  file = report.report(
    output_dir=str(tmp_path / 'out'), columns=columns, **settings
  )
  return Page(file.read_text(encoding='utf-8')), file


def test_scores_forgetting_and_costs_are_those_computed_by_hand(
  tmp_path, columns
):
  page, _ = make(tmp_path, columns, anchor_tasks=(SUM,))
  table, forgetting, costs = page.tables
  assert table == [
    ['', 'm_A', 'm_B', 'CALM', 'LoRA', 'fully fine-tuned'],
    [
      f'{SUM} | exact_match, 40 examples',
      '— | not measured',
      '90.0 | n = 1',  # one frozen model, evaluated twice
      '86.5 ± 2.1 | n = 2',  # sqrt(1.5^2 + 1.5^2)
      '50.0 | n = 1',
      '95.0 | n = 1',
    ],
    [
      f'{KEYS} | exact_match, 40 examples',
      '30.0 | n = 1',
      '0.0 | n = 1',
      '72.0 ± 2.8 | n = 2',
      '10.0 | n = 1',
      '12.5 | n = 1',
    ],
  ]
  assert page.best[1:3] == [
    [False] * 5 + [True],
    [False, False, False, True, False, False],
  ]
  assert forgetting == [
    [f'{SUM}, exact_match', 'before', 'after', 'change'],
    ['CALM', '90.0 | n = 1', '86.5 ± 2.1 | n = 2', '-3.5 ± 2.1 | n = 2'],
    ['LoRA', '90.0 | n = 1', '50.0 | n = 1', '-40.0 | n = 1'],  # c0's anchor
    ['fully fine-tuned', '91.0 | n = 1', '95.0 | n = 1', '+4.0 | n = 1'],
  ]
  no = '— | not recorded'
  assert [row[:6] for row in costs[1:3]] == [
    ['CALM | 2 connections', '1,234', no, '50', '2e+09', '1,000'],
    ['LoRA | rank 3', '35', no, '50', '2e+09', '1,000'],
  ]
  assert costs[3][1] == costs[3][2] != '0'
  assert "MODEL_DIR = '<b>&amp;'" in page.text  # escaped, not read as HTML


def test_the_page_needs_nothing_but_itself(tmp_path, columns):
  page, file = make(
    tmp_path,
    columns,
    title='<b>Runs</b> & http://x',
    anchor_tasks=(SUM,),
    ablations={'two': columns['CALM']},
  )
  for tag, attributes in page.tags:
    assert tag not in {'script', 'link', 'iframe', 'object', 'b'}
    for name, value in attributes.items():
      if name in {'src', 'href', 'srcset', 'data'}:
        assert value.startswith('data:image/png;base64,')
  style = re.search('<style>(.*?)</style>', file.read_text(), re.S)[1]
  assert 'url(' not in style
  assert '@import' not in style
  names = ['scores_sums_test', 'scores_keys_held_out']
  names += ['forgetting', 'loss', 'ablations']
  assert len(page.images) == len(names)
  for name, source in zip(names, page.images, strict=True):
    data = (file.parent / f'{name}.png').read_bytes()
    assert base64.b64decode(source.partition(',')[2]) == data
    pixels = matplotlib.image.imread(io.BytesIO(data))[..., :3]
    assert min(pixels.shape[:2]) > 200
    coloured = np.ptp(pixels, axis=-1) > 0.2  # more than black on white
    assert coloured.sum() > 100, name


def test_a_number_is_listed_with_the_run_that_it_is_of(tmp_path):
  late = write_run(tmp_path / 'b', composed={SUM: 7.0})
  columns = {'a|b': (write_run(tmp_path / 'a', composed={KEYS: 1.0}), late)}
  make(tmp_path, columns, plain={})
  lines = (tmp_path / 'out' / 'results.csv').read_text().splitlines()
  assert f'a|b,{SUM},exact_match,1,7.0' in lines
  assert '| a\\|b |' in (tmp_path / 'out' / 'results.md').read_text()


def test_only_more_than_a_deviation_is_a_loss():
  def is_loss(*values):
    return scores.is_loss(scores.Score(values), places=1)

  assert is_loss(-2.0) and is_loss(-3.0, -2.0)
  assert not is_loss(-0.2, 0.0) and not is_loss(-0.04)
  assert not is_loss() and not is_loss(0.0) and not is_loss(1.0, 2.0)


def test_only_long_names_are_broken():
  shown = page.heading('vanilla m_A kv_arithmetic/test')
  assert shown == 'vanilla m_A kv_<wbr>arithmetic/<wbr>test'


def test_the_metric_can_be_chosen(tmp_path, columns):
  page, _ = make(tmp_path, columns, metrics={'sums': 'other', KEYS: 'correct'})
  assert page.tables[0][1][3] == '259.5 ± 6.4 | n = 2'
  assert page.tables[0][2][3] == '7.0 ± 0.0 | n = 2'
  with pytest.raises(ValueError, match=r"names 'sum', which no run has.*sums/"):
    make(tmp_path, columns, metrics={'sum': 'other'})
  with pytest.raises(ValueError, match=r"no metric 'f1'.*'exact_match'"):
    make(tmp_path, columns, metrics={'sums': 'f1'})
  with pytest.raises(ValueError, match=r"'sums' is no evaluated task.*sums/"):
    make(tmp_path, columns, anchor_tasks=('sums',))


def test_ablations_by_number_and_place(tmp_path, columns):
  one = write_run(tmp_path / 'one', layers=(-1,), composed={KEYS: 20.0})
  both = {'early': (one,), 'even': columns['CALM']}
  page, _ = make(tmp_path, columns, ablations=both, anchor_tasks=(SUM,))
  assert page.tables[2][1:] == [
    ['early', '20.0 | n = 1', '1', '1→emb'],
    ['even', '72.0 ± 2.8 | n = 2', '2', '1→0, 1→2'],
  ]
  with pytest.raises(ValueError, match=r"'x', a run that trained 'lora'"):
    make(tmp_path, columns, ablations={'x': columns['LoRA']})


def test_curves_begin_at_step_1(columns):
  found = runs_lib.read_columns(columns, setting='report.columns')
  assert [run.curve() for run in found['CALM']] == [
    ([1, 50], [4.0, 2.0]),
    ([1, 50], [6.0, 3.0]),
  ]
  assert pictures.first_loss(found['CALM']) == 5.0
  axes = pictures.loss_curves(
    found, pictures.colours(list(found), ()), log_steps=True
  ).axes[0]
  lines = {line.get_label(): line for line in axes.lines}
  np.testing.assert_array_equal(lines['CALM (2)'].get_xdata(), [1, 50])
  np.testing.assert_array_equal(lines['CALM (2)'].get_ydata(), [5.0, 2.5])
  assert axes.get_xscale() == 'log'


def test_what_is_missing_is_said_and_is_no_zero(tmp_path, columns):
  (tmp_path / 'c1' / 'eval' / 'results.json').unlink()
  (tmp_path / 'l0' / 'metrics.jsonl').unlink()
  (tmp_path / 'l0' / 'lora.safetensors').unlink()
  with (tmp_path / 'c0' / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 100, "train/lo')
  page, _ = make(tmp_path, columns, anchor_tasks=(SUM,))
  assert page.tables[0][1][3] == '88.0 | n = 1 of 2'
  assert page.tables[2][2][1:4] == ['— | not recorded'] * 3
  for words in (
    r'c1/eval/results.json is not there: no scores of this run',
    r'l0/metrics.jsonl is not there: no loss and no speed',
    r'l0/lora.safetensors is not there: the run has not ended',
    r'c0/metrics.jsonl ends in a row that was cut off',
    r'sums/test was not measured of m_A\.',
  ):
    assert re.search(words, page.text), words


def test_runs_that_are_not_evaluated_make_a_page(tmp_path):
  alone = {'CALM': (write_run(tmp_path / 'c', losses=(3.0, 1.0)),)}
  page, _ = make(tmp_path, alone, anchor_tasks=(SUM,), ablations=alone)
  assert 'No run has been evaluated yet.' in page.text
  assert 'The runs are there, and have not been evaluated.' in page.text
  assert 'Not measured' in page.text
  named = {'ablations': alone, 'ablation_task': KEYS}
  page, _ = make(tmp_path, alone, **named)
  assert 'The runs are there, and have not been evaluated.' in page.text
  assert len(page.images) == 1  # the loss


def test_other_numbers_of_examples_do_not_compare(tmp_path, columns):
  file = tmp_path / 'l0' / 'eval' / 'results.json'
  file.write_text(file.read_text().replace('40', '50'))
  page, _ = make(tmp_path, columns)
  assert f'{KEYS} was measured on different numbers of examples' in page.text


def test_what_is_broken_is_refused(tmp_path, columns):
  with pytest.raises(ValueError, match=r"'X' names the run .* no such dir"):
    make(tmp_path, {'X': (str(tmp_path / 'no'),)})
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='which holds none of'):
    make(tmp_path, {'X': (str(tmp_path / 'empty'),)})
  with pytest.raises(ValueError, match='expected a tuple of MODEL_DIRs'):
    make(tmp_path, {'X': columns['CALM'][0]})
  with pytest.raises(ValueError, match=r"'composed', 'lora'\] in 'X'"):
    make(tmp_path, {'X': columns['CALM'] + columns['LoRA']})
  with pytest.raises(ValueError, match=r"\['CALM'\] are in .* name them apart"):
    make(tmp_path, columns, plain={'CALM': 'anchor'})
  with pytest.raises(ValueError, match='report.columns is empty'):
    make(tmp_path, {})
  with pytest.raises(ValueError, match='report.prompt .* needs the models'):
    make(tmp_path, columns, prompt='1 + 1 =')
  metrics = tmp_path / 'c0' / 'metrics.jsonl'
  metrics.write_text('{"step": 1, "tr\n' + metrics.read_text())
  with pytest.raises(ValueError, match='c0/metrics.jsonl, line 1, is no JSON'):
    make(tmp_path, columns)
  (tmp_path / 'c1' / 'eval' / 'results.json').write_text('{"composed": 3}')
  with pytest.raises(ValueError, match='c1/eval/results.json is not'):
    make(tmp_path, {'X': columns['CALM'][1:]})
  assert not (tmp_path / 'out').exists()


def test_many_columns_are_lines(tmp_path):
  """More than a screen has room for; the best of each task is still marked."""
  columns = {
    f'run {i}': (
      write_run(tmp_path / str(i), composed={SUM: 10.0 * i, KEYS: 90.0 - i}),
    )
    for i in range(9)
  }
  page, _ = make(tmp_path, columns, plain={})
  head, *lines = page.tables[0]
  assert [cell.split(' ')[0] for cell in head] == ['', SUM, KEYS]
  assert [line[0] for line in lines] == list(columns)
  assert lines[3] == ['run 3', '30.0 | n = 1', '87.0 | n = 1']
  best = [line for line in page.best[1:10]]
  assert best[0] == [False, False, True] and best[8] == [False, True, False]
  assert sum(map(sum, best)) == 2


def test_a_task_without_any_finite_number_is_a_gap(tmp_path):
  run_dir = write_run(tmp_path / 'x', composed={KEYS: 20.0, SUM: 1.0})
  file = tmp_path / 'x' / 'eval' / 'results.json'
  results = json.loads(file.read_text())
  results['composed'][SUM] = {'num_examples': 5, 'exact_match': float('nan')}
  file.write_text(json.dumps(results))
  page, _ = make(tmp_path, {'CALM $': (run_dir,), '$\\foo$': (run_dir,)})
  assert f'{SUM} has no finite number in any run.' in page.text
  assert [row[0].split(' ')[0] for row in page.tables[0][1:]] == [KEYS]


def test_numbers_that_are_none_are_left_out():
  def run(value):
    tasks = {'composed': {KEYS: {'f1': value}}}
    return runs_lib.Run(None, 'composed', (), tasks, (), None, None, None, ())

  found = [run(v) for v in (float('nan'), 2.0, '3', True, None)]
  assert scores.score(found, 'composed', KEYS, 'f1').values == (2.0,)


def test_the_entry_point(tmp_path, columns):
  file = write_run(tmp_path / 'x', composed={KEYS: 20.0})
  entry = gin_setup.configure(
    'report',
    gin_files=['runs/report.gin'],
    bindings=[
      f"OUTPUT_DIR = '{tmp_path}/page'",
      f"COLUMNS = {{'CALM': ('{file}',)}}",
      f"ABLATIONS = {{'two': ('{file}',)}}",
    ],
  )
  entry(summarize_config=gin_setup.write_operative_config)
  for name in ('report.html', 'config.gin', 'ablations.png'):
    assert (tmp_path / 'page' / name).is_file()


@pytest.mark.slow
def test_a_composed_run_is_loaded_answers_and_is_mapped(tmp_path):
  """A small composition, saved as a run; m_A has the anchor's vocabulary."""
  specs = {}
  for name, config in (('anchor', tiny.ANCHOR), ('code', tiny.AUGMENTING)):
    config = dataclasses.replace(config, num_layers=1)
    toys.model_directory(tmp_path / name, config)
    specs[name] = pretrained.pretrained_model(tmp_path / name)
  mesh = sharding.make_mesh()
  models = {k: api.from_spec(spec, mesh=mesh) for k, spec in specs.items()}
  model = calm_jax.compose(
    anchor=models['anchor'],
    augmenting={'code': models['code']},
    mapping=calm_jax.LayerMapping.explicit(
      [tiny.connection(-1, 0), tiny.connection(0, 0)]
    ),
  )
  model.save(tmp_path / 'run')
  page, file = make(
    tmp_path,
    {'CALM': (str(tmp_path / 'run'),)},
    prompt='a1 a2 a3',
    anchor=specs['anchor'],
    augmenting={'code': specs['code']},
    max_new_tokens=2,
  )
  assert 'Prompt “a1 a2 a3”, answer “' in page.text
  for key in ('code_0_into_embed', 'code_0_into_0'):
    data = (file.parent / f'attention_{key}.png').read_bytes()
    assert base64.b64encode(data).decode() in ''.join(page.images)
  lora = {'LoRA': (write_run(tmp_path / 'l', kind='lora'),)}
  with pytest.raises(ValueError, match='no column is of a composition'):
    make(tmp_path, lora, prompt='a1')
