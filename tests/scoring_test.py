"""The log-likelihood of targets. Run: pytest tests/scoring_test.py"""

import numpy as np
import pytest

from calm_jax import model, scoring
from calm_jax.models import pretrained
from tests import own_vocabulary_test as own
from tests import tiny, toys

PROMPTS = ['a1 a2 a3', 'a9', 'a4 a4 a4 a4 a4']
TARGETS = ['a5', 'a6 a7 a8 a9', 'a2 a1']


def wrap(composed, params, vocabulary, readers=None):
  spec = pretrained.ModelSpec(
    config=composed.anchor.config, vocabulary=vocabulary
  )
  return model.Model(composed, params, spec=spec, mesh=None, readers=readers)


@pytest.fixture(scope='module')
def composed():
  towers = tiny.composed()
  return wrap(towers, toys.params(towers), toys.vocabulary(tiny.VOCAB))


def by_hand(one, prompt, target):
  """Log-likelihood of each target token, from the logits of the whole."""
  ids = one.vocabulary.encode(f'{prompt} {target}')
  count = len(one.vocabulary.encode(target))
  logits = np.asarray(one.logits([ids]), np.float64)[0]
  chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  at = range(len(ids) - count, len(ids))
  told = [chances[t - 1, ids[t]] for t in at]
  return sum(told), all(logits[t - 1].argmax() == ids[t] for t in at)


@pytest.mark.parametrize('batch_size', [None, 2])
def test_scores_are_those_of_the_logits(composed, batch_size):
  """Ragged, in batches by length, in order."""
  scores = composed.score(PROMPTS, TARGETS, batch_size=batch_size)
  for prompt, target, score in zip(PROMPTS, TARGETS, scores, strict=True):
    expected, _ = by_hand(composed, prompt, target)
    np.testing.assert_allclose(score.log_likelihood, expected, atol=1e-4)
    assert score.num_tokens == len(target.split())
  ids = [composed.vocabulary.encode(target) for target in TARGETS]
  assert composed.score(PROMPTS, ids, batch_size=batch_size) == scores


def test_what_is_generated_is_greedy(composed):
  said = composed.decode(PROMPTS, max_new_tokens=3)
  rows = [one.tokens for (one,) in said]
  assert all(rows)
  assert all(s.is_greedy for s in composed.score(PROMPTS, rows))
  for row in rows:
    row[-1] = (row[-1] + 1) % 20
  assert not any(s.is_greedy for s in composed.score(PROMPTS, rows))


def test_two_vocabularies_and_an_encoder():
  """m_A reads the targets' bytes; the encoder the prompt."""
  one = wrap(own.MODEL, own.PARAMS, own.WORDS, own.READERS)
  prompt, targets = own.PROMPTS[0], [0, 5, 3]
  (score,) = one.score([prompt], [targets])
  logits_BTV = own.FORWARD(own.PARAMS, own.batch_of((prompt, targets)))
  logits = np.asarray(logits_BTV, np.float64)[0]
  chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  first = len(own.WORDS.encode(prompt))  # BOS included
  expected = sum(chances[first + i, t] for i, t in enumerate(targets))
  np.testing.assert_allclose(score.log_likelihood, expected, atol=1e-4)


def test_nothing_to_score(composed):
  with pytest.raises(ValueError, match='Target 1 is empty: there is nothing'):
    composed.score(PROMPTS[:2], ['a1', ''])
  assert composed.score([], []) == []
  with pytest.raises(ValueError, match='targets is one text; give a list'):
    composed.score(PROMPTS[:2], 'a1')
  with pytest.raises(ValueError, match='There are 2 prompts and 1 targets'):
    composed.score(PROMPTS[:2], ['a1'])
  with pytest.raises(
    ValueError, match=r'prompts\[1\] is None; expected a text'
  ):
    composed.decode(['a1', None], max_new_tokens=1)
  with pytest.raises(ValueError, match=r'prompts\[0\] holds half of a surr'):
    composed.decode(['\ud800'], max_new_tokens=1)
  for setting in ('max_new_tokens', 'batch_size'):
    for value in (0, -1, 2.5):
      with pytest.raises(ValueError, match=f'{setting} = {value}: it must be'):
        composed.decode(['a1'], **{'max_new_tokens': 1, setting: value})


def test_without_bos_an_empty_prompt_predicts_nothing():
  """Else the target's first token would be left out of its likelihood."""
  words = toys.IdVocabulary()
  scorer = scoring.Scorer(own.MODEL, vocabulary=words)
  examples = [
    {'inputs': [1], 'targets': [2, 3], 'text': None},
    {'inputs': [], 'targets': [2, 3], 'text': ''},
  ]
  with pytest.raises(
    ValueError, match='Prompt 1 is empty, and this vocabulary'
  ):
    scorer({}, examples)
