"""Model directories: configuration, weights, vocabulary, fingerprint.

A directory holds `config.json` (the fields of `TransformerConfig` under
`"model_type": "calm_jax"`), `model.safetensors` (parameters by their names in
our tree), and `tokenizer.json` with `tokenizer_config.json`.
"""

import dataclasses
import importlib.resources
import json
import pathlib
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy

from calm_jax import trees, vocabularies
from calm_jax.array_types import Params
from calm_jax.models.config import TransformerConfig
from calm_jax.models.layers import RopeScaling
from calm_jax.models.number_embeddings import NumberEmbeddings
from calm_jax.quantization import QuantizationConfig

CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
MODEL_TYPE = 'calm_jax'
PACKAGE_PREFIX = 'calm_jax://'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
  """A model that is described, but whose weights are not read yet.

  Attributes:
    config: sizes, switches and dtypes.
    vocabulary: ids of its words.
    weights: 'pretrained' reads `path`; 'random' initialises afresh.
    path: the model directory, or None.
    number_embeddings: what is added to a random embedding table.
    quantization: how frozen weights are stored once loaded; None is as floats.
  """

  config: TransformerConfig
  vocabulary: vocabularies.Vocabulary
  weights: Literal['pretrained', 'random'] = 'random'
  path: pathlib.Path | None = None
  number_embeddings: NumberEmbeddings | None = None
  quantization: QuantizationConfig | None = None

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
    if self.config.vocab_size != self.vocabulary.size:
      raise ValueError(
        f'The model has vocab_size = {self.config.vocab_size}, and its'
        f' vocabulary has {self.vocabulary.size} words. They must be equal.'
      )
    if self.quantization is not None:
      heads = self.config.num_heads * self.config.head_dim
      self.quantization.check_widths(
        (self.config.embed_dim, heads, self.config.mlp_dim)
      )


def resolve_path(path: str | pathlib.Path) -> pathlib.Path:
  """Returns a local path; `calm_jax://...` is a folder among our own files."""
  if str(path).startswith(PACKAGE_PREFIX):
    inside = str(path).removeprefix(PACKAGE_PREFIX)
    package, _, rest = inside.partition('/')
    root = importlib.resources.files(f'calm_jax.{package}')
    return pathlib.Path(str(root.joinpath(rest)))
  return pathlib.Path(path).expanduser()


def pretrained_model(
  path: str | pathlib.Path,
  *,
  dtype: str | None = None,
  param_dtype: str | None = None,
  weights: Literal['pretrained', 'random'] = 'pretrained',
  quantization: QuantizationConfig | None = None,
) -> ModelSpec:
  """Describes the model in a directory; reads no weights.

  Args:
    path: a directory as described above, or `calm_jax://tasks/donors/...`.
    dtype: dtype of the computation, instead of the directory's.
    param_dtype: dtype the weights are stored in once loaded.
    weights: 'random' takes everything but the weights, as a control.
    quantization: how they are stored if they are frozen.

  Raises:
    ValueError: if a file is missing, or holds what we do not know.
  """
  path = resolve_path(path)
  for name in (CONFIG_FILE, WEIGHTS_FILE, vocabularies.TOKENIZER_FILE):
    if not (path / name).is_file():
      raise ValueError(
        f'{path} is not a model directory: it has no {name}. It needs'
        f' {CONFIG_FILE}, {WEIGHTS_FILE} and {vocabularies.TOKENIZER_FILE}.'
      )
  config = read_config(path / CONFIG_FILE)
  changes = {'dtype': dtype, 'param_dtype': param_dtype}
  changes = {name: value for name, value in changes.items() if value}
  return ModelSpec(
    config=dataclasses.replace(config, **changes),
    vocabulary=vocabularies.TokenizersVocabulary.from_directory(path),
    weights=weights,
    path=path,
    quantization=quantization,
  )


def read_config(file: pathlib.Path) -> TransformerConfig:
  """Reads `config.json`; an unknown model type or field is a ValueError."""
  try:
    fields = json.loads(file.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f'{file} is not JSON: {error}.') from error
  model_type = fields.pop('model_type', None)
  if model_type != MODEL_TYPE:
    raise ValueError(
      f'{file}: model_type = {model_type!r} is not known; expected'
      f' {MODEL_TYPE!r}.'
    )
  known = {field.name for field in dataclasses.fields(TransformerConfig)}
  if fields.keys() - known:
    raise ValueError(
      f'{file}: unknown fields {sorted(fields.keys() - known)}; this version'
      f' knows {sorted(known)}.'
    )
  try:
    if fields.get('rope_scaling'):
      fields['rope_scaling'] = RopeScaling(**fields['rope_scaling'])
    return TransformerConfig(**fields)
  except TypeError as error:  # a field is missing
    raise ValueError(f'{file}: {error}.') from error


def read_weights(path: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Reads the tensors of a model directory.

  Returns:
    The nested parameters as numpy arrays in their stored dtype, and the
    SHA-256 over sorted (name, dtype, shape, bytes) and the vocabulary's hash.

  Raises:
    ValueError: if the file is cut short or damaged in its header.
  """
  vocabulary = vocabularies.TokenizersVocabulary.from_directory(path)
  tensors = read_safetensors(path / WEIGHTS_FILE)
  fingerprint = trees.fingerprint(
    {name: trees.digest(tensor) for name, tensor in tensors.items()},
    extra=vocabulary.fingerprint(),
  )
  return trees.unflatten(tensors), fingerprint


def read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads all tensors of one file; ValueError if it is not a whole one."""
  try:
    return safetensors.numpy.load_file(file)
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f'{file} cannot be read as safetensors ({error}). Copy it again from'
      ' where it came from.'
    ) from error


def write_model(
  directory: pathlib.Path,
  *,
  config: TransformerConfig,
  params: Params,
  vocabulary: vocabularies.TokenizersVocabulary,
  storage_dtype: str | None = None,
) -> str:
  """Writes a model directory and returns its fingerprint.

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
    name: np.ascontiguousarray(np.asarray(leaf).astype(dtype))
    for name, leaf in trees.flatten(params).items()
  }
  fields = dataclasses.asdict(
    dataclasses.replace(config, param_dtype=dtype.name)
  )
  text = json.dumps({'model_type': MODEL_TYPE, **fields}, indent=2)
  (directory / CONFIG_FILE).write_text(text + '\n')
  safetensors.numpy.save_file(tensors, directory / WEIGHTS_FILE)
  vocabulary.save(directory)
  return read_weights(directory)[1]
