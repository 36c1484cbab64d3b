"""Continues prompts from JSON lines, and writes JSON lines.

  echo '{"inputs": "abc + def ="}' | python -m calm_jax.infer \
      --gin_file=runs/infer.gin --gin.MODEL_DIR="'/tmp/x'"

An output file that holds the first rows already is continued, so the same
command ends what an interruption has cut off.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
import time
from typing import Any, Literal, TextIO

from calm_jax import evaluate
from calm_jax.model import Model
from calm_jax.models.pretrained import ModelSpec
from calm_jax.sampling import DecodingConfig

_SECONDS = 5  # between two lines of progress


def infer(
  *,
  model_dir: str,
  anchor: ModelSpec,
  augmenting: Mapping[str, ModelSpec] | None = None,
  system: str = 'composed',
  mode: Literal['predict', 'score'] = 'predict',
  input_file: str = '-',
  output_file: str = '-',
  batch_size: int = 32,
  max_new_tokens: int = 64,
  stop: Sequence[str] = (),
  decoding: DecodingConfig = DecodingConfig(),
  random_seed: int = 0,
  summarize_config: Callable[[pathlib.Path], None] | None = None,
) -> int:
  """Reads `{"inputs": text}` lines, writes them with an answer added, in order.

  Args:
    model_dir: of the run that trained the composition.
    anchor: the frozen anchor.
    augmenting: the frozen augmenting models by name.
    system: 'composed', 'anchor', or the name of an augmenting model.
    mode: 'predict' adds "prediction", a text, or "predictions" where several
      samples are wanted; 'score' reads "targets" too, and adds
      "log_likelihood" (in nats), "num_tokens" and "is_greedy".
    input_file: a file, or '-' for standard input.
    output_file: a file, or '-' for standard output. If it exists, it must hold
      answers to the first rows of the input, and is continued.
    batch_size: rows decoded at once, and read ahead.
    max_new_tokens: at most so many tokens an answer.
    stop: an answer ends before the first of these texts.
    decoding: greedy, sampling or beams.
    random_seed: of models with random weights; the training run's.
    summarize_config: not used; every entry point takes it.

  Returns:
    How many rows were written.

  Raises:
    ValueError: for a line that is not such an object, named by its number; or
      an output file of something else.
  """
  total = None
  wanted = ('inputs', 'targets') if mode == 'score' else ('inputs',)
  if input_file != '-':
    if not pathlib.Path(input_file).is_file():
      raise ValueError(
        f"input_file = {input_file!r} does not exist. Give a file, or '-' for"
        ' standard input.'
      )
    with open(input_file, encoding='utf-8') as source:
      total = sum(1 for _ in _rows(source, wanted))  # all lines are sound
  done = _continue(output_file, input_file, wanted)
  model = evaluate.load_systems(
    model_dir=model_dir,
    anchor=anchor,
    augmenting=augmenting or {},
    systems=[system],
    random_seed=random_seed,
  )[system]

  if mode == 'score':
    answer = functools.partial(_score, model, batch_size=batch_size)
  else:
    answer = functools.partial(
      _predict,
      model,
      batch_size=batch_size,
      max_new_tokens=max_new_tokens,
      stop=stop,
      config=decoding,
    )
  with _open(input_file, 'r') as source, _open(output_file, 'a') as target:
    rows = itertools.islice(_rows(source, wanted), done, None)
    return _stream(rows, target, answer, batch_size, done=done, total=total)


def _predict(
  model: Model, chunk: Sequence[dict], first: int, **how: Any
) -> tuple[list[dict], int]:
  """Returns what is added to each row, and how many tokens that is."""
  found = model.decode(
    [row['inputs'] for row in chunk],
    seeds=range(first, first + len(chunk)),
    **how,
  )
  tokens = sum(len(one.tokens) for each in found for one in each)
  texts = [[one.text for one in each] for each in found]
  if how['config'].num_samples > 1:
    return [{'predictions': each} for each in texts], tokens
  return [{'prediction': each[0]} for each in texts], tokens


def _score(
  model: Model, chunk: Sequence[dict], first: int, *, batch_size: int
) -> tuple[list[dict], int]:
  """The same for log-likelihoods."""
  del first
  scores = model.score(
    [row['inputs'] for row in chunk],
    [row['targets'] for row in chunk],
    batch_size=batch_size,
  )
  tokens = sum(score.num_tokens for score in scores)
  return [dataclasses.asdict(score) for score in scores], tokens


def _stream(
  rows: Iterator[dict],
  target: TextIO,
  answer: Callable[[list[dict], int], tuple[list[dict], int]],
  batch_size: int,
  *,
  done: int,
  total: int | None,
) -> int:
  """Writes each row with its answer; tells of progress on standard error."""
  count = tokens = 0
  begun = shown = time.monotonic()
  of_all = '' if total is None else f'/{total}'
  while chunk := list(itertools.islice(rows, batch_size)):
    answers, new_tokens = answer(chunk, done + count)
    for row, one in zip(chunk, answers, strict=True):
      line = json.dumps({**row, **one}, ensure_ascii=False)
      target.write(line + '\n')
    target.flush()
    count, tokens = count + len(chunk), tokens + new_tokens
    now = time.monotonic()
    is_last = total is not None and done + count == total
    if is_last or now - shown > _SECONDS:
      rate = f'{tokens / (now - begun):,.0f} tokens/s'
      print(f'{done + count}{of_all} rows, {rate}', file=sys.stderr)
      shown = now
  return count


class _Standard:
  """Standard input or output as a file that is not closed."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def __enter__(self) -> TextIO:
    return self._stream

  def __exit__(self, *_: Any) -> None:
    pass


def _open(path: str, mode: str):
  if path == '-':
    return _Standard(sys.stdin if mode == 'r' else sys.stdout)
  return pathlib.Path(path).open(mode, encoding='utf-8')


def _continue(output_file: str, input_file: str, wanted: Sequence[str]) -> int:
  """Returns how many rows are answered; cuts off a line that is not whole."""
  path = pathlib.Path(output_file)
  if output_file == '-' or not path.exists():
    return 0
  whole = 0  # bytes
  count = 0
  with path.open('rb') as written, _open(input_file, 'r') as source:
    if input_file == '-':
      raise ValueError(
        f'output_file = {output_file!r} exists. A file can be continued if the'
        ' prompts come from a file too; name another, or delete it.'
      )
    rows = _rows(source, wanted)
    for line in written:
      if not line.endswith(b'\n'):
        break
      asked, answered = next(rows, None), _parse(line)
      if asked is None or not asked.items() <= answered.items():
        raise ValueError(
          f'output_file = {output_file!r} exists, and its line {count + 1} is'
          f' no answer to that row of {input_file!r}. Name another file, or'
          ' delete it.'
        )
      whole, count = whole + len(line), count + 1
  os.truncate(path, whole)
  print(
    f'{output_file} holds {count} answers, and is continued; to begin anew,'
    ' delete it.',
    file=sys.stderr,
  )
  return count


def _parse(line: bytes) -> dict:
  try:
    row = json.loads(line)
  except ValueError:
    return {}
  return row if isinstance(row, dict) else {}


def _rows(source: TextIO, wanted: Sequence[str]) -> Iterator[dict]:
  for number, line in enumerate(source, start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f'Line {number} is not JSON: {error}.') from error
    for name in wanted:
      if not isinstance(row, dict) or not isinstance(row.get(name), str):
        raise ValueError(
          f'Line {number} must be an object with a text "{name}", like'
          ' {"inputs": "abc + def ="}.'
        )
    yield row


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('infer')
