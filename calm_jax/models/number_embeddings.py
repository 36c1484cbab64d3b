"""Number embeddings that begin as waves of the number."""

import dataclasses
import math

import numpy as np

from calm_jax import vocabularies


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberEmbeddings:
  """Where the embeddings of integers begin: cosines and sines of the number.

  Large language models arrive at such embeddings by themselves (arXiv
  2406.03445); a small one that never calculates does not, and then neighbours
  have nothing in common, and another model can read its numbers only one by
  one.

  Attributes:
    largest: integers from 0 to this are meant; each must be one token.
    harmonics: K; wave k = 1..K has the period 2 * (largest + 1) / k, so low
      ones vary smoothly over all integers.
    amplitude: of each wave.
    seed: of the directions that the waves have in the embedding.
  """

  largest: int
  harmonics: int = 12
  amplitude: float = 0.3
  seed: int = 0

  def rows(
    self, vocabulary: vocabularies.Vocabulary, *, width: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids [N] of the integers, and float32 rows [N, width].

    Raises:
      ValueError: if an integer is not one word of the vocabulary, or the width
        is too small for the waves.
    """
    ids = vocabulary.encode_batch([str(n) for n in range(self.largest + 1)])
    for number, tokens in enumerate(ids):
      if len(tokens) != 1 or tokens[0] == vocabulary.unk_id:
        raise ValueError(
          f'NumberEmbeddings.largest = {self.largest}, and {number} is not one'
          f' token ({tokens}). Lower it to what the vocabulary has.'
        )
    if width < 2 * self.harmonics:
      raise ValueError(
        f'{self.harmonics} harmonics need a width of {2 * self.harmonics};'
        f' the model has embed_dim = {width}.'
      )
    integers = np.arange(self.largest + 1)
    frequencies = np.arange(1, self.harmonics + 1)
    angles = np.outer(integers, frequencies) * (
      math.pi / integers.size
    )  # radians
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    random = np.random.default_rng(self.seed).normal(size=(width, width))
    directions = np.linalg.qr(random)[0][: waves.shape[1]]
    rows = self.amplitude * waves @ directions
    return np.array(ids)[:, 0], rows.astype(np.float32)
