"""Decoding against `generate` of `transformers`, token for token.

Run: pytest tests/generation_parity_test.py

Small random models in float32, prompts of mixed length in one batch of ours;
`transformers` takes them one by one, so that its padding is not what is tested.
"""

import functools

import numpy as np
import pytest

from calm_jax import composition, generation, sampling
from tests import foreign, toys
from tests.models import parity_test

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
pytestmark = [pytest.mark.convert, pytest.mark.slow]
torch.set_num_threads(1)

NEW = 20
LENGTHS = (3, 11, 17, 1, 24)  # past the windows, before and after
PROMPTS = [
  np.random.default_rng(n).integers(1, foreign.VOCAB, n).tolist()
  for n in LENGTHS
]
NAMES = (
  'gemma-multi_query',
  'gemma2-grouped_window',
  'gemma3_text-local_global',
  'llama-grouped_llama3',
  'llama-yarn',
  'mistral-window',
  'qwen2-upper_windows',
  'qwen3-grouped',
)


@functools.cache
def pair(name, tmp):
  model_type, fields = parity_test.VARIANTS[name]
  theirs = foreign.make(model_type, **fields)
  module, params = foreign.read(*foreign.save(theirs, tmp / name))
  return theirs, composition.ComposedLM(module), {'anchor': params}


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('models')


def their_tokens(theirs, prompt, **settings):
  out = theirs.generate(
    torch.tensor([prompt]),
    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
    do_sample=False,
    pad_token_id=0,
    **settings,
  )
  return [row[len(prompt) :] for row in out.tolist()]


def our_tokens(model, params, *, eos_ids=(), batch_size=5, **settings):
  vocabulary = toys.IdVocabulary(eos_ids=eos_ids)
  run = generation.Generator(model, vocabulary=vocabulary)
  found = run(
    params, PROMPTS, max_new_tokens=NEW, batch_size=batch_size, **settings
  )
  return [[one.tokens for one in each] for each in found]


@pytest.mark.parametrize('name', NAMES)
def test_greedy(name, directory):
  theirs, model, params = pair(name, directory)
  ours = our_tokens(model, params)
  expected = [
    their_tokens(theirs, prompt, max_new_tokens=NEW, eos_token_id=None)
    for prompt in PROMPTS
  ]
  assert ours == expected
  assert len({tuple(row) for (row,) in ours}) > 1
  # One by one, the same.
  assert our_tokens(model, params, batch_size=1) == expected


def until(row, eos):
  return row[: row.index(eos)] if eos in row else row


@pytest.mark.parametrize('length_penalty', [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
  'name', ['llama-grouped_llama3', 'qwen2-upper_windows']
)
def test_beams(name, length_penalty, directory):
  """All four hypotheses, those that end early and those that do not."""
  theirs, model, params = pair(name, directory)
  (greedy,) = our_tokens(model, params)[1]
  eos = greedy[4]
  beams = sampling.DecodingConfig(
    num_beams=4, num_samples=4, length_penalty=length_penalty
  )
  ours = our_tokens(model, params, eos_ids=(eos,), config=beams)
  expected = [
    their_tokens(
      theirs,
      prompt,
      max_new_tokens=NEW,
      eos_token_id=eos,
      num_beams=4,
      num_return_sequences=4,
      length_penalty=length_penalty,
    )
    for prompt in PROMPTS
  ]
  expected = [[until(row, eos) for row in each] for each in expected]
  # Theirs are padded with 0, a word of ours.
  lengths = [[len(row) for row in each] for each in ours]
  assert ours == [
    [row[:n] for row, n in zip(each, size, strict=True)]
    for each, size in zip(expected, lengths, strict=True)
  ]
  if length_penalty < 2:  # which favours the longest
    assert len({n for size in lengths for n in size}) > 1
