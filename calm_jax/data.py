"""SeqIO: our vocabularies in its tasks, its tasks as our batches.

TensorFlow only prepares token ids here. Layout and packing are numpy's
(`calm_jax.batches`), because SeqIO's packer takes id 0 for padding, and its
iterators have no small state to continue from.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import difflib
import functools
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from calm_jax import alignment, batches, vocabularies

# The accelerator belongs to JAX. TensorFlow would take its memory.
tf.config.set_visible_devices([], 'GPU')

_TEXTS = 1024  # How many are tokenized at once.
_TEXT = 'inputs_pretokenized'  # What SeqIO calls the text of the inputs.
_EXAMPLES = 128  # How many leave TensorFlow at once.
_THREADS = 2  # For tf.data: it must not fight the train step for the cores.


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


def seqio_batches(
  mixture_or_task_name: str,
  *,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
  seed: int,
  split: str = 'train',
  pack: bool = True,
  shuffle: bool = True,
  truncate: str = 'error',
  targets_per_row: int | None = None,
  vocabulary: vocabularies.Vocabulary | None = None,
  readers: Mapping[str, alignment.Reader] | None = None,
) -> batches.ExampleBatches:
  """Returns the batches of a registered task or mixture, repeated for ever.

  Every process makes the same global batches, and takes its rows of them
  (`sharding.put_batch`). To continue, the stream is made anew up to the
  saved position: exact, without buffers to save, at the cost of tokenizing what
  was consumed once more.

  Args:
    mixture_or_task_name: a name that SeqIO knows.
    task_feature_lengths: lengths of 'targets' and, if the task has them,
      'inputs'. Their sum is T, the slots of a row, as in T5X. And S by name of
      readers; T if not given.
    batch_size: B, rows in a global batch.
    seed: for the order, the mixing and stochastic preprocessors.
    split: which split of the task.
    pack: whether a row may hold several examples.
    shuffle: whether to shuffle, with the buffer that the task declares.
    truncate: 'error', or 'skip' to leave out and count what is too long.
    targets_per_row: how many supervised positions a row may have, if limited.
    vocabulary: of the anchor; it must be the one of the task.
    readers: by name of each augmenting model with a vocabulary of its own; the
      task must keep the text of its inputs as 'inputs_pretokenized'.

  Returns:
    A `BatchIterator`; examples begin with BOS, if the vocabulary has one.

  Raises:
    ValueError: for an unknown name or split, or another vocabulary.
  """
  provider = _provider(mixture_or_task_name, split)
  features = [f for f in ('inputs', 'targets') if f in provider.output_features]
  readers = readers or {}
  lengths = dict(task_feature_lengths)
  _check_lengths(mixture_or_task_name, lengths, features, readers)
  own = {name: lengths.pop(name) for name in readers if name in lengths}
  augmenting_lengths = dict.fromkeys(readers, sum(lengths.values())) | own
  _check_vocabulary(mixture_or_task_name, vocabulary)
  features_vocabulary = provider.output_features['targets'].vocabulary
  drops_text = readers and isinstance(provider, seqio.Mixture)
  keep = {'passthrough_features': [_TEXT]} if drops_text else {}

  def make_examples(start: int) -> Iterator[dict[str, Any]]:
    dataset = provider.get_dataset(
      sequence_length=None,  # SeqIO would trim without a word.
      split=split,
      shuffle=shuffle,
      seed=seed,
      num_epochs=None,
      **keep,
    )
    examples = _examples(dataset, features, start, with_text=bool(readers))
    if readers:
      anchor = task_vocabulary(mixture_or_task_name)
      examples = alignment.read_examples(examples, readers, anchor=anchor)
    return examples

  return batches.ExampleBatches(
    make_examples,
    batch_size=batch_size,
    length=sum(lengths.values()),
    pack=pack,
    bos_id=_bos_id(features_vocabulary),
    pad_id=features_vocabulary.pad_id,
    truncate=truncate,
    targets_per_row=targets_per_row,
    augmenting_lengths=augmenting_lengths,
  )


def _examples(
  dataset: tf.data.Dataset, features: list[str], start: int, *, with_text: bool
) -> Iterator[dict[str, Any]]:
  """Yields ids by feature from example `start` on, and the inputs' text."""
  kept = list(features)
  if with_text and 'inputs' in features:
    kept.append(_TEXT)
    if _TEXT not in dataset.element_spec:
      raise ValueError(
        f'The task keeps no {_TEXT}, only'
        f' {sorted(dataset.element_spec)}, and an augmenting model has a'
        ' vocabulary of its own, which needs the text. Tokenize with'
        ' copy_pretokenized=True.'
      )
  dataset = dataset.map(lambda example: {f: example[f] for f in kept})
  dataset = dataset.skip(start).ragged_batch(_EXAMPLES).prefetch(1)
  for chunk in dataset.with_options(_options()):
    rows = {f: _lists(chunk[f]) for f in features}
    if with_text:
      texts = chunk.get(_TEXT)
      size = len(next(iter(rows.values())))
      texts = [b''] * size if texts is None else texts.numpy()
      rows['text'] = [text.decode('utf-8') for text in texts]
      rows.setdefault('inputs', [[]] * size)
    for values in zip(*rows.values(), strict=True):
      yield dict(zip(rows, values, strict=True))


