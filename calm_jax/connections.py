"""Where the connections are, and what each of them is, as plain data."""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Literal

from calm_jax.models.config import TransformerConfig

EMBEDDING = -1  # the anchor's residual stream before block 0


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Connection:
  """One arrow from an augmenting model into the anchor.

  Attributes:
    anchor_layer: 0-based block of the anchor after which the result is added;
      -1 is the residual stream before block 0.
    augmenting: name of the augmenting model.
    augmenting_layer: 0-based block after which that model is read.
  """

  anchor_layer: int
  augmenting_layer: int
  augmenting: str = 'augmenting'

  @property
  def key(self) -> str:
    """Name of the connection's parameters."""
    into = 'embed' if self.anchor_layer == EMBEDDING else self.anchor_layer
    return f'{self.augmenting}_{self.augmenting_layer}_into_{into}'


@dataclasses.dataclass(frozen=True)
class LayerMapping:
  """A rule that places connections once the depths are known.

  Made by one of `every`, `evenly_spaced`, `early`, `middle`, `late` and
  `explicit`; all but the last apply to each augmenting model alike.
  """

  kind: Literal['every', 'evenly_spaced', 'early', 'middle', 'late', 'explicit']
  number: int = 0
  connections: tuple[Connection, ...] = ()

  @classmethod
  def every(cls, augmenting_stride: int = 4) -> 'LayerMapping':
    """The paper's: every stride-th augmenting layer, spread over the anchor."""
    return cls('every', number=augmenting_stride)

  @classmethod
  def evenly_spaced(cls, n: int) -> 'LayerMapping':
    """n connections, spread over both models, ending at both last blocks."""
    return cls('evenly_spaced', number=n)

  @classmethod
  def early(cls, n: int) -> 'LayerMapping':
    """The n first blocks of both models."""
    return cls('early', number=n)

  @classmethod
  def late(cls, n: int) -> 'LayerMapping':
    """The n last blocks of both models."""
    return cls('late', number=n)

  @classmethod
  def middle(cls, n: int) -> 'LayerMapping':
    """The n middle blocks of both models (best in arXiv 2411.09249)."""
    return cls('middle', number=n)

  @classmethod
  def explicit(cls, connections: Iterable[Connection]) -> 'LayerMapping':
    """Exactly these connections."""
    return cls('explicit', connections=tuple(connections))

  def resolve(
    self, *, anchor_depth: int, augmenting_depths: Mapping[str, int]
  ) -> tuple[Connection, ...]:
    """Returns the connections, sorted and checked.

    Args:
      anchor_depth: N_B.
      augmenting_depths: N_A by name of the augmenting model.

    Raises:
      ValueError: for a layer out of range, more connections than layers, a
        duplicate, or an unknown name.
    """
    if self.kind == 'explicit':
      connections = list(self.connections)
    else:
      connections = [
        Connection(anchor_layer=j, augmenting_layer=i, augmenting=name)
        for name, depth in augmenting_depths.items()
        for i, j in self._pairs(name, depth, anchor_depth)
      ]
    if not connections:
      raise ValueError(
        'The layer mapping is empty: name one Connection or more.'
      )
    for c in connections:
      _check(c, anchor_depth, augmenting_depths)
    unread = augmenting_depths.keys() - {c.augmenting for c in connections}
    if unread:
      raise ValueError(
        f'No connection reads {sorted(unread)}: add one, or leave the model'
        ' out.'
      )
    duplicates = {c for c in connections if connections.count(c) > 1}
    if duplicates:
      raise ValueError(
        f'{min(duplicates)} is listed twice: leave one. (Several connections'
        ' into one anchor layer are fine if they read different layers.)'
      )
    return tuple(sorted(connections))

  def _pairs(
    self, name: str, augmenting_depth: int, anchor_depth: int
  ) -> list[tuple[int, int]]:
    """Lists (augmenting layer, anchor layer) for one augmenting model."""
    if self.number < 1:
      raise ValueError(
        f'LayerMapping.{self.kind}({self.number}): the number must be at'
        ' least 1.'
      )
    n, shallower = self.number, min(augmenting_depth, anchor_depth)
    if self.kind == 'every':
      n = max(1, augmenting_depth // self.number)
      shallower = anchor_depth
    if n > shallower:
      raise ValueError(
        f'LayerMapping.{self.kind}({self.number}) asks for {n} connections'
        f' from {name!r}, and the depths ({name!r} {augmenting_depth}, anchor'
        f' {anchor_depth}) allow 1 to {shallower}.'
      )
    free = augmenting_depth - n, anchor_depth - n
    first = {
      'early': (0, 0),
      'middle': (free[0] // 2, free[1] // 2),
      'late': free,
    }.get(self.kind)
    if first is not None:
      return [(first[0] + k, first[1] + k) for k in range(n)]
    if self.kind == 'every':
      stride = min(self.number, augmenting_depth)
      read = [(k + 1) * stride - 1 for k in range(n)]
    else:
      read = [(k + 1) * augmenting_depth // n - 1 for k in range(n)]
    return [(i, (k + 1) * anchor_depth // n - 1) for k, i in enumerate(read)]


def _check(
  c: Connection, anchor_depth: int, augmenting_depths: Mapping[str, int]
) -> None:
  if c.augmenting not in augmenting_depths:
    raise ValueError(
      f'{c} names the augmenting model {c.augmenting!r}; there are'
      f' {sorted(augmenting_depths)}.'
    )
  depth = augmenting_depths[c.augmenting]
  if not 0 <= c.augmenting_layer < depth:
    raise ValueError(
      f'{c}: augmenting_layer = {c.augmenting_layer} is out of range;'
      f' {c.augmenting!r} has the layers 0 to {depth - 1}.'
    )
  if not EMBEDDING <= c.anchor_layer < anchor_depth:
    raise ValueError(
      f'{c}: anchor_layer = {c.anchor_layer} is out of range; the anchor has'
      f' the layers 0 to {anchor_depth - 1}, and -1 is before block 0.'
    )


@dataclasses.dataclass(frozen=True)
class CompositionConfig:
  """What is trained, as plain data.

  The defaults make the composed model equal to its anchor at step 0. The
  paper's reading is norm='none', output_init='fan_in'.

  Attributes:
    mapping: where the connections are.
    num_heads: N_H of the cross-attention; the anchor's if None.
    norm: RMSNorm on the query and on the projected source, or 'none'.
    output_init: initialiser of W_O.
    gate: 'sigmoid' multiplies each head's result by a number in (0, 1) that the
      query decides, so that a connection can be silent at some tokens.
    gate_bias: what the gates' bias starts at; at -3 they are nearly shut, and
      open only where the gradient asks for it.
    position_encoding: 'rotary' turns cross queries and keys by their text
      positions; 'none' leaves them.
    augmenting_context: 'all' gives every generated token, and so every target,
      to all models, as the paper does; 'prompt' gives augmenting models the
      prompt alone (the paper's ablation "m_A as an encoder", section 5).
    tokens_per_anchor_token: where an augmenting model has a vocabulary of its
      own, how many of its tokens one token of the anchor may stand for.
    param_dtype: dtype of storage; the computation has the anchor's dtype.
  """

  mapping: LayerMapping
  num_heads: int | None = None
  norm: Literal['rms', 'none'] = 'rms'
  output_init: Literal['zeros', 'fan_in'] = 'zeros'
  gate: Literal['none', 'sigmoid'] = 'none'
  gate_bias: float = 0.0
  position_encoding: Literal['rotary', 'none'] = 'rotary'
  augmenting_context: Literal['all', 'prompt'] = 'all'
  tokens_per_anchor_token: int = 8
  param_dtype: str = 'float32'

  def __post_init__(self):
    for field, allowed in (
      ('norm', ('rms', 'none')),
      ('output_init', ('zeros', 'fan_in')),
      ('gate', ('none', 'sigmoid')),
      ('position_encoding', ('rotary', 'none')),
      ('augmenting_context', ('all', 'prompt')),
    ):
      if getattr(self, field) not in allowed:
        raise ValueError(
          f'{field} = {getattr(self, field)!r} is not one of {allowed}.'
        )
    if self.tokens_per_anchor_token < 1:
      raise ValueError(
        f'tokens_per_anchor_token = {self.tokens_per_anchor_token}: it must be'
        ' at least 1.'
      )
    if self.gate == 'none' and self.gate_bias:
      raise ValueError(
        f"gate_bias = {self.gate_bias} has no effect with gate = 'none'; set"
        " gate = 'sigmoid'."
      )

  def split_heads(self, anchor: TransformerConfig) -> int:
    """Returns the number of heads; raises ValueError if they do not divide."""
    heads = anchor.num_heads if self.num_heads is None else self.num_heads
    if heads < 1:
      raise ValueError(f'num_heads = {heads}: it must be at least 1.')
    head_dim, rest = divmod(anchor.embed_dim, heads)
    if rest or (self.position_encoding == 'rotary' and head_dim % 2):
      raise ValueError(
        f'The cross-attention cannot split the anchor width {anchor.embed_dim}'
        f' into num_heads = {heads}: the head size must be whole, and even for'
        ' rotary positions.'
      )
    return heads
