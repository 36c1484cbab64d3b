"""Small tokenizers of each family, with its real parts, as published."""

import io
import json
import random

import sentencepiece
import tokenizers
from tokenizers import (
  AddedToken,
  Regex,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

CORPUS = [
  'The quick brown fox jumps over the lazy dog. It was the best of times, it '
  'was the worst of times; 1234567 and 3.14159, 2024-11-21.',
  'def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1)\n',
  'Der Fluß überquert die Brücke. Ça va très bien, merci. El niño pequeño.',
  'Привет мир, как дела? Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم.',
  '你好，世界。今天天气很好。こんにちは世界。안녕하세요 세계.',
  "I'm sure they've said we'd do it, don't you think that's what it's for?",
  '\tif (x == 0) {\r\n\t\treturn "zero";\r\n\t}\n\n\n',
] * 3
AWKWARD = [
  '',
  ' ',
  '   ',
  'a',
  ' a',
  '  a',
  'a ',
  'two  spaces and   three',
  ' leading and trailing  ',
  '\n',
  '\r\n\r\n',
  'line\r\nline\n\n  indented\n\ttab\t\ttabs',
  '1',
  '12',
  '1234567890',
  '3.14159 and 1,000,000',
  'x2y34z',
  "don't DON'T we'll I'VE",
  'e\u0301 and \u00e9 n\u0303 A\u030a',
  '\u1100\u1161\u11a8 \uac01',
  '\U0001f600',
  'a\U0001f600b',
  '\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466!',
  '\U0001f1e9\U0001f1ea \u2764\ufe0f',
  '\ufb01ne \u2126 \u212b \uff21\uff22\uff23 \u00bd \u2460',
  'Привет, мир! Γειά σου',
  'שלום مرحبا',
  '你好，世界。こんにちは 안녕',
  'नमस्ते दुनिया สวัสดี',
  '\x00',
  'a\x00b\x01\x07\x7f\x80c',
  '\u00a0no\u2003break\u3000space\u200b\ufeff',
  '\u2581lower\u2581block \u2581',
  '<0x41> <0xF0>',
  'Ġword Ċ ĉ',
  '##suffix ## [UNK]',
  'https://example.org/a?b=c&d=%20#e',
  'def f(x):\n    return x  # comment\n',
  '\ud7ff\ue000\ufffd\U0010ffff',
  'word ' * 200,
  'a' * 300,
]
SPECIAL = [
  'before {0} after',
  '{0}',
  '{0}{0}',
  '{0} x',
  'x{0}y{1}z',
  ' {0}  {1} ',
  '\n{1}\n',
]


def fuzz(count, *, seed=0):
  """Random texts of pieces that tokenizers trip over."""
  rng = random.Random(seed)
  pieces = [
    *' \t\n\r',
    '  ',
    'é',
    'e\u0301',
    '\u200d',
    '\U0001f600',
    '你',
    '\x00',
  ]
  pieces += ['\u0300', '\ufe0f', '▁', '1', '23', "'s", 'the', ' the', 'ab', 'Ж']
  texts = []
  for _ in range(count):
    chosen = [
      rng.choice(pieces) if rng.random() < 0.8 else chr(_character(rng))
      for _ in range(rng.randrange(1, 20))
    ]
    texts.append(''.join(chosen))
  return texts


def _character(rng):
  while True:
    code = rng.choice([rng.randrange(0x3000), rng.randrange(0x110000)])
    if not 0xD800 <= code < 0xE000:
      return code


_BYTES = [f'<0x{byte:02X}>' for byte in range(256)]
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
  _CONTRACTIONS + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}'
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def _bpe(first, *, size=700, **parts):
  """BPE with bytes to fall back on, trained on words without prefix."""
  tokenizer = tokenizers.Tokenizer(
    models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>')
  )
  # Trained as Gemma is; the parts of the family come after.
  tokenizer.normalizer = normalizers.Replace(' ', '▁')
  tokenizer.pre_tokenizer = pre_tokenizers.Split('▁', 'merged_with_next')
  tokenizer.train_from_iterator(
    CORPUS,
    trainers.BpeTrainer(
      vocab_size=size, special_tokens=[*first, *_BYTES], show_progress=False
    ),
  )
  content = json.loads(tokenizer.to_str())
  content['added_tokens'] = [
    t for t in content['added_tokens'] if t['content'] not in _BYTES
  ]
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
  tokenizer.normalizer = parts.get('normalizer')
  tokenizer.pre_tokenizer = parts.get('pre_tokenizer')
  strip = [decoders.Strip(content=' ', left=1)] if parts['prefix'] else []
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    + strip
  )
  tokenizer.post_processor = _template(tokenizer, f'{parts["bos"]} $A')
  return tokenizer


def _template(tokenizer, single):
  names = [name for name in single.split() if name != '$A']
  return processors.TemplateProcessing(
    single=single,
    pair=f'{single} {single.replace("$A", "$B")}',
    special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
  )


