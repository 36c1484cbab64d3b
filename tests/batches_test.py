"""Tests of calm_jax.batches."""

import itertools
import json
import threading

import numpy as np
import pytest

from calm_jax import array_batches, batches, vocabularies
from calm_jax.prefetch import Prefetcher

_KEYS = {
  'decoder_input_tokens': np.int32,
  'decoder_target_tokens': np.int32,
  'decoder_positions': np.int32,
  'decoder_segment_ids': np.int32,
  'decoder_loss_weights': np.float32,
}


def _stream(start):
  """Examples of changing length, in which id 0 is an ordinary token."""
  for n in itertools.count(start):
    rng = np.random.default_rng(n)
    yield {
      'inputs': rng.integers(0, 5, rng.integers(0, 4)).tolist(),
      'targets': rng.integers(0, 5, rng.integers(1, 5)).tolist() + [9],
    }


def _batches(make_examples=_stream, **kwargs):
  settings = {
    'batch_size': 3,
    'length': 12,
    'pack': True,
    'bos_id': 7,
  }
  return batches.ExampleBatches(make_examples, **(settings | kwargs))


def _of(*examples, **kwargs):
  return _batches(
    lambda start: iter(examples[start:]), **({'batch_size': 1} | kwargs)
  )


def _assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def _row(batch, name):
  return batch[f'decoder_{name}'][0].tolist()


def test_prefix_lm_layout():
  example = {'inputs': [5, 0], 'targets': [0, 4, 9]}
  batch = next(_of(example, pack=False, length=7))
  assert {k: v.dtype for k, v in batch.items()} == _KEYS
  assert _row(batch, 'input_tokens') == [7, 5, 0, 0, 4, 0, 0]
  assert _row(batch, 'target_tokens') == [5, 0, 0, 4, 9, 0, 0]
  assert _row(batch, 'loss_weights') == [0, 0, 1, 1, 1, 0, 0]
  assert _row(batch, 'positions') == [0, 1, 2, 3, 4, 0, 0]
  assert _row(batch, 'segment_ids') == [1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
  'bos_id, inputs, weights',
  [
    (7, [], [1, 1, 1, 0]),
    (None, [], [1, 1, 0, 0]),
    (None, [5], [1, 1, 1, 0]),
    (0, [5], [0, 1, 1, 1]),
  ],
)
def test_loss_begins_with_the_first_target(bos_id, inputs, weights):
  example = {'inputs': inputs, 'targets': [0, 0, 9]}
  batch = next(_of(example, length=4, bos_id=bos_id))
  assert _row(batch, 'loss_weights') == weights


def test_inputs_may_be_missing():
  with_empty = next(_of({'inputs': [], 'targets': [1, 9]}))
  _assert_equal(next(_of({'targets': [1, 9]})), with_empty)


def test_packing_isolates_segments_and_restarts_positions():
  batch = next(
    _of(
      {'inputs': [0], 'targets': [0, 9]},
      {'targets': [3, 9]},
      length=6,
    )
  )
  assert _row(batch, 'segment_ids') == [1, 1, 1, 2, 2, 0]
  assert _row(batch, 'positions') == [0, 1, 2, 0, 1, 0]
  assert _row(batch, 'input_tokens') == [7, 0, 0, 7, 3, 0]
  assert _row(batch, 'target_tokens') == [0, 0, 9, 3, 9, 0]
  assert _row(batch, 'loss_weights') == [0, 1, 1, 1, 1, 0]


def test_packing_keeps_every_example_in_order():
  packed, expected = _batches(), _stream(0)
  for batch in itertools.islice(packed, 20):
    for row in range(3):
      segments = batch['decoder_segment_ids'][row]
      for segment in range(1, segments.max() + 1):
        slots = segments == segment
        example = next(expected)
        sequence = [7, *example['inputs'], *example['targets']]
        for name, want in (('input', sequence[:-1]), ('target', sequence[1:])):
          got = batch[f'decoder_{name}_tokens'][row, slots]
          assert got.tolist() == want
        weights = batch['decoder_loss_weights'][row, slots]
        assert weights.sum() == len(example['targets'])
  assert packed.state()['examples'] > 100


