"""Tasks of the lm-evaluation-harness (PyPI: lm_eval) on any `calm_jax.Model`.

  model = calm_jax.load_composition('out', anchor=..., augmenting=...)
  results = lm_eval.simple_evaluate(CalmLM(model), tasks=['arc_easy'])

Texts are split and encoded as in the harness's own adapter of transformers, so
that figures can be compared. Two things differ where `max_length` cuts: BOS
stays, and a context is cut in its text, which all models then read anew.
"""

from collections.abc import Iterator, Mapping, Sequence
import itertools
import json
from typing import Any
import warnings

from calm_jax import generation
from calm_jax.model import Model
from calm_jax.sampling import DecodingConfig

try:
  from lm_eval import utils
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import LM
except ImportError as error:
  raise ImportError(
    'calm_jax.contrib.lm_eval needs the lm-evaluation-harness, which cannot be'
    f" imported ({error}): pip install -c constraints.txt -e '.[lm_eval]' in a"
    ' checkout of calm_jax, or pip install lm_eval.'
  ) from error

# Names that the harness has for one thing; the first that is given counts.
_LIMITS = (
  'max_gen_toks',
  'max_new_tokens',
  'max_tokens',
  'max_completion_tokens',
)
_DRAWING = ('temperature', 'top_k', 'top_p')
_ALWAYS = ('num_beams', 'length_penalty', 'seed')

# A text, or ids where there is no text that would be encoded as them.
Prompt = str | list[int]


