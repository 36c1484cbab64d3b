"""Tests of calm_jax.text.tokenizers_vocabulary and of its settings."""

import functools
import itertools
import json
import unicodedata

import pytest
import tokenizers

from calm_jax import vocabularies
from tests import tokens

CONFIG = 'tokenizer_config.json'


@pytest.fixture(scope='module')
def load(tmp_path_factory):
  """Loads the tokenizer of a family by its name."""
  root = tmp_path_factory.mktemp('families')

  @functools.cache
  def one(name):
    directory = tokens.write(root / name, *tokens.FAMILIES[name]())
    return vocabularies.load_vocabulary(directory)

  return one


def _texts():
  """Awkward ones, and more of the same."""
  return [*tokens.AWKWARD, *tokens.fuzz(300)]


@pytest.mark.parametrize(
  'family, bos, eos, pad, unk, appends',
  [
    ('gemma', '<bos>', '<eos>', '<pad>', '<unk>', False),
    ('llama2', '<s>', '</s>', None, '<unk>', False),
    ('mistral', '<s>', '</s>', None, '<unk>', False),
    ('llama3', '<|begin_of_text|>', '<|end_of_text|>', None, None, False),
    ('qwen2', None, '<|im_end|>', '<|endoftext|>', None, False),
    ('t5', None, '</s>', '<pad>', '<unk>', True),
  ],
)
def test_special_ids(load, family, bos, eos, pad, unk, appends):
  vocabulary = load(family)
  id_of = vocabulary._tokenizer.token_to_id
  expected = [None if t is None else id_of(t) for t in (bos, eos, pad, unk)]
  assert [
    vocabulary.bos_id,
    vocabulary.eos_id,
    vocabulary.pad_id,
    vocabulary.unk_id,
  ] == expected
  assert vocabulary.eos_ids == (id_of(eos),)
  assert vocabulary.ends_with_eos is appends
  for text in (bos, eos, pad, unk):
    if text is not None:
      assert vocabulary.token_bytes(id_of(text)) is None


@pytest.mark.parametrize('family', tokens.FAMILIES)
def test_ends_and_bytes_of_tokens(load, family):
  vocabulary = load(family)
  for text in _texts():
    ids, ends = vocabulary.encode_with_ends(text)
    assert ids == vocabulary.encode(text)
    assert len(ends) == len(ids)
    data = text.encode('utf-8')
    assert all(a <= b for a, b in itertools.pairwise([0, *ends, len(data)]))
    # Nothing is left over but white space, which T5 drops.
    left = data[ends[-1] if ends else 0 :].decode()
    assert not left or family == 't5' and left.replace('▁', ' ').isspace()
    if family in ('gemma', 'llama2', 'mistral', 'llama3') and '▁' not in text:
      pieces = [vocabulary.token_bytes(i) for i in ids]
      # Whether the model puts a space before a text that begins with one.
      invented = len(b''.join(pieces)) - len(data)
      assert invented in ((0, 1) if family in ('llama2', 'mistral') else (0,))
      assert b''.join(pieces) == b' ' * invented + data
      exact = itertools.accumulate(map(len, pieces))
      assert ends == [max(0, end - invented) for end in exact]


def test_ends_of_composed_characters(load):
  """Qwen composes: what a token says follows from the bytes up to its end.

  Without the last letter or sign with its marks, it does not follow.
  """
  vocabulary, checked = load('qwen2'), 0
  for text in _texts():
    said, data = b'', text.encode()
    for index, end in zip(*vocabulary.encode_with_ends(text), strict=True):
      said += vocabulary.token_bytes(index)
      read = data[:end].decode(errors='ignore')
      if len(read.encode()) < end or not _is_text(said):
        continue
      known = unicodedata.normalize('NFC', read)
      assert known.startswith(said.decode())
      while unicodedata.combining(read[-1]) and read[1:]:
        read = read[:-1]
      known = unicodedata.normalize('NFC', read[:-1])
      assert not known.startswith(said.decode())
      checked += said != data[:end]
  assert checked > 100


def _is_text(data):
  try:
    return bool(data.decode())
  except UnicodeDecodeError:
    return False


def test_ends_of_t5(load):
  vocabulary = load('t5')
  ids, ends = vocabulary.encode_with_ends('the  \ufb01 <extra_id_0>\u2460 the ')
  said = [vocabulary._tokenizer.id_to_token(i) for i in ids]
  # A ligature becomes two letters.
  assert list(zip(said, ends, strict=True)) == [
    ('▁the', 3),
    ('▁f', 8),
    ('i', 8),
    ('<extra_id_0>', 21),
    ('▁1', 24),
    ('▁the', 28),
  ]


