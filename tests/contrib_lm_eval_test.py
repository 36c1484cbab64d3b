"""The harness's tasks on our models, against its own adapter of transformers.

Run: pytest tests/contrib_lm_eval_test.py
"""

import importlib.util
import json
import os
import sys

import jax
import numpy as np
import pytest

import calm_jax
from calm_jax import generation, sampling, vocabularies
from tests import foreign, tiny, tokens, toys

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('HF_DATASETS_OFFLINE', '1')

needs_lm_eval = pytest.mark.skipif(
  importlib.util.find_spec('lm_eval') is None,
  reason='lm_eval cannot be imported: calm_jax.contrib.lm_eval is NOT tested.'
  " pip install -c constraints.txt -e '.[test]'",
)
VOCAB = 720
# BOS and a space before a text; neither; BOS and spaces at the ends of words.
FAMILIES = ('llama2', 'qwen2', 'gemma')
PAIRS = [
  ('The quick brown fox', ' jumps over'),
  ('The quick brown fox ', 'jumps over'),
  ('It was the best of times,\n\n', 'it was'),
  ('x =', ' 1234567'),
  ('', 'The lazy dog'),
  ('def fib(n):\n    if n', ' < 2:\n        return n\n'),
  ('Привет мир,', ' как дела?'),
  ('a', 'b'),
]
TEXTS = [tokens.CORPUS[0], 'a', 'Der Fluß überquert die Brücke.']
PROMPTS = [one for one, _ in PAIRS if one] + ['Der Fluß']


def write(directory, family, *, seed=0):
  """A small random Llama that writes ASCII, with a tokenizer of `family`."""
  model = foreign.make('llama', seed=seed, vocab_size=VOCAB)
  tokenizer, settings = tokens.FAMILIES[family]()
  for role in ('bos', 'eos', 'pad'):  # not those of Llama
    name = settings[f'{role}_token']
    index = None if name is None else tokenizer.token_to_id(name)
    for config in (model.config, model.generation_config):
      setattr(config, f'{role}_token_id', index)
  tokens.write(directory, tokenizer, settings)
  vocabulary = vocabularies.load_vocabulary(directory)
  pieces = [vocabulary.token_bytes(i) or b'' for i in range(VOCAB)]
  unwanted = [
    i
    for i, piece in enumerate(pieces)
    if i != vocabulary.eos_id and not (piece.isascii() and piece.strip())
  ]
  model.lm_head.weight.data[unwanted] = 0
  foreign.save(model, directory)
  return directory


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
  root = tmp_path_factory.mktemp('models')
  return {
    family: write(root / family, family, seed=seed)
    for seed, family in enumerate(FAMILIES)
  }


def ours(model, **settings):
  from calm_jax.contrib.lm_eval import CalmLM

  if not isinstance(model, calm_jax.Model):
    model = calm_jax.load_pretrained(model)
  return CalmLM(model, **settings)


def theirs(directory, **settings):
  from lm_eval.models import huggingface

  return huggingface.HFLM(
    pretrained=str(directory),
    device='cpu',
    dtype='float32',
    batch_size=1,
    **settings,
  )


def requests(kind, *each):
  from lm_eval.api.instance import Instance

  return [
    Instance(request_type=kind, doc={}, arguments=args, idx=i)
    for i, args in enumerate(each)
  ]


def composed(directories, **settings):
  """Two tokenizers, and a composition that is felt."""
  settings = {'output_init': 'fan_in', **settings}
  return calm_jax.compose(
    anchor=calm_jax.load_pretrained(directories['qwen2']),
    augmenting={'other': calm_jax.load_pretrained(directories['llama2'])},
    mapping=calm_jax.LayerMapping.every(augmenting_stride=1),
    **settings,
  )


def assert_same(actual, expected):
  assert [one for _, one in actual] == [one for _, one in expected]
  sums = [[one for one, _ in each] for each in (actual, expected)]
  np.testing.assert_allclose(*sums, atol=1e-4, rtol=0)


