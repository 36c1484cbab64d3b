"""SeqIO: our vocabularies in its tasks, its tasks as our batches.

TensorFlow only prepares token ids here. Layout and packing are numpy's
(`calm_jax.batches`), because SeqIO's packer takes id 0 for padding, and its
iterators have no small state to continue from.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import difflib
import re
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from calm_jax import (
  alignment,
  batches,
  seqio_cache,
  seqio_mixtures,
  stream_batches,
  vocabularies,
)
from calm_jax.seqio_mixtures import Mixture
from calm_jax.seqio_texts import SeqIOVocabulary

_TEXT = 'inputs_pretokenized'  # What SeqIO calls the text of the inputs.
_EXAMPLES = 128  # How many leave TensorFlow at once.
_STRIDE = 1_000_003  # Between the seeds of streams.
_THREADS = 2  # For tf.data: it must not fight the train step for the cores.


def seqio_batches(
  mixture_or_task_name: str | Mixture,
  *,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
  seed: int,
  split: str = 'train',
  pack: bool = True,
  shuffle: bool = True,
  truncate: str = 'error',
  cache_dir: str | None = None,
  streams: int = 1,
  targets_per_row: int | None = None,
  vocabulary: vocabularies.Vocabulary | None = None,
  readers: Mapping[str, alignment.Reader] | None = None,
  needed_B: np.ndarray | None = None,
) -> batches.BatchIterator:
  """Returns the batches of a registered task or mixture, repeated for ever.

  Args:
    mixture_or_task_name: a name that SeqIO knows, or a mixture to register.
    task_feature_lengths: lengths of 'targets' and, if the task has them,
      'inputs'. Their sum is T, the slots of a row, as in T5X. And S by name of
      readers; T if not given.
    batch_size: B, rows in a global batch.
    seed: for the order, the mixing and stochastic preprocessors.
    split: which split of the task.
    pack: whether a row may hold several examples.
    shuffle: whether to shuffle, with the buffer that the task declares.
    truncate: 'error', or 'skip' to leave out and count what is too long.
    cache_dir: where `calm_jax.cache` has cached it; None reads what it is of.
    streams: R, groups of shards, each with its own order and its own B / R rows
      of a batch. Like the seed, it is part of what the data are.
    targets_per_row: how many supervised positions a row may have, if limited.
    vocabulary: of the anchor; it must be the one of the task.
    readers: by name of each augmenting model with a vocabulary of its own; the
      task must keep the text of its inputs as 'inputs_pretokenized'.
    needed_B: bool, the rows whose streams are read; None is all.

  Returns:
    A `BatchIterator`; examples begin with BOS, if the vocabulary has one.

  Raises:
    ValueError: for what is unknown, not cached or of another vocabulary, and
      for streams that do not divide the shards and B.
  """
  provider = _provider(mixture_or_task_name, split, cache_dir, vocabulary)
  _check_streams(provider, split, streams, batch_size, cached=bool(cache_dir))
  length, augmenting_lengths = _split_lengths(
    provider, task_feature_lengths, readers or {}
  )
  features_vocabulary = provider.output_features['targets'].vocabulary

  def make_stream(index: int) -> batches.ExampleBatches:
    return batches.ExampleBatches(
      _example_maker(
        provider,
        readers or {},
        split=split,
        use_cached=bool(cache_dir),
        shuffle=shuffle,
        # Else the parts of a mixture would come in the same order in all.
        seed=seed + index * _STRIDE,
        shard_info=seqio.ShardInfo(index, streams) if streams > 1 else None,
      ),
      batch_size=batch_size // streams,
      length=length,
      pack=pack,
      bos_id=_bos_id(features_vocabulary),
      truncate=truncate,
      targets_per_row=targets_per_row,
      augmenting_lengths=augmenting_lengths,
    )

  if streams == 1:
    return make_stream(0)
  return stream_batches.StreamBatches(
    make_stream, streams=streams, batch_size=batch_size, needed_B=needed_B
  )


def _example_maker(
  provider: seqio.Task | seqio.Mixture,
  readers: Mapping[str, alignment.Reader],
  **settings: Any,
) -> Callable[[int], Iterator[dict[str, Any]]]:
  """Returns what yields the examples of one stream from a number on."""
  is_mixture = isinstance(provider, seqio.Mixture)  # It drops the text.
  keep = {'passthrough_features': [_TEXT]} if is_mixture and readers else {}

  def make_examples(start: int) -> Iterator[dict[str, Any]]:
    dataset = provider.get_dataset(
      sequence_length=None,  # SeqIO would trim without a word.
      num_epochs=None,
      **settings,
      **keep,
    )
    examples = _examples(
      dataset, _features(provider), start, with_text=bool(readers)
    )
    if readers:
      anchor = task_vocabulary(provider.name)
      examples = alignment.read_examples(examples, readers, anchor=anchor)
    return examples

  return make_examples


def _features(provider: seqio.Task | seqio.Mixture) -> list[str]:
  return [f for f in ('inputs', 'targets') if f in provider.output_features]


def _check_streams(
  provider: seqio.Task | seqio.Mixture,
  split: str,
  streams: int,
  batch_size: int,
  *,
  cached: bool,
) -> None:
  """Raises ValueError unless rows and shards can be split evenly."""
  if streams < 1 or batch_size % streams:
    raise ValueError(
      f'streams = {streams} of data do not divide BATCH_SIZE = {batch_size}:'
      ' each fills as many rows. Choose a divisor.'
    )
  tasks = seqio.get_subtasks(provider)
  seqio_cache.check_streams(tasks, split, streams=streams, cached=cached)


def _provider(
  mixture: str | Mixture,
  split: str,
  cache_dir: str | None,
  vocabulary: vocabularies.Vocabulary | None,
) -> seqio.Task | seqio.Mixture:
  """Returns what SeqIO has by a name, or makes of a mixture of texts."""
  if not isinstance(mixture, str):
    if vocabulary is None:
      raise ValueError(
        f'The mixture {mixture.name!r} is to be tokenized as the anchor reads;'
        ' give vocabulary=.'
      )
    mixture = seqio_mixtures.register_mixture(
      mixture, vocabulary, cached=bool(cache_dir)
    )
  provider = _known(mixture, split)
  _check_vocabulary(mixture, vocabulary)
  if cache_dir:
    seqio_cache.open_cache(cache_dir, seqio_cache.cacheable(mixture), split)
  return provider


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
  for chunk in _values(dataset.with_options(_options())):
    rows = {f: _lists(chunk[f]) for f in features}
    if with_text:
      texts = chunk.get(_TEXT)
      size = len(next(iter(rows.values())))
      texts = [b''] * size if texts is None else texts.numpy()
      rows['text'] = [text.decode('utf-8') for text in texts]
      rows.setdefault('inputs', [[]] * size)
    for values in zip(*rows.values(), strict=True):
      yield dict(zip(rows, values, strict=True))


def _values(dataset: tf.data.Dataset) -> Iterator[Any]:
  """Yields what a data set holds; a source's ValueErrors stay so."""
  try:
    yield from dataset
  except tf.errors.InvalidArgumentError as error:
    ours = re.search(r'ValueError: (.*)', str(error))
    if ours is None:
      raise
    raise ValueError(ours[1]) from error


def _split_lengths(
  provider: seqio.Task | seqio.Mixture,
  lengths: Mapping[str, int],
  readers: Iterable[str],
) -> tuple[int, dict[str, int]]:
  """Returns the slots of a row, and those of each reader."""
  features = _features(provider)
  if not {*features} <= set(lengths) <= {*features, *readers}:
    raise ValueError(
      f'{provider.name!r} has the features {features}, the augmenting '
      f'models {sorted(readers)} have tokens of their own, and '
      f'task_feature_lengths names {sorted(lengths)}; give a length for each '
      'feature, and none for what is neither.'
    )
  return batches.row_lengths(lengths, readers)


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
    _known(mixture_or_task_name, 'train').output_features['targets'].vocabulary
  )
  if not isinstance(vocabulary, SeqIOVocabulary):
    raise ValueError(
      f'{mixture_or_task_name!r} has a vocabulary of SeqIO itself, a'
      f' {type(vocabulary).__name__}. Wrap one of calm_jax.vocabularies in'
      ' data.SeqIOVocabulary in its features.'
    )
  return vocabulary.vocabulary


def _known(name: str, split: str) -> seqio.Task | seqio.Mixture:
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
