"""Types and the alphabet of shapes that every file of calm_jax uses.

A name such as `query_BTNH` is an array with the axes B, T, N and H:

  B  batch                          D  anchor width (or a model's own width)
  T  anchor positions               E  augmenting width
  S  augmenting (or key) positions  N  query heads
  C  slots of a cache               K  key and value heads
  V  vocabulary                     H  head size
  L  layers                         F  feed-forward width
  G  query heads per key head, N // K

Masks are bool, and True means "may attend".
"""

from collections.abc import Mapping
from typing import Any

import jax

Array = jax.Array
DType = Any  # whatever jax.numpy.dtype() accepts
Params = Mapping[str, Any]  # a nested dict with arrays as leaves
Batch = Mapping[str, Array]  # T5X's keys, see `calm_jax.batches`