def test_ends_around_special_tokens(load):
  vocabulary = load('llama2')
  ids, ends = vocabulary.encode_with_ends('é\U0001f600</s> 你<s>fox')
  first = ids.index(vocabulary.eos_id)
  # A space that is not there, the two bytes of é, the four of the smile.
  assert ends[:first] == [0, 1, 2, 3, 4, 5, 6]
  assert ends[first : first + 3] == [10, 10, 11]
  assert ends[ids.index(vocabulary.bos_id)] == 17
  assert ends[-1] == 20


def test_one_token_for_the_unknown_and_the_end(tmp_path):
  """As Qwen's class has it; what ends or pads a text is not shown in it."""
  tokenizer, settings = tokens.qwen2()
  settings['unk_token'] = settings['pad_token']
  directory = tokens.write(tmp_path, tokenizer, settings)
  vocabulary = vocabularies.load_vocabulary(directory)
  assert vocabulary.unk_id == vocabulary.pad_id
  assert vocabulary.decode([*vocabulary.encode('a'), vocabulary.pad_id]) == 'a'


def test_ends_behind_added_tokens(tmp_path):
  tokenizer, settings = tokens.llama2()
  token = tokenizers.AddedToken('<t>', lstrip=True, normalized=False)
  tokenizer.add_tokens([token])
  directory = tokens.write(tmp_path, tokenizer, settings)
  vocabulary = vocabularies.load_vocabulary(directory)
  ids, ends = vocabulary.encode_with_ends('é  <t>\U0001f600</s>x')
  assert (ids[3], ends) == (665, [0, 1, 2, 7, 7, 8, 9, 10, 11, 15, 15, 16])
  assert vocabulary.token_bytes(665) == b'<t>'


def test_bytes_of_words():
  vocabulary = vocabularies.word_vocabulary(['abc', '+'], max_integer=10**4)
  id_of = vocabulary._tokenizer.token_to_id
  assert vocabulary.token_bytes(id_of('abc')) == b' abc'
  assert vocabulary.token_bytes(id_of('##00')) == b'00'
  assert vocabulary.token_bytes(vocabulary.unk_id) is None
  assert vocabulary.token_bytes(vocabulary.size) is None
  assert vocabulary.token_bytes(-1) is None
  ids, ends = vocabulary.encode_with_ends('abc + 2500 what  ')
  assert ids[-1] == vocabulary.unk_id
  assert ends == [3, 5, 9, 10, 15]


@pytest.mark.parametrize('family', ['llama2', 'llama3', 'qwen2'])
def test_decoding_token_by_token_equals_their_bytes(load, family):
  vocabulary = load(family)
  first = vocabulary.encode('a')
  for index in range(vocabulary.size):
    said = vocabulary.token_bytes(index)
    if said is not None:
      whole = vocabulary.decode([*first, index])
      assert whole == 'a' + said.decode('utf-8', errors='replace'), index


@pytest.mark.parametrize('family', tokens.FAMILIES)
def test_save_and_load(load, family, tmp_path):
  vocabulary = load(family)
  vocabulary.save(tmp_path)
  loaded = vocabularies.load_vocabulary(tmp_path)
  assert loaded.fingerprint() == vocabulary.fingerprint()
  assert loaded.ends_with_eos == vocabulary.ends_with_eos
  assert loaded.settings.config == vocabulary.settings.config


def test_special_text_may_be_ordinary(load, tmp_path):
  load('llama3').save(tmp_path)
  text = '<|eot_id|>'
  parsed = vocabularies.load_vocabulary(tmp_path)
  plain = vocabularies.load_vocabulary(tmp_path, split_special_tokens=True)
  assert len(parsed.encode(text)) == 1
  assert len(plain.encode(text)) > 1
  assert plain.decode(plain.encode(text)) == text
  assert plain.fingerprint() != parsed.fingerprint()
  plain.save(tmp_path)
  saved = vocabularies.load_vocabulary(tmp_path)
  assert saved.fingerprint() == plain.fingerprint()


