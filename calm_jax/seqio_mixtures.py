"""Mixtures of texts in SeqIO: read as they are, or cached by its tool."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
import hashlib
import itertools
import random
from typing import Any, Protocol

import seqio
import tensorflow as tf

from calm_jax import seqio_texts, vocabularies
from calm_jax.seqio_texts import SeqIOVocabulary

_SHUFFLED = 10_000  # Texts in the shuffle buffer of a mixture's part.


class Part(Protocol):
  """Examples, and their share of a mixture; see `calm_jax.tasks.mixture`."""

  task: Any
  split: str
  rate: float

  def shards(self) -> Sequence[Any]:
    """Returns tasks that together have the examples of `task`."""


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


class _CacheSource(seqio.DataSource):
  """The texts of one part, once, to be cached; each file is a shard."""

  def __init__(self, part: Part):
    self.part = part
    super().__init__(splits=['train'])

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def list_shards(self, split: str) -> list[str]:
    return [f'{i}:{one.name}' for i, one in enumerate(self.part.shards())]

  def get_dataset(
    self, split='train', shuffle=True, seed=None, shard_info=None
  ) -> tf.data.Dataset:
    del split, shuffle, seed  # Beam shuffles.
    shards = self.part.shards()
    if shard_info is not None:
      shards = shards[shard_info.index :: shard_info.num_shards]

    def once():
      return itertools.chain.from_iterable(
        one.examples(self.part.split) for one in shards
      )

    return seqio_texts.text_dataset(once)


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
  mixture: Mixture,
  vocabulary: vocabularies.Vocabulary,
  *,
  cached: bool = False,
) -> str:
  """Makes SeqIO know a mixture of texts, tokenized; again is fine.

  Args:
    mixture: its tasks' examples have 'inputs', which may be empty, and
      'targets', to which EOS is added.
    vocabulary: of the anchor.
    cached: whether its tasks can be cached, and are read so. The texts are
      then not looked for.

  Returns:
    The name, that of the mixture; its only split, 'train', never ends.

  Raises:
    ValueError: if the name stands for something else, or a part has no first
      example. What its other examples are is found when they are read.
  """
  features_vocabulary = SeqIOVocabulary(lambda: vocabulary)
  has_eos = vocabulary.eos_id is not None
  make_source = _CacheSource if cached else _PartSource
  sources = [make_source(part) for part in mixture.parts]
  names = _part_names(mixture, vocabulary, cached)
  if _is_registered(mixture, names, features_vocabulary):
    return mixture.name
  if not cached:
    check_parts(mixture)
  tokenize = functools.partial(seqio_texts.tokenize_batched, with_eos=True)
  for name, source in zip(names, sources, strict=True):
    seqio.TaskRegistry.add(
      name,
      source=source,
      output_features={
        'inputs': seqio.Feature(features_vocabulary, add_eos=False),
        'targets': seqio.Feature(features_vocabulary, add_eos=has_eos),
      },
      preprocessors=[tokenize, seqio.CacheDatasetPlaceholder(required=True)]
      if cached
      else [tokenize],
      shuffle_buffer_size=_SHUFFLED if cached else None,
    )
  rates = [part.rate for part in mixture.parts]
  seqio.MixtureRegistry.add(mixture.name, list(zip(names, rates, strict=True)))
  return mixture.name


def check_parts(mixture: Mixture) -> None:
  """Raises ValueError if a part has no first example."""
  for part in mixture.parts:
    if next(iter(part.task.examples(part.split)), None) is None:
      raise ValueError(
        f'{part.task.name!r}, a part of the mixture {mixture.name!r},'
        f' has no example in its split {part.split!r}. Look into its'
        ' files, or leave the part out.'
      )


def _part_names(
  mixture: Mixture, vocabulary: vocabularies.Vocabulary, cached: bool
) -> list[str]:
  """Returns the names of the tasks that the parts are.

  One that is cached names what is in the cache, so that another text or
  vocabulary is not taken for it.
  """
  names = [f'{mixture.name}.part{i}' for i in range(len(mixture.parts))]
  if not cached:
    return names
  return [
    f'{name}.{_digest(part, vocabulary)}'
    for name, part in zip(names, mixture.parts, strict=True)
  ]


def _digest(part: Part, vocabulary: vocabularies.Vocabulary) -> str:
  what = f'{part.task!r} {part.split} {vocabulary.fingerprint()}'
  return hashlib.sha256(what.encode()).hexdigest()[:10]


def _is_registered(
  mixture: Mixture, names: Sequence[str], vocabulary: SeqIOVocabulary
) -> bool:
  """Whether it is; raises ValueError if its name stands for another thing."""
  known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if mixture.name not in known:
    return False
  tasks = seqio.get_subtasks(seqio.get_mixture_or_task(mixture.name))
  if {task.name for task in tasks} == set(names) and all(
    seqio.TaskRegistry.get(name).source.part == part
    and seqio.TaskRegistry.get(name).output_features['targets'].vocabulary
    == vocabulary
    for name, part in zip(names, mixture.parts, strict=True)
  ):
    return True
  raise ValueError(
    f'SeqIO knows another task or mixture by the name {mixture.name!r}: of'
    ' other parts, rates or vocabulary, or cached and not. Give this mixture'
    ' another name.'
  )
