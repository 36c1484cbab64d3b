"""What connections read, recomputed outside the composed model.

Run: pytest tests/attention_maps_test.py
"""

import dataclasses

import jax
import numpy as np
import pytest

import calm_jax
from calm_jax import attention_maps, sharding
from calm_jax.model import Model
from calm_jax.models import pretrained
from tests import own_vocabulary_test as own
from tests import tiny, toys

PROMPT = 'a1 a2 a3 a4'
ANSWER = 'a5 a6'
ONE_MESH = sharding.make_mesh(devices=jax.devices()[:1])


def shared(**settings):
  """A composed model whose two models have one vocabulary."""
  composed = tiny.composed(**settings)
  spec = pretrained.ModelSpec(
    config=tiny.ANCHOR, vocabulary=toys.vocabulary(tiny.VOCAB)
  )
  return Model(composed, toys.params(composed), spec=spec, mesh=ONE_MESH)


def own_words():
  """A decoder with a vocabulary of its own, and an encoder."""
  spec = pretrained.ModelSpec(config=own.ANCHOR, vocabulary=own.WORDS)
  return Model(
    own.MODEL, own.PARAMS, spec=spec, mesh=ONE_MESH, readers=own.READERS
  )


def check_weights(one):
  """Weights sum to 1 where there is something to read, and are 0 elsewhere."""
  readable = one.mask_TS.any(-1)
  np.testing.assert_allclose(
    one.weights_NTS.sum(-1), np.tile(readable, (4, 1)), atol=1e-6
  )
  assert not one.weights_NTS[:, ~one.mask_TS].any()
  assert (one.weights_NTS[:, one.mask_TS] > 0).all()


def test_the_weights_of_shared_tokens_and_the_logits():
  model = shared(gate='sigmoid', gate_bias=-1.0)
  found = calm_jax.attention_map(model, PROMPT, ANSWER)
  assert [t.strip() for t in found.tokens] == f'{PROMPT} {ANSWER}'.split()
  assert found.prompt_length == 4
  assert set(found.connections) == {c.key for c in model.composed.connections}
  for one in found.connections.values():
    assert one.tokens == found.tokens
    np.testing.assert_array_equal(one.mask_TS, np.tri(6, dtype=bool))
    check_weights(one)
    assert one.gates_TN.shape == (6, 4)
    assert 0 < one.gates_TN.min() < one.gates_TN.max() < 1
  ids = model.vocabulary.encode(f'{PROMPT} {ANSWER}')
  tiny.assert_close(found.logits_TV, model.logits([ids])[0])


@pytest.mark.slow
def test_weights_gates_and_values_are_what_is_added():
  """The update, made by hand of what the map shows."""
  model = shared(gate='sigmoid', mapping=(tiny.connection(-1, 3),))
  found = attention_maps.attention_map(model, PROMPT)
  (one,) = found.connections.values()
  composed, params = model.composed, model.params
  ids_BT = np.array([model.vocabulary.encode(PROMPT)])
  batch = tiny.batch_of(ids_BT)
  where = composed.augmenting['code'].whole(
    batch['decoder_positions'], batch['decoder_segment_ids']
  )
  states, _ = composed.augmenting['code'].apply(
    {'params': params['augmenting']['code']},
    ids_BT,
    where,
    layers=(3,),
    method='hidden_states',
  )
  x_BTD = composed.anchor.apply(
    {'params': params['anchor']}, ids_BT, method='embed'
  )
  cross = composed.cross_attention()
  theta = {'params': params['composition']['code_3_into_embed']}
  memory = cross.apply(
    theta, states[3], batch['decoder_positions'], method='read'
  )
  update_BTD = cross.apply(
    theta,
    x_BTD,
    memory,
    positions_BT=batch['decoder_positions'],
    mask_BTS=one.mask_TS[None],
    method='attend',
  )
  by_hand_TNH = np.einsum('NTS,SNH->TNH', one.weights_NTS, memory.value[0])
  by_hand_TNH *= one.gates_TN[..., None]
  by_hand_TD = by_hand_TNH.reshape(4, -1) @ theta['params']['out']['kernel']
  np.testing.assert_allclose(by_hand_TD, update_BTD[0], atol=1e-5)


def test_two_vocabularies_and_an_encoder():
  model = own_words()
  found = attention_maps.attention_map(model, 'abc +de', 'ab c')
  code, texts = found.connections.values()
  assert found.tokens[0] == '<bos>'
  assert ''.join(found.tokens[1:]) == 'abc +deab c'
  assert found.prompt_length == 6
  assert code.gates_TN is None
  assert ''.join(code.tokens[1:]) == 'abc +deab c'
  assert len(code.tokens) != len(found.tokens)
  # The encoder reads the prompt, and is read from its last position on.
  assert texts.tokens == (*'abc +de', '<eos>')
  assert not texts.mask_TS[:5].any()
  assert texts.mask_TS[5:].all()
  for one in (code, texts):
    check_weights(one)
  targets = [*own.WORDS.encode('ab c'), 0]  # the last is read by nobody
  batch = own.batch_of(('abc +de', targets))
  expected_TV = own.FORWARD(own.PARAMS, batch)[0, : len(found.tokens)]
  tiny.assert_close(found.logits_TV, expected_TV)


def test_the_picture_of_a_notebook():
  model = shared(mapping=(tiny.connection(0, 0), tiny.connection(3, 2)))
  found = attention_maps.attention_map(model, PROMPT, ANSWER)
  odd = dataclasses.replace(found, tokens=('$x', '\n', ' ', 'a' * 30, '$', ''))
  panels = [a for a in odd.plot().axes if a.get_title(loc='left')]
  assert [a.get_title(loc='left') for a in panels] == [
    'code, block 0 → anchor, block 0',
    'code, block 2 → anchor, block 3',
  ]
  labels = [text.get_text() for text in panels[0].get_yticklabels()]
  assert labels == ['$x', '↵', '·', 'a' * 13 + '…', '$', '·']
  assert odd._repr_png_().startswith(b'\x89PNG')


def test_what_cannot_be_mapped_is_refused():
  model = shared()
  with pytest.raises(ValueError, match='prompt and continuation are empty'):
    attention_maps.attention_map(model, '')
  composed = calm_jax.ComposedLM(model.composed.anchor)
  alone = Model(composed, {}, spec=model.spec, mesh=ONE_MESH)
  with pytest.raises(ValueError, match='no connections'):
    attention_maps.attention_map(alone, PROMPT)