def test_without_lm_eval_the_import_says_what_to_do(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.delitem(sys.modules, 'calm_jax.contrib.lm_eval', raising=False)
  with pytest.raises(ImportError, match=r'pip install .*\[lm_eval\]'):
    importlib.import_module('calm_jax.contrib.lm_eval')


@needs_lm_eval
@pytest.mark.convert
@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_log_likelihoods(family, directories):
  reference = theirs(directories[family])
  lm = ours(directories[family])
  # The greedy answers of some, so that is_greedy is both.
  words = ' '.join(tokens.CORPUS[:3]).split(' ')
  prompts = [' '.join(words[i : i + 3]) for i in range(0, len(words), 2)]
  prompts = [one.rstrip() for one in prompts if one.strip()]
  greedy = reference.generate_until(
    requests('generate_until', *((one, {'max_gen_toks': 1}) for one in prompts))
  )
  count = lambda text: len(reference.tok_encode(text))
  answers = [
    (one, space + answer)
    for one, answer in zip(prompts, greedy, strict=True)
    for space in ('', ' ')
    if count(one + space + answer) > count(one)
  ]
  pairs = requests('loglikelihood', *PAIRS, *answers)
  expected = reference.loglikelihood(pairs)
  assert_same(lm.loglikelihood(pairs), expected)
  assert {is_greedy for _, is_greedy in expected} == {True, False}


@needs_lm_eval
@pytest.mark.convert
@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_whole_texts(family, directories):
  """Without limit; and in windows, where theirs has no BOS but ours."""
  texts = requests('loglikelihood_rolling', *((text,) for text in TEXTS))
  model = calm_jax.load_pretrained(directories[family])
  lengths = (None, 16) if family == 'qwen2' else (None,)
  for length in lengths:
    # Theirs would otherwise predict one BOS from another.
    reference = theirs(
      directories[family], add_bos_token=False, max_length=length
    )
    found = ours(model, max_length=length).loglikelihood_rolling(texts)
    expected = reference.loglikelihood_rolling(texts)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-6)


@needs_lm_eval
@pytest.mark.convert
@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_greedy_answers(family, directories):
  """Token for token; and as texts, up to stop strings."""
  import torch

  reference, lm = theirs(directories[family]), ours(directories[family])
  ends = lm.model.vocabulary.eos_ids
  found = lm.model.decode(PROMPTS, max_new_tokens=12)
  for prompt, (one,) in zip(PROMPTS, found, strict=True):
    read = reference.tok_encode(prompt)
    (ids,) = reference.model.generate(
      torch.tensor([read]), max_new_tokens=12, do_sample=False
    ).tolist()
    assert one.tokens == [x for x in ids[len(read) :] if x not in ends]
  # Two groups of settings; then each is cut at a text from its middle.
  most = [8 + 4 * (i % 2) for i in range(len(PROMPTS))]
  how = [{'until': [], 'max_gen_toks': n} for n in most]
  free = requests('generate_until', *zip(PROMPTS, how, strict=True))
  answers = lm.generate_until(free)
  assert answers == reference.generate_until(free)
  how = [
    {'until': [text[3:5], 'never'], 'max_gen_toks': n}
    for text, n in zip(answers, most, strict=True)
  ]
  stopped = requests('generate_until', *zip(PROMPTS, how, strict=True))
  cut = lm.generate_until(stopped)
  assert cut == reference.generate_until(stopped)
  assert sum(map(len, cut)) < sum(map(len, answers)) / 2


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {file}}}
test_split: train
doc_to_text: question
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
"""
ANSWER = """
output_type: generate_until
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
PERPLEXITY = """
output_type: loglikelihood_rolling
doc_to_target: question
metric_list: [{metric: bits_per_byte}]
"""


