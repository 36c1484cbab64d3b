"""Which plain values fit which annotations.

Run: pytest tests/value_types_test.py
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest

from calm_jax import value_types

REFERENCE = object()  # what a configuration does not write down itself


@pytest.mark.parametrize(
  ('value', 'annotation'),
  [
    (1, int),
    (1, float),
    (None, int | None),
    ('a', Literal['a', 'b']),
    (['a'], Sequence[str]),
    (('a', 'b'), Sequence[str]),
    ((1, 2), tuple[int, int]),
    ([1, 2, 3], tuple[int, ...]),
    ({'a': 1}, Mapping[str, int]),
    ({'a': REFERENCE}, Mapping[str, int]),
    ({'a': ['b']}, Mapping[str, Sequence[str]]),
    (REFERENCE, int),
  ],
)
def test_what_fits(value, annotation):
  assert value_types.fits(value, annotation)


@pytest.mark.parametrize(
  ('value', 'annotation'),
  [
    (True, int),
    (False, float),
    (1.0, int),
    ('c', Literal['a', 'b']),
    ('text', Sequence[str]),
    ([1], Sequence[str]),
    ((1,), tuple[int, int]),
    (('a', 2), tuple[int, int]),
    ([1, 'b'], tuple[int, ...]),
    ({'a': '1'}, Mapping[str, int]),
    ({1: 1}, Mapping[str, int]),
    ({'a': 'runs'}, Mapping[str, Sequence[str]]),
    (None, int),
  ],
)
def test_what_does_not(value, annotation):
  assert not value_types.fits(value, annotation)


def function(
  made: int,
  maker: Callable[..., int],
  either: int | Callable[[], int],
  any_: Any,
):
  """Takes what another function returns, or that function."""


@pytest.mark.parametrize(
  ('name', 'is_called', 'problem'),
  [
    ('made', False, 'write .. after it'),
    ('maker', True, 'leave .. out'),
    ('made', True, None),
    ('maker', False, None),
    ('either', True, None),
    ('either', False, None),
    ('any_', False, None),
  ],
)
def test_functions_and_what_they_return(name, is_called, problem):
  def check():
    value_types.check_reference(
      function, name, shown='f.x', is_called=is_called
    )

  if problem is None:
    check()
    return
  with pytest.raises(ValueError, match=f'f.x .*{problem}'):
    check()
