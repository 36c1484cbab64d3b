"""The shipped donors are those of their cards, and what the README says.

Run: pytest tests/tasks/donors_test.py
"""

import hashlib
import pathlib

import numpy as np
import pytest
from safetensors import numpy as safetensors

from calm_jax.models import pretrained
from calm_jax.tasks import key_value_tables

DONORS = pathlib.Path(key_value_tables.__file__).parent / 'donors' / 'kv_quick'


@pytest.mark.parametrize('name', ['anchor', 'augmenting'])
def test_a_card_names_the_hash_of_its_weights(name):
  weights = (DONORS / name / 'model.safetensors').read_bytes()
  card = (DONORS / name / 'README.md').read_text()
  assert hashlib.sha256(weights).hexdigest() in card


# Compositions that others have trained name these; they must stay.
FINGERPRINTS = {
  'anchor': '076f4d20c90bd76360d27c4e100e3e590a34bd3fc2ff55081dcb4ccff016851c',
  'augmenting': (
    '48a16154eabdcf1750a9987849b9f8f0c4aed4f20b39f0df123a0ac73ea5eaef'
  ),
}


@pytest.mark.parametrize('name', FINGERPRINTS)
def test_fingerprints_stay_what_they_were(name):
  spec = pretrained.pretrained_model(DONORS / name)
  assert pretrained.fingerprint(spec) == FINGERPRINTS[name]


def test_they_are_small_enough_to_ship():
  files = [path for path in DONORS.rglob('*') if path.is_file()]
  assert len(files) >= 8
  assert sum(path.stat().st_size for path in files) < 8_000_000


def test_all_keys_look_alike_to_the_anchor():
  config = key_value_tables.SIZES['quick']
  vocabulary = key_value_tables.vocabulary(config)
  shipped = pretrained.pretrained_model(
    'calm_jax://tasks/donors/kv_quick/anchor'
  )
  assert shipped.vocabulary.fingerprint() == vocabulary.fingerprint()
  tensors = safetensors.load_file(DONORS / 'anchor' / 'model.safetensors')
  (table_VD,) = (t for name, t in tensors.items() if 'embedder' in name)

  def spread(words):
    ids = [ids[0] for ids in vocabulary.encode_batch(words)]
    return np.std(table_VD[ids].astype(np.float32), axis=0).mean()

  keys = spread(key_value_tables.table(config).keys)
  integers = spread([str(n) for n in range(1, config.max_value + 1)])
  assert keys < 0.02 * integers
