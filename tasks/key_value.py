"""The key-value tasks and mixtures, registered with SeqIO for every size.

A name is `<task>_<size>`, for instance 'kv_arithmetic_quick', or
`<task>_<size>_pieces` for the same texts in the vocabulary that cuts keys into
pieces. Nothing is drawn before a data set is used.
"""

from collections.abc import Callable
import functools

import seqio
import tensorflow as tf

from calm_jax import seqio_texts, vocabularies
from calm_jax.tasks import key_value_generator, key_value_tables


class _Source(seqio.DataSource):
  """The texts of one task and size; the training split never ends."""

  def __init__(self, task: str, size: str):
    self._task, self._size = task, size
    count = key_value_tables.SIZES[size].evaluation_examples
    splits = key_value_generator.TASKS[task].splits
    super().__init__(
      splits=splits,
      num_input_examples={s: None if s == 'train' else count for s in splits},
      caching_permitted=False,
    )

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  @property
  def performs_internal_shuffling(self) -> bool:
    return True  # Independent draws: there is nothing to shuffle.

  def list_shards(self, split: str) -> list[str]:
    return [split]

  def get_dataset(
    self, split='train', shuffle=True, seed=None, shard_info=None
  ) -> tf.data.Dataset:
    del shuffle, shard_info  # SeqIO shards the examples of a single shard.

    return seqio_texts.text_dataset(
      lambda: key_value_generator.examples(
        self._task, self._size, split, seed or 0
      )
    )


def _final_answer(text: str, **unused_kwargs) -> str:
  return key_value_generator.final_answer(text)


def _register(
  size: str, make_vocabulary: Callable[[], vocabularies.Vocabulary], ending: str
) -> None:
  vocabulary = seqio_texts.SeqIOVocabulary(make_vocabulary)
  for name in key_value_generator.TASKS:
    scratchpad = name == 'kv_arithmetic_scratchpad'
    seqio.TaskRegistry.add(
      f'{name}_{size}{ending}',
      source=_Source(name, size),
      output_features={
        'inputs': seqio.Feature(vocabulary, add_eos=False),
        'targets': seqio.Feature(vocabulary, add_eos=True),
      },
      preprocessors=[
        functools.partial(seqio_texts.tokenize_batched, with_eos=True)
      ],
      postprocess_fn=_final_answer if scratchpad else None,
      metric_fns=[key_value_generator.exact_match],
      shuffle_buffer_size=None,
    )
  for name, rates in key_value_generator.MIXTURES.items():
    seqio.MixtureRegistry.add(
      f'{name}_{size}{ending}',
      [(f'{task}_{size}{ending}', rate) for task, rate in rates.items()],
    )


for _size, _config in key_value_tables.SIZES.items():
  for _vocabulary, _ending in (
    (key_value_tables.vocabulary, ''),
    (key_value_tables.pieces_vocabulary, '_pieces'),
  ):
    _register(_size, functools.partial(_vocabulary, _config), _ending)
