"""The fields of a `config.json`, each read once, with its type checked.

A field that is there and that nobody reads is an error: it may change the
computation. `HARMLESS` lists those known not to.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

LARGEST = 1e18  # of any number in a configuration
# Names and ids for the tokenizer, training, generation, and bookkeeping.
HARMLESS = frozenset(
  """
  _attn_implementation _attn_implementation_autoset _commit_hash
  _name_or_path _sliding_window_pattern architectures
  assistant_confidence_threshold
  attention_dropout attn_implementation bad_words_ids begin_suppress_tokens
  bos_token_id cache_implementation chunk_size_feed_forward
  classifier_dropout decoder_start_token_id diversity_penalty do_sample
  dropout_rate early_stopping encoder_no_repeat_ngram_size
  encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff
  exponential_decay_length_penalty finetuning_task forced_bos_token_id
  forced_eos_token_id gradient_checkpointing id2label is_llama_config
  keys_to_ignore_at_inference label2id length_penalty max_length
  max_position_embeddings min_length model_type n_positions name_or_path
  no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule
  num_beam_groups num_beams num_labels num_return_sequences
  output_attentions output_hidden_states output_past output_scores
  pad_token_id prefix pretraining_tp problem_type remove_invalid_values
  repetition_penalty resid_pdrop return_dict return_dict_in_generate
  sep_token_id suppress_tokens target_lookbehind task_specific_params
  temperature tf_legacy_loss tokenizer_class top_k top_p torchscript
  transformers.js_config transformers_version typical_p unsloth_fixed
  unsloth_version use_bfloat16 use_cache
  """.split()
)
# Fields with one value (or null) that changes nothing; any other would.
ONLY = {
  'add_cross_attention': False,
  'attention_bias': False,
  'attn_logit_softcapping': None,
  'auto_map': None,
  'cross_attention_hidden_size': None,
  'final_logit_softcapping': None,
  'is_decoder': False,
  'is_encoder_decoder': False,
  'mlp_bias': False,
  'partial_rotary_factor': 1.0,
  'per_layer_config': None,
  'pruned_heads': {},
  'quantization_config': None,
  'rope_interleaved': False,
  'sliding_window': None,
  'tie_encoder_decoder': False,
  'use_bidirectional_attention': False,
  'use_mrope': False,
  'use_sliding_window': False,
}


class Fields:
  """Typed reading of a mapping from JSON.

  Args:
    fields: names and values.
    where: the file, for errors.
    defaults: the value of each field that may be read, where it is absent.
  """

  def __init__(
    self,
    fields: Mapping[str, Any],
    *,
    where: str,
    defaults: Mapping[str, Any],
  ):
    if not isinstance(fields, Mapping):
      raise ValueError(f'{where} holds {fields!r}; expected a JSON object.')
    self.where = where
    self._fields = dict(fields)
    self._defaults = defaults

  def __contains__(self, name: str) -> bool:
    """Whether the family has such a field, be it in this file or not."""
    return name in self._defaults

  def refuse(self, name: str, value: Any, expected: str) -> NoReturn:
    """Raises the ValueError about one field."""
    raise ValueError(f'{self.where}: {name} = {value!r}: {expected}.')

  def pop(self, name: str) -> Any:
    """Returns a field of any type, or its default."""
    return self._fields.pop(name, self._defaults[name])

  def size(
    self,
    name: str,
    *,
    null: int | None = 0,
    least: int = 1,
    most: int = 2**31 - 1,
  ) -> Any:
    """Returns an integer; `null` stands for null, 0 if that is an error."""
    value = self.pop(name)
    if value is None and null != 0:
      return null
    if not _is_number(value) or value % 1 or not least <= value <= most:
      self.refuse(name, value, f'expected an integer from {least} to {most}')
    return int(value)

  def number(self, name: str, *, nullable: bool = False) -> Any:
    """Returns a positive number, or None where that is allowed."""
    value = self.pop(name)
    if value is None and nullable:
      return None
    if not _is_number(value) or value <= 0:
      self.refuse(name, value, 'expected a positive number')
    return float(value)

  def flag(self, name: str) -> bool:
    """Returns true or false; null is false."""
    value = self.pop(name)
    if value is not None and not isinstance(value, bool):
      self.refuse(name, value, 'expected true or false')
    return bool(value)

  def choice(
    self, name: str, allowed: Mapping[str, Any], *, nullable: bool = False
  ) -> Any:
    """Returns what `allowed` has for the field's value; None for null."""
    value = self.pop(name)
    if value is None and nullable:
      return None
    if not isinstance(value, str) or value not in allowed:
      self.refuse(name, value, f'supported are {sorted(allowed)}')
    return allowed[value]

  def words(
    self, name: str, *, count: int, allowed: Collection[str]
  ) -> Sequence[str] | None:
    """Returns a list of `count` words, or None for null."""
    value = self.pop(name)
    if value is None:
      return None
    if not isinstance(value, list) or len(value) != count:
      self.refuse(name, value, f'expected a list of {count} words')
    for word in value:
      if word not in allowed:
        self.refuse(name, word, f'supported are {sorted(allowed)}')
    return value

  def object(self, name: str) -> dict[str, Any] | None:
    """Returns a JSON object, or None for null."""
    value = self.pop(name)
    if value is not None and not isinstance(value, dict):
      self.refuse(name, value, 'expected an object or null')
    return value

  def finish(self, *, harmless: Collection[str] = ()):
    """Refuses every field that was not read and might change something.

    Args:
      harmless: those that change nothing in this family, besides HARMLESS.
    """
    for name, value in self._fields.items():
      if name in HARMLESS or name in harmless:
        continue
      if name in ONLY:
        one = ONLY[name]
        if value is not None and (
          value != one or isinstance(value, bool) != isinstance(one, bool)
        ):
          expected = 'null' if one is None else f'null or {one!r}'
          self.refuse(name, value, f'supported here is {expected} alone')
        continue
      self.refuse(
        name,
        value,
        'this field is not known here, and it may change the computation. If'
        ' it does not, remove it from the file',
      )


def _is_number(value: Any) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and -LARGEST <= value <= LARGEST  # not so for NaN
  )