def _llama3(directory, files):
  """A Llama 3 with other settings beside its tokenizer.json."""
  tokens.write(directory, *tokens.llama3())
  (directory / CONFIG).unlink()
  for name, content in files.items():
    tokens.write_json(directory / name, content)
  return vocabularies.load_vocabulary(directory)


def test_several_ends_and_ids_from_the_model(tmp_path):
  vocabulary = _llama3(
    tmp_path / 'a',
    {
      CONFIG: {'eos_token': {'content': '<|eot_id|>', 'lstrip': False}},
      'generation_config.json': {'eos_token_id': [569, 571, 570]},
      'config.json': {'eos_token_id': 0, 'text_config': {'pad_token_id': 572}},
    },
  )
  assert vocabulary.eos_id == 570
  assert vocabulary.eos_ids == (570, 569, 571)
  assert vocabulary.pad_id == 572
  vocabulary.save(tmp_path / 'b')
  again = vocabularies.load_vocabulary(tmp_path / 'b')
  assert (again.eos_ids, again.pad_id) == ((570, 569, 571), 572)


def test_what_decoding_does_not_do_is_told(tmp_path):
  asked = {
    'eos_token_id': 569,
    'repetition_penalty': 1.1,
    'min_length': 0,
    'suppress_tokens': [],
  }
  with pytest.warns(
    UserWarning, match="asks for {'repetition_penalty': 1.1}, "
  ):
    _llama3(tmp_path, {'generation_config.json': asked})


@pytest.mark.parametrize(
  'files',
  [
    {'config.json': {'bos_token_id': 568, 'eos_token_id': 569}},
    {'generation_config.json': {'eos_token_id': [569], 'pad_token_id': -1}},
    {'special_tokens_map.json': {'eos_token': {'content': '<|end_of_text|>'}}},
  ],
)
def test_without_tokenizer_config(files, tmp_path):
  vocabulary = _llama3(tmp_path, files)
  # The post-processor tells BOS.
  assert (vocabulary.bos_id, vocabulary.eos_id) == (568, 569)
  assert vocabulary.pad_id is None


@pytest.mark.parametrize(
  'config, bos, appends',
  [
    ({}, 568, False),
    ({'add_bos_token': True}, 568, False),
    ({'add_bos_token': False}, None, False),
    ({'add_eos_token': True}, 568, True),
    ({'add_eos_token': False}, 568, False),
    ({'add_bos_token': False, 'add_eos_token': True}, None, True),
    ({'add_bos_token': True, 'add_eos_token': True}, 568, True),
  ],
)
def test_who_decides_on_bos_and_eos(config, bos, appends, tmp_path):
  names = {'bos_token': '<|begin_of_text|>', 'eos_token': '<|end_of_text|>'}
  vocabulary = _llama3(tmp_path, {CONFIG: config | names})
  assert vocabulary.bos_id == bos
  assert vocabulary.ends_with_eos is appends
  # A chat template can name it, and it is not said in answers, in any case.
  assert vocabulary.decode([568, *vocabulary.encode('a')]) == 'a'
  ids = vocabulary.encode('a')
  with_bos = [568, *ids] if bos else ids
  assert vocabularies.with_bos(vocabulary, ids) == with_bos
  assert vocabularies.with_bos(vocabulary, [568, *ids]) == [568, *ids]


def test_tokens_that_only_the_settings_add(tmp_path):
  added = {
    '573': {'content': '<new>', 'special': True},
    '574': {'content': '<tool>', 'special': False, 'normalized': False},
  }
  vocabulary = _llama3(
    tmp_path / 'a',
    {CONFIG: {'added_tokens_decoder': added, 'pad_token': '<new>'}},
  )
  assert (vocabulary.size, vocabulary.pad_id) == (575, 573)
  assert vocabulary.encode('a<tool>')[1:] == [574]
  assert vocabulary.token_bytes(574) == b'<tool>'
  added['580'] = {'content': '<far>'}
  with pytest.raises(
    ValueError, match="'<far>' has the id 580, .* gives it 575"
  ):
    _llama3(tmp_path / 'b', {CONFIG: {'added_tokens_decoder': added}})


