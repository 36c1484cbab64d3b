"""Tests of calm_jax.text.sentencepiece_vocabulary."""

import functools
import itertools

import pytest
import sentencepiece

from calm_jax import vocabularies
from tests import tokens

LLAMA = {'tokenizer_class': 'LlamaTokenizer', 'legacy': False}
T5 = {'tokenizer_class': 'T5Tokenizer', 'pad_token': '<pad>'}


@functools.cache
def _model(kind):
  if kind == 'llama':
    return tokens.llama_sentencepiece()
  if kind == 'gemma':
    return tokens.llama_sentencepiece(
      add_dummy_prefix=False,
      **{'pad_id': 0, 'eos_id': 1, 'bos_id': 2, 'unk_id': 3},
      user_defined_symbols=['<start_of_turn>'],
    )
  return tokens.sentencepiece_model(
    'unigram', pad_id=0, eos_id=1, unk_id=2, bos_id=-1
  )


def _load(directory, kind, config=None, **settings):
  directory.mkdir(exist_ok=True)
  name = 'spiece.model' if kind == 't5' else 'tokenizer.model'
  (directory / name).write_bytes(_model(kind))
  if config is not None:
    tokens.write_json(directory / 'tokenizer_config.json', config)
  return vocabularies.load_vocabulary(directory, **settings)


@pytest.mark.parametrize('kind', ['llama', 'gemma', 't5'])
def test_text_goes_through_sentencepiece(kind, tmp_path):
  vocabulary = _load(tmp_path, kind, T5 if kind == 't5' else LLAMA)
  reference = sentencepiece.SentencePieceProcessor(model_proto=_model(kind))
  for text in [*tokens.AWKWARD, *tokens.fuzz(300)]:
    ids, ends = vocabulary.encode_with_ends(text)
    assert ids == vocabulary.encode(text) == reference.encode(text)
    data = text.encode()
    assert len(ids) == len(ends)
    assert all(a <= b for a, b in itertools.pairwise([0, *ends, len(data)]))
    if kind != 't5':
      assert vocabulary.decode(ids) == text.replace('▁', ' ')
      pieces = [vocabulary.token_bytes(i) for i in ids]
      if '▁' not in text and text:
        invented = kind == 'llama'
        assert b''.join(pieces) == b' ' * invented + data
        exact = itertools.accumulate(map(len, pieces))
        assert ends == [max(0, end - invented) for end in exact]


def test_special_ids_of_llama(tmp_path):
  vocabulary = _load(tmp_path, 'llama', LLAMA)
  assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (1, 2, 0)
  assert vocabulary.pad_id is None
  assert vocabulary.size == 600
  assert not vocabulary.ends_with_eos
  no_bos = _load(tmp_path, 'llama', LLAMA | {'add_bos_token': False})
  assert no_bos.bos_id is None


def test_special_ids_and_sentinels_of_t5(tmp_path):
  """Without tokenizer_config.json, config.json tells the kind."""
  tokens.write_json(tmp_path / 'config.json', {'model_type': 'mt5'})
  vocabulary = _load(tmp_path, 't5')
  pieces = vocabulary.size - 100
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
  assert vocabulary.bos_id is None
  assert vocabulary.ends_with_eos
  ids, ends = vocabulary.encode_with_ends('the <extra_id_0> \ufb01</s>')
  assert ids[1] == pieces + 99
  assert (ids[-1], ends[1], ends[-2:]) == (1, 16, [20, 24])
  assert vocabulary.encode('<extra_id_99>') == [pieces]
  assert vocabulary.token_bytes(pieces) is None
  assert vocabulary.decode([pieces, *vocabulary.encode('a z'), 1, 0]) == 'a z'
  assert vocabulary.decode([vocabulary.unk_id]) == '<unk>'


def test_text_behind_a_special_token(tmp_path):
  """It has a space of its own where the settings say `legacy`."""
  pieces = {}
  for legacy in (True, False):
    vocabulary = _load(tmp_path, 'llama', LLAMA | {'legacy': legacy})
    ids, ends = vocabulary.encode_with_ends('a</s>b')
    assert (ids[-1 - (ends.count(5) > 1) :], ends[-1]) and ends[-1] == 6
    pieces[legacy] = (
      b''.join(vocabulary.token_bytes(i) or b'|' for i in ids),
      vocabulary.fingerprint(),
    )
  assert pieces[True][0] == b' a| b'
  assert pieces[False][0] == b' a|b'
  assert pieces[True][1] != pieces[False][1]


def test_added_tokens(tmp_path):
  added = {
    '600': {'content': '<pad>', 'special': True},
    '601': {'content': '<t>', 'special': False, 'lstrip': True},
  }
  config = {**LLAMA, 'added_tokens_decoder': added, 'pad_token': '<pad>'}
  vocabulary = _load(tmp_path, 'llama', config)
  assert (vocabulary.size, vocabulary.pad_id) == (602, 600)
  ids, ends = vocabulary.encode_with_ends('a  <t>b<pad>')
  assert (ids[-1], ids[2 - (ids[1] == 601)]) == (600, 601)
  assert ends == [0, 1, 6, 7, 12][-len(ends) :]
  assert vocabulary.token_bytes(601) == b'<t>'
  assert vocabulary.decode(ids) == 'a<t>b'
  older = tmp_path / 'older'
  older.mkdir()
  tokens.write_json(older / 'added_tokens.json', {'<pad>': 600, '<t>': 601})
  config = {**LLAMA, 'pad_token': '<pad>'}
  assert _load(older, 'llama', config).encode('<t><pad>') == [601, 600]
  plain = _load(older, 'llama', config, split_special_tokens=True)
  assert 601 not in plain.encode('<t>')


def test_save_and_load(tmp_path):
  config = T5 | {'extra_ids': 7, 'chat_template': '{{ messages }}'}
  vocabulary = _load(tmp_path, 't5', config)
  vocabulary.save(tmp_path / 'copy')
  loaded = vocabularies.load_vocabulary(tmp_path / 'copy')
  assert loaded.fingerprint() == vocabulary.fingerprint()
  assert loaded.size == vocabulary.size
  assert loaded.chat_templates == vocabulary.chat_templates
  assert (tmp_path / 'copy' / 'spiece.model').is_file()


@pytest.mark.parametrize(
  'content', [b'', b'IQ== 0\nIg== 1\n', b'\x00' * 100, b'\xff' * 100]
)
def test_files_that_are_no_models(content, tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(content)
  with pytest.raises(ValueError, match='no SentencePiece model .*Llama 3'):
    vocabularies.load_vocabulary(tmp_path)


@pytest.mark.parametrize('length', [10, 1000, 5000])
def test_a_model_cut_short(length, tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(_model('llama')[:length])
  with pytest.raises(ValueError, match='no SentencePiece model'):
    vocabularies.load_vocabulary(tmp_path)


def test_a_name_that_is_no_piece(tmp_path):
  with pytest.raises(ValueError, match="pad_token is '<gone>', which is not"):
    _load(tmp_path, 'llama', LLAMA | {'pad_token': '<gone>'})
