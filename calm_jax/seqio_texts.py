"""Texts in SeqIO: our vocabularies as it wants them, and texts as data sets."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
import itertools

import numpy as np
import seqio
import tensorflow as tf

from calm_jax import vocabularies

# The accelerator belongs to JAX. TensorFlow would take its memory.
tf.config.set_visible_devices([], 'GPU')

_TEXTS = 1024  # How many are tokenized, or leave Python, at once.


class SeqIOVocabulary(seqio.Vocabulary):
  """One of our vocabularies as SeqIO wants it."""

  def __init__(self, make_vocabulary: Callable[[], vocabularies.Vocabulary]):
    """Wraps a vocabulary that is made at its first use.

    Args:
      make_vocabulary: returns the vocabulary. A function, so that registering
        a task costs nothing.
    """
    super().__init__()
    self._make_vocabulary = make_vocabulary

  @functools.cached_property
  def vocabulary(self) -> vocabularies.Vocabulary:
    return self._make_vocabulary()

  @functools.cached_property
  def fingerprint(self) -> str:
    return self.vocabulary.fingerprint()

  @property
  def bos_id(self) -> int | None:
    return self.vocabulary.bos_id

  @property
  def eos_id(self) -> int | None:
    return self.vocabulary.eos_id

  @property
  def pad_id(self) -> int:
    return self.vocabulary.pad_id or 0

  @property
  def unk_id(self) -> int | None:
    return self.vocabulary.unk_id

  @property
  def _base_vocab_size(self) -> int:
    return self.vocabulary.size

  def _encode(self, s: str) -> list[int]:
    return self.vocabulary.encode(s)

  def _decode(self, ids: list[int]) -> str:
    return self.vocabulary.decode(ids)

  @tf.autograph.experimental.do_not_convert
  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encode(text):
      text = np.asarray(text, object).item()  # In a graph it is bytes already.
      return np.array(self.vocabulary.encode(text.decode('utf-8')), np.int32)

    # Stateful functions would bar checkpoints of the iterator.
    ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
    return tf.ensure_shape(ids, [None])

  @tf.autograph.experimental.do_not_convert
  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(array):
      rows = array.reshape(-1, array.shape[-1])
      texts = [self.decode(row.tolist()).encode('utf-8') for row in rows]
      return np.array(texts, object).reshape(array.shape[:-1])

    texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    return tf.ensure_shape(texts, ids.shape[:-1])

  def __eq__(self, other: object) -> bool:
    return self is other or (
      isinstance(other, SeqIOVocabulary)
      and self.fingerprint == other.fingerprint
    )

  def __repr__(self) -> str:
    return f'SeqIOVocabulary({self.fingerprint[:12]})'


def tokenize_batched(
  dataset: tf.data.Dataset,
  output_features: Mapping[str, seqio.Feature],
  copy_pretokenized: bool = True,
  with_eos: bool = False,
) -> tf.data.Dataset:
  """Tokenizes like `seqio.preprocessors.tokenize`, a thousand texts at a time.

  Args:
    dataset: examples with a scalar string for each output feature they have.
    output_features: features whose vocabulary is a `SeqIOVocabulary`.
    copy_pretokenized: whether to keep each text as `<feature>_pretokenized`.
    with_eos: whether to append EOS where the feature has `add_eos`.

  Returns:
    The examples with int32 ids in place of texts, and every other field.
  """
  names = [name for name in dataset.element_spec if name in output_features]

  def encode_chunk(chunk):
    kept = dict(chunk)
    for name in names:
      texts = kept.pop(name)
      if copy_pretokenized:
        kept[f'{name}_pretokenized'] = texts
      feature = output_features[name]
      end = [feature.vocabulary.eos_id] if with_eos and feature.add_eos else []
      kept[name] = _encode_to_bytes(texts, feature.vocabulary, end)
    return kept

  def decode_example(example):
    ids = {name: tf.io.decode_raw(example[name], tf.int32) for name in names}
    return {**example, **ids}

  dataset = dataset.ragged_batch(_TEXTS).map(encode_chunk)
  return dataset.unbatch().map(decode_example)


@tf.autograph.experimental.do_not_convert  # It made `encode` ten times slower.
def _encode_to_bytes(
  texts: tf.Tensor, vocabulary: SeqIOVocabulary, end: list[int]
) -> tf.Tensor:
  """Returns each text's ids, then `end`, as a string of int32s.

  Unlike ragged rows, strings leave a batch as quickly as they enter it.
  """

  def encode(array):
    rows = vocabulary.vocabulary.encode_batch(
      [text.decode('utf-8') for text in array]
    )
    return np.array(
      [np.array(row + end, np.int32).tobytes() for row in rows], object
    )

  encoded = tf.numpy_function(encode, [texts], tf.string, stateful=False)
  return tf.ensure_shape(encoded, texts.shape)


def text_dataset(
  make_examples: Callable[[], Iterable[Mapping[str, str]]],
) -> tf.data.Dataset:
  """Returns 'inputs' and 'targets' of examples, read when the set is iterated.

  Args:
    make_examples: returns the examples, from the first on; other fields of
      theirs are left out.
  """

  def chunks() -> Iterator[dict[str, list[str]]]:
    examples = iter(make_examples())
    while chunk := list(itertools.islice(examples, _TEXTS)):
      yield {
        field: [example[field] for example in chunk] for field in signature
      }

  signature = dict.fromkeys(
    ('inputs', 'targets'), tf.TensorSpec([None], tf.string)
  )
  return tf.data.Dataset.from_generator(
    chunks, output_signature=signature
  ).unbatch()
