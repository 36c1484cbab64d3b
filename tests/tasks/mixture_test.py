"""Mixtures of texts: files, parts, and their way through SeqIO to batches.

Run: pytest tests/tasks/mixture_test.py
"""

import dataclasses
import itertools
import json
import pathlib
import re

import gin
import numpy as np
import pytest
import seqio

from calm_jax import alignment, data, gin_setup, seqio_mixtures, vocabularies
from calm_jax.tasks import code, codexglue, flores, gsm8k, mixture
from tests import toys

FIXTURES = pathlib.Path(__file__).parent.parent / 'fixtures' / 'tasks'
BYTES = vocabularies.ByteVocabulary()
LENGTHS = {'inputs': 300, 'targets': 300}


def file(name, **settings):
  return mixture.TextFile(path=str(FIXTURES / name), **settings)


def part(task, split='train', rate=1.0):
  return mixture.Part(task=task, split=split, rate=rate)


TRANSLATION = flores.Flores(
  directory=str(FIXTURES / 'flores200_dataset'),
  source='swh_Latn',
  target='eng_Latn',
  shots=0,
)
ENGLISH = gsm8k.GSM8K(directory=str(FIXTURES / 'gsm8k'), shots=0)
SWAHILI = gsm8k.GSM8K(
  train_file=str(FIXTURES / 'gsm8k_swh' / 'train.jsonl'),
  language='swh',
  shots=0,
)
SUMMARIES = codexglue.CodeToText(
  directory=str(FIXTURES / 'codexglue'), language='python', shots=0
)
PROBLEMS = code.MBPP(path=str(FIXTURES / 'mbpp.jsonl'), shots=0)
DOMAINS = {
  'toy_translation': [
    part(TRANSLATION, 'dev', 3.0),
    part(file('parallel.tsv', template='swh_Latn: {inputs}\n{targets}')),
  ],
  'toy_math': [part(ENGLISH, rate=3.0), part(SWAHILI)],
  'toy_code': [
    part(PROBLEMS, rate=3.0),
    part(SUMMARIES),
    part(file('documents.jsonl')),
  ],
}


@pytest.fixture(autouse=True)
def clean_registries():
  before = [
    (registry, set(registry.names()))
    for registry in (seqio.MixtureRegistry, seqio.TaskRegistry)
  ]
  yield
  for registry, names in before:
    for name in set(registry.names()) - names:
      registry.remove(name)


def batches_of(name, **settings):
  made = mixture.Mixture(name=name, parts=DOMAINS[name])
  return data.seqio_batches(
    made,
    **{
      'task_feature_lengths': LENGTHS,
      'batch_size': 4,
      'seed': 1,
      'vocabulary': BYTES,
    }
    | settings,
  )


# --- Files -------------------------------------------------------------------


@pytest.mark.parametrize(
  'name, settings, expected',
  [
    (
      'parallel.tsv',
      {},
      [
        ('Kisima kina maji.\n', 'The well has water.'),
        ('Mlango umefungwa.\n', 'The door is closed.'),
      ],
    ),
    (
      'parallel.tsv',
      {'template': 'From {inputs} to {targets}'},
      [
        ('From Kisima kina maji. to', ' The well has water.'),
        ('From Mlango umefungwa. to', ' The door is closed.'),
      ],
    ),
    ('pairs.jsonl', {}, [('2 + 2 =', ' 4'), ('3 + 4 =', ' 7')]),
    (
      'documents.jsonl',
      {},
      [
        ('', 'def square(n):\n  return n * n\n'),
        ('', 'def neg(n):\n  return -n\n'),
      ],
    ),
    (
      'documents.txt',
      {},
      [('', 'Watoto wanacheza.'), ('', 'Mvua inanyesha.')],
    ),
  ],
)
def test_files_of_each_kind(name, settings, expected):
  rows = list(file(name, **settings).examples('train'))
  assert rows == [{'inputs': i, 'targets': t} for i, t in expected]
  assert file(name).name == name.split('.')[0]


