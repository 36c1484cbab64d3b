"""Evaluation by real decoding from the prompt, never teacher forcing."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any, Protocol

import jax

from calm_jax import generation, paths
from calm_jax.generation import Continuation
from calm_jax.sampling import DecodingConfig

Example = Mapping[str, Any]
# From prompts to continuations of each; `calm_jax.Model.decode` is one.
Decode = Callable[..., list[list[Continuation]]]

METRICS_FILE = 'metrics.json'  # the last that is written


class EvalTask(Protocol):
  """A benchmark: prompts, and how what follows them is scored.

  It may also have `check(num_samples)`, which raises ValueError for what would
  keep so many samples of each prompt from being scored.

  Attributes:
    name: of the folder of results.
    splits: what `examples` takes.
    eval_splits: those that are evaluated.
    max_new_tokens: room for an answer.
    stop: an answer ends before the first of these texts.
  """

  name: str
  splits: tuple[str, ...]
  eval_splits: tuple[str, ...]
  max_new_tokens: int
  stop: tuple[str, ...]

  def examples(self, split: str) -> Sequence[Example]:
    """Returns examples with 'inputs', the prompt, and 'targets', a reference.

    Raises:
      ValueError: if a file is missing or malformed.
    """

  def prediction(self, output: str, example: Example) -> Any:
    """Returns what is scored of one answer; JSON can hold it."""

  def metrics(
    self, examples: Sequence[Example], predictions: Sequence[Sequence[Any]]
  ) -> dict[str, float | str]:
    """Scores; `predictions` has a list for each example, one for each sample.

    Texts among the values are signatures of the metrics.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeqIOTask:
  """A registered SeqIO task, scored by its own metric functions.

  White space around an answer is no part of it, as SeqIO's vocabularies do not
  decode it either.

  Attributes:
    name: that SeqIO knows, once the gin file has imported its module.
    eval_splits: the splits that are evaluated.
    max_new_tokens: room for an answer.
    stop: an answer ends before the first of these texts.
  """

  name: str
  eval_splits: tuple[str, ...] = ('test',)
  max_new_tokens: int = 64
  stop: tuple[str, ...] = ()

  @property
  def splits(self) -> tuple[str, ...]:
    return tuple(_find(self.name).splits)

  def examples(self, split: str) -> list[dict[str, Any]]:
    dataset = _find(self.name).get_dataset(
      sequence_length=None, split=split, shuffle=False
    )
    missing = {'inputs_pretokenized', 'targets_pretokenized'} - {
      *dataset.element_spec
    }
    if missing:
      raise ValueError(
        f'The SeqIO task {self.name!r} has no {sorted(missing)}, and its texts'
        ' are read from there. Let its preprocessors end in'
        ' seqio.preprocessors.tokenize with copy_pretokenized=True.'
      )
    return [
      {
        'inputs': _text(example['inputs_pretokenized']),
        'targets': _text(example['targets_pretokenized']),
        'seqio': example,
      }
      for example in dataset.as_numpy_iterator()
    ]

  def check(self, num_samples: int) -> None:
    if num_samples > 1:
      raise ValueError(
        f'The SeqIO task {self.name!r} scores one answer to a prompt, and'
        f' DecodingConfig.num_samples = {num_samples}. Set it to 1.'
      )

  def prediction(self, output: str, example: Example) -> Any:
    return _find(self.name).postprocess_fn(
      output.strip(), example=example['seqio'], is_target=False
    )

  def metrics(
    self, examples: Sequence[Example], predictions: Sequence[Sequence[Any]]
  ) -> dict[str, float | str]:
    task = _find(self.name)
    targets = [
      task.postprocess_fn(one['targets'], example=one['seqio'], is_target=True)
      for one in examples
    ]
    first = [samples[0] for samples in predictions]
    measured: dict[str, Any] = {}
    for metric_fn in task.predict_metric_fns:
      measured |= metric_fn(targets, first)
    return {name: _plain_metric(value) for name, value in measured.items()}


def _plain_metric(value: Any) -> float | str:
  """Returns a number or text of what a SeqIO metric may return."""
  value = getattr(value, 'value', getattr(value, 'textdata', value))
  return _text(value) if isinstance(value, str | bytes) else float(value)


def _find(name: str) -> Any:
  """Returns a registered task that can be evaluated."""
  from calm_jax import data  # imports TensorFlow

  registry = data.seqio.TaskRegistry
  if name not in registry.names():
    raise ValueError(
      f'SeqIO knows no task {name!r}. Import its module in the gin file first.'
      f' Known: {sorted(registry.names())}.'
    )
  task = registry.get(name)
  if not task.predict_metric_fns:
    raise ValueError(
      f'The task {name!r} has no metric on predictions, so it cannot be'
      ' evaluated. Choose another, or register it with metric_fns.'
    )
  return task


