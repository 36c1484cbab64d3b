"""Named sizes: what they hold. Run: pytest tests/models/sizes_test.py"""

import dataclasses
import math

from flax import linen as nn
import jax
import pytest

from calm_jax.models import encoder, sizes, transformer


@pytest.mark.parametrize('name', sizes.NAMES)
def test_parameters_are_those_of_the_published_checkpoint(name):
  config = sizes.config(name)
  model = transformer.DecoderLM(config, stack='scan')
  if config.attention == 'bidirectional':
    model = encoder.EncoderLM(config, stack='scan')
  shapes = jax.eval_shape(model.init_params, jax.random.key(0))
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(nn.unbox(shapes)))
  assert count == sizes.parameters(name)


def test_every_family_has_a_tiny_one():
  families = {name.rpartition('_')[0] for name in sizes.NAMES}
  tiny = {name for name in sizes.NAMES if name.endswith('_tiny')}
  # Llama 3.2 is a Llama 3 of other sizes.
  assert {f'{name}_tiny' for name in families - {'llama3.2'}} == tiny


def test_sizes_say_what_is_not_in_the_count():
  """Fields that change no shape, by the published configurations."""
  gemma = sizes.config('gemma2_27b')
  assert gemma.attention_scale == 144**-0.5
  assert (gemma.attention_softcap, gemma.final_softcap) == (50.0, 30.0)
  assert gemma.window_pattern == (4096, None)
  gemma = sizes.config('gemma3_27b')
  assert gemma.attention_scale == 168**-0.5
  assert gemma.rope_scaling.factor == 8
  assert gemma.window_pattern == (*[1024] * 5, None)
  assert sizes.config('gemma3_1b').rope_scaling is None
  llama = sizes.config('llama3.2_1b')
  assert llama.rope_scaling.kind == 'llama3'
  assert (llama.rope_theta, llama.norm_epsilon) == (5e5, 1e-5)
  assert sizes.config('mistral_7b').window_pattern == (4096,)
  assert sizes.config('qwen3_8b').rope_theta == 1e6


def test_another_model_is_refused():
  found = sizes.config('llama3_8b')
  free = dataclasses.replace(found, dtype='float32', init_stddev=0.5)
  sizes.check(free, name='llama3_8b', where='dir')
  message = 'dir is not a llama3_70b: num_layers = 32, expected 80'
  with pytest.raises(ValueError, match=message):
    sizes.check(found, name='llama3_70b', where='dir')
  other = dataclasses.replace(found, rope_theta=1e4)
  with pytest.raises(ValueError, match='rope_theta = 10000.0, expected 500000'):
    sizes.check(other, name='llama3_8b', where='dir')


def test_an_unknown_size():
  with pytest.raises(ValueError, match="Did you mean 'gemma_7b'"):
    sizes.config('gema_7b')
