"""Model directories: configuration, weights, vocabulary, fingerprint.

A directory holds `config.json`, `model.safetensors` (or several such files and
`model.safetensors.index.json`), and a vocabulary. By `model_type` in
`config.json` it is one of ours, `calm_jax`: the fields of `TransformerConfig`,
and parameters by their names in our tree; or one of Hugging Face, of a family
that `families` knows.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any, Literal

import numpy as np

from calm_jax import sharding, trees, vocabularies
from calm_jax.array_types import Params
from calm_jax.models import (
  directories,
  families,
  kernels,
  sizes,
  weight_files,
)
from calm_jax.models import weights as lazy
from calm_jax.models.config import TransformerConfig
from calm_jax.models.layers import RopeScaling
from calm_jax.models.number_embeddings import NumberEmbeddings
from calm_jax.quantization import QuantizationConfig
from calm_jax.text import byte_vocabularies

MODEL_TYPE = 'calm_jax'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
  """A model that is described, but whose weights are not read yet.

  Attributes:
    config: sizes, switches and dtypes.
    vocabulary: ids of its words; the embedding table may be longer.
    weights: 'pretrained' reads `path`; 'random' initialises afresh.
    path: the model directory, or None.
    model_type: whose names the tensors in the directory have.
    number_embeddings: what is added to a random embedding table.
    quantization: how frozen weights are stored once loaded; None is as floats.
    axis_rules: how this model is split over the mesh, if not by the table of
      `sharding`: 'replicated', or single rules. A small model beside a large
      one is best whole everywhere.
    attention_kernel: what computes the attention of whole sequences, as in
      training; see `kernels`. An anchor's serves the composition too.
  """

  config: TransformerConfig
  vocabulary: vocabularies.Vocabulary
  weights: Literal['pretrained', 'random'] = 'random'
  path: pathlib.Path | None = None
  model_type: str = MODEL_TYPE
  number_embeddings: NumberEmbeddings | None = None
  quantization: QuantizationConfig | None = None
  axis_rules: sharding.AxisRules | None = None
  attention_kernel: kernels.Kernel = 'xla'

  def __post_init__(self):
    if self.weights not in ('pretrained', 'random'):
      raise ValueError(
        f"weights = {self.weights!r} is not one of ('pretrained', 'random')."
      )
    if self.weights == 'pretrained' and self.number_embeddings is not None:
      raise ValueError(
        'number_embeddings are where random weights begin; with weights ='
        " 'pretrained' they would have no effect. Leave them out."
      )
    # Gemma 3 1B has a token for images, and no embedding for it.
    beyond = range(self.config.vocab_size, self.vocabulary.size)
    if any(self.vocabulary.token_bytes(i) is not None for i in beyond):
      raise ValueError(
        f'The model has vocab_size = {self.config.vocab_size}, and its'
        f' vocabulary has {self.vocabulary.size} words: some would have no'
        ' embedding. Give the vocabulary that belongs to the model.'
      )
    sharding.rules_of(self.axis_rules)  # raises
    kernels.check(
      self.attention_kernel,
      softcap=self.config.attention_softcap,
      has_bias=self.config.position_encoding == 'relative_bias',
      dtype=self.config.dtype,
      head_dim=self.config.head_dim,
    )
    if self.quantization is not None:
      heads = self.config.num_heads * self.config.head_dim
      self.quantization.check_widths(
        (self.config.embed_dim, heads, self.config.mlp_dim)
      )


def pretrained_model(
  path: str | pathlib.Path | None,
  *,
  dtype: str | None = None,
  param_dtype: str | None = None,
  weights: Literal['pretrained', 'random'] = 'pretrained',
  quantization: QuantizationConfig | None = None,
  axis_rules: sharding.AxisRules | None = None,
  attention_kernel: kernels.Kernel = 'xla',
  size: str | None = None,
  revision: str | None = None,
) -> ModelSpec:
  """Describes the model in a directory; reads headers, but no weights.

  By default weights are kept in the dtype that most of them are stored in, and
  the computation has the dtype that `config.json` names; but float32 in the
  place of float16, in which models trained in bfloat16 overflow.

  Args:
    path: a directory as described above, a folder among our own files
      (`calm_jax://tasks/donors/...`), or a hub id like 'google/gemma-2b'. None
      is the published model `size` without files, to plan with: the bytes of
      text stand in for its vocabulary.
    dtype: dtype of the computation, instead of the directory's.
    param_dtype: dtype the weights are kept in once loaded.
    weights: 'random' takes everything but the weights, as a control.
    quantization: how they are stored if they are frozen.
    axis_rules: as in `ModelSpec`.
    attention_kernel: as in `ModelSpec`.
    size: what the directory must hold, a name in `sizes.NAMES`.
    revision: of a hub id: a branch, a tag or a commit.

  Raises:
    ValueError: if a file is missing, or holds what we do not know.
  """
  changes = {'dtype': dtype, 'param_dtype': param_dtype}
  changes = {name: value for name, value in changes.items() if value}
  kept = {
    'quantization': quantization,
    'axis_rules': axis_rules,
    'attention_kernel': attention_kernel,
  }
  if path is None:
    if size is None:
      raise ValueError(
        'pretrained_model has path = None and no size. Give a directory, or to'
        f' plan without one a size: {sizes.NAMES}.'
      )
    return ModelSpec(
      config=dataclasses.replace(sizes.config(size), **changes),
      vocabulary=byte_vocabularies.ByteVocabulary(),
      weights=weights,
      model_type=sizes.model_type(size),
      **kept,
    )
  path = directories.resolve(path, revision=revision)
  if not (path / directories.CONFIG_FILE).is_file():
    raise ValueError(
      f'{path} is not a model directory: it has no {directories.CONFIG_FILE}.'
      f' It needs that, {weight_files.WEIGHTS_FILE} and a vocabulary.'
    )
  directories.check_links(path)
  model_type, config = read_config(path / directories.CONFIG_FILE)
  if weights != 'random':
    stored = weight_files.open_directory(path)
    if model_type != MODEL_TYPE:
      config = _as_stored(config, stored)
  if size is not None:
    sizes.check(config, name=size, where=str(path))
  return ModelSpec(
    config=dataclasses.replace(config, **changes),
    vocabulary=vocabularies.load_vocabulary(path),
    weights=weights,
    path=path,
    model_type=model_type,
    **kept,
  )


def read_config(file: pathlib.Path) -> tuple[str, TransformerConfig]:
  """Reads `config.json`; an unknown model type or field is a ValueError."""
  fields = directories.read_json(file)
  model_type = fields.get('model_type')
  if model_type != MODEL_TYPE:
    return model_type, families.config_from(fields, where=str(file))
  del fields['model_type']
  known = {field.name for field in dataclasses.fields(TransformerConfig)}
  if fields.keys() - known:
    raise ValueError(
      f'{file}: unknown fields {sorted(fields.keys() - known)}; this version'
      f' knows {sorted(known)}.'
    )
  try:
    if fields.get('rope_scaling'):
      fields['rope_scaling'] = RopeScaling(**fields['rope_scaling'])
    config = TransformerConfig(**fields)
  except (TypeError, ValueError) as error:  # a field is missing, or wrong
    raise ValueError(f'{file}: {error}') from error
  if config.num_layers > families.MOST_LAYERS:
    raise ValueError(
      f'{file}: num_layers = {config.num_layers}: at most'
      f' {families.MOST_LAYERS} are read.'
    )
  return MODEL_TYPE, config


def _as_stored(
  config: TransformerConfig, stored: Mapping[str, lazy.Tensor]
) -> TransformerConfig:
  """Sets param_dtype to what most bytes are stored in."""
  held = dict.fromkeys(weight_files.FLOATS, 0)
  for tensor in stored.values():
    if tensor.dtype in held:
      held[tensor.dtype] += tensor.nbytes
  kept = max(held, key=held.get).name
  return dataclasses.replace(config, param_dtype=kept)


# --- Weights -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
  """The weights of a directory, checked, and not read.

  Attributes:
    tensors: by our names, each block apart (the 'loop' layout).
    left_out: names in the directory of what the model does not need.
  """

  tensors: dict[str, lazy.Tensor]
  left_out: tuple[str, ...]

  def report(self, path: pathlib.Path, dtype: str | None = None) -> str:
    """Says what is loaded, cast to `dtype` and left out, in a line."""
    count = len(self.tensors)
    nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
    parts = [f'{count} tensors, {nbytes / 1e9:.3g} GB, from {path}']
    for stored in sorted({t.dtype.name for t in self.tensors.values()}):
      if dtype is not None and stored != dtype:
        cast = [t for t in self.tensors.values() if t.dtype.name == stored]
        parts.append(f'cast: {len(cast)} from {stored} to {dtype}')
    if self.left_out:
      shown = ', '.join(self.left_out[:3])
      more = ', ...' if len(self.left_out) > 3 else ''
      parts.append(f'left out: {len(self.left_out)} ({shown}{more})')
    return '; '.join(parts)


def open_weights(spec: ModelSpec, wanted: Mapping[str, Any]) -> Source:
  """Finds each parameter of a model in its directory; reads headers only.

  Args:
    spec: of the model.
    wanted: arrays or shape structs by our names, in the 'loop' layout.

  Raises:
    ValueError: if a tensor is missing, unused, of a wrong shape or not of
      floating point; it shows all of them.
  """
  if spec.path is None:
    raise ValueError(
      "weights = 'pretrained', and there is no path to read them from. Give the"
      ' directory of the model; without one it can be planned, not loaded.'
    )
  stored = weight_files.open_directory(spec.path)
  native = spec.model_type == MODEL_TYPE
  if native:
    sources = {name: families.Source(name, False) for name in wanted}
    left_out = ()
  else:
    sources = families.sources(
      spec.config, model_type=spec.model_type, available=stored.keys()
    )
    used = {source.name for source in sources.values()}
    left_out = tuple(
      name
      for name in sorted(stored.keys() - used)
      if families.left_out(spec.model_type, name, spec.config)
    )
  expected = {}
  for name, leaf in wanted.items():
    shape = leaf.shape[::-1] if sources[name].transposed else leaf.shape
    expected[sources[name].name] = np.broadcast_to(0, shape)
  actual = {name: stored[name] for name in stored.keys() - set(left_out)}
  trees.check_same_structure(expected, actual, what=str(spec.path))
  for name, tensor in sorted(actual.items()):
    if tensor.dtype not in weight_files.FLOATS:
      raise ValueError(
        f'{spec.path}: the tensor {name!r} is stored as {tensor.dtype}; a'
        ' floating dtype is expected. Quantised checkpoints are not read.'
      )
  tensors = {}
  for name in wanted:
    tensor = stored[sources[name].name]
    tensors[name] = tensor.transposed() if sources[name].transposed else tensor
  return Source(tensors, left_out)


def fingerprint(spec: ModelSpec) -> str:
  """Returns the SHA-256 of a directory's tensors and vocabulary.

  It is over the sorted (name, dtype, shape, digest) of the stored tensors, as
  they are before any cast, however they are split into files.

  Raises:
    ValueError: if a tensor is damaged, or holds NaN or infinity.
  """
  digests = weight_files.directory_digests(spec.path)
  if spec.config.tie_embeddings and spec.model_type != MODEL_TYPE:
    _check_tied(spec, digests)
  return trees.fingerprint(digests, spec.vocabulary.fingerprint())


def _check_tied(spec: ModelSpec, digests: Mapping[str, str]) -> None:
  """Raises ValueError if tied embeddings come with another output matrix."""
  sources = families.sources(
    spec.config, model_type=spec.model_type, available=digests.keys()
  )
  table = sources['embedder/table'].name
  for name in digests:
    if name.endswith('lm_head.weight') and spec.config.attention == 'causal':
      if digests[name] != digests[table]:
        raise ValueError(
          f'{spec.path}: the embeddings are tied by its config.json, and'
          f' {name} is not equal to {table}. Set tie_word_embeddings to false'
          f' if {name} is meant, or remove it.'
        )


def read_weights(path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Reads all tensors of a directory into nested arrays, as it names them.

  Returns:
    The arrays in their stored dtype, and the fingerprint.
  """
  spec = pretrained_model(path)
  tensors = weight_files.open_directory(spec.path)
  arrays = {name: tensor.read() for name, tensor in tensors.items()}
  return trees.unflatten(arrays), fingerprint(spec)


def write_model(
  directory: pathlib.Path,
  *,
  config: TransformerConfig,
  params: Params,
  vocabulary: vocabularies.Vocabulary,
  storage_dtype: str | None = None,
) -> str:
  """Writes a model directory of our own and returns its fingerprint.

  Args:
    directory: made if need be.
    config: of the model; its param_dtype becomes the stored one.
    params: nested parameters, one subtree a block (the 'loop' layout).
    vocabulary: written beside the weights.
    storage_dtype: what to round to, 'bfloat16' for half the size.
  """
  directory.mkdir(parents=True, exist_ok=True)
  dtype = np.dtype(storage_dtype or config.param_dtype)
  tensors = {
    name: lazy.of_array(leaf).astype(dtype)
    for name, leaf in trees.flatten(params).items()
  }
  fields = dataclasses.asdict(
    dataclasses.replace(config, param_dtype=dtype.name)
  )
  directories.write_json(
    directory / directories.CONFIG_FILE, {'model_type': MODEL_TYPE, **fields}
  )
  vocabulary.save(directory)
  weight_files.write_directory(directory, tensors)  # last: then it is whole
  return fingerprint(pretrained_model(directory))
