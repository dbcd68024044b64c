"""A recurrence cut into pieces of time that run at once.

With h_t = a_t h_{t-1} + b_t, a piece does to the state that enters it

  h -> (the product of its a_t) h + (what it ends with from zero)

and where a document starts inside, the first term is gone. So there are two
passes: one over all pieces from zero, for what they end with, and after
`entering` the real one, each piece from the state that enters it. The adjoint
is a recurrence of the same kind backwards in time, with the same products.
"""

import jax.numpy as jnp

# An H100 has 132 multiprocessors, and two warpgroups of this kind keep the
# exponentials of one busy. The first pass costs 0.7 of the real one, as nothing
# but its C and its output is missing, so that cutting pays below 2 / 1.7.
_FULL = 264
_LEAST = 156
_CHUNKS = 4  # in a piece at least: entering and leaving cost as much as one
_MOST = 32  # pieces: the states that enter them are computed one by one


def number(blocks, chunks):
  """How many pieces a sequence is cut into.

  Args:
    blocks: thread blocks that one piece would run.
    chunks: chunks of a sequence.

  Returns:
    A number of pieces, none of them empty: 1 where the chip is full.
  """
  if blocks >= _LEAST:
    return 1
  wanted = min(-(-_FULL // blocks), _MOST, max(1, chunks // _CHUNKS))
  length = -(-chunks // wanted)
  return -(-chunks // length)


def entering(initial, ends, log_decay, cut, *, reverse=False):
  """The state that enters each piece.

  Args:
    initial: [B, E, M], what enters the first piece (reverse: the last one).
    ends: [B, P, E, M], what pieces end with from zero.
    log_decay: [B, P, E, M], logarithm of the product of a piece's decays.
    cut: [B, P], whether nothing comes through a piece. None: something always.
    reverse: for the adjoint.

  Returns:
    [B, P, E, M]
  """
  n = ends.shape[1]
  states = [initial]
  order = range(n)[::-1] if reverse else range(n)
  for p in order[:-1]:
    through = jnp.exp(log_decay[:, p]) * states[-1]
    if cut is not None:
      through = jnp.where(cut[:, p, None, None], 0.0, through)
    states.append(ends[:, p] + through)
  return jnp.stack(states[::-1] if reverse else states, axis=1)
