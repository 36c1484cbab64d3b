"""The chips that can be planned for, with their makers' stated figures."""

from collections.abc import Sequence
import dataclasses
import difflib
import importlib.util
import math
import os
from typing import Any

from calm_jax import metrics

GIB, GB = 2**30, 10**9
# For libtpu on a host without a TPU: ask no metadata server, wait for no lock.
_LIBTPU_WITHOUT_TPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One accelerator as JAX sees it, which is one device.

  Attributes:
    name: as `plan.chip` names it.
    kind: what JAX calls it; its peak stands in `metrics.PEAK_FLOPS`.
    memory: bytes of HBM, or of a card's own memory.
    bandwidth: bytes/s of that memory.
    link: bytes/s that it can send to other chips, over all links together.
    axes: of the torus in which TPUs are wired; 0 for GPUs.
    largest: chips in one TPU slice, or in one GPU host.
  """

  name: str
  kind: str
  memory: int
  bandwidth: float
  link: float
  axes: int = 0
  largest: int

  @property
  def is_tpu(self) -> bool:
    return bool(self.axes)

  @property
  def peak(self) -> float:
    """Dense bfloat16 FLOP/s."""
    return metrics.PEAK_FLOPS[self.kind]


CHIPS = {
  chip.name: chip
  for chip in (
    # cloud.google.com/tpu/docs/v4: 32 GiB, 1200 GBps. Links: six of 50 GB/s in
    # each direction (arXiv 2304.01433, table 4).
    Chip(
      name='v4',
      kind='TPU v4',
      memory=32 * GIB,
      bandwidth=1200 * GB,
      link=300 * GB,
      axes=3,
      largest=4096,
    ),
    # cloud.google.com/tpu/docs/v5e: 16 GB, 819 GBps; bidirectional ICI 400
    # GBps, half of it to send.
    Chip(
      name='v5e',
      kind='TPU v5 lite',
      memory=16 * GIB,
      bandwidth=819 * GB,
      link=200 * GB,
      axes=2,
      largest=256,
    ),
    # cloud.google.com/tpu/docs/v5p: 95 GiB, 2765 GBps; ICI 1200 GBps.
    Chip(
      name='v5p',
      kind='TPU v5',
      memory=95 * GIB,
      bandwidth=2765 * GB,
      link=600 * GB,
      axes=3,
      largest=6144,
    ),
    # cloud.google.com/tpu/docs/v6e: 32 GB, 1638 GBps; ICI 800 GBps.
    Chip(
      name='v6e',
      kind='TPU v6',
      memory=32 * GIB,
      bandwidth=1638 * GB,
      link=400 * GB,
      axes=2,
      largest=256,
    ),
    # nvidia.com/en-us/data-center/a100, the SXM card of 80 GB: 2,039 GB/s;
    # NVLink 600 GB/s in both directions together.
    Chip(
      name='a100',
      kind='NVIDIA A100',
      memory=80 * GB,
      bandwidth=2039 * GB,
      link=300 * GB,
      largest=8,
    ),
    # nvidia.com/en-us/data-center/l4: 24 GB, 300 GB/s, PCIe Gen4 x16 64 GB/s.
    Chip(
      name='l4',
      kind='NVIDIA L4',
      memory=24 * GB,
      bandwidth=300 * GB,
      link=32 * GB,
      largest=8,
    ),
    # NVIDIA Ada GPU architecture whitepaper, appendix A: 24 GB, 1008 GB/s, PCIe
    # Gen 4, no NVLink.
    Chip(
      name='rtx4090',
      kind='NVIDIA GeForce RTX 4090',
      memory=24 * GB,
      bandwidth=1008 * GB,
      link=32 * GB,
      largest=8,
    ),
    # nvidia.com/en-us/data-center/h100, SXM: 80 GB, 3.35 TB/s, NVLink 900 GB/s.
    Chip(
      name='h100',
      kind='NVIDIA H100',
      memory=80 * GB,
      bandwidth=3350 * GB,
      link=450 * GB,
      largest=8,
    ),
    # nvidia.com/en-us/data-center/h200: 141 GB, 4.8 TB/s, NVLink 900 GB/s.
    Chip(
      name='h200',
      kind='NVIDIA H200',
      memory=141 * GB,
      bandwidth=4800 * GB,
      link=450 * GB,
      largest=8,
    ),
  )
}


def get(name: str) -> Chip:
  """Returns a chip by name; ValueError lists those that there are."""
  if name in CHIPS:
    return CHIPS[name]
  close = difflib.get_close_matches(str(name).lower(), CHIPS, n=1)
  meant = f' Did you mean {close[0]!r}?' if close else ''
  raise ValueError(
    f'plan.chip = {name!r} is not one of {sorted(CHIPS)}.{meant}'
  )


@dataclasses.dataclass(frozen=True)
class StandIn:
  """Takes a device's place in a mesh over which nothing is compiled."""

  id: int
  device_kind: str
  platform: str = 'none'
  process_index: int = 0


def stand_ins(chip: Chip, count: int) -> list[StandIn]:
  """Returns devices of which only shapes and shardings can be made."""
  if count < 1:
    raise ValueError(f'plan.num_devices = {count}: it must be at least 1.')
  return [StandIn(i, chip.kind) for i in range(count)]


def topology(chip: Chip, count: int) -> Sequence[Any]:
  """Returns the devices of a TPU slice, for which XLA can compile.

  Raises:
    ValueError: if libtpu is not installed, or there is no such slice.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      f'To compile for {chip.name}, plan needs libtpu, which is not installed:'
      " pip install 'calm_jax[plan]'. Or set plan.compile = False for analytic"
      ' figures.'
    )
  for name, value in _LIBTPU_WITHOUT_TPU.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  sides = torus(chip, count)
  small = count < 4  # A part of a host; whole hosts have 2 x 2.
  options = {'chips_per_host_bounds': list(sides)} if small else {}
  if chip.name == 'v4':  # Else each of its two cores is a device.
    options['chip_config_name'] = 'megacore'
  shape = 'x'.join(map(str, sides[: chip.axes]))
  try:
    found = topologies.get_topology_desc(
      topology_name=f'{chip.name}:{shape}', platform='tpu', **options
    )
  except Exception as error:  # libtpu has no type of its own for it
    raise ValueError(
      f'libtpu knows no {chip.name} slice of {shape} chips: {error}. Choose'
      ' another plan.num_devices, or plan.compile = False.'
    ) from error
  return found.devices


def torus(chip: Chip, count: int) -> tuple[int, int, int]:
  """Returns the sides of a slice of `count` chips, the most even ones.

  Raises:
    ValueError: unless it is a power of two that one slice can have.
  """
  if count < 1 or count & (count - 1) or count > chip.largest:
    allowed = [2**i for i in range(int(math.log2(chip.largest)) + 1)]
    raise ValueError(
      f'plan.num_devices = {count}: a slice of {chip.name} has {allowed[0]},'
      f' {allowed[1]}, {allowed[2]}, ... or {allowed[-1]} chips here. Choose'
      ' one, or set plan.compile = False, which takes any number.'
    )
  sides = [1, 1, 1]
  while math.prod(sides) < count:
    # 2 x 2 x 1 before 2 x 2 x 2: that is one host.
    smallest = min(range(chip.axes), key=lambda axis: (sides[axis], axis))
    sides[smallest] *= 2
  if count > 4:
    sides[: chip.axes] = sorted(sides[: chip.axes])
  return tuple(sides)
