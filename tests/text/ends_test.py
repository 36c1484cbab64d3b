"""Tests of calm_jax.text.ends."""

import pytest

from calm_jax.text import ends


def _ends(text, tokens, spans):
  return ends.ends_of(text, spans=spans, token_bytes=tokens)


def test_bytes_of_one_character_in_several_tokens():
  smile = '\U0001f600'.encode()
  tokens = [b'a', smile[:1], smile[1:3], smile[3:], b'b']
  spans = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
  assert _ends('a\U0001f600b', tokens, spans) == [1, 2, 4, 5, 6]


def test_a_space_that_is_not_in_the_text_takes_no_byte():
  assert _ends('ab', [b' ', b'ab'], [(0, 1), (0, 2)]) == [0, 2]
  assert _ends('ab c', [b' ab', b' c'], [(0, 2), (2, 4)]) == [2, 4]


def test_whole_tokens_count_as_they_stand():
  text, spans = 'é</s>b', [(0, 1), (0, 1), (1, 5), (5, 6), (5, 6)]
  tokens = [b'\xc3', b'\xa9', None, b' ', b'b']
  assert _ends(text, tokens, spans) == [1, 2, 6, 6, 7]


def test_a_changed_text_goes_by_characters():
  # 'e' and an accent became one character of two bytes; then a smile.
  text = 'e\u0301\U0001f600'
  smile = '\U0001f600'.encode()
  tokens = [b'\xc3', b'\xa9', smile[:2], smile[2:]]
  spans = [(0, 1), (0, 1), (2, 3), (2, 3)]
  # Neither byte of the first is known before the accent has been read.
  assert _ends(text, tokens, spans) == [3, 3, 5, 7]


def test_marks_that_were_sorted():
  # A mark above and one below a letter, which have an order of their own.
  text = 'x\u0300\u0323y'
  sorted_marks = [b'x', '\u0323'.encode(), '\u0300'.encode(), b'y']
  spans = [(0, 1), (1, 2), (2, 3), (3, 4)]
  assert _ends(text, sorted_marks, spans) == [5, 5, 5, 6]
  as_they_were = [b'x', '\u0300'.encode(), '\u0323'.encode(), b'y']
  assert _ends(text, as_they_were, spans) == [1, 3, 5, 6]


def test_dropped_white_space_belongs_to_no_token():
  text, spans = 'ab   c  ', [(0, 2), (5, 6)]
  assert _ends(text, [b' ab', b' c'], spans) == [2, 6]


@pytest.mark.parametrize('text', ['', '  '])
def test_no_tokens(text):
  assert _ends(text, [], []) == []
