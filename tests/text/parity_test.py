"""Our vocabularies against transformers, family by family.

The tokenizers are small, and have the normaliser, pre-tokenizer, decoder and
post-processor of the real ones.
"""

import unicodedata

import pytest

from calm_jax import vocabularies
from tests import tokens

pytestmark = pytest.mark.convert
transformers = pytest.importorskip('transformers')


def _load_both(directory):
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  return vocabularies.load_vocabulary(directory), theirs


@pytest.fixture(scope='module', params=tokens.FAMILIES)
def family(request, tmp_path_factory):
  """A published directory, and what transformers makes of it when it saves."""
  root = tmp_path_factory.mktemp(request.param)
  made = tokens.FAMILIES[request.param]()
  published = tokens.write(root / 'published', *made)
  pair = _load_both(published)
  pair[1].save_pretrained(root / 'saved')
  return request.param, pair, _load_both(root / 'saved')


def _texts(theirs, count):
  """Awkward, random and long texts, and some with special tokens in them."""
  names = sorted(set(theirs.all_special_tokens))
  first, last = names[0], names[-1]
  special = [text.format(first, last) for text in tokens.SPECIAL]
  return [*tokens.AWKWARD, *special, *tokens.fuzz(count, seed=7)]


def _assert_equal(ours, theirs, text):
  ids = theirs(text, add_special_tokens=False).input_ids
  assert ours.encode(text) == ids, ascii(text)
  bos = [] if ours.bos_id is None else [ours.bos_id]
  eos = [ours.eos_id] if ours.ends_with_eos else []
  if not ids or ids[-1:] != eos:  # ByT5's adds no second one, and says so.
    assert theirs(text).input_ids == bos + ids + eos, ascii(text)
  # They drop the unknown token, which we keep.
  special = set(theirs.all_special_ids) - {ours.unk_id}
  kept = [i for i in ids if i not in special]
  expected = theirs.decode(kept, clean_up_tokenization_spaces=False)
  assert ours.decode(ids) == expected, ascii(text)


def test_ids_and_texts(family):
  _, *pairs = family
  for ours, theirs in pairs:
    texts = _texts(theirs, 400)
    for text in texts:
      _assert_equal(ours, theirs, text)
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]


def test_special_ids(family):
  name, *pairs = family
  for ours, theirs in pairs:
    assert ours.eos_id == theirs.eos_token_id
    assert ours.pad_id == theirs.pad_token_id
    assert ours.bos_id == (None if name == 't5' else theirs.bos_token_id)
    assert ours.size in (len(theirs), len(theirs) - 1)
    if name != 'qwen2':  # Its class names one, which is the end of texts too.
      assert ours.unk_id == theirs.unk_token_id


def test_special_text_as_ordinary_text(family, tmp_path):
  _, (ours, _), _ = family
  ours.save(tmp_path)
  ours = vocabularies.load_vocabulary(tmp_path, split_special_tokens=True)
  theirs = transformers.AutoTokenizer.from_pretrained(
    tmp_path, split_special_tokens=True
  )
  for text in _texts(theirs, 20):
    _assert_equal(ours, theirs, text)


def test_transformers_reads_what_we_save(family, tmp_path):
  name, (ours, theirs), _ = family
  ours.save(tmp_path)
  loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in _texts(theirs, 50):
    assert loaded(text).input_ids == theirs(text).input_ids, (name, ascii(text))


def test_byt5(tmp_path):
  transformers.ByT5Tokenizer().save_pretrained(tmp_path / 'saved')
  published = {'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': 125}
  published['additional_special_tokens'] = [
    f'<extra_id_{n}>' for n in range(125)
  ]
  tokens.write_json(tmp_path / 'plain' / 'tokenizer_config.json', published)
  for name in ('saved', 'plain'):
    ours, theirs = _load_both(tmp_path / name)
    assert ours.size == len(theirs) == 384
    for text in _texts(theirs, 200):
      _assert_equal(ours, theirs, text)


def _sentencepiece(directory, model, config, name='tokenizer.model'):
  tokens.write_json(directory / 'tokenizer_config.json', config)
  (directory / name).write_bytes(model)
  return _load_both(directory)


