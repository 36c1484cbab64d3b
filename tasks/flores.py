"""FLORES-200: translation in any direction, scored by chrF and spBLEU."""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import pathlib
from typing import Any, ClassVar

from calm_jax.tasks import prompts, reading, text_scores

_FORMAT = (
  'one sentence a line, line n of every language being the same sentence, as'
  ' in flores200_dataset/{dev,devtest}/<code>.<split>'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flores:
  """Translation of single sentences, with solved examples before each.

  The examples are the first of the dev split, but never the tested sentence.

  Attributes:
    directory: flores200_dataset, with the folders dev and devtest.
    source: the code of the language to translate from, like 'swh_Latn'.
    target: the code of the language to translate to.
    shots: solved examples in a prompt.
    source_name: what the prompt calls the source language; None is its code.
    target_name: what it calls the target language.
    template: of one example; {source} is the sentence, and it ends in {target}.
    max_new_tokens: of an answer.
    stop: an answer ends before the first of these.
    eval_splits: the splits that are evaluated.
    called: its name in the results, where one task is evaluated in two ways.
  """

  directory: str
  source: str
  target: str
  shots: int = 5
  source_name: str | None = None
  target_name: str | None = None
  template: str = '{source_name}: {source}\n{target_name}: {target}'
  max_new_tokens: int = 256
  stop: tuple[str, ...] = ('\n',)
  eval_splits: tuple[str, ...] = ('devtest',)
  called: str | None = None
  splits: ClassVar[tuple[str, ...]] = ('dev', 'devtest')

  def __post_init__(self):
    prompts.check_shots('Flores', self.shots)
    self._template()
    if self.source == self.target:
      raise ValueError(
        f'Flores.source and Flores.target are both {self.source!r}; choose two'
        ' languages.'
      )

  @property
  def name(self) -> str:
    return self.called or f'flores_{self.source}_{self.target}'

  def examples(self, split: str) -> list[dict[str, Any]]:
    """Returns the prompts of a split, each with 'source' and 'reference'.

    Raises:
      ValueError: if a file is missing, has an empty line, or has another number
        of lines than the other language's.
    """
    prompts.check_split('Flores', split, self.splits)
    template = self._template()
    shown = self._pairs('dev') if self.shots else []
    pool = [(fields['source'], fields) for fields in shown]
    made = []
    for fields in self._pairs(split):
      source = fields['source']
      shots = prompts.choose_shots('Flores', pool, self.shots, tested=source)
      inputs, targets = template.prompt(shots, fields)
      made.append(
        {
          'inputs': inputs,
          'targets': targets,
          'source': source,
          'reference': fields['target'],
        }
      )
    return made

  def prediction(self, output: str, example: Mapping[str, Any]) -> str:
    """Returns the first line."""
    del example
    return prompts.first_line(output)

  def metrics(
    self,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[Sequence[str]],
  ) -> dict[str, float | str]:
    """Returns chrF1, chrF2, chrF2++, spBLEU if it can, and signatures."""
    references = [example['reference'] for example in examples]
    return {
      **text_scores.chrf(predictions, references),
      **text_scores.spbleu(predictions, references),
    }

  def _template(self) -> prompts.Template:
    names = ('source', 'source_name', 'target_name')
    return prompts.Template(self.template, 'target', names, 'Flores')

  def _pairs(self, split: str) -> list[dict[str, str]]:
    """Returns the fields of the template for each sentence of a split."""
    columns = [self._sentences(c, split) for c in (self.source, self.target)]
    counts = [len(column) for column in columns]
    if counts[0] != counts[1]:
      raise ValueError(
        f'{self._file(self.source, split)} has {counts[0]} lines, and'
        f' {self._file(self.target, split)} has {counts[1]}. Expected:'
        f' {_FORMAT}.'
      )
    names = {
      'source_name': self.source_name or self.source,
      'target_name': self.target_name or self.target,
    }
    return [
      {'source': source, 'target': target, **names}
      for source, target in zip(*columns, strict=True)
    ]

  def _sentences(self, code: str, split: str) -> list[str]:
    file = self._file(code, split)
    self._check_code(file, code, split)
    sentences = []
    for number, line in reading.lines(file, expected=_FORMAT):
      if not line.strip():
        raise reading.bad_line(file, number, 'an empty line', _FORMAT)
      sentences.append(line.strip())
    return sentences

  def _check_code(self, file: pathlib.Path, code: str, split: str) -> None:
    """Raises ValueError with near codes, if there is no file of this code."""
    if file.is_file() or not file.parent.is_dir():
      return
    codes = sorted(one.stem for one in file.parent.glob(f'*.{split}'))
    lower = {one.lower(): one for one in codes}
    near = difflib.get_close_matches(code.lower(), lower, n=3, cutoff=0.4)
    hint = ' or '.join(lower[one] for one in near)
    raise ValueError(
      f'There is no language {code!r} in {file.parent}, which has {len(codes)}:'
      f' {", ".join(codes[:5])}{", ..." if codes[5:] else ""}.'
      + (f' Did you mean {hint}?' if hint else f' Expected: {_FORMAT}.')
    )

  def _file(self, code: str, split: str) -> pathlib.Path:
    return pathlib.Path(self.directory).expanduser() / split / f'{code}.{split}'
