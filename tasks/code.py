"""HumanEval and MBPP: answers are programs, which run in a sandbox."""

from collections.abc import Mapping, Sequence
import dataclasses
import gzip
from typing import Any, ClassVar
import zlib

import numpy as np

from calm_jax import sandbox as sandbox_lib
from calm_jax.tasks import prompts, reading

_HUMANEVAL_FORMAT = (
  "HumanEval's JSON lines (HumanEval.jsonl.gz of openai/human-eval, packed or"
  ' not): {"task_id", "prompt", "entry_point", "canonical_solution", "test"}'
)
_MBPP_FORMAT = (
  "MBPP's JSON lines (mbpp/mbpp.jsonl of google-research/google-research):"
  ' {"text", "code", "task_id": number, "test_setup_code", "test_list",'
  ' "challenge_test_list"}'
)
_MBPP_PROMPT = (
  'You are an expert Python programmer, and here is your task: {text} Your code'
  ' should pass these tests:\n\n{tests}\n[BEGIN]\n'
)
_MBPP_SHOTS = (2, 3, 4)
_MBPP_SPLITS = {
  'train': range(601, 975),
  'validation': range(511, 601),
  'test': range(11, 511),
  'prompt': range(1, 11),
}


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
  """Returns the unbiased estimate that one of k samples is right.

  1 - C(n - c, k) / C(n, k), as the product that does not overflow; Chen et al.,
  "Evaluating Large Language Models Trained on Code", arXiv 2107.03374,
  equation 1.

  Args:
    num_samples: n, how many were drawn.
    num_correct: c, how many of them pass.
    k: how many one would draw.

  Raises:
    ValueError: unless 0 <= c <= n and 1 <= k <= n.
  """
  n, c = num_samples, num_correct
  if not (0 <= c <= n and 1 <= k <= n):
    raise ValueError(
      f'pass@{k} of {n} samples with {c} right: k must be in 1..{n}, and the'
      f' right ones in 0..{n}.'
    )
  if n - c < k:
    return 1.0
  return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HumanEval:
  """Functions completed from their signature and docstring, without examples.

  Attributes:
    path: HumanEval.jsonl.gz, or the same unpacked.
    ks: pass@k for each of these, besides pass@1.
    sandbox: where the programs run.
    max_new_tokens: of an answer.
    eval_splits: the splits that are evaluated.
    called: its name in the results, where one task is evaluated in two ways.
    stop: an answer ends before the first of these: whatever comes after the
      function.
  """

  path: str
  ks: tuple[int, ...] = (1,)
  sandbox: sandbox_lib.Sandbox = sandbox_lib.Sandbox()
  max_new_tokens: int = 512
  stop: tuple[str, ...] = ('\nclass', '\ndef', '\n#', '\nif', '\nprint')
  eval_splits: tuple[str, ...] = ('test',)
  called: str | None = None
  splits: ClassVar[tuple[str, ...]] = ('test',)

  def __post_init__(self):
    _check_ks('HumanEval', self.ks)

  @property
  def name(self) -> str:
    return self.called or 'humaneval'

  def examples(self, split: str) -> list[dict[str, Any]]:
    """Returns the problems, with 'task_id', 'entry_point' and 'test'.

    Raises:
      ValueError: if the file is missing, or a line of it has another form.
    """
    prompts.check_split('HumanEval', split, self.splits)
    names = 'prompt', 'canonical_solution', 'task_id', 'entry_point', 'test'
    rows = _rows(self.path, dict.fromkeys(names, str), _HUMANEVAL_FORMAT)
    return [
      {
        'inputs': row['prompt'],
        'targets': row['canonical_solution'],
        **{name: row[name] for name in ('task_id', 'entry_point', 'test')},
      }
      for row in rows
    ]

  def prediction(self, output: str, example: Mapping[str, Any]) -> str:
    """Returns the program: prompt, answer, tests, and their call."""
    call = f'check({example["entry_point"]})'
    return f'{example["inputs"]}{output}\n{example["test"]}\n{call}'

  def metrics(
    self,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[Sequence[str]],
  ) -> dict[str, float | str]:
    """Runs the programs and returns each pass@k in percent.

    Raises:
      ValueError: if there are fewer samples than a k, or no sandbox.
    """
    del examples
    return _pass_rates('HumanEval', predictions, self.ks, self.sandbox)

  def check(self, num_samples: int) -> None:
    """Raises ValueError if these cannot be scored, or nothing isolated."""
    _check_samples('HumanEval', self.ks, num_samples)
    sandbox_lib.run_all([], self.sandbox)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MBPP:
  """Short programs from a sentence and their tests.

  The prompt is the one of Austin et al., "Program Synthesis with Large Language
  Models", arXiv 2108.07732; the solved examples are task ids 2, 3 and 4. The
  splits are the published ones, by task id: prompt 1-10 (which holds the solved
  examples), test 11-510, validation 511-600, train 601-974. challenge_test_list
  is not used, as in the paper.

  Attributes:
    path: mbpp.jsonl.
    shots: solved examples in a prompt, at most 3.
    ks: pass@k for each of these, besides pass@1.
    sandbox: where the programs run.
    max_new_tokens: of an answer.
    eval_splits: the splits that are evaluated.
    called: its name in the results, where one task is evaluated in two ways.
    stop: an answer ends before the first of these.
  """

  path: str
  shots: int = 3
  ks: tuple[int, ...] = (1,)
  sandbox: sandbox_lib.Sandbox = sandbox_lib.Sandbox()
  max_new_tokens: int = 512
  stop: tuple[str, ...] = ('\n[DONE]', '[DONE]')
  eval_splits: tuple[str, ...] = ('test',)
  called: str | None = None
  splits: ClassVar[tuple[str, ...]] = tuple(_MBPP_SPLITS)

  def __post_init__(self):
    _check_ks('MBPP', self.ks)
    if not 0 <= self.shots <= len(_MBPP_SHOTS):
      raise ValueError(
        f'MBPP.shots = {self.shots}: the published examples are task ids'
        f' {_MBPP_SHOTS}, so it can be 0 to {len(_MBPP_SHOTS)}.'
      )

  @property
  def name(self) -> str:
    return self.called or 'mbpp'

  def examples(self, split: str) -> list[dict[str, Any]]:
    """Returns the problems, with 'task_id', 'setup' and 'tests'.

    Line ends are line feeds; in the file some are those of Windows.

    Raises:
      ValueError: if the file is missing, a line of it has another form, or it
        has no problem of the split or not those of the prompt.
    """
    prompts.check_split('MBPP', split, self.splits)
    fields = {'task_id': int, 'test_list': list}
    fields |= dict.fromkeys(('text', 'code', 'test_setup_code'), str)
    rows = {
      row['task_id']: {
        'text': row['text'].strip(),
        'code': _line_feeds(row['code']),
        'setup': _line_feeds(row['test_setup_code']),
        'tests': _line_feeds('\n'.join(row['test_list'])),
      }
      for row in _rows(self.path, fields, _MBPP_FORMAT)
    }
    ids = _MBPP_SPLITS[split]
    chosen = [number for number in ids if number in rows]
    shots = _MBPP_SHOTS[: self.shots]
    missing = [number for number in shots if number not in rows]
    if missing or not chosen:
      what = (
        f'the task ids {missing} of the prompt (or set MBPP.shots = 0)'
        if missing
        else f'any task id of the split {split!r}, {ids[0]} to {ids[-1]}'
      )
      raise ValueError(
        f'{self.path} does not have {what}. Expected: {_MBPP_FORMAT}.'
      )
    solved = {
      shot: _MBPP_PROMPT.format(**rows[shot])
      + f'{rows[shot]["code"]}\n[DONE]\n\n'
      for shot in shots
    }
    return [
      {
        'inputs': ''.join(solved[shot] for shot in shots if shot != number)
        + _MBPP_PROMPT.format(**rows[number]),
        'targets': rows[number]['code'],
        'task_id': number,
        'setup': rows[number]['setup'],
        'tests': rows[number]['tests'],
      }
      for number in chosen
    ]

  def prediction(self, output: str, example: Mapping[str, Any]) -> str:
    """Returns the program: answer, set-up of the tests, tests."""
    return '\n'.join([output, example['setup'], example['tests']])

  def metrics(
    self,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[Sequence[str]],
  ) -> dict[str, float | str]:
    """Runs the programs and returns each pass@k in percent.

    Raises:
      ValueError: if there are fewer samples than a k, or no sandbox.
    """
    del examples
    return _pass_rates('MBPP', predictions, self.ks, self.sandbox)

  def check(self, num_samples: int) -> None:
    """Raises ValueError if these cannot be scored, or nothing isolated."""
    _check_samples('MBPP', self.ks, num_samples)
    sandbox_lib.run_all([], self.sandbox)


