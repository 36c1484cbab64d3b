"""Each domain of the paper at toy size: train on its D_C, decode, score.

Run: pytest tests/tasks/domains_test.py
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import calm_jax
from calm_jax import (
  connections,
  data,
  optimizers,
  sharding,
  train,
  vocabularies,
)
from calm_jax.models import pretrained
from calm_jax.tasks import code, codexglue, flores, gsm8k, mixture
from tests import tiny, toys
from tests.tasks import mixture_test

pytestmark = [pytest.mark.entry, pytest.mark.slow]

FIXTURES = mixture_test.FIXTURES
BYTES = vocabularies.ByteVocabulary()
ANCHOR = dataclasses.replace(
  tiny.ANCHOR,
  vocab_size=BYTES.size,
  num_layers=2,
  embed_dim=16,
  init_stddev=0.1,
)
AUGMENTING = dataclasses.replace(ANCHOR, num_layers=1, embed_dim=24)
COMPOSITION = connections.CompositionConfig(
  mapping=connections.LayerMapping.explicit([tiny.connection(0, 0)])
)
STEPS = 20
clean_registries = mixture_test.clean_registries


def first_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def donors(tmp_path_factory):
  root = tmp_path_factory.mktemp('donors')
  for name, config in (('anchor', ANCHOR), ('code', AUGMENTING)):
    toys.model_directory(root / name, config, words=BYTES)
  return root


TASKS = {
  'toy_translation': [
    flores.Flores(
      directory=str(FIXTURES / 'flores200_dataset'),
      source='swh_Latn',
      target='eng_Latn',
      shots=1,
    ),
  ],
  'toy_math': [gsm8k.GSM8K(directory=str(FIXTURES / 'gsm8k'), shots=1)],
  'toy_code': [
    code.MBPP(path=str(FIXTURES / 'mbpp.jsonl'), shots=1),
    codexglue.CodeToText(
      directory=str(FIXTURES / 'codexglue'), language='python', shots=1
    ),
  ],
}
METRICS = {
  'Flores': {'chrF1', 'chrF2', 'chrF2++'},
  'GSM8K': {'strict', 'flexible'},
  'MBPP': {'pass@1'},
  'CodeToText': {'smoothed_bleu4', 'chrF1'},
}


@pytest.mark.filterwarnings('ignore:spBLEU is left out')
@pytest.mark.parametrize('name', TASKS)
def test_train_decode_and_score(name, donors, tmp_path):
  made = mixture.Mixture(name=name, parts=mixture_test.DOMAINS[name])
  train.train(
    model_dir=str(tmp_path),
    anchor=pretrained.pretrained_model(donors / 'anchor'),
    augmenting={'code': pretrained.pretrained_model(donors / 'code')},
    composition=COMPOSITION,
    make_batches=functools.partial(
      data.seqio_batches,
      made,
      task_feature_lengths={'inputs': 256, 'targets': 64},
    ),
    make_mesh=first_device,
    train_steps=STEPS,
    batch_size=1,
    optimizer=optimizers.OptimizerConfig(learning_rate=0.03, warmup_steps=2),
    log_every=1,
    checkpoint_every=STEPS,
  )
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line)['train/loss'] for line in lines]
  assert len(losses) == STEPS
  # Texts of bytes: near ln 259 = 5.6 before, and then which bytes occur.
  assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])

  mesh = first_device()
  models = {
    name: calm_jax.load_pretrained(donors / name, mesh=mesh)
    for name in ('anchor', 'code')
  }
  model = calm_jax.load_composition(
    tmp_path, anchor=models['anchor'], augmenting={'code': models['code']}
  )
  for task in TASKS[name]:
    score(model, task)


def score(model, task):
  """The model's answers are scored, and the references are all right."""
  expected = METRICS[type(task).__name__]
  examples = task.examples('devtest' if 'devtest' in task.splits else 'test')
  outputs = model.generate([e['inputs'] for e in examples], max_new_tokens=8)
  predictions = [
    [task.prediction(output, example)]
    for output, example in zip(outputs, examples, strict=True)
  ]
  measured = task.metrics(examples, predictions)
  json.dumps([examples, predictions, measured])
  numbers = {k: v for k, v in measured.items() if isinstance(v, float)}
  assert set(numbers) == expected
  assert all(0 <= value < 100 for value in numbers.values())
  perfect = task.metrics(
    examples, [[task.prediction(e['targets'], e)] for e in examples]
  )
  assert all(perfect[key] == pytest.approx(100) for key in expected)