def gemma():
  tokenizer = _bpe(
    ['<pad>', '<eos>', '<bos>', '<unk>', '<start_of_turn>', '<end_of_turn>'],
    normalizer=normalizers.Replace(' ', '▁'),
    pre_tokenizer=pre_tokenizers.Split(' ', 'merged_with_previous'),
    prefix=False,
    bos='<bos>',
  )
  # The real one has such tokens for runs of new lines, too.
  tokenizer.add_tokens([AddedToken('\n\n', normalized=False)])
  settings = _names('<bos>', '<eos>', '<pad>', '<unk>')
  settings |= {'add_bos_token': True, 'add_eos_token': False}
  return tokenizer, settings | {'tokenizer_class': 'GemmaTokenizer'}


def llama2():
  tokenizer = _bpe(
    ['<unk>', '<s>', '</s>'],
    normalizer=normalizers.Sequence(
      [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
    ),
    prefix=True,
    bos='<s>',
  )
  settings = _names('<s>', '</s>', None, '<unk>')
  settings |= {'add_bos_token': True, 'add_eos_token': False, 'legacy': True}
  return tokenizer, settings | {'tokenizer_class': 'PreTrainedTokenizerFast'}


def mistral():
  tokenizer = _bpe(
    ['<unk>', '<s>', '</s>', '[INST]', '[/INST]'],
    pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme='first', split=False),
    prefix=True,
    bos='<s>',
  )
  settings = _names('<s>', '</s>', None, '<unk>')
  settings |= {'add_bos_token': True, 'add_eos_token': False, 'legacy': False}
  return tokenizer, settings | {'tokenizer_class': 'LlamaTokenizer'}


def _byte_level(specials, *, digits, ignore_merges, normalizer=None):
  tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
  tokenizer.normalizer = normalizer
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(
        Regex(_WORDS.replace('{DIGITS}', digits)), 'isolated'
      ),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    CORPUS,
    trainers.BpeTrainer(
      vocab_size=600,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  tokenizer.add_special_tokens(specials)
  return tokenizer


def llama3():
  specials = ['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>']
  specials += ['<|start_header_id|>', '<|end_header_id|>']
  tokenizer = _byte_level(specials, digits='{1,3}', ignore_merges=True)
  tokenizer.post_processor = processors.Sequence(
    [
      processors.ByteLevel(trim_offsets=True),
      _template(tokenizer, '<|begin_of_text|> $A'),
    ]
  )
  settings = _names('<|begin_of_text|>', '<|end_of_text|>', None, None)
  return tokenizer, settings | {'tokenizer_class': 'PreTrainedTokenizerFast'}


def qwen2():
  specials = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  tokenizer = _byte_level(
    specials, digits='', ignore_merges=False, normalizer=normalizers.NFC()
  )
  tokenizer.add_tokens([AddedToken('<think>', normalized=False)])
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
  settings = _names(None, '<|im_end|>', '<|endoftext|>', None)
  settings |= {'add_bos_token': False, 'tokenizer_class': 'Qwen2Tokenizer'}
  return tokenizer, settings


def t5():
  """Unigram with the normaliser that SentencePiece compiled (nmt_nfkc)."""
  model = sentencepiece_model(
    'unigram', pad_id=0, eos_id=1, unk_id=2, bos_id=-1
  )
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  pieces = [
    (processor.id_to_piece(i), processor.get_score(i))
    for i in range(processor.get_piece_size())
  ]
  extra = [f'<extra_id_{n}>' for n in reversed(range(100))]
  pieces += [(name, 0.0) for name in extra]
  tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
  tokenizer.normalizer = normalizers.Precompiled(_charsmap(model))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
  )
  tokenizer.decoder = decoders.Metaspace()
  tokenizer.add_special_tokens(['<pad>', '</s>', '<unk>', *extra])
  tokenizer.post_processor = _template(tokenizer, '$A </s>')
  settings = _names(None, '</s>', '<pad>', '<unk>') | {'extra_ids': 100}
  return tokenizer, settings | {'tokenizer_class': 'T5Tokenizer'}


FAMILIES = {
  make.__name__: make for make in (gemma, llama2, mistral, llama3, qwen2, t5)
}


def _names(bos, eos, pad, unk):
  return {
    'bos_token': bos,
    'eos_token': eos,
    'pad_token': pad,
    'unk_token': unk,
  }


def write(directory, tokenizer, settings):
  """Writes a directory as models are published."""
  directory.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(directory / 'tokenizer.json'))
  write_json(directory / 'tokenizer_config.json', settings)
  return directory


def write_json(file, content):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(content))


def sentencepiece_model(model_type, *, size=420, **settings):
  """Trains a SentencePiece model on the corpus; returns its bytes."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(line for text in CORPUS for line in text.splitlines()),
    model_writer=model,
    model_type=model_type,
    vocab_size=size,
    hard_vocab_limit=False,
    minloglevel=2,
    **settings,
  )
  return model.getvalue()


def llama_sentencepiece(**settings):
  """A model as Llama 2's: BPE with bytes, text as it is, spaces kept."""
  return sentencepiece_model(
    'bpe',
    size=600,
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    split_digits=True,
    allow_whitespace_only_pieces=True,
    **settings,
  )


def _charsmap(model):
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  return proto.normalizer_spec.precompiled_charsmap
