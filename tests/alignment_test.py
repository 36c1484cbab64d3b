"""Two vocabularies over one text. Run: pytest tests/alignment_test.py"""

import itertools

import numpy as np
import pytest

from calm_jax import alignment, batches
from calm_jax.tasks import key_value_tables
from tests import toys

ANCHOR = toys.PieceVocabulary(['ab', 'c', ' ', 'de', '+', 'abcde', 'x'])
# Other pieces, other ids: 'c ' crosses a border of the anchor, and nothing
# holds an x.
CODE = toys.PieceVocabulary(['c ', 'a', 'b', 'c', 'd', 'e', '+', ' ', 'de'])
TEXT = 'abc +de'


def reader(augmenting=CODE, **settings):
  settings = {'anchor_size': 12, **settings}
  return alignment.Reader(ANCHOR, augmenting, **settings)


def read(text, augmenting=CODE, **settings):
  _, ends = alignment.begin(ANCHOR, text)
  return reader(augmenting, **settings).read_prompt(text, anchor_ends=ends)


# --- Prompts -----------------------------------------------------------------


def test_a_position_is_read_once_its_bytes_are_consumed():
  ids, ends = alignment.begin(ANCHOR, TEXT)
  assert ANCHOR.decode(ids) == TEXT
  assert ends == [0, 2, 3, 4, 5, 7]  # BOS, ab, c, ' ', +, de
  ids, visible_from = read(TEXT)
  assert [CODE.token_bytes(i) for i in ids] == [
    None, b'a', b'b', b'c ', b'+', b'de'
  ]  # fmt: skip
  # 'a' ends inside 'ab'; 'c ' ends with the space.
  assert visible_from == [0, 1, 1, 3, 4, 5]


def test_special_tokens_read_no_byte():
  """BOS against none, both ways: the words stay where their bytes are."""
  bare = toys.PieceVocabulary(['a', 'b', 'c', 'de', '+', ' '], bos=False)
  assert read(TEXT, bare)[1] == [1, 1, 2, 3, 4, 5]
  _, ends = alignment.begin(bare, TEXT)
  back = alignment.Reader(bare, ANCHOR, anchor_size=9)
  ids, visible_from = back.read_prompt(TEXT, anchor_ends=ends)
  assert ids[0] == ANCHOR.bos_id
  assert visible_from == [0, 1, 2, 3, 4, 5]


def test_what_the_anchor_drops_is_read_at_its_last_position():
  """An anchor may drop trailing text; the other model need not."""
  ids, visible_from = reader().read_prompt('ab ', anchor_ends=[0, 2])
  assert len(ids) == 4 and visible_from == [0, 1, 1, 1]


def test_an_encoder_is_read_from_the_last_prompt_position():
  encoder = toys.PieceVocabulary(['a', 'b', 'c'], bos=False, ends_with_eos=True)
  ids, visible_from = read('abc', encoder, reads_targets=False)
  assert ids == [0, 1, 2, encoder.eos_id]
  assert visible_from == [2] * 4  # BOS, ab, c
  one = reader(encoder, reads_targets=False)
  assert one.read_targets([1, 2], start=3) == ([], [])
  assert one.count_too_long([5]) == 0
  with pytest.raises(ValueError, match='An encoder reads the text of a prompt'):
    one.read_tokens([0, 1])


# --- Targets -----------------------------------------------------------------


def test_a_vocabulary_without_spaces_loses_no_word():
  """Ends of words are marked there: ' 32' is '32</w>', as it is in a text."""
  config = key_value_tables.SIZES['quick']
  anchor = key_value_tables.vocabulary(config)
  pieces = key_value_tables.pieces_vocabulary(config)
  transcript = alignment.transcribe(anchor, pieces, size=anchor.size, most=8)
  assert not transcript.too_long_V.any()
  for text in ('10 + 22 - 3 = 29', ' -> '.join(key_value_tables.NEUTRAL_WORDS)):
    ids = itertools.chain(*map(transcript.of, anchor.encode(text)))
    assert list(ids) == pieces.encode(text)


def test_each_anchor_token_is_its_bytes():
  transcript = reader(most=9).transcript
  spelled = [
    b''.join(CODE.token_bytes(i) for i in transcript.of(token))
    for token in range(6)
  ]
  assert spelled == [b'ab', b'c', b' ', b'de', b'+', b'abcde']
  assert transcript.of(6) == [CODE.unk_id]  # x
  assert transcript.of(ANCHOR.bos_id) == [CODE.bos_id]
  assert transcript.of(ANCHOR.eos_id) == [CODE.eos_id]
  assert transcript.of(11) == []  # a row of the table without a token
  assert transcript.tokens_VR.shape == (12, 4)  # a, b, c, de


def test_tokens_without_an_embedding_have_no_row():
  """As the token for images that Gemma 3 1B has no embedding for."""
  transcript = reader(anchor_size=5).transcript
  assert transcript.tokens_VR.shape[0] == transcript.counts_V.size == 5
  assert transcript.of(0) == reader().transcript.of(0)


