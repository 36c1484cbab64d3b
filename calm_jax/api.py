"""The Python interface: load models, compose them, use them, save Theta_C."""

from collections.abc import Mapping, Sequence
import functools
import pathlib
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from calm_jax import (
  alignment,
  assembly,
  batches,
  decoding,
  metrics,
  run_files,
  sharding,
  trees,
  vocabularies,
)
from calm_jax.array_types import Array, Params
from calm_jax.composition import ComposedLM
from calm_jax.connections import CompositionConfig, LayerMapping
from calm_jax.models import pretrained
from calm_jax.models.config import TransformerConfig
from calm_jax.models.pretrained import ModelSpec
from calm_jax.quantization import QuantizationConfig
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
    fingerprints: Mapping[str, str],
    mesh: Mesh,
    readers: Mapping[str, alignment.Reader] | None = None,
  ):
    self.composed = composed
    self.params = params
    self.spec = spec
    self.fingerprints = dict(fingerprints)
    self.mesh = mesh
    self.readers = dict(readers or {})
    self.report = ''
    self._forward = jax.jit(composed.__call__)
    self._generate = functools.cache(self._make_generate)  # by length

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
      batch |= batches.augmenting_arrays(name, rows)
    return self._forward(self.params, batch)

  def generate(
    self,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
  ) -> list[str]:
    """Continues texts greedily, up to EOS or `max_new_tokens`.

    Args:
      prompts: texts of any lengths.
      max_new_tokens: at most so many tokens each.
      batch_size: rows decoded at once; all of them if None.

    Returns:
      The continuations, without the prompts, in order.
    """
    self._check_speaks()
    if isinstance(prompts, str):
      raise ValueError('prompts is one text; give a list of texts.')
    if not prompts:
      return []
    ids, readings = self._read(prompts)
    for prompt, row in zip(prompts, ids, strict=True):
      self._check_ids(row, what=f'The prompt {prompt[:60]!r}')
    new_ids = self._generate(max_new_tokens)(
      self.params,
      ids,
      readings=readings,
      batch_size=batch_size or len(ids),
      pad_id=self.vocabulary.pad_id,
    )
    for name, reader in self.readers.items():
      cut = sum(reader.count_too_long(row) for row in new_ids)
      if cut:
        warnings.warn(
          f'{cut} generated tokens stand for more tokens of {name!r} than'
          ' tokens_per_anchor_token allows; it saw the first of each.'
        )
    return [self.vocabulary.decode(row) for row in new_ids]

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
    """Raises ValueError for an id beyond the table, where JAX gives NaN."""
    highest = int(np.max(ids, initial=0))
    if highest >= self.config.vocab_size or np.min(ids, initial=0) < 0:
      raise ValueError(
        f'{what} has ids from {np.min(ids)} to {highest}; the embedding table'
        f' has the rows 0 to {self.config.vocab_size - 1}. Leave out special'
        ' tokens that this model has no embedding for.'
      )

  def _check_speaks(self) -> None:
    if self.config.attention != 'causal':
      raise ValueError(
        'This model is an encoder: it can be composed with an anchor as'
        ' augmenting model, and has no logits of its own.'
      )

  def _make_generate(self, max_new_tokens: int):
    return decoding.make_generate(
      self.composed,
      max_new_tokens=max_new_tokens,
      eos_ids=self.vocabulary.eos_ids,
      readers=self.readers,
    )

  def describe(self) -> str:
    """Returns the connections, and how much is trained of how much."""
    trainable = 'composition' if self.composed.connections else 'anchor'
    return metrics.describe(self.composed, self.params, trainable=trainable)

  def disconnected(self) -> 'Model':
    """Returns the model with each connection's W_O at zero, as a control."""
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
    directory = pathlib.Path(directory)
    run_files.write_config(directory, self.composed, self.fingerprints)
    run_files.write_composition(directory, self.params['composition'])
    run_files.write_card(directory, self.composed, self.fingerprints)


