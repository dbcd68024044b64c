"""The delta rule in chunks, in plain jnp: matrix products in a loop.

Within a chunk, with P_t the decay from the state before it to step t and W_ts
that from step s to t, channel by channel,

  S_t = P_t S + sum_{s<=t} W_ts k_s u_s^T         y_t = q_t^T S_t
  u_t = b_t (v_t - S^T P_t k_t - sum_{s<t} (k_t^T W_ts k_s) u_s)

so that u = (I + A)^-1 (b v - b P k S) with A strictly lower triangular (the WY
form; Yang et al. 2024, arXiv 2406.06484). Without b, u is v.

As in `chunked.xla` a few chunks make a group, whose products are made together;
forward keeps the state before each group, and backward takes the groups in
reverse and differentiates one at a time.

Keys have two parts: they are asked for what the state has for them, as queries
are, and they are written. All that decays is what is written, in proportion to
exp(G_t - G_s) where it is asked for, G being the sum of the decays' logarithms.
So their gradients are in those of the parts (`_decay_gradient`), and the decays
themselves are constants when a group is differentiated.

Arrays of a group are laid out as [X, n, T, ...]: batch and heads, n chunks of T
steps. More axes would be easier to read, but where an array has nine (and vmap
adds one) the sums that XLA:CPU makes of it crash.

With documents in a row, no number of one reaches another, not even by 0 * inf:
what a product sums over steps has been masked, or where it is not finite is
taken for zero and remembered in the weights of its own document (`mix`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention.kernels import delta, loops
from attention.kernels.delta import products
from attention.kernels.delta.decays import Decays, between, decayed_scores

# Steps of a chunk, a power of two, and of a group.
CHUNK, GROUP = 32, 128

# Groups lie on the second axis.
_at = functools.partial(loops.at, axis=1)
_put = functools.partial(loops.put, axis=1)


def check(operands, rule):
  """Everything is supported."""
  del operands, rule


def forward(operands, rule):
  """See `attention.kernels.delta`."""
  del rule
  *inputs, s0, starts = operands
  inputs, starts = _split(operands, inputs), _split(operands, starts)
  q, _, v, *_ = inputs

  def step(i, carry):
    S, states, y = carry
    inputs_i, starts_i = _at((inputs, starts), i)
    parts = _lay_out(inputs_i)
    after, new = _group(S, parts, _given(parts, starts_i))
    new = _lay_back(new, y.shape[0])
    return after, _put(states, i, S), _put(y, i, new.astype(y.dtype))

  S = _rows_of_states(s0)
  states = jnp.zeros((S.shape[0], q.shape[1], *S.shape[1:]))
  y = jnp.zeros((*q.shape[:-1], v.shape[-1]), v.dtype)
  S, states, y = jax.lax.fori_loop(0, q.shape[1], step, (S, states, y))
  y = y.reshape(y.shape[0], -1, *y.shape[4:])[:, :operands.q.shape[1]]
  return (y, S.reshape(s0.shape)), states


def backward(operands, rule, states, cotangents):
  """See `attention.kernels.delta`."""
  del rule
  dy, dsT = cotangents
  *inputs, _, starts = operands
  inputs, pull_inputs = jax.vjp(lambda x: _split(operands, x), inputs)
  dy, starts = _split(operands, dy), _split(operands, starts)
  groups = dy.shape[1]

  def step(i, carry):
    i = groups - 1 - i
    dS, dinputs = carry
    S, inputs_i, starts_i, dy_i = _at((states, inputs, starts, dy), i)
    parts, pull_parts = jax.vjp(_lay_out, inputs_i)
    given = _given(parts, starts_i)
    (after, y), pull = jax.vjp(
        lambda S, parts: _group(S, parts, given), S, parts)
    _, pull_y = jax.vjp(lambda y: _lay_back(y, dy.shape[0]), y)
    dS_before, dparts = pull((dS, *pull_y(dy_i.astype(jnp.float32))))
    if parts.decay is not None:
      dparts = dparts._replace(decay=_decay_gradient(
          parts, dparts, jnp.sum(dS * after, -1), given))
    return dS_before, _put(dinputs, i, *pull_parts(dparts))

  dS, dinputs = jax.lax.fori_loop(
      0, groups, step,
      (_rows_of_states(dsT), jax.tree.map(jnp.zeros_like, inputs)))
  return delta.Operands(*pull_inputs(dinputs)[0], dS.reshape(dsT.shape), None)


class _Parts(NamedTuple):
  """The inputs of a group as they take part: float32."""
  q: jax.Array  # [X,n,G,T,H]
  asked: jax.Array | None  # [X,n,T,H]: keys as they are asked for.
  k: jax.Array  # [X,n,T,H]: keys as they are written.
  v: jax.Array  # [X,n,T,V]
  beta: jax.Array | None  # [X,n,T,1]
  decay: jax.Array | None  # [X,n,T,H or 1]


class _Given(NamedTuple):
  """What is constant when a group is differentiated.

  Attributes:
    packed: whether there are documents to be kept apart.
    same: whether two steps are of one, [X or 1,n,T,S].
    state: whether a step sees the state before the chunk, [X or 1,n,T,1].
    end: whether the state after the chunk sees a step, likewise.
    decays: the Decays, of a state and a step only if that sees it; or None.
    bad: whether a step of a document has a decay that is no number, [X,n,T,1].
  """
  packed: bool
  same: jax.Array
  state: jax.Array
  end: jax.Array
  decays: Decays | None = None
  bad: jax.Array | None = None


def _group(S, parts, given):
  """One group of chunks: the state after it, and its outputs [X,n,G,T,V].

  Args:
    S: the state before it, [X,H,V].
    parts: the _Parts.
    given: the _Given.
  """
  packed, causal = given.packed, jnp.tril(given.same)
  q, asked, k, v, beta, _ = parts
  if given.bad is not None:
    asked, k = (x if x is None else jnp.where(given.bad, jnp.nan, x)
                for x in (asked, k))
  # Before the rule, keys ask as queries do.
  queries = q if beta is None else jnp.concatenate([asked[:, :, None], q], 2)
  scores = jnp.where(causal[:, :, None], _scores(queries, k, given), 0.0)
  queries, written, kept = queries, k, None
  if given.decays is not None:
    before, after, *_ = given.decays
    queries, written = queries * before[:, :, None], k * after
    kept = before[:, :, -1, :, None]
  queries = jnp.where(given.state[:, :, None], queries, 0.0)
  written = jnp.where(given.end, written, 0.0)

  if beta is None:
    u = v
    new = products.product('a^T b', written, jnp.where(given.end, v, 0.0))
    S, states = _states(S, lambda i, S: new[:, i], kept, given)
  else:
    # Masked again: beta may be no number.
    A = jnp.where(jnp.tril(given.same, -1), scores[:, :, 0] * beta, 0.0)
    solved = products.mix(packed, products.inverse(packed, A, given.same),
                  beta * jnp.concatenate([v, queries[:, :, 0]], -1))
    values, keys = jnp.split(solved, (v.shape[-1],), -1)
    keys = jnp.where(given.state, keys, 0.0)
    u = []

    def new(i, S):
      read = products.product('a b', keys[:, i], S)
      u.append(values[:, i] - jnp.where(given.state[:, i], read, 0.0))
      return products.product('a^T b', written[:, i],
                      jnp.where(given.end[:, i], u[-1], 0.0))

    S, states = _states(S, new, kept, given)
    u = jnp.stack(u, axis=1)
    scores, queries = scores[:, :, 1:], queries[:, :, 1:]

  if packed:  # What `mix` leaves out comes back by its weight.
    lost = ~jnp.isfinite(u).all(-1)[:, :, None, None]
    scores = jnp.where(causal[:, :, None] & lost, jnp.nan, scores)
  y = products.mix(packed, _rows(scores), u).reshape(*q.shape[:4], -1)
  read = products.product('a b', _rows(queries), states).reshape(y.shape)
  return S, y + jnp.where(given.state[:, :, None], read, 0.0)


def _states(S, new, kept, given):
  """The state after the group, and those before each chunk, [X,n,H,V].

  Args:
    S: before the group, [X,H,V].
    new: function of a chunk's index and the state before it: what it adds.
    kept: what each chunk leaves of the state, [X,n,H or 1,1], or None: all.
    given: the _Given.
  """
  before = []
  for i in range(given.state.shape[1]):
    before.append(S)
    left = jnp.where(given.state[:, i, -1:], S, 0.0)
    S = (left if kept is None else left * kept[:, i]) + new(i, S)
  return S, jnp.stack(before, axis=1)


def _scores(queries, k, given):
  """Products of queries [X,n,G,T,H] and keys [X,n,S,H] decayed until them."""
  packed, decays = given.packed, given.decays
  if decays is not None and decays.before.shape[-1] > 1:
    return decayed_scores(packed, queries, k, decays)
  scores = products.pair(packed, _rows(queries), k)
  scores = scores.reshape(*queries.shape[:4], k.shape[2])
  if decays is None:
    return scores
  ones = jnp.ones((*k.shape[:3], 1))  # All channels decay alike.
  return scores * decayed_scores(packed, ones[:, :, None], ones, decays)


def _given(parts, starts):
  """The _Given of some _Parts and starts [B,n,T] or None."""
  X, n, T, _ = parts.k.shape
  packed = starts is not None
  if packed:
    document = jnp.cumsum(starts, axis=-1)
    document = jnp.repeat(document, X // document.shape[0], axis=0)
  else:
    document = jnp.zeros((1, n, T), int)
  given = _Given(
      packed=packed, same=document[..., :, None] == document[..., None, :],
      state=(document == 0)[..., None],
      end=(document == document[..., -1:])[..., None])
  if parts.decay is None:
    return given
  decay, bad = jnp.exp(parts.decay), None
  if packed:
    bad = jnp.isnan(decay).any(-1, keepdims=True)
    decay = jnp.where(bad, 0.0, decay)
  decays = between(decay, document[..., None])
  return given._replace(bad=bad, decays=decays._replace(
      before=jnp.where(given.state, decays.before, 0.0),
      after=jnp.where(given.end, decays.after, 0.0)))


def _decay_gradient(parts, dparts, dend, given):
  """The gradient of the logarithms of decays, [X,n,T,H or 1].

  That of G_t: what is asked for at step t has a factor exp(G_t), what is
  written exp(-G_t), and all of the last state exp(G_T). A decay is in all G
  from its step on.

  Args:
    parts, dparts: the _Parts and their gradients.
    dend: the product of the last state and its gradient, [X,H].
    given: the _Given.
  """
  through = (parts.q * dparts.q).sum(2) - parts.k * dparts.k
  if parts.asked is not None:
    through = through + parts.asked * dparts.asked
  if parts.decay.shape[-1] == 1:
    through, dend = (x.sum(-1, keepdims=True) for x in (through, dend))
  through, dend = (products.finite(given.packed, x) for x in (through, dend))
  later = jnp.triu(given.same).astype(jnp.float32)
  later = jnp.broadcast_to(later, (*through.shape[:2], *later.shape[2:]))
  sums = products.multiply('a b', later, through, precision='highest')
  ddecay, dend = [], dend[:, None]
  for i in reversed(range(sums.shape[1])):
    ddecay.append(sums[:, i] + jnp.where(given.end[:, i], dend, 0.0))
    dend = jnp.where(given.state[:, i, :1], ddecay[-1][:, :1], 0.0)
  return jnp.stack(ddecay[::-1], axis=1)


def _rows(x):
  """The steps of all queries [X,n,G,T,...] in a row."""
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _split(operands, arrays):
  """[B, time, ...] to [B, groups, n, T, ...], filled up with zeros.

  A key of zero and a log decay of zero leave the state as it is.
  """
  time = operands.q.shape[1]
  steps = min(CHUNK, 1 << (time - 1).bit_length())
  chunks = -(-time // steps)
  groups = -(-chunks * steps // GROUP)
  chunks = -(-chunks // groups)

  def split(array):
    fill = [(0, 0)] * array.ndim
    fill[1] = (0, groups * chunks * steps - time)
    return jnp.pad(array, fill).reshape(
        -1, groups, chunks, steps, *array.shape[2:])
  return jax.tree.map(split, arrays)


def _lay_out(inputs):
  """The _Parts of q, k, v, beta and decay [B,n,T,heads,...] of a group."""
  q, k, v, beta, decay = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)

  def rows(x):
    x = jnp.moveaxis(x, 3, 1)
    x = x.reshape(-1, *x.shape[2:])
    return x[..., None] if x.ndim == 3 else x

  heads = k.shape[3]
  q = q.reshape(*q.shape[:3], heads, -1, q.shape[-1])
  q = jnp.einsum('BnTKGH->BKnGTH', q)
  k, v, beta, decay = jax.tree.map(rows, (k, v, beta, decay))
  return _Parts(q.reshape(-1, *q.shape[2:]), None if beta is None else k, k, v,
                beta, decay)


def _lay_back(y, batch):
  """Outputs [X,n,G,T,V] as [B,n,T,heads,V]."""
  y = y.reshape(batch, -1, *y.shape[1:])
  y = jnp.einsum('BKnGTV->BnTKGV', y)
  return y.reshape(*y.shape[:3], -1, y.shape[-1])


def _rows_of_states(S):
  """States [B,K,H,V] as float32 [X,H,V]."""
  return S.astype(jnp.float32).reshape(-1, *S.shape[2:])
