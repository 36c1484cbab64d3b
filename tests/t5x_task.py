"""A SeqIO task for T5X: words to be copied; id 0, its padding, is no word."""

import numpy as np
import seqio
import tensorflow as tf

from calm_jax import data
from tests import toys

NAME, VOCAB = 't5x_copy', 40
LENGTHS = {'inputs': 5, 'targets': 6}


def _rows(split, shuffle_files, seed=None):
  del shuffle_files, seed
  rng = np.random.default_rng(len(split))
  texts = [' '.join(f'a{i}' for i in rng.integers(1, 9, 4)) for _ in range(64)]
  return tf.data.Dataset.from_tensor_slices({'inputs': texts, 'targets': texts})


seqio.TaskRegistry.add(
  NAME,
  source=seqio.FunctionDataSource(_rows, splits=('train', 'validation')),
  preprocessors=[
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos,
  ],
  output_features={
    name: seqio.Feature(
      data.SeqIOVocabulary(lambda: toys.vocabulary(VOCAB)),
      add_eos=name == 'targets',
    )
    for name in LENGTHS
  },
  metric_fns=[
    lambda targets, predictions: {
      'exact_match': np.mean(
        [t == p for t, p in zip(targets, predictions, strict=True)]
      )
    }
  ],
)
