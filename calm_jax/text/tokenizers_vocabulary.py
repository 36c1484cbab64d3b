"""A Hugging Face `tokenizer.json`, through the library `tokenizers`."""

from collections.abc import Iterable, Sequence
import functools
import json
import pathlib
import re

import tokenizers

from calm_jax.text import base, chat_templates, ends, files
from calm_jax.text import settings as settings_lib
from calm_jax.text.settings import Settings

TOKENIZER_FILE = 'tokenizer.json'
_BYTE_TOKEN = re.compile('<0x([0-9A-Fa-f]{2})>')


class TokenizersVocabulary(base.BaseVocabulary):
  """A Hugging Face `tokenizer.json` with its special tokens by name.

  It does what the file says. `transformers` does too, but for the classes that
  it builds anew from tokens and merges alone, such as LlamaTokenizer: there the
  two may differ in texts that begin with a space or behind a special token.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    unk_token: str | None = None,
    settings: Settings | None = None,
    split_special_tokens: bool | None = None,
  ):
    """Wraps `tokenizer`, which from now on neither truncates nor pads.

    Args:
      tokenizer: a tokenizer of the `tokenizers` library.
      bos_token: text of the token that begins a sequence, if there is one.
      eos_token: text of the token that ends a sequence, if there is one.
      pad_token: text of the padding token, if there is one.
      unk_token: text of the token for unknown words, if there is one.
      settings: of a published tokenizer, instead of the four names. Then BOS
        counts only if the settings or the tokenizer put it before texts.
      split_special_tokens: see `BaseVocabulary`; None does as the settings say.

    Raises:
      ValueError: if a special token is not in the tokenizer's vocabulary.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    self._tokenizer = tokenizer
    names = (bos_token, eos_token, pad_token, unk_token)
    given = dict(zip(settings_lib.ROLES, names, strict=True))
    self._given = None if settings else given
    self.settings = settings or Settings(
      names={role: name for role, name in given.items() if name is not None}
    )
    _add_tokens(tokenizer, self.settings)
    vocabulary = tokenizer.get_vocab()
    # Not the count of tokens: ids may have holes, an embedding may not.
    self.size = 1 + max(vocabulary.values())
    if len(set(vocabulary.values())) < len(vocabulary):
      raise ValueError(
        f'{TOKENIZER_FILE} gives one id to several tokens, so that ids have no '
        'definite text. Copy the file again from the model.'
      )
    ids = self.settings.special_ids(tokenizer.token_to_id, self.size)
    add_bos, add_eos = (True, False)
    if settings:
      ids, add_bos, add_eos = _habits(tokenizer, settings, ids)
    self._set_specials(ids, add_bos=add_bos, add_eos=add_eos)
    self._set_split(split_special_tokens)
    tokenizer.encode_special_tokens = self.split_special_tokens
    added = tokenizer.get_added_tokens_decoder()
    special = {index for index, token in added.items() if token.special}
    special |= {index for index in ids.values() if index is not None}
    self._special = frozenset({*special, *self.eos_ids})
    # The unknown token stays visible: without it a wrong answer could read
    # like a right one. Some models have one token for this and for the end.
    ends_or_pads = {self.bos_id, self.pad_id, *self.eos_ids}
    self._visible = frozenset({self.unk_id} - ends_or_pads)
    self._bytes = {}  # What `token_bytes` has found.

  @classmethod
  def from_directory(
    cls,
    path: str | pathlib.Path,
    *,
    split_special_tokens: bool | None = None,
  ) -> 'TokenizersVocabulary':
    """Reads `tokenizer.json` and the settings beside it.

    Args:
      path: a directory, as Hugging Face models are published.
      split_special_tokens: see `BaseVocabulary`; None does as the files say.

    Returns:
      The vocabulary.

    Raises:
      ValueError: if a file is missing or malformed, or nothing says which
        tokens are special.
    """
    directory = pathlib.Path(path)
    tokenizer = _read_tokenizer(directory / TOKENIZER_FILE)
    settings = settings_lib.read_settings(directory)
    knows_eos = 'eos_token' in settings.names or settings.eos_ids
    if not settings.config and not knows_eos:
      raise ValueError(
        f'{directory / settings_lib.CONFIG_FILE} cannot be read: it is not '
        'there, and neither special_tokens_map.json nor config.json tells the '
        'end of a text. Copy it from the model, or write '
        '{"eos_token": ...} into it.'
      )
    vocabulary = cls(
      tokenizer, settings=settings, split_special_tokens=split_special_tokens
    )
    vocabulary.chat_templates = chat_templates.read_templates(
      directory, settings.config
    )
    return vocabulary

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes files which `from_directory` reads to the same thing."""
    changes = {}
    if self._given is not None:
      changes = dict(self._given)
      if self.bos_id is not None:
        changes['add_bos_token'] = True
    directory = self._save_settings(
      directory, self._tokenizer.id_to_token, **changes
    )
    self._tokenizer.save(str(directory / TOKENIZER_FILE))

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    encodings = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    token_bytes = [self.token_bytes(i) for i in encoding.ids]
    return encoding.ids, ends.ends_of(
      text, spans=encoding.offsets, token_bytes=token_bytes
    )

  def token_bytes(self, index: int) -> bytes | None:
    index = int(index)
    if not 0 <= index < self.size or index in self._special:
      return None
    if index not in self._bytes:
      token = self._tokenizer.id_to_token(index)
      self._bytes[index] = None if token is None else self._to_bytes(token)
    return self._bytes[index]

  def _to_bytes(self, token: str) -> bytes:
    """Returns what the decoder makes of `token` behind another one."""
    kinds = self._decoder_kinds
    if 'ByteLevel' in kinds:
      alphabet = _byte_alphabet()
      if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
      return token.encode('utf-8')
    byte = 'ByteFallback' in kinds and _BYTE_TOKEN.fullmatch(token)
    if byte:
      return bytes([int(byte[1], 16)])
    decoder = self._tokenizer.decoder
    if decoder is None:  # Then tokens are joined by spaces.
      return f' {token}'.encode()
    return decoder.decode(['a', token]).removeprefix('a').encode('utf-8')

  @functools.cached_property
  def _decoder_kinds(self) -> frozenset[str]:
    if self._tokenizer.decoder is None:
      return frozenset()
    state = json.loads(self._tokenizer.decoder.__getstate__())
    return frozenset(
      part['type'] for part in (state, *state.get('decoders', ()))
    )

  def decode(self, ids: Iterable[int]) -> str:
    skipped = self._special - self._visible
    return self._tokenizer.decode(
      [int(i) for i in ids if i not in skipped], skip_special_tokens=False
    )

  def fingerprint(self) -> str:
    return self._digest

  @functools.cached_property
  def _digest(self) -> str:  # It takes seconds for 262,144 tokens.
    return self._fingerprint(json.loads(self._tokenizer.to_str()))


def _read_tokenizer(file: pathlib.Path) -> tokenizers.Tokenizer:
  text = files.read_text(file)
  content = files.parse_json(text, file)
  try:
    tokenizer = tokenizers.Tokenizer.from_str(text)
  # The library raises bare `Exception`, and what is not even that if it panics.
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt | SystemExit):
      raise
    raise ValueError(
      f'{file} is not a tokenizer that tokenizers {tokenizers.__version__} can '
      f'read ({error}); copy the file again, or install the version that wrote '
      'it.'
    ) from error
  for token in content.get('added_tokens') or ():
    if tokenizer.token_to_id(token['content']) != token['id']:
      raise ValueError(
        f'{file} says that {token["content"]!r} has the id {token["id"]}, which'
        ' does not follow from its other tokens. Copy the file again from the '
        'model.'
      )
  if not tokenizer.get_vocab_size():
    raise ValueError(f'{file} has no tokens. Copy it again from the model.')
  return tokenizer


def _add_tokens(tokenizer: tokenizers.Tokenizer, settings: Settings) -> None:
  """Adds what `added_tokens_decoder` has beyond the tokenizer, in place."""
  there = {
    index: repr(token)
    for index, token in tokenizer.get_added_tokens_decoder().items()
  }
  for index, token in settings.added.items():
    if there.get(index) == repr(token):
      continue
    tokenizer.add_tokens([token])
    if tokenizer.token_to_id(token.content) != index:
      raise ValueError(
        f'{settings_lib.CONFIG_FILE} says that {token.content!r} has the id '
        f'{index}, and {TOKENIZER_FILE} gives it '
        f'{tokenizer.token_to_id(token.content)}. Copy both files again from '
        'one model.'
      )


def _habits(
  tokenizer: tokenizers.Tokenizer,
  settings: Settings,
  ids: dict[str, int | None],
) -> tuple[dict[str, int | None], bool, bool]:
  """Finds out whether a tokenizer begins texts with BOS and ends them with EOS.

  At each end the settings rule where they say so, else the tokenizer's
  post-processor.

  Returns:
    The ids, completed by what the post-processor adds, and the two answers.
  """
  told = [settings.flag(f'add_{end}_token') for end in ('bos', 'eos')]
  encoding = tokenizer.encode('a', add_special_tokens=True)
  texts = [i for i, s in enumerate(encoding.special_tokens_mask) if not s]
  first, stop = (texts[0], texts[-1] + 1) if texts else (0, 0)
  around = encoding.ids[:first], encoding.ids[stop:]
  ids, roles = dict(ids), ('bos_token', 'eos_token')
  for role, added, answer in zip(roles, around, told, strict=True):
    if answer is not None:
      continue
    if added and ids[role] is None:
      ids[role] = added[0]
    if len(added) > 1 or (added and added[0] != ids[role]):
      raise ValueError(
        f'The post-processor in {TOKENIZER_FILE} adds the tokens {added} to '
        f'each text, where {role} has the id {ids[role]}; one token is known. '
        f'Say add_bos_token and add_eos_token in {settings_lib.CONFIG_FILE}.'
      )
  adds_bos, adds_eos = (
    bool(added) if answer is None else answer
    for added, answer in zip(around, told, strict=True)
  )
  return ids, adds_bos, adds_eos


@functools.cache
def _byte_alphabet() -> dict[str, int]:
  """Returns the byte that each character of GPT-2's alphabet stands for.

  Printable Latin-1 characters stand for themselves; the other bytes, in their
  order, are the characters from U+0100 on.
  """
  visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in visible]
  return {chr(byte): byte for byte in visible} | {
    chr(256 + n): byte for n, byte in enumerate(others)
  }
