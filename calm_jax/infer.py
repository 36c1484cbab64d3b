"""Continues prompts from JSON lines, and writes JSON lines.

  echo '{"inputs": "abc + def ="}' | python -m calm_jax.infer \
      --gin_file=runs/infer.gin --gin.MODEL_DIR="'/tmp/x'"
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import itertools
import json
import pathlib
import sys
from typing import TextIO

from calm_jax import evaluate
from calm_jax.models.pretrained import ModelSpec


def infer(
  *,
  model_dir: str,
  anchor: ModelSpec,
  augmenting: Mapping[str, ModelSpec] | None = None,
  system: str = 'composed',
  input_file: str = '-',
  output_file: str = '-',
  batch_size: int = 32,
  max_new_tokens: int = 64,
  random_seed: int = 0,
  summarize_config: Callable[[pathlib.Path], None] | None = None,
) -> int:
  """Reads `{"inputs": text}` lines, writes them with `"prediction"` added.

  Args:
    model_dir: of the run that trained the composition.
    anchor: the frozen anchor.
    augmenting: the frozen augmenting models by name.
    system: 'composed', 'anchor', or the name of an augmenting model.
    input_file: a file, or '-' for standard input.
    output_file: a file, or '-' for standard output.
    batch_size: rows decoded at once, and read ahead.
    max_new_tokens: at most so many tokens an answer.
    random_seed: of models with random weights; the training run's.
    summarize_config: not used; every entry point takes it.

  Returns:
    How many rows were written.

  Raises:
    ValueError: for a line that is not such an object; it is named by number.
  """
  if input_file != '-' and not pathlib.Path(input_file).is_file():
    raise ValueError(
      f"input_file = {input_file!r} does not exist. Give a file, or '-' for"
      ' standard input.'
    )
  model = evaluate.load_systems(
    model_dir=model_dir,
    anchor=anchor,
    augmenting=augmenting or {},
    systems=[system],
    random_seed=random_seed,
  )[system]
  count = 0
  with (
    _open(input_file, 'r', sys.stdin) as source,
    _open(output_file, 'w', sys.stdout) as target,
  ):
    rows = _rows(source)
    while chunk := list(itertools.islice(rows, batch_size)):
      predictions = model.generate(
        [row['inputs'] for row in chunk],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
      )
      for row, prediction in zip(chunk, predictions, strict=True):
        line = json.dumps({**row, 'prediction': prediction}, ensure_ascii=False)
        target.write(line + '\n')
      target.flush()
      count += len(chunk)
  return count


def _open(path: str, mode: str, standard: TextIO):
  if path == '-':
    return contextlib.nullcontext(standard)
  return pathlib.Path(path).open(mode, encoding='utf-8')


def _rows(source: TextIO) -> Iterator[dict]:
  for number, line in enumerate(source, start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f'Line {number} is not JSON: {error}.') from error
    if not isinstance(row, dict) or not isinstance(row.get('inputs'), str):
      raise ValueError(
        f'Line {number} must be an object with a text "inputs", like'
        ' {"inputs": "abc + def ="}.'
      )
    yield row


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('infer')
