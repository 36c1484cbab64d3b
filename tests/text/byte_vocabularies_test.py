"""Tests of calm_jax.text.byte_vocabularies."""

import pytest

from calm_jax import vocabularies
from tests import tokens


def test_layout_of_byt5(tmp_path):
  tokens.write_json(
    tmp_path / 'tokenizer_config.json', {'tokenizer_class': 'ByT5Tokenizer'}
  )
  vocabulary = vocabularies.load_vocabulary(tmp_path)
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
  assert vocabulary.bos_id is None
  assert vocabulary.ends_with_eos
  assert vocabulary.size == 384
  assert vocabulary.encode('a\x00é') == [100, 3, 0xC3 + 3, 0xA9 + 3]
  assert vocabulary.token_bytes(100) == b'a'
  assert vocabulary.token_bytes(258) == b'\xff'
  assert [vocabulary.token_bytes(i) for i in (0, 1, 2, 259, 383)] == [None] * 5
  ids, ends = vocabulary.encode_with_ends('a <extra_id_1></s>  b')
  assert ids == [100, 35, 260, 1, 101]
  assert ends == [1, 2, 14, 20, 21]
  assert vocabulary.decode([100, 260, 1, 101, 0]) == 'ab'
  plain = vocabularies.load_vocabulary(tmp_path, split_special_tokens=True)
  assert plain.encode('</s>') == [byte + 3 for byte in b'</s>']
  assert plain.fingerprint() != vocabulary.fingerprint()


@pytest.mark.parametrize('kind', ['ByteVocabulary', 'ByT5Vocabulary'])
def test_ends_bytes_and_round_trip(kind, tmp_path):
  vocabulary = getattr(vocabularies, kind)()
  for text in tokens.AWKWARD:
    ids, ends = vocabulary.encode_with_ends(text)
    assert ids == vocabulary.encode(text)
    assert ends == list(range(1, len(text.encode()) + 1))
    assert b''.join(map(vocabulary.token_bytes, ids)) == text.encode()
    assert vocabulary.decode(ids) == text
  vocabulary.save(tmp_path)
  loaded = vocabularies.load_vocabulary(tmp_path)
  assert type(loaded) is type(vocabulary)
  assert loaded.fingerprint() == vocabulary.fingerprint()


@pytest.mark.parametrize('extra_ids', [-1, 10**9, '125', True, None])
def test_bad_counts_of_sentinels(extra_ids, tmp_path):
  config = {'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': extra_ids}
  tokens.write_json(tmp_path / 'tokenizer_config.json', config)
  with pytest.raises(ValueError, match='extra_ids = .*from 0 to 10000'):
    vocabularies.load_vocabulary(tmp_path)
