"""Running statistics in plain jnp: masks and matrix products over a scan.

The gradient keeps the state before each chunk and recomputes all else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK = 64


def check():
  """Everything is supported."""


class Seen(NamedTuple):
  """What the steps of a chunk see.

  Attributes:
    pairs: [t, s], whether step t sees step s of the chunk.
    before: whether step t sees the state.
  """
  pairs: Bool[Array, '#B T T']
  before: Bool[Array, '#B T']


def in_chunks(step, inputs, state, starts=None, *, chunk=CHUNK):
  """Runs a function over the chunks of a stream.

  Args:
    step: function (inputs of a chunk, state, Seen) -> (outputs, state): one of
      the statistics below, or made of them. A chunk may end in a filling of
      zeros, which no step sees and whose outputs are cut off.
    inputs: pytree of arrays [B,T,...].
    state: pytree, before the first step.
    starts: bool [B,T], where a document starts, or None: nowhere.
    chunk: largest number of steps in a chunk.

  Returns:
    (outputs, a pytree of [B,T,...], the state after the last step).
  """
  T = jax.tree.leaves(inputs)[0].shape[1]
  number = -(-T // chunk)
  size = -(-T // number)
  real = jnp.ones((1, T), bool)
  if starts is None:
    starts = ~real
  if number == 1:
    return step(inputs, state, _seen(starts, real))

  def split(x):
    fill = [(0, 0)] * x.ndim
    fill[1] = (0, number * size - T)
    x = jnp.pad(x, fill)
    return jnp.moveaxis(x.reshape(x.shape[0], number, size, *x.shape[2:]), 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], number * size, *x.shape[3:])[:, :T]

  def body(state, chunks):
    inputs, starts, real = chunks
    outputs, state = step(inputs, state, _seen(starts, real))
    return state, outputs

  state, outputs = jax.lax.scan(
      jax.checkpoint(body, prevent_cse=False), state,
      jax.tree.map(split, (inputs, starts, real)))
  return jax.tree.map(join, outputs), state


def _seen(starts, real):
  document = jnp.cumsum(starts, axis=1)
  causal = jnp.tril(jnp.ones((real.size, real.size), bool)) & real[0]
  same = document[:, :, None] == document[:, None, :]
  return Seen(causal & same, document == 0)


def running_mean(
    x: Float[Array, 'B T *X'],
    state: tuple[Float[Array, 'B *X'], Int[Array, 'B']],
    seen: Seen,
) -> tuple[Float[Array, 'B T *X'],
           tuple[Float[Array, 'B *X'], Int[Array, 'B']]]:
  """The mean of x over the steps seen.

  Args:
    x: float32.
    state: (sum, number of steps) so far; zeros to begin with.
    seen: of the chunk.
  """
  total, count = state
  flat = x.reshape(*x.shape[:2], -1)
  sums = _einsum('BTS,BSX->BTX', jnp.broadcast_to(
      seen.pairs, (x.shape[0], *seen.pairs.shape[1:])).astype(x.dtype), flat)
  sums += jnp.where(seen.before[..., None],
                    total.reshape(total.shape[0], 1, -1), 0.0)
  counts = seen.pairs.sum(-1) + jnp.where(seen.before, count[:, None], 0)
  means = (sums / counts[..., None]).reshape(x.shape)
  return means, (sums[:, -1].reshape(total.shape), counts[:, -1])


def empty_softmax(batch, heads, queries, width):
  """The state of `running_softmax` before the first step."""
  shape = (batch, heads, queries)
  return (jnp.full(shape, -jnp.inf), jnp.zeros(shape),
          jnp.zeros((*shape, width)))


def running_softmax(
    scores: Float[Array, 'B T N L'],
    v: Float[Array, 'B T N V'],
    state: tuple[Float[Array, 'B N L'], Float[Array, 'B N L'],
                 Float[Array, 'B N L V']],
    seen: Seen,
    *,
    sink: Float[Array, 'N'] | None = None,
) -> tuple[Float[Array, 'B T N V'], tuple[
    Float[Array, 'B N L'], Float[Array, 'B N L'], Float[Array, 'B N L V']]]:
  """Softmax averages of v over the steps seen, and their mean over L queries.

  A step's L scores do not depend on who sees it, so that a prefix is three
  numbers a query and value: top, sum e^{s - top} and sum e^{s - top} v.

  Args:
    scores: float32.
    v: float32.
    state: the three of before the chunk, at first `empty_softmax`.
    seen: of the chunk.
    sink: lambda: e^lambda joins the sums of a head, with a value of zero.
  """
  top, total, acc = state
  s = jnp.moveaxis(scores, 1, 3)[..., None, :]
  s = jnp.where(seen.pairs[:, None, None], s, -jnp.inf)  # [B,N,L,T,T]
  top = jnp.where(seen.before[:, None, None], top[..., None], -jnp.inf)
  new_top = jnp.maximum(top, s.max(-1))
  if sink is not None:
    new_top = jnp.maximum(new_top, sink[:, None, None])
  # Any number would do for the result, and none has a gradient.
  new_top = jax.lax.stop_gradient(new_top)
  weights = jnp.exp(s - new_top[..., None])
  kept = jnp.exp(jax.lax.stop_gradient(top) - new_top)
  totals = weights.sum(-1) + kept * total[..., None]
  below = totals
  if sink is not None:
    below = totals + jnp.exp(sink[:, None, None] - new_top)
  share = 1 / (below * scores.shape[-1])
  # Summed over the queries before they meet the values: one product for all.
  y = _einsum('BNTS,BSNV->BTNV', (weights * share[..., None]).sum(2), v)
  y += _einsum('BNLT,BNLV->BTNV', kept * share, acc)
  acc = (_einsum('BNLS,BSNV->BNLV', weights[..., -1, :], v)
         + kept[..., -1, None] * acc)
  return y, (new_top[..., -1], totals[..., -1], acc)


def _einsum(equation, *operands):
  # Float32 products on matrix units too; a CPU knows no others.
  return jnp.einsum(equation, *operands, precision='highest')
