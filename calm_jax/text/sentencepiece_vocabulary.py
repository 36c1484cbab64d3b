"""A SentencePiece model, through the library `sentencepiece`."""

from collections.abc import Iterable, Mapping
import hashlib
import pathlib

import sentencepiece
import tokenizers

from calm_jax.text import added_tokens, base, chat_templates, ends, files
from calm_jax.text import settings as settings_lib
from calm_jax.text.settings import Settings

MODEL_FILES = ('tokenizer.model', 'spiece.model')
_T5_TYPES = ('t5', 'mt5', 'umt5')
_SPACE = '\N{LOWER ONE EIGHTH BLOCK}'
# ModelProto.normalizer_spec.add_dummy_prefix = false. Messages of protobuf
# that follow each other are merged, the last value of a field counts.
_NO_PREFIX = b'\x1a\x02\x18\x00'


class SentencePieceVocabulary(base.BaseVocabulary):
  """A SentencePiece model with the special tokens named beside it.

  Text goes through SentencePiece itself. Special tokens are cut out before, as
  transformers does; text behind one begins with a space of its own only for T5
  and where tokenizer_config.json says `legacy`.
  """

  def __init__(
    self,
    model: bytes,
    *,
    settings: Settings | None = None,
    file_name: str = MODEL_FILES[0],
    split_special_tokens: bool | None = None,
  ):
    """Wraps a serialized model.

    Args:
      model: the bytes of its file.
      settings: what is said beside it.
      file_name: what `save` calls it.
      split_special_tokens: see `BaseVocabulary`; None does as the settings say.

    Raises:
      ValueError: if it is no SentencePiece model, or a special token is not in
        it.
    """
    self._model = model
    self._file_name = file_name
    self.settings = settings or Settings()
    self._processor = _processor(model, file_name)
    # Whether it puts a space before texts, and what encodes text behind tokens.
    pieces = self._processor.encode('a', out_type=str)
    self._has_prefix = ''.join(pieces).startswith(_SPACE)
    self._later = self._processor
    is_t5 = _is_t5(self.settings)
    if not is_t5 and not self.settings.flag('legacy'):
      self._later = _processor(model + _NO_PREFIX, file_name)
    self._pieces = self._processor.get_piece_size()
    tokens = self._added_tokens(extra_ids=100 if is_t5 else 0)
    self._added = added_tokens.AddedTokens(tokens)
    self._names = {index: token.content for index, token in tokens.items()}
    self.size = 1 + max(self._pieces - 1, *tokens)
    ids = self._role_ids()
    told = [self.settings.flag(f'add_{end}_token') for end in ('bos', 'eos')]
    self._set_specials(
      ids,
      add_bos=not is_t5 if told[0] is None else told[0],
      add_eos=is_t5 if told[1] is None else told[1],
    )
    self._set_split(split_special_tokens)
    special = {i for i, token in tokens.items() if token.special}
    special |= {i for i in ids.values() if i is not None}
    self._special = frozenset({*special, *self.eos_ids})

  @classmethod
  def from_directory(
    cls,
    path: str | pathlib.Path,
    *,
    split_special_tokens: bool | None = None,
  ) -> 'SentencePieceVocabulary':
    """Reads `tokenizer.model` or `spiece.model` and the settings beside it.

    Args:
      path: the directory of a model.
      split_special_tokens: see `BaseVocabulary`; None does as the files say.

    Raises:
      ValueError: if a file is missing or malformed.
    """
    directory = pathlib.Path(path)
    names = [name for name in MODEL_FILES if files.exists(directory / name)]
    name = (names or MODEL_FILES)[0]
    model = files.read_bytes(directory / name)
    settings = settings_lib.read_settings(directory)
    vocabulary = cls(
      model,
      settings=settings,
      file_name=name,
      split_special_tokens=split_special_tokens,
    )
    vocabulary.chat_templates = chat_templates.read_templates(
      directory, settings.config
    )
    return vocabulary

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes the model and tokenizer_config.json."""
    directory = self._save_settings(directory, self._processor.id_to_piece)
    (directory / self._file_name).write_bytes(self._model)

  def _added_tokens(self, extra_ids: int) -> dict[int, tokenizers.AddedToken]:
    """Returns the tokens that are cut out of a text, by id."""
    model, settings = self._processor, self.settings
    extra_ids = settings.extra_ids(extra_ids)
    tokens = {
      i: _special(model.id_to_piece(i))
      for i in range(self._pieces)
      if model.is_control(i) or model.is_unknown(i)
    }
    # The last of T5's sentinels comes first.
    tokens |= {
      self._pieces + extra_ids - 1 - n: _special(f'<extra_id_{n}>')
      for n in range(extra_ids)
    }
    tokens |= settings.added
    known = {token.content for token in tokens.values()}
    for name in settings.names.values():
      index = model.piece_to_id(name)
      if name not in known and model.id_to_piece(index) == name:
        tokens[index] = _special(name)
    return tokens

  def _role_ids(self) -> Mapping[str, int | None]:
    """Returns the ids by name, else the model's own, else config.json's."""

    def id_of(name):
      index = self._processor.piece_to_id(name)
      is_piece = self._processor.id_to_piece(index) == name
      return self._added.ids.get(name, index if is_piece else None)

    ids = self.settings.special_ids(id_of, self.size)
    for role in settings_lib.ROLES:
      own = getattr(self._processor, role.replace('_token', '_id'))()
      if role not in self.settings.names and own >= 0:
        ids[role] = own
    return ids

  def _stretches(self, text: str):
    """Yields (start, end, id of a token, or None and the model to use)."""
    stretches = self._added.split(text)
    if self.split_special_tokens:
      stretches = [(0, len(text), None)]
    for start, end, token in stretches:
      yield start, end, token, self._later if start else self._processor

  def encode(self, text: str) -> list[int]:
    ids = []
    for start, end, token, model in self._stretches(text):
      ids += model.encode(text[start:end]) if token is None else [token]
    return ids

  def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
    found = []  # An id with its span and bytes, for each token.
    for start, end, token, model in self._stretches(text):
      if token is not None:
        found.append((token, (start, end), None))
        continue
      proto = model.encode(text[start:end], out_type='immutable_proto')
      for piece in proto.pieces:
        span = (start + piece.begin, start + piece.end)
        found.append((piece.id, span, self.token_bytes(piece.id)))
    ids, spans, token_bytes = zip(*found, strict=True) if found else ((),) * 3
    return list(ids), ends.ends_of(text, spans=spans, token_bytes=token_bytes)

  def token_bytes(self, index: int) -> bytes | None:
    index, model = int(index), self._processor
    if index in self._special or not 0 <= index < self.size:
      return None
    if index in self._names:
      return self._names[index].encode('utf-8')
    if index >= self._pieces:
      return None
    if model.is_control(index) or model.is_unknown(index):
      return None
    piece = model.id_to_piece(index)
    if model.is_byte(index):
      return bytes([int(piece[3:-1], 16)])
    return piece.replace(_SPACE, ' ').encode('utf-8')

  def decode(self, ids: Iterable[int]) -> str:
    # The unknown token stays visible: without it a wrong answer could read
    # like a right one.
    unknown = self._processor.id_to_piece(self._processor.unk_id())
    text = b''.join(
      unknown.encode() if i == self.unk_id else self.token_bytes(i) or b''
      for i in ids
    ).decode('utf-8', errors='replace')
    return text.removeprefix(' ') if self._has_prefix else text

  def fingerprint(self) -> str:
    return self._fingerprint(
      {
        'sentencepiece': hashlib.sha256(self._model).hexdigest(),
        'added': sorted(self._added.ids.items()),
        'prefix_behind_tokens': self._later is self._processor,
      }
    )


def _is_t5(settings: Settings) -> bool:
  name = settings.tokenizer_class.removesuffix('Tokenizer').lower()
  return (name or settings.model_type) in _T5_TYPES


def _special(content: str) -> tokenizers.AddedToken:
  return tokenizers.AddedToken(content, special=True, normalized=False)


def _processor(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
  try:
    if not model:
      raise ValueError('it is empty')
    return sentencepiece.SentencePieceProcessor(model_proto=model)
  except Exception as error:  # RuntimeError, or what protobuf raises.
    raise ValueError(
      f'{name} is no SentencePiece model ({error}). Llama 3 publishes a file '
      'of this name in a format of its own: take the directory that has a '
      'tokenizer.json. Otherwise copy the file again from the model.'
    ) from error
