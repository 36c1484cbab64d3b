"""`DecoderLM`: a decoder-only transformer that can be run block by block."""

from collections.abc import Mapping
import itertools
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from calm_jax import sharding
from calm_jax.array_types import Array
from calm_jax.models import attention, kernels, layers
from calm_jax.models.config import TransformerConfig

Cache = Mapping[str, attention.KVCache]


class Block(nn.Module):
  """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

  config: TransformerConfig
  kernel: kernels.Kernel = 'xla'

  @nn.compact
  def __call__(
    self,
    x_BTD: Array,
    cache: attention.KVCache | None,
    layer: Mapping[str, Array],
    where: attention.Positions,
  ) -> tuple[Array, attention.KVCache | None]:
    cfg = self.config

    def norm(name, x):
      return layers.RMSNorm(
        offset=cfg.norm_offset,
        epsilon=cfg.norm_epsilon,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        name=name,
      )(x)

    def after(name, x):
      return norm(name, x) if cfg.norm_placement == 'sandwich' else x

    out_BTD, cache = attention.SelfAttention(
      cfg, self.kernel, name='attention'
    )(norm('attention_norm', x_BTD), where, cache=cache, **layer)
    x_BTD = x_BTD + after('attention_post_norm', out_BTD)
    mlp = layers.MLP(
      cfg.mlp_dim,
      cfg.activation,
      kind=cfg.mlp,
      bias=cfg.mlp_bias,
      dtype=cfg.dtype,
      param_dtype=cfg.param_dtype,
      name='mlp',
    )
    out_BTD = mlp(norm('mlp_norm', x_BTD))
    x_BTD = x_BTD + after('mlp_post_norm', out_BTD)
    x_BTD = sharding.constrain(x_BTD, 'batch', 'length', 'activation_embed')
    return layers.round_to(x_BTD, cfg.dtype), cache


class Tower(nn.Module):
  """Embeddings and blocks: what decoders and encoders have in common.

  Attributes:
    config: sizes and switches.
    stack: 'loop' holds each block's parameters apart (`block_3`); 'scan'
      stacks those of a segment (`blocks_0_4`), which compiles once each.
    cuts: layers (0 < cut < L) at which a segment of a scanned stack ends; `run`
      may only start and stop at cuts.
    remat_from: blocks from this layer on keep nothing for the backward pass but
      their input, and run again there; None for no block.
    kernel: what computes the attention of whole sequences; see `kernels`.
  """

  config: TransformerConfig
  stack: Literal['loop', 'scan'] = 'loop'
  cuts: tuple[int, ...] = ()
  remat_from: int | None = None
  kernel: kernels.Kernel = 'xla'

  def setup(self):
    cfg = self.config
    self.embedder = layers.Embedder(
      cfg.vocab_size,
      cfg.embed_dim,
      scale=cfg.embed_scale,
      init_stddev=cfg.init_stddev,
      dtype=cfg.dtype,
      param_dtype=cfg.param_dtype,
    )
    self.final_norm = layers.RMSNorm(
      offset=cfg.norm_offset,
      epsilon=cfg.norm_epsilon,
      dtype=cfg.dtype,
      param_dtype=cfg.param_dtype,
    )
    if cfg.position_encoding == 'relative_bias':
      self.relative_bias = layers.RelativeBias(
        cfg.num_heads,
        cfg.relative_buckets,
        cfg.relative_max_distance,
        bidirectional=cfg.attention == 'bidirectional',
        param_dtype=cfg.param_dtype,
      )
    for name, start, stop in self.segments():
      setattr(self, name, self._segment(name, start, stop))

  def _segment(self, name: str, start: int, stop: int) -> nn.Module:
    is_loop, block = self.stack == 'loop', Block
    if self.remat_from is not None and start >= self.remat_from:
      block = nn.remat(Block, prevent_cse=is_loop)
    if is_loop:
      return block(self.config, self.kernel, name=name)
    scanned = nn.scan(
      block,
      variable_axes={'params': 0, 'lora': 0},
      split_rngs={'params': True},
      in_axes=(0, 0, nn.broadcast),
      out_axes=0,
      length=stop - start,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return scanned(self.config, self.kernel, name=name)

  @property
  def depth(self) -> int:
    """Number of blocks."""
    return self.config.num_layers

  @property
  def width(self) -> int:
    """Width of the hidden states."""
    return self.config.embed_dim

  @nn.nowrap
  def segments(self) -> list[tuple[str, int, int]]:
    """Lists (name, first layer, layer after the last) of each segment."""
    depth = self.config.num_layers
    if self.stack == 'loop':
      return [(f'block_{i}', i, i + 1) for i in range(depth)]
    edges = [0, *sorted(set(self.cuts)), depth]
    return [(f'blocks_{a}_{b}', a, b) for a, b in itertools.pairwise(edges)]

  def embed(self, tokens_BT: Array) -> Array:
    """Returns the residual stream [B, T, D] before block 0."""
    x_BTD = self.embedder.encode(tokens_BT)
    return sharding.constrain(x_BTD, 'batch', 'length', 'activation_embed')

  def run(
    self,
    x_BTD: Array,
    where: attention.Positions,
    *,
    start: int,
    stop: int,
    cache: Cache | None = None,
  ) -> tuple[Array, dict[str, attention.KVCache]]:
    """Runs the blocks start, ..., stop - 1.

    Args:
      x_BTD: the residual stream before block `start`.
      where: positions and masks of these tokens.
      start: first block.
      stop: block after the last one.
      cache: caches by segment name; None to attend within the sequence.

    Returns:
      The residual stream after block stop - 1, and the written caches of the
      segments that ran.
    """
    self.config.check_length(where.mask_BTS.shape[-1])
    if self.config.position_encoding == 'relative_bias':
      where = where.replace(bias_BNTS=self.relative_bias(where.distance_BTS))
    written = {}
    for name, first, last in self.segments():
      if last <= start or first >= stop:
        continue
      if first < start or last > stop:
        raise ValueError(
          f'run({start}, {stop}) cuts the scanned segment {name}; the cuts'
          f' of this model are {self.cuts}.'
        )
      layer = self.config.layer_inputs(first, last)
      old = None if cache is None else cache[name]
      if self.stack == 'loop':
        layer = {key: value[0] for key, value in layer.items()}
      x_BTD, new = getattr(self, name)(x_BTD, old, layer, where)
      if cache is not None:
        written[name] = new
    return x_BTD, written

  def hidden_states(
    self,
    tokens_BS: Array,
    where: attention.Positions,
    *,
    layers: tuple[int, ...],
    cache: Cache | None = None,
  ) -> tuple[dict[int, Array], dict[str, attention.KVCache]]:
    """Runs up to the last of `layers`, as an augmenting model does.

    Args:
      tokens_BS: int32 token ids.
      where: positions and masks of these tokens.
      layers: the tapped blocks; states are read after each.
      cache: caches by segment name, or None.

    Returns:
      The hidden states [B, S, E] by layer, and the written caches.
    """
    states, written, done = {}, {}, 0
    x_BSE = self.embed(tokens_BS)
    for layer in sorted(layers):
      x_BSE, new = self.run(
        x_BSE, where, start=done, stop=layer + 1, cache=cache
      )
      states[layer], done = x_BSE, layer + 1
      written |= new
    return states, written

  def init_everything(self, tokens_BT: Array) -> Array:
    """Touches every parameter; the method to initialise with."""
    positions_BT = jnp.broadcast_to(
      jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
    )
    where = self.whole(positions_BT, jnp.ones_like(tokens_BT))
    return self(tokens_BT, where)

  @nn.nowrap
  def init_params(self, rng: Array) -> Any:
    """Initialises the parameters, boxed with their logical axes."""
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    model = self.clone(kernel='xla')
    return model.init(rng, tokens_BT, method='init_everything')['params']


class DecoderLM(Tower):
  """A decoder-only language model.

  `__call__` is `embed`, `run` over all blocks, `logits`. A composed model
  calls the three itself and adds to the residual stream between runs.
  """

  reads_targets = True  # as augmenting model: every generated token too
  whole = staticmethod(attention.Positions.full)

  def setup(self):
    super().setup()
    cfg = self.config
    if not cfg.tie_embeddings:
      self.head = layers.Dense(
        cfg.vocab_size,
        axes=('embed', 'vocab'),
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
      )

  def __call__(self, tokens_BT: Array, where: attention.Positions) -> Array:
    """Returns the logits [B, T, V] of a sequence without a cache."""
    x_BTD, _ = self.run(
      self.embed(tokens_BT), where, start=0, stop=self.config.num_layers
    )
    return self.logits(x_BTD)

  def logits(self, x_BTD: Array) -> Array:
    """Returns the logits [B, T, V] of the stream after the last block."""
    x_BTD = self.final_norm(x_BTD)
    if self.config.logits_scale != 1.0:
      x_BTD = x_BTD * jnp.asarray(self.config.logits_scale, x_BTD.dtype)
    if self.config.tie_embeddings:
      logits_BTV = self.embedder.decode(x_BTD)
    else:
      logits_BTV = self.head(x_BTD)
    cap = self.config.final_softcap
    return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)

  @nn.nowrap
  def empty_cache(self, *, batch: int, slots: int, stop: int) -> Cache:
    """Returns caches for the blocks before `stop`."""
    cfg = self.config
    caches = {}
    for name, first, last in self.segments():
      if first >= stop:
        break
      one = attention.KVCache.empty(
        batch=batch,
        slots=slots,
        heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        dtype=cfg.dtype,
      )
      if self.stack == 'scan':
        one = jax.tree.map(
          lambda x, n=last - first: jnp.broadcast_to(x, (n, *x.shape)), one
        )
      caches[name] = one
    return caches
