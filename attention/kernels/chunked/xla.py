"""Linear attention in chunks, in plain jnp: matrix products in a loop.

Within a chunk every query meets every key, as in the quadratic form; what came
before the chunk is in its state. A few chunks make a group, whose products are
made together, and the loop goes from group to group. Forward keeps the state
before each group, backward takes the groups in reverse and differentiates one
at a time.

The loop cuts a group out of arrays [B, groups, n, T, ...] of n chunks of T
steps, and lays it out as [B, K, n, T, ...], queries as [B, K, n, G, T, H], so
that each product is one batched matrix product without a transpose. Laid out
before the loop, XLA:CPU would copy all of them twice. Keys and queries that
states share have J heads there in place of K, and so have their products with
each other.
"""

import functools

import jax
import jax.numpy as jnp

from attention.kernels import chunked, loops

# On a CPU smaller groups take longer; larger groups and chunks gain nothing, or
# lose.
CHUNK, GROUP = 32, 4

# Groups lie on the second axis.
_at = functools.partial(loops.at, axis=1)
_put = functools.partial(loops.put, axis=1)


def check(operands, rule):
  """Everything is supported."""
  del operands, rule


def forward(operands, rule):
  """See `attention.kernels.chunked`."""
  q, k, v, decay, s0, z0, starts = operands
  inputs, starts = _split((q, k, v, decay)), _split(starts)
  groups = inputs[0].shape[1]

  def step(i, carry):
    state, states, y = carry
    after, new = _group(state, *_at((inputs, starts), i), rule)
    return after, _put(states, i, state), _put(y, i, new.astype(y.dtype))

  state = _float32((s0, z0))
  states = jax.tree.map(
      lambda a: jnp.zeros((a.shape[0], groups, *a.shape[1:])), state)
  heads = max(q.shape[2], v.shape[2])
  y = jnp.zeros((*inputs[0].shape[:4], heads, v.shape[-1]), v.dtype)
  (sT, zT), states, y = jax.lax.fori_loop(
      0, groups, step, (state, states, y))
  y = y.reshape(y.shape[0], -1, *y.shape[4:])
  return (y[:, :q.shape[1]], sT, zT), states


def backward(operands, rule, states, cotangents):
  """See `attention.kernels.chunked`."""
  dy, dsT, dzT = cotangents
  q, k, v, decay, _, _, starts = operands
  inputs, pull_inputs = jax.vjp(_split, (q, k, v, decay))
  dy, starts = _split(dy), _split(starts)
  groups = dy.shape[1]

  def step(i, carry):
    i = groups - 1 - i
    dstate, dinputs = carry
    state, inputs_i, starts_i, dy_i = _at((states, inputs, starts, dy), i)
    _, pull = jax.vjp(
        lambda *primals: _group(*primals, starts_i, rule),
        state, inputs_i)
    dstate, dinputs_i = pull((dstate, dy_i.astype(jnp.float32)))
    return dstate, _put(dinputs, i, dinputs_i)

  (ds0, dz0), dinputs = jax.lax.fori_loop(
      0, groups, step,
      (_float32((dsT, dzT)), jax.tree.map(jnp.zeros_like, inputs)))
  return chunked.Operands(*pull_inputs(dinputs)[0], ds0, dz0, None)


def _group(state, inputs, starts, rule):
  """One group of chunks: the state after it, and its outputs."""
  q, k, v, decay = _float32(inputs)
  heads = max(q.shape[3], v.shape[3])
  q = q.reshape(*q.shape[:3], min(q.shape[3], v.shape[3]), -1, q.shape[-1])
  q = jnp.einsum('BnTKGH->BKnGTH', q)
  k, v, decay = jax.tree.map(lambda x: jnp.moveaxis(x, 3, 1), (k, v, decay))
  state, y = _attend(state, q, k, v, decay, starts, rule)
  y = jnp.einsum('BKnGTV->BnTKGV', y)
  return state, y.reshape(*y.shape[:3], heads, -1)


