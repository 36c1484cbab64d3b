"""The last number of a text, as people of many languages write numbers."""

import decimal
import re
from typing import Literal
import unicodedata

DecimalMark = Literal['.', ',']

# What separates groups of digits, whatever the language; an Arabic comma too.
_SPACES = ' \u00a0\u2009\u202f'
_GROUPS = f"{_SPACES}'\u2019\u066c"
_MARKS = str.maketrans(
  {
    '\uff0c': ',',  # Fullwidth, as in Chinese and Japanese texts.
    '\uff0e': '.',
    '\u066b': '.',  # Arabic: the decimal mark of its own.
    '\u2212': '-',  # The sign for minus, and its relatives.
    '\uff0d': '-',
    '\ufe63': '-',
  }
)
_CURRENCY = '[$\u20ac\u00a3\u00a5\u20b9\u09f3\u0e3f]'
_NUMBER = re.compile(
  # A minus after a word or a bracket subtracts, or is a hyphen; one with a
  # space behind it subtracts too, unless nothing is there to subtract from.
  rf'(?P<minus>(?<![\w)\].,])-{_CURRENCY}?|{_CURRENCY}-|(?<=[=:] )-\s)?'
  # Digits with single marks between them, or a decimal without a leading 0; a
  # point after a letter or a point ends an abbreviation: Rs.500.
  rf'(?P<digits>\d+(?:[.,{_GROUPS}]\d+)*|(?<![\w.])\.\d+)'
)


def last_number(text: str, *, decimal_mark: DecimalMark = '.') -> str | None:
  """Returns the last number of a text in plain form, or None.

  Digits of every script count. Marks between digits are read so: spaces,
  apostrophes and the Arabic mark separate thousands where the groups fit;
  commas and points are decimal or separate thousands by their number, order,
  and the digits after them; and where '1,234' or '1.234' could be either, with
  `decimal_mark` '.' the comma separates and the point is decimal, while with
  ',' both separate. What fits nothing is several numbers.

  Args:
    text: anything.
    decimal_mark: of the language; ',' for instance in German and Russian.

  Returns:
    '-1234.5' for '... is \u22121 234.50', without needless zeros.
  """
  text = _ascii_digits(text.translate(_MARKS))
  found = None
  for found in _NUMBER.finditer(text):  # noqa: B007  the last one
    pass
  if found is None:
    return None
  start, value = _last_of_run(found['digits'], decimal_mark)
  sign = '-' if found['minus'] and start == 0 else ''
  return _plain(sign + value)


def same_number(one: str | None, other: str) -> bool:
  """Whether two plain numbers are equal; None equals nothing."""
  return one is not None and decimal.Decimal(one) == decimal.Decimal(other)


def _last_of_run(digits: str, mark: str) -> tuple[int, str]:
  """Returns where the last number of digits with marks begins, and it."""
  for start in _starts(digits):
    text = _one_number(digits[start:], mark)
    if text is not None:
      return start, text
  raise AssertionError(digits)  # The last group alone is a number.


def _starts(digits: str) -> list[int]:
  if digits.startswith('.'):
    return [0]
  return [0] + [
    i + 1 for i, character in enumerate(digits) if not character.isdigit()
  ]


def _one_number(digits: str, mark: str) -> str | None:
  """Returns digits with marks as one plain number, if they are one."""
  whole, fraction = digits, ''
  if digits.startswith('.'):
    return f'0{digits}'
  marks = [c for c in digits if c in '.,']
  last = marks[-1] if marks else ''
  if last and digits.rindex(last) > _last_group_mark(digits):
    head, _, tail = digits.rpartition(last)
    if _is_decimal(head, tail, last, mark):
      whole, fraction = head, tail
  kinds = {c for c in whole if not c.isdigit()}
  if len(kinds) > 1 or (kinds and not _is_grouped(whole, kinds.pop())):
    return None
  plain = re.sub(r'\D', '', whole)
  return f'{plain}.{fraction}' if fraction else plain


def _last_group_mark(digits: str) -> int:
  return max((digits.rfind(c) for c in _GROUPS), default=-1)


def _is_decimal(head: str, tail: str, this: str, mark: str) -> bool:
  """Whether the last mark of a run, between `head` and `tail`, is decimal."""
  if this in head:  # A second one of its kind: it separates.
    return False
  others = [c for c in head if not c.isdigit()]
  if others:  # 1.234,5 and 1,234.5 in any language
    return True
  if this == '.' and mark == '.':
    return True
  if mark == ',':
    return not _is_grouped(f'{head}{this}{tail}', this)
  return False


def _is_grouped(whole: str, mark: str) -> bool:
  """Whether a mark separates thousands, or lakhs as in India: 1,00,000."""
  first, *groups = whole.split(mark)
  return (
    1 <= len(first) <= 3
    and first[0] != '0'
    and len(groups[-1]) == 3
    and (
      all(len(group) == 3 for group in groups)
      or all(len(group) == 2 for group in groups[:-1])
    )
  )


def _ascii_digits(text: str) -> str:
  return ''.join(
    str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text
  )


def _plain(text: str) -> str:
  number = decimal.Decimal(text)
  if number == 0:
    return '0'
  shown = format(number, 'f')
  return shown.rstrip('0').rstrip('.') if '.' in shown else shown
