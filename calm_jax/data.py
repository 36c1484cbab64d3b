"""SeqIO: our vocabularies in its tasks, its tasks as our batches.

TensorFlow only prepares token ids here. Layout and packing are numpy's
(`calm_jax.batches`), because SeqIO's packer takes id 0 for padding, and its
iterators have no small state to continue from.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import difflib
import functools
import random
import re
from typing import Any, Protocol

import seqio
import tensorflow as tf

from calm_jax import alignment, batches, seqio_texts, vocabularies
from calm_jax.seqio_texts import SeqIOVocabulary

_TEXT = 'inputs_pretokenized'  # What SeqIO calls the text of the inputs.
_EXAMPLES = 128  # How many leave TensorFlow at once.
_SHUFFLED = 10_000  # Texts in the shuffle buffer of a mixture's part.
_THREADS = 2  # For tf.data: it must not fight the train step for the cores.


class Part(Protocol):
  """Examples, and their share of a mixture; see `calm_jax.tasks.mixture`."""

  task: Any
  split: str
  rate: float


class Mixture(Protocol):
  """Parts under a name; see `calm_jax.tasks.mixture`."""

  name: str
  parts: Sequence[Part]


class _PartSource(seqio.DataSource):
  """The texts of one part, over and over; its split is 'train'."""

  def __init__(self, part: Part):
    self.part = part
    super().__init__(splits=['train'], caching_permitted=False)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  @property
  def performs_internal_shuffling(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    return [split]

  def examples(self) -> Iterable[Mapping[str, Any]]:
    return self.part.task.examples(self.part.split)

  def get_dataset(
    self, split='train', shuffle=True, seed=None, shard_info=None
  ) -> tf.data.Dataset:
    del split, shard_info  # There is one of each.

    def stream():
      # SeqIO would fill its buffer by repeating small data, which is slow.
      rng = random.Random(seed or 0)
      while True:
        examples = self.examples()
        yield from _shuffled(examples, rng) if shuffle else examples

    return seqio_texts.text_dataset(stream)


def _shuffled(examples: Iterable[Any], rng: random.Random) -> Iterator[Any]:
  """Yields each example once, out of a buffer that is filled before."""
  buffer = []
  for example in examples:
    if len(buffer) < _SHUFFLED:
      buffer.append(example)
    else:
      i = rng.randrange(_SHUFFLED)
      yield buffer[i]
      buffer[i] = example
  rng.shuffle(buffer)
  yield from buffer


def register_mixture(
  mixture: Mixture, vocabulary: vocabularies.Vocabulary
) -> str:
  """Makes SeqIO know a mixture of texts, tokenized; again is fine.

  Args:
    mixture: its tasks' examples have 'inputs', which may be empty, and
      'targets', to which EOS is added.
    vocabulary: of the anchor.

  Returns:
    The name, that of the mixture; its only split, 'train', never ends.

  Raises:
    ValueError: if the name stands for something else, or a part has no first
      example. What its other examples are is found when they are read.
  """
  features_vocabulary = SeqIOVocabulary(lambda: vocabulary)
  has_eos = vocabulary.eos_id is not None
  sources = [_PartSource(part) for part in mixture.parts]
  if _is_registered(mixture, sources, features_vocabulary):
    return mixture.name
  for source in sources:
    if next(iter(source.examples()), None) is None:
      raise ValueError(
        f'{source.part.task.name!r}, a part of the mixture {mixture.name!r},'
        f' has no example in its split {source.part.split!r}. Look into its'
        ' files, or leave the part out.'
      )
  rates = []
  for name, source in zip(_part_names(mixture), sources, strict=True):
    seqio.TaskRegistry.add(
      name,
      source=source,
      output_features={
        'inputs': seqio.Feature(features_vocabulary, add_eos=False),
        'targets': seqio.Feature(features_vocabulary, add_eos=has_eos),
      },
      preprocessors=[
        functools.partial(seqio_texts.tokenize_batched, with_eos=True)
      ],
      shuffle_buffer_size=None,
    )
    rates.append((name, source.part.rate))
  seqio.MixtureRegistry.add(mixture.name, rates)
  return mixture.name


def _part_names(mixture: Mixture) -> list[str]:
  return [f'{mixture.name}.part{i}' for i in range(len(mixture.parts))]


def _is_registered(
  mixture: Mixture,
  sources: Sequence[_PartSource],
  vocabulary: SeqIOVocabulary,
) -> bool:
  """Whether it is; raises ValueError if its name stands for another thing."""
  known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if mixture.name not in known:
    return False
  tasks = seqio.get_subtasks(seqio.get_mixture_or_task(mixture.name))
  if {task.name for task in tasks} == set(_part_names(mixture)) and all(
    seqio.TaskRegistry.get(name).source.part == source.part
    and seqio.TaskRegistry.get(name).output_features['targets'].vocabulary
    == vocabulary
    for name, source in zip(_part_names(mixture), sources, strict=True)
  ):
    return True
  raise ValueError(
    f'SeqIO knows another task or mixture by the name {mixture.name!r}: of'
    ' other parts, rates or vocabulary. Give this mixture another name.'
  )


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
  targets_per_row: int | None = None,
  vocabulary: vocabularies.Vocabulary | None = None,
  readers: Mapping[str, alignment.Reader] | None = None,
) -> batches.ExampleBatches:
  """Returns the batches of a registered task or mixture, repeated for ever.

  Every process makes the same global batches, and takes its rows of them
  (`sharding.put_batch`). To continue, the stream is made anew up to the
  saved position: exact, without buffers to save, but tokenized once more.

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
    targets_per_row: how many supervised positions a row may have, if limited.
    vocabulary: of the anchor; it must be the one of the task.
    readers: by name of each augmenting model with a vocabulary of its own; the
      task must keep the text of its inputs as 'inputs_pretokenized'.

  Returns:
    A `BatchIterator`; examples begin with BOS, if the vocabulary has one.

  Raises:
    ValueError: for an unknown name or split, or another vocabulary.
  """
  mixture_or_task_name = _name_of(mixture_or_task_name, vocabulary)
  provider = _provider(mixture_or_task_name, split)
  features = [f for f in ('inputs', 'targets') if f in provider.output_features]
  readers = readers or {}
  length, augmenting_lengths = _split_lengths(
    mixture_or_task_name, task_feature_lengths, features, readers
  )
  _check_vocabulary(mixture_or_task_name, vocabulary)
  features_vocabulary = provider.output_features['targets'].vocabulary
  is_mixture = isinstance(provider, seqio.Mixture)  # It drops the text.
  keep = {'passthrough_features': [_TEXT]} if is_mixture and readers else {}

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
    length=length,
    pack=pack,
    bos_id=_bos_id(features_vocabulary),
    pad_id=features_vocabulary.pad_id,
    truncate=truncate,
    targets_per_row=targets_per_row,
    augmenting_lengths=augmenting_lengths,
  )


def _name_of(
  mixture: str | Mixture, vocabulary: vocabularies.Vocabulary | None
) -> str:
  """Returns a name that SeqIO knows, of what may be a mixture of texts."""
  if isinstance(mixture, str):
    return mixture
  if vocabulary is None:
    raise ValueError(
      f'The mixture {mixture.name!r} is to be tokenized as the anchor reads;'
      ' give vocabulary=.'
    )
  return register_mixture(mixture, vocabulary)


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
  mixture_or_task_name: str,
  lengths: Mapping[str, int],
  features: Iterable[str],
  readers: Iterable[str],
) -> tuple[int, dict[str, int]]:
  """Returns the slots of a row, and those of each reader."""
  if not {*features} <= set(lengths) <= {*features, *readers}:
    raise ValueError(
      f'{mixture_or_task_name!r} has the features {features}, the augmenting '
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