@pytest.mark.parametrize(
  'name, line, message',
  [
    ('a.jsonl', '{"inputs": "x"}', r"no text 'targets' among \['inputs'\]"),
    ('a.jsonl', '{"text": 3}', "no text 'text'"),
    ('a.jsonl', '{"inputs": "x", "targets": ""}', "no text 'targets'"),
    ('a.jsonl', 'x', 'not JSON'),
    ('a.tsv', 'one column', '1 columns'),
    ('a.tsv', 'x\t ', '2 columns between tabs, 1 with text'),
  ],
)
def test_a_malformed_line(tmp_path, name, line, message):
  (tmp_path / name).write_text(f'{line}\n')
  made = mixture.TextFile(path=str(tmp_path / name))
  with pytest.raises(ValueError, match=rf'line 1: {message}.*Expected'):
    list(made.examples('train'))


def test_wrong_values_are_refused_at_once():
  with pytest.raises(ValueError, match=r"ends in '.csv'.*\.tsv: parallel"):
    mixture.TextFile(path='a.csv')
  with pytest.raises(ValueError, match='no file .*Expected: a document'):
    mixture.TextFile(path='/none/a.txt').examples('train')
  with pytest.raises(ValueError, match=r'must end with \{targets\}'):
    file('pairs.jsonl', template='{inputs}')
  with pytest.raises(ValueError, match=r"no split 'train'; .*'dev', 'devtest'"):
    part(TRANSLATION)
  with pytest.raises(ValueError, match="rate of 'gsm8k' is 0"):
    part(ENGLISH, rate=0)
  with pytest.raises(ValueError, match="'none' has no parts"):
    mixture.Mixture(name='none', parts=[])
  with pytest.raises(ValueError, match="'a b' must be letters"):
    mixture.Mixture(name='a b', parts=[part(ENGLISH)])


# --- Batches -----------------------------------------------------------------


def texts_of(batch):
  """Each segment's prompt and the text that is to be predicted."""
  found = []
  for row in range(len(batch['decoder_segment_ids'])):
    for segment in range(1, batch['decoder_segment_ids'][row].max() + 1):
      here = batch['decoder_segment_ids'][row] == segment
      predicted = batch['decoder_loss_weights'][row, here] == 1
      tokens = batch['decoder_input_tokens'][row, here]
      targets = batch['decoder_target_tokens'][row, here]
      # Predicted are the targets, all of them, and nothing else.
      assert predicted.tolist() == sorted(predicted.tolist())
      assert tokens[0] == BYTES.bos_id and targets[-1] == BYTES.eos_id
      split = np.argmax(predicted)
      prompt = BYTES.decode(tokens[: split + 1])
      found.append((prompt, BYTES.decode(targets[split:])))
  return found


@pytest.mark.parametrize('name', DOMAINS)
def test_batches_hold_the_texts_at_their_rates(name):
  """In the anchor's vocabulary, with the prompt masked from the loss."""
  parts = [
    {(row['inputs'], row['targets']) for row in one.task.examples(one.split)}
    for one in DOMAINS[name]
  ]
  assert sum(map(len, parts)) == len(set.union(*parts))
  iterator = batches_of(name)
  seen = []
  while len(seen) < 400:
    seen += texts_of(next(iterator))
  assert set(seen) == set.union(*parts)
  rates = [one.rate for one in DOMAINS[name]]
  for part_texts, rate in zip(parts, rates, strict=True):
    share = np.mean([pair in part_texts for pair in seen])
    expected = rate / sum(rates)
    noise = (expected * (1 - expected) / len(seen)) ** 0.5
    assert abs(share - expected) < 4 * noise


def test_resuming_and_seeds():
  def take(count, state=None, **settings):
    iterator = batches_of('toy_math', **settings)
    if state:
      iterator.restore(state)
    return [next(iterator) for _ in range(count)], iterator.state()

  every, _ = take(5)
  _, state = take(3)
  rest, _ = take(2, json.loads(json.dumps(state)))
  other, _ = take(5, seed=2)
  for a, b in zip(every[3:], rest, strict=True):
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
  tokens = [
    np.stack([batch['decoder_input_tokens'] for batch in some])
    for some in (every, other)
  ]
  assert not np.array_equal(*tokens)


