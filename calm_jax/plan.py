"""Plans a training run for hardware that is not here; allocates nothing.

  python -m calm_jax.plan --gin_file=experiments/kv_quick_direct.gin \
      --gin.plan.chip="'v5e'" --gin.plan.num_devices=8

Takes the gin files and settings of `calm_jax.train`. See docs/plan.md.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax

from calm_jax import flops, metrics
from calm_jax.planning import chips, figures, moves
from calm_jax.planning import layout as layouts
from calm_jax.planning.chips import Chip
from calm_jax.planning.figures import Figures
from calm_jax.planning.layout import Layout


@dataclasses.dataclass(frozen=True)
class Prediction:
  """How long a step would take; never measured.

  Attributes:
    compute: seconds at the chip's stated peak.
    memory: seconds at the stated bandwidth of its memory.
    network: seconds at the stated bandwidth of its links.
    mfu: F_min over what the chips could do in the longest of the three.
  """

  compute: float
  memory: float
  network: float
  mfu: float

  @property
  def seconds(self) -> float:
    """The longest of the three: as if all overlapped."""
    return max(self.compute, self.memory, self.network)


def plan(
  *,
  chip: str,
  num_devices: int,
  compile: bool = True,
  settings_of: Callable[[str], Mapping[str, Any]] | None = None,
  config: str | None = None,
) -> dict[str, Any]:
  """Prints what a run would hold, compute and send, and whether it fits.

  Args:
    chip: one of `chips.CHIPS`.
    num_devices: how many of them.
    compile: whether XLA compiles the step for a TPU ahead of time; else, and
      for GPUs, the figures of the step are analytic.
    settings_of: returns the arguments of an entry point, here 'train'.
    config: the resolved configuration as text.

  Returns:
    The same figures by name.

  Raises:
    ValueError: for an unknown chip, a slice that there is not, and whatever
      `train` refuses before it allocates.
  """
  jax.config.update('jax_platforms', 'cpu')  # leave this host's devices alone
  wanted = chips.get(chip)
  compile = compile and wanted.is_tpu
  devices = (chips.topology if compile else chips.stand_ins)(
    wanted, num_devices
  )
  settings = layouts.complete(settings_of('train'))
  layout = layouts.lay_out(settings, devices)
  if config is not None:
    _section('Resolved configuration', config.strip())
  _section(
    'Parameters',
    metrics.describe(layout.model, layout.shapes, trainable=layout.trainable),
    layouts.table(layout),
  )
  held = layout.bytes_per_device()
  least = flops.least(
    layout.model, layout.shapes, layout.batch, layout.trainable
  )
  result = {'bytes': held, 'least_flops': least, 'fits': False}
  refused = None
  try:
    step = (
      figures.compiled(layout, wanted) if compile else figures.estimated(layout)
    )
  except figures.DoesNotFitError as error:
    refused, step = error, figures.estimated(layout)
  _section(
    f'One step on {num_devices} x {wanted.name}',
    f'mesh: {dict(layout.mesh.shape)}; figures {step.how}'
    + (' (the compiler refused it, see below)' if refused else ''),
  )
  _section('Bytes per device', _bytes_text(held, step))
  _section('FLOPs per step', _flops_text(step, least, num_devices))
  _section('Collectives per step', _collectives_text(step))
  predicted = predict(step, least, wanted, num_devices)
  tokens = layouts.tokens(layout)
  _section('Prediction', _prediction_text(predicted, wanted, tokens))
  result |= {
    'temporaries': step.temporaries,
    'flops': step.flops * num_devices,
    'collectives': dict(step.collectives),
    'prediction': predicted,
  }
  verdict = _verdict(layout, wanted, step, refused)
  result['fits'] = verdict.startswith('fits')
  _section('Verdict', verdict)
  return result


def predict(
  step: Figures, least: float, chip: Chip, num_devices: int
) -> Prediction:
  """Returns the roofline of a step, from stated peaks."""
  times = (
    step.flops / chip.peak,
    step.moved / chip.bandwidth,
    step.sent / chip.link,
  )
  return Prediction(*times, mfu=least / (max(times) * chip.peak * num_devices))


def _verdict(
  layout: Layout,
  chip: Chip,
  step: Figures,
  refused: figures.DoesNotFitError | None,
) -> str:
  """Says whether the step fits, and if not what would make it fit."""
  held = sum(layout.bytes_per_device().values())
  needed, available = held + step.temporaries, chip.memory
  if refused:
    needed = max(refused.needed or needed, held)
    available = refused.available or available
  if not refused and needed <= available:
    text = (
      f'fits: {needed:,} of {available:,} bytes per device'
      f' ({100 * needed / available:.1f} %)'
    )
    if step.is_compiled:
      return text
    more = held + int(figures.MARGIN * step.temporaries)
    return (
      f'{text}, by an estimate;\nat {figures.MARGIN} x these temporaries it'
      f' {"fits" if more <= available else "does not"}: {more:,} bytes'
    )
  estimated = figures.estimated(layout).temporaries
  scale = max(0, needed - held) / max(1, estimated)
  parts = {**layout.bytes_per_device(), 'temporaries': needed - held}
  part = max(parts, key=parts.get)
  name, size = layouts.largest(layout)
  lines = [
    f'does not fit: {needed:,} of {available:,} bytes per device.',
    f'Largest: {part}, {parts[part]:,} bytes; of parameters {name},'
    f' {size:,} bytes.',
  ]
  found = moves.that_fit(layout, chip, available=available, scale=scale)
  others = [
    other.name
    for other in chips.CHIPS.values()
    if other.memory >= needed
    and other.is_tpu == chip.is_tpu
    and other is not chip
  ]
  if others:
    found.append(f'plan.chip: {" or ".join(others)}, as it is')
  if found:
    lines.append('It would fit, by the arithmetic, with one of:')
    lines += [f'  {one}' for one in found]
  else:
    lines.append('No single change that was tried makes it fit.')
  return '\n'.join(lines)


# --- Texts -------------------------------------------------------------------


def _section(title: str, *texts: str) -> None:
  print(f'\n--- {title} ---')
  for text in texts:
    print(text, flush=True)


def _bytes_text(held: Mapping[str, int], step: Figures) -> str:
  rows = {**held, 'temporaries': step.temporaries}
  rows['total'] = sum(rows.values())
  return '\n'.join(f'{name:12}{size:>20,}' for name, size in rows.items())


def _flops_text(step: Figures, least: float, num_devices: int) -> str:
  total = step.flops * num_devices
  return (
    f'F_min    {least:.4e}\nthe step {total:.4e}, {total / least:.3f} x F_min'
  )


def _collectives_text(step: Figures) -> str:
  if not step.collectives:
    return 'none'
  lines = [f'{"kind":20}{"count":>10}{"bytes sent by a device":>26}']
  for kind, one in step.collectives.items():
    lines.append(f'{kind:20}{one.count:>10,.0f}{one.nbytes:>26,.0f}')
  return '\n'.join(lines)


def _prediction_text(predicted: Prediction, chip: Chip, tokens: int) -> str:
  each = predicted.compute, predicted.memory, predicted.network
  return '\n'.join(
    (
      'A roofline from stated peaks. Predicted, never measured.',
      f'compute  {predicted.compute:.4g} s at {chip.peak / 1e12:g} TFLOP/s',
      f'memory   {predicted.memory:.4g} s at {chip.bandwidth / 1e9:g} GB/s',
      f'network  {predicted.network:.4g} s at {chip.link / 1e9:g} GB/s',
      f'step     {predicted.seconds:.4g} s if all overlap, {sum(each):.4g} s if'
      ' nothing does',
      f'speed    {tokens / predicted.seconds:,.0f} tokens/s, MFU'
      f' {100 * predicted.mfu:.1f} % of F_min at most;'
      f' {100 * predicted.mfu * predicted.seconds / sum(each):.1f} % if nothing'
      ' overlaps',
    )
  )


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('plan')
