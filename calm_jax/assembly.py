"""From model descriptions to a composed model with its weights on the mesh."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, Literal

from flax import linen as nn
import jax
from jax.sharding import Mesh

from calm_jax import alignment, quantization, sharding, trees, vocabularies
from calm_jax import lora as lora_lib
from calm_jax.array_types import Params
from calm_jax.composition import ComposedLM
from calm_jax.connections import CompositionConfig
from calm_jax.lora import LoraConfig
from calm_jax.models import (
  directories,
  encoder,
  kernels,
  pretrained,
  stacking,
  transformer,
  weights,
)
from calm_jax.models.config import TransformerConfig
from calm_jax.models.pretrained import ModelSpec


def build_model(
  anchor: ModelSpec,
  *,
  augmenting: Mapping[str, ModelSpec] | None = None,
  composition: CompositionConfig | None = None,
  stack: Literal['loop', 'scan'] = 'loop',
  remat: bool = False,
) -> ComposedLM:
  """Builds the model; allocates nothing.

  Raises:
    ValueError: if the mapping does not fit the depths, or the anchor is no
      decoder.
  """
  augmenting = augmenting or {}
  reserved = {'anchor', 'decoder'} & augmenting.keys()
  if reserved:
    raise ValueError(
      f'An augmenting model cannot be called {reserved.pop()!r}; choose another'
      ' name.'
    )
  for name in augmenting:
    if not name or '/' in name:
      raise ValueError(
        f'An augmenting model cannot be called {name!r}: a name must not be'
        ' empty, and / separates names of parameters. Choose another.'
      )
  if anchor.config.attention != 'causal':
    raise ValueError(
      "The anchor has attention = 'bidirectional': an encoder cannot speak. Use"
      ' it as augmenting model, and a decoder as anchor.'
    )

  def tower(spec):
    kernel = spec.attention_kernel
    return build_tower(spec.config, stack=stack, kernel=kernel)

  model = ComposedLM(
    tower(anchor),
    augmenting={name: tower(spec) for name, spec in augmenting.items()},
    composition=composition,
    own_tokens=[
      name
      for name, spec in augmenting.items()
      if not vocabularies.same_tokens(anchor.vocabulary, spec.vocabulary)
    ],
    remat=remat,
  )
  if model.connections:
    kernels.check(
      anchor.attention_kernel,
      dtype=anchor.config.dtype,
      head_dim=anchor.config.embed_dim // model.num_heads,
    )
  return model


def _reads_targets(spec: ModelSpec, composition: CompositionConfig) -> bool:
  return (
    spec.config.attention == 'causal'
    and composition.augmenting_context == 'all'
  )


def build_tower(
  config: TransformerConfig,
  *,
  stack: Literal['loop', 'scan'] = 'loop',
  kernel: kernels.Kernel = 'xla',
) -> transformer.Tower:
  """Builds the decoder or encoder of a configuration."""
  is_encoder = config.attention == 'bidirectional'
  tower = encoder.EncoderLM if is_encoder else transformer.DecoderLM
  return tower(config, stack=stack, kernel=kernel)


def build_readers(
  anchor: ModelSpec,
  augmenting: Mapping[str, ModelSpec],
  composition: CompositionConfig | None,
) -> dict[str, alignment.Reader]:
  """Returns, by name, how each model with tokens of its own reads.

  A model that shares the anchor's vocabulary, and reads all that the anchor
  does, reads its tokens, and needs none.
  """
  return {
    name: alignment.Reader(
      anchor.vocabulary,
      spec.vocabulary,
      anchor_size=anchor.config.vocab_size,
      reads_targets=_reads_targets(spec, composition),
      most=composition.tokens_per_anchor_token,
    )
    for name, spec in augmenting.items()
    if not _reads_targets(spec, composition)
    or not vocabularies.same_tokens(anchor.vocabulary, spec.vocabulary)
  }


@dataclasses.dataclass(frozen=True)
class Loaded:
  """One model's weights on the mesh, and where they come from.

  Attributes:
    params: nested parameters, sharded.
    fingerprint: SHA-256 of the source checkpoint and its vocabulary.
    origin: 'pretrained' or 'random', and the path or seed.
    report: what was read, cast and left out, for people.
  """

  params: Params
  fingerprint: str
  origin: str
  report: str = 'nothing read'


def load(
  spec: ModelSpec,
  model: transformer.Tower,
  *,
  mesh: Mesh | None = None,
  places: Any = None,
  seed: int = 0,
) -> Loaded:
  """Reads or initialises one model, straight into its final sharding.

  Args:
    spec: the description.
    model: the module, with the cuts of the composed model.
    mesh: the device mesh, over which our table places the parameters.
    places: a sharding for each parameter instead of a mesh.
    seed: of random weights.

  Raises:
    ValueError: if names or shapes in the directory are not the model's, its
      weights are not finite, or the mesh does not divide them.
  """
  if places is None:
    places = places_of(spec, model, mesh)
  keep = functools.partial(quantization.quantize_leaf, spec.quantization)
  kept = f', as {spec.quantization.kind}' if spec.quantization else ''
  if spec.weights == 'random':
    params = _random_params(spec, model, seed=seed, places=places)
    fingerprint = trees.fingerprint(
      trees.digests(jax.tree.map(sharding.collect, params)),
      spec.vocabulary.fingerprint(),
    )
    params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: keep(trees.path_name(path), leaf), params
    )
    return Loaded(params, fingerprint, f'random, seed {seed}{kept}')
  source, fingerprint = _open(spec, model)
  tensors = trees.unflatten(source.tensors)
  if model.stack != 'loop':
    tensors = stacking.restack(
      tensors,
      source=model.clone(stack='loop'),
      target=model,
      stack=weights.stack,
    )
  dtype = spec.config.param_dtype
  return Loaded(
    place(tensors, places, dtype=dtype, keep=keep),
    fingerprint,
    f'pretrained, {directories.label(spec.path)}{kept}',
    source.report(spec.path, dtype),
  )


def places_of(spec: ModelSpec, model: transformer.Tower, mesh: Mesh) -> Any:
  """Returns where a model's parameters go; all of them can go there.

  Raises:
    ValueError: if they cannot be split so, or the model's attention kernel does
      not run on these devices.
  """
  kernels.check_backend(spec.attention_kernel, mesh.devices.flat[0].platform)
  boxed = jax.eval_shape(model.init_params, jax.random.key(0))
  rules = sharding.rules_of(spec.axis_rules)
  places = sharding.param_shardings(boxed, mesh, rules)
  quantization.check_places(spec.quantization, nn.unbox(boxed), places)
  return places


def _open(
  spec: ModelSpec, model: transformer.Tower
) -> tuple[pretrained.Source, str]:
  """Checks a directory and all its bytes; returns its tensors, fingerprint."""
  loop = model.clone(stack='loop')
  wanted = nn.unbox(jax.eval_shape(loop.init_params, jax.random.key(0)))
  source = pretrained.open_weights(spec, trees.flatten(wanted))
  return source, pretrained.fingerprint(spec)


def _random_params(
  spec: ModelSpec, model: transformer.Tower, *, seed: int, places: Any
) -> Params:
  start_VD = None
  if spec.number_embeddings is not None:
    start_VD = spec.number_embeddings.table(spec.vocabulary, width=model.width)

  def init(key):
    params = nn.unbox(model.init_params(key))
    if start_VD is not None:
      table_VD = params['embedder']['table']
      params['embedder']['table'] = table_VD + start_VD.astype(table_VD.dtype)
    return params

  return jax.jit(init, out_shardings=places)(jax.random.key(seed))


def place(
  tensors: Any,
  places: Any,
  *,
  dtype: str | None = None,
  keep: Callable[[str, jax.Array], Any] = lambda name, leaf: leaf,
) -> Any:
  """Puts tensors or host arrays on the mesh, one after the other.

  Each device takes its own part, and only that part is read.

  Args:
    tensors: tree of `weights.Tensor`s or numpy arrays.
    places: tree of their shardings.
    dtype: what to convert to.
    keep: turns a leaf's name and array into what stays of it.
  """

  def one(path, tensor, where):
    tensor = weights.of_array(tensor)
    parts = {}  # devices that hold the same part share one reading of it

    def part(index):
      if str(index) not in parts:
        parts[str(index)] = tensor.read(index, dtype)
      return parts[str(index)]

    leaf = jax.make_array_from_callback(tensor.shape, where, part)
    # Wait: else the parts of several tensors are in memory at once.
    return keep(trees.path_name(path), leaf.block_until_ready())

  return jax.tree_util.tree_map_with_path(one, tensors, places)


def build_trained(
  trainable: str,
  anchor: ModelSpec,
  *,
  augmenting: Mapping[str, ModelSpec],
  composition: CompositionConfig | None,
  lora: LoraConfig | None,
  stack: Literal['loop', 'scan'],
  remat: bool,
) -> tuple[ComposedLM, Mapping[str, ModelSpec]]:
  """Builds the model that a run trains in part or whole; allocates nothing.

  The baselines 'lora' and 'anchor' train the anchor alone; a composition that
  is described beside them only says how many parameters LoRA shall have.

  Returns:
    The model, and the augmenting models that it has.

  Raises:
    ValueError: if this cannot be trained.
  """
  allowed = ('composition', 'lora', 'anchor')
  if trainable not in allowed:
    raise ValueError(f'trainable = {trainable!r} is not one of {allowed}.')
  model = build_model(
    anchor,
    augmenting=augmenting,
    composition=composition,
    stack=stack,
    remat=remat,
  )
  if trainable == 'composition':
    if not model.connections:
      raise ValueError(
        "trainable = 'composition', and there is none: set COMPOSITION and"
        " AUGMENTING, or trainable = 'anchor'."
      )
    return model, augmenting
  if trainable == 'anchor':
    _check_updatable(anchor)
    return ComposedLM(model.anchor.clone(cuts=()), remat=remat), {}
  lora = lora or LoraConfig()
  if lora.rank is None:
    if not model.connections:
      raise ValueError(
        'LoraConfig.rank is not set, and no composition is described whose'
        ' number of parameters it could match. Set it.'
      )
    shapes = jax.eval_shape(model.init_composition, jax.random.key(0))
    lora = lora_lib.match(lora, model.anchor, trees.num_params(shapes))
  alone = model.anchor.clone(cuts=())
  return ComposedLM(alone, lora=lora, remat=remat), {}


def _check_updatable(anchor: ModelSpec) -> None:
  if anchor.quantization is not None:
    raise ValueError(
      f'ANCHOR has quantization = {anchor.quantization}, and it is what is'
      ' trained. Only frozen weights can be quantised: leave that out.'
    )
  if anchor.config.param_dtype != 'float32':
    raise ValueError(
      f'ANCHOR keeps its weights in {anchor.config.param_dtype}, in which'
      " small updates are lost. Set pretrained_model.param_dtype = 'float32';"
      ' train.export_dtype says in what it is written in the end.'
    )


def frozen_tree(loaded: Mapping[str, Loaded]) -> dict[str, Any]:
  """Returns {'anchor': ..., 'augmenting': {name: ...}} of loaded models."""
  tree = {'anchor': loaded['anchor'].params}
  augmenting = {k: one.params for k, one in loaded.items() if k != 'anchor'}
  return {**tree, 'augmenting': augmenting} if augmenting else tree


def load_all(
  model: ComposedLM,
  specs: Mapping[str, ModelSpec],
  *,
  mesh: Mesh,
  seed: int = 0,
) -> dict[str, Loaded]:
  """Loads the models of `specs`: 'anchor', and augmenting ones by name."""
  for name, spec in specs.items():  # all are sound, before any is placed
    tower = model.tower(name)
    places_of(spec, tower, mesh)
    if spec.weights == 'pretrained':
      _open(spec, tower)
  loaded = {'anchor': load(specs['anchor'], model.anchor, mesh=mesh, seed=seed)}
  for i, (name, tower) in enumerate(sorted(model.augmenting.items())):
    loaded[name] = load(specs[name], tower, mesh=mesh, seed=seed + 1 + i)
  return loaded


def init_trained(
  subtree: str, model: ComposedLM, *, mesh: Mesh, seed: int
) -> Params:
  """Initialises Theta_C ('composition') or LoRA's updates on the mesh."""

  def init(key):
    if subtree == 'lora':
      return lora_lib.init(key, model.anchor, model.lora)
    return model.init_composition(key)

  key = jax.random.key(seed)
  places = sharding.param_shardings(jax.eval_shape(init, key), mesh)
  fresh = jax.jit(lambda key: nn.unbox(init(key)), out_shardings=places)
  return fresh(key)
