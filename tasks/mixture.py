"""Mixtures of texts to train on (D_C), from tasks and from files.

They are plain values: `calm_jax.seqio_mixtures` gives them to SeqIO.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import glob
import itertools
import os
import pathlib
from typing import Any, ClassVar

from calm_jax.tasks import prompts, reading

_FORMATS = {
  '.jsonl': (
    'JSON lines, all {"inputs": text, "targets": text} or all {"text": text}'
  ),
  '.tsv': 'parallel text: a text, a tab, and its target, in every line',
  '.txt': 'a document in every line',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFile:
  """The texts of one file, or of several, read line by line.

  Attributes:
    path: of a file that ends in .jsonl, .tsv or .txt. JSON lines hold either
      prompts and targets or documents ('text'); a .tsv holds parallel text, a
      .txt one document a line. A document is predicted whole. With * it stands
      for all files of that pattern, in the order of their names.
    template: how prompt and target become a text; {inputs}, and it ends in
      {targets}. None is '{inputs}{targets}', and for a .tsv a line each.
  """

  path: str
  template: str | None = None
  splits: ClassVar[tuple[str, ...]] = ('train',)

  def __post_init__(self):
    if self._ending() not in _FORMATS:
      known = '; '.join(f'{end}: {what}' for end, what in _FORMATS.items())
      raise ValueError(
        f'TextFile.path = {self.path!r} ends in {self._ending()!r}, so its'
        f' format is not known. Rename it, {known}.'
      )
    self._template()

  @property
  def name(self) -> str:
    return pathlib.Path(self.path).stem

  def examples(self, split: str) -> Iterator[dict[str, str]]:
    """Yields 'inputs', which are empty for documents, and 'targets'.

    Raises:
      ValueError: if there is no such file; later, if a line has another form.
    """
    prompts.check_split('TextFile', split, self.splits)
    expected = _FORMATS[self._ending()]
    files = self.files()
    for file in files:
      reading.existing_file(file.path, expected=expected)
    read = {
      '.jsonl': TextFile._json_examples,
      '.tsv': TextFile._parallel,
      '.txt': TextFile._documents,
    }[self._ending()]
    return itertools.chain.from_iterable(read(one, expected) for one in files)

  def files(self) -> list['TextFile']:
    """Returns the texts of each file by themselves."""
    path = os.path.expanduser(self.path)
    found = [] if os.path.exists(path) else sorted(glob.glob(path))
    return [dataclasses.replace(self, path=one) for one in found] or [self]

  def _json_examples(self, expected: str) -> Iterator[dict[str, str]]:
    template = self._template()
    for number, row in reading.json_lines(
      self.path, fields={}, expected=expected
    ):
      names = ('text',) if 'text' in row else ('inputs', 'targets')
      wrong = [name for name in names if not isinstance(row.get(name), str)]
      if wrong or not row[names[-1]]:
        problem = f'no text {(wrong or names)[-1]!r} among {sorted(row)}'
        raise reading.bad_line(self.path, number, problem, expected)
      if names == ('text',):
        yield {'inputs': '', 'targets': row['text']}
      else:
        inputs, targets = template.fill(row)
        yield {'inputs': inputs, 'targets': targets}

  def _parallel(self, expected: str) -> Iterator[dict[str, str]]:
    template = self._template()
    for _, source, target in reading.tab_lines(self.path, expected=expected):
      inputs, targets = template.fill({'inputs': source, 'targets': target})
      yield {'inputs': inputs, 'targets': targets}

  def _documents(self, expected: str) -> Iterator[dict[str, str]]:
    for _, line in reading.lines(self.path, expected=expected):
      if line.strip():
        yield {'inputs': '', 'targets': line}

  def _ending(self) -> str:
    return pathlib.Path(self.path).suffix.lower()

  def _template(self) -> prompts.Template:
    separator = '\n' if self._ending() == '.tsv' else ''
    text = self.template or f'{{inputs}}{separator}{{targets}}'
    return prompts.Template(text, 'targets', ('inputs',), 'TextFile')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A split of a task, and how often it is drawn.

  Attributes:
    task: has a `name`, `splits`, and `examples(split)` with the texts 'inputs'
      and 'targets': any task of evaluation, or a `TextFile`.
    split: one of the task's.
    rate: relative to the other parts'.
  """

  task: Any
  split: str = 'train'
  rate: float = 1.0

  def __post_init__(self):
    prompts.check_split(self.task.name, self.split, self.task.splits)
    if not self.rate > 0:
      raise ValueError(
        f'The rate of {self.task.name!r} is {self.rate}: it must be positive.'
        ' Leave out a part that is not wanted.'
      )

  def shards(self) -> list[Any]:
    """Returns what can be read side by side: each file, or the task."""
    return self.task.files() if isinstance(self.task, TextFile) else [self.task]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """Parts drawn by their rates; `seqio_batches` takes it instead of a name.

  Attributes:
    name: by which SeqIO is to know it: letters, digits, '_' and '.'.
    parts: at least one.
  """

  name: str
  parts: Sequence[Part]

  def __post_init__(self):
    object.__setattr__(self, 'parts', tuple(self.parts))
    if not self.parts:
      raise ValueError(f'The mixture {self.name!r} has no parts; add one.')
    if not self.name.replace('.', '_').isidentifier():
      raise ValueError(
        f'The mixture name {self.name!r} must be letters, digits, _ and .'
      )