def test_sentencepiece_of_gemma(tmp_path):
  model = tokens.llama_sentencepiece(
    add_dummy_prefix=False,
    **{'pad_id': 0, 'eos_id': 1, 'bos_id': 2, 'unk_id': 3},
    **{'bos_piece': '<bos>', 'eos_piece': '<eos>'},
    user_defined_symbols=['<start_of_turn>', '<end_of_turn>'],
  )
  _, config = tokens.gemma()
  ours, theirs = _sentencepiece(tmp_path, model, config)
  for text in _texts(theirs, 400):
    _assert_equal(ours, theirs, text)


@pytest.mark.parametrize('legacy', [True, False])
def test_sentencepiece_of_llama(legacy, tmp_path):
  """Where a text begins with a space, transformers adds none of its own.

  SentencePiece does, and we with it.
  """
  _, config = tokens.mistral()
  config['legacy'] = legacy
  model = tokens.llama_sentencepiece()
  ours, theirs = _sentencepiece(tmp_path, model, config)
  compared = 0
  for text in _texts(theirs, 400):
    begins = [text, *text.split('</s>'), *text.split('<s>')]
    if not any(part[:1] in (' ', '▁') and part for part in begins):
      _assert_equal(ours, theirs, text)
      compared += 1
  assert compared > 300


def test_sentencepiece_of_t5(tmp_path):
  """The normaliser of tokenizers differs where marks follow letters."""
  model = tokens.sentencepiece_model(
    'unigram', pad_id=0, eos_id=1, unk_id=2, bos_id=-1
  )
  _, config = tokens.t5()
  ours, theirs = _sentencepiece(tmp_path, model, config, 'spiece.model')
  compared = 0
  for text in _texts(theirs, 400):
    marks = [c for c in text if unicodedata.category(c) in ('Mn', 'Me', 'Cf')]
    if not marks and '▁' not in text:
      _assert_equal(ours, theirs, text)
      compared += 1
  assert compared > 100


_TURNS = """{%- for message in messages -%}
    {%- if message.role == 'system' and not loop.first -%}
        {{ raise_exception('A system message comes first') }}
    {%- endif -%}
    {{ OPEN }}
    {%- if message.tool_calls is defined -%}
        {{ message.tool_calls | tojson(indent=2) }}
    {%- endif -%}
    {{ message['content'] | trim }}{{ CLOSE }}
{%- endfor -%}
{%- if tools is not none -%}
    {{ tools | tojson }}
{%- endif -%}
{% if add_generation_prompt %}
    {{ PROMPT }}
{%- endif %}
"""
# How each family marks its turns.
_CHATS = {
  'gemma': ("'<start_of_turn>' + message.role + '\\n'", "'<end_of_turn>\\n'"),
  'mistral': (
    "bos_token if loop.first else '[INST] '",
    "' [/INST]' + eos_token",
  ),
  'llama3': (
    "'<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n'",
    "'<|eot_id|>'",
  ),
  'qwen2': ("'<|im_start|>' ~ message.role ~ '\\n'", "'<|im_end|>\\n'"),
}
_CHAT = [
  {'role': 'system', 'content': ' Be <b>brief</b> & "kind" '},
  {'role': 'user', 'content': 'Größe? \U0001f600 <|im_end|></s>\n'},
  {'role': 'assistant', 'content': '', 'tool_calls': [{'name': 'é', 'n': 1.5}]},
]


@pytest.mark.parametrize('name', _CHATS)
def test_chats(name, tmp_path):
  begin, end = _CHATS[name]
  tokenizer, settings = tokens.FAMILIES[name]()
  template = _TURNS.replace('OPEN', begin).replace('CLOSE', end)
  template = template.replace('PROMPT', "'assistant:'")
  settings['chat_template'] = template
  ours, theirs = _load_both(tokens.write(tmp_path / 'a', tokenizer, settings))
  theirs.save_pretrained(tmp_path / 'saved')
  saved = vocabularies.load_vocabulary(tmp_path / 'saved')
  assert (tmp_path / 'saved' / 'chat_template.jinja').is_file()
  for variables in (
    {'add_generation_prompt': True},
    {'add_generation_prompt': False, 'tools': [{'type': 'function'}]},
  ):
    text = theirs.apply_chat_template(_CHAT, tokenize=False, **variables)
    assert ours.apply_chat_template(_CHAT, **variables) == text
    assert saved.apply_chat_template(_CHAT, **variables) == text
    ids = theirs.apply_chat_template(_CHAT, **variables).input_ids
    assert ours.encode_chat(_CHAT, **variables) == ids
  with pytest.raises(ValueError, match='A system message comes first'):
    ours.apply_chat_template([*_CHAT, _CHAT[0]])
