"""Which augmenting positions each connection reads, for a text one can read.

The models are interleaved here once more, by their public parts, as
`composition.ComposedLM` keeps nothing of what it computes on the way.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import io
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from calm_jax import alignment, batches, sources
from calm_jax.array_types import Array, Batch, Params
from calm_jax.composition import ComposedLM
from calm_jax.cross_attention import CrossAttention
from calm_jax.model import Model
from calm_jax.models import attention, layers
from calm_jax.vocabularies import Vocabulary

_WIDEST = 5.0  # inches of labels that are not turned


@dataclasses.dataclass(frozen=True)
class ConnectionMap:
  """What one connection reads.

  Attributes:
    weights_NTS: float32, of each head; the rows of positions that may read
      nothing are zeros, the others sum to 1.
    mask_TS: bool, what may be read.
    gates_TN: float32 in (0, 1), by which each head's result is multiplied; None
      for a composition without gates.
    tokens: texts of the augmenting positions.
    title: where the connection begins and ends.
  """

  weights_NTS: np.ndarray
  mask_TS: np.ndarray
  gates_TN: np.ndarray | None
  tokens: tuple[str, ...]
  title: str


@dataclasses.dataclass(frozen=True, repr=False)
class AttentionMap:
  """What each connection reads of one text. A notebook shows it as a picture.

  Attributes:
    tokens: texts of the anchor's positions.
    connections: by the name of their parameters.
    logits_TV: float32, what the composed model answers at each position.
    prompt_length: how many of the positions are the prompt's.
  """

  tokens: tuple[str, ...]
  connections: Mapping[str, ConnectionMap]
  logits_TV: np.ndarray
  prompt_length: int

  def plot(self, keys: Sequence[str] | None = None) -> Any:
    """Returns a matplotlib Figure, a panel for each connection.

    Args:
      keys: the connections to show; all if None.
    """
    from matplotlib import figure as figure_lib

    chosen = list(self.connections if keys is None else keys)
    # Inches: for labels, 0.09 a letter, and for what is beside the panel.
    width = 2.4 + max(_width(self.connections[key].tokens) for key in chosen)
    width = min(14.0, max(4.8, width))
    height = min(14.0, max(2.2, 1.2 + 0.22 * len(self.tokens)))
    figure = figure_lib.Figure(
      figsize=(width, height * len(chosen)), layout='constrained'
    )
    panels = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    for axes, key in zip(panels, chosen, strict=True):
      _draw(axes, self.connections[key], self.tokens, self.prompt_length)
    return figure

  def __repr__(self) -> str:
    return f'AttentionMap({len(self.tokens)} tokens, {list(self.connections)})'

  def _repr_png_(self) -> bytes:
    file = io.BytesIO()
    self.plot().savefig(file, format='png', dpi=110)
    return file.getvalue()


def attention_map(
  model: Model, prompt: str, continuation: str | Sequence[int] = ()
) -> AttentionMap:
  """Computes what each connection of a composed model reads of a text.

  Args:
    model: composed.
    prompt: as in `Model.generate`.
    continuation: what follows: a text, encoded apart from the prompt as in
      training; or ids, such as those that `Model.decode` returns.

  Raises:
    ValueError: if the model has no connections, or the text no token.
  """
  composed = model.composed
  if not composed.connections:
    raise ValueError(
      'This model has no connections, so there is nothing to map. Give what'
      ' calm_jax.compose or calm_jax.load_composition returns.'
    )
  batch, prompt_length = _lay_out(model, prompt, continuation)
  if not batch['decoder_input_tokens'].size:
    raise ValueError('prompt and continuation are empty: give a text.')
  logits_BTV, found = jax.device_get(
    jax.jit(functools.partial(_interleave, composed))(model.params, batch)
  )
  maps = {}
  for c in composed.connections:
    weights_BTNS, gates_BTN, mask_BTS = found[c.key]
    name = c.augmenting
    reader = model.readers.get(name)
    side = sources.side_of(batch, name, composed)
    vocabulary = reader.vocabulary if reader else model.vocabulary
    into = 'the embeddings' if c.anchor_layer < 0 else f'block {c.anchor_layer}'
    maps[c.key] = ConnectionMap(
      weights_NTS=np.moveaxis(weights_BTNS[0], 1, 0),
      mask_TS=mask_BTS[0],
      gates_TN=None if gates_BTN is None else gates_BTN[0],
      tokens=_texts(vocabulary, batch[f'{side}_input_tokens'][0]),
      title=f'{name}, block {c.augmenting_layer} → anchor, {into}',
    )
  tokens = _texts(model.vocabulary, batch['decoder_input_tokens'][0])
  return AttentionMap(tokens, maps, logits_BTV[0], prompt_length)


def _lay_out(
  model: Model, prompt: str, continuation: str | Sequence[int]
) -> tuple[Batch, int]:
  """Lays out one text as in training, except that all of it is read.

  Returns:
    The batch of one row, and the length of the prompt.
  """
  ids, ends = alignment.begin(model.vocabulary, prompt)
  if isinstance(continuation, str):
    continuation = model.vocabulary.encode(continuation)
  tokens_BT = np.array([[*ids, *continuation]], np.int32)
  batch = {
    'decoder_input_tokens': tokens_BT,
    'decoder_positions': np.arange(tokens_BT.size, dtype=np.int32)[None],
    'decoder_segment_ids': np.ones_like(tokens_BT),
  }
  for name, reader in model.readers.items():
    first = reader.read_prompt(prompt, anchor_ends=ends)
    then = reader.read_targets(continuation, start=len(ids))
    reading = first[0] + then[0], first[1] + then[1]
    batch |= batches.augmenting_arrays(name, [reading])
  return batch, len(ids)


def _interleave(
  model: ComposedLM, params: Params, batch: Batch
) -> tuple[jax.Array, dict[str, tuple]]:
  """Returns the logits, and (weights, gates, mask) of each connection."""
  anchor = functools.partial(model.anchor.apply, {'params': params['anchor']})
  cross = model.cross_attention()
  where = attention.Positions.full(
    batch['decoder_positions'], batch['decoder_segment_ids']
  )
  read, states = {}, {}
  for name, augmenting in model.augmenting.items():
    read[name] = sources.from_batch(batch, name, model)
    states[name], _ = augmenting.apply(
      {'params': params['augmenting'][name]},
      read[name].view.tokens,
      read[name].view.where,
      layers=model.tapped_layers(name),
      method='hidden_states',
    )
  x_BTD = anchor(batch['decoder_input_tokens'], method='embed')
  done, found = 0, {}
  for layer in model.composed_layers:
    x_BTD, _ = anchor(x_BTD, where, start=done, stop=layer + 1, method='run')
    done, update_BTD = layer + 1, jnp.zeros_like(x_BTD)
    for c in model.connections:
      if c.anchor_layer != layer:
        continue
      source = read[c.augmenting]
      apply = functools.partial(
        cross.apply, {'params': params['composition'][c.key]}
      )
      memory = apply(
        states[c.augmenting][c.augmenting_layer],
        source.text_positions_BS,
        method='read',
      )
      reading = functools.partial(
        apply,
        x_BTD,
        memory,
        positions_BT=where.positions_BT,
        mask_BTS=source.mask_BTS,
      )
      found[c.key] = *reading(method=_weights), source.mask_BTS
      update_BTD += reading(method='attend')
    x_BTD = layers.round_to(x_BTD + update_BTD, x_BTD.dtype)
  stop = model.anchor.depth
  x_BTD, _ = anchor(x_BTD, where, start=done, stop=stop, method='run')
  return anchor(x_BTD, method='logits'), found


def _weights(
  cross: CrossAttention,
  query_BTD: Array,
  source: attention.KVCache,
  *,
  positions_BT: Array,
  mask_BTS: Array,
) -> tuple[Array, Array | None]:
  """Returns what `CrossAttention.attend` weighs the source with.

  Returns:
    Weights [B, T, N, S], float32: where there is nothing to read, zeros; and
    gates [B, T, N], or None if there are none.
  """
  query_BTD = cross.norm_query(query_BTD)
  B, S, N = source.key.shape[:3]
  # Whoever reads the identity matrix gets the weights.
  identity_BSNS = jnp.broadcast_to(jnp.eye(S)[None, :, None], (B, S, N, S))
  weights_BTNS = cross.read_by(
    query_BTD,
    source.replace(value=identity_BSNS),
    positions_BT=positions_BT,
    mask_BTS=mask_BTS,
  )
  if cross.config.gate == 'none':
    return weights_BTNS, None
  return weights_BTNS, nn.sigmoid(cross.gate(query_BTD))


def _texts(vocabulary: Vocabulary, ids: np.ndarray) -> tuple[str, ...]:
  """Returns what each token stands for; special tokens by name."""
  names = {
    vocabulary.pad_id: '<pad>',
    vocabulary.unk_id: '<unk>',
    vocabulary.bos_id: '<bos>',
    **dict.fromkeys(vocabulary.eos_ids, '<eos>'),
  }
  texts = []
  for index in ids.tolist():
    piece = vocabulary.token_bytes(index)
    if piece is None:
      texts.append(names.get(index, f'<{index}>'))
    else:
      texts.append(piece.decode('utf-8', errors='replace'))
  return tuple(texts)


def _draw(
  axes: Any, one: ConnectionMap, rows: Sequence[str], prompt_length: int
) -> None:
  """Draws one connection, its heads averaged."""
  shown_TS = np.where(one.mask_TS, one.weights_NTS.mean(0), np.nan)
  axes.set_facecolor('#e8e8e8')  # what may not be read
  image = axes.imshow(shown_TS, vmin=0, vmax=1, cmap='Blues', aspect='auto')
  axes.set_title(one.title, fontsize=11, loc='left')
  plain = {'fontsize': 9, 'parse_math': False}
  axes.set_xticks(range(len(one.tokens)), map(_shown, one.tokens), **plain)
  if _width(one.tokens) > _WIDEST:
    for label in axes.get_xticklabels():  # an upright '=' is another sign
      label.set_rotation(90 if len(label.get_text()) > 2 else 0)
  axes.set_yticks(range(len(rows)), map(_shown, rows), **plain)
  axes.set_xlabel('read from (augmenting)')
  axes.set_ylabel('read by (anchor)')
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  if prompt_length < len(rows):  # a line between prompt and continuation
    axes.axhline(prompt_length - 0.5, color='#d55e00', linewidth=1)
  axes.figure.colorbar(image, ax=axes, label='weight', pad=0.03)
  if one.gates_TN is None:
    return
  gates = axes.secondary_yaxis('right')
  values = [f'{gate:.2f}' for gate in one.gates_TN.mean(-1)]
  gates.set_yticks(range(len(rows)), values, fontsize=8)
  gates.set_ylabel('gate')
  gates.tick_params(length=0)
  gates.spines[:].set_visible(False)


def _width(tokens: Sequence[str]) -> float:
  """Returns the inches of labels side by side, or upright if that is much."""
  longest = max(len(_shown(token)) for token in tokens)
  beside = len(tokens) * (0.15 + 0.09 * longest)
  return beside if beside <= _WIDEST else max(_WIDEST + 0.1, 0.2 * len(tokens))


def _shown(token: str) -> str:
  """Returns a label: white space is seen, and long tokens are cut."""
  token = token.strip(' ').replace('\n', '↵').replace('\t', '⇥') or '·'
  return token if len(token) <= 14 else f'{token[:13]}…'
