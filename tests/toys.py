"""Toy weights, vocabularies and model directories that need no compiling."""

import functools
import zlib

from flax import linen as nn
import jax
import numpy as np

from calm_jax import trees, vocabularies
from calm_jax.models import pretrained

TABLE_STDDEV = 0.3


@functools.cache
def boxed_shapes(model):
  """Shapes of all parameters, with their logical axes."""
  return jax.eval_shape(model.init_params, jax.random.key(0))


def params(model, *, seed=0, zero_output=False):
  """Numpy weights of a `ComposedLM` or `DecoderLM`, by name.

  A jitted init takes ten seconds to compile for what is a few random arrays.
  """

  def one(name, leaf):
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith('scale'):
      array = 1 + 0.1 * rng.normal(size=leaf.shape)
    elif name.endswith('table'):
      array = TABLE_STDDEV * rng.normal(size=leaf.shape)
    elif zero_output and name.startswith('composition/') and '/out/' in name:
      array = np.zeros(leaf.shape)
    elif name.endswith('bias'):
      array = 0.1 * rng.normal(size=leaf.shape)
    else:
      array = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2])
    return array.astype(leaf.dtype)

  shapes = trees.flatten(nn.unbox(boxed_shapes(model)))
  return trees.unflatten({k: one(k, leaf) for k, leaf in shapes.items()})


def vocabulary(size, **settings):
  """Words 'a0', 'a1', ... and the special tokens, `size` in all."""
  specials = 3 + bool(settings.get('bos_token'))
  words = [f'a{i}' for i in range(size - specials)]
  return vocabularies.word_vocabulary(words, **settings)


def model_directory(directory, config, *, seed=0, words=None):
  """Writes a donor with random weights; returns its fingerprint."""
  from calm_jax.models import transformer

  return pretrained.write_model(
    directory,
    config=config,
    params=params(transformer.DecoderLM(config), seed=seed),
    vocabulary=words or vocabulary(config.vocab_size),
  )


class PieceVocabulary:
  """Pieces of text, the longest that fits first; then BOS, EOS and unknown."""

  def __init__(self, pieces, *, bos=True, ends_with_eos=False):
    self._pieces = [piece.encode() for piece in pieces]
    self.size = len(pieces) + 3
    self.bos_id = len(pieces) if bos else None
    self.eos_id, self.unk_id, self.pad_id = self.size - 2, self.size - 1, None
    self.eos_ids, self.ends_with_eos = (self.eos_id,), ends_with_eos

  def encode_with_ends(self, text):
    rest, ids, ends = text.encode(), [], []
    total = len(rest)
    while rest:
      fits = [p for p in self._pieces if rest.startswith(p)]
      piece = max(fits, key=len, default=rest[:1])
      ids.append(self._pieces.index(piece) if fits else self.unk_id)
      rest = rest[len(piece) :]
      ends.append(total - len(rest))
    return ids, ends

  def encode(self, text):
    return self.encode_with_ends(text)[0]

  def encode_batch(self, texts):
    return [self.encode(text) for text in texts]

  def token_bytes(self, index):
    return self._pieces[index] if index < len(self._pieces) else None

  def decode(self, ids):
    pieces = [self.token_bytes(i) or b'' for i in ids]
    return b''.join(pieces).decode(errors='replace')

  def fingerprint(self):
    return repr((self._pieces, self.bos_id, self.ends_with_eos))


class IdVocabulary:
  """Every id is a token, spelled ` 7`; none is special but what is named."""

  def __init__(self, *, eos_ids=(), bos_id=None):
    self.eos_ids, self.bos_id, self.pad_id = tuple(eos_ids), bos_id, 7
    self.eos_id, self.unk_id = next(iter(eos_ids), None), None

  def token_bytes(self, index):
    return f' {index}'.encode()

  def decode(self, ids):
    return ' '.join(map(str, ids))
