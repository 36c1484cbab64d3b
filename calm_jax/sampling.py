"""Which token comes next: the likeliest, or one that is drawn."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp

from calm_jax.array_types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig:
  """How continuations are chosen; the default is greedy.

  Attributes:
    temperature: 0 takes the likeliest token; otherwise one is drawn from the
      distribution of logits / temperature.
    top_k: draw among the k likeliest tokens only; None is all.
    top_p: draw among the fewest likeliest tokens that have together at least
      this probability (arXiv 1904.09751); 1 is all. Applied after `top_k`.
    num_samples: continuations of each prompt; with beams, the best so many.
    num_beams: above 1, keeps so many continuations at a time, and returns the
      likeliest (beam search); nothing is drawn.
    length_penalty: a finished beam's log-likelihood is divided by its length in
      tokens, EOS included, to this power.
    seed: of what is drawn. The same seed, prompt, place of the prompt in the
      list, and shapes give the same continuation, whatever else is in the
      batch.
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float = 1.0
  num_samples: int = 1
  num_beams: int = 1
  length_penalty: float = 1.0
  seed: int = 0

  def __post_init__(self):
    def check(name, is_fine, allowed):
      if not is_fine:
        raise ValueError(
          f'DecodingConfig.{name} = {getattr(self, name)!r}: it must be'
          f' {allowed}.'
        )

    for name in ('num_samples', 'num_beams', 'top_k', 'seed'):
      value = getattr(self, name)
      is_whole = isinstance(value, numbers.Integral)
      is_whole |= name == 'top_k' and value is None
      check(name, is_whole, 'a whole number')
    # What float32 takes for 0 must not divide.
    check(
      'temperature',
      self.temperature == 0 or self.temperature >= 1e-30,
      'at least 1e-30, or 0 for the likeliest',
    )
    check('top_k', self.top_k is None or self.top_k >= 1, 'at least 1, or None')
    check('top_p', 0 < self.top_p <= 1, 'above 0, and at most 1')
    check('num_samples', self.num_samples >= 1, 'at least 1')
    check('num_beams', self.num_beams >= 1, 'at least 1')
    check('length_penalty', math.isfinite(self.length_penalty), 'finite')
    if self.num_beams > 1:
      drawn = self.temperature or self.top_k is not None or self.top_p < 1
      if drawn or self.num_samples > self.num_beams:
        raise ValueError(
          f'{self}: beam search draws nothing, and returns at most num_beams'
          ' continuations. Leave out temperature, top_k and top_p, and raise'
          ' num_beams to num_samples; or set num_beams = 1.'
        )
    elif not self.temperature and (
      self.num_samples > 1 or self.top_k is not None or self.top_p < 1
    ):
      raise ValueError(
        f'{self}: with temperature = 0 all samples are the likeliest'
        ' continuation. Set a temperature, such as 0.8.'
      )


def choose(
  logits_BV: Array, seeds_B: Array, step: Array, config: DecodingConfig
) -> Array:
  """Returns the next token of each row, int32 [B].

  Args:
    logits_BV: any float dtype.
    seeds_B: uint32, one for each row; see `DecodingConfig.seed`.
    step: int32 scalar, how many tokens were chosen before.
    config: temperature, top_k and top_p.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  if not config.temperature:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = _likeliest(logits_BV / config.temperature, config)

  def draw(seed, logits_V):
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    return jax.random.categorical(jax.random.fold_in(key, step), logits_V)

  return jax.vmap(draw)(seeds_B, logits_BV).astype(jnp.int32)


def _likeliest(logits_BV: Array, config: DecodingConfig) -> Array:
  """Masks what `top_k` and `top_p` leave out; ties with the last kept stay."""
  if config.top_k is not None and config.top_k < logits_BV.shape[-1]:
    least_B1 = jax.lax.top_k(logits_BV, config.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if config.top_p < 1:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    chances_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(chances_BV, axis=-1) - chances_BV
    kept_B1 = jnp.sum(before_BV < config.top_p, axis=-1, keepdims=True)
    kept_B1 = jnp.maximum(kept_B1, 1)  # a tiny top_p is 0 in float32
    least_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return logits_BV
