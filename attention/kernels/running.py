"""Running means and running softmaxes of a stream, on top of linear attention.

A running sum is linear attention with queries and keys of one: S_t = S_{t-1} +
v_t. A softmax whose scores do not depend on who reads them is one too, of
e^{s - top} v and of e^{s - top}, whose decay is that of e^{-top} as the running
maximum grows. So these need no kernel of their own: what runs is
`chunked_linear_attention`, with its masks, so that the bits of a document
depend on it alone as long as its numbers are finite.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attention.kernels.chunked import chunked_linear_attention

CHUNK = 512


def in_chunks(step, inputs, state, starts=None, *, chunk=CHUNK):
  """Runs a function over a stream, a piece at a time.

  The gradient keeps the state before each piece and recomputes all else, so
  that what a step makes many of for each token never exists for all tokens.

  Args:
    step: function (inputs, state, starts) -> (outputs, state) of a piece: one
      of the statistics below, or made of them.
    inputs: pytree of arrays [B,T,...].
    state: pytree, before the first step.
    starts: bool [B,T], where a document starts, or None: nowhere.
    chunk: number of steps in a piece; the last one may be shorter.

  Returns:
    (outputs, a pytree of [B,T,...], the state after the last step).
  """
  T = jax.tree.leaves(inputs)[0].shape[1]
  number = T // chunk
  step = jax.checkpoint(step, prevent_cse=False)

  def split(x):
    x = x[:, :number * chunk]
    return jnp.moveaxis(x.reshape(-1, number, chunk, *x.shape[2:]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(-1, number * chunk, *x.shape[3:])

  def body(state, piece):
    outputs, state = step(piece[0], state, piece[1])
    return state, outputs

  parts, whole = [], (inputs, starts)
  if number:
    state, outputs = jax.lax.scan(body, state, jax.tree.map(split, whole))
    parts.append(jax.tree.map(join, outputs))
  if T % chunk:
    state, outputs = body(
        state, jax.tree.map(lambda x: x[:, number * chunk:], whole))
    parts.append(outputs)
  return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *parts), state


def running_mean(
    x: Float[Array, 'B T N H'],
    state: tuple[Float[Array, 'B N H'], Int[Array, 'B']],
    starts: Bool[Array, 'B T'] | None = None,
    *,
    implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N H'],
           tuple[Float[Array, 'B N H'], Int[Array, 'B']]]:
  """The mean of x over the document up to each step.

  Args:
    x: float32.
    state: (sum, number of steps) so far; zeros to begin with.
    starts: where a document starts. None: nowhere.
    implementation: of `chunked_linear_attention`.
  """
  total, count = state
  sums, total = _sums(x, total, starts, implementation=implementation)
  steps = jnp.arange(1, x.shape[1] + 1)
  counts = steps + count[:, None]
  if starts is not None:
    since = jax.lax.cummax(jnp.where(starts, steps, 0), axis=1)
    counts = jnp.where(since > 0, steps - since + 1, counts)
  return sums / counts[..., None, None], (total, counts[:, -1])


def empty_softmax(batch, heads, queries, width):
  """The state of `running_softmax` before the first step."""
  shape = (batch, heads, queries)
  return (jnp.full(shape, -jnp.inf), jnp.zeros(shape),
          jnp.zeros((*shape, width)))


def running_softmax(
    scores: Float[Array, 'B T N Q'],
    v: Float[Array, 'B T N V'],
    state: tuple[Float[Array, 'B N Q'], Float[Array, 'B N Q'],
                 Float[Array, 'B N Q V']],
    starts: Bool[Array, 'B T'] | None = None,
    *,
    sink: Float[Array, 'N'] | None = None,
    implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N V'], tuple[
    Float[Array, 'B N Q'], Float[Array, 'B N Q'], Float[Array, 'B N Q V']]]:
  """Softmax averages of v over the document so far, their mean over Q queries.

  A step's Q scores do not depend on who sees it, so that a prefix is three
  numbers a query and value: top, sum e^{s - top} and sum e^{s - top} v.

  Args:
    scores: float32.
    v: float32.
    state: the three of before the first step, at first `empty_softmax`.
    starts: where a document starts. None: nowhere.
    sink: lambda: e^lambda joins the sums of a head, with a value of zero.
    implementation: of `chunked_linear_attention`.
  """
  top, total, acc = state
  B, T, N, Q = scores.shape
  floor = scores if sink is None else jnp.maximum(scores, sink[:, None])
  # Any number would do for the result, and none has a gradient.
  before, tops = jax.lax.stop_gradient(_tops(floor, top, starts))
  # The sum of the weights is that of a value of one: a column more of v.
  with_ones = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1))], -1)
  acc = jnp.concatenate([acc, total[..., None]], -1).reshape(B, N * Q, -1)
  heads = lambda x: x.reshape(B, T, N * Q)
  sums, acc = _sums(
      jnp.repeat(with_ones, Q, axis=2), acc, starts,
      weights=heads(jnp.exp(scores - tops)), decay=heads(before - tops),
      implementation=implementation)
  split = lambda x: jnp.split(
      x.reshape(*x.shape[:-2], N, Q, -1), v.shape[-1:], -1)
  (sums, totals), (acc, total) = split(sums), split(acc)
  if sink is not None:
    totals += jnp.exp(sink[:, None] - tops)[..., None]
  # The reciprocal first: its gradient takes one division a row.
  y = (sums * (1 / (Q * totals))).sum(3)
  return y, (tops[:, -1], total[..., 0], acc)


def _sums(v, before, starts, *, weights=None, decay=None, implementation):
  """Running sums of weighted v [B,T,N,V] and the last ones [B,N,V]."""
  ones = jnp.ones((*v.shape[:3], 1))
  keys = ones if weights is None else weights[..., None]
  sums, state = chunked_linear_attention(
      ones, keys, v, decay=decay, s0=before[:, :, None], starts=starts,
      implementation=implementation)
  return sums, state[:, :, 0]


def _tops(x, before, starts):
  """The maximum of a document before each step and with it, [B,T,N,Q] each."""
  x = jnp.concatenate([before[:, None], x], axis=1)
  if starts is None:
    tops = jax.lax.cummax(x, axis=1)
    return tops[:, :-1], tops[:, 1:]
  new = jnp.pad(starts, ((0, 0), (1, 0)))[..., None, None]

  def later(a, b):
    return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

  _, tops = jax.lax.associative_scan(later, (new, x), axis=1)
  # What came before a start counts for nothing; its decay must not be > 0.
  return jnp.where(new[:, 1:], tops[:, 1:], tops[:, :-1]), tops[:, 1:]
