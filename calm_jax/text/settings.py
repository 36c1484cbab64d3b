"""What the files beside a tokenizer say about its special tokens.

Published directories name them in several places: tokenizer_config.json (with
`added_tokens_decoder`), special_tokens_map.json, and as ids in config.json and
generation_config.json.
"""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any
import warnings

import tokenizers

from calm_jax.text import files

CONFIG_FILE = 'tokenizer_config.json'
GENERATION_FILE = 'generation_config.json'
ROLES = ('bos_token', 'eos_token', 'pad_token', 'unk_token')
_MAX_EXTRA_IDS = 10_000
# What generation_config.json may ask of decoding, and we do not do.
_NOT_DONE = {
  'repetition_penalty': 1.0,
  'no_repeat_ngram_size': 0,
  'min_length': 0,
  **dict.fromkeys(
    (
      'bad_words_ids',
      'begin_suppress_tokens',
      'forced_bos_token_id',
      'forced_eos_token_id',
      'min_new_tokens',
      'suppress_tokens',
    )
  ),
}
_TOKEN_FLAGS = ('lstrip', 'normalized', 'rstrip', 'single_word', 'special')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Special tokens and ways of a tokenizer, as its directory describes them.

  Attributes:
    names: text of each special token that has a name, by role; chat templates
      see them under these names.
    ids: id of each role that config.json or generation_config.json gives.
    eos_ids: every id that ends a text while generating.
    added: tokens that `added_tokens_decoder` adds to the tokenizer, by id.
    config: tokenizer_config.json as it stands.
    model_type: of config.json, if there is one.
  """

  names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
  eos_ids: tuple[int, ...] = ()
  added: Mapping[int, tokenizers.AddedToken] = dataclasses.field(
    default_factory=dict
  )
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  model_type: str | None = None

  @property
  def tokenizer_class(self) -> str:
    """The class that transformers would use, without the 'Fast' of old."""
    return str(self.config.get('tokenizer_class') or '').removesuffix('Fast')

  def flag(self, name: str) -> bool | None:
    """Returns a setting that is true or false; None if it is not given."""
    value = self.config.get(name)
    if value is not None and not isinstance(value, bool):
      raise ValueError(
        f'{CONFIG_FILE} has {name} = {value!r}; it must be true, false or null.'
      )
    return value

  def extra_ids(self, default: int) -> int:
    """Returns how many sentinels `<extra_id_0>`, ... there are."""
    count = self.config.get('extra_ids', default)
    if type(count) is not int or not 0 <= count <= _MAX_EXTRA_IDS:
      raise ValueError(
        f'{CONFIG_FILE} has extra_ids = {count!r}; it must be a number from 0 '
        f'to {_MAX_EXTRA_IDS}.'
      )
    return count

  def special_ids(
    self, id_of: Callable[[str], int | None], size: int
  ) -> dict[str, int | None]:
    """Returns the id of each role: by name, else as config.json says.

    Args:
      id_of: returns the id of a token, or None.
      size: of the vocabulary.

    Raises:
      ValueError: if a name or an id is not in the vocabulary.
    """
    found = {}
    for role in ROLES:
      name, index = self.names.get(role), self.ids.get(role)
      if name is not None:
        index = id_of(name)
        if index is None:
          raise ValueError(
            f'{role} is {name!r}, which is not among the {size} tokens of the '
            f'tokenizer; name one of its tokens in {CONFIG_FILE}, or null.'
          )
      found[role] = index
    for index in (*found.values(), *self.eos_ids):
      if index is not None and index >= size:
        raise ValueError(
          f'{index} is given as the id of a special token, and the tokenizer '
          f'has {size} tokens; correct it in config.json or {GENERATION_FILE}, '
          f'or name the token in {CONFIG_FILE}.'
        )
    return found


def read_settings(directory: pathlib.Path) -> Settings:
  """Reads all settings of a tokenizer; missing files say nothing.

  Raises:
    ValueError: if a file is malformed.
  """
  config = files.read_json(directory / CONFIG_FILE)
  token_map = files.read_json(directory / 'special_tokens_map.json')
  model = files.read_json(directory / 'config.json')
  generation = files.read_json(directory / GENERATION_FILE)
  asked = {
    name: generation[name]
    for name, neutral in _NOT_DONE.items()
    if generation.get(name) not in (None, [], neutral)
  }
  if asked:
    warnings.warn(
      f'{directory / GENERATION_FILE} asks for {asked}, which decoding here'
      ' does not do.'
    )
  names = {}
  for source, name in ((token_map, 'special_tokens_map.json'), (config, '')):
    where = directory / (name or CONFIG_FILE)
    for role, entry in source.items():
      is_token = role.endswith('_token') and not role.startswith('add_')
      if is_token and (text := _token_text(role, entry, where)) is not None:
        names[role] = text
  ids = {}
  # A model with vision keeps its language model's settings one level down.
  inner = model.get('text_config')
  for source in (generation, model, inner if isinstance(inner, dict) else {}):
    for role in ROLES:
      if found := _ids(role, source.get(f'{role}_id')):
        ids.setdefault(role, found)
  return Settings(
    names=names,
    ids={role: found[0] for role, found in ids.items()},
    eos_ids=ids.get('eos_token', ()),
    added=_added_tokens(directory, config, names),
    config=config,
    model_type=model.get('model_type'),
  )


def _token_text(role: str, entry: Any, file: pathlib.Path) -> str | None:
  """Returns the text of a token as `tokenizer_config.json` spells it."""
  text = entry.get('content') if isinstance(entry, dict) else entry
  if entry is None or isinstance(text, str):
    return text
  if role not in ROLES:
    return None
  raise ValueError(
    f'{file} has {role} = {entry!r}; {", ".join(ROLES)} must be a string, an '
    "object with 'content', or null. Copy it again from the model, or correct "
    'it.'
  )


def _ids(role: str, entry: Any) -> tuple[int, ...]:
  """Returns the ids in a field of config.json: one, a list of them, or none."""
  entries = entry if isinstance(entry, list) else [entry]
  # Early conversions of LLaMA say -1 where there is no such token.
  entries = [one for one in entries if one is not None and one != -1]
  for one in entries:
    if type(one) is not int or one < 0:
      raise ValueError(
        f'config.json or {GENERATION_FILE} has {role}_id = {entry!r}; it must '
        'be an id, a list of ids, or null.'
      )
  return tuple(entries)


def _added_tokens(
  directory: pathlib.Path, config: Mapping[str, Any], names: Mapping[str, str]
) -> dict[int, tokenizers.AddedToken]:
  """Reads `added_tokens_decoder`, or the added_tokens.json of older models."""
  file, entries = directory / CONFIG_FILE, config.get('added_tokens_decoder')
  try:
    if not entries:
      file = directory / 'added_tokens.json'
      entries = {
        str(index): {'content': content, 'special': content in names.values()}
        for content, index in files.read_json(file).items()
      }
    added = {}
    for index, entry in entries.items():
      flags = {name: entry[name] for name in _TOKEN_FLAGS if name in entry}
      if not index.isdecimal() or not entry['content']:
        raise ValueError(f'{index!r}: {entry!r}')
      added[int(index)] = tokenizers.AddedToken(entry['content'], **flags)
    if len({token.content for token in added.values()}) < len(entries):
      raise ValueError('a token or an id occurs twice')
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'{file} must give each added token one id from 0 on, and each id one '
      f'token ({error}). Copy the file again from the model.'
    ) from error
  return dict(sorted(added.items()))