def load_pretrained(
  path: str | pathlib.Path,
  *,
  dtype: str | None = None,
  param_dtype: str | None = None,
  quantization: QuantizationConfig | None = None,
  mesh: Mesh | None = None,
  size: str | None = None,
  revision: str | None = None,
) -> Model:
  """Loads a model directory, our own or one of Hugging Face.

  Args:
    path: a directory, or a hub id like 'google/gemma-2b'; see
      `models.pretrained.pretrained_model`.
    dtype: dtype of the computation, instead of the directory's.
    param_dtype: dtype the weights are kept in; as stored if None.
    quantization: fewer bits for the matrices; see `QuantizationConfig`.
    mesh: where to put them; all devices along `data` if None.
    size: what it must be, by name ('gemma_2b').
    revision: of a hub id: a branch, a tag or a commit.
  """
  spec = pretrained.pretrained_model(
    path,
    dtype=dtype,
    param_dtype=param_dtype,
    quantization=quantization,
    size=size,
    revision=revision,
  )
  return from_spec(spec, mesh=mesh)


def from_spec(
  spec: ModelSpec, *, mesh: Mesh | None = None, seed: int = 0
) -> Model:
  """Loads or initialises one described model."""
  mesh = mesh or sharding.make_mesh()
  composed = ComposedLM(assembly.build_tower(spec.config))
  loaded = assembly.load(spec, composed.anchor, mesh=mesh, seed=seed)
  model = Model(
    composed,
    {'anchor': loaded.params},
    spec=spec,
    fingerprints={'anchor': loaded.fingerprint},
    mesh=mesh,
  )
  model.report = f'{loaded.origin}; {loaded.report}'
  return model


def compose(
  *,
  anchor: Model,
  augmenting: Mapping[str, Model],
  mapping: LayerMapping,
  seed: int = 0,
  **settings: Any,
) -> Model:
  """Composes loaded models with a fresh composition; equal to the anchor.

  Args:
    anchor: the model that is extended.
    augmenting: the models it reads, by name.
    mapping: where the connections are.
    seed: of the composition.
    **settings: other fields of `CompositionConfig`.
  """
  config = CompositionConfig(mapping=mapping, **settings)
  specs = {name: model.spec for name, model in augmenting.items()}
  composed = assembly.build_model(
    anchor.spec, augmenting=specs, composition=config
  )
  return Model(
    composed,
    {
      'anchor': anchor.params['anchor'],
      'augmenting': {k: m.params['anchor'] for k, m in augmenting.items()},
      'composition': assembly.init_composition(
        composed, mesh=anchor.mesh, seed=seed
      ),
    },
    spec=anchor.spec,
    fingerprints={
      'anchor': anchor.fingerprint,
      **{name: model.fingerprint for name, model in augmenting.items()},
    },
    mesh=anchor.mesh,
    readers=assembly.build_readers(anchor.spec, specs, config),
  )


def load_composition(
  directory: str | pathlib.Path,
  *,
  anchor: Model,
  augmenting: Mapping[str, Model],
) -> Model:
  """Attaches a saved composition to the models it was trained with.

  Raises:
    ValueError: if a fingerprint differs, or the tensors do not fit.
  """
  directory = pathlib.Path(directory).expanduser()
  config, expected = run_files.read_config(directory)
  actual = {'anchor': anchor.fingerprint}
  actual |= {name: model.fingerprint for name, model in augmenting.items()}
  run_files.check_fingerprints(expected, actual, where=directory)
  model = compose(anchor=anchor, augmenting=augmenting, **vars(config))
  tensors = run_files.read_composition(directory)
  file = directory / run_files.WEIGHTS_FILE
  fresh = model.params['composition']
  trees.check_same_structure(fresh, tensors, what=str(file))
  places = jax.tree.map(lambda x: x.sharding, fresh)
  model.params['composition'] = assembly.place(tensors, places)
  return model
