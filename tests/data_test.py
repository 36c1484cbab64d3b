"""Tests of calm_jax.data."""

import functools
import itertools
import json
import re

import numpy as np
import pytest
import seqio
import tensorflow as tf

from calm_jax import (
  alignment,
  batches,
  data,
  feature_converters,
  seqio_texts,
  vocabularies,
)
from calm_jax.prefetch import Prefetcher
from tests import tokens

_LENGTHS = {'inputs': 4, 'targets': 6}
_WORDS = ('zero', 'a', 'b', 'c', 'd', 'e')


def _vocabulary(bos_token=None):
  return seqio_texts.SeqIOVocabulary(
    lambda: vocabularies.word_vocabulary(_WORDS, bos_token=bos_token)
  )


def _source(word, count=40):
  rows = [
    {'inputs': f'{word} zero', 'targets': ' '.join([word] * (n % 4)), 'n': n}
    for n in range(count)
  ]

  def dataset(split, shuffle_files, seed=0):
    del split, shuffle_files, seed
    fields = {k: [row[k] for row in rows] for k in rows[0]}
    return tf.data.Dataset.from_tensor_slices(fields)

  return seqio.FunctionDataSource(dataset, splits=('train',))


@pytest.fixture(autouse=True)
def tasks():
  """Registers toy_a, toy_b and toy_mix; leaves the registries as they were."""
  vocabulary = _vocabulary('<s>')
  for word in ('a', 'b'):
    seqio.TaskRegistry.add(
      f'toy_{word}',
      source=_source(word),
      preprocessors=[
        seqio_texts.tokenize_batched,
        seqio.preprocessors.append_eos,
      ],
      output_features={
        'inputs': seqio.Feature(vocabulary, add_eos=False),
        'targets': seqio.Feature(vocabulary),
      },
      shuffle_buffer_size=20,
    )
  seqio.MixtureRegistry.add('toy_mix', [('toy_a', 3.0), ('toy_b', 1.0)])
  yield
  seqio.MixtureRegistry.remove('toy_mix')
  for word in ('a', 'b'):
    seqio.TaskRegistry.remove(f'toy_{word}')


def _batches(name='toy_mix', **kwargs):
  settings = {
    'task_feature_lengths': _LENGTHS,
    'batch_size': 4,
    'seed': 1,
  }
  return data.seqio_batches(name, **(settings | kwargs))


def _assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize('name', ['toy_a', 'toy_mix'])
def test_another_vocabulary_reads_the_text_of_tasks_and_mixtures(name):
  anchor, code = data.task_vocabulary(name), vocabularies.ByteVocabulary()
  reader = alignment.Reader(anchor, code, anchor_size=anchor.size)
  batch = next(
    _batches(
      name,
      readers={'code': reader},
      task_feature_lengths=_LENGTHS | {'code': 64},
    )
  )
  for ids, segments in zip(
    batch['code_input_tokens'], batch['code_segment_ids'], strict=True
  ):
    first = code.decode(ids[segments == 1])
    assert re.match('[ab] zero', first), first


def test_vocabulary_in_tensorflow_equals_python():
  vocabulary = _vocabulary()
  text = 'zero b é'
  ids = [0, 2, vocabulary.unk_id]
  assert vocabulary.encode(text) == ids
  assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
  assert vocabulary.decode(ids) == 'zero b <unk>'
  row = [*ids, vocabulary.eos_id, 3]
  decoded = vocabulary.decode_tf(tf.constant([row, row])).numpy().tolist()
  assert decoded == [b'zero b <unk>'] * 2
  assert vocabulary.vocab_size == len(_WORDS) + 3
  assert vocabulary == _vocabulary()
  assert vocabulary != _vocabulary('<s>')


def _byte_level_and_sentencepiece(directory):
  """Two vocabularies of published kinds, as SeqIO sees them."""
  tokens.write(directory / 'a', *tokens.llama3())
  (directory / 'b').mkdir()
  model = tokens.llama_sentencepiece()
  (directory / 'b' / 'tokenizer.model').write_bytes(model)
  return [
    seqio_texts.SeqIOVocabulary(
      functools.partial(vocabularies.load_vocabulary, directory / name)
    )
    for name in 'ab'
  ]


def test_features_of_two_kinds_of_vocabulary(tmp_path):
  first, second = _byte_level_and_sentencepiece(tmp_path)
  features = {
    'inputs': seqio.Feature(first, add_eos=False),
    'targets': seqio.Feature(second),
  }
  texts = ['a \U0001f600 b', '', ' e\u0301\r\n 12', 'the<|eot_id|>']
  source = tf.data.Dataset.from_tensor_slices(
    {'inputs': texts, 'targets': texts[::-1]}
  )
  tokenized = seqio_texts.tokenize_batched(
    source, features, copy_pretokenized=False
  )
  tokenized = seqio.preprocessors.append_eos(tokenized, features)
  rows = list(tokenized.as_numpy_iterator())
  for row, text, target in zip(rows, texts, texts[::-1], strict=True):
    assert row['inputs'].tolist() == first.vocabulary.encode(text)
    assert row['targets'].tolist() == [*second.vocabulary.encode(target), 2]
    encoded = second.encode_tf(tf.constant(target))
    np.testing.assert_array_equal(encoded, row['targets'][:-1])
    assert second.decode_tf(row['targets']).numpy().decode() == target
  assert rows[-1]['inputs'].tolist()[-1] == 570
  assert (first.bos_id, second.bos_id) == (568, 1)
  assert first.vocab_size == 573 and second.vocab_size == 600
  assert first != second


