"""FLORES-200: parsing, prompts, errors; scores against sacrebleu's program.

Run: pytest tests/tasks/flores_test.py
"""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import sacrebleu.tokenizers.tokenizer_spm
import sacrebleu.utils
import sentencepiece

from calm_jax.tasks import flores, text_scores

FIXTURES = pathlib.Path(__file__).parent.parent / 'fixtures' / 'tasks'
DIRECTORY = FIXTURES / 'flores200_dataset'


def task(source='swh_Latn', target='eng_Latn', **settings):
  return flores.Flores(
    **{'directory': str(DIRECTORY), 'source': source, 'target': target}
    | settings
  )


def sentences(code, split):
  text = (DIRECTORY / split / f'{code}.{split}').read_text('utf-8')
  return text.split('\n')[:-1]


# --- Prompts -----------------------------------------------------------------


def test_a_prompt_is_exactly_this():
  first = task(shots=2).examples('devtest')[0]
  assert first == {
    'inputs': (
      'swh_Latn: Soko linafunguliwa saa moja asubuhi.\n'
      'eng_Latn: The market opens at seven in the morning.\n'
      '\n'
      'swh_Latn: Mvua ilinyesha milimani usiku kucha.\n'
      'eng_Latn: Rain fell on the hills all night.\n'
      '\n'
      'swh_Latn: Mwalimu anawasomea wanafunzi barua.\n'
      'eng_Latn:'
    ),
    'targets': ' The teacher reads a letter to the class.',
    'source': 'Mwalimu anawasomea wanafunzi barua.',
    'reference': 'The teacher reads a letter to the class.',
  }
  assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize(
  'settings, expected',
  [
    (
      {'source_name': 'Swahili', 'target_name': 'English'},
      'Swahili: Mwalimu anawasomea wanafunzi barua.\nEnglish:',
    ),
    (
      {'template': '{source}\n=> {target}'},
      'Mwalimu anawasomea wanafunzi barua.\n=>',
    ),
    (
      {'template': '{{{source}}} {target_name} {target}'},
      '{Mwalimu anawasomea wanafunzi barua.} eng_Latn',
    ),
  ],
)
def test_language_names_and_templates(settings, expected):
  one = task(shots=0, **settings).examples('devtest')[0]
  assert one['inputs'] == expected
  assert one['targets'] == ' The teacher reads a letter to the class.'


@pytest.mark.parametrize(
  'source, target',
  [
    ('eng_Latn', 'swh_Latn'),
    ('ben_Beng', 'swh_Latn'),
    ('swh_Latn', 'ben_Beng'),
  ],
)
def test_any_direction(source, target):
  made = task(source, target)
  assert made.name == f'flores_{source}_{target}'
  rows = made.examples('devtest')
  assert [row['source'] for row in rows] == sentences(source, 'devtest')
  assert [row['reference'] for row in rows] == sentences(target, 'devtest')


def test_the_tested_sentence_is_never_among_the_examples():
  rows = task(shots=5).examples('dev')
  dev = sentences('eng_Latn', 'dev')
  for i, row in enumerate(rows):
    shown, _, rest = row['inputs'].rpartition('\n\nswh_Latn: ')
    assert rest == f'{row["source"]}\neng_Latn:'
    expected = [text for j, text in enumerate(dev) if j != i][:5]
    assert [text for text in dev if text in shown] == expected
    assert row['reference'] not in row['inputs']
  assert rows == task(shots=5).examples('dev')
  with pytest.raises(ValueError, match=r'shots = 8, and there are only 7'):
    task(shots=8).examples('dev')


# --- Errors ------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
  shutil.copytree(DIRECTORY, tmp_path / 'copy')
  return tmp_path / 'copy'


def test_a_mistyped_language_is_told_its_near_ones(copy):
  with pytest.raises(ValueError, match=r"no language 'swa_Latn' in .*devtest,"):
    task('swa_Latn', shots=0).examples('devtest')
  with pytest.raises(ValueError, match='has 3: ben_Beng, .*mean swh_Latn'):
    task('SWH_latn', shots=0).examples('devtest')
  with pytest.raises(
    ValueError, match=r'none/devtest is not a directory.*flor'
  ):
    task(directory=str(copy / 'none'), shots=0).examples('devtest')


def test_files_of_different_length_and_empty_lines(copy):
  file = copy / 'devtest' / 'eng_Latn.devtest'
  text = file.read_text('utf-8')
  file.write_text(text + 'One more.\n', 'utf-8')
  made = task(directory=str(copy), shots=0)
  with pytest.raises(
    ValueError,
    match=r'swh_Latn.devtest has 4 lines, and .*eng_Latn.devtest has 5.*Expect',
  ):
    made.examples('devtest')
  file.write_text(text.replace('\n', '\n \n', 1), 'utf-8')
  with pytest.raises(ValueError, match=r'devtest, line 2: an empty .*Expected'):
    made.examples('devtest')
  file.write_bytes(b'\xff\n')
  with pytest.raises(ValueError, match=r'devtest, line 1: not UTF-8'):
    made.examples('devtest')
  assert made.examples('dev')


