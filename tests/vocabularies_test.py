"""Tests of calm_jax.vocabularies."""

import json

import pytest

from calm_jax import vocabularies


def _words():
  return vocabularies.word_vocabulary(
    ['+', 'ab', 'abc', 'x'], max_integer=10**6
  )


def test_words_are_tokens_and_id_0_is_a_word():
  vocabulary = _words()
  assert vocabulary.encode('+ abc ab') == [0, 2, 1]
  specials = {vocabulary.eos_id, vocabulary.pad_id, vocabulary.unk_id}
  assert specials == set(range(vocabulary.size - 3, vocabulary.size))
  assert vocabulary.bos_id is None


@pytest.mark.parametrize(
  'integer, groups',
  [('7', 1), ('999', 1), ('1000', 2), ('25000', 2), ('100000000007', 4)],
)
def test_integers_in_groups_of_three_digits(integer, groups):
  vocabulary = _words()
  ids = vocabulary.encode(integer)
  assert len(ids) == groups
  # Left to right: the first group is the number of its own digits.
  assert ids[0] == vocabulary.encode(integer[:3])[0]
  text = f'ab + {integer} x {integer}'
  assert vocabulary.decode(vocabulary.encode(text)) == text


def test_small_integers_need_no_continuations():
  vocabulary = vocabularies.word_vocabulary(['+'], max_integer=297)
  assert vocabulary.size == 1 + 298 + 3
  assert vocabulary.encode('298') != vocabulary.encode('297')
  assert vocabulary.encode('298') == [vocabulary.unk_id]


def test_unknown_words_stay_visible_and_specials_are_skipped():
  vocabulary = _words()
  ids = vocabulary.encode('ab nonsense')
  assert ids == [1, vocabulary.unk_id]
  ids += [vocabulary.eos_id, vocabulary.pad_id]
  assert vocabulary.decode(ids) == 'ab <unk>'


def test_batch_equals_single():
  texts = ['ab + 25000', '', 'x', 'abc x 12']
  for vocabulary in (_words(), vocabularies.ByteVocabulary()):
    single = [vocabulary.encode(text) for text in texts]
    assert vocabulary.encode_batch(texts) == single


def test_save_and_load_keep_everything(tmp_path):
  vocabulary = _words()
  vocabulary.save(tmp_path)
  loaded = vocabularies.TokenizersVocabulary.from_directory(tmp_path)
  assert loaded.fingerprint() == vocabulary.fingerprint()
  assert loaded.encode('ab 25000') == vocabulary.encode('ab 25000')
  assert (loaded.eos_id, loaded.pad_id) == (
    vocabulary.eos_id,
    vocabulary.pad_id,
  )


def test_special_tokens_may_be_objects_or_null(tmp_path):
  _words().save(tmp_path)
  config = {
    'eos_token': {'content': '</s>', 'lstrip': False},
    'pad_token': None,
  }
  (tmp_path / vocabularies.CONFIG_FILE).write_text(json.dumps(config))
  loaded = vocabularies.TokenizersVocabulary.from_directory(tmp_path)
  assert loaded.eos_id == _words().eos_id
  assert loaded.pad_id is None
  assert loaded.unk_id is None


def test_fingerprint_depends_on_words_and_specials():
  make = vocabularies.word_vocabulary
  prints = {
    make(['a', 'b']).fingerprint(),
    make(['b', 'a']).fingerprint(),
    make(['a', 'b'], bos_token='<s>').fingerprint(),
    vocabularies.TokenizersVocabulary(
      make(['a', 'b'])._tokenizer, eos_token='<pad>'
    ).fingerprint(),
    vocabularies.ByteVocabulary().fingerprint(),
  }
  assert len(prints) == 5
  assert make(['a', 'b']).fingerprint() in prints


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
  vocabulary = _words()
  tokenizer = vocabulary._tokenizer
  tokenizer.enable_truncation(2)
  tokenizer.enable_padding(length=8)
  vocabulary.save(tmp_path)
  loaded = vocabularies.TokenizersVocabulary.from_directory(tmp_path)
  assert loaded.encode('ab ab ab') == [1, 1, 1]


def test_bytes_decode_what_they_encode():
  vocabulary = vocabularies.ByteVocabulary()
  ids = [vocabulary.bos_id, *vocabulary.encode('\x00 é'), vocabulary.eos_id]
  assert ids[1] == 0
  assert vocabulary.decode(ids) == '\x00 é'


@pytest.mark.parametrize('words', [['a', 'a'], ['a b'], [''], ['7'], [' a']])
def test_bad_words(words):
  with pytest.raises(ValueError, match='duplicate, is empty, or contains'):
    vocabularies.word_vocabulary(words, max_integer=10)


def test_missing_and_malformed_files(tmp_path):
  read = vocabularies.TokenizersVocabulary.from_directory
  with pytest.raises(ValueError, match=r'tokenizer\.json cannot be read'):
    read(tmp_path)
  _words().save(tmp_path)
  config = tmp_path / vocabularies.CONFIG_FILE
  config.write_text('{"eos_token": "<nowhere>"}')
  with pytest.raises(ValueError, match="eos_token is '<nowhere>'"):
    read(tmp_path)
  for text, error in {
    'not json': 'must be a JSON object',
    '[]': 'must be a JSON object .*holds a list',
    '{"eos_token": "a", "eos_token": "b"}': "'eos_token' occurs twice",
    '{"eos_token": {}}': 'eos_token = {}; .*must be a string',
    '{"eos_token": 7}': 'eos_token = 7; .*must be a string',
    '{"add_bos_token": "no"}': "add_bos_token = 'no'; it must be true",
  }.items():
    config.write_text(text)
    with pytest.raises(ValueError, match=error):
      read(tmp_path)
  config.unlink()
  with pytest.raises(ValueError, match=r'tokenizer_config\.json cannot be'):
    read(tmp_path)
  (tmp_path / vocabularies.TOKENIZER_FILE).write_text('{}')
  with pytest.raises(ValueError, match='is not a tokenizer'):
    read(tmp_path)
