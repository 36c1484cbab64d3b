"""Disturbed embeddings: an anchor learns to read vectors that are only near.

A composition writes vectors into the anchor's stream that are no embedding of
any token. A small anchor trained on clean embeddings is sure of itself, and
wrong, everywhere between them; its gradient then says nothing about what the
composition should write. Noise while the anchor itself is trained mends that.
"""

import dataclasses

import jax

from calm_jax.array_types import Array, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingNoise:
  """How much the anchor's embeddings are disturbed in training.

  Attributes:
    normal: every embedding gets normal noise, of a size drawn from [0, normal]
      times its own root mean square (after NEFTune, arXiv 2310.05914).
    mix: to some embeddings that of another token of the batch is added, times a
      number drawn from [0, mix]. What is to be predicted stays as it was, so
      between two tokens the model learns to be unsure (after mixup, arXiv
      1710.09412).
    mix_share: the share of tokens to which another is added.
  """

  normal: float = 0.0
  mix: float = 0.0
  mix_share: float = 0.5

  def __post_init__(self):
    if min(self.normal, self.mix) < 0 or not 0 <= self.mix_share <= 1:
      raise ValueError(
        f'{self}: normal and mix must not be negative, and mix_share must be'
        ' between 0 and 1.'
      )

  def disturb(self, rng: Array, batch: Batch, *, width: int) -> Batch:
    """Returns the batch with what `ComposedLM` adds to its embeddings.

    Args:
      rng: key of this step.
      batch: with `decoder_input_tokens` [B, T].
      width: D of the anchor.

    Returns:
      The batch; with `normal`, also `decoder_embedding_noise` [B, T, D] in
      units of each embedding's root mean square; with `mix`, also
      `decoder_mixed_tokens` (int32) and `decoder_mixed_weights`, both [B, T].
    """
    tokens_BT = batch['decoder_input_tokens']
    B, T = tokens_BT.shape
    size_rng, noise_rng, order_rng, weight_rng, share_rng = jax.random.split(
      rng, 5
    )
    added = {}
    if self.normal:
      sizes_BT1 = jax.random.uniform(size_rng, (B, T, 1), maxval=self.normal)
      added['decoder_embedding_noise'] = sizes_BT1 * jax.random.normal(
        noise_rng, (B, T, width)
      )
    if self.mix:
      weights_BT = jax.random.uniform(weight_rng, (B, T), maxval=self.mix)
      chosen_BT = jax.random.bernoulli(share_rng, self.mix_share, (B, T))
      added['decoder_mixed_weights'] = weights_BT * chosen_BT
      added['decoder_mixed_tokens'] = jax.random.permutation(
        order_rng, tokens_BT.reshape(-1)
      ).reshape(B, T)
    return {**batch, **added}
