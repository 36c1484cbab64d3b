"""Scores of texts against references: sacrebleu's chrF and spBLEU, BLEU-4.

Every score is a corpus score in percent. Where each example has several
samples, the n-th samples of all examples are a corpus; their scores are
averaged.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import math
import pathlib
import re
from typing import Any
import warnings

# beta is the weight of recall, and is not in sacrebleu's signature.
CHRF = {
  'chrF1': {'char_order': 6, 'word_order': 0, 'beta': 1},
  'chrF2': {'char_order': 6, 'word_order': 0, 'beta': 2},
  'chrF2++': {'char_order': 6, 'word_order': 2, 'beta': 2},
}
_SPM_FILE = 'flores200sacrebleuspm'


def chrf(
  predictions: Sequence[Sequence[str]],
  references: Sequence[str],
  *,
  names: Sequence[str] = tuple(CHRF),
) -> dict[str, float | str]:
  """Returns sacrebleu's chrF of each name in `CHRF`, with its signature."""
  from sacrebleu import metrics

  made = {name: metrics.CHRF(**CHRF[name]) for name in names}
  return _corpus_scores(made, predictions, references)


def spbleu(
  predictions: Sequence[Sequence[str]], references: Sequence[str]
) -> dict[str, float | str]:
  """Returns spBLEU with its signature; nothing if its tokenizer is not here.

  sacrebleu would download the tokenizer's model. Here it must lie where
  sacrebleu keeps it, else a warning says where that is.
  """
  from sacrebleu import metrics, utils

  model = pathlib.Path(utils.SACREBLEU_DIR) / 'models' / _SPM_FILE
  if not model.is_file():
    warnings.warn(
      f'spBLEU is left out: its tokenizer model, {model}, is not there.'
      ' Running sacrebleu with --tokenize flores200 once downloads it.'
    )
    return {}
  made = {'spBLEU': metrics.BLEU(tokenize='flores200')}
  return _corpus_scores(made, predictions, references)


def _corpus_scores(
  made: Mapping[str, Any],
  predictions: Sequence[Sequence[str]],
  references: Sequence[str],
) -> dict[str, float | str]:
  measured = {}
  for name, metric in made.items():
    measured[name] = mean_of_samples(
      lambda outputs, references, metric=metric: (
        metric.corpus_score(outputs, [references]).score
      ),
      predictions,
      references,
    )
    measured[f'{name}_signature'] = f'{name}|{metric.get_signature()}'
  return measured


def percent(
  score: Callable[[Any, Any], float],
  predictions: Sequence[Sequence[Any]],
  references: Sequence[Any],
) -> float:
  """Returns the mean of score(prediction, reference), in percent."""
  mean = lambda *pair: 100 * sum(map(score, *pair)) / len(references)
  return mean_of_samples(mean, predictions, references)


def mean_of_samples(
  score: Callable[[list[Any], list[Any]], float],
  predictions: Sequence[Sequence[Any]],
  references: Sequence[Any],
) -> float:
  """Returns the mean score of the first samples, of the second, and so on.

  Raises:
    ValueError: if there are none, or not equally many for all examples.
  """
  counts = sorted({len(samples) for samples in predictions})
  if len(predictions) != len(references) or len(counts) != 1 or counts == [0]:
    raise ValueError(
      f'{len(references)} examples with {len(predictions)} predictions, of'
      f' {counts} samples each, cannot be scored; give each example the same'
      ' number of samples, at least 1.'
    )
  corpora = [list(samples) for samples in zip(*predictions, strict=True)]
  return sum(score(one, list(references)) for one in corpora) / len(corpora)


# --- The BLEU-4 of CodeXGLUE's code-to-text ----------------------------------

# Letters and digits together, every other visible character by itself.
_TOKEN = re.compile(r'[^\W_]+|_|[^\w\s]')


def smoothed_bleu4(output: str, reference: str) -> float:
  """Returns CodeXGLUE's smoothed sentence BLEU-4, from 0 to 1.

  Texts are put in lower case, and split as NIST's mteval does after punctuation
  was set off. The precisions of 2 to 4 words count one match and one n-gram
  more than there are (Lin and Och, 2004); so does the brevity penalty count a
  word more in each length: exp(min(0, 1 - (r + 1) / (c + 1))).

  An empty output has no words to be wrong, and scores exp(-r); an output that
  shares no word with the reference scores 0.

  Source: the evaluator of CodeXGLUE, Code-Text/code-to-text.
  """
  words, wanted = (_TOKEN.findall(s.lower()) for s in (output, reference))
  penalty = min(0.0, 1 - (len(wanted) + 1) / (len(words) + 1))
  if not words:
    return math.exp(penalty)
  logarithms = 0.0
  for n in range(1, 5):
    made, there = _ngrams(words, n), _ngrams(wanted, n)
    matches = (made & there).total()
    if n == 1 and not matches:
      return 0.0
    extra = 1 if n > 1 else 0
    logarithms += math.log((matches + extra) / (made.total() + extra))
  return math.exp(logarithms / 4 + penalty)


def _ngrams(words: Sequence[str], n: int) -> Counter:
  return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
