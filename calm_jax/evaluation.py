"""SeqIO evaluation by real decoding from the prompt, never teacher forcing."""

from collections.abc import Callable, Sequence
import json
import pathlib
from typing import Any

import seqio

Generate = Callable[[Sequence[str]], list[str]]


def evaluate_task(
  generate: Generate,
  task_name: str,
  *,
  split: str,
  num_examples: int | None = None,
  output_dir: pathlib.Path | None = None,
) -> dict[str, float]:
  """Decodes the prompts of one split and scores them with the task's metrics.

  Args:
    generate: from prompt texts to continuations.
    task_name: a registered SeqIO task with metric functions.
    split: of the task.
    num_examples: the first so many; all of them if None.
    output_dir: if given, gets `predictions.jsonl` and `metrics.json`.

  Returns:
    The task's metrics, and `num_examples`.

  Raises:
    ValueError: for an unknown task or split, or one without metrics.
  """
  task = _find(task_name, split)
  examples = []
  dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
  for example in dataset.as_numpy_iterator():
    if len(examples) == num_examples:
      break
    examples.append(example)
  prompts = [_text(example['inputs_pretokenized']) for example in examples]
  outputs = generate(prompts)
  targets = [
    task.postprocess_fn(
      _text(example['targets_pretokenized']), example=example, is_target=True
    )
    for example in examples
  ]
  predictions = [
    task.postprocess_fn(output, example=example, is_target=False)
    for output, example in zip(outputs, examples, strict=True)
  ]
  metrics: dict[str, Any] = {'num_examples': len(examples)}
  for metric_fn in task.predict_metric_fns:
    metrics |= metric_fn(targets, predictions)
  metrics = {name: float(value) for name, value in metrics.items()}
  if output_dir is not None:
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / 'predictions.jsonl').open('w') as file:
      for row in zip(prompts, outputs, predictions, targets, strict=True):
        names = ('inputs', 'output', 'prediction', 'target')
        file.write(json.dumps(dict(zip(names, row, strict=True))) + '\n')
    text = json.dumps(metrics, indent=2)
    (output_dir / 'metrics.json').write_text(text + '\n')
  return metrics


def _find(task_name: str, split: str) -> seqio.Task:
  names = seqio.TaskRegistry.names()
  if task_name not in names:
    raise ValueError(
      f'SeqIO knows no task {task_name!r}. Import its module in the gin file'
      f' first. Known: {sorted(names)}.'
    )
  task = seqio.TaskRegistry.get(task_name)
  if split not in task.splits:
    raise ValueError(
      f'The task {task_name!r} has no split {split!r}; it has'
      f' {sorted(task.splits)}.'
    )
  if not task.predict_metric_fns:
    raise ValueError(
      f'The task {task_name!r} has no metric on predictions, so it cannot be'
      ' evaluated. Choose another, or register it with metric_fns.'
    )
  return task


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
