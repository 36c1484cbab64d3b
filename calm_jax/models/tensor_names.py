"""Under which names the tensors of a Hugging Face checkpoint are stored."""

from collections.abc import Collection, Iterator
import dataclasses
import re

from calm_jax.models import family_tables
from calm_jax.models.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a parameter is stored.

  Attributes:
    name: of the tensor in the checkpoint.
    transposed: whether it is stored [out, in], as torch's Linear has it.
  """

  name: str
  transposed: bool


# Gemma 3 with eyes: transformers wrote the first before 4.52, and the second
# since. A model without its head ('LlamaModel') has no prefix.
_PREFIXES = ('model.', 'language_model.model.', 'model.language_model.', '')
_PROJECTIONS = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}


def sources(
  config: TransformerConfig,
  *,
  model_type: str,
  available: Collection[str] = (),
) -> dict[str, Source]:
  """Maps each of our parameters ('loop' layout) to where it is stored.

  Args:
    config: of the model.
    model_type: the family.
    available: names of the checkpoint, which decide between the spellings in
      use; none for the one to write.
  """
  if model_type in family_tables.ENCODERS:
    found = dict(_encoder_names(config))
    table = 'shared.weight'
    if table not in available and 'encoder.embed_tokens.weight' in available:
      table = 'encoder.embed_tokens.weight'
    return {'embedder/table': Source(table, False), **found}
  prefix = _PREFIXES[0]
  for one in _PREFIXES:
    if f'{one}embed_tokens.weight' in available:
      prefix = one
      break
  found = dict(_decoder_names(config, prefix))
  if not config.tie_embeddings:
    outer = 'language_model.lm_head.weight'
    name = outer if outer in available else 'lm_head.weight'
    found['head/kernel'] = Source(name, True)
  return found


def _decoder_names(
  config: TransformerConfig, prefix: str
) -> Iterator[tuple[str, Source]]:
  yield 'embedder/table', Source(f'{prefix}embed_tokens.weight', False)
  yield 'final_norm/scale', Source(f'{prefix}norm.weight', False)
  norms = {
    'attention_norm': 'input_layernorm',
    'mlp_norm': 'post_attention_layernorm',
  }
  if config.norm_placement == 'sandwich':
    norms |= {
      'attention_post_norm': 'post_attention_layernorm',
      'mlp_norm': 'pre_feedforward_layernorm',
      'mlp_post_norm': 'post_feedforward_layernorm',
    }
  if config.query_key_norm == 'rms':
    norms['attention/query_norm'] = 'self_attn.q_norm'
    norms['attention/key_norm'] = 'self_attn.k_norm'
  biased = {
    'none': (),
    'qkv': ('query', 'key', 'value'),
    'all': tuple(_PROJECTIONS),
  }[config.attention_bias]
  dense = {  # ours: (theirs, with a bias)
    **{
      f'attention/{ours}': (f'self_attn.{theirs}_proj', ours in biased)
      for ours, theirs in _PROJECTIONS.items()
    },
    **{
      f'mlp/{name}': (f'mlp.{name}_proj', config.mlp_bias)
      for name in ('gate', 'up', 'down')
    },
  }
  for i in range(config.num_layers):
    inside = f'{prefix}layers.{i}.'
    for ours, theirs in norms.items():
      yield f'block_{i}/{ours}/scale', Source(f'{inside}{theirs}.weight', False)
    for ours, (theirs, bias) in dense.items():
      yield f'block_{i}/{ours}/kernel', Source(f'{inside}{theirs}.weight', True)
      if bias:
        yield f'block_{i}/{ours}/bias', Source(f'{inside}{theirs}.bias', False)


def _encoder_names(
  config: TransformerConfig,
) -> Iterator[tuple[str, Source]]:
  first = 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  yield 'relative_bias/table', Source(first, False)
  yield 'final_norm/scale', Source('encoder.final_layer_norm.weight', False)
  dense = {'up': 'wi', 'down': 'wo'}
  if config.mlp == 'gated':
    dense = {'gate': 'wi_0', 'up': 'wi_1', 'down': 'wo'}
  for i in range(config.num_layers):
    ours, theirs = f'block_{i}', f'encoder.block.{i}.layer'
    for j, name in enumerate(('attention_norm', 'mlp_norm')):
      norm = f'{theirs}.{j}.layer_norm.weight'
      yield f'{ours}/{name}/scale', Source(norm, False)
    for one, letter in _PROJECTIONS.items():
      name = f'{theirs}.0.SelfAttention.{letter}.weight'
      yield f'{ours}/attention/{one}/kernel', Source(name, True)
    for one, letter in dense.items():
      name = f'{theirs}.1.DenseReluDense.{letter}.weight'
      yield f'{ours}/mlp/{one}/kernel', Source(name, True)


def left_out(model_type: str, name: str, config: TransformerConfig) -> bool:
  """Whether a tensor of the checkpoint is known not to be needed.

  With tied embeddings that includes a stored output matrix. It should be a
  copy of the table; whoever loads can check that.
  """
  if model_type in family_tables.ENCODERS:
    return bool(
      re.match(r'decoder\.|lm_head\.weight$|encoder\.embed_tokens\.', name)
    )
  if name.endswith('.rotary_emb.inv_freq'):
    return True
  if name in ('lm_head.weight', 'language_model.lm_head.weight'):
    return config.tie_embeddings
  eyes = r'(model\.)?(vision_tower|multi_modal_projector)\.'
  return model_type == 'gemma3' and bool(re.match(eyes, name))
