"""GSM8K, in English or by file in other languages, and MGSM."""

from collections.abc import Mapping, Sequence
import dataclasses
import operator
import pathlib
import re
from typing import Any, ClassVar

from calm_jax.tasks import final_numbers, prompts, reading, text_scores

_GSM8K_FORMAT = (
  "GSM8K's JSON lines (train.jsonl, test.jsonl of openai/grade-school-math, or"
  ' a translation): {"question": text, "answer": text that ends in #### 18, or'
  ' the number alone}'
)
_MGSM_FORMAT = (
  "MGSM's mgsm_<language>.tsv (google-research/url-nlp): a question, a tab, and"
  ' its answer, a number'
)
# The official expression, and the marks of its calculator.
_STRICT = re.compile(r'#### (\-?[0-9\.\,]+)')
_CALCULATOR = re.compile(r'<<[^<>]*>>')
_BARE = re.compile(r'[-\u2212]?[\d.,\u066b\u066c]*\d')
_TEMPLATE = 'Question: {question}\nAnswer: {answer}'
# Of the languages of MGSM, those that write 1,5 for one and a half.
_DECIMAL_COMMA = ('de', 'es', 'fr', 'ru')


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSM8K:
  """Grade-school mathematics by chain of thought.

  The solved examples in a prompt are the first of the training file, but never
  the tested question. A translated set is named by its files.

  Attributes:
    directory: with train.jsonl and test.jsonl; not needed where the files are
      named.
    test_file: used instead of directory/test.jsonl.
    train_file: used instead of directory/train.jsonl: what to train on, and
      where the solved examples come from.
    language: of a translated set, for the name of its results.
    shots: solved examples in a prompt.
    calculator_marks: whether answers keep marks like <<16-3-4=9>>.
    decimal_mark: of the language, for the flexible score.
    template: of one example; {question}, and it ends in {answer}.
    max_new_tokens: of an answer.
    stop: an answer ends before the first of these.
    eval_splits: the splits that are evaluated.
    called: its name in the results, where one task is evaluated in two ways.
  """

  directory: str | None = None
  test_file: str | None = None
  train_file: str | None = None
  language: str | None = None
  shots: int = 8
  calculator_marks: bool = False
  decimal_mark: final_numbers.DecimalMark = '.'
  template: str = _TEMPLATE
  max_new_tokens: int = 512
  stop: tuple[str, ...] = ('\nQuestion:',)
  eval_splits: tuple[str, ...] = ('test',)
  called: str | None = None
  splits: ClassVar[tuple[str, ...]] = ('train', 'test')

  def __post_init__(self):
    _check('GSM8K', self)
    if not (self.directory or self.test_file or self.train_file):
      raise ValueError(
        'GSM8K has no files: set GSM8K.directory, where train.jsonl and'
        ' test.jsonl are, or GSM8K.test_file and GSM8K.train_file.'
      )

  @property
  def name(self) -> str:
    made = f'gsm8k_{self.language}' if self.language else 'gsm8k'
    return self.called or made

  def examples(self, split: str) -> list[dict[str, Any]]:
    """Returns the prompts of a split, with 'question', 'answer' and 'number'.

    The answer is what the official expression finds in the reference.

    Raises:
      ValueError: if a file is missing, or a line of it has another form.
    """
    prompts.check_split('GSM8K', split, self.splits)
    pool = self._rows('train') if self.shots else []
    return _prompts(self, pool, self._rows(split))

  def prediction(
    self, output: str, example: Mapping[str, Any]
  ) -> dict[str, str | None]:
    """Returns the number after #### ('strict'), and the last ('flexible')."""
    del example
    return {
      'strict': _strict(output),
      'flexible': final_numbers.last_number(
        output, decimal_mark=self.decimal_mark
      ),
    }

  def metrics(
    self,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[Sequence[Mapping[str, str | None]]],
  ) -> dict[str, float | str]:
    """Returns percentages: strict, as published, and flexible."""
    answers = [example['answer'] for example in examples]
    strict = [[sample['strict'] for sample in row] for row in predictions]
    return {
      'strict': text_scores.percent(operator.eq, strict, answers),
      'flexible': _flexible(examples, predictions),
    }

  def _rows(self, split: str) -> list[dict[str, str]]:
    rows = _worked(self._file(split), self.decimal_mark)
    if not self.calculator_marks:
      for row in rows:
        row['shown'] = _CALCULATOR.sub('', row['shown'])
    return rows

  def _file(self, split: str) -> str:
    named = {'train': self.train_file, 'test': self.test_file}[split]
    if named or self.directory:
      return named or str(pathlib.Path(self.directory) / f'{split}.jsonl')
    why = ', from which the prompts take their examples' if self.shots else ''
    raise ValueError(
      f'GSM8K.{split}_file is not set, nor GSM8K.directory{why}. Set one of'
      + (' them.' if split == 'test' else ' them, or GSM8K.shots = 0.')
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MGSM:
  """GSM8K's first 250 test questions in one language, by their last number.

  Attributes:
    directory: with mgsm_<language>.tsv.
    language: 'bn', 'de', 'en', 'es', 'fr', 'ja', 'ru', 'sw', 'te', 'th', 'zh',
      or any other that has a file.
    exemplars: JSON lines with 'question' and 'answer', a worked solution in the
      language; needed for `shots`.
    shots: solved examples in a prompt: the first of `exemplars`.
    decimal_mark: of the language; None is a comma for de, es, fr, ru.
    template: of one example; {question}, and it ends in {answer}.
    max_new_tokens: of an answer.
    stop: an answer ends before the first of these.
    eval_splits: the splits that are evaluated.
    called: its name in the results, where one task is evaluated in two ways.
  """

  directory: str
  language: str
  exemplars: str | None = None
  shots: int = 0
  decimal_mark: final_numbers.DecimalMark | None = None
  template: str = _TEMPLATE
  max_new_tokens: int = 512
  stop: tuple[str, ...] = ('\nQuestion:',)
  eval_splits: tuple[str, ...] = ('test',)
  called: str | None = None
  splits: ClassVar[tuple[str, ...]] = ('test',)

  def __post_init__(self):
    _check('MGSM', self)
    if self.shots and not self.exemplars:
      raise ValueError(
        f'MGSM.shots = {self.shots}, and MGSM.exemplars, the file of solved'
        ' examples, is not set. Set it, or MGSM.shots = 0.'
      )

  @property
  def name(self) -> str:
    return self.called or f'mgsm_{self.language}'

  def examples(self, split: str) -> list[dict[str, Any]]:
    """Returns the prompts, each with 'question' and 'number'.

    Raises:
      ValueError: if a file is missing, or a line of it has another form.
    """
    prompts.check_split('MGSM', split, self.splits)
    pool = _worked(self.exemplars, '.') if self.shots else []
    file = pathlib.Path(self.directory) / f'mgsm_{self.language}.tsv'
    rows = []
    for number, question, text in reading.tab_lines(
      file, expected=_MGSM_FORMAT
    ):
      if not _BARE.fullmatch(text):
        problem = f'the answer {text!r} is no number'
        raise reading.bad_line(file, number, problem, _MGSM_FORMAT)
      answer = final_numbers.last_number(text)
      rows.append({'question': question, 'shown': answer, 'number': answer})
    return _prompts(self, pool, rows)

  def prediction(
    self, output: str, example: Mapping[str, Any]
  ) -> dict[str, str | None]:
    """Returns the last number."""
    del example
    comma = self.language in _DECIMAL_COMMA
    mark = self.decimal_mark or (',' if comma else '.')
    return {'flexible': final_numbers.last_number(output, decimal_mark=mark)}

  def metrics(
    self,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[Sequence[Mapping[str, str | None]]],
  ) -> dict[str, float | str]:
    """Returns the percentage of right last numbers."""
    return {'accuracy': _flexible(examples, predictions)}


def _check(owner: str, task: GSM8K | MGSM) -> None:
  prompts.check_shots(owner, task.shots)
  prompts.Template(task.template, 'answer', ('question',), owner)
  if task.decimal_mark not in ('.', ',', None):
    raise ValueError(
      f"{owner}.decimal_mark = {task.decimal_mark!r}; choose '.' or ','."
    )


def _prompts(
  task: GSM8K | MGSM,
  pool: Sequence[Mapping[str, str]],
  rows: Sequence[Mapping[str, str]],
) -> list[dict[str, str]]:
  """Returns examples from rows with 'question' and 'shown', the answer."""
  owner = type(task).__name__
  template = prompts.Template(task.template, 'answer', ('question',), owner)
  fields = lambda row: {'question': row['question'], 'answer': row['shown']}
  pairs = [(row['question'], fields(row)) for row in pool]
  made = []
  for row in rows:
    shots = prompts.choose_shots(
      owner, pairs, task.shots, tested=row['question']
    )
    inputs, targets = template.prompt(shots, fields(row))
    rest = {name: text for name, text in row.items() if name != 'shown'}
    made.append({'inputs': inputs, 'targets': targets, **rest})
  return made


def _worked(file: str, decimal_mark: str) -> list[dict[str, str]]:
  """Reads questions with worked answers, or with the number alone.

  Returns:
    'question', 'shown' (the answer as it stands), 'answer' (what the official
    expression finds, or else the number), 'number'.
  """
  fields = {'question': str, 'answer': (str, int, float)}
  rows = []
  for number, row in reading.json_lines(
    file, fields=fields, expected=_GSM8K_FORMAT
  ):
    text = str(row['answer']).strip()
    final = text.rpartition('####')[2].strip()
    value = final_numbers.last_number(final, decimal_mark=decimal_mark)
    if value is None or ('####' not in text and not _BARE.fullmatch(text)):
      problem = f'the answer ends in no #### and number: {text[-40:]!r}'
      raise reading.bad_line(file, number, problem, _GSM8K_FORMAT)
    rows.append(
      {
        'question': row['question'].strip(),
        'shown': text,
        'answer': _strict(text) or value,
        'number': value,
      }
    )
  return rows


def _strict(text: str) -> str | None:
  """Returns what the official expression finds first, without commas."""
  found = _STRICT.search(text)
  return found[1].strip().replace(',', '') if found else None


def _flexible(
  examples: Sequence[Mapping[str, Any]],
  predictions: Sequence[Sequence[Mapping[str, str | None]]],
) -> float:
  """Returns how many last numbers are right, in percent."""
  return text_scores.percent(
    final_numbers.same_number,
    [[sample['flexible'] for sample in row] for row in predictions],
    [example['number'] for example in examples],
  )
