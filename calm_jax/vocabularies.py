"""Vocabularies: text to token ids and back, without TensorFlow.

Nothing here assumes which ids the special tokens have. Id 0 may be a word, and
any special token may be missing (None). `calm_jax.text` holds the kinds.
"""

from collections.abc import Iterable, Mapping, Sequence
import pathlib
from typing import Any, Protocol

import tokenizers

from calm_jax.text import (
  base,
  files,
  sentencepiece_vocabulary,
  tokenizers_vocabulary,
)
from calm_jax.text import settings as settings_lib
from calm_jax.text.byte_vocabularies import ByT5Vocabulary, ByteVocabulary
from calm_jax.text.sentencepiece_vocabulary import SentencePieceVocabulary
from calm_jax.text.tokenizers_vocabulary import TokenizersVocabulary

TOKENIZER_FILE = tokenizers_vocabulary.TOKENIZER_FILE
CONFIG_FILE = settings_lib.CONFIG_FILE
with_bos = base.with_bos


class Vocabulary(Protocol):
  """What the rest of the library asks of a vocabulary.

  `calm_jax.text.base.BaseVocabulary` says what the special ids mean.
  """

  size: int
  bos_id: int | None
  eos_id: int | None
  eos_ids: tuple[int, ...]
  pad_id: int | None
  unk_id: int | None
  ends_with_eos: bool

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without BOS or EOS.

    Special tokens spelled out in the text become those tokens, as in
    transformers, unless the vocabulary was loaded with split_special_tokens.
    """

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns `encode` of each text, much faster than one at a time."""

  def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
    """Returns `encode(text)`, and where in the text each token ends.

    An end is the number of UTF-8 bytes of the text that must be read to know
    the token. Ends never decrease; the last is the length of the text, or less
    if the tokenizer drops what follows.
    """

  def token_bytes(self, index: int) -> bytes | None:
    """Returns the bytes a token stands for in the middle of a text.

    A space before it counts as its own. None for special and unknown tokens,
    and for ids without a token.
    """

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`, skipping special tokens but the unknown."""

  def apply_chat_template(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
  ) -> str:
    """Returns a conversation as text; ValueError without a template."""

  def encode_chat(
    self, messages: Sequence[Mapping[str, Any]], **settings: Any
  ) -> list[int]:
    """Returns the ids of a conversation; BOS is there if the model wants it."""

  def fingerprint(self) -> str:
    """Returns the SHA-256 of the vocabulary with its special ids."""

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes files which `load_vocabulary` reads to the same thing."""


def load_vocabulary(
  path: str | pathlib.Path, *, split_special_tokens: bool | None = None
) -> Vocabulary:
  """Loads the tokenizer in a model's directory.

  Args:
    path: the directory. tokenizer.json is preferred to a SentencePiece model
      (tokenizer.model, spiece.model); bytes need only tokenizer_config.json.
    split_special_tokens: whether the text of a special token is encoded like
      any other text, for texts that are not trusted; None does as
      tokenizer_config.json says, which is seldom.

  Raises:
    ValueError: if there is no tokenizer, or a file of it is malformed.
  """
  directory = pathlib.Path(path)
  kinds = {TOKENIZER_FILE: TokenizersVocabulary} | dict.fromkeys(
    sentencepiece_vocabulary.MODEL_FILES, SentencePieceVocabulary
  )
  split = {'split_special_tokens': split_special_tokens}
  for name, kind in kinds.items():
    if files.exists(directory / name):
      return kind.from_directory(directory, **split)
  settings = settings_lib.read_settings(directory)
  for kind in (ByT5Vocabulary, ByteVocabulary):
    if settings.tokenizer_class == kind.tokenizer_class:
      return kind.from_directory(directory, **split)
  slow = files.exists(directory / 'vocab.json') and (
    ' It has a vocab.json: transformers turns that into a tokenizer.json by '
    'AutoTokenizer.from_pretrained(path).save_pretrained(path).'
  )
  raise ValueError(
    f'{directory} has no tokenizer: none of {", ".join(kinds)}, nor '
    f'{CONFIG_FILE} with the tokenizer_class {ByT5Vocabulary.tokenizer_class} '
    f'(it has {settings.tokenizer_class or "none"!r}). Copy the files from the '
    f'model.{slow or ""}'
  )


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