def epochs(count, *, seed=0, shuffle=True):
  """The six texts of a task, as they come, epoch by epoch."""
  iterator = data.seqio_batches(
    mixture.Mixture(name='toy', parts=[part(ENGLISH)]),
    task_feature_lengths=LENGTHS,
    batch_size=6,
    seed=seed,
    pack=False,
    shuffle=shuffle,
    vocabulary=BYTES,
  )
  return [texts_of(next(iterator)) for _ in range(count)]


def test_a_part_is_shuffled_anew_in_every_epoch(monkeypatch):
  """And holds each text once in each, in any size of the buffer."""
  rows = [(r['inputs'], r['targets']) for r in ENGLISH.examples('train')]
  for buffer in (10_000, 2):
    monkeypatch.setattr(seqio_mixtures, '_SHUFFLED', buffer)
    orders = epochs(4) + epochs(4, seed=1)
    assert all(sorted(order) == sorted(rows) for order in orders)
    assert len({tuple(order) for order in orders}) > 5
    assert orders[:4] != orders[4:]
  assert epochs(2, shuffle=False) == [rows, rows]


def test_a_model_with_another_vocabulary_reads_the_texts():
  code = toys.PieceVocabulary([chr(i) for i in range(32, 127)] + ['\n', '\t'])
  reader = alignment.Reader(BYTES, code, anchor_size=BYTES.size)
  for name in ('toy_math', 'toy_code'):
    iterator = batches_of(
      name,
      readers={'code': reader},
      task_feature_lengths=LENGTHS | {'code': 620},
    )
    for batch in itertools.islice(iterator, 2):
      expected = [prompt + target for prompt, target in texts_of(batch)]
      read = []
      for ids, segments in zip(
        batch['code_input_tokens'], batch['code_segment_ids'], strict=True
      ):
        for segment in range(1, segments.max() + 1):
          read.append(code.decode(ids[segments == segment]))
      assert read == expected


# --- Names -------------------------------------------------------------------


def test_registering_again_and_registering_another_thing():
  made = mixture.Mixture(name='toy', parts=DOMAINS['toy_math'])
  assert seqio_mixtures.register_mixture(made, BYTES) == 'toy'
  known = set(seqio.TaskRegistry.names())
  assert (
    seqio_mixtures.register_mixture(dataclasses.replace(made), BYTES) == 'toy'
  )
  assert set(seqio.TaskRegistry.names()) == known
  assert data.task_vocabulary('toy') is BYTES
  assert seqio.MixtureRegistry.get('toy').output_features['targets'].add_eos
  first, second = made.parts
  for parts, vocabulary in (
    ([first], BYTES),
    ([first, second, second], BYTES),
    ([second, first], BYTES),
    ([first, dataclasses.replace(second, rate=2.0)], BYTES),
    (made.parts, vocabularies.ByT5Vocabulary()),
  ):
    other = mixture.Mixture(name='toy', parts=parts)
    with pytest.raises(ValueError, match="by the name 'toy'.*another name"):
      seqio_mixtures.register_mixture(other, vocabulary)
  task = mixture.Mixture(name='toy.part0', parts=made.parts)
  with pytest.raises(ValueError, match="by the name 'toy.part0'"):
    seqio_mixtures.register_mixture(task, BYTES)


def test_files_are_missed_before_a_run_begins(tmp_path):
  (tmp_path / 'empty.txt').write_text('\n')
  for path, message in (
    ('none.txt', 'There is no file'),
    ('empty.txt', "'empty', a part of the mixture 'toy', has no example"),
  ):
    task = mixture.TextFile(path=str(tmp_path / path))
    made = mixture.Mixture(name='toy', parts=[part(task)])
    with pytest.raises(ValueError, match=message):
      data.seqio_batches(
        made,
        task_feature_lengths=LENGTHS,
        batch_size=1,
        seed=0,
        vocabulary=BYTES,
      )
    assert 'toy' not in seqio.MixtureRegistry.names()
  with pytest.raises(ValueError, match='give vocabulary='):
    batches_of('toy_math', vocabulary=None)


