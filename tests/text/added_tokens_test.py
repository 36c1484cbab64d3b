"""Tests of calm_jax.text.added_tokens."""

import tokenizers

from calm_jax.text import added_tokens


def _split(text, **flags):
  contents = ['<a>', '<a><b>', '.*']
  found = added_tokens.AddedTokens(
    {
      index: tokenizers.AddedToken(content, **flags)
      for index, content in enumerate(contents, start=10)
    }
  )
  return list(found.split(text))


def test_the_longest_token_wins_and_nothing_is_a_pattern():
  assert _split('x<a><b><a>.*') == [
    (0, 1, None),
    (1, 7, 11),
    (7, 10, 10),
    (10, 12, 12),
  ]
  assert _split('') == []
  assert _split('abc') == [(0, 3, None)]


def test_white_space_around_tokens():
  assert _split('x  <a> y', lstrip=True) == [
    (0, 1, None),
    (1, 6, 10),
    (6, 8, None),
  ]
  assert _split('x <a>\n y', rstrip=True)[1:] == [(2, 7, 10), (7, 8, None)]
  assert _split('x<a>y', single_word=True) == [(0, 5, None)]
  assert _split('x <a>', single_word=True)[1:] == [(2, 5, 10)]


def test_no_tokens():
  assert list(added_tokens.AddedTokens({}).split('ab')) == [(0, 2, None)]