class CalmLM(LM):
  """What the harness asks of a language model.

  Attributes:
    model: an anchor alone, or composed.
    max_length: tokens of the anchor that it reads at most; None is no limit.
  """

  def __init__(
    self,
    model: Model,
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    max_gen_toks: int = 256,
  ):
    """Wraps a loaded model.

    Args:
      model: an anchor alone, or composed.
      batch_size: rows at once; at most 64 if None.
      max_length: contexts are cut on the left to fit into so many tokens. None
        is the trained length where positions are undefined beyond it (RoPE
        scaling of kind 'dynamic'), and otherwise no limit. Give the
        max_position_embeddings of config.json to do as the harness does.
      max_gen_toks: tokens an answer may have, unless its task says so.
    """
    super().__init__()
    self.model = model
    self.max_length = _trained_length(model)
    if max_length is not None:
      if max_length < 2:
        raise ValueError(f'max_length = {max_length}: it must be at least 2.')
      self.max_length = min(max_length, self.max_length or max_length)
    self._batch_size = batch_size
    self._max_gen_toks = max_gen_toks
    self._vocabulary = model.vocabulary

  def loglikelihood(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Scores continuations.

    Args:
      requests: whose `args` are a context and a continuation.
      disable_tqdm: not used.

    Returns:
      For each the log-likelihood in nats, and whether it is the greedy answer.
    """
    pairs, cut = [], 0
    for context, continuation in (request.args for request in requests):
      text, ids = self._split(context, continuation)
      kept = self._fit(text, len(ids) - 1)
      cut += kept != text
      pairs.append((self._begun(kept), ids))
    self._tell(cut, len(pairs))
    answers = self._score(pairs)
    for request, answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial('loglikelihood', request.args, answer)
    return answers

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Scores whole texts, in windows that do not overlap but for one token.

    Args:
      requests: whose `args` are a text.
      disable_tqdm: not used.

    Returns:
      The log-likelihood of each in nats; each token is predicted once.
    """
    windows = [list(self._windows(*request.args)) for request in requests]
    answers = iter(self._score(list(itertools.chain(*windows))))
    totals = []
    for request, of_text in zip(requests, windows, strict=True):
      total = sum(next(answers)[0] for _ in of_text)
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
      totals.append(total)
    return totals

  def generate_until(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Continues contexts, each up to a stop string.

    Args:
      requests: whose `args` are a context and how to continue it: `until`,
        `max_gen_toks`, `do_sample`, and fields of `DecodingConfig`.
      disable_tqdm: not used.

    Returns:
      The continuations, as a tokenizer decodes them by themselves.

    Raises:
      ValueError: for any other generation argument.
    """
    groups: dict[str, list[int]] = {}  # requests that are decoded alike
    for number, request in enumerate(requests):
      how = json.dumps(request.args[1], sort_keys=True)
      groups.setdefault(how, []).append(number)
    plans = {how: self._plan(json.loads(how)) for how in groups}
    texts, cut = [''] * len(requests), 0
    for how, numbers in groups.items():
      stop, most, config = plans[how]
      contexts = [requests[number].args[0] for number in numbers]
      kept = [self._fit(context, most) for context in contexts]
      cut += sum(map(str.__ne__, kept, contexts))
      found = self.model.decode(
        kept,
        max_new_tokens=most,
        stop=stop,
        batch_size=self._batch_size,
        config=config,
        seeds=numbers,
      )
      for number, (one,) in zip(numbers, found, strict=True):
        texts[number] = self._text(one, stop)
        args = requests[number].args
        self.cache_hook.add_partial('generate_until', args, texts[number])
    self._tell(cut, len(requests))
    return texts

  def _split(self, context: str, continuation: str) -> tuple[str, list[int]]:
    """Returns the context without spaces at its end, and what follows as ids.

    Both are encoded as one text: a space belongs to the word behind it.
    """
    text = context.rstrip()
    whole = self._vocabulary.encode(context + continuation)
    ids = whole[len(self._vocabulary.encode(text)) :]
    if not ids:
      raise ValueError(
        f'The continuation {continuation!r} of {context[-60:]!r} has no token'
        ' of its own, so it has no likelihood. Let the task end its context'
        ' between two tokens.'
      )
    return text, ids

  def _fit(self, text: str, following: int) -> str:
    """Returns the end of a text that leaves room for `following` tokens."""
    if self.max_length is None:
      return text
    room = self.max_length - following
    if room < 1:
      raise ValueError(
        f'max_length = {self.max_length} has no room for {following} tokens'
        ' behind a context. Raise it, or lower max_gen_toks.'
      )
    room -= self._vocabulary.bos_id is not None
    ids, ends = self._vocabulary.encode_with_ends(text)
    kept, data = text, text.encode()
    for end in ends[len(ids) - room - 1 :] if len(ids) > room else ():
      kept = data[end:].decode(errors='ignore')
      # What begins a text may be encoded in another way than before.
      if len(self._vocabulary.encode(kept)) <= room:
        break
    return kept

  def _begun(self, text: str) -> Prompt:
    """Returns the text, or what comes before the first token of any text."""
    if text or self._vocabulary.bos_id is not None:
      return text
    if self._vocabulary.eos_id is None:
      raise ValueError(
        'This model has neither BOS nor EOS, so there is nothing to predict the'
        ' first token of a text from. Choose tasks with a context.'
      )
    return [self._vocabulary.eos_id]

  def _windows(self, text: str) -> Iterator[tuple[Prompt, list[int]]]:
    """Yields what is read, and the ids that are predicted from it."""
    ids = self._vocabulary.encode(text)
    if self.max_length is None:
      most = max(1, len(ids))
    else:  # each window begins with BOS
      most = self.max_length - (self._vocabulary.bos_id is not None)
    for first, window in enumerate(
      utils.get_rolling_token_windows(
        ids, prefix_token=-1, max_seq_len=most, context_len=1
      )
    ):
      context, predicted = utils.make_disjoint_window(window)
      yield context if first else self._begun(''), predicted

  def _score(
    self, pairs: Sequence[tuple[Prompt, list[int]]]
  ) -> list[tuple[float, bool]]:
    if not pairs:
      return []
    prompts, targets = zip(*pairs, strict=True)
    found = self.model.score(prompts, targets, batch_size=self._batch_size)
    return [(one.log_likelihood, one.is_greedy) for one in found]

  def _plan(
    self, how: Mapping[str, Any]
  ) -> tuple[list[str], int, DecodingConfig]:
    """Returns stop strings, the most new tokens, and how they are chosen."""
    known = ('until', 'do_sample', *_LIMITS, *_DRAWING, *_ALWAYS)
    unknown = sorted(set(how) - set(known))
    if unknown:
      raise ValueError(
        f'The task wants the generation arguments {unknown}, which are not'
        f' known here; choose among {list(known)}, or override'
        " the task's generation_kwargs."
      )
    given = {name: value for name, value in how.items() if value is not None}
    stop = given.get('until', [])
    stop = [stop] if isinstance(stop, str) else stop
    limits = [given[name] for name in _LIMITS if name in given]
    fields = {name: given[name] for name in _ALWAYS if name in given}
    temperature = given.get('temperature', 1.0 if 'do_sample' in given else 0.0)
    if given.get('do_sample', True) and temperature:
      drawing = {name: given[name] for name in _DRAWING if name in given}
      fields |= {**drawing, 'temperature': temperature}
      fields['top_k'] = fields.get('top_k') or None  # 0 is all
    most = int(limits[0]) if limits else self._max_gen_toks
    return [one for one in stop if one], most, DecodingConfig(**fields)

  def _text(self, one: generation.Continuation, stop: Sequence[str]) -> str:
    """Returns a continuation as it is decoded by itself.

    A stop string may be a special token that is not EOS, and has no text. And
    some tokenizers drop the space that a text begins with.
    """
    vocabulary, text = self._vocabulary, one.text
    ids = [vocabulary.encode(word) for word in stop]
    ends = {row[0] for row in ids if len(row) == 1} - {vocabulary.unk_id}
    ends = {i for i in ends if vocabulary.token_bytes(i) is None}
    tokens = list(itertools.takewhile(lambda i: i not in ends, one.tokens))
    if len(tokens) < len(one.tokens):
      pieces = [generation.token_text(vocabulary, i) for i in tokens]
      text = b''.join(pieces).decode(errors='replace')
    if text[:1] == ' ' and vocabulary.decode(tokens)[:1] != ' ':
      text = text[1:]
    return text

  def _tell(self, cut: int, total: int) -> None:
    if cut:
      warnings.warn(
        f'{cut} of {total} contexts were cut on the left, to fit into'
        f' max_length = {self.max_length} tokens with what follows.'
      )

  @property
  def tokenizer_name(self) -> str:
    """Names the vocabulary, for the harness's cache of requests."""
    return f'calm_jax-{self._vocabulary.fingerprint()}'

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns the template that `apply_chat_template` uses, for the record."""
    name = 'default' if chat_template is True else chat_template
    return self._vocabulary.chat_templates.get(name) if name else None

  def apply_chat_template(
    self,
    chat_history: list[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """Returns a conversation as text; what the model is to go on with is last.

    Raises:
      ValueError: without a template.
    """
    text = self._vocabulary.apply_chat_template(
      chat_history, add_generation_prompt=add_generation_prompt
    )
    if add_generation_prompt:
      return text
    begun = chat_history[-1]['content'].strip()  # of the answer
    return text[: text.rindex(begun) + len(begun)]

  def get_model_info(self) -> dict[str, Any]:
    """Returns what the harness writes beside its results."""
    return {
      'fingerprints': self.model.fingerprints,
      'max_length': self.max_length,
    }


def _trained_length(model: Model) -> int | None:
  """Returns the length beyond which a position is not defined, if any."""
  towers = (model.composed.anchor, *model.composed.augmenting.values())
  scalings = (tower.config.rope_scaling for tower in towers)
  lengths = (
    scaling.original_length
    for scaling in scalings
    if scaling is not None and scaling.kind == 'dynamic'
  )
  return min(lengths, default=None)
