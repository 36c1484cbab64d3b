"""Compiled programs are read right: loops, products, collectives, memory.

Run: pytest tests/hlo_test.py
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from calm_jax import hlo, sharding
from calm_jax.planning import traffic

# As the CPU's backend writes a scan of five products and a sum over devices.
CPU = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %p = (s32[], f32[4,8]{1,0}, /*index=2*/f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[8,8]{1,0} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %dot.1 = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%dot.1), channel_id=1, replica_groups=GROUPS, to_apply=%add
  ROOT %t = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%next, %all-reduce.1, %w)
}

%condition (p: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %p.1 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.2: f32[4,8], w.2: f32[8,8]) -> f32[4,8] {
  %x.2 = f32[4,8]{1,0} parameter(0)
  %w.2 = f32[8,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%zero, %x.2, %w.2)
  %loop = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%start), condition=%condition, body=%bodyNOTE
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501
KNOWN = ', backend_config={"known_trip_count":{"n":"5"}}'


def program(text=CPU, *, note='', groups='{{0,1,2,3}}', step='1'):
  text = text.replace('NOTE', note).replace('GROUPS', groups)
  return text.replace('constant(1)', f'constant({step})')


@pytest.mark.parametrize(
  ('note', 'step', 'trips'), [(KNOWN, '1', 5), ('', '1', 5), ('', '2', 3)]
)
def test_loops_count(note, step, trips):
  """By XLA's note, and without one as the TPU's backend leaves them."""
  text = program(note=note, step=step)
  assert hlo.flops(text) == trips * 2 * 4 * 8 * 8
  moved = traffic.collectives(hlo.parse(text), num_devices=4)
  nbytes = trips * 2 * 4 * 8 * 4 * 3 / 4
  assert moved == {'all-reduce': traffic.Moved(trips, nbytes)}


def test_a_loop_that_cannot_be_counted_is_an_error():
  text = program().replace('direction=LT', 'direction=NE')
  with pytest.raises(ValueError, match='dot.1 is in a loop without a known'):
    hlo.flops(text)
  with pytest.raises(ValueError, match='all-reduce.1 is in a loop without'):
    traffic.collectives(hlo.parse(text), num_devices=4)


def test_a_product_in_a_library_is_an_error():
  text = program().replace(
    ' dot(%x, %w)', ' custom-call(%x, %w), custom_call_target="__cublas$gemm"'
  )
  with pytest.raises(ValueError, match='hidden in a library call'):
    hlo.flops(text)


def test_what_is_no_program_is_an_error():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.flops('module @jit_f {}')


@pytest.mark.parametrize(
  ('groups', 'size'),
  [
    ('{{0,1},{2,3}}', 2),
    ('[2,4]<=[8]', 4),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
    ("mesh['axis_0'=8] {'axis_0':(1)2}", 2),
    ('{}', 16),
  ],
)
def test_groups_are_read(groups, size):
  parsed = hlo.parse(program(groups=groups))
  (moved,) = traffic.collectives(parsed, num_devices=16).values()
  assert moved.nbytes == 5 * 2 * 128 * (size - 1) / size


def test_a_group_of_one_sends_nothing():
  parsed = hlo.parse(program(groups='{{0},{1}}'))
  assert traffic.collectives(parsed, num_devices=2) == {}


KINDS = """HloModule jit_f

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %g = f32[32,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %g.2 = f32[32,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %s = f32[4,8]{1,0} reduce-scatter(%g), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %p = (f32[4,8]{1,0}, f32[4,8]{1,0}) collective-permute-start(%s), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %d = f32[4,8]{1,0} collective-permute-done(%p)
  ROOT %a = f32[4,8]{1,0} all-to-all(%d), channel_id=4, replica_groups=[1,8]<=[8]
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a.1, %b)
}
"""  # noqa: E501


def test_kinds_of_collectives():
  """One channel is one collective, in however many pieces."""
  found = traffic.collectives(hlo.parse(KINDS), num_devices=8)
  assert found == {
    'all-gather': traffic.Moved(1, 128 * 7),
    'reduce-scatter': traffic.Moved(1, 1024 * 7 / 8),
    'all-to-all': traffic.Moved(1, 128 * 7 / 8),
    'collective-permute': traffic.Moved(1, 128),
  }


CONVOLUTION = """HloModule jit_f

ENTRY %main (x: bf16[4,16,2,32], w: bf16[4,2,32,8]) -> bf16[4,16,3,8] {
  %x = bf16[4,16,2,32]{3,2,1,0} parameter(0)
  %w = bf16[4,2,32,8]{3,2,1,0} parameter(1)
  ROOT %c = bf16[4,16,3,8]{3,2,1,0:T(8,128)(2,1)S(1)} convolution(%x, %w), window={size=4x2 pad=3_3x1_1 rhs_reversal=1x0}, dim_labels=0b1f_01io->0b1f
}
"""  # noqa: E501


def test_convolutions_count_what_is_inside():
  """4 places meet 4 elements in a triangle of windows; 3 places meet 2."""
  # Axis 0: output 4 of window 4, padded by 3 in front: 1 + 2 + 3 + 4 pairs.
  # Axis 1: output 3 of window 2 over 2 elements, padded by 1: 1 + 2 + 1.
  assert hlo.flops(CONVOLUTION) == 2 * 16 * 32 * 8 * 10 * 4


def test_plain_products_agree_with_xla():
  """XLA's own analysis is right where there is no loop."""

  def f(x, w, v):
    return jnp.einsum('btd,df->btf', x, w) @ v

  shapes = [(4, 16, 32), (32, 64), (64, 8)]
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  compiled = jax.jit(f).lower(*args).compile()
  assert hlo.flops(compiled.as_text()) == 2 * 64 * 32 * 64 + 2 * 64 * 64 * 8
  assert compiled.cost_analysis()['flops'] == hlo.flops(compiled.as_text())


def test_a_sharded_program_says_what_it_sends():
  mesh = sharding.make_mesh(fsdp=8)
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  x = shape((16, 64), sharding=place(None, 'fsdp'))
  w = shape((64, 32), sharding=place('fsdp', None))
  compiled = jax.jit(jnp.dot, out_shardings=place()).lower(x, w).compile()
  parsed = hlo.parse(compiled.as_text())
  assert hlo.flops(compiled.as_text()) == 2 * 16 * 8 * 32
  assert traffic.collectives(parsed, num_devices=8) == {
    'all-reduce': traffic.Moved(1, 2 * 16 * 32 * 4 * 7 / 8)
  }


def test_memory_counts_slices_and_loops():
  """A scan reads each layer's matrix once, not all of them each time."""
  layers, width = 7, 64

  def f(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  args = [
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((width, width), (layers, width, width))
  ]
  text = jax.jit(f).lower(*args).compile().as_text()
  moved = traffic.hbm_bytes(hlo.parse(text)) / (width * width * 4)
  # At least: read x and w, write the product, read it, write tanh of it.
  assert 4 * layers <= moved <= 10 * layers, moved


def test_vector_memory_is_not_hbm():
  array = hlo.parse(CONVOLUTION).computations['main']['c'].arrays[0]
  assert array.off_hbm and array.nbytes == 4 * 16 * 3 * 8 * 2
  assert np.isclose(
    traffic.hbm_bytes(hlo.parse(CONVOLUTION)),
    2 * (4 * 16 * 2 * 32 + 4 * 2 * 32 * 8),
  )
