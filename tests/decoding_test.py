"""Greedy decoding through the caches, against a loop without any.

Run: pytest tests/decoding_test.py
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from calm_jax import composition, decoding
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


def generate(model, prompts, *, eos_ids=(), **settings):
  run = decoding.make_generate(model, max_new_tokens=NEW, eos_ids=eos_ids)
  return run(toys.params(model), prompts, batch_size=2, pad_id=7, **settings)


@pytest.mark.slow
@pytest.mark.parametrize('model', [ALONE, COMPOSED], ids=['alone', 'composed'])
def test_decoding_is_argmax_of_the_full_forward(model):
  """Ragged prompts, in batches of two by length, answered in their order."""
  assert len({tuple(row) for row in expected(model)}) > 2
  assert generate(model, PROMPTS) == expected(model)
  assert expected(ALONE) != expected(COMPOSED)


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
  assert generate(COMPOSED, PROMPTS, eos_ids=eos_ids) == cut


def test_nothing_to_continue():
  with pytest.raises(ValueError, match='A prompt is empty'):
    generate(ALONE, [[1], []])
  assert generate(ALONE, []) == []