@needs_lm_eval
@pytest.mark.convert
@pytest.mark.slow
def test_tasks_on_a_composed_model(directories, tmp_path, monkeypatch):
  """Its figures are what the model says of each document."""
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
  import lm_eval
  from lm_eval import tasks

  model = composed(directories)
  wholes = [one for one in PROMPTS if one == one.rstrip()]
  said = model.decode(wholes, max_new_tokens=6, stop=['\n'])
  docs = [
    {
      'question': one,
      'choices': ['lazy', 'dog is', '12'],
      'gold': i % 3,
      'answer': answer.text if i % 2 else 'nothing of that',
    }
    for i, (one, (answer,)) in enumerate(zip(wholes, said, strict=True))
  ]
  file = tmp_path / 'docs.jsonl'
  file.write_text('\n'.join(map(json.dumps, docs)))
  kinds = {'choice': CHOICE, 'answer': ANSWER, 'perplexity': PERPLEXITY}
  for name, text in kinds.items():
    head = TASK.format(name=f'toy_{name}', file=file)
    (tmp_path / f'{name}.yaml').write_text(head + text)
  results = lm_eval.simple_evaluate(
    ours(model),
    tasks=[f'toy_{name}' for name in kinds],
    task_manager=tasks.TaskManager(
      include_path=str(tmp_path), include_defaults=False
    ),
    bootstrap_iters=0,
  )['results']
  chosen = []
  for doc in docs:
    scores = model.score(
      [doc['question']] * 3, [f' {one}' for one in doc['choices']]
    )
    chosen.append(np.argmax([one.log_likelihood for one in scores]))
  right = [one == doc['gold'] for one, doc in zip(chosen, docs, strict=True)]
  assert results['toy_choice']['acc,none'] == np.mean(right)
  assert 0 < np.mean(right) < 1
  half = len(docs) // 2 / len(docs)
  assert results['toy_answer']['exact_match,none'] == half
  total = sum(
    model.score([[model.vocabulary.eos_id]], [one])[0].log_likelihood
    for one in wholes
  )
  # The same by another way: the logits of the whole text.
  ids = [model.vocabulary.eos_id, *model.vocabulary.encode(wholes[0])]
  chances_TV = jax.nn.log_softmax(model.logits([ids[:-1]])[0])
  (one,) = model.score([ids[:1]], [ids[1:]])
  expected = chances_TV[np.arange(len(ids) - 1), ids[1:]].sum()
  np.testing.assert_allclose(one.log_likelihood, expected, rtol=1e-5)
  size = sum(len(one.encode()) for one in wholes)
  np.testing.assert_allclose(
    results['toy_perplexity']['bits_per_byte,none'],
    -total / size / np.log(2),
    rtol=1e-5,
  )


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
  """A model of words, with BOS."""
  directory = tmp_path_factory.mktemp('toy')
  words = toys.vocabulary(tiny.VOCAB, bos_token='<s>')
  toys.model_directory(directory, tiny.AUGMENTING, words=words)
  return calm_jax.load_pretrained(directory)


@needs_lm_eval
def test_long_contexts_are_cut_on_the_left(toy):
  lm = ours(toy, max_length=6)
  pairs = requests(
    'loglikelihood', ('a1 a2 a3 a4 a5', ' a6 a7'), ('a4 a5', ' a6')
  )
  with pytest.warns(UserWarning, match='1 of 2 contexts were cut'):
    found = lm.loglikelihood(pairs)
  # BOS, four words, and a6: all that is read.
  kept = toy.score(['a2 a3 a4 a5', 'a4 a5'], ['a6 a7', 'a6'])
  np.testing.assert_allclose(
    [one for one, _ in found], [one.log_likelihood for one in kept], rtol=1e-5
  )
  (whole,) = toy.score(['a1 a2 a3 a4 a5'], ['a6 a7'])
  assert abs(found[0][0] - whole.log_likelihood) > 1e-3
  answers = requests('generate_until', ('a1 a2 a3 a4', {'max_gen_toks': 3}))
  with pytest.warns(UserWarning, match='1 of 1 contexts were cut'):
    text = lm.generate_until(answers)
  assert text == [
    one.strip() for one in toy.generate(['a3 a4'], max_new_tokens=3)
  ]
  with pytest.raises(ValueError, match='max_length = 6 has no room for 7'):
    lm.generate_until(requests('generate_until', ('a1', {'max_gen_toks': 7})))


