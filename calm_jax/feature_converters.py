"""The layout of `calm_jax.batches` for those who call SeqIO themselves."""

from collections.abc import Mapping

import seqio
import tensorflow as tf


class PrefixLMFeatureConverter(seqio.FeatureConverter):
  """The layout of `calm_jax.batches`, one example a row, inside SeqIO.

  For those who call `seqio.get_dataset` or `seqio.Evaluator` themselves; note
  that these trim features to their lengths without a word.
  """

  _SPEC = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
  TASK_FEATURES = {'inputs': _SPEC, 'targets': _SPEC}
  MODEL_FEATURES = {
    'decoder_input_tokens': _SPEC,
    'decoder_target_tokens': _SPEC,
    'decoder_positions': _SPEC,
    'decoder_segment_ids': _SPEC,
    'decoder_loss_weights': seqio.FeatureConverter.FeatureSpec(
      dtype=tf.float32
    ),
  }
  PACKING_FEATURE_DTYPES = None

  def __init__(self, *, bos_id: int | None = None, pack: bool = False):
    """Initialises the converter.

    Args:
      bos_id: what every sequence begins with, or None.
      pack: must be False.
    """
    if pack:
      raise ValueError(
        "pack=True: SeqIO's packer drops id 0, which is a word in many "
        'vocabularies; use calm_jax.data.seqio_batches(..., pack=True).'
      )
    super().__init__(pack=False, bos_id=bos_id)

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    length = sum(task_feature_lengths.values())
    bos = [] if self.bos_id is None else [self.bos_id]

    def convert(example):
      prefix = tf.concat([tf.constant(bos, tf.int32), example['inputs']], 0)
      sequence = tf.concat([prefix, example['targets']], 0)
      positions = tf.range(tf.maximum(tf.size(sequence) - 1, 0))

      def pad(values):
        values = tf.pad(values, [[0, length - tf.size(values)]])
        return tf.ensure_shape(values, [length])

      return {
        'decoder_input_tokens': pad(sequence[:-1]),
        'decoder_target_tokens': pad(sequence[1:]),
        'decoder_positions': pad(positions),
        'decoder_segment_ids': pad(tf.ones_like(positions)),
        'decoder_loss_weights': pad(
          tf.cast(positions + 1 >= tf.size(prefix), tf.float32)
        ),
      }

    return ds.map(convert, num_parallel_calls=2)

  def get_model_feature_lengths(
    self, task_feature_lengths: Mapping[str, int]
  ) -> Mapping[str, int]:
    length = sum(task_feature_lengths.values())
    return dict.fromkeys(self.MODEL_FEATURES, length)