def test_only_line_feeds_end_a_line(copy):
  """U+2028 and form feeds occur inside sentences."""
  for code in ('eng_Latn', 'swh_Latn'):
    (copy / 'dev' / f'{code}.dev').write_bytes(
      '\ufeffa\u2028b\r\nc\x0cd\u0085e\r\n'.encode()
    )
  rows = task(directory=str(copy), shots=0).examples('dev')
  assert [row['source'] for row in rows] == ['a\u2028b', 'c\x0cd\u0085e']


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'shots': -1}, 'Flores.shots = -1'),
    ({'target': 'swh_Latn'}, "both 'swh_Latn'"),
    ({'template': '{source}'}, r'must end with \{target\}'),
    ({'template': '{sauce} {target}'}, r"'\{sauce\} \{target\}'.*\{source\},"),
    ({'template': '{source} {} {target}'}, 'must end with'),
    ({'template': '{source {target}'}, 'must end with'),
  ],
)
def test_plain_values_are_checked_at_once(settings, message):
  with pytest.raises(ValueError, match=message):
    task(**settings)


def test_an_unknown_split():
  with pytest.raises(ValueError, match=r"no split 'test'.*'dev', 'devtest'"):
    task().examples('test')


# --- Scores ------------------------------------------------------------------

OUTPUTS = [
  ' The teacher is reading letters to her class.\nswh_Latn: and more',
  ' Two trains leave before midday',
  '',
  ' They sell fresh bread "every day" near the bridge.',
]


@pytest.fixture(scope='module')
def tokenizer_home(tmp_path_factory):
  """A home of sacrebleu with a small model where spBLEU's should be."""
  home = tmp_path_factory.mktemp('sacrebleu')
  (home / 'models').mkdir()
  lines = sentences('eng_Latn', 'dev') + sentences('eng_Latn', 'devtest')
  with (home / 'models' / 'flores200sacrebleuspm').open('wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=file,
      vocab_size=60,
      minloglevel=2,
    )
  return home


def program(outputs, references, folder, *flags, home):
  """What sacrebleu's own command line says."""
  for name, texts in (('out', outputs), ('ref', references)):
    text = '\n'.join(texts) + '\n'
    (folder / name).write_text(text, 'utf-8')
  done = subprocess.run(
    [sys.executable, '-m', 'sacrebleu', 'ref', '-i', 'out', '-w', '9', *flags],
    cwd=folder,
    capture_output=True,
    text=True,
    check=True,
    env={'SACREBLEU': str(home), 'PATH': ''},
  )
  return json.loads(done.stdout)


PROGRAM_FLAGS = {
  'chrF1': ['-m', 'chrf', '--chrf-beta', '1'],
  'chrF2': ['-m', 'chrf'],
  'chrF2++': ['-m', 'chrf', '--chrf-word-order', '2'],
  'spBLEU': ['-m', 'bleu', '--tokenize', 'flores200', '--force'],
}


@pytest.fixture
def with_tokenizer(tokenizer_home, monkeypatch):
  for module in (sacrebleu.utils, sacrebleu.tokenizers.tokenizer_spm):
    monkeypatch.setattr(module, 'SACREBLEU_DIR', str(tokenizer_home))


def score(outputs):
  made = task(shots=0)
  examples = made.examples('devtest')
  predictions = [
    [made.prediction(output, example)]
    for output, example in zip(outputs, examples, strict=True)
  ]
  return made.metrics(examples, predictions), examples, predictions


def test_scores_are_those_of_sacrebleus_program(
  with_tokenizer, tokenizer_home, tmp_path
):
  measured, examples, predictions = score(OUTPUTS)
  assert list(measured) == [
    name for one in PROGRAM_FLAGS for name in (one, f'{one}_signature')
  ]
  assert predictions[0] == ['The teacher is reading letters to her class.']
  references = [example['reference'] for example in examples]
  outputs = [samples[0] for samples in predictions]
  for name, flags in PROGRAM_FLAGS.items():
    said = program(outputs, references, tmp_path, *flags, home=tokenizer_home)
    assert said['name'] == name.replace('spBLEU', 'BLEU')
    assert measured[name] == pytest.approx(said['score'], abs=1e-8), name
    assert measured[f'{name}_signature'] == f'{name}|{said["signature"]}'
  values = [measured[name] for name in PROGRAM_FLAGS]
  assert len(set(values)) == 4 and all(10 < value < 90 for value in values)


def test_spbleu_is_left_out_without_its_tokenizer(tmp_path, monkeypatch):
  monkeypatch.setattr(sacrebleu.utils, 'SACREBLEU_DIR', str(tmp_path))
  with pytest.warns(UserWarning, match='spBLEU is left out.*flores200sacre'):
    measured, *_ = score(OUTPUTS)
  assert not any('spBLEU' in name for name in measured)
  assert 'chrF1' in measured


def test_several_samples_are_averaged_and_counted():
  references = ['abcdef', 'ghijkl']
  perfect = [['abcdef'], ['ghijkl']]
  wrong = [['xyz'], ['xyz']]
  both = [['abcdef', 'xyz'], ['ghijkl', 'xyz']]
  scores = [
    text_scores.chrf(one, references, names=['chrF1'])['chrF1']
    for one in (perfect, wrong, both)
  ]
  assert scores == pytest.approx([100, 0, 50])
  for bad in ([['a'], ['b', 'c']], [[], []], [['a']], []):
    with pytest.raises(ValueError, match='same number of samples'):
      text_scores.chrf(bad, references, names=['chrF1'])
