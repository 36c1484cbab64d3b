"""Reading the files of benchmarks, with errors that say file, line and format.

Lines end in a line feed, as the tools that wrote the files meant it;
`str.splitlines` would also split at characters inside a sentence.
"""

from collections.abc import Iterator, Mapping
import difflib
import gzip
import json
import pathlib
from typing import Any


def lines(
  path: str | pathlib.Path, *, expected: str
) -> Iterator[tuple[int, str]]:
  """Yields the lines of a text file with their numbers, from 1.

  Args:
    path: of a UTF-8 file, packed if it ends in .gz; '~' is the home directory.
    expected: what the file should be, and where it comes from, for errors.

  Raises:
    ValueError: if there is no such file, or a line is not UTF-8.
  """
  file = existing_file(path, expected=expected)
  open_file = gzip.open if file.suffix == '.gz' else open
  with open_file(file, 'rb') as stream:
    for number, raw in enumerate(stream, start=1):
      try:
        text = raw.decode('utf-8-sig' if number == 1 else 'utf-8')
      except UnicodeDecodeError as error:
        raise bad_line(
          file, number, f'not UTF-8 ({error.reason})', expected
        ) from error
      yield number, text.removesuffix('\n').removesuffix('\r')


def existing_file(path: str | pathlib.Path, *, expected: str) -> pathlib.Path:
  """Returns the path of a file; raises ValueError if there is none."""
  file = pathlib.Path(path).expanduser()
  if file.is_file():
    return file
  folder = file.parent
  if folder.is_dir():
    names = sorted(one.name for one in folder.iterdir())
    near = difflib.get_close_matches(file.name, names, n=3)
    there = f'{folder} has {_some(names)}'
    hint = f' Did you mean {" or ".join(near)}?' if near else ''
  else:
    there, hint = f'{folder} is not a directory', ''
  raise ValueError(
    f'There is no file {file} ({there}).{hint} Expected: {expected}.'
  )


def json_lines(
  path: str | pathlib.Path,
  *,
  fields: Mapping[str, type | tuple[type, ...]],
  expected: str,
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields the objects of a JSON-lines file with their line numbers.

  Args:
    path: of the file.
    fields: type by name of every field that an object must have.
    expected: as for `lines`.

  Raises:
    ValueError: for a missing file, or a line that is no such object.
  """
  for number, line in lines(path, expected=expected):
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise bad_line(path, number, f'not JSON ({error})', expected) from error
    if not isinstance(row, dict):
      raise bad_line(path, number, f'no JSON object: {line[:40]}', expected)
    for name, kind in fields.items():
      if not isinstance(row.get(name), kind):
        what = f'{name!r} is {row[name]!r}' if name in row else f'no {name!r}'
        problem = f'{what}; the fields are {sorted(row)}'
        raise bad_line(path, number, problem, expected)
    yield number, row


def tab_lines(
  path: str | pathlib.Path, *, expected: str
) -> Iterator[tuple[int, str, str]]:
  """Yields line number and both columns of a tab-separated file.

  Raises:
    ValueError: for a missing file, or a line without exactly two columns.
  """
  for number, line in lines(path, expected=expected):
    columns = [column.strip() for column in line.split('\t')]
    if len(columns) != 2 or not all(columns):
      full = sum(map(bool, columns))
      problem = f'{len(columns)} columns between tabs, {full} with text'
      raise bad_line(path, number, problem, expected)
    yield number, *columns


def bad_line(
  path: str | pathlib.Path, number: int, problem: str, expected: str
) -> ValueError:
  """Returns the error for a line of a file."""
  return ValueError(f'{path}, line {number}: {problem}. Expected: {expected}.')


def _some(names: list[str]) -> str:
  shown = ', '.join(names[:8]) or 'nothing'
  return f'{shown}, ... ({len(names)} in all)' if len(names) > 8 else shown
