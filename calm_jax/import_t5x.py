"""T5X checkpoints of decoder-only models, as model directories of ours.

  python -m calm_jax.import_t5x --gin_file=runs/import_t5x.gin \
      --gin.CHECKPOINT="'/tmp/x/checkpoint_1000'" \
      --gin.VOCABULARY="'/tmp/x/words'" --gin.OUTPUT_DIR="'/tmp/y'"

Reads what T5X writes by Orbax (`<checkpoint>/state`, entry `target`) of
`t5x/examples/decoder_only/network.py`; T5X itself is not needed. The network:
T5's relative bias shared by all blocks (arXiv 1910.10683, section 2.1), queries
that are not scaled, RMSNorm before attention and MLP, no biases.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import re
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from calm_jax import checkpoints, run_files, trees, vocabularies
from calm_jax.array_types import Params
from calm_jax.model import Model
from calm_jax.models import pretrained, transformer
from calm_jax.models.config import TransformerConfig

STATE_FOLDER = 'state'
CONFIG_FILE = 'config.gin'  # T5X's, in the MODEL_DIR that holds checkpoints
MAX_DISTANCE = 128  # network.py has no setting for it

# Flax's names of functions, which T5X uses, and ours.
_ACTIVATIONS = {
  'gelu': 'gelu_tanh',
  'relu': 'relu',
  'silu': 'silu',
  'swish': 'silu',
}
_OUTSIDE_BLOCKS = {
  'token_embedder/embedding': 'embedder/table',
  'relpos_bias/rel_embedding': 'relative_bias/table',
  'decoder_norm/scale': 'final_norm/scale',
  'logits_dense/kernel': 'head/kernel',
}
_IN_A_BLOCK = {
  'pre_self_attention_layer_norm/scale': 'attention_norm/scale',
  'self_attention/query/kernel': 'attention/query/kernel',
  'self_attention/key/kernel': 'attention/key/kernel',
  'self_attention/value/kernel': 'attention/value/kernel',
  'self_attention/out/kernel': 'attention/out/kernel',
  'pre_mlp_layer_norm/scale': 'mlp_norm/scale',
  'mlp/wi_0/kernel': 'mlp/gate/kernel',
  'mlp/wi_1/kernel': 'mlp/up/kernel',
  'mlp/wi/kernel': 'mlp/up/kernel',
  'mlp/wo/kernel': 'mlp/down/kernel',
}
_BLOCK = re.compile(r'layers_(\d+)/(.+)')


def import_t5x(
  *,
  checkpoint: str,
  output_dir: str,
  vocabulary: vocabularies.Vocabulary | str,
  mlp_activations: Sequence[str] | None = None,
  bos_id: int | None = 0,
  dtype: str = 'float32',
  storage_dtype: str | None = None,
  summarize_config: Callable[[pathlib.Path], None] | None = None,
) -> str:
  """Writes the model directory of a T5X checkpoint; returns its fingerprint.

  Needs host memory for the weights, and nothing of the accelerator.

  Args:
    checkpoint: MODEL_DIR/checkpoint_<step>.
    output_dir: made if need be; `load_pretrained` reads it.
    vocabulary: of the model, or the directory it is in; it may have fewer words
      than the table has rows.
    mlp_activations: T5X's `network.TransformerConfig.mlp_activations`; None
      takes them from MODEL_DIR/config.gin. Shapes do not tell them.
    bos_id: what every sequence began with in training: 0 unless the feature
      converter was given another; None for nothing.
    dtype: dtype of the computation.
    storage_dtype: what to round the weights to; None keeps theirs.
    summarize_config: unused; the directory shall hold the model alone.

  Raises:
    ValueError: if the folder is no such checkpoint, the network is another
      one, or the vocabulary does not fit.
  """
  del summarize_config
  where = pathlib.Path(checkpoint).expanduser()
  target = checkpoints.read_tree(_state_folder(where), 'target')
  if mlp_activations is None:
    mlp_activations = _activations_beside(where)
  config, params = convert(
    target, mlp_activations=mlp_activations, where=str(where)
  )
  if isinstance(vocabulary, str):
    vocabulary = vocabularies.load_vocabulary(vocabulary)
  if vocabulary.size > config.vocab_size:
    raise ValueError(
      f'The vocabulary has {vocabulary.size} words, and the embedding table of'
      f' {where} {config.vocab_size} rows. Give the vocabulary it was trained'
      ' with.'
    )
  if vocabulary.bos_id != bos_id:
    raise ValueError(
      f'The vocabulary has bos_id = {vocabulary.bos_id}, and this model was'
      f' trained on sequences that begin with id {bos_id}. T5X begins them with'
      ' its padding id, 0: name that token as bos_token, with "add_bos_token":'
      f' true, in {vocabularies.CONFIG_FILE}; or give bos_id= if training was'
      ' otherwise.'
    )
  stored = storage_dtype or params['embedder']['table'].dtype.name
  output = pathlib.Path(output_dir).expanduser()
  fingerprint = pretrained.write_model(
    output,
    config=dataclasses.replace(config, dtype=dtype),
    params=params,
    vocabulary=vocabulary,
    storage_dtype=stored,
  )
  size = trees.num_params(params)
  print(f'{output}: {size:,} parameters, fingerprint {fingerprint[:16]}')
  return fingerprint


def export_composition(
  checkpoint: str | pathlib.Path,
  directory: str | pathlib.Path,
  *,
  model: Model,
) -> None:
  """Writes what `load_composition` reads, from a run of `contrib.t5x`.

  Args:
    checkpoint: MODEL_DIR/checkpoint_<step> of `t5x.train`.
    directory: gets calm_config.json and composition.safetensors.
    model: composed of the same models with the same mapping.

  Raises:
    ValueError: if the checkpoint holds another composition.
  """
  folder = _state_folder(pathlib.Path(checkpoint).expanduser())
  theta = checkpoints.read_tree(folder, 'target')
  expected = model.params['composition']
  trees.check_same_structure(expected, theta, what=str(checkpoint))
  directory = pathlib.Path(directory).expanduser()
  run_files.write_config(directory, model.composed, model.fingerprints)
  run_files.write_trained(directory, theta)
  run_files.write_card(directory, model.composed, model.fingerprints)


def convert(
  target: Mapping[str, Any], *, mlp_activations: Sequence[str], where: str
) -> tuple[TransformerConfig, Params]:
  """Maps T5X's parameters to our configuration and tree (the loop layout).

  Args:
    target: nested numpy arrays, {'decoder': ...}.
    mlp_activations: see `import_t5x`.
    where: what `target` is, for messages.

  Raises:
    ValueError: for the parameters of any other network.
  """
  if set(target) != {'decoder'}:
    raise ValueError(
      f"{where} holds {sorted(target)} under 'target'; a decoder-only model of"
      " T5X holds ['decoder'] alone. Encoder-decoder models cannot be imported."
    )
  tensors = trees.flatten(target['decoder'])
  if any(name.startswith('layers/') for name in tensors):
    raise ValueError(
      f'{where} has its layers stacked in one tensor (scan_layers), which'
      " T5X's decoder-only network never does. Save each layer apart, as"
      ' layers_0, layers_1, ..., first.'
    )
  named = {_our_name(name, where): array for name, array in tensors.items()}
  config = _config(named, tensors, mlp_activations, where)
  named['relative_bias/table'] = named['relative_bias/table'].T
  params = trees.unflatten(named)
  model = transformer.DecoderLM(config)
  expected = nn.unbox(jax.eval_shape(model.init_params, jax.random.key(0)))
  trees.check_same_structure(expected, params, what=where)
  return config, params


def _our_name(name: str, where: str) -> str:
  if name in _OUTSIDE_BLOCKS:
    return _OUTSIDE_BLOCKS[name]
  block = _BLOCK.fullmatch(name)
  if not block or block[2] not in _IN_A_BLOCK:
    raise ValueError(
      f"{where}: the parameter decoder/{name} is not one of T5X's decoder-only"
      f' network, which has {sorted(_OUTSIDE_BLOCKS)} and in each layers_<i>'
      f' {sorted(_IN_A_BLOCK)}.'
    )
  return f'block_{block[1]}/{_IN_A_BLOCK[block[2]]}'


def _config(
  named: Mapping[str, np.ndarray],
  tensors: Mapping[str, np.ndarray],
  mlp_activations: Sequence[str],
  where: str,
) -> TransformerConfig:
  """Reads the sizes off the shapes; the rest is fixed in network.py."""
  needed = ('embedder/table', 'relative_bias/table', 'final_norm/scale')
  needed += ('block_0/attention/query/kernel', 'block_0/mlp/up/kernel')
  missing = [name for name in needed if name not in named]
  if missing:
    raise ValueError(
      f"{where} has no parameter for our {missing}, so it is not of T5X's"
      f' decoder-only network. It has {sorted(tensors)}.'
    )
  gated = 'block_0/mlp/gate/kernel' in named
  vocab_size, embed_dim = named['embedder/table'].shape
  num_heads, buckets = named['relative_bias/table'].shape
  tied = 'head/kernel' not in named
  return TransformerConfig(
    vocab_size=vocab_size,
    num_layers=len({n.split('/')[0] for n in named if n.startswith('block_')}),
    embed_dim=embed_dim,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=named['block_0/attention/query/kernel'].shape[1] // num_heads,
    mlp_dim=named['block_0/mlp/up/kernel'].shape[1],
    mlp='gated' if gated else 'plain',
    activation=_activation(mlp_activations, gated=gated, where=where),
    position_encoding='relative_bias',
    relative_buckets=buckets,
    relative_max_distance=MAX_DISTANCE,
    attention_scale=1.0,
    tie_embeddings=tied,
    logits_scale=embed_dim**-0.5 if tied else 1.0,
    init_stddev=1.0,
  )


def _activation(names: Sequence[str], *, gated: bool, where: str) -> str:
  names = tuple(names)
  wanted = tuple(
    (name, 'linear') if gated else (name,) for name in _ACTIVATIONS
  )
  if names not in wanted:
    raise ValueError(
      f'mlp_activations = {names} cannot be imported; the shapes of {where}'
      f' allow {", ".join(map(str, wanted))}.'
    )
  return _ACTIVATIONS[names[0]]


def _activations_beside(checkpoint: pathlib.Path) -> tuple[str, ...]:
  """Reads mlp_activations out of the config.gin of the run."""
  file = checkpoint.absolute().parent / CONFIG_FILE
  found = []
  if file.is_file():
    pattern = r'^[\w. ]*\bmlp_activations\s*=\s*(\([^()]*\)|\[[^\[\]]*\])'
    found = re.findall(pattern, file.read_text(), re.MULTILINE)
  if len(found) != 1:
    raise ValueError(
      f'{file} {"is missing" if not file.is_file() else "does not name one"}'
      ' mlp_activations, which the shapes of the weights do not tell. Give it:'
      " mlp_activations=('gelu', 'linear'), as in the model's gin file."
    )
  return tuple(ast.literal_eval(found[0]))


def _state_folder(checkpoint: pathlib.Path) -> pathlib.Path:
  if (checkpoint / STATE_FOLDER).is_dir():
    return checkpoint / STATE_FOLDER
  steps = sorted(path.name for path in checkpoint.glob('checkpoint_*'))
  if steps:
    hint = f'It holds {", ".join(steps)}: name one of these.'
  elif (checkpoint / 'checkpoint').is_file():
    hint = (
      "It is of T5X's legacy format. Restore it in T5X and save it with"
      ' use_orbax=True, the default of t5x.train.'
    )
  else:
    hint = 'Name a folder checkpoint_<step> in the MODEL_DIR of a T5X run.'
  raise ValueError(
    f'{checkpoint} is no checkpoint that T5X wrote by Orbax: it has no folder'
    f' {STATE_FOLDER!r}. {hint}'
  )


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('import_t5x')
