"""What would make a run fit: changes that were tried by the arithmetic."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

from calm_jax import sharding
from calm_jax.planning import chips, figures
from calm_jax.planning.chips import Chip
from calm_jax.planning.layout import Layout, lay_out
from calm_jax.quantization import QuantizationConfig

_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Change:
  """One thing to change.

  Attributes:
    kind: of several of a kind, the first that fits is enough.
    text: how to say it on the command line.
    settings: of `train.train`, instead of those given.
    axes: of the mesh, instead of those given.
    devices: how many there are.
  """

  kind: str
  text: str
  settings: Mapping[str, Any]
  axes: Mapping[str, int]
  devices: int


def that_fit(
  layout: Layout, chip: Chip, *, available: int, scale: float
) -> list[str]:
  """Returns the changes that make a step fit, with the bytes they lead to.

  Args:
    layout: what does not fit.
    chip: where.
    available: bytes of one device.
    scale: what temporaries are, over what they are estimated to be.
  """
  found: dict[str, str] = {}
  for change in _changes(layout, chip):
    if change.kind not in found:
      needed = _needed(layout, chip, change, available, scale)
      if needed is not None:
        found[change.kind] = f'{change.text}: {needed:,} bytes'
  return list(found.values())


def _needed(
  layout: Layout, chip: Chip, change: Change, available: int, scale: float
) -> int | None:
  """Returns the bytes that one device needs; None if it has not so many.

  None also where the mesh does not divide what is changed.
  """
  try:
    changed = lay_out(
      {**layout.settings, **change.settings},
      chips.stand_ins(chip, change.devices),
      axes=change.axes,
    )
  except ValueError:
    return None
  needed = sum(changed.bytes_per_device().values())
  if needed <= available:  # else there is no need to trace the step
    needed += int(figures.estimated(changed).temporaries * scale)
  return needed if needed <= available else None


def _changes(layout: Layout, chip: Chip) -> Iterator[Change]:
  """Yields what could be changed, of each kind the least change first."""
  settings, axes = layout.settings, dict(layout.mesh.shape)
  devices = layout.mesh.size
  batch_size, step = settings['batch_size'], settings['step_config']
  replicas = sharding.axis_size(layout.mesh, ('data', 'fsdp'))

  def change(kind, text, changed=None, *, mesh=axes, count=devices):
    return Change(kind, text, changed or {}, mesh, count)

  fsdp = 2 * axes['fsdp']
  while fsdp * axes['tensor'] <= devices:
    mesh = {**axes, 'fsdp': fsdp, 'data': devices // fsdp // axes['tensor']}
    yield change('mesh', f'make_mesh.fsdp = {fsdp}', mesh=mesh)
    fsdp *= 2
  if not settings['remat']:
    yield change('remat', 'train.remat = True', {'remat': True})
  if settings['stack'] == 'loop':
    yield change('stack', "train.stack = 'scan'", {'stack': 'scan'})
  if step.loss_chunk is None and layout.trainable != 'anchor':
    chunked = dataclasses.replace(step, loss_chunk=_CHUNK)
    text = f'StepConfig.loss_chunk = {_CHUNK}'
    yield change('chunk', text, {'step_config': chunked})
  parts = 2 * step.microbatches
  while batch_size // parts >= replicas:
    split = dataclasses.replace(step, microbatches=parts)
    text = f'StepConfig.microbatches = {parts}'
    yield change('microbatches', text, {'step_config': split})
    parts *= 2
  smaller = batch_size // 2
  while smaller >= replicas:
    yield change('batch', f'BATCH_SIZE = {smaller}', {'batch_size': smaller})
    smaller //= 2
  yield from _quantized(layout, change)
  least = {'remat': True, **_least_step(layout, replicas)}
  yield change('all', _all_text(least), least)
  for factor in (2, 4, 8, 16):
    count = devices * factor
    if chip.is_tpu and count > chip.largest:
      return
    mesh = {**axes, 'fsdp': count // axes['tensor'], 'data': 1}
    if batch_size % mesh['fsdp'] == 0:
      text = f'plan.num_devices = {count}, make_mesh.fsdp = {mesh["fsdp"]}'
      yield change('devices', text, mesh=mesh, count=count)


def _quantized(layout: Layout, change: Any) -> Iterator[Change]:
  settings = layout.settings
  anchor = settings['anchor']
  if layout.trainable == 'anchor' or anchor.quantization is not None:
    return
  try:
    config = QuantizationConfig('int8')
  except ValueError:  # qwix is missing
    return
  small = lambda spec: dataclasses.replace(spec, quantization=config)
  augmenting = settings['augmenting'] or {}
  yield change(
    'int8',
    "quantization = @QuantizationConfig() of the frozen models, 'int8'",
    {
      'anchor': small(anchor),
      'augmenting': {name: small(one) for name, one in augmenting.items()},
    },
  )


def _least_step(layout: Layout, replicas: int) -> dict[str, Any]:
  step = layout.settings['step_config']
  parts = layout.settings['batch_size'] // replicas
  chunk = None if layout.trainable == 'anchor' else _CHUNK
  least = dataclasses.replace(step, microbatches=parts, loss_chunk=chunk)
  return {'step_config': least}


def _all_text(least: Mapping[str, Any]) -> str:
  step = least['step_config']
  return (
    f'train.remat = True, StepConfig.microbatches = {step.microbatches} and'
    f' StepConfig.loss_chunk = {step.loss_chunk} together'
  )