@pytest.mark.parametrize('pack', [True, False])
@pytest.mark.parametrize('prefetch', [True, False])
def test_resume_is_exact_at_every_batch(pack, prefetch):
  def make():
    iterator = _batches(pack=pack, length=6, truncate='skip')
    return Prefetcher(iterator) if prefetch else iterator

  original, states, expected = make(), [], []
  states.append(original.state())
  for _ in range(12):
    expected.append(next(original))
    states.append(json.loads(json.dumps(original.state())))
  assert states[-1]['skipped'] > 0
  resumed = make()
  for n in reversed(range(12)):
    resumed.restore(states[n])
    _assert_equal(next(resumed), expected[n])
    assert resumed.state() == states[n + 1]


def test_array_batches_resume_and_cover_every_epoch():
  rows = {
    'decoder_input_tokens': np.arange(10)[:, None],
    'decoder_loss_weights': np.ones((10, 1), np.float32),
  }

  def make():
    return array_batches.ArrayBatches(rows, batch_size=3, seed=4)

  original, states, expected = make(), [], []
  for _ in range(7):
    states.append(json.loads(json.dumps(original.state())))
    expected.append(next(original))
  seen = [b['decoder_input_tokens'][:, 0].tolist() for b in expected]
  epochs = [sum(seen[:3], []), sum(seen[3:6], [])]
  assert all(len(set(epoch)) == 9 for epoch in epochs)
  assert epochs[0] != epochs[1]
  resumed = make()
  for state, batch in zip(states, expected, strict=True):
    resumed.restore(state)
    _assert_equal(next(resumed), batch)
  other = array_batches.ArrayBatches(rows, batch_size=3, seed=5)
  assert next(other)['decoder_input_tokens'][:, 0].tolist() != seen[0]
  plain = array_batches.ArrayBatches(rows, batch_size=3, seed=4, shuffle=False)
  assert next(plain)['decoder_input_tokens'][:, 0].tolist() == [0, 1, 2]


def test_array_batches_errors():
  rows = {'decoder_loss_weights': np.zeros((4, 2), np.float32)}
  with pytest.raises(ValueError, match='no supervised token'):
    next(array_batches.ArrayBatches(rows, batch_size=2, seed=0))
  with pytest.raises(ValueError, match='enough for one batch'):
    array_batches.ArrayBatches(rows, batch_size=5, seed=0)


def test_too_long_is_an_error_or_counted():
  long = {'inputs': [1, 2, 3], 'targets': [4, 5, 9]}
  short = {'inputs': [1], 'targets': [9]}
  assert next(_of(long, length=6))['decoder_loss_weights'].sum() == 3
  with pytest.raises(ValueError, match=r"needs 6 slots .* truncate='skip'"):
    next(_of(long, length=5))
  skipping = _of(long, short, length=5, truncate='skip')
  assert _row(next(skipping), 'input_tokens') == [7, 1, 0, 0, 0]
  assert skipping.skipped == 1
  assert skipping.state() == {'examples': 2, 'skipped': 1}
  with pytest.raises(ValueError, match="'error' or 'skip'"):
    _of(long, truncate='cut')


def test_nothing_to_learn_is_an_error():
  with pytest.raises(ValueError, match='no supervised token'):
    next(_of({'inputs': [1, 2], 'targets': []}))
  with pytest.raises(ValueError, match='Example 0 is 1 token long'):
    next(_of({'targets': [9]}, bos_id=None))


def test_finite_stream_ends_after_a_partial_batch():
  few = _of({'targets': [1, 9]}, batch_size=2, pack=False)
  assert next(few)['decoder_segment_ids'].max(axis=1).tolist() == [1, 0]
  with pytest.raises(StopIteration):
    next(few)


