"""The log-likelihood of given targets after given prompts."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from calm_jax import alignment, batches, decoding, generation
from calm_jax.array_types import Params
from calm_jax.composition import ComposedLM
from calm_jax.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class Score:
  """How likely a model finds one target.

  Attributes:
    log_likelihood: in nats, summed over the tokens of the target.
    num_tokens: how many these are.
    is_greedy: whether each of them is the likeliest, so that greedy decoding
      would have said the target.
  """

  log_likelihood: float
  num_tokens: int
  is_greedy: bool


class Scorer:
  """Scores with one model; remembers what it has compiled."""

  def __init__(
    self,
    model: ComposedLM,
    *,
    vocabulary: Vocabulary,
    readers: Mapping[str, alignment.Reader] | None = None,
  ):
    self._vocabulary = vocabulary
    self._readers = dict(readers or {})
    self._limit = decoding.longest_text(model)
    self._score = jax.jit(functools.partial(decoding.score_batch, model=model))

  def __call__(
    self,
    params: Params,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int | None = None,
  ) -> list[Score]:
    """Scores the targets of examples.

    Args:
      params: of the model.
      examples: {'inputs': ids, 'targets': ids, 'text': of the inputs, or None}.
      batch_size: rows at once; at most `generation.BATCH` if None.
    """
    for number, example in enumerate(examples):
      if not example['targets']:
        raise ValueError(
          f'Target {number} is empty: there is nothing to score.'
        )
      if not example['inputs']:
        raise ValueError(
          f'Prompt {number} is empty, and this vocabulary has no BOS: nothing'
          ' would predict the first token of its target. Give a prompt.'
        )
    if batch_size is not None:
      generation.check_count('batch_size', batch_size)
    if self._readers:
      examples = [
        # Where a token is cut for m_A, as in decoding; the caller warns of it.
        example | {'too_long': 0}
        for example in alignment.read_examples(
          examples, self._readers, anchor=self._vocabulary
        )
      ]
    if batch_size is None:
      most = generation.round_up(len(examples), smallest=1)
      batch_size = min(generation.BATCH, most)
    order = sorted(range(len(examples)), key=lambda i: _slots(examples[i]))
    scores: list[Score | None] = [None] * len(examples)
    for first in range(0, len(order), batch_size):
      rows = order[first : first + batch_size]
      batch = self._lay_out([examples[i] for i in rows], batch_size)
      found = jax.device_get(self._score(params, batch))
      for i, *values in zip(
        rows,
        found.log_likelihood_B.tolist(),
        found.count_B.tolist(),
        found.is_greedy_B.tolist(),
        strict=False,
      ):
        scores[i] = Score(*values)
    return scores

  def _lay_out(
    self, rows: Sequence[Mapping[str, Any]], batch_size: int
  ) -> dict[str, np.ndarray]:
    """Returns a batch of one example a row; the last rows may be padding."""
    return next(
      batches.ExampleBatches(
        lambda start: iter(rows[start:]),
        batch_size=batch_size,
        length=generation.round_up(max(map(_slots, rows)), limit=self._limit),
        pack=False,
        bos_id=self._vocabulary.bos_id,
        augmenting_lengths={
          name: generation.round_up(
            max(len(row['readings'][name][0]) for row in rows)
          )
          for name in self._readers
        },
      )
    )


def _slots(example: Mapping[str, Any]) -> int:
  """Returns how many tokens are read: all but the last."""
  return len(example['inputs']) + len(example['targets']) - 1
