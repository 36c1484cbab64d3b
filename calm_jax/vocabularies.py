"""Vocabularies: text to token ids and back, without TensorFlow.

Nothing here assumes which ids the special tokens have. Id 0 may be a word, and
any special token may be missing (None).
"""

from collections.abc import Iterable, Sequence
import hashlib
import json
import pathlib
from typing import Protocol

import tokenizers

TOKENIZER_FILE = 'tokenizer.json'
CONFIG_FILE = 'tokenizer_config.json'
_SPECIALS = ('bos_token', 'eos_token', 'pad_token', 'unk_token')


class Vocabulary(Protocol):
  """What the rest of the library asks of a vocabulary."""

  size: int
  pad_id: int | None
  bos_id: int | None
  eos_id: int | None
  unk_id: int | None

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without BOS or EOS."""

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns `encode` of each text, much faster than one at a time."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`, skipping BOS, EOS and padding."""

  def fingerprint(self) -> str:
    """Returns the SHA-256 of the vocabulary with its special ids."""


class TokenizersVocabulary:
  """A Hugging Face `tokenizer.json` with its special tokens by name."""

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    unk_token: str | None = None,
  ):
    """Wraps `tokenizer`, which from now on neither truncates nor pads.

    Args:
      tokenizer: a tokenizer of the `tokenizers` library.
      bos_token: text of the token that begins a sequence, if there is one.
      eos_token: text of the token that ends a sequence, if there is one.
      pad_token: text of the padding token, if there is one.
      unk_token: text of the token for unknown words, if there is one.

    Raises:
      ValueError: if a special token is not in the tokenizer's vocabulary.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    self._tokenizer = tokenizer
    self._names = dict(
      zip(_SPECIALS, (bos_token, eos_token, pad_token, unk_token), strict=True)
    )
    # Not the count of tokens: ids may have holes, an embedding may not.
    self.size = 1 + max(tokenizer.get_vocab().values())
    self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
      self._special_id(role) for role in _SPECIALS
    )
    # The unknown token stays visible: without it a wrong answer could read
    # like a right one.
    self._skipped = {self.bos_id, self.eos_id, self.pad_id}

  def _special_id(self, role: str) -> int | None:
    token = self._names[role]
    if token is None:
      return None
    index = self._tokenizer.token_to_id(token)
    if index is None:
      raise ValueError(
        f'{role} is {token!r}, which is not among the {self.size} tokens of '
        f'the tokenizer; name one of its tokens in {CONFIG_FILE}, or null.'
      )
    return index

  @classmethod
  def from_directory(cls, path: str | pathlib.Path) -> 'TokenizersVocabulary':
    """Reads `tokenizer.json` and the token names in `tokenizer_config.json`.

    Args:
      path: a directory, as Hugging Face models are published.

    Returns:
      The vocabulary.

    Raises:
      ValueError: if a file is missing or malformed.
    """
    directory = pathlib.Path(path)
    text = _read(directory / TOKENIZER_FILE)
    try:
      tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises bare `Exception`.
      raise ValueError(
        f'{directory / TOKENIZER_FILE} is not a tokenizer that tokenizers '
        f'{tokenizers.__version__} can read ({error}); copy the file again, '
        'or install the version that wrote it.'
      ) from error
    config_file = directory / CONFIG_FILE
    try:
      config = json.loads(_read(config_file))
      names = {role: _token_text(config.get(role)) for role in _SPECIALS}
    except (json.JSONDecodeError, AttributeError, KeyError) as error:
      raise ValueError(
        f'{config_file} must be a JSON object in which {", ".join(_SPECIALS)} '
        "are a string, an object with 'content', or null; copy it again from "
        'the model, or correct it.'
      ) from error
    return cls(tokenizer, **names)

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes both files; `from_directory` reads them to the same thing."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    self._tokenizer.save(str(directory / TOKENIZER_FILE))
    config = json.dumps(self._names, indent=2, ensure_ascii=False)
    (directory / CONFIG_FILE).write_text(config + '\n', encoding='utf-8')

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    encodings = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode(
      [int(i) for i in ids if i not in self._skipped], skip_special_tokens=True
    )

  def fingerprint(self) -> str:
    tokenizer = json.loads(self._tokenizer.to_str())
    return _digest({'tokenizer': tokenizer, 'specials': _special_ids(self)})


class ByteVocabulary:
  """The 256 bytes of UTF-8 text, then BOS, EOS and padding."""

  size = 259
  bos_id = 256
  eos_id = 257
  pad_id = 258
  unk_id = None

  def encode(self, text: str) -> list[int]:
    return list(text.encode('utf-8'))

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in ids if i < 256).decode('utf-8', errors='replace')

  def fingerprint(self) -> str:
    return _digest({'tokenizer': 'bytes', 'specials': _special_ids(self)})


def word_vocabulary(
  words: Iterable[str],
  *,
  max_integer: int | None = None,
  bos_token: str | None = None,
  eos_token: str | None = '</s>',
  pad_token: str | None = '<pad>',
  unk_token: str = '<unk>',
) -> TokenizersVocabulary:
  """Builds a vocabulary in which whole words between spaces are tokens.

  Integers are cut into groups of three digits, most significant first, as in
  Llama 3: 25000 is '250', '##00'. The words come first, in their order, and the
  special tokens last, so id 0 is a word.

  Args:
    words: distinct words without spaces.
    max_integer: the largest integer that must not be unknown; None adds no
      integers.
    bos_token: text of the token that begins a sequence, or None.
    eos_token: text of the token that ends a sequence, or None.
    pad_token: text of the padding token, or None.
    unk_token: text of the token that any other word becomes.

  Returns:
    The vocabulary. `decode(encode(text)) == text` for single-spaced text.

  Raises:
    ValueError: if a word contains white space, is empty, or occurs twice.
  """
  specials = [bos_token, eos_token, pad_token, unk_token]
  tokens = list(words)
  if max_integer is not None:
    tokens += [str(i) for i in range(min(max_integer, 999) + 1)]
    if max_integer > 999:
      tokens += [f'##{i:0{n}}' for n in (1, 2, 3) for i in range(10**n)]
  tokens += [token for token in specials if token is not None]
  ids = {}
  for token in tokens:
    if token in ids or len(token.split()) != 1 or token != token.strip():
      raise ValueError(
        f'The word {token!r} is a duplicate, is empty, or contains white space;'
        ' words must be distinct and without white space, and differ from the '
        'integers and the special tokens. Remove or rename it.'
      )
    ids[token] = len(ids)
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordPiece(
      ids,
      unk_token=unk_token,
      max_input_chars_per_word=max(100, *map(len, ids)),
    )
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.decoder = tokenizers.decoders.WordPiece(prefix='##', cleanup=False)
  return TokenizersVocabulary(
    tokenizer,
    bos_token=bos_token,
    eos_token=eos_token,
    pad_token=pad_token,
    unk_token=unk_token,
  )


def _read(file: pathlib.Path) -> str:
  try:
    return file.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f'{file} cannot be read ({error}); a vocabulary is a directory with '
      f'{TOKENIZER_FILE} and {CONFIG_FILE}. Name the directory of the model, '
      'or convert its tokenizer to this form.'
    ) from error


def _token_text(entry: str | dict | None) -> str | None:
  """Returns the text of a token as `tokenizer_config.json` spells it."""
  return entry if entry is None or isinstance(entry, str) else entry['content']


def _special_ids(vocabulary: Vocabulary) -> list[int | None]:
  return [
    vocabulary.bos_id,
    vocabulary.eos_id,
    vocabulary.pad_id,
    vocabulary.unk_id,
  ]


def _digest(content: dict) -> str:
  text = json.dumps(content, sort_keys=True, ensure_ascii=True)
  return hashlib.sha256(text.encode('ascii')).hexdigest()
