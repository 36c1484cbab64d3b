"""Embeddings of integers that begin as waves of the number."""

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

  Beside that, all embeddings can begin near one common vector. Where the output
  matrix is not tied to them, and nothing decays, a token that training never
  shows stays there. (New tokens of a finished model are likewise begun at the
  mean of its embeddings: Hewitt 2021, "Initializing New Word Embeddings for
  Pretrained Language Models".)

  Attributes:
    largest: integers from 0 to this are meant; each must be one token.
    harmonics: K; wave k = 1..K has the period 2 * (largest + 1) / k, so low
      ones vary smoothly over all integers.
    amplitude: of each wave.
    common: deviation of the components of the common vector.
    seed: of the directions that the waves have in the embedding, and of the
      common vector.
  """

  largest: int
  harmonics: int = 12
  amplitude: float = 0.3
  common: float = 0.0
  seed: int = 0

  def table(
    self, vocabulary: vocabularies.Vocabulary, *, width: int
  ) -> np.ndarray:
    """Returns the float32 table [V, width] to add to the random one.

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
    rng = np.random.default_rng(self.seed)
    directions = np.linalg.qr(rng.normal(size=(width, width)))[0]
    table = np.empty((vocabulary.size, width), np.float32)
    table[:] = self.common * rng.normal(size=width)
    table[np.array(ids)[:, 0]] += (
      self.amplitude * waves @ directions[: waves.shape[1]]
    )
    return table
