"""`EncoderLM`: a bidirectional transformer, to be read as augmenting model."""

from flax import linen as nn

from calm_jax.array_types import Array
from calm_jax.models import attention
from calm_jax.models.transformer import Cache, Tower


class EncoderLM(Tower):
  """The encoder of T5, mT5 or ByT5: each position reads the whole text.

  It has no output matrix. As augmenting model it reads the prompt once, when
  the prompt is complete; it has no cache, and never sees a target.
  """

  reads_targets = False
  whole = staticmethod(attention.Positions.bidirectional)

  def __call__(self, tokens_BS: Array, where: attention.Positions) -> Array:
    """Returns the normalised hidden states [B, S, E] after the last block."""
    x_BSE, _ = self.run(
      self.embed(tokens_BS), where, start=0, stop=self.config.num_layers
    )
    return self.final_norm(x_BSE)

  @nn.nowrap
  def empty_cache(self, *, batch: int, slots: int, stop: int) -> Cache:
    """Returns nothing: what is kept are the projected keys and values."""
    del batch, slots, stop
    return {}
