"""Layer mappings: where connections land, and what each mistake says."""

import pytest

from calm_jax import composition, connections
from calm_jax.models import transformer
from tests import tiny

Mapping = connections.LayerMapping


def pairs(mapping, *, anchor, augmenting):
  resolved = mapping.resolve(
    anchor_depth=anchor, augmenting_depths={'code': augmenting}
  )
  return [(c.augmenting_layer, c.anchor_layer) for c in resolved]


@pytest.mark.parametrize(
  ('mapping', 'anchor', 'augmenting', 'expected'),
  [
    # The paper: n = N_A / 4, every N_B / n.
    (Mapping.every(), 24, 12, [(3, 7), (7, 15), (11, 23)]),
    (Mapping.every(augmenting_stride=4), 28, 18, [
      (3, 6), (7, 13), (11, 20), (15, 27)]),
    (Mapping.every(augmenting_stride=4), 6, 3, [(2, 5)]),
    (Mapping.every(augmenting_stride=1), 4, 2, [(0, 1), (1, 3)]),
    (Mapping.evenly_spaced(3), 6, 9, [(2, 1), (5, 3), (8, 5)]),
    (Mapping.evenly_spaced(2), 5, 5, [(1, 1), (4, 4)]),
    (Mapping.middle(2), 8, 4, [(1, 3), (2, 4)]),
    (Mapping.middle(1), 5, 5, [(2, 2)]),
    (Mapping.early(2), 8, 4, [(0, 0), (1, 1)]),
    (Mapping.late(2), 8, 4, [(2, 6), (3, 7)]),
  ],
)  # fmt: skip
def test_where_connections_land(mapping, anchor, augmenting, expected):
  assert pairs(mapping, anchor=anchor, augmenting=augmenting) == expected


def test_a_rule_applies_to_every_augmenting_model():
  resolved = Mapping.every(2).resolve(
    anchor_depth=4, augmenting_depths={'b': 2, 'a': 4}
  )
  assert [c.key for c in resolved] == ['a_1_into_1', 'b_1_into_3', 'a_3_into_3']


def test_before_block_0_has_a_name():
  assert tiny.connection(-1, 2).key == 'code_2_into_embed'


@pytest.mark.parametrize(
  ('mapping', 'words'),
  [
    (Mapping.explicit([tiny.connection(5, 0)]), ['= 5', '0 to 4', '-1']),
    (Mapping.explicit([tiny.connection(-2, 0)]), ['= -2', '0 to 4']),
    (Mapping.explicit([tiny.connection(0, 4)]), ['= 4', "'code'", '0 to 3']),
    (Mapping.explicit([tiny.connection(0, -1)]), ['= -1', '0 to 3']),
    (Mapping.explicit([tiny.connection(0, 0, 'x')]), ["'x'", "['code']"]),
    (Mapping.explicit([tiny.connection(0, 0)] * 2), ['twice']),
    (Mapping.explicit([]), ['empty']),
    (Mapping.evenly_spaced(5), ['5 connections', '1 to 4']),
    (Mapping.evenly_spaced(0), ['(0)', 'at least 1']),
    (Mapping.middle(6), ['6 connections', '1 to 4']),
    (Mapping.late(5), ['5 connections', '1 to 4']),
    (Mapping.every(-3), ['(-3)', 'at least 1']),
  ],
)
def test_mistakes_name_the_value_and_the_range(mapping, words):
  with pytest.raises(ValueError) as error:
    mapping.resolve(anchor_depth=5, augmenting_depths={'code': 4})
  for word in words:
    assert word in str(error.value)


def test_more_connections_than_anchor_layers():
  with pytest.raises(ValueError, match='asks for 4 connections.*1 to 3'):
    Mapping.every(1).resolve(anchor_depth=3, augmenting_depths={'code': 4})


def test_a_model_that_nothing_reads():
  with pytest.raises(ValueError, match=r"No connection reads \['math'\]"):
    Mapping.explicit([tiny.connection(0, 0)]).resolve(
      anchor_depth=3, augmenting_depths={'code': 4, 'math': 2}
    )


def test_heads_must_divide_the_anchor_width():
  with pytest.raises(ValueError, match='width 32 .* num_heads = 5'):
    tiny.composed(num_heads=5)
  for heads in (0, -2):
    with pytest.raises(ValueError, match=f'num_heads = {heads}: it must be at'):
      tiny.composed(num_heads=heads)


def test_a_setting_outside_its_choices():
  with pytest.raises(ValueError, match="position_encoding = 'learned'"):
    tiny.composed(position_encoding='learned')


def test_augmenting_models_need_a_composition():
  with pytest.raises(ValueError, match='belong together'):
    composition.ComposedLM(
      transformer.DecoderLM(tiny.ANCHOR),
      augmenting={'code': transformer.DecoderLM(tiny.AUGMENTING)},
    )
