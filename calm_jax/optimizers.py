"""optax optimizers with warm-up and cosine decay, for what is trained."""

import dataclasses
from typing import Literal

import jax
import optax
import optax.contrib

from calm_jax import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Settings of the optimizer; it only ever sees trained parameters.

  Attributes:
    name: 'adamw' (arXiv 1711.05101), 'adafactor' (arXiv 1804.04235), or 'muon'
      (arXiv 2502.16982) for kernels, with optax's Adam with Nesterov momentum
      for embeddings and vectors, which then have no weight decay.
    learning_rate: the peak; with muon, that of all but kernels.
    muon_learning_rate: the peak for kernels.
    warmup_steps: steps of linear rise from 0.
    final_fraction: the cosine ends at this fraction of the peak.
    weight_decay: decoupled, on matrices only.
    b1: decay of the mean of the gradients (adamw).
    b2: decay of the mean of their squares (adamw).
    clip_norm: global norm that the trained gradients are cut to; None is off.
  """

  name: Literal['adamw', 'adafactor', 'muon'] = 'adamw'
  learning_rate: float = 1e-3
  muon_learning_rate: float = 0.02
  warmup_steps: int = 100
  final_fraction: float = 0.0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.98
  clip_norm: float | None = 1.0

  def __post_init__(self):
    known = ('adamw', 'adafactor', 'muon')
    if self.name not in known:
      raise ValueError(f'The optimizer {self.name!r} is not one of {known}.')
    for name, value in vars(self).items():
      if isinstance(value, int | float) and value < 0:
        raise ValueError(f'OptimizerConfig.{name} = {value}: it is negative.')
    for name in ('b1', 'b2'):
      if getattr(self, name) >= 1:
        raise ValueError(
          f'OptimizerConfig.{name} = {getattr(self, name)}: it must be below 1.'
        )
    if self.final_fraction > 1 or self.clip_norm == 0:
      raise ValueError(
        f'OptimizerConfig.final_fraction = {self.final_fraction} must be at'
        f' most 1, and clip_norm = {self.clip_norm} above 0, or None.'
      )

  def schedule(
    self, train_steps: int, peak: float | None = None
  ) -> optax.Schedule:
    """Returns the learning rate by step, from 0 to `train_steps`."""
    peak = self.learning_rate if peak is None else peak
    return optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=peak,
      warmup_steps=min(self.warmup_steps, train_steps - 1),
      decay_steps=train_steps,
      end_value=self.final_fraction * peak,
    )

  def make(self, train_steps: int) -> optax.GradientTransformation:
    """Returns the gradient transformation for a run of `train_steps`."""
    schedule = self.schedule(train_steps)
    if self.name == 'adamw':
      update = optax.adamw(
        schedule,
        b1=self.b1,
        b2=self.b2,
        weight_decay=self.weight_decay,
        mask=_matrices,
      )
    elif self.name == 'muon':
      update = optax.contrib.muon(
        self.schedule(train_steps, self.muon_learning_rate),
        adam_learning_rate=schedule,
        adam_b1=self.b1,
        adam_b2=self.b2,
        weight_decay=self.weight_decay,
        muon_weight_dimension_numbers=_kernels,
      )
    else:
      # optax.adafactor would not multiply the decay by the learning rate.
      update = optax.chain(
        optax.scale_by_factored_rms(),
        optax.add_decayed_weights(self.weight_decay, mask=_matrices),
        optax.scale_by_learning_rate(schedule),
      )
    if self.clip_norm is None:
      return update
    return optax.chain(optax.clip_by_global_norm(self.clip_norm), update)


def _matrices(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


def _kernels(params):
  """Names the axes of the matrices between layers; None for all else."""

  def one(path, leaf):
    if not trees.path_name(path).endswith('kernel'):
      return None
    stacked = leaf.ndim - 2  # a scanned segment has a leading axis of layers
    return optax.contrib.MuonDimensionNumbers(stacked, stacked + 1)

  return jax.tree_util.tree_map_with_path(one, params)
