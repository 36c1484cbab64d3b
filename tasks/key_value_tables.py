"""The key-value task in plain numpy: sizes, tables, expressions, vocabulary.

The key-value arithmetic of Bansal et al. (arXiv 2401.02412, section 4.1): an
augmenting model knows which value each key has, an anchor can calculate, and
their composition must calculate with keys. Values may also stand for
themselves, in the tasks that the anchor knows.

Everything follows from `KeyValueConfig.seed`, through generators that are named
by their purpose.
"""

from collections.abc import Sequence
import dataclasses
import functools
import string
from typing import NamedTuple
import zlib

import numpy as np
import tokenizers

from calm_jax import vocabularies

SYMBOLS = ('+', '-', 'x', '=', '->', ';', ',', '.', '|')
NEUTRAL_WORDS = tuple(
  """
  about after again air all along also always and answer any are around ask away
  back because been before began being below between big book both boy but call
  came can car change children city close come could country cut day did do down
  each earth eat end enough even every eye face family far father feet few find
  first follow food for form found four from get girl give go good great group
  """.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValueConfig:
  """The size of the task, as plain data.

  Attributes:
    num_keys: how many keys there are.
    max_value: values are the integers from 1 to this, each held by equally many
      keys. With as many keys as values they are a permutation.
    operators: those of '+', '-' and 'x' that expressions use.
    min_operands: the fewest operands of an expression.
    max_operands: the most.
    min_letters: the fewest letters of a key.
    max_letters: the most.
    held_in_fraction: the share of keys that D_C may use.
    pairs_per_row: how many pairs a row of `key_value_pairs` has.
    parts_per_row: how many parts a row of `neutral_text` has.
    evaluation_examples: how many examples each evaluation split has.
    seed: what all follows from.
  """

  num_keys: int
  max_value: int
  operators: tuple[str, ...]
  min_operands: int
  max_operands: int
  min_letters: int = 2
  max_letters: int = 6
  held_in_fraction: float = 0.2
  pairs_per_row: int = 8
  parts_per_row: int = 2
  evaluation_examples: int = 1000
  seed: int = 0


SIZES = {
  'quick': KeyValueConfig(
    num_keys=3_000,
    max_value=99,
    operators=('+', '-'),
    min_operands=2,
    max_operands=3,
  ),
  'paper': KeyValueConfig(
    num_keys=25_000,
    max_value=25_000,
    operators=('+', '-', 'x'),
    min_operands=3,
    max_operands=6,
  ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """What operands stand for: key i is the word keys[i], worth values[i].

  Attributes:
    keys: the words.
    values: the value of each; Python's integers, as products have no limit.
    held_in: [num_keys] bool, which of them D_C may use.
  """

  keys: Sequence[str]
  values: Sequence[int]
  held_in: np.ndarray

  @functools.cached_property
  def value_words(self) -> list[str]:
    return [str(value) for value in self.values]


class Expression(NamedTuple):
  """Operands and the operators between them.

  Attributes:
    operands: indices of keys, or integers that stand for themselves.
    operators: one fewer than the operands.
  """

  operands: tuple[int, ...]
  operators: tuple[str, ...]

  def text(self, words: Sequence[str]) -> str:
    """Returns the expression, with `words[operand]` for each operand."""
    parts = [words[self.operands[0]]]
    for operator, operand in zip(
      self.operators, self.operands[1:], strict=True
    ):
      parts += (operator, words[operand])
    return ' '.join(parts)

  def value(self, values: Sequence[int]) -> int:
    """Returns the result, by standard precedence, with `values[operand]`."""
    total, sign, term = 0, 1, values[self.operands[0]]
    for operator, operand in zip(
      self.operators, self.operands[1:], strict=True
    ):
      if operator == 'x':
        term *= values[operand]
      else:
        total += sign * term
        sign, term = (1 if operator == '+' else -1), values[operand]
    return total + sign * term


def generator(
  config: KeyValueConfig, purpose: str, *numbers: int
) -> np.random.Generator:
  """Returns numpy's generator of one purpose, independent of all others."""
  return np.random.default_rng(
    (config.seed, zlib.crc32(purpose.encode()), *numbers)
  )


@functools.cache
def table(config: KeyValueConfig) -> Table:
  """Draws keys, values and the held-in keys."""
  lengths = np.arange(config.min_letters, config.max_letters + 1)
  if not 0 < 2 * config.num_keys <= np.sum(26.0**lengths):
    raise ValueError(
      f'num_keys={config.num_keys} with {config.min_letters} to '
      f'{config.max_letters} letters: take at least one key, at most half of '
      'what the letters allow, or more letters.'
    )
  rng = generator(config, 'keys')
  taken = {*SYMBOLS, *NEUTRAL_WORDS}
  keys = {}  # A set that keeps its order.
  while len(keys) < config.num_keys:
    sizes = rng.choice(lengths, config.num_keys)
    letters = rng.integers(
      ord('a'), ord('z') + 1, (config.num_keys, lengths[-1])
    )
    for row, size in zip(letters.astype(np.uint8), sizes, strict=True):
      key = row[:size].tobytes().decode('ascii')
      if key not in taken and len(keys) < config.num_keys:
        keys[key] = None
  values = np.resize(np.arange(1, config.max_value + 1), config.num_keys)
  order = generator(config, 'held_in').permutation(config.num_keys)
  held_in = np.zeros(config.num_keys, bool)
  held_in[order[: round(config.held_in_fraction * config.num_keys)]] = True
  return Table(
    keys=list(keys),
    values=generator(config, 'values').permutation(values).tolist(),
    held_in=held_in,
  )


@functools.cache
def integer_table(config: KeyValueConfig) -> Table:
  """Returns the table in which every integer from 0 stands for itself."""
  values = range(config.max_value + 1)
  return Table(
    keys=[str(value) for value in values],
    values=values,
    held_in=np.zeros(len(values), bool),
  )


@functools.cache
def vocabulary(
  config: KeyValueConfig,
) -> vocabularies.TokenizersVocabulary:
  """Returns the vocabulary: symbols, neutral words, keys, then integers."""
  if 'x' in config.operators:
    largest = config.max_value**config.max_operands
  else:
    largest = config.max_value * config.max_operands
  words = (*SYMBOLS, *NEUTRAL_WORDS, *table(config).keys)
  return vocabularies.word_vocabulary(words, max_integer=largest)


@functools.cache
def pieces_vocabulary(
  config: KeyValueConfig,
) -> vocabularies.TokenizersVocabulary:
  """Returns another vocabulary for the same texts, in which keys are cut.

  A byte-pair encoding that marks the last piece of a word, as GPT-1's does. A
  key of two or three letters is one token; of a longer one the last three or
  four letters are, after single letters. An integer is one token up to 999, and
  above that one for its last three digits after single digits.
  """
  end = '</w>'
  largest = min(config.max_value * config.max_operands, 999)
  words = [*SYMBOLS, *map(str, range(largest + 1))]
  kept = {(word, len(word)) for word in words}
  kept |= {(key, (len(key) + 3) // 2) for key in table(config).keys}
  endings = {word[-n:] for word, size in kept for n in range(2, size + 1)}
  merges = [
    (ending[0], ending[1:] + end)
    for ending in sorted(endings, key=lambda ending: (len(ending), ending))
  ]
  characters = sorted(
    {*string.ascii_lowercase, *string.digits, *''.join(SYMBOLS)}
  )
  tokens = [*characters, *(c + end for c in characters), *map(''.join, merges)]
  tokens += ['</s>', '<pad>', '<unk>']
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={token: index for index, token in enumerate(tokens)},
      merges=merges,
      unk_token='<unk>',
      end_of_word_suffix=end,
    )
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.decoder = tokenizers.decoders.BPEDecoder(suffix=end)
  return vocabularies.TokenizersVocabulary(
    tokenizer, eos_token='</s>', pad_token='<pad>', unk_token='<unk>'
  )
