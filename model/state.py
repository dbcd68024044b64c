"""The part of a model's state that grows: the caches of its softmax mixers.

A cache is a dict whose `segment_ids` [...,B,S] have a slot for every token and
whose `index` counts those that are in it. Without an index it slides: it is
always full, at first of nothing, and forgets its oldest token for a new one.
"""

import jax
import numpy as np


def _is_cache(x):
  return isinstance(x, dict) and 'index' in x


def sliding(state):
  """An empty state whose caches never fill up, but slide."""
  return jax.tree.map(
      lambda x: {**x, 'index': None} if _is_cache(x) else x, state,
      is_leaf=_is_cache)


def check_room(state, tokens):
  """Raises ValueError if so many tokens more do not fit a cache."""
  for cache in jax.tree.leaves(state, is_leaf=_is_cache):
    index = concrete(cache['index']) if _is_cache(cache) else None
    slots = cache['segment_ids'].shape[-1] if index is not None else None
    if index is not None and index.max() + tokens > slots:
      raise ValueError(
          f'a state of length {slots} that holds {index.max()} tokens has no '
          f'room for {tokens} more: give init_state a larger length, or '
          'slides=True')


def concrete(x):
  """x as NumPy has it, or None if it is not known yet: traced, or not here."""
  if x is None or isinstance(x, jax.core.Tracer):
    return None
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return None
  return np.asarray(x)
