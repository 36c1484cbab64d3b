"""Decoding through the caches, against a loop without any.

Run: pytest tests/decoding_test.py
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from calm_jax import composition, decoding, generation, sampling
from calm_jax.models import layers, stacking, transformer
from tests import tiny, toys

SMALL = dataclasses.replace(tiny.ANCHOR, num_layers=2, window_pattern=(4, None))
COMPOSED = tiny.composed(
  anchor=SMALL,
  augmenting={'code': dataclasses.replace(tiny.AUGMENTING, num_layers=1)},
  mapping=[tiny.connection(-1, 0), tiny.connection(0, 0)],
)
ALONE = composition.ComposedLM(COMPOSED.anchor)
NEW = 6
LENGTHS = (1, 5, 16, 3, 9)
PROMPTS = [tiny.tokens((length,), seed=length).tolist() for length in LENGTHS]


@functools.cache
def expected(model):
  """Argmax of the full forward pass, one token after the other."""
  params, rows = toys.params(model), [list(prompt) for prompt in PROMPTS]
  forward = jax.jit(model.__call__)
  for _ in range(NEW):
    tokens_BT = np.zeros((len(rows), max(LENGTHS) + NEW), np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    for b, row in enumerate(rows):
      tokens_BT[b, : len(row)] = row
      segments_BT[b, : len(row)] = 1
    logits_BTV = forward(params, tiny.batch_of(tokens_BT, segments_BT))
    for b, row in enumerate(rows):
      row.append(int(np.argmax(logits_BTV[b, len(row) - 1])))
  return [row[n:] for row, n in zip(rows, LENGTHS, strict=True)]


@functools.cache
def generator(model, eos_ids=()):
  vocabulary = toys.IdVocabulary(eos_ids=eos_ids)
  return generation.Generator(model, vocabulary=vocabulary)


def decode(model, prompts, *, eos_ids=(), new=NEW, **settings):
  settings = {'batch_size': 2, 'max_new_tokens': new, **settings}
  return generator(model, eos_ids)(toys.params(model), prompts, **settings)


def generate(model, prompts, **settings):
  found = decode(model, prompts, **settings)
  assert {len(each) for each in found} <= {1}
  return [each[0].tokens for each in found]


@pytest.mark.slow
@pytest.mark.parametrize('model', [ALONE, COMPOSED], ids=['alone', 'composed'])
def test_decoding_is_argmax_of_the_full_forward(model, monkeypatch):
  """Ragged prompts, in batches of two by length, answered in their order."""
  assert len({tuple(row) for row in expected(model)}) > 2
  assert generate(model, PROMPTS) == expected(model)
  assert expected(ALONE) != expected(COMPOSED)
  monkeypatch.setattr(generation, 'CHUNK', 2)  # looks in between
  assert generate(model, PROMPTS, new=NEW - 1) == [
    row[:-1] for row in expected(model)
  ]


@pytest.mark.slow
def test_each_eos_ends_a_row():
  """Whatever ids they have; the other rows go on."""
  rows = expected(COMPOSED)
  eos_ids = rows[1][3], rows[0][4]
  ends = [[i for i, x in enumerate(row) if x in eos_ids] for row in rows]
  cut = [row[: (at or [NEW])[0]] for row, at in zip(rows, ends, strict=True)]
  assert len({len(row) for row in cut}) > 1
  assert {row[at[0]] for row, at in zip(rows, ends, strict=True) if at} == {
    *eos_ids
  }
  found = decode(COMPOSED, PROMPTS, eos_ids=eos_ids)
  assert [one.tokens for (one,) in found] == cut
  assert [one.ended for (one,) in found] == [bool(at) for at in ends]
  # In one go, as T5X does it: a row that has ended repeats EOS.
  tokens_BT, lengths_B = generation.pad(PROMPTS)
  out_BM = decoding.predict_batch(
    toys.params(COMPOSED),
    tokens_BT,
    lengths_B,
    model=COMPOSED,
    max_new_tokens=NEW,
    eos_ids=eos_ids,
  )
  for row, start, at in zip(out_BM.tolist(), cut, ends, strict=True):
    after = row[len(start) :]
    assert row[: len(start)] == start
    assert not after or (after[0] in eos_ids and set(after[1:]) <= {eos_ids[0]})
    assert bool(after) == bool(at)


def test_nothing_to_continue():
  with pytest.raises(ValueError, match='A prompt is empty'):
    generate(ALONE, [[1], []])
  assert generate(ALONE, []) == []
  with pytest.raises(ValueError, match='max_new_tokens = 0: it must be a whol'):
    generate(ALONE, [[1]], new=0)
  with pytest.raises(ValueError, match="stop = 'ab': give a list of texts"):
    generate(ALONE, [[1]], stop='ab')


class Letters(toys.IdVocabulary):
  """Bytes; the two halves of é are tokens too."""

  def token_bytes(self, index):
    return bytes([index]) if index else None

  def decode(self, ids):
    pieces = [self.token_bytes(i) or b'' for i in ids if i != self.unk_id]
    text = b''.join(pieces).decode(errors='replace')
    return text if self.unk_id not in ids else f'{text} ?'.strip()


@pytest.mark.parametrize(
  ('tokens', 'stop', 'text', 'taken', 'ended'),
  [
    ('abcabc', ['ca'], 'ab', 4, True),  # across tokens, cut at the first
    ('abcabc', ['cab', 'bc'], 'a', 3, True),  # the one complete first
    ('abcabc', ['abcd'], 'abcabc', 6, False),
    ('aé\0b', ['éb'], 'a', 5, True),  # a special token has no bytes
    ('aéb#c', [], 'aéb', 4, True),  # EOS
    ('aé', ['b'], 'aé', 3, False),
    ('a~', [], 'a ?', 2, False),  # unknown is not nothing
    ('a~b', ['b'], 'a ?', 3, True),
    ('aa', ['a'], '', 1, True),
  ],
)
@pytest.mark.parametrize('at_once', [1, 2, 9])
def test_stop_strings_are_found_in_bytes(
  tokens, stop, text, taken, ended, at_once
):
  vocabulary = Letters(eos_ids=(ord('#'),))
  vocabulary.unk_id = ord('~')
  written = generation.Text(vocabulary, stop)
  ids = list(tokens.encode())
  for first in range(0, len(ids), at_once):
    written.extend(ids[first : first + at_once])
  assert written.result() == generation.Continuation(text, ids[:taken], ended)


def test_spaces_are_the_vocabularys_own():
  """Those it writes between words, and one that is the text's beginning."""

  class Ends(Letters):
    def decode(self, ids):
      return ' '.join(map(chr, ids))

  class Begins(Letters):
    def decode(self, ids):
      return bytes(ids).decode().removeprefix(' ')

  for vocabulary, said, text in (
    (Ends(), 'ab-c', 'a b - c'),
    (Begins(), '  ab c', '  ab c'),
  ):
    written = generation.Text(vocabulary, ['x'])
    written.extend(list(said.encode()))
    assert written.result().text == text


