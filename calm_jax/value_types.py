"""Whether a value fits the annotation of a parameter."""

from collections.abc import Callable, Mapping, Sequence
import inspect
import types
import typing
from typing import Any, Literal

# What a configuration writes down; all else stands for something.
_PLAIN = (str, bytes, int, float, complex, tuple, list, dict, type(None))


def check(
  value: Any, target: Callable[..., Any], name: str, *, shown: str
) -> None:
  """Raises ValueError if a value does not fit a parameter.

  Args:
    value: plain, as a configuration gives it.
    target: the function or class.
    name: of its parameter.
    shown: what the error calls it.
  """
  expected = _annotation(target, name)
  if not fits(value, expected):
    named = expected.__name__ if inspect.isclass(expected) else str(expected)
    raise ValueError(
      f'{shown} = {value!r} has the wrong type: expected {named}.'
    )


def check_reference(
  target: Callable[..., Any], name: str, *, shown: str, is_called: bool
) -> None:
  """Raises ValueError if `@f` is given for what f returns, or `@f()` for f.

  Args:
    target: the function or class.
    name: of its parameter.
    shown: what the error calls it.
    is_called: whether the reference ends in ().
  """
  expected = _annotation(target, name)
  origin, arguments = typing.get_origin(expected), typing.get_args(expected)
  union = origin in (typing.Union, types.UnionType)
  kinds = {_is_function(one) for one in (arguments if union else (expected,))}
  if None not in kinds and is_called in kinds and (not is_called) not in kinds:
    raise ValueError(
      f'{shown} is given '
      + (
        'what a function returns, and expects the function: leave () out.'
        if is_called
        else 'a function, and expects what it returns: write () after it.'
      )
    )


def _annotation(target: Callable[..., Any], name: str) -> Any:
  function = target.__init__ if inspect.isclass(target) else target
  return typing.get_type_hints(function).get(name, Any)


def _is_function(expected: Any) -> bool | None:
  """Whether an annotation is of functions; None if it says nothing."""
  if expected is Any:
    return None
  return typing.get_origin(expected) is Callable or expected is Callable


def fits(value: Any, expected: Any) -> bool:
  """Whether a plain value fits an annotation; what we cannot judge, fits."""
  if expected is Any or not isinstance(value, _PLAIN):
    return True
  origin, arguments = typing.get_origin(expected), typing.get_args(expected)
  if origin in (typing.Union, types.UnionType):
    return any(fits(value, one) for one in arguments)
  if origin is Literal:
    return value in arguments
  if expected is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if expected is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if origin is tuple:
    return isinstance(value, tuple | list) and _members_fit(value, arguments)
  if origin is not None and inspect.isclass(origin):
    return isinstance(value, origin) and _parts_fit(value, arguments)
  if inspect.isclass(expected) and not getattr(expected, '_is_protocol', False):
    return isinstance(value, expected)
  return True


def _parts_fit(value: Any, arguments: Sequence[Any]) -> bool:
  """Whether what a mapping or a sequence holds fits its annotation."""
  if isinstance(value, Mapping) and len(arguments) == 2:
    keys, values = arguments
    return all(fits(k, keys) and fits(v, values) for k, v in value.items())
  if isinstance(value, Sequence) and len(arguments) == 1:
    is_text = isinstance(value, str | bytes)  # a sequence, but never meant
    return not is_text and all(fits(one, arguments[0]) for one in value)
  return True


def _members_fit(value: Sequence[Any], arguments: Sequence[Any]) -> bool:
  """Whether a tuple's members fit: of one type each, or all of one."""
  if len(arguments) == 2 and arguments[1] is Ellipsis:
    return all(fits(one, arguments[0]) for one in value)
  return len(value) == len(arguments) and all(map(fits, value, arguments))