def _attend(state, q, k, v, decay, starts, rule):
  """The same of arrays laid out for the products."""
  pairs, from_state, to_end = _visible(starts, v.shape[2:4])
  # All queries of a head in one product.
  rows = lambda x: x.reshape(*x.shape[:3], -1, x.shape[-1])
  grouped = lambda x: x.reshape(*x.shape[:3], *q.shape[3:5], x.shape[-1])
  of_states = lambda x: jnp.repeat(x, v.shape[1] // x.shape[1], axis=1)

  weights = grouped(_matmul('a b^T', rows(q), k))
  weights = jnp.where(pairs[:, None, :, None], weights, 0.0)
  k_kept = jnp.where(to_end[:, None, ..., None], k, 0.0)
  survives = from_state[:, None, :, -1]
  v_kept, kept = v, None
  if decay is not None:
    within, before = _decays(decay)
    weights = of_states(weights) * within[:, :, :, None]
    q = of_states(q) * before[..., None, :, None]
    v_kept = v * within[..., -1, :, None]
    kept = before[..., -1]

  new = _matmul('a^T b', k_kept, v_kept)
  S, S_before = _states(state[0], new, survives, kept)
  from_state = from_state[:, None, :, None]
  carried = grouped(_matmul('a b', rows(q), S_before))
  carried = jnp.where(from_state[..., None], carried, 0.0)
  y = grouped(_matmul('a b', rows(weights), v)) + carried
  if rule.normalize is None:
    return (S, None), y

  if decay is None:
    new = of_states(k_kept.sum(-2))
  else:
    new = _matmul('a b', within[..., -1:, :], k_kept)[..., 0, :]
  z, z_before = _states(state[1], new, survives, kept)
  carried = jnp.einsum('BKnGTH,BKnH->BKnGT', of_states(q), z_before)
  carried = jnp.where(from_state, carried, 0.0)
  # The reciprocal first: its gradient takes one division a row. Spread over V
  # by a product, so that its gradient is one too and not a sum: into that,
  # XLA:CPU would fuse the products that y is made of, a second time.
  scale = 1 / (of_states(weights.sum(-1)) + carried + rule.normalize)
  scale = jnp.einsum('...T,V->...TV', scale, jnp.ones(y.shape[-1:]),
                     precision='highest')
  return (S, z), y * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(form, a, b):
  """A batched product, 'a b', 'a b^T' or 'a^T b', as its gradients are.

  On a CPU a product over the rows of a runs on a slow path. Half the products
  of a gradient are such, so that a is transposed first; the barrier keeps the
  compiler from undoing that.

  Of J and K heads, on the second axis, each of the J is multiplied with K / J
  in a row.
  """
  return _product(form, a, b, heads=max(a.shape[1], b.shape[1]))


def _product(form, a, b, *, heads):
  """The same, summed over heads in a row if a and b have more than `heads`."""
  if form == 'a^T b':
    a = jax.lax.optimization_barrier(a.swapaxes(-1, -2))
  elif form == 'a b^T':
    b = b.swapaxes(-1, -2)
  fewest = min(a.shape[1], b.shape[1], heads)
  if fewest == max(a.shape[1], b.shape[1]):
    return a @ b
  a, b = (x.reshape(x.shape[0], fewest, -1, *x.shape[2:]) for x in (a, b))
  if heads > fewest:
    c = a @ b
    return c.reshape(c.shape[0], heads, *c.shape[3:])
  # One product, no sum after it: XLA:CPU fuses the two, and in jax 0.10.2 that
  # gives what was in memory where b is a constant, such as a state of zeros.
  return jnp.einsum('BJGnTS,BJGnSV->BJnTV', a, b)


def _matmul_forward(form, a, b):
  return _matmul(form, a, b), (a, b)


def _matmul_backward(form, operands, dc):
  a, b = operands
  da = functools.partial(_product, heads=a.shape[1])
  db = functools.partial(_product, heads=b.shape[1])
  if form == 'a b':
    return da('a b^T', dc, b), db('a^T b', a, dc)
  if form == 'a b^T':
    return da('a b', dc, b), db('a^T b', dc, a)
  return da('a b^T', b, dc), db('a b', a, dc)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _states(state, new, survives, kept):
  """The state after the group, and those before each chunk, [B, K, n, ...].

  Args:
    state: before the group, [B, K, ...].
    new: what each chunk adds to it, [B, K, n, ...].
    survives: whether the state outlives each chunk, [B or 1, 1, n].
    kept: what is left of it then, [B, K, n] or None: all.
  """
  widen = lambda a: a.reshape(*a.shape, *[1] * (new.ndim - 3))
  survives, kept = widen(survives), None if kept is None else widen(kept)
  before = []
  for i in range(new.shape[2]):
    before.append(state)
    left = state if kept is None else state * kept[:, :, i]
    state = jnp.where(survives[:, :, i], left, 0.0) + new[:, :, i]
  return state, jnp.stack(before, axis=2)


def _visible(starts, shape):
  """Which pairs meet, which steps see the state, which the state after sees."""
  if starts is None:
    document = jnp.zeros((1, *shape), int)
  else:
    document = jnp.cumsum(starts, axis=-1)
  causal = jnp.tril(jnp.ones((shape[-1], shape[-1]), bool))
  pairs = causal & (document[..., :, None] == document[..., None, :])
  return pairs, document == 0, document == document[..., -1:]


def _decays(decay):
  """Decay from step s to t, [B,K,n,T,S], and from the state to t, [B,K,n,T].

  Sums of log decays, never differences of sums: they are <= 0 however they
  round, and exact beside a decay of any size. As products with a triangle of
  ones: on a CPU these are cheaper than cumulative sums.
  """
  # A product has no room for 0 * inf; exp of this is 0 just the same.
  decay = jnp.maximum(decay, -1e30)
  steps = decay.shape[-1]
  until = jnp.tril(jnp.ones((steps, steps)))
  later = jnp.tril(jnp.ones((steps, steps), bool), -1)
  within = jnp.einsum(
      'TU,BKnUS->BKnTS', until, jnp.where(later, decay[..., None], 0.0),
      precision='highest')
  before = jnp.einsum('TU,BKnU->BKnT', until, decay, precision='highest')
  return jnp.exp(within), jnp.exp(before)


def _split(arrays):
  """[B, T, ...] to [B, groups, chunks, steps, ...], filled up with zeros.

  A key of zero and a log decay of zero leave the state as it is.
  """
  def one(array):
    # As even as they can be: 100 steps are four of 25, not 3 of 32 and 4.
    chunks = -(-array.shape[1] // CHUNK)
    groups = -(-chunks // GROUP)
    chunks = -(-chunks // groups)
    steps = -(-array.shape[1] // (groups * chunks))
    fill = [(0, 0)] * array.ndim
    fill[1] = (0, groups * chunks * steps - array.shape[1])
    return jnp.pad(array, fill).reshape(
        -1, groups, chunks, steps, *array.shape[2:])
  return jax.tree.map(one, arrays)


def _float32(tree):
  return jax.tree.map(lambda array: array.astype(jnp.float32), tree)