class _Failing:
  """Fails on the third batch."""

  def __init__(self):
    self.count = 0

  def __next__(self):
    self.count += 1
    if self.count == 3:
      raise RuntimeError('disk on fire')
    return {'n': np.array([self.count])}

  def state(self):
    return {'count': self.count}

  def restore(self, state):
    self.count = state['count']


def test_prefetcher_delivers_exceptions_in_order():
  prefetcher = Prefetcher(_Failing(), depth=4)
  assert [next(prefetcher)['n'][0] for _ in range(2)] == [1, 2]
  assert prefetcher.state() == {'count': 2}
  with pytest.raises(RuntimeError, match='disk on fire'):
    next(prefetcher)
  with pytest.raises(ValueError, match='closed'):
    next(prefetcher)


def test_prefetcher_works_ahead_measures_and_closes():
  class Gated(_Failing):
    gate = threading.Semaphore(0)

    def __next__(self):
      self.gate.acquire()
      self.count += 1
      return {'n': np.array([self.count])}

  before = threading.active_count()
  prefetcher = Prefetcher(Gated(), depth=2)
  timer = threading.Timer(0.2, Gated.gate.release)
  timer.start()
  assert next(prefetcher)['n'][0] == 1
  assert 0.1 < prefetcher.wait_seconds < 5
  assert prefetcher.state() == {'count': 1}
  timer.join()
  Gated.gate.release(2)
  prefetcher.close()
  prefetcher.close()
  assert threading.active_count() == before


def test_pad_prompts():
  tokens, lengths = batches.pad_prompts([[1, 0], [3, 0, 0]], fill=9)
  assert tokens.dtype == lengths.dtype == np.int32
  assert tokens.tolist() == [[1, 0, 9], [3, 0, 0]]
  assert lengths.tolist() == [2, 3]
  tokens, _ = batches.pad_prompts([[1]], length=2)
  assert tokens.tolist() == [[1, 0]]
  with pytest.raises(ValueError, match='Prompt 1 has 3 tokens'):
    batches.pad_prompts([[1], [1, 2, 3]], length=2)


def test_tokenize_crosses_chunks_and_appends_eos():
  vocabulary = vocabularies.ByteVocabulary()
  texts = ({'inputs': '', 'targets': str(n)} for n in range(1500))
  ids = list(batches.tokenize(texts, vocabulary=vocabulary))
  assert len(ids) == 1500
  assert ids[1200]['inputs'] == []
  assert ids[1200]['targets'] == [*b'1200', vocabulary.eos_id]


def test_targets_per_row_closes_a_row_before_it_has_too_many():
  examples = [{'inputs': [1, 2], 'targets': [3, 4]}] * 40

  def rows(limit):
    return batches.ExampleBatches(
      lambda start: iter(examples[start:]),
      batch_size=2,
      length=12,
      pack=True,
      bos_id=None,
      targets_per_row=limit,
    )

  free, limited = next(rows(None)), next(rows(5))
  assert (free['decoder_loss_weights'].sum(1) == 8).all()
  assert (limited['decoder_loss_weights'].sum(1) == 4).all()
  with pytest.raises(ValueError, match='for 1 targets'):
    next(rows(1))


def test_npz_rows_are_batches(tmp_path):
  rows = batches.empty_batch((4, 6))
  rows['decoder_loss_weights'][:, :3] = 1
  np.savez(tmp_path / 'rows.npz', **rows)
  path = str(tmp_path / 'rows.npz')
  batch = next(array_batches.npz_batches(path=path, batch_size=2, seed=0))
  assert batch['decoder_loss_weights'].sum() == 6
  with pytest.raises(ValueError, match='3 supervised positions'):
    array_batches.npz_batches(
      path=path, batch_size=2, seed=0, targets_per_row=2
    )
  np.savez(tmp_path / 'other.npz', tokens=np.zeros(3))
  with pytest.raises(ValueError, match='decoder_input_tokens'):
    array_batches.npz_batches(
      path=str(tmp_path / 'other.npz'), batch_size=2, seed=0
    )