def test_a_bad_line_deep_in_a_file_is_named(tmp_path):
  (tmp_path / 'deep.tsv').write_text('a\tb\n' * 30 + 'bad\n')
  task = mixture.TextFile(path=str(tmp_path / 'deep.tsv'))
  iterator = data.seqio_batches(
    mixture.Mixture(name='toy', parts=[part(task)]),
    task_feature_lengths=LENGTHS,
    batch_size=1,
    seed=0,
    vocabulary=BYTES,
  )
  with pytest.raises(ValueError, match='^.*deep.tsv, line 31: 1 columns'):
    next(iterator)


# --- gin ---------------------------------------------------------------------

RUN = """
train.model_dir = '/nowhere'
train.anchor = @pretrained_model()
train.make_batches = @seqio_batches
train.train_steps = 1
train.batch_size = 1
pretrained_model.path = '/nowhere'
seqio_batches.mixture_or_task_name = %MIXTURE_OR_TASK_NAME
seqio_batches.task_feature_lengths = %TASK_FEATURE_LENGTHS
"""
FILES = {
  'translation': {
    'FLORES_DIRECTORY': 'flores200_dataset',
    'SOURCE': None,
  },
  'math': {
    'GSM8K_DIRECTORY': 'gsm8k',
    'TRANSLATED_FILE': 'gsm8k_swh/train.jsonl',
    'LANGUAGE': None,
  },
  'code': {
    'MBPP_PATH': 'mbpp.jsonl',
    'CODEXGLUE_DIRECTORY': 'codexglue',
    'CODE_FILE': 'documents.jsonl',
  },
}


def from_gin(tmp_path, name, *bindings):
  """Batches as a run with the mixture's gin file would get them."""
  (tmp_path / 'run.gin').write_text(RUN)
  files = [str(tmp_path / 'run.gin'), f'mixtures/{name}.gin']
  gin_setup.configure('train', gin_files=files, bindings=bindings)
  make_batches = gin.get_configurable('seqio_batches')
  return make_batches(batch_size=4, seed=0, vocabulary=BYTES)


def bindings_of(name):
  return [
    f"{macro} = '{FIXTURES / path if path else 'swh_Latn'}'"
    for macro, path in FILES[name].items()
  ]


@pytest.mark.parametrize('name', FILES)
def test_every_shipped_mixture_gives_batches(name, tmp_path):
  texts = texts_of(next(from_gin(tmp_path, name, *bindings_of(name))))
  parts = DOMAINS[f'toy_{name}'][: 1 if name == 'translation' else 3]
  known = {
    (row['inputs'], row['targets'])
    for one in parts
    for row in one.task.examples(one.split)
  }
  assert texts and set(texts) <= known
  for missing in bindings_of(name):
    rest = [one for one in bindings_of(name) if one != missing]
    with pytest.raises(ValueError, match=f'{missing.split()[0]} is required'):
      from_gin(tmp_path, name, *rest)


def test_every_mixture_is_shipped_and_tested():
  folder = FIXTURES.parent.parent.parent / 'gin' / 'mixtures'
  assert {file.stem for file in folder.glob('*.gin')} == set(FILES)


def test_the_part_that_a_header_proposes(tmp_path):
  """Its lines as they stand in the file, with a path of ours."""
  path = gin_setup.find_gin_file('mixtures/translation.gin', [])
  proposed = [
    line.removeprefix('#   ').replace(
      'parallel.tsv', str(FIXTURES / 'parallel.tsv')
    )
    for line in path.read_text().splitlines()
    if re.match(r'#   (own/|Mixture)', line)
  ]
  assert len(proposed) == 5
  iterator = from_gin(
    tmp_path, 'translation', *bindings_of('translation'), *proposed
  )
  texts = [pair for _ in range(3) for pair in texts_of(next(iterator))]
  assert (
    'swh_Latn: Kisima kina maji.\neng_Latn:',
    ' The well has water.',
  ) in texts


def test_a_mixture_has_the_type_that_gin_checks(tmp_path):
  (tmp_path / 'run.gin').write_text(RUN)
  bindings = ['MIXTURE_OR_TASK_NAME = 3', 'TASK_FEATURE_LENGTHS = {}']
  with pytest.raises(ValueError, match='name = 3 has the wrong type'):
    gin_setup.configure(
      'train', gin_files=[str(tmp_path / 'run.gin')], bindings=bindings
    )
