"""Cached tasks, and batches out of several streams of them.

Run: pytest tests/streams_test.py

`fixtures/cache` was cached by SeqIO's tool on Beam; its toy.gin says how.
"""

import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest
import seqio
import tensorflow as tf

from calm_jax import (
  alignment,
  data,
  seqio_cache,
  seqio_mixtures,
  seqio_texts,
  sharding,
  vocabularies,
)
from calm_jax.models import directories
from calm_jax.prefetch import Prefetcher
from calm_jax.tasks import mixture

CACHE = pathlib.Path(__file__).parent / 'fixtures' / 'cache'
SUMS = 'toy_dc.part0.d802812ca6'
LENGTHS = {'inputs': 6, 'targets': 6}
PARTS = (
  ('tests/fixtures/cache/corpus/sums-*.jsonl', 2.0),
  ('tests/fixtures/cache/corpus/lines.txt', 1.0),
)


@pytest.fixture(scope='module')
def words():
  path = directories.resolve('calm_jax://tasks/donors/kv_quick/anchor')
  return vocabularies.load_vocabulary(path)


@pytest.fixture(autouse=True)
def clean_seqio(monkeypatch):
  """Leaves the registries and the cache directories as they were."""
  # SeqIO fills a buffer before the first example, here by repeating few.
  monkeypatch.setattr(seqio_mixtures, '_SHUFFLED', 16)
  registries = seqio.MixtureRegistry, seqio.TaskRegistry
  before = [set(registry.names()) for registry in registries]
  folders = seqio.utils.get_global_cache_dirs()
  monkeypatch.setattr(seqio.utils, '_GLOBAL_CACHE_DIRECTORIES', [*folders])
  yield
  for registry, names in zip(registries, before, strict=True):
    for name in set(registry.names()) - names:
      registry.remove(name)


def toy_mixture(**changes):
  parts = [
    mixture.Part(task=mixture.TextFile(path=path), rate=rate)
    for path, rate in PARTS
  ]
  return mixture.Mixture(**{'name': 'toy_dc', 'parts': parts} | changes)


def batches_of(words, what=None, **settings):
  return data.seqio_batches(
    what or toy_mixture(),
    **{
      'task_feature_lengths': LENGTHS,
      'batch_size': 8,
      'seed': 3,
      'vocabulary': words,
      'cache_dir': str(CACHE / 'cached'),
    }
    | settings,
  )


def rows_of(process, processes, batch_size=8):
  needed_B = np.zeros(batch_size, bool)
  size = batch_size // processes
  needed_B[process * size : (process + 1) * size] = True
  return needed_B


def texts_of(batch, words):
  """The text of each segment, in the order of the rows."""
  found = []
  for read, predicted, segments in zip(
    batch['decoder_input_tokens'],
    batch['decoder_target_tokens'],
    batch['decoder_segment_ids'],
    strict=True,
  ):
    for segment in range(1, segments.max() + 1):
      of_it = segments == segment
      found.append(words.decode([read[of_it][0], *predicted[of_it]]))
  return found


def corpus_of(words, task):
  """The texts of a cached task as its files have them, sorted."""
  files = (CACHE / 'corpus').glob('sums-*' if task == SUMS else 'lines*')
  found = []
  for file in files:
    for line in file.read_text().splitlines():
      row = json.loads(line) if task == SUMS else {'targets': line}
      ids = words.encode(row.get('inputs', '')) + words.encode(row['targets'])
      found.append(words.decode([*ids, words.eos_id]))
  return sorted(found)


def epoch_of(words, stream=None, streams=1):
  """The 40 examples of the sums, or ten of one stream, in order.

  Shuffled, epochs would overlap: SeqIO repeats before it shuffles.
  """
  batch_size = 10 * streams
  needed_B = None
  if stream is not None:
    needed_B = rows_of(stream, streams, batch_size)
  batches_of(words)  # registers the tasks
  iterator = batches_of(
    words,
    SUMS,
    pack=False,
    shuffle=False,
    streams=streams,
    batch_size=batch_size,
    needed_B=needed_B,
  )
  count = 40 // batch_size if stream is None else 1
  taken = itertools.islice(iterator, count)
  return [text for batch in taken for text in texts_of(batch, words)]


def test_an_epoch_holds_what_the_corpus_holds(words):
  assert sorted(epoch_of(words)) == corpus_of(words, SUMS)


def test_the_seed_gives_the_order(words):
  one, same, other = (
    [texts_of(batch, words) for batch in itertools.islice(iterator, 3)]
    for iterator in (batches_of(words, seed=seed) for seed in (3, 3, 4))
  )
  assert one == same != other


def test_streams_divide_an_epoch(words):
  for streams in (2, 4):
    apart = [
      epoch_of(words, stream=index, streams=streams) for index in range(streams)
    ]
    assert {len(texts) for texts in apart} == {10}
    if streams == 4:  # a stream is a shard of ten
      assert sorted(itertools.chain(*apart)) == corpus_of(words, SUMS)
    else:
      assert not set(apart[0]) & set(apart[1])
  together = epoch_of(words, streams=4)
  assert together == list(itertools.chain(*apart))


