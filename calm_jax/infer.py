"""Continues prompts from JSON lines, and writes JSON lines.

  echo '{"inputs": "abc + def ="}' | python -m calm_jax.infer \
      --gin_file=runs/infer.gin --gin.MODEL_DIR="'/tmp/x'"

An output file that holds the first rows already is continued, so the same
command ends what an interruption has cut off.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
import time
from typing import Any, BinaryIO, Literal, TextIO

from calm_jax import evaluate, scoring
from calm_jax.model import Model
from calm_jax.models.pretrained import ModelSpec
from calm_jax.sampling import DecodingConfig

_SECONDS = 5  # between two lines of progress
# What a row is given; a field of that name in the input is replaced.
_ADDED = {
  'predict': ('prediction', 'predictions'),
  'score': tuple(field.name for field in dataclasses.fields(scoring.Score)),
}


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
    batch_size: rows decoded at once, and read ahead; at least 1.
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
  if batch_size < 1:
    raise ValueError(f'batch_size = {batch_size}: it must be at least 1.')
  input_file = os.path.expanduser(input_file)
  output_file = os.path.expanduser(output_file)
  total = None
  wanted = ('inputs', 'targets') if mode == 'score' else ('inputs',)
  _check_files(input_file, output_file)
  if input_file != '-':
    with _open(input_file, 'rb') as source:
      total = sum(1 for _ in _rows(source, wanted))  # all lines are sound
  done = _continue(
    output_file, input_file, wanted, mode=mode, samples=decoding.num_samples
  )
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
  with _open(input_file, 'rb') as source, _open(output_file, 'a') as target:
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
    try:
      answers, new_tokens = answer(chunk, done + count)
    except ValueError as error:
      first = done + count + 1
      raise ValueError(
        f'In the rows {first} to {first + len(chunk) - 1}: {error}'
      ) from error
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


def _check_files(input_file: str, output_file: str) -> None:
  """Raises ValueError for files that cannot be read or written, or are one."""
  source, target = pathlib.Path(input_file), pathlib.Path(output_file)
  if input_file != '-' and not source.is_file():
    is_folder = source.is_dir()
    raise ValueError(
      f'input_file = {input_file!r}'
      f' {"is a folder" if is_folder else "does not exist"}. Give a file, or'
      " '-' for standard input."
    )
  if output_file == '-':
    return
  if target.is_dir() or not target.parent.is_dir():
    raise ValueError(
      f'output_file = {output_file!r}'
      f' {"is a folder" if target.is_dir() else "is in no folder"}. Name a file'
      " in a folder that exists, or '-' for standard output."
    )
  if target.exists() and input_file != '-' and target.samefile(source):
    raise ValueError(
      f'input_file and output_file are both {output_file!r}. Name another'
      ' output: the input would be written over.'
    )


def _open(path: str, mode: str):
  """Opens a file, or standard input or output, which is not closed."""
  if path == '-':
    reads = mode == 'rb'
    return contextlib.nullcontext(sys.stdin.buffer if reads else sys.stdout)
  encoding = None if mode == 'rb' else 'utf-8'
  return pathlib.Path(path).open(mode, encoding=encoding)


def _continue(
  output_file: str,
  input_file: str,
  wanted: Sequence[str],
  *,
  mode: str,
  samples: int,
) -> int:
  """Returns how many rows are answered; cuts off a line that is not whole."""
  path = pathlib.Path(output_file)
  if output_file == '-' or not path.exists():
    return 0
  if input_file == '-':
    raise ValueError(
      f'output_file = {output_file!r} exists. A file can be continued if the'
      ' prompts come from a file too; name another, or delete it.'
    )
  whole = 0  # bytes
  count = 0
  with path.open('rb') as written, _open(input_file, 'rb') as source:
    rows = _rows(source, wanted)
    for line in written:
      if not line.endswith(b'\n'):
        break
      asked, answered = next(rows, None), _parse(line)
      if asked is None or not _is_answer(answered, asked, mode, samples):
        raise ValueError(
          f'output_file = {output_file!r} exists, and its line {count + 1} is'
          f' no answer to that row of {input_file!r} (mode = {mode!r},'
          f' num_samples = {samples}). Name another file, or delete it.'
        )
      whole, count = whole + len(line), count + 1
  os.truncate(path, whole)
  print(
    f'{output_file} holds {count} answers, and is continued; to begin anew,'
    ' delete it.',
    file=sys.stderr,
  )
  return count


def _is_answer(answered: dict, asked: dict, mode: str, samples: int) -> bool:
  added = _ADDED[mode]
  kept = {name: value for name, value in asked.items() if name not in added}
  if not kept.items() <= answered.items():
    return False
  if mode == 'score':
    return all(name in answered for name in added)
  if samples == 1:
    return isinstance(answered.get('prediction'), str)
  texts = answered.get('predictions')
  return isinstance(texts, list) and len(texts) == samples


def _parse(line: bytes) -> dict:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return {}
  return row if isinstance(row, dict) else {}


def _rows(source: BinaryIO, wanted: Sequence[str]) -> Iterator[dict]:
  """Yields the objects; a line that is none is named by its number."""
  for number, line in enumerate(source, start=1):
    try:
      text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
      if not text.strip():
        continue
      row = json.loads(text)
      json.dumps(row, ensure_ascii=False).encode()  # as it will be written
    except json.JSONDecodeError as error:
      raise ValueError(f'Line {number} is not JSON: {error}.') from error
    except UnicodeEncodeError as error:
      raise ValueError(
        f'Line {number} holds half of a surrogate pair, which is no text.'
        ' Write the character whole.'
      ) from error
    except (ValueError, RecursionError) as error:
      raise ValueError(f'Line {number} cannot be read: {error}.') from error
    for name in wanted:
      if not isinstance(row, dict) or not isinstance(row.get(name), str):
        raise ValueError(
          f'Line {number} must be an object with a text "{name}", like'
          ' {"inputs": "abc + def ="}.'
        )
      if name == 'targets' and not row[name]:
        raise ValueError(
          f'Line {number} has empty "targets": there is nothing to score.'
        )
    yield row


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('infer')
