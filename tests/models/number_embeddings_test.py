"""Number embeddings: waves, where they are added, and what is refused.

Run: pytest tests/models/number_embeddings_test.py
"""

import dataclasses

import jax
import numpy as np
import pytest

from calm_jax import assembly, vocabularies
from calm_jax.models import transformer
from calm_jax.models.number_embeddings import NumberEmbeddings
from calm_jax.models.pretrained import ModelSpec
from tests import tiny

VOCABULARY = vocabularies.word_vocabulary(['word', '+'], max_integer=30)


def test_an_inner_product_depends_on_the_difference_alone():
  numbers = NumberEmbeddings(largest=30, harmonics=3, amplitude=0.5)
  table = numbers.table(VOCABULARY, width=8)
  rows = table[[VOCABULARY.encode(str(n))[0] for n in range(31)]]
  difference = np.arange(31)[:, None] - np.arange(31)
  cosines = [np.cos(np.pi * k * difference / 31) for k in (1, 2, 3)]
  np.testing.assert_allclose(rows @ rows.T, 0.25 * sum(cosines), atol=1e-6)


def test_all_tokens_begin_at_a_common_vector_and_integers_as_waves_on_it():
  waves = NumberEmbeddings(largest=20, harmonics=3).table(VOCABULARY, width=64)
  both = NumberEmbeddings(largest=20, harmonics=3, common=0.5)
  common = both.table(VOCABULARY, width=64) - waves
  assert np.ptp(common, axis=0).max() < 1e-6
  assert 0.3 < common.std() < 0.7
  is_integer = np.zeros(VOCABULARY.size, bool)
  is_integer[[VOCABULARY.encode(str(n))[0] for n in range(21)]] = True
  np.testing.assert_array_equal(waves.any(axis=1), is_integer)


def test_they_are_added_to_the_random_table_alone(one_device):
  config = dataclasses.replace(
    tiny.ANCHOR, num_layers=1, vocab_size=VOCABULARY.size
  )
  plain = ModelSpec(config=config, vocabulary=VOCABULARY)
  numbers = NumberEmbeddings(largest=20, harmonics=2, common=0.1)
  waves = dataclasses.replace(plain, number_embeddings=numbers)
  model = transformer.DecoderLM(config)
  before = assembly.load(plain, model, mesh=one_device).params
  after = assembly.load(waves, model, mesh=one_device).params
  expected = before['embedder']['table'] + numbers.table(
    VOCABULARY, width=config.embed_dim
  )
  np.testing.assert_allclose(after['embedder']['table'], expected, atol=1e-6)
  rest = [{**p, 'embedder': None} for p in (before, after)]
  jax.tree.map(np.testing.assert_array_equal, *rest)


def test_pretrained_weights_have_no_use_for_them():
  config = dataclasses.replace(tiny.ANCHOR, vocab_size=VOCABULARY.size)
  with pytest.raises(ValueError, match="'pretrained' they would have no eff"):
    ModelSpec(
      config=config,
      vocabulary=VOCABULARY,
      weights='pretrained',
      number_embeddings=NumberEmbeddings(largest=20),
    )


@pytest.mark.parametrize(
  ('settings', 'width', 'message'),
  [
    ({'largest': 31}, 8, r'largest = 31, and 31 is not one token'),
    ({'largest': 30}, 2, r'2 harmonics need a width of 4; .* embed_dim = 2'),
  ],
)
def test_what_cannot_be_placed_is_refused(settings, width, message):
  numbers = NumberEmbeddings(**settings, harmonics=2)
  with pytest.raises(ValueError, match=message):
    numbers.table(VOCABULARY, width=width)
