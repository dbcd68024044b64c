"""Running means and running softmaxes of a stream, one chunk at a time.

A statistic is a function of a chunk and of the state before it,

  statistic(chunk [B,T,...], state, seen) -> (its prefixes [B,T,...], state)

in float32. Within the chunk every step meets every earlier one, and all that
came before is in the state, so that `in_chunks` makes the cost linear in the
length. Where a document starts, masks cut off what came before: nothing is
summed first and subtracted later, and as long as its numbers are finite the
bits of a document depend on it alone.

An implementation is a module of this package with the functions of `xla`:

  in_chunks(step, inputs, state, starts=None) -> (outputs, state)
  running_mean(x, state, seen) -> (means, state)
  running_softmax(scores, v, state, seen, *, sink=None) -> (averages, state)
  empty_softmax(batch, heads, queries, width) -> state
"""

from attention.kernels import dispatch


def select(implementation='auto'):
  """The module of an implementation: 'auto' or 'xla'."""
  return dispatch.select(__name__, implementation, ('xla',))
