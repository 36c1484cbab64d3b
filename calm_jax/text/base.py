"""What all kinds of vocabulary share: special tokens, chats, hashes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import hashlib
import json
import pathlib
from typing import Any

from calm_jax.text import chat_templates
from calm_jax.text import settings as settings_lib


class BaseVocabulary:
  """Special ids and chats; a subclass encodes and decodes.

  Attributes:
    size: 1 + the highest id.
    bos_id: what the model's own tokenizer puts before every text, if anything.
    eos_id: what ends a text, if anything.
    eos_ids: every id that ends a generated text; `eos_id` first.
    pad_id: padding, if there is a token for it.
    unk_id: what stands for the unknown, if anything.
    ends_with_eos: whether the model's own tokenizer appends EOS to every text,
      as those of encoders do.
    split_special_tokens: whether the text of a special token is encoded like
      any other text, instead of as that token.
  """

  size: int
  bos_id: int | None = None
  eos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None
  unk_id: int | None = None
  ends_with_eos: bool = False
  split_special_tokens: bool = False
  settings: settings_lib.Settings = settings_lib.Settings()
  chat_templates: Mapping[str, str] = {}

  def _set_specials(
    self, ids: Mapping[str, int | None], *, add_bos: bool, add_eos: bool
  ) -> None:
    """Sets the special ids from those of the roles."""
    self.bos_id = ids['bos_token'] if add_bos else None
    self.eos_id = ids['eos_token']
    self.pad_id = ids['pad_token']
    self.unk_id = ids['unk_token']
    self.ends_with_eos = add_eos and self.eos_id is not None
    every = (self.eos_id, *self.settings.eos_ids)
    self.eos_ids = tuple(i for i in dict.fromkeys(every) if i is not None)

  def _set_split(self, split_special_tokens: bool | None) -> None:
    if split_special_tokens is None:
      split_special_tokens = self.settings.flag('split_special_tokens')
    self.split_special_tokens = bool(split_special_tokens)

  def encode(self, text: str) -> list[int]:
    raise NotImplementedError

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def apply_chat_template(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    template: str | None = None,
    **variables: Any,
  ) -> str:
    """Returns a conversation as the text that the model was trained on.

    As in transformers, a special token spelled out in a message is encoded as
    that token. Refuse such messages first if their writers are not trusted.

    Args:
      messages: objects with 'role' and 'content', as the template wants them.
      add_generation_prompt: whether the text ends where the model answers.
      template: name of a template, where the model has several.
      **variables: anything else that the template reads, such as `tools`.

    Raises:
      ValueError: if there is no such template, if it refuses the messages, or
        if it tries what a template may not; see `calm_jax.text.chat_process`.
    """
    return chat_templates.render(
      self.chat_templates,
      template,
      {
        **self.settings.names,
        'tools': None,
        'documents': None,
        'messages': list(messages),
        'add_generation_prompt': add_generation_prompt,
        **variables,
      },
    )

  def encode_chat(
    self, messages: Sequence[Mapping[str, Any]], **settings: Any
  ) -> list[int]:
    """Returns the ids of `apply_chat_template`, to be used as they are.

    A template writes BOS itself where the model wants it, so none is added.
    """
    return self.encode(self.apply_chat_template(messages, **settings))

  def _fingerprint(self, tokenizer: Any) -> str:
    """Returns the SHA-256 over a tokenizer and the special ids."""
    specials = [self.bos_id, self.eos_id, self.pad_id, self.unk_id]
    content = {'tokenizer': tokenizer, 'specials': specials}
    if self.split_special_tokens:
      content['split_special_tokens'] = True
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode('ascii')).hexdigest()

  def _save_settings(
    self,
    directory: str | pathlib.Path,
    token_of: Callable[[int], str],
    **changes: Any,
  ) -> pathlib.Path:
    """Writes tokenizer_config.json, and what it has no place for.

    Args:
      directory: made if need be.
      token_of: returns the text of an id; names what only had an id.
      **changes: of the settings as they were read.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {**self.settings.config, **changes}
    for role in settings_lib.ROLES:
      index = getattr(self, role.replace('_token', '_id'))
      if config.get(role) is None and index is not None:
        config[role] = self.settings.names.get(role) or token_of(index)
    if self.split_special_tokens:
      config['split_special_tokens'] = True
    if self.chat_templates:
      config['chat_template'] = chat_templates.as_setting(self.chat_templates)
    _write_json(directory / settings_lib.CONFIG_FILE, config)
    generation = directory / settings_lib.GENERATION_FILE
    if len(self.eos_ids) > 1 and not generation.exists():
      _write_json(generation, {'eos_token_id': list(self.eos_ids)})
    return directory


def with_bos(vocabulary: BaseVocabulary, ids: Iterable[int]) -> list[int]:
  """Returns `ids` after BOS, if the model wants one and they have none yet.

  A chat template writes it itself.
  """
  ids, bos_id = list(ids), vocabulary.bos_id
  return ids if bos_id is None or ids[:1] == [bos_id] else [bos_id, *ids]


def _write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
  text = json.dumps(content, indent=2, ensure_ascii=False)
  file.write_text(text + '\n', encoding='utf-8')