@pytest.mark.parametrize('with_eos', [True, False])
def test_tokenize_batched_equals_tokenize(with_eos):
  features = {
    'inputs': seqio.Feature(_vocabulary(), add_eos=False),
    'targets': seqio.Feature(_vocabulary()),
  }
  source = _source('c', count=1100).get_dataset('train', shuffle=False)
  source = source.map(lambda e: {**e, 'ragged': tf.range(e['n'] % 3)})
  ours = seqio_texts.tokenize_batched(source, features, with_eos=with_eos)
  theirs = seqio.preprocessors.tokenize(source, features, with_eos=with_eos)
  assert ours.element_spec == theirs.element_spec
  count = 0
  for a, b in zip(
    ours.as_numpy_iterator(), theirs.as_numpy_iterator(), strict=True
  ):
    _assert_equal(a, b)
    count += 1
  assert count == 1100


def test_batches_have_bos_targets_with_eos_and_id_0():
  vocabulary = _vocabulary('<s>')
  iterator = _batches('toy_a', pack=False, shuffle=False)
  for n, batch in enumerate(itertools.islice(iterator, 3)):
    for row in range(4):
      real = batch['decoder_segment_ids'][row] == 1
      ids = batch['decoder_input_tokens'][row, real].tolist()
      # BOS, then `a zero` as inputs; zero is id 0, and n % 4 targets follow.
      assert ids == [vocabulary.bos_id, 1, 0, *[1] * ((4 * n + row) % 4)]
      target = batch['decoder_target_tokens'][row, real]
      assert target[-1] == vocabulary.eos_id
      assert batch['decoder_loss_weights'][row].sum() == row + 1
    assert batch['decoder_input_tokens'].shape == (4, 10)


def _words_seen(count):
  iterator = _batches(pack=False, batch_size=1)
  rows = itertools.islice(iterator, count)
  return [int(batch['decoder_input_tokens'][0, 1]) for batch in rows]


def test_mixture_is_deterministic_and_has_its_rates():
  seen = _words_seen(150)
  assert seen == _words_seen(150)
  assert 0.65 < np.mean([word == 1 for word in seen]) < 0.85
  first, other = next(_batches(seed=1)), next(_batches(seed=2))
  assert not np.array_equal(
    first['decoder_input_tokens'], other['decoder_input_tokens']
  )


@pytest.mark.parametrize('pack, prefetch', [(True, True), (False, False)])
def test_resume_is_exact_at_every_batch(pack, prefetch):
  def make():
    iterator = _batches(pack=pack)
    return Prefetcher(iterator) if prefetch else iterator

  original, states, expected = make(), [], []
  for _ in range(4):
    states.append(json.loads(json.dumps(original.state())))
    expected.append(next(original))
  resumed = make()
  for state, batch in reversed(list(zip(states, expected, strict=True))):
    resumed.restore(state)
    _assert_equal(next(resumed), batch)


def test_nothing_is_trimmed():
  lengths = {'inputs': 1, 'targets': 4}
  with pytest.raises(ValueError, match=r'needs 6 slots .* a row has 5'):
    for _ in itertools.islice(_batches(task_feature_lengths=lengths), 20):
      pass
  iterator = _batches(task_feature_lengths=lengths, truncate='skip')
  for _ in itertools.islice(iterator, 20):
    pass
  assert iterator.skipped > 0


def test_unknown_names_and_features():
  with pytest.raises(ValueError, match=r"'toy_mux', .* near names: toy_mix"):
    _batches('toy_mux')
  with pytest.raises(ValueError, match=r"no split 'test'; .*'train'"):
    _batches(split='test')
  with pytest.raises(ValueError, match=r"names \['targets'\]; give a length"):
    _batches(task_feature_lengths={'targets': 8})


@pytest.mark.parametrize('bos_token', [None, '<s>'])
def test_feature_converter_equals_numpy(bos_token):
  vocabulary = _vocabulary(bos_token)
  examples = [
    {'inputs': [0, 3], 'targets': [0, 4, 0]},
    {'inputs': [], 'targets': [5, 0]},
    {'inputs': [2, 2, 0, 0], 'targets': [0, 1, 2, 3, 4, 0]},
  ]
  dataset = tf.data.Dataset.from_generator(
    lambda: iter(examples),
    output_signature=dict.fromkeys(_LENGTHS, tf.TensorSpec([None], tf.int32)),
  )
  converter = feature_converters.PrefixLMFeatureConverter(
    bos_id=vocabulary.bos_id
  )
  converted = converter(dataset, _LENGTHS).batch(3).as_numpy_iterator()
  expected = batches.ExampleBatches(
    lambda start: iter(examples[start:]),
    batch_size=3,
    length=10,
    pack=False,
    bos_id=vocabulary.bos_id,
  )
  _assert_equal(next(converted), next(expected))


def test_feature_converter_refuses_to_pack():
  with pytest.raises(ValueError, match=r'drops id 0.*seqio_batches'):
    feature_converters.PrefixLMFeatureConverter(pack=True)