def _check_ks(owner: str, ks: Sequence[int]) -> None:
  if not all(k >= 1 for k in ks):
    raise ValueError(f'{owner}.ks = {tuple(ks)}: each must be at least 1.')


def _check_samples(owner: str, ks: Sequence[int], num_samples: int) -> None:
  if max(ks, default=1) > num_samples:
    raise ValueError(
      f'{owner}.ks has {max(ks)}, and a problem has {num_samples} samples:'
      f' pass@k needs at least k of them. Draw {max(ks)} samples'
      f' (DecodingConfig.num_samples), or lower {owner}.ks.'
    )


def _rows(
  path: str, fields: Mapping[str, type], expected: str
) -> list[dict[str, Any]]:
  """Reads problems; each task_id must be the only one of its kind."""
  rows, lines = [], {}
  try:
    for line, row in reading.json_lines(path, fields=fields, expected=expected):
      for name in (name for name, kind in fields.items() if kind is list):
        if not all(isinstance(one, str) for one in row[name]):
          problem = f'{name!r} is not a list of texts'
          raise reading.bad_line(path, line, problem, expected)
      first = lines.setdefault(row['task_id'], line)
      if first != line:
        problem = f'task_id {row["task_id"]!r} was already in line {first}'
        raise reading.bad_line(path, line, problem, expected)
      rows.append(row)
  except (gzip.BadGzipFile, zlib.error, EOFError) as error:
    raise ValueError(
      f'{path} cannot be unpacked ({error}). Expected: {expected}.'
    ) from error
  if not rows:
    raise ValueError(f'{path} is empty. Expected: {expected}.')
  return rows


def _line_feeds(text: str) -> str:
  return text.replace('\r\n', '\n')


def _pass_rates(
  owner: str,
  programs: Sequence[Sequence[str]],
  ks: Sequence[int],
  sandbox: sandbox_lib.Sandbox,
) -> dict[str, float | str]:
  """Returns pass@k, the mean over problems in percent, for 1 and each k."""
  ks = sorted({1, *ks})
  _check_samples(owner, ks, min(len(samples) for samples in programs))
  flat = [program for samples in programs for program in samples]
  results = iter(sandbox_lib.run_all(flat, sandbox))
  counts = [
    (len(samples), sum(next(results).passed for _ in samples))
    for samples in programs
  ]
  return {
    f'pass@{k}': 100 * float(np.mean([pass_at_k(n, c, k) for n, c in counts]))
    for k in ks
  }
