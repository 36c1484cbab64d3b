"""A model with its weights and vocabulary: what one can do with it."""

from collections.abc import Mapping, Sequence
import copy
import pathlib
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from calm_jax import (
  alignment,
  batches,
  decoding,
  generation,
  metrics,
  paths,
  run_files,
  scoring,
  vocabularies,
)
from calm_jax.array_types import Array, Params
from calm_jax.models.config import TransformerConfig
from calm_jax.models.pretrained import ModelSpec
from calm_jax.sampling import DecodingConfig
from calm_jax.vocabularies import Vocabulary


class Model:
  """A model with its weights and vocabulary: one decoder, or composed.

  Attributes:
    composed: the `ComposedLM` that computes (of an anchor alone, if single).
    params: nested parameters of `composed`, on the mesh.
    spec: description of the anchor.
    fingerprints: SHA-256 of each frozen model by name.
    mesh: where the parameters are.
    readers: how each augmenting model with a vocabulary of its own reads.
    report: what was read, cast and left out on loading, in a line.
  """

  def __init__(
    self,
    composed: Any,
    params: Params,
    *,
    spec: ModelSpec,
    mesh: Mesh,
    fingerprints: Mapping[str, str] | None = None,
    readers: Mapping[str, alignment.Reader] | None = None,
  ):
    self.composed = composed = _on_mesh(composed, mesh)
    self.params = params
    self.spec = spec
    self.fingerprints = dict(fingerprints or {})
    self.mesh = mesh
    self.readers = {
      name: reader
      for name, reader in (readers or {}).items()
      if name in composed.augmenting  # a baseline has left the model out
    }
    self.report = ''
    self._forward = jax.jit(composed.__call__)
    language = {'vocabulary': spec.vocabulary, 'readers': self.readers}
    self._generator = generation.Generator(composed, **language)
    self._scorer = scoring.Scorer(composed, **language)

  @property
  def config(self) -> TransformerConfig:
    """The configuration of the model, or of the anchor if composed."""
    return self.spec.config

  @property
  def vocabulary(self) -> Vocabulary:
    """The vocabulary; a composed model shares its anchor's."""
    return self.spec.vocabulary

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the (anchor's) checkpoint and vocabulary."""
    return self.fingerprints['anchor']

  def logits(self, tokens_BT: Any) -> Array:
    """Returns the logits [B, T, V] of whole sequences without padding.

    Args:
      tokens_BT: ids of the anchor. An augmenting model with a vocabulary of its
        own reads them through the table that it reads generated tokens by.
    """
    self._check_speaks()
    tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
    if tokens_BT.ndim != 2:
      raise ValueError(
        f'tokens has the shape {tokens_BT.shape}; expected [batch, length].'
      )
    self._check_ids(tokens_BT, what='tokens')
    positions_BT = jnp.broadcast_to(
      jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
    )
    batch = {
      'decoder_input_tokens': tokens_BT,
      'decoder_positions': positions_BT,
      'decoder_segment_ids': jnp.ones_like(tokens_BT),
    }
    for name, reader in self.readers.items():
      rows = [reader.read_tokens(row) for row in np.asarray(tokens_BT).tolist()]
      self._check_readings(name, rows)
      batch |= batches.augmenting_arrays(name, rows)
    self._warn_of_cuts(np.asarray(tokens_BT).tolist())
    return self._forward(self.params, batch)

  def generate(
    self,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    **how: Any,
  ) -> list[Any]:
    """Continues texts, greedily unless told otherwise.

    Args:
      prompts: texts of any lengths.
      max_new_tokens: at most so many tokens each.
      stop: a continuation ends before the first of these texts.
      batch_size: prompts decoded at once; at most 64 if None.
      **how: fields of `DecodingConfig`, such as temperature=0.8 or num_beams=4.

    Returns:
      The continuations, without the prompts, in order: a text for each prompt;
      with `num_samples` above 1, a list of texts.
    """
    config = DecodingConfig(**how)
    found = self.decode(
      prompts,
      max_new_tokens=max_new_tokens,
      stop=stop,
      batch_size=batch_size,
      config=config,
    )
    texts = [[one.text for one in each] for each in found]
    return texts if config.num_samples > 1 else [each[0] for each in texts]

  def decode(
    self,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    config: DecodingConfig = DecodingConfig(),
    seeds: Sequence[int] | None = None,
  ) -> list[list[generation.Continuation]]:
    """Continues texts as `generate`, and returns tokens and endings too.

    Args:
      prompts: as in `generate`, and so the other arguments that it has.
      max_new_tokens: as there.
      stop: as there.
      batch_size: as there.
      config: how tokens are chosen.
      seeds: with `config.seed`, of what is drawn for each prompt; its number in
        the list if None.

    Returns:
      For each prompt `config.num_samples` continuations.
    """
    self._check_speaks()
    _check_texts('prompts', prompts)
    if not prompts:
      return []
    ids, readings = self._read(prompts)
    for prompt, row in zip(prompts, ids, strict=True):
      self._check_ids(row, what=f'The prompt {prompt[:60]!r}')
    for name, rows in readings.items():
      self._check_readings(name, rows)
    found = self._generator(
      self.params,
      ids,
      readings=readings,
      max_new_tokens=max_new_tokens,
      stop=stop,
      config=config,
      batch_size=batch_size,
      seeds=seeds,
    )
    self._warn_of_cuts([one.tokens for each in found for one in each])
    return found

  def score(
    self,
    prompts: Sequence[str | Sequence[int]],
    targets: Sequence[str | Sequence[int]],
    *,
    batch_size: int | None = None,
  ) -> list[scoring.Score]:
    """Returns how likely the model finds each target after its prompt.

    Args:
      prompts: texts, an empty one is BOS alone; or ids, which a model with a
        vocabulary of its own reads as it reads generated tokens.
      targets: texts, encoded apart from the prompts as in training, and without
        EOS; or ids.
      batch_size: rows at once; at most 64 if None.
    """
    self._check_speaks()
    _check_texts('prompts', prompts, or_ids=True)
    _check_texts('targets', targets, or_ids=True)
    if len(prompts) != len(targets):
      raise ValueError(
        f'There are {len(prompts)} prompts and {len(targets)} targets; give one'
        ' target for each prompt.'
      )
    texts = [one if isinstance(one, str) else None for one in prompts]
    encoded = self.vocabulary.encode_batch([text or '' for text in texts])
    examples = []
    for prompt, text, ids, target in zip(
      prompts, texts, encoded, targets, strict=True
    ):
      if isinstance(target, str):
        target = self.vocabulary.encode(target)
      ids = vocabularies.with_bos(
        self.vocabulary, prompt if text is None else ids
      )
      self._check_ids([*ids, *target], what=f'The prompt {prompt[:60]!r}')
      examples.append({'inputs': ids, 'targets': list(target), 'text': text})
    scores = self._scorer(self.params, examples, batch_size=batch_size)
    self._warn_of_cuts([example['targets'][:-1] for example in examples])
    return scores

  def _read(
    self, prompts: Sequence[str]
  ) -> tuple[list[list[int]], dict[str, list[alignment.Reading]]]:
    """Returns the prompts' ids, and what models of another vocabulary read."""
    if not self.readers:
      rows = self.vocabulary.encode_batch(list(prompts))
      return [vocabularies.with_bos(self.vocabulary, row) for row in rows], {}
    begun = [alignment.begin(self.vocabulary, text) for text in prompts]
    return [ids for ids, _ in begun], {
      name: [
        reader.read_prompt(text, anchor_ends=ends)
        for text, (_, ends) in zip(prompts, begun, strict=True)
      ]
      for name, reader in self.readers.items()
    }

  def _check_ids(self, ids: Any, *, what: str) -> None:
    """Raises ValueError for an id beyond a table, where JAX gives NaN."""
    _check_range(ids, decoding.readable_size(self.composed), what=what)

  def _check_readings(
    self, name: str, readings: Sequence[alignment.Reading]
  ) -> None:
    size = self.composed.augmenting[name].config.vocab_size
    for ids, _ in readings:
      _check_range(ids, size, what=f'What {name!r} reads')

  def _warn_of_cuts(self, rows: Sequence[Sequence[int]]) -> None:
    for name, reader in self.readers.items():
      cut = sum(reader.count_too_long(row) for row in rows)
      if cut:
        warnings.warn(
          f'{cut} tokens stand for more tokens of {name!r} than'
          ' tokens_per_anchor_token allows; it saw the first of each.'
        )

  def _check_speaks(self) -> None:
    if self.config.attention != 'causal':
      raise ValueError(
        'This model is an encoder: it can be composed with an anchor as'
        ' augmenting model, and has no logits of its own.'
      )

  def describe(self) -> str:
    """Returns the connections, and how much is trained of how much."""
    trainable = 'composition' if self.composed.connections else 'anchor'
    if self.composed.lora is not None:
      trainable = 'lora'
    return metrics.describe(self.composed, self.params, trainable=trainable)

  def disconnected(self) -> 'Model':
    """Returns the model with each connection's W_O at zero, as a control."""
    if not self.composed.connections:
      raise ValueError('This model has no composition to disconnect.')
    theta = {
      key: {**one, 'out': jax.tree.map(jnp.zeros_like, one['out'])}
      for key, one in self.params['composition'].items()
    }
    return Model(
      self.composed,
      {**self.params, 'composition': theta},
      spec=self.spec,
      fingerprints=self.fingerprints,
      mesh=self.mesh,
      readers=self.readers,
    )

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes the composition with its config and card, nothing frozen."""
    if not self.composed.connections:
      raise ValueError(
        'This model has no composition; there is nothing to save.'
      )
    directory = paths.of(directory)
    run_files.write_config(directory, self.composed, self.fingerprints)
    run_files.write_trained(directory, self.params['composition'])
    run_files.write_card(directory, self.composed, self.fingerprints)


def _on_mesh(composed: Any, mesh: Mesh) -> Any:
  """Returns the model without the kernel that only training can split."""
  towers = {'anchor': composed.anchor, **composed.augmenting}
  if all(one.kernel != 'splash' for one in towers.values()) or mesh.size == 1:
    return composed
  towers = {name: one.clone(kernel='xla') for name, one in towers.items()}
  composed = copy.copy(composed)
  composed.anchor, composed.augmenting = towers.pop('anchor'), towers
  return composed


def _check_texts(name: str, texts: Any, *, or_ids: bool = False) -> None:
  """Raises ValueError for what is no list of texts (or of ids)."""
  if isinstance(texts, str):
    raise ValueError(f'{name} is one text; give a list of texts.')
  for number, one in enumerate(texts):
    if isinstance(one, str):
      try:
        one.encode()
      except UnicodeEncodeError as error:
        raise ValueError(
          f'{name}[{number}] holds half of a surrogate pair, which is no text.'
        ) from error
    elif not or_ids or not isinstance(one, Sequence | np.ndarray):
      raise ValueError(f'{name}[{number}] is {one!r}; expected a text.')


def _check_range(ids: Any, size: int, *, what: str) -> None:
  lowest, highest = np.min(ids, initial=0), np.max(ids, initial=0)
  if lowest < 0 or highest >= size:
    raise ValueError(
      f'{what} has ids from {lowest} to {highest}; the embedding table has the'
      f' rows 0 to {size - 1}. Leave out special tokens that the model has no'
      ' embedding for.'
    )