def test_half_a_letter_is_not_lost():
  written = generation.Text(Letters(), [])
  written.extend('aé'.encode()[:2])
  assert written.result().text == 'a\ufffd'


@pytest.mark.slow
def test_a_stopped_row_lets_others_go_on():
  rows = generate(ALONE, PROMPTS)
  stop = f' {rows[0][1]} '
  found = decode(ALONE, PROMPTS, stop=[stop])
  for row, (one,) in zip(rows, found, strict=True):
    text = ''.join(f' {i}' for i in row)
    assert one.text == text.split(stop)[0]
  assert len({one.ended for (one,) in found}) == 2


def test_new_lengths_compile_nothing_new():
  sizes = [generation.round_up(n) for n in range(1, 400)]
  assert set(sizes) == {16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512}
  assert all(size >= n for n, size in enumerate(sizes, start=1))
  small = [generation.round_up(n, smallest=1) for n in range(1, 9)]
  assert small == [1, 2, 3, 4, 6, 6, 8, 8]
  fresh = generation.Generator(ALONE, vocabulary=toys.IdVocabulary())
  traced = []
  extend = type(ALONE).extend

  def count(self, params, tokens_BT, *args, **settings):
    traced.append(tokens_BT.shape)
    return extend(self, params, tokens_BT, *args, **settings)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(type(ALONE), 'extend', count)
    for length, new in ((3, 2), (5, 4), (15, 6)):
      prompts = [list(range(length)), [1]]
      fresh(toys.params(ALONE), prompts, max_new_tokens=new, batch_size=2)
  assert sorted(traced) == [(2, 1), (2, 16)]


def test_rounding_up_makes_no_text_too_long():
  """A model whose positions end at 29; the last token is not read."""
  ends = dataclasses.replace(
    SMALL,
    rope_scaling=layers.RopeScaling(
      kind='dynamic', factor=2.0, original_length=29
    ),
  )
  short = composition.ComposedLM(transformer.DecoderLM(ends))
  free = composition.ComposedLM(transformer.DecoderLM(SMALL))
  params = toys.params(free)
  for length, new in ((24, 5), (25, 5), (29, 1), (3, 27)):
    prompts = [tiny.tokens((length,)).tolist()]
    settings = {'max_new_tokens': new, 'batch_size': 1}
    assert generator(short)(params, prompts, **settings) == generator(free)(
      params, prompts, **settings
    )
  with pytest.raises(
    ValueError, match='A sequence of 30 positions is longer t'
  ):
    generator(short)(params, [[1] * 26], max_new_tokens=5, batch_size=1)


