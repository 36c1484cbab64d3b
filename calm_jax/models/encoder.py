"""`EncoderLM`: a bidirectional transformer, to be read as augmenting model."""

import jax.numpy as jnp

from calm_jax.array_types import Array
from calm_jax.models import attention
from calm_jax.models.transformer import Tower


class EncoderLM(Tower):
  """The encoder of T5, mT5 or ByT5: each position reads the whole text.

  It has no output matrix. As augmenting model it reads the prompt once, when
  the prompt is complete; it has no cache, and never sees a target.
  """

  def __call__(self, tokens_BS: Array, where: attention.Positions) -> Array:
    """Returns the normalised hidden states [B, S, E] after the last block."""
    x_BSE, _ = self.run(
      self.embed(tokens_BS), where, start=0, stop=self.config.num_layers
    )
    return self.final_norm(x_BSE)

  def init_everything(self, tokens_BS: Array) -> Array:
    """Touches every parameter; the method to initialise with."""
    positions_BS = jnp.broadcast_to(
      jnp.arange(tokens_BS.shape[1]), tokens_BS.shape
    )
    segment_ids_BS = jnp.ones_like(tokens_BS)
    where = attention.Positions.bidirectional(positions_BS, segment_ids_BS)
    return self(tokens_BS, where)