def _check_lengths(
  mixture_or_task_name: str,
  lengths: Mapping[str, int],
  features: Iterable[str],
  readers: Iterable[str],
) -> None:
  if not {*features} <= set(lengths) <= {*features, *readers}:
    raise ValueError(
      f'{mixture_or_task_name!r} has the features {features}, the augmenting '
      f'models {sorted(readers)} have tokens of their own, and '
      f'task_feature_lengths names {sorted(lengths)}; give a length for each '
      'feature, and none for what is neither.'
    )


def _check_vocabulary(
  mixture_or_task_name: str, vocabulary: vocabularies.Vocabulary | None
) -> None:
  """Raises ValueError unless the task has the anchor's vocabulary."""
  if vocabulary is None:
    return
  own = task_vocabulary(mixture_or_task_name)
  if own.fingerprint() != vocabulary.fingerprint():
    raise ValueError(
      f'{mixture_or_task_name!r} is tokenized with a vocabulary of {own.size}'
      f' words, and the anchor has another, of {vocabulary.size}. Register the'
      ' task with the vocabulary of the anchor.'
    )


def task_vocabulary(mixture_or_task_name: str) -> vocabularies.Vocabulary:
  """Returns our vocabulary of the targets of a registered task or mixture."""
  vocabulary = (
    _provider(mixture_or_task_name, 'train')
    .output_features['targets']
    .vocabulary
  )
  if not isinstance(vocabulary, SeqIOVocabulary):
    raise ValueError(
      f'{mixture_or_task_name!r} has a vocabulary of SeqIO itself, a'
      f' {type(vocabulary).__name__}. Wrap one of calm_jax.vocabularies in'
      ' data.SeqIOVocabulary in its features.'
    )
  return vocabulary.vocabulary


def _provider(name: str, split: str) -> seqio.Task | seqio.Mixture:
  """Returns the task or mixture `name`, all of whose tasks have `split`."""
  known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if name not in known:
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    raise ValueError(
      f'SeqIO knows no task or mixture {name!r}, among {len(known)}; '
      f'near names: {", ".join(near) or "none"}. Correct the name, or import '
      'the module that registers it.'
    )
  provider = seqio.get_mixture_or_task(name)
  for task in seqio.get_subtasks(provider):
    if split not in task.splits:
      raise ValueError(
        f'{task.name!r} has no split {split!r}; choose among '
        f'{sorted(task.splits)}.'
      )
  return provider


def _bos_id(vocabulary: seqio.Vocabulary) -> int | None:
  try:
    bos_id = vocabulary.bos_id
  except NotImplementedError:  # SeqIO's own vocabularies without BOS.
    return None
  return bos_id if bos_id is not None and bos_id >= 0 else None


def _lists(ragged: tf.RaggedTensor) -> list[list[int]]:
  # Not `to_list`, which makes a tensor of each row.
  flat, splits = ragged.values.numpy().tolist(), ragged.row_splits.numpy()
  return [flat[i:j] for i, j in zip(splits[:-1], splits[1:], strict=True)]


def _options() -> tf.data.Options:
  options = tf.data.Options()
  options.deterministic = True
  options.threading.private_threadpool_size = _THREADS
  options.threading.max_intra_op_parallelism = 1
  return options
