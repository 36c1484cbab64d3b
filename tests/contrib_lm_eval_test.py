"""The harness's tasks on our models, against its own adapter of transformers.

Run: pytest tests/contrib_lm_eval_test.py
"""

import importlib.util
import itertools
import json
import os
import sys

import numpy as np
import pytest

import calm_jax
from tests import foreign, tokens

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('HF_DATASETS_OFFLINE', '1')

needs_lm_eval = pytest.mark.skipif(
  importlib.util.find_spec('lm_eval') is None,
  reason='lm_eval cannot be imported: calm_jax.contrib.lm_eval is NOT tested.'
  " pip install -c constraints.txt -e '.[test]'",
)
VOCAB = 720
# BOS and a space before a text; neither; BOS and spaces at the ends of words.
FAMILIES = ('llama2', 'qwen2', 'gemma')
PAIRS = [
  ('The quick brown fox', ' jumps over'),
  ('The quick brown fox ', 'jumps over'),
  ('It was the best of times,\n\n', 'it was'),
  ('x =', ' 1234567'),
  ('', 'The lazy dog'),
  ('def fib(n):\n    if n', ' < 2:\n        return n\n'),
  ('Привет мир,', ' как дела?'),
  ('a', 'b'),
]
TEXTS = [tokens.CORPUS[0], 'a', 'Der Fluß überquert die Brücke.']
PROMPTS = [one for one, _ in PAIRS if one] + ['Der Fluß']


def write(directory, family, *, seed=0, **sizes):
  """A small random Llama with a tokenizer of `family`."""
  model = foreign.make('llama', seed=seed, vocab_size=VOCAB, **sizes)
  tokenizer, settings = tokens.FAMILIES[family]()
  # Every id ends some text: what is random says EOS, too.
  model.config.eos_token_id = tokenizer.token_to_id(settings['eos_token'])
  model.generation_config.eos_token_id = model.config.eos_token_id
  foreign.save(model, directory)
  return tokens.write(directory, tokenizer, settings)


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
  root = tmp_path_factory.mktemp('models')
  return {
    family: write(root / family, family, seed=seed)
    for seed, family in enumerate(FAMILIES)
  }


def ours(model, **settings):
  from calm_jax.contrib.lm_eval import CalmLM

  if not isinstance(model, calm_jax.Model):
    model = calm_jax.load_pretrained(model)
  return CalmLM(model, **settings)


def theirs(directory, **settings):
  from lm_eval.models import huggingface

  return huggingface.HFLM(
    pretrained=str(directory),
    device='cpu',
    dtype='float32',
    batch_size=1,
    **settings,
  )


def requests(kind, *each):
  from lm_eval.api.instance import Instance

  return [
    Instance(request_type=kind, doc={}, arguments=args, idx=i)
    for i, args in enumerate(each)
  ]


def composed(directories, **settings):
  """Two tokenizers, and a composition that is felt."""
  settings = {'output_init': 'fan_in', **settings}
  return calm_jax.compose(
    anchor=calm_jax.load_pretrained(directories['qwen2']),
    augmenting={'other': calm_jax.load_pretrained(directories['llama2'])},
    mapping=calm_jax.LayerMapping.every(augmenting_stride=1),
    **settings,
  )


def assert_same(actual, expected):
  assert [one for _, one in actual] == [one for _, one in expected]
  sums = [[one for one, _ in each] for each in (actual, expected)]
  np.testing.assert_allclose(*sums, atol=1e-4, rtol=0)


def test_without_lm_eval_the_import_says_what_to_do(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.delitem(sys.modules, 'calm_jax.contrib.lm_eval', raising=False)
  with pytest.raises(ImportError, match=r'pip install .*\[lm_eval\]'):
    importlib.import_module('calm_jax.contrib.lm_eval')


@needs_lm_eval
@pytest.mark.convert
@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_log_likelihoods(family, directories):
  reference = theirs(directories[family])
  lm = ours(directories[family])
  # The greedy answers of some, so that is_greedy is both.
  words = ' '.join(tokens.CORPUS[:3]).split(' ')
  prompts = [' '.join(words[i : i + 3]) for i in range(0, len(words), 2)]
  greedy = reference.generate_until(
    requests('generate_until', *((one, {'max_gen_toks': 1}) for one in prompts))
  )
  answers = [
    (one, f'{space}{answer}')
    for one, answer in zip(prompts, greedy, strict=True)
    for space in ('', ' ')
    if answer.isascii() and answer
  ]
  pairs = requests('loglikelihood', *PAIRS, *answers)
  expected = reference.loglikelihood(pairs)
  assert_same(lm.loglikelihood(pairs), expected)
  assert {is_greedy for _, is_greedy in expected} == {True, False}


@needs_lm_eval
@pytest.mark.convert
@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_whole_texts(family, directories):
  """Without limit; and in windows, where theirs has no BOS but ours."""
  texts = requests('loglikelihood_rolling', *((text,) for text in TEXTS))
  model = calm_jax.load_pretrained(directories[family])
  lengths = (None, 16) if family == 'qwen2' else (None,)
  for length in lengths:
    # Theirs would otherwise predict one BOS from another.
    reference = theirs(
      directories[family], add_bos_token=False, max_length=length
    )
    found = ours(model, max_length=length).loglikelihood_rolling(texts)
    expected = reference.loglikelihood_rolling(texts)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-6)


@needs_lm_eval
@pytest.mark.convert
@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_greedy_answers(family, directories):
  """Of several lengths, and up to stop strings."""
  reference, lm = theirs(directories[family]), ours(directories[family])
  free = requests(
    'generate_until',
    *((one, {'until': [], 'max_gen_toks': 12}) for one in PROMPTS),
  )
  answers = reference.generate_until(free)
  assert lm.generate_until(free) == answers
  assert len(set(answers)) > 1
  # Each is cut at a text from its middle; the settings differ by request.
  stopped = requests(
    'generate_until',
    *(
      (one, {'until': [answer[5:7], 'never'], 'max_gen_toks': 8 + 4 * (i % 2)})
      for i, (one, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ),
  )
  expected = reference.generate_until(stopped)
  assert lm.generate_until(stopped) == expected
  assert sum(map(len, expected)) < sum(map(len, answers))
