"""CodeXGLUE code-to-text: a line that says what a function does."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, ClassVar

from calm_jax.tasks import prompts, reading, text_scores

_FORMAT = (
  "CodeXGLUE's code-to-text, <language>/{train,valid,test}.jsonl as its"
  ' preprocess.py writes them: {"code_tokens": texts, "docstring_tokens":'
  ' texts, ...}'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeToText:
  """Functions of one programming language, and their documentation.

  The solved examples in a prompt are the first of the training split, but never
  the tested function.

  Attributes:
    directory: with a folder for each language.
    language: 'go', 'java', 'javascript', 'php', 'python' or 'ruby', or any
      other folder.
    shots: solved examples in a prompt.
    max_code_tokens: longer functions are cut after so many of their tokens, in
      examples too; None cuts nothing.
    template: of one example; {code}, {language}, and it ends in {summary}.
    max_new_tokens: of an answer.
    stop: an answer ends before the first of these.
    eval_splits: the splits that are evaluated.
    called: its name in the results, where one task is evaluated in two ways.
  """

  directory: str
  language: str
  shots: int = 3
  max_code_tokens: int | None = 256
  template: str = 'Code: {code}\nSummary: {summary}'
  max_new_tokens: int = 128
  stop: tuple[str, ...] = ('\n',)
  eval_splits: tuple[str, ...] = ('test',)
  called: str | None = None
  splits: ClassVar[tuple[str, ...]] = ('train', 'valid', 'test')

  def __post_init__(self):
    prompts.check_shots('CodeToText', self.shots)
    self._template()

  @property
  def name(self) -> str:
    return self.called or f'code_to_text_{self.language}'

  def examples(self, split: str) -> list[dict[str, Any]]:
    """Returns the prompts of a split, each with the 'reference'.

    Raises:
      ValueError: if a file is missing, or a line of it has another form.
    """
    prompts.check_split('CodeToText', split, self.splits)
    template = self._template()
    pool: dict[str, dict[str, str]] = {}
    if self.shots:  # One more than asked for: the tested one may be among them.
      for fields in self._rows('train'):
        pool.setdefault(fields['code'], fields)
        if len(pool) > self.shots:
          break
    made = []
    for fields in self._rows(split):
      shots = prompts.choose_shots(
        'CodeToText', pool.items(), self.shots, tested=fields['code']
      )
      inputs, targets = template.prompt(shots, fields)
      made.append(
        {'inputs': inputs, 'targets': targets, 'reference': fields['summary']}
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
    """Returns the official smoothed BLEU-4, chrF1, and its signature."""
    references = [example['reference'] for example in examples]
    return {
      'smoothed_bleu4': text_scores.percent(
        text_scores.smoothed_bleu4, predictions, references
      ),
      **text_scores.chrf(predictions, references, names=('chrF1',)),
    }

  def _template(self) -> prompts.Template:
    names = ('code', 'language')
    return prompts.Template(self.template, 'summary', names, 'CodeToText')

  def _rows(self, split: str) -> Iterator[dict[str, str]]:
    """Yields the fields of the template, tokens joined by single spaces."""
    folder = pathlib.Path(self.directory).expanduser() / self.language
    file = folder / f'{split}.jsonl'
    fields = dict.fromkeys(('code_tokens', 'docstring_tokens'), list)
    for number, row in reading.json_lines(
      file, fields=fields, expected=_FORMAT
    ):
      limits = self.max_code_tokens, None
      texts = []
      for name, limit in zip(fields, limits, strict=True):
        tokens = row[name]
        if not all(isinstance(token, str) for token in tokens):
          problem = f'{name!r} holds what is no text'
          raise reading.bad_line(file, number, problem, _FORMAT)
        text = ' '.join(tokens[:limit])
        if name == 'docstring_tokens':  # as the official run.py reads them
          text = text.replace('\n', '')
        texts.append(' '.join(text.split()))
        if not texts[-1]:
          problem = f'{name!r} is empty'
          raise reading.bad_line(file, number, problem, _FORMAT)
      code, summary = texts
      yield {'code': code, 'summary': summary, 'language': self.language}