@needs_lm_eval
def test_windows_of_a_model_with_bos(toy):
  """Each begins with BOS, reads one token again, and has six tokens."""
  words = [f'a{i}' for i in range(12)]
  (found,) = ours(toy, max_length=6).loglikelihood_rolling(
    requests('loglikelihood_rolling', (' '.join(words),))
  )
  # The last window holds as much as it can, and predicts the last two.
  windows = [
    ([], words[:5]),
    (words[4:5], words[5:10]),
    (words[6:10], words[10:]),
  ]
  scores = toy.score(
    [' '.join(context) for context, _ in windows],
    [' '.join(predicted) for _, predicted in windows],
  )
  expected = sum(one.log_likelihood for one in scores)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@needs_lm_eval
def test_how_answers_are_chosen(toy):
  lm = ours(toy, max_gen_toks=5)
  draw = {'do_sample': True, 'temperature': 1.0, 'top_k': 20, 'top_p': 0.95}
  plans = [
    ({'until': 'a'}, ['a'], 5, {}),
    ({'until': ['', 'b'], 'max_new_tokens': 3}, ['b'], 3, {}),
    ({'do_sample': False, 'temperature': 0.7, 'top_p': 0.9}, [], 5, {}),
    ({'do_sample': True, 'temperature': 0.0}, [], 5, {}),
    ({'do_sample': True}, [], 5, {'temperature': 1.0}),
    ({'temperature': 0.5, 'top_k': 0}, [], 5, {'temperature': 0.5}),
    ({'num_beams': 2}, [], 5, {'num_beams': 2}),
    (draw, [], 5, {k: v for k, v in draw.items() if k != 'do_sample'}),
  ]
  for how, *expected, fields in plans:
    expected = (*expected, sampling.DecodingConfig(**fields))
    assert lm._plan(how) == expected, how
  # A task that repeats a context wants another answer each time.
  repeated = requests('generate_until', *[('a1 a2', draw)] * 4)
  drawn = lm.generate_until(repeated)
  assert len(set(drawn)) > 1
  assert lm.generate_until(repeated) == drawn
  bad = requests('generate_until', ('a1', {'typical_p': 0.2, 'until': []}))
  with pytest.raises(ValueError, match=r"arguments \['typical_p'\]"):
    lm.generate_until(bad)


@needs_lm_eval
def test_answers_end_at_special_tokens(toy):
  """One that is a stop string has no text, so it is found among the ids."""
  lm, words = ours(toy), toy.vocabulary
  tokens = [3, 4, words.pad_id, 5]
  one = generation.Continuation(' a3 a4 a5', tokens, False)
  assert lm._text(one, ['<pad>']) == 'a3 a4'
  # Words beside it, unknown ones, and what is no token at all.
  assert lm._text(one, ['a9', 'b', '\n']) == 'a3 a4 a5'


@needs_lm_eval
def test_continuations_without_a_token_are_named(toy):
  with pytest.raises(ValueError, match="continuation ' ' of 'a1 a2'"):
    ours(toy).loglikelihood(requests('loglikelihood', ('a1 a2', ' ')))


@needs_lm_eval
def test_an_answer_that_has_begun(toy, monkeypatch):
  """What the model goes on with is the end of the text."""
  template = (
    '{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}'
    '{% if add_generation_prompt %}<assistant>{% endif %}'
  )
  monkeypatch.setattr(toy.vocabulary, 'chat_templates', {'default': template})
  lm = ours(toy)
  chat = [{'role': 'user', 'content': 'Why?'}]
  assert lm.chat_template(True) == template
  assert lm.apply_chat_template(chat) == '<user>Why?</><assistant>'
  chat += [{'role': 'assistant', 'content': 'Because '}]
  text = lm.apply_chat_template(chat, add_generation_prompt=False)
  assert text == '<user>Why?</><assistant>Because'
