"""Augmenting models with a vocabulary of their own, and encoders, end to end.

Run: pytest tests/own_vocabulary_test.py
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from calm_jax import (
  alignment,
  batches,
  composition,
  connections,
  decoding,
  generation,
  sources,
)
from calm_jax.models import encoder, transformer
from tests import tiny, toys

WORDS = toys.PieceVocabulary(
  ['ab', 'c', ' ', 'de', '+', 'abcde', 'b', 'a', 'd', 'e', 'ca']
)
CODE = toys.PieceVocabulary(['c ', 'a', 'b', 'c', 'd', 'e', '+', ' ', 'de'])
TEXTS = toys.PieceVocabulary(
  ['a', 'b', 'c', ' ', '+', 'd', 'e'], bos=False, ends_with_eos=True
)
ANCHOR = dataclasses.replace(
  tiny.ANCHOR, num_layers=2, vocab_size=16, window_pattern=(5, None)
)
DECODER = dataclasses.replace(tiny.AUGMENTING, num_layers=1, vocab_size=12)
ENCODER = dataclasses.replace(
  tiny.AUGMENTING,
  num_layers=1,
  vocab_size=11,
  attention='bidirectional',
  position_encoding='relative_bias',
  relative_buckets=8,
  relative_max_distance=6,
  attention_scale=1.0,
)
MODEL = composition.ComposedLM(
  transformer.DecoderLM(ANCHOR),
  augmenting={
    'code': transformer.DecoderLM(DECODER),
    'texts': encoder.EncoderLM(ENCODER),
  },
  composition=connections.CompositionConfig(
    mapping=connections.LayerMapping.explicit(
      [tiny.connection(-1, 0), tiny.connection(0, 0, 'texts')]
    ),
    output_init='fan_in',
  ),
  own_tokens=['code'],
)
READERS = {
  'code': alignment.Reader(WORDS, CODE, anchor_size=16),
  'texts': alignment.Reader(WORDS, TEXTS, anchor_size=16, reads_targets=False),
}
PARAMS = toys.params(MODEL)
PROMPTS = ['abc +de', 'c', 'de abcde + c', '+ab c ']
FORWARD = jax.jit(MODEL.__call__)


def batch_of(*rows, length=24, slots=40, pack=False, batch_size=None):
  """A training batch of (prompt, target ids)."""
  examples = [
    {'inputs': WORDS.encode(text), 'targets': targets, 'text': text}
    for text, targets in rows
  ]
  read = list(alignment.read_examples(examples, READERS, anchor=WORDS))
  return next(
    batches.ExampleBatches(
      lambda start: iter(read[start:]),
      batch_size=batch_size or len(rows),
      length=length,
      pack=pack,
      bos_id=WORDS.bos_id,
      augmenting_lengths={'code': slots, 'texts': slots},
    )
  )


@functools.cache
def argmax_of_full_forward(steps):
  """Prompt and targets as training lays them out, one token after another."""
  targets = [[] for _ in PROMPTS]
  for _ in range(steps):
    # One more target, which is predicted and never read.
    rows = [(p, [*t, 0]) for p, t in zip(PROMPTS, targets, strict=True)]
    logits_BTV = FORWARD(PARAMS, batch_of(*rows))
    for b, (prompt, done) in enumerate(zip(PROMPTS, targets, strict=True)):
      at = len(WORDS.encode(prompt)) + len(done)  # BOS included
      done.append(int(np.argmax(logits_BTV[b, at, :11])))
  return targets


@pytest.mark.slow
def test_decoding_sees_the_tokens_that_training_saw():
  """Ragged prompts through the compacted caches, several tokens a step."""
  steps = 6
  expected = argmax_of_full_forward(steps)
  assert len({tuple(row) for row in expected}) > 2
  counts = READERS['code'].transcript.counts_V
  assert {int(counts[i]) for row in expected for i in row} > {1}
  begun = [alignment.begin(WORDS, prompt) for prompt in PROMPTS]
  readings = {
    name: [
      reader.read_prompt(text, anchor_ends=ends)
      for text, (_, ends) in zip(PROMPTS, begun, strict=True)
    ]
    for name, reader in READERS.items()
  }
  prompts = [ids for ids, _ in begun]
  assert generate(prompts, readings, READERS, new=steps) == expected


def generate(prompts, readings, readers, *, new):
  """Whatever is said, no word of it is EOS."""
  run = generation.Generator(
    OnlyWords(MODEL), vocabulary=WORDS, readers=readers
  )
  found = run(
    PARAMS, prompts, readings=readings, max_new_tokens=new, batch_size=3
  )
  return [one.tokens for (one,) in found]


class OnlyWords:
  """A model that cannot say special tokens."""

  def __init__(self, model):
    self._model = model

  def __getattr__(self, name):
    return getattr(self._model, name)

  def extend(self, *args, **settings):
    logits_BTV, cache = self._model.extend(*args, **settings)
    return logits_BTV[..., :11], cache


@pytest.mark.slow
def test_logits_through_the_caches_are_close():
  """Prefill, then a token a step, against the whole sequence."""
  targets = [[0, 5, 3], [5, 1, 1], [2, 0, 5], [10, 5, 0]]
  rows = list(zip(PROMPTS, targets, strict=True))
  full_BTV = FORWARD(PARAMS, batch_of(*rows))
  begun = [alignment.begin(WORDS, prompt) for prompt in PROMPTS]
  prompts = {
    name: generation.pad_readings(
      [
        reader.read_prompt(text, anchor_ends=ends)
        for text, (_, ends) in zip(PROMPTS, begun, strict=True)
      ]
    )
    for name, reader in READERS.items()
  }
  tokens_BT, lengths_B = generation.pad([ids for ids, _ in begun])
  transcript = READERS['code'].transcript
  table = (np.asarray(transcript.tokens_VR), np.asarray(transcript.counts_V))
  tables = {'code': jax.tree.map(jax.numpy.asarray, table)}
  logits_BV, cache, used_B = decoding.prefill(
    PARAMS, tokens_BT, lengths_B, prompts, tables, model=MODEL, room=4
  )
  every = np.arange(len(PROMPTS))
  state = decoding.DecodeState(
    cache=cache,
    used_B=used_B,
    lengths_B=lengths_B,
    seeds_B=None,
    step=0,
    last_step=4,
    tokens_BM=np.array(targets),
    ended_B=None,
  )
  feed = jax.jit(functools.partial(decoding.feed, model=MODEL))
  for step in range(1, 3):
    at_B = lengths_B + step - 1
    tiny.assert_close(logits_BV, full_BTV[every, at_B - 1])
    logits_BV, state = feed(PARAMS, state.replace(step=step), tables)
  used_B = np.asarray(state.used_B['code'])
  assert sorted(used_B.tolist()) != sorted(at_B.tolist())  # not in step
  # Compacted: the real slots of each row are its first ones.
  real_BC = np.asarray(state.cache.visible_from['code']) < 2**30
  np.testing.assert_array_equal(real_BC.sum(1), used_B)
  assert all(row[:n].all() for row, n in zip(real_BC, used_B, strict=True))


def test_an_empty_prompt_is_read_as_nothing():
  """By models without BOS; the anchor has one, and speaks."""
  bare = toys.PieceVocabulary(['ab', 'c'], bos=False)
  readers = {
    'code': alignment.Reader(WORDS, bare, anchor_size=16),
    'texts': alignment.Reader(WORDS, bare, anchor_size=16, reads_targets=False),
  }
  nothing = {name: [([], [])] for name in readers}
  assert all(
    reader.read_prompt('', anchor_ends=[0]) == ([], [])
    for reader in readers.values()
  )
  (words,) = generate([[WORDS.bos_id]], nothing, readers, new=2)
  assert len(words) == 2


def test_packing_and_padding_change_no_real_logit():
  rows = [('abc', [5, 3, 1]), ('c + a', [0, 1])]
  packed = FORWARD(PARAMS, batch_of(*rows, pack=True, batch_size=1))[0]
  first = FORWARD(PARAMS, batch_of(rows[0]))[0]
  second = FORWARD(PARAMS, batch_of(rows[1]))[0]
  n, m = 3 + 2, 5 + 2  # BOS, prompt, and all targets but the last
  tiny.assert_close(packed[:n], first[:n])
  tiny.assert_close(packed[n : n + m], second[:m])


def test_changing_a_token_changes_nothing_before_it():
  """In the anchor's tokens, and in those that their bytes stand for."""
  row = ('abc de', [0, 5, 3, 1, 4])
  before = FORWARD(PARAMS, batch_of(row))[0]
  start = 1 + len(WORDS.encode(row[0]))
  for i in range(4):
    targets = list(row[1])
    targets[i] = 8  # d
    after = FORWARD(PARAMS, batch_of((row[0], targets)))[0]
    at = start + i
    np.testing.assert_array_equal(after[:at], before[:at])
    assert np.any(after[at] != before[at])


