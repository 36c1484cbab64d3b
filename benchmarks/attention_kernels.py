"""What attention kernels give: memory of a compiled step, and time.

  python benchmarks/attention_kernels.py --topology v5e:2x2
  python benchmarks/attention_kernels.py

The first needs no accelerator, only libtpu (pip install 'calm_jax[tpu]'): it
compiles the train step of a composition of Gemma 2 widths (soft-cap, windows,
grouped heads; fewer layers) for a TPU, with XLA's attention and with splash.
The second runs where a GPU or TPU is: attention alone, forward and backward,
XLA against the kernel of that device, and how far they differ.
"""

import argparse
import dataclasses
import functools
import os
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from calm_jax import optimizers, sharding, train_state, train_step
from calm_jax.composition import ComposedLM
from calm_jax.connections import CompositionConfig, LayerMapping
from calm_jax.models import attention, sizes
from calm_jax.models.transformer import DecoderLM

GIB = 2**30


def composed(kernel: str, layers: int) -> ComposedLM:
  """A Gemma 2 9B that reads a 2B, both of some layers only."""
  towers = [
    DecoderLM(
      dataclasses.replace(
        sizes.config(name),
        num_layers=layers,
        dtype='bfloat16',
        param_dtype='bfloat16',
      ),
      stack='scan',
      kernel=kernel,
    )
    for name in ('gemma2_9b', 'gemma2_2b')
  ]
  return ComposedLM(
    towers[0],
    augmenting={'augmenting': towers[1]},
    composition=CompositionConfig(mapping=LayerMapping.early(1)),
    remat=True,
  )


def on_mesh(tree: Any, places: Any) -> Any:
  """Shapes with the place of each."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    tree,
    places,
  )


def compile_step(
  kernel: str, mesh: Mesh, *, layers: int, batch: int, length: int
) -> Any:
  """Compiles a train step; nothing is allocated."""
  model = composed(kernel, layers)
  boxed = jax.eval_shape(model.init_params, jax.random.key(0))
  params = on_mesh(nn.unbox(boxed), sharding.param_shardings(boxed, mesh))
  optimizer = optimizers.OptimizerConfig().make(1000)
  trained = {'composition': params.pop('composition')}
  state = jax.eval_shape(
    functools.partial(train_state.create, optimizer=optimizer, seed=0), trained
  )
  places = jax.tree.map(lambda x: x.sharding, trained)
  places = train_state.shardings(state, places, mesh)
  rows = sharding.batch_sharding(mesh)
  names = 'input_tokens target_tokens positions segment_ids'.split()
  shapes = {
    f'decoder_{name}': jax.ShapeDtypeStruct((batch, length), 'int32')
    for name in names
  }
  shapes['decoder_loss_weights'] = jax.ShapeDtypeStruct(
    (batch, length), 'float32'
  )
  config = train_step.StepConfig(loss_chunk=512)
  step = jax.jit(
    train_step.make_train_step(model, optimizer, config),
    donate_argnums=0,
    out_shardings=(places, sharding.replicated(mesh)),
  )
  with jax.set_mesh(mesh):
    return step.lower(
      on_mesh(state, places),
      params,
      on_mesh(shapes, dict.fromkeys(shapes, rows)),
    ).compile()


def compile_both(flags: argparse.Namespace) -> None:
  """Prints what XLA plans for either attention."""
  from jax.experimental import topologies

  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  devices = topologies.get_topology_desc(flags.topology, 'tpu').devices
  mesh = sharding.make_mesh(fsdp=len(devices) // 2, tensor=2, devices=devices)
  print(
    f'{devices[0].device_kind} x {len(devices)}, {flags.batch} x'
    f' {flags.length}, {flags.layers} layers'
  )
  for kernel in ('splash', 'xla'):
    started = time.perf_counter()
    try:
      step = compile_step(
        kernel,
        mesh,
        layers=flags.layers,
        batch=flags.batch,
        length=flags.length,
      )
    except jax.errors.JaxRuntimeError as error:
      print(f'{kernel:8} refused: {str(error).splitlines()[0][:300]}')
      continue
    memory = step.memory_analysis()
    print(
      f'{kernel:8} compiled in {time.perf_counter() - started:.0f} s;'
      f' {memory.temp_size_in_bytes / GIB:.2f} GiB temporary,'
      f' {memory.argument_size_in_bytes / GIB:.2f} GiB of arguments a device;'
      f' {step.as_text().count("tpu_custom_call")} kernel calls',
      flush=True,
    )


def time_both(flags: argparse.Namespace) -> None:
  """Times attention alone, and compares the results."""
  backend = jax.default_backend()
  kernel = {'gpu': 'cudnn', 'tpu': 'splash'}.get(backend)
  if kernel is None:
    raise SystemExit('There is no GPU or TPU here; see --topology.')
  softcap = 50.0 if kernel == 'splash' else None
  rng, batch, length = np.random.default_rng(0), flags.batch, flags.length
  q, k, v = (
    jnp.asarray(rng.normal(size=(batch, length, heads, 256)), jnp.bfloat16)
    for heads in (16, 8, 8)
  )
  # Two packed segments, and an eighth of padding.
  edges = np.searchsorted([3 / 8, 7 / 8], np.arange(length) / length, 'right')
  segments = jnp.asarray(np.tile((edges + 1) % 3, (batch, 1)), jnp.int32)
  real = (segments > 0)[..., None, None]

  def loss(q, k, v, kernel):
    where = attention.Positions.full(segments, segments)
    out = attention.attend(
      *(q, k, v, where.mask_BTS),
      scale=256**-0.5,
      softcap=softcap,
      kernel=kernel,
      pattern=where.pattern,
    )
    out = jnp.where(real, out, 0)
    return (out.astype(jnp.float32) ** 2).sum(), out

  found = {}
  for name in ('xla', kernel):
    both = jax.jit(
      jax.value_and_grad(
        functools.partial(loss, kernel=name), argnums=(0, 1, 2), has_aux=True
      )
    )
    seconds = []
    for _ in range(flags.steps + 1):
      started = time.perf_counter()
      found[name] = jax.block_until_ready(both(q, k, v))
      seconds.append(time.perf_counter() - started)
    print(f'{name:8} {1e3 * np.median(seconds[1:]):8.2f} ms')
  (_, out), gradient = found['xla']
  (_, other), other_gradient = found[kernel]
  for what, one, two in zip(
    ('output', 'dq', 'dk', 'dv'),
    (out, *gradient),
    (other, *other_gradient),
    strict=True,
  ):
    one, two = np.float32(one), np.float32(two)
    scale = np.abs(one).max()
    print(
      f'{what}: differs by {np.abs(one - two).max() / scale:.1e} of {scale:.3g}'
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--topology', help="compile for a TPU, as 'v5e:2x2'")
  parser.add_argument('--layers', type=int, default=4)
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--length', type=int, default=4096)
  flags = parser.parse_args()
  compile_both(flags) if flags.topology else time_both(flags)


if __name__ == '__main__':
  main()