def test_bytes_that_the_tokenizer_changes_are_cut_by_the_longest():
  """As SentencePiece does, which puts a space before what is tokenized."""

  class Spaced(toys.PieceVocabulary):
    def encode_with_ends(self, text):
      return super().encode_with_ends(' ' + text)

  spaced = Spaced([' a', 'a', 'ab', ' ', 'b', 'é', 'c', 'd', 'e'])
  transcript = reader(spaced).transcript
  pieces = [spaced.token_bytes(i) for i in transcript.of(0)]
  assert pieces == [b'ab']
  half = toys.PieceVocabulary(['a'])
  half._pieces[0] = 'é'.encode()[:1]  # part of a character
  spelled = alignment.transcribe(half, spaced, size=4, most=4).of(0)
  assert spelled == [spaced.unk_id]


def test_tokens_that_stand_for_too_many_are_counted():
  one = reader(most=2)
  assert one.transcript.tokens_VR.shape == (12, 2)
  assert one.transcript.too_long_V.nonzero()[0].tolist() == [5]  # abcde
  assert one.count_too_long([5, 0, 5]) == 2
  assert one.read_targets([5, 1], start=7)[1] == [7, 7, 8]


def test_targets_are_read_from_the_token_that_produced_them():
  ids, visible_from = reader().read_targets([0, 4, ANCHOR.eos_id], start=3)
  assert [CODE.token_bytes(i) for i in ids] == [b'a', b'b', b'+', None]
  assert visible_from == [3, 3, 4, 5]


# --- Batches -----------------------------------------------------------------


def examples(*texts):
  for text, targets in texts:
    yield {'inputs': ANCHOR.encode(text), 'targets': targets, 'text': text}


def rows(*texts, length=16, slots=16, readers=None, **settings):
  readers = readers or {'code': reader()}
  read_all = list(
    alignment.read_examples(examples(*texts), readers, anchor=ANCHOR)
  )
  settings = {'pack': True, 'batch_size': 1, **settings}
  return batches.ExampleBatches(
    lambda start: iter(read_all[start:]),
    length=length,
    bos_id=ANCHOR.bos_id,
    augmenting_lengths={'code': slots},
    **settings,
  )


FIRST = ('ab', [4, 3, ANCHOR.eos_id])  # BOS ab | + de EOS
SECOND = ('c', [0, ANCHOR.eos_id])


def test_packed_rows_of_two_vocabularies():
  batch = next(rows(FIRST, SECOND))
  row = {name: array[0].tolist() for name, array in batch.items()}
  assert row['decoder_segment_ids'][:8] == [1] * 4 + [2] * 3 + [0]
  # BOS a b + de, then BOS c a b; EOS is predicted and never read.
  assert row['code_segment_ids'][:10] == [1] * 5 + [2] * 4 + [0]
  assert row['code_positions'][:9] == [0, 1, 2, 3, 4, 0, 1, 2, 3]
  pieces = [CODE.token_bytes(i) for i in row['code_input_tokens'][:9]]
  assert pieces == [None, b'a', b'b', b'+', b'de', None, b'c', b'a', b'b']
  assert row['code_visible_from'][:9] == [0, 1, 1, 2, 3, 4, 5, 6, 6]


def test_a_row_closes_when_either_model_is_full():
  made = rows(FIRST, SECOND, slots=8)
  assert next(made)['decoder_segment_ids'].max() == 1
  assert next(made)['code_segment_ids'][0].tolist() == [1] * 4 + [0] * 4


def test_what_does_not_fit_is_an_error_or_counted():
  with pytest.raises(ValueError, match="5 tokens to 'code', and a row has 4"):
    next(rows(FIRST, slots=4))
  made = rows(FIRST, SECOND, slots=4, truncate='skip')
  assert next(made)['code_segment_ids'][0].tolist() == [1] * 4
  assert made.skipped == 1
  long = ('ab', [5, ANCHOR.eos_id])
  with pytest.raises(ValueError, match='has 1 target tokens that stand for mo'):
    next(rows(long, readers={'code': reader(most=2)}))


def test_inputs_must_be_the_tokens_of_their_text():
  wrong = [{'inputs': [1, 1], 'targets': [2], 'text': 'ab'}]
  with pytest.raises(ValueError, match="not the tokens of their text, 'ab'"):
    next(alignment.read_examples(wrong, {}, anchor=ANCHOR))


def test_arrays_of_unpacked_readings():
  arrays = batches.augmenting_arrays('code', [([5, 6], [0, 1]), ([7], [0])])
  np.testing.assert_array_equal(arrays['code_input_tokens'], [[5, 6], [7, 0]])
  np.testing.assert_array_equal(arrays['code_segment_ids'], [[1, 1], [1, 0]])
  # No array of the anchor's, whose keys begin alike.
  assert len(batches.augmenting_arrays('dec', [([5], [0])])) == 4