@pytest.mark.parametrize('pack', [True, False])
def test_the_number_of_hosts_changes_nothing(words, pack):
  one = batches_of(words, streams=4, pack=pack)
  expected = list(itertools.islice(one, 4))
  for processes in (2, 8):
    for process in range(processes):
      needed_B = rows_of(process, processes)
      some = batches_of(words, streams=4, pack=pack, needed_B=needed_B)
      for batch, whole in zip(some, expected, strict=False):
        for key, rows in whole.items():
          np.testing.assert_array_equal(batch[key][needed_B], rows[needed_B])
          assert batch[key].shape == rows.shape
        others = ~needed_B.reshape(4, 2).any(axis=1).repeat(2)
        assert not batch['decoder_segment_ids'][others].any()


def test_rows_that_are_no_block_come_from_their_streams(words):
  whole = next(batches_of(words, streams=4))
  needed_B = np.isin(np.arange(8), [1, 6])
  some = next(batches_of(words, streams=4, needed_B=needed_B))
  for key, rows in whole.items():
    np.testing.assert_array_equal(some[key][needed_B], rows[needed_B])


def test_resume_is_exact_at_every_batch_on_any_number_of_hosts(words):
  def host(process, processes):
    needed_B = rows_of(process, processes)
    return Prefetcher(batches_of(words, streams=4, needed_B=needed_B))

  expected, positions = [], []
  hosts = [host(process, 2) for process in range(2)]
  for _ in range(4):
    states = [one.state() for one in hosts]
    positions.append(
      {
        name: np.max([state[name] for state in states], axis=0).tolist()
        for name in states[0]
      }
    )
    made = [next(one) for one in hosts]
    expected.append({key: made[0][key] + made[1][key] for key in made[0]})
  assert positions[0]['examples'] == [0] * 4 and min(positions[3]['examples'])
  for one in hosts:
    one.close()
  for process, processes, chosen in ((0, 4, [3, 2, 1, 0]), (0, 1, [2])):
    needed_B = rows_of(process, processes)
    one = batches_of(words, streams=4, needed_B=needed_B)
    for number in chosen:
      one.restore(json.loads(json.dumps(positions[number])))
      batch = next(one)
      for key, rows in expected[number].items():
        np.testing.assert_array_equal(batch[key][needed_B], rows[needed_B])


def test_skipped_examples_of_all_streams_are_counted(words):
  one = Prefetcher(
    batches_of(
      words,
      streams=2,
      task_feature_lengths={'inputs': 0, 'targets': 4},
      truncate='skip',
    )
  )
  batch = next(one)
  assert all('-' in text for text in texts_of(batch, words))
  report, state = one.report(), one.state()
  assert report['skipped_examples'] == sum(state['skipped']) > 2
  one.close()


def test_parts_do_not_come_in_the_same_order_in_all_streams(words):
  iterator = batches_of(words, streams=4, pack=False, batch_size=4)
  is_sum = np.array(
    [
      ['=' in text for text in texts_of(batch, words)]
      for batch in itertools.islice(iterator, 40)
    ]
  )
  columns = {tuple(column) for column in is_sum.T}
  assert len(columns) == 4
  assert 0.55 < is_sum.mean() < 0.78


def test_only_own_shards_of_a_cache_are_read(words, tmp_path):
  """What others read may be broken."""
  shutil.copytree(CACHE / 'cached', tmp_path / 'cached')
  for file in tmp_path.rglob('*-of-00004'):
    if int(file.name.split('-')[1]) % 4 in (0, 1):
      file.write_bytes(b'broken' * 50)
  settings = {'streams': 4, 'cache_dir': str(tmp_path / 'cached')}
  for process in range(4):
    rows = rows_of(process, 4)
    iterator = batches_of(words, needed_B=rows, **settings)
    if process < 2:
      with pytest.raises(tf.errors.DataLossError):
        next(iterator)
    else:
      assert len(list(itertools.islice(iterator, 20))) == 20


class CountedSource(seqio.DataSource):
  """Four shards of texts, which tell when they are opened."""

  def __init__(self):
    super().__init__(splits=['train'])
    self.opened = []

  @property
  def supports_arbitrary_sharding(self):
    return False

  def list_shards(self, split):
    return list('abcd')

  def get_dataset(self, split, shuffle=True, seed=None, shard_info=None):
    shards = self.list_shards(split)
    if shard_info is not None:
      shards = shards[shard_info.index :: shard_info.num_shards]

    def examples():
      for shard in shards:
        self.opened.append(shard)
        for n in range(3):
          yield {'inputs': f'{shard}{n}', 'targets': shard * (n + 1)}

    return seqio_texts.text_dataset(examples)