def test_an_encoder_is_silent_before_the_prompt_ends():
  """Of 'abc +de', the encoder's tokens reach the last prompt position only."""
  batch = batch_of(('abc +de', [1, 1]))
  changed = {**batch, 'texts_input_tokens': batch['texts_input_tokens'] * 0}
  before, after = FORWARD(PARAMS, batch)[0], FORWARD(PARAMS, changed)[0]
  last = len(WORDS.encode('abc +de'))
  np.testing.assert_array_equal(after[:last], before[:last])
  assert np.all(np.any(after[last : last + 2] != before[last : last + 2], -1))


def test_a_model_reads_no_tokens_of_another():
  """'augmenting' is the keys' name for all, unless a model has that name."""

  class Towers:
    augmenting = dict.fromkeys(['augmenting', 'code'])
    own_tokens = {'augmenting'}

  batch = {'augmenting_input_tokens': 0}
  assert sources.side_of(batch, 'augmenting', Towers) == 'augmenting'
  assert sources.side_of(batch, 'code', Towers) == 'decoder'
  Towers.augmenting = dict.fromkeys(['math', 'code'])
  for own, sides in (
    ({'math'}, ('augmenting', 'decoder')),
    ((), ('augmenting', 'augmenting')),
  ):
    Towers.own_tokens = own
    read = [sources.side_of(batch, n, Towers) for n in ('math', 'code')]
    assert tuple(read) == sides