def test_what_pads_a_row_needs_no_row_in_the_table():
  """Published vocabularies may pad with an id beyond their model's table."""
  beyond = toys.IdVocabulary()
  beyond.pad_id = COMPOSED.anchor.config.vocab_size + 3
  one = generation.Generator(COMPOSED, vocabulary=beyond)
  params = toys.params(COMPOSED)
  found = one(params, PROMPTS, max_new_tokens=NEW, batch_size=2)
  assert found == decode(COMPOSED, PROMPTS)


def test_no_token_is_chosen_that_a_model_has_no_row_for():
  """One vocabulary, and tables padded to different sizes."""
  anchor = dataclasses.replace(SMALL, tie_embeddings=False)
  short = dataclasses.replace(tiny.AUGMENTING, num_layers=1, vocab_size=20)
  model = tiny.composed(
    anchor=anchor,
    augmenting={'code': short},
    mapping=[tiny.connection(0, 0)],
  )
  assert decoding.readable_size(model) == 20 < anchor.vocab_size
  params = toys.params(model)
  # What the anchor would like best is beyond the other's table.
  kernel = params['anchor']['head']['kernel'].copy()
  kernel[:, 20:] *= 100
  params['anchor']['head']['kernel'] = kernel
  prompts = [[1, 2, 3], [4]]
  for config in (
    sampling.DecodingConfig(),
    sampling.DecodingConfig(num_beams=2),
    sampling.DecodingConfig(temperature=1.0),
  ):
    found = generator(model)(
      params, prompts, max_new_tokens=5, batch_size=2, config=config
    )
    for (one,) in found:
      assert len(one.tokens) == 5
      assert max(one.tokens) < 20


DRAWN = sampling.DecodingConfig(temperature=1.0, num_samples=2)


def test_another_seed_draws_another_text_by_the_same_program():
  fresh = generation.Generator(ALONE, vocabulary=toys.IdVocabulary())
  settings = {'max_new_tokens': NEW, 'batch_size': 2}
  found = [
    fresh(
      toys.params(ALONE),
      PROMPTS[:2],
      config=dataclasses.replace(DRAWN, seed=seed),
      **settings,
    )
    for seed in (0, -1, 2**70 + 5, 0)
  ]
  assert found[0] == found[3]
  assert found[0] != found[1] != found[2] != found[0]
  assert fresh._compiled.cache_info().currsize == 1


@pytest.mark.slow
def test_a_row_draws_the_same_beside_other_rows():
  """At fixed shapes: neighbours and places in the batch do not matter."""
  settings = {'config': DRAWN, 'seeds': [5, 9, 1, 0, 7]}
  rows = decode(COMPOSED, PROMPTS, batch_size=3, **settings)
  drawn = [tuple(one.tokens) for each in rows for one in each]
  assert len(set(drawn)) == len(drawn)
  assert rows == decode(COMPOSED, PROMPTS, batch_size=3, **settings)
  alone = decode(COMPOSED, PROMPTS[3:4], batch_size=3, config=DRAWN, seeds=[0])
  assert alone == rows[3:4]
  another = dataclasses.replace(DRAWN, seed=1)
  assert rows != decode(
    COMPOSED, PROMPTS, batch_size=3, config=another, seeds=settings['seeds']
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'config',
  [DRAWN, sampling.DecodingConfig(num_beams=2)],
  ids=['drawn', 'beams'],
)
def test_scanned_stacks_say_the_same(config):
  """Their caches have one axis more, and the rows are on another."""
  scanned = tiny.composed(
    anchor=SMALL,
    augmenting={'code': dataclasses.replace(tiny.AUGMENTING, num_layers=1)},
    mapping=[tiny.connection(-1, 0), tiny.connection(0, 0)],
    stack='scan',
  )
  params = toys.params(COMPOSED)
  move = functools.partial(stacking.restack, stack=np.stack)
  params = {
    'anchor': move(
      params['anchor'], source=COMPOSED.anchor, target=scanned.anchor
    ),
    'augmenting': {
      'code': move(
        params['augmenting']['code'],
        source=COMPOSED.augmenting['code'],
        target=scanned.augmenting['code'],
      )
    },
    'composition': params['composition'],
  }
  prompts = PROMPTS[:3]
  settings = {'max_new_tokens': NEW, 'batch_size': 3, 'config': config}
  found = generator(scanned)(params, prompts, **settings)
  assert found == decode(COMPOSED, prompts, batch_size=3, config=config)
