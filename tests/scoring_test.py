"""The log-likelihood of targets. Run: pytest tests/scoring_test.py"""

import dataclasses

import numpy as np
import pytest

from calm_jax import alignment, composition, model, scoring
from calm_jax.models import layers, pretrained, transformer
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


def test_scores_are_over_the_tokens_that_can_be_said():
  """Tables are padded to different sizes, and decoding stays in the shorter."""
  short = dataclasses.replace(tiny.AUGMENTING, num_layers=1, vocab_size=20)
  anchor = dataclasses.replace(tiny.ANCHOR, tie_embeddings=False)
  towers = tiny.composed(
    anchor=anchor,
    augmenting={'code': short},
    mapping=[tiny.connection(0, 0)],
  )
  params = toys.params(towers)
  kernel = params['anchor']['head']['kernel'].copy()
  kernel[:, 20:] *= 100
  params['anchor']['head']['kernel'] = kernel
  one = wrap(towers, params, toys.vocabulary(tiny.VOCAB))
  rows = [one.tokens for (one,) in one.decode(PROMPTS, max_new_tokens=3)]
  scores = one.score(PROMPTS, rows)
  assert all(s.is_greedy and s.log_likelihood > -30 for s in scores)
  with pytest.raises(ValueError, match='embedding table has the rows 0 to 19'):
    one.score(PROMPTS[:1], [[25]])


def test_a_model_whose_positions_end_is_scored_to_the_last_of_them():
  ends = dataclasses.replace(
    tiny.ANCHOR,
    rope_scaling=layers.RopeScaling('dynamic', 2.0, original_length=19),
  )
  towers = composition.ComposedLM(transformer.DecoderLM(ends))
  one = wrap(towers, toys.params(towers), toys.vocabulary(tiny.VOCAB))
  (score,) = one.score([[1] * 19], [[2]])  # 20 tokens, of which 19 are read
  assert np.isfinite(score.log_likelihood)
  with pytest.raises(ValueError, match='20 positions is longer than the 19'):
    one.score([[1] * 19], [[2, 3]])


def test_a_token_that_is_too_long_for_m_a_is_told_and_scored():
  """As `generate` does; R = 1 cuts every key."""
  narrow = {
    **own.READERS,
    'code': alignment.Reader(own.WORDS, own.CODE, anchor_size=16, most=1),
  }
  one = wrap(own.MODEL, own.PARAMS, own.WORDS, narrow)
  longest = int(np.argmax(own.READERS['code'].transcript.counts_V[:11]))
  with pytest.warns(UserWarning, match="1 tokens stand for more tokens of 'co"):
    (score,) = one.score([own.PROMPTS[0]], [[longest, 3]])
  assert np.isfinite(score.log_likelihood) and score.num_tokens == 2


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


def test_what_cannot_be_asked(composed):
  with pytest.raises(ValueError, match='stop = None: give a list of texts'):
    composed.generate(['a1'], stop=None)
  alone = composition.ComposedLM(composed.composed.anchor)
  anchor = wrap(alone, composed.params, composed.vocabulary)
  with pytest.raises(ValueError, match='no composition to disconnect'):
    anchor.disconnected()


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