def _of_numpy(value: Any) -> Any:
  """Returns what JSON can hold of a prediction that numpy has made."""
  return value.tolist() if hasattr(value, 'tolist') else str(value)


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
  """Evaluates models on tasks, and writes what they said.

  Attributes:
    tasks: each with the splits to evaluate.
    batch_size: prompts decoded at once; at most 64 if None.
    num_examples: the first so many of each split; all of them if None.
    decoding: how tokens are chosen.
    every: during training, the steps between evaluations; the last step is one.
  """

  tasks: Sequence[EvalTask] = ()
  batch_size: int | None = None
  num_examples: int | None = None
  decoding: DecodingConfig = DecodingConfig()
  every: int = 500

  def check(self) -> None:
    """Raises ValueError unless all can be read; call it before models load."""
    for setting in ('batch_size', 'num_examples', 'every'):
      value = getattr(self, setting)
      if value is not None:
        generation.check_count(f'Evaluator.{setting}', value)
    names = [task.name for task in self.tasks]
    for name in names:
      if names.count(name) > 1:
        raise ValueError(
          f'Two tasks are called {name!r}, and would share a folder. Leave one'
          ' out, or give it a name of its own (`called`).'
        )
    for task in self.tasks:
      for split in task.eval_splits:
        if split not in task.splits:
          raise ValueError(
            f'The task {task.name!r} has no split {split!r}; it has'
            f' {sorted(task.splits)}.'
          )
        if not task.examples(split):
          raise ValueError(f'{task.name}/{split} holds no example.')
      if hasattr(task, 'check'):
        task.check(self.decoding.num_samples)
    if self.tasks and jax.process_count() > 1:
      raise ValueError(
        f'Evaluator.tasks = {names}: tasks are decoded in one process, and'
        f' this run has {jax.process_count()}. Leave them out, and evaluate'
        ' when it has ended.'
      )

  def __call__(
    self,
    decode: Decode,
    *,
    directory: pathlib.Path,
    label: str,
    say: Callable[[str], None],
  ) -> dict[str, dict[str, float | str]]:
    """Returns metrics by 'task/split'.

    Args:
      decode: of the model.
      directory: gets `<task>/<split>/<label>/predictions.jsonl, metrics.json`.
      label: names the folder of results: a model, or a step of training.
      say: prints a line for each split.
    """
    results = {}
    for task in self.tasks:
      for split in task.eval_splits:
        place = directory / task.name / split / label
        measured = self._evaluate(decode, task, split, place)
        results[f'{task.name}/{split}'] = measured
        shown = ', '.join(
          f'{name} {value:g}'
          for name, value in measured.items()
          if not isinstance(value, str)
        )
        say(f'{label:12} {task.name}/{split}: {shown}')
    return results

  def missing(self, directory: pathlib.Path, label: str) -> list[str]:
    """Returns the 'task/split's that have no result there; see `__call__`."""
    return [
      f'{task.name}/{split}'
      for task in self.tasks
      for split in task.eval_splits
      if not (directory / task.name / split / label / METRICS_FILE).exists()
    ]

  def _evaluate(
    self, decode: Decode, task: EvalTask, split: str, place: pathlib.Path
  ) -> dict[str, float | str]:
    """Decodes the prompts of one split and scores what was said."""
    examples = list(task.examples(split))[: self.num_examples]
    found = decode(
      [example['inputs'] for example in examples],
      max_new_tokens=task.max_new_tokens,
      stop=task.stop,
      batch_size=self.batch_size,
      config=self.decoding,
    )
    predictions = [
      [task.prediction(one.text, example) for one in each]
      for each, example in zip(found, examples, strict=True)
    ]
    place.mkdir(parents=True, exist_ok=True)
    with (place / 'predictions.jsonl').open('w', encoding='utf-8') as file:
      for example, each, read in zip(examples, found, predictions, strict=True):
        row = {
          'inputs': example['inputs'],
          'targets': example['targets'],
          'outputs': [one.text for one in each],
          'predictions': read,
        }
        text = json.dumps(row, ensure_ascii=False, default=_of_numpy)
        file.write(text + '\n')
    measured = {'num_examples': len(examples)}
    measured |= task.metrics(examples, predictions)
    text = json.dumps(measured, indent=2)
    paths.write_whole(place / METRICS_FILE, text + '\n')
    return measured