def test_tokens_of_ones_own_are_not_the_anchors():
  batch = tiny.batch_of(np.zeros((1, 4)))
  with pytest.raises(
    ValueError, match="'code' reads tokens of its own: the ba"
  ):
    MODEL(PARAMS, batch)
  own = {k: v for k, v in batch_of(('a', [1])).items() if 'texts' not in k}
  with pytest.raises(ValueError, match='batch needs texts_input_tokens and so'):
    MODEL(PARAMS, own)
  cache = MODEL.empty_cache(batch=1, slots=4)
  with pytest.raises(ValueError, match=r"\['code', 'texts'\] read tokens of t"):
    MODEL.extend(PARAMS, np.zeros((1, 1)), np.zeros((1, 1)), cache)


# --- m_A as an encoder -------------------------------------------------------


@functools.cache
def prompt_only():
  """The same model, and one vocabulary for all: m_A reads the prompt alone."""
  model = tiny.composed(augmenting_context='prompt')
  reader = alignment.Reader(
    WORDS, WORDS, anchor_size=tiny.VOCAB, reads_targets=False
  )
  return model, toys.params(model), {'code': reader}


def prompt_batch(targets, *, prompt='abc +de'):
  _, _, readers = prompt_only()
  ids, ends = alignment.begin(WORDS, prompt)
  reading = readers['code'].read_prompt(prompt, anchor_ends=ends)
  batch = tiny.batch_of([[*ids, *targets]])
  return {**batch, **batches.augmenting_arrays('code', [reading])}, len(ids)


def test_with_the_prompt_alone_m_a_reads_no_target():
  model, params, _ = prompt_only()
  batch, last = prompt_batch([3, 1, 4])
  before = tiny.logits(model, params, batch)[0]
  # Nothing of it is read before the prompt is known, and all of it after.
  changed = {**batch, 'code_input_tokens': batch['code_input_tokens'] * 0}
  after = tiny.logits(model, params, changed)[0]
  np.testing.assert_array_equal(after[: last - 1], before[: last - 1])
  assert np.all(np.any(after[last - 1 :] != before[last - 1 :], axis=-1))
  assert batch['code_input_tokens'].shape[1] == last


@pytest.mark.slow
def test_decoding_with_the_prompt_alone_is_the_full_forward():
  """And m_A runs once: no step of decoding feeds it."""
  model, params, readers = prompt_only()
  ids, ends = alignment.begin(WORDS, 'abc +de')
  reading = readers['code'].read_prompt('abc +de', anchor_ends=ends)
  run = generation.Generator(
    OnlyWords(model), vocabulary=WORDS, readers=readers
  )
  ((found,),) = run(
    params, [ids], readings={'code': [reading]}, max_new_tokens=5
  )
  said = []
  for _ in range(5):
    batch, last = prompt_batch([*said, 0])
    logits = tiny.logits(model, params, batch)[0, last + len(said) - 1]
    said.append(int(np.argmax(logits[:11])))
  assert found.tokens == said
  cache = model.empty_cache(batch=1, slots=4, augmenting_slots={'code': 3})
  assert cache.augmenting == {}
