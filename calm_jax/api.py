"""The Python interface: load models, compose them, use them, save Theta_C."""

from collections.abc import Mapping
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from calm_jax import (
  assembly,
  paths,
  run_files,
  sharding,
  trees,
)
from calm_jax.array_types import Params
from calm_jax.composition import ComposedLM
from calm_jax.connections import CompositionConfig, LayerMapping
from calm_jax.model import Model
from calm_jax.models import kernels, pretrained
from calm_jax.models.pretrained import ModelSpec
from calm_jax.quantization import QuantizationConfig


def load_pretrained(
  path: str | pathlib.Path,
  *,
  dtype: str | None = None,
  param_dtype: str | None = None,
  quantization: QuantizationConfig | None = None,
  mesh: Mesh | None = None,
  axis_rules: sharding.AxisRules | None = None,
  attention_kernel: kernels.Kernel = 'xla',
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
    axis_rules: how to split them over it, such as 'replicated'; see
      `sharding.rules_of`.
    attention_kernel: what computes the attention of whole sequences, on one
      device; see `models.kernels`.
    size: what it must be, by name ('gemma_2b').
    revision: of a hub id: a branch, a tag or a commit.
  """
  spec = pretrained.pretrained_model(
    path,
    dtype=dtype,
    param_dtype=param_dtype,
    quantization=quantization,
    axis_rules=axis_rules,
    attention_kernel=attention_kernel,
    size=size,
    revision=revision,
  )
  return from_spec(spec, mesh=mesh)


def from_spec(
  spec: ModelSpec, *, mesh: Mesh | None = None, seed: int = 0
) -> Model:
  """Loads or initialises one described model."""
  mesh = mesh or sharding.make_mesh()
  composed = ComposedLM(
    assembly.build_tower(spec.config, kernel=spec.attention_kernel)
  )
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
  for name, model in {'anchor': anchor, **augmenting}.items():
    _check_plain(model, name=f'compose: {name!r}')
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
      'composition': assembly.init_trained(
        'composition', composed, mesh=anchor.mesh, seed=seed
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
  directory = paths.of(directory)
  config, expected = run_files.read_config(directory)
  actual = {'anchor': anchor.fingerprint}
  actual |= {name: model.fingerprint for name, model in augmenting.items()}
  run_files.check_fingerprints(expected, actual, where=directory)
  model = compose(anchor=anchor, augmenting=augmenting, **vars(config))
  tensors = run_files.read_trained(directory)
  file = directory / run_files.WEIGHTS_FILE
  _put(model, 'composition', tensors, what=str(file))
  return model


def load_lora(directory: str | pathlib.Path, *, anchor: Model) -> Model:
  """Attaches the updates of a LoRA run to the anchor it was trained with.

  Raises:
    ValueError: if the fingerprint differs, or the tensors do not fit.
  """
  directory = paths.of(directory)
  config, expected = run_files.read_lora(directory)
  run_files.check_fingerprints(
    expected, {'anchor': anchor.fingerprint}, where=directory
  )
  _check_plain(anchor, name="load_lora: 'anchor'")
  composed = ComposedLM(anchor.composed.anchor, lora=config)
  fresh = assembly.init_trained('lora', composed, mesh=anchor.mesh, seed=0)
  model = Model(
    composed,
    {'anchor': anchor.params['anchor'], 'lora': fresh},
    spec=anchor.spec,
    fingerprints=anchor.fingerprints,
    mesh=anchor.mesh,
  )
  tensors = run_files.read_trained(directory, name=run_files.LORA_FILE)
  file = directory / run_files.LORA_FILE
  _put(model, 'lora', tensors, what=str(file))
  return model


def _check_plain(model: Model, *, name: str) -> None:
  """Raises ValueError for a model with something trained beside it."""
  if model.composed.lora is not None:
    raise ValueError(
      f'{name} has LoRA updates, which would be left out. Merge them first:'
      ' calm_jax.convert with LORA_DIR writes the merged model.'
    )
  if model.composed.connections:
    raise ValueError(
      f'{name} is composed already, and its composition would be left out.'
      ' Give the models it is made of.'
    )


def _put(model: Model, subtree: str, tensors: Params, *, what: str) -> None:
  """Replaces a fresh subtree by tensors that were read."""
  fresh = model.params[subtree]
  trees.check_same_structure(fresh, tensors, what=what)
  places = jax.tree.map(lambda x: x.sharding, fresh)
  model.params[subtree] = assembly.place(tensors, places)
