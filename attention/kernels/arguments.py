"""What the recurrent ops do with their arguments before any implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def check_shape(name, array, **sizes):
  """Raises ValueError unless an argument's shape is that of its letters.

  Args:
    name: the argument's name.
    array: the argument; None passes, for arguments that are optional.
    **sizes: {letter: size} of its axes, in order.
  """
  if array is None or array.shape == tuple(sizes.values()):
    return
  letters = ', '.join(f'{letter}={size}' for letter, size in sizes.items())
  raise ValueError(
      f'{name} has shape {list(array.shape)}: give it [{letters}]')


def segment_starts(
    segment_ids: Int[Array, 'B T'] | None,
    segment_id0: Int[Array, 'B'] | None,
) -> Bool[Array, 'B T'] | None:
  """Marks the steps that must not see the state of the step before.

  Args:
    segment_ids: id of the document of each step; a new document starts where
      it changes. None: one document.
    segment_id0: id of the document of the initial state. None: that of the
      first step.
  """
  if segment_ids is None:
    if segment_id0 is not None:
      raise ValueError('segment_id0 is given without segment_ids: give both')
    return None
  if segment_id0 is None:
    before = segment_ids[:, :1]
  else:
    check_shape('segment_id0', segment_id0, B=segment_ids.shape[0])
    before = segment_id0[:, None].astype(segment_ids.dtype)
  before = jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
  return segment_ids != before
