"""Prompts by a template: examples with answers, then one without."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import itertools
import string


@dataclasses.dataclass(frozen=True)
class Template:
  """A text with fields in braces, which ends with the field of the answer.

  Spaces before the answer belong to it: a prompt that ends in a space is one
  that few vocabularies continue well.

  Attributes:
    text: for instance 'Question: {question}\\nAnswer: {answer}'.
    answer: the name of the last field.
    allowed: the names of the other fields.
    owner: what the template is of, for errors.
  """

  text: str
  answer: str
  allowed: tuple[str, ...]
  owner: str

  def __post_init__(self):
    try:
      fields = [name for _, name, _, _ in string.Formatter().parse(self.text)]
    except ValueError:
      fields = []
    ending = f'{{{self.answer}}}'
    named = [name for name in fields if name is not None]
    if (
      not self.text.endswith(ending)
      or named.count(self.answer) != 1
      or not set(named) <= {self.answer, *self.allowed}
    ):
      allowed = ', '.join(f'{{{name}}}' for name in self.allowed)
      raise ValueError(
        f'{self.owner}.template is {self.text!r}: it must end with {ending},'
        f' and else hold only {allowed}. Write other braces twice.'
      )

  def fill(self, fields: Mapping[str, str]) -> tuple[str, str]:
    """Returns prompt and answer of one example."""
    head = self.text.removesuffix(f'{{{self.answer}}}')
    bare = head.rstrip(' ')
    return bare.format(**fields), head[len(bare) :] + fields[self.answer]

  def prompt(
    self,
    shots: Iterable[Mapping[str, str]],
    fields: Mapping[str, str],
    *,
    separator: str = '\n\n',
  ) -> tuple[str, str]:
    """Returns the prompt with solved examples before it, and the answer."""
    solved = [''.join(self.fill(shot)) + separator for shot in shots]
    inputs, targets = self.fill(fields)
    return ''.join(solved) + inputs, targets


def first_line(output: str) -> str:
  """Returns the first line of what a model wrote, without space around it."""
  return output.split('\n', 1)[0].strip()


def choose_shots(
  owner: str,
  pool: Iterable[tuple[str, Mapping[str, str]]],
  count: int,
  *,
  tested: str,
) -> list[Mapping[str, str]]:
  """Returns the first `count` of a pool that are not what is tested.

  Args:
    owner: the task's class, for errors.
    pool: pairs of what identifies an example, and its fields.
    count: how many.
    tested: what identifies the tested example.

  Raises:
    ValueError: if there are not so many.
  """
  others = (fields for question, fields in pool if question != tested)
  shots = list(itertools.islice(others, count))
  if len(shots) < count:
    raise ValueError(
      f'{owner}.shots = {count}, and there are only {len(shots)} examples'
      ' besides the tested one. Ask for fewer.'
    )
  return shots


def check_shots(owner: str, shots: int) -> None:
  """Raises ValueError for a negative number of examples in the prompt."""
  if shots < 0:
    raise ValueError(f'{owner}.shots = {shots}: it must not be negative.')


def check_split(owner: str, split: str, splits: Sequence[str]) -> None:
  """Raises ValueError for a split that a task does not have."""
  if split not in splits:
    raise ValueError(
      f'{owner} has no split {split!r}; choose among {list(splits)}.'
    )
