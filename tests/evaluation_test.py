"""SeqIO tasks as benchmarks. Run: pytest tests/evaluation_test.py"""

import json

import numpy as np
import pytest

from calm_jax import data, evaluation, sampling
from calm_jax.generation import Continuation
from calm_jax.tasks import key_value

assert key_value  # importing it registers the tasks
TASK = evaluation.SeqIOTask(
  name='kv_arithmetic_scratchpad_quick', eval_splits=('held_out',)
)


def answering(answer):
  """A model that says `answer(prompt)`."""

  def decode(prompts, *, max_new_tokens, stop, batch_size, config):
    assert (max_new_tokens, stop, batch_size) == (64, (), 7)
    assert config == sampling.DecodingConfig()
    return [[Continuation(answer(prompt), [1], True)] for prompt in prompts]

  return decode


def run(decode, directory, task=TASK, **settings):
  evaluator = evaluation.Evaluator(
    tasks=[task], batch_size=7, num_examples=20, **settings
  )
  evaluator.check()
  said = []
  found = evaluator(decode, directory=directory, label='toy', say=said.append)
  return found, said


@pytest.mark.slow
def test_answers_are_scored_by_the_task(tmp_path):
  """Through its own postprocessing, which reads the final answer."""
  truth = {
    example['inputs']: example['targets']
    for example in TASK.examples('held_out')
  }
  found, said = run(answering(lambda prompt: f' {truth[prompt]} '), tmp_path)
  key = 'kv_arithmetic_scratchpad_quick/held_out'
  assert found[key]['exact_match'] == 100.0
  assert found[key]['num_examples'] == 20
  assert f'{key}: num_examples 20, exact_match 100' in said[0]
  place = tmp_path / key / 'toy'
  assert json.loads((place / 'metrics.json').read_text()) == found[key]
  rows = [
    json.loads(line)
    for line in (place / 'predictions.jsonl').read_text().splitlines()
  ]
  assert len(rows) == 20
  for row in rows:
    assert row['outputs'] == [f' {truth[row["inputs"]]} ']
    assert row['predictions'] == [row['targets'].rpartition('= ')[2]]
  wrong, _ = run(answering(lambda prompt: '10 + 22 = 33'), tmp_path)
  assert wrong[key]['exact_match'] < 50


def test_an_answer_that_is_not_scored_is_still_written(tmp_path):
  class Broken(evaluation.SeqIOTask):
    def metrics(self, examples, predictions):
      raise RuntimeError('no scorer')

  task = Broken(name=TASK.name, eval_splits=('held_out',))
  with pytest.raises(RuntimeError, match='no scorer'):
    run(answering(lambda prompt: '1'), tmp_path, task)
  (file,) = tmp_path.glob('*/held_out/toy/predictions.jsonl')
  assert len(file.read_text().splitlines()) == 20


def test_what_seqio_metrics_and_numpy_return_is_written(tmp_path, monkeypatch):
  """`Scalar` and `Text`, as SeqIO's own evaluator takes them."""
  metrics = data.seqio.metrics

  class Counting:
    splits = ('held_out',)
    get_dataset = evaluation._find(TASK.name).get_dataset
    predict_metric_fns = (
      lambda targets, predictions: {
        'scalar': metrics.Scalar(np.float32(2.5)),
        'text': metrics.Text(b'abc'),
        'plain': np.int64(3),
      },
    )

    def postprocess_fn(self, text, **_):
      return np.int64(len(text))

  monkeypatch.setattr(evaluation, '_find', lambda name: Counting())
  found, _ = run(answering(lambda prompt: '12'), tmp_path)
  assert found[f'{TASK.name}/held_out'] == {
    'num_examples': 20,
    'scalar': 2.5,
    'text': 'abc',
    'plain': 3.0,
  }
  (file,) = tmp_path.glob('*/held_out/toy/predictions.jsonl')
  assert json.loads(file.read_text().splitlines()[0])['predictions'] == [2]


def test_a_task_without_its_texts_is_named(monkeypatch):
  class Bare:
    predict_metric_fns = (len,)
    splits = ('test',)

    def get_dataset(self, **_):
      return data.tf.data.Dataset.from_tensors({'inputs': [1], 'targets': [2]})

  monkeypatch.setattr(evaluation, '_find', lambda name: Bare())
  with pytest.raises(ValueError, match="'x' has no .*copy_pretokenized=True"):
    evaluation.SeqIOTask(name='x').examples('test')


@pytest.mark.parametrize(
  ('task', 'settings', 'message'),
  [
    (evaluation.SeqIOTask(name='kv_none'), {}, "SeqIO knows no task 'kv_none'"),
    (TASK.__class__(name=TASK.name), {}, "has no split 'test'; it has"),
    (
      evaluation.SeqIOTask(name='key_value_pairs_quick'),
      {},
      "has no split 'test'",
    ),
    (
      TASK,
      {'decoding': sampling.DecodingConfig(temperature=1.0, num_samples=2)},
      'scores one answer to a prompt, and DecodingConfig.num_samples = 2',
    ),
  ],
)
def test_what_cannot_be_evaluated(task, settings, message):
  evaluator = evaluation.Evaluator(tasks=[task], **settings)
  with pytest.raises(ValueError, match=message):
    evaluator.check()