@pytest.mark.parametrize(
  'files, error',
  [
    ({}, r'tokenizer_config\.json cannot be read: it is not there'),
    ({'config.json': {'eos_token_id': 'x'}}, "eos_token_id = 'x'; it must be"),
    (
      {'config.json': {'eos_token_id': [-7]}},
      r'eos_token_id = \[-7\]; it must',
    ),
    ({'config.json': {'eos_token_id': True}}, 'eos_token_id = True; it must'),
    ({'config.json': {'eos_token_id': 10**6}}, '1000000 is given .*573 tokens'),
    (
      {CONFIG: {'eos_token': '<no>'}},
      "eos_token is '<no>', which is not among",
    ),
    ({CONFIG: {'eos_token': ['a']}}, 'must be a string, an object with'),
    ({CONFIG: {'add_bos_token': 1}}, 'add_bos_token = 1; it must be true'),
    (
      {CONFIG: {'added_tokens_decoder': {'-1': {'content': '<new>'}}}},
      'one id from 0 on',
    ),
    (
      {CONFIG: {'added_tokens_decoder': [{'content': '<new>'}]}},
      'one id from 0 on',
    ),
    (
      {
        CONFIG: {
          'added_tokens_decoder': {
            '573': {'content': '<new>'},
            '574': {'content': '<new>'},
          }
        }
      },
      'a token or an id occurs twice',
    ),
    (
      {CONFIG: {'bos_token': '<|eot_id|>'}},
      r'adds the tokens \[568\] .*id 570',
    ),
  ],
)
def test_settings_that_cannot_be(files, error, tmp_path):
  with pytest.raises(ValueError, match=error):
    _llama3(tmp_path, files)


def _change(**changes):
  def change(content):
    content['model'] |= changes
    return content

  return change


@pytest.mark.parametrize(
  'change, error',
  [
    (_change(vocab={'a': 0, 'b': 0}, merges=[]), 'one id to several tokens'),
    (_change(vocab={'a': -1}, merges=[]), 'is not a tokenizer that tokenizers'),
    (_change(vocab={}, merges=[['a', 'b']]), 'is not a tokenizer'),
    (_change(type='Magic'), 'is not a tokenizer'),
    (lambda content: {'model': 7}, 'is not a tokenizer'),
    (lambda content: [content], 'must be a JSON object .*holds a list'),
    (lambda content: None, 'must be a JSON object'),
    (
      lambda content: content | {'added_tokens': [{'id': 5, 'content': 'zz'}]},
      "is not a tokenizer|'zz' has the id 5",
    ),
    (
      lambda content: (
        content | {'normalizer': {'type': 'Precompiled', 'x': 'AAAA'}}
      ),
      'is not a tokenizer',
    ),
    (
      lambda content: (
        content
        | {
          'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}
        }
      ),
      'is not a tokenizer',  # The library panics.
    ),
  ],
)
def test_tokenizers_that_cannot_be(change, error, tmp_path):
  tokenizer, settings = tokens.qwen2()
  tokens.write(tmp_path, tokenizer, settings)
  content = json.loads(tokenizer.to_str()) | {'added_tokens': []}
  tokens.write_json(tmp_path / 'tokenizer.json', change(content))
  with pytest.raises(ValueError, match=error):
    vocabularies.load_vocabulary(tmp_path)


def test_the_id_of_an_added_token_must_be_its_own(tmp_path):
  tokenizer, settings = tokens.qwen2()
  tokens.write(tmp_path, tokenizer, settings)
  content = json.loads(tokenizer.to_str())
  content['added_tokens'][0]['id'] = 99
  tokens.write_json(tmp_path / 'tokenizer.json', content)
  with pytest.raises(ValueError, match='endoftext.*has the id 99, which'):
    vocabularies.load_vocabulary(tmp_path)


def test_no_tokenizer_at_all(tmp_path):
  with pytest.raises(
    ValueError, match='has no tokenizer: none of tokenizer.js'
  ):
    vocabularies.load_vocabulary(tmp_path)
  tokens.write_json(tmp_path / 'vocab.json', {})
  tokens.write_json(tmp_path / CONFIG, {'tokenizer_class': 'GPT2TokenizerFast'})
  with pytest.raises(ValueError, match="has 'GPT2Tokenizer'.*AutoTokenizer"):
    vocabularies.load_vocabulary(tmp_path)


def test_words_may_have_any_decoder():
  """Without a decoder, tokens are joined by spaces, and their bytes say so."""
  model = tokenizers.models.WordLevel({'a': 0, 'b': 1, '?': 2}, unk_token='?')
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  vocabulary = vocabularies.TokenizersVocabulary(tokenizer, unk_token='?')
  assert vocabulary.decode([0, 1]) == 'a b'
  assert vocabulary.token_bytes(1) == b' b'