def counted_task(*preprocessors):
  source = CountedSource()
  vocabulary = seqio_texts.SeqIOVocabulary(vocabularies.ByteVocabulary)
  seqio.TaskRegistry.add(
    'counted',
    source=source,
    preprocessors=[seqio_texts.tokenize_batched, *preprocessors],
    output_features={
      'inputs': seqio.Feature(vocabulary, add_eos=False),
      'targets': seqio.Feature(vocabulary, add_eos=False),
    },
    shuffle_buffer_size=8,
  )
  return source


@pytest.mark.parametrize('process, shards', [(0, 'ab'), (1, 'cd')])
def test_only_own_shards_of_a_source_are_opened(process, shards):
  source = counted_task()
  needed_B = rows_of(process, 2)
  settings = {'cache_dir': None, 'streams': 4, 'needed_B': needed_B}
  next(batches_of(None, 'counted', **settings))
  assert set(source.opened) == set(shards)


def test_another_vocabulary_reads_the_text_out_of_the_cache(words):
  code = vocabularies.ByteVocabulary()
  reader = alignment.Reader(words, code, anchor_size=words.size)
  iterator = batches_of(
    words,
    streams=2,
    pack=False,
    readers={'code': reader},
    task_feature_lengths=LENGTHS | {'code': 32},
  )
  for batch in itertools.islice(iterator, 3):
    read = [
      code.decode(ids[segments == 1])
      for ids, segments in zip(
        batch['code_input_tokens'], batch['code_segment_ids'], strict=True
      )
    ]
    sums = [text for text in read if '+' in text]
    assert len(sums) > 2
    corpus = ''.join(
      file.read_text() for file in (CACHE / 'corpus').glob('sums-*')
    )
    for text in sums:
      assert f'"{text[: text.index("=") + 1]}"' in corpus


# --- What does not fit -------------------------------------------------------


def test_a_cache_that_is_not_there_or_not_whole(words, tmp_path):
  with pytest.raises(ValueError, match=f'{SUMS}.* is not cached in .*/none/'):
    batches_of(words, cache_dir=str(tmp_path / 'none'))
  shutil.copytree(CACHE / 'cached', tmp_path / 'cached')
  (tmp_path / 'cached' / SUMS / 'train.tfrecord-00002-of-00004').unlink()
  with pytest.raises(ValueError, match='has 3 of the 4 shards'):
    batches_of(words, cache_dir=str(tmp_path / 'cached'))


def test_a_cache_of_another_text_or_vocabulary_is_not_taken(words):
  other = vocabularies.ByteVocabulary()
  with pytest.raises(ValueError, match='part0.* is not cached in'):
    batches_of(other)
  first, second = toy_mixture().parts
  path = 'tests/fixtures/cache/corpus/sums-0.jsonl'
  for number, changed in enumerate(
    (
      mixture.TextFile(path=path),
      mixture.TextFile(path=PARTS[0][0], template='{inputs} {targets}'),
    )
  ):
    parts = [mixture.Part(task=changed), second]
    made = toy_mixture(name=f'toy_{number}', parts=parts)
    with pytest.raises(ValueError, match='part0.* is not cached in'):
      batches_of(words, made)
  # The rate is no part of what is cached.
  parts = [mixture.Part(task=first.task, rate=9.0), second]
  names = seqio_names(words, toy_mixture(name='toy_9', parts=parts))
  assert names[0] == SUMS.replace('toy_dc', 'toy_9')


def seqio_names(words, made):
  name = seqio_mixtures.register_mixture(made, words, cached=True)
  return [task.name for task in seqio_cache.cacheable(name)]


def test_tasks_that_cannot_be_cached(words):
  counted_task()
  with pytest.raises(ValueError, match="'counted' cannot be cached.*Placehold"):
    batches_of(None, 'counted')


def test_streams_that_do_not_divide(words):
  with pytest.raises(ValueError, match='streams = 3 of data do not .* = 8'):
    batches_of(words, streams=3)
  with pytest.raises(ValueError, match='streams = 0 of data do not'):
    batches_of(words, streams=0)
  with pytest.raises(ValueError, match='streams = 8. Its cache has 4 shards'):
    batches_of(words, streams=8)
  made = toy_mixture(name='not_cached')
  with pytest.raises(ValueError, match='streams = 2. Its source has 1 shards'):
    batches_of(words, made, streams=2, cache_dir=None)


def test_a_position_of_another_number_of_streams(words):
  one, two = batches_of(words), batches_of(words, streams=2)
  with pytest.raises(ValueError, match='with streams = 2 .* this run has 1'):
    one.restore(two.state())
  with pytest.raises(ValueError, match='with streams = 1 .* this run has 2'):
    two.restore(one.state())


def test_streams_that_are_empty(words, tmp_path):
  shutil.copytree(CACHE / 'cached', tmp_path / 'cached')
  for file in tmp_path.rglob('train*-00003-of-00004'):
    file.write_bytes(b'')
  iterator = batches_of(words, streams=4, cache_dir=str(tmp_path / 'cached'))
  with pytest.raises(ValueError, match='Stream 3 of 4 has no more examples'):
    next(iterator)


def test_a_process_alone_needs_every_row():
  assert sharding.needed_rows(16, sharding.make_mesh()).all()
