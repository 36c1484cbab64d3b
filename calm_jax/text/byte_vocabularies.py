"""Vocabularies whose tokens are the bytes of UTF-8 text."""

from collections.abc import Iterable
import itertools
import pathlib

import tokenizers

from calm_jax.text import added_tokens, base, chat_templates
from calm_jax.text import settings as settings_lib
from calm_jax.text.settings import Settings


class ByteVocabulary(base.BaseVocabulary):
  """The 256 bytes of UTF-8 text, then BOS, EOS and padding.

  No text is a special token.
  """

  tokenizer_class = 'ByteVocabulary'
  size = 259
  bos_id = 256
  eos_id = 257
  eos_ids = (257,)
  pad_id = 258
  _added = added_tokens.AddedTokens({})
  # The id of byte 0, and what becomes of bytes that are no text.
  _offset = 0
  _errors = 'replace'

  @classmethod
  def from_directory(
    cls,
    path: str | pathlib.Path,
    *,
    split_special_tokens: bool | None = None,
  ) -> 'ByteVocabulary':
    """Returns the vocabulary; there is nothing to read."""
    del path, split_special_tokens
    return cls()

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes the settings by which `load_vocabulary` knows the kind."""
    names = {index: name for name, index in self._added.ids.items()}
    self._save_settings(
      directory, names.get, tokenizer_class=self.tokenizer_class
    )

  def encode(self, text: str) -> list[int]:
    return [byte + self._offset for byte in text.encode('utf-8')]

  def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
    ids = self.encode(text)
    return ids, list(range(1, len(ids) + 1))

  def token_bytes(self, index: int) -> bytes | None:
    byte = int(index) - self._offset
    return bytes([byte]) if 0 <= byte < 256 else None

  def decode(self, ids: Iterable[int]) -> str:
    text = b''.join(
      b'<unk>' if i == self.unk_id else self.token_bytes(i) or b'' for i in ids
    )
    return text.decode('utf-8', errors=self._errors)

  def fingerprint(self) -> str:
    return self._fingerprint('bytes')


class ByT5Vocabulary(ByteVocabulary):
  """ByT5's layout: padding, EOS, unknown, the 256 bytes, then sentinels."""

  tokenizer_class = 'ByT5Tokenizer'
  _offset = 3
  _errors = 'ignore'

  def __init__(
    self,
    settings: Settings | None = None,
    *,
    split_special_tokens: bool | None = None,
  ):
    """Makes the vocabulary.

    Args:
      settings: as published with a model; by default those of ByT5 itself.
      split_special_tokens: see `BaseVocabulary`.

    Raises:
      ValueError: if the settings name a token that is not there.
    """
    self.settings = settings or Settings()
    tokens = _byt5_tokens(self.settings.extra_ids(125))
    tokens |= self.settings.added
    self._added = added_tokens.AddedTokens(tokens)
    self.size = 1 + max(258, *tokens)
    ids = self.settings.special_ids(self._added.ids.get, self.size)
    for role, index in (('pad_token', 0), ('eos_token', 1), ('unk_token', 2)):
      ids[role] = index if ids[role] is None else ids[role]
    self._set_specials(ids, add_bos=False, add_eos=True)
    self._set_split(split_special_tokens)

  @classmethod
  def from_directory(
    cls,
    path: str | pathlib.Path,
    *,
    split_special_tokens: bool | None = None,
  ) -> 'ByT5Vocabulary':
    """Reads tokenizer_config.json; ValueError if it is malformed."""
    directory = pathlib.Path(path)
    settings = settings_lib.read_settings(directory)
    vocabulary = cls(settings, split_special_tokens=split_special_tokens)
    vocabulary.chat_templates = chat_templates.read_templates(
      directory, settings.config
    )
    return vocabulary

  def encode(self, text: str) -> list[int]:
    return self.encode_with_ends(text)[0]

  def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
    if self.split_special_tokens:
      return super().encode(text), list(range(1, len(text.encode()) + 1))
    ids, lengths = [], []
    for start, end, token in self._added.split(text):
      encoded = super().encode(text[start:end])
      ids += encoded if token is None else [token]
      lengths += [1] * len(encoded) if token is None else [len(encoded)]
    return ids, list(itertools.accumulate(lengths))

  def fingerprint(self) -> str:
    return self._fingerprint(['byt5', sorted(self._added.ids.items())])


def _byt5_tokens(extra_ids: int) -> dict[int, tokenizers.AddedToken]:
  """Returns ByT5's special tokens, in the order of transformers."""
  roles = [
    tokenizers.AddedToken(name, lstrip=True, rstrip=True, special=True)
    for name in ('<pad>', '</s>', '<unk>')
  ]
  sentinels = [
    tokenizers.AddedToken(f'<extra_id_{n}>', special=True)
    for n in range(extra_ids)
  ]
  return dict(enumerate(roles)) | dict(enumerate(sentinels, start=3 + 256))
