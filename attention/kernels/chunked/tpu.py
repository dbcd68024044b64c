"""Linear attention in chunks for TPU, in Pallas (Mosaic TPU).

A program takes one key head and its query heads through the sequence, S [H,V]
and z [1,H] in VMEM in float32. In a chunk of C steps, with rows for the
queries of all G heads:

  W = q k^T * D        D[t,s] = exp(sum of decays of s+1..t) for s <= t
  y = W v + a q S      a[t] = exp(sum of decays up to t)
  S = e S + (b k)^T v  b[s] = exp(sum of decays after s), e that of them all

The state is saved before each block of a few chunks. The backward kernel takes
blocks in reverse, recomputes the states within and makes all gradients at
once.

Steps of another document, and those after the last, are zeroed as they are
loaded (see `tpu_blocks.walk`): zeros with a log decay of 0 leave the state as
it is, and nothing that a product multiplies by 0 can be inf or nan.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.kernels import chunked
from attention.kernels.chunked import tpu_blocks

_LANES = 128

# Contractions of matmuls, by the dimensions they sum over: a b, a b^T, a^T b.
_NN, _NT, _TN = (1, 0), (1, 1), (0, 0)


def check(operands, starts, *, normalize):
  """Raises NotImplementedError for what these kernels decline."""
  del starts, normalize
  q, k, v, *_ = operands
  dtypes = {x.dtype for x in (q, k, v)}
  if len(dtypes) > 1 or dtypes.pop() not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
        f'q, k and v of dtypes {q.dtype}, {k.dtype} and {v.dtype}: the TPU '
        'kernels take bfloat16 or float32, the same for all')
  H, V = q.shape[-1], v.shape[-1]
  if max(H, V) > 256:
    raise NotImplementedError(
        f'H ({H}) and V ({V}): the TPU kernels take widths up to 256')


def forward(operands, starts, *, normalize):
  """See `attention.kernels.chunked`."""
  q, k, v, decay, s0, z0 = operands
  call = tpu_blocks.Launch(operands, starts, eps=normalize, reverse=False)
  S, z = _states(call)
  out = call.run(
      _forward_kernel,
      dict(q=call.queries(q), k=call.keys(k), v=call.keys(v),
           decay=call.decays(decay), s0=call.state(s0), z0=call.state(z0)),
      dict(y=call.out_queries(call.V, v.dtype), sT=call.out_state(S),
           zT=z and call.out_state(z), Ss=call.out_saved(S),
           zs=z and call.out_saved(z)),
      dict(S=S, z=z, **_decay_scratch(call, decay, 'before')),
      name='chunked_forward',
      products=call.spec.chunk * (call.H + call.V) + 2 * call.H * call.V)
  sT, zT = _restore_states(call, operands, out['sT'], out['zT'], total=False)
  return call.restore(out['y'], v.shape[-1]), sT, zT, (out['Ss'], out['zs'])


def backward(operands, starts, states, dy, dsT, dzT, *, normalize):
  """See `attention.kernels.chunked`."""
  q, k, v, decay, s0, z0 = operands
  call = tpu_blocks.Launch(operands, starts, eps=normalize, reverse=True)
  S, z = _states(call)
  H, V = call.H, call.V
  chunks = call.spec.chunks
  Ss, zs = states
  out = call.run(
      _backward_kernel,
      dict(q=call.queries(q), k=call.keys(k), v=call.keys(v),
           dy=call.queries(dy.astype(v.dtype)), decay=call.decays(decay),
           Ss=call.saved(Ss), zs=call.saved(zs),
           dsT=call.state(call.to_first(dsT), own=True),
           dzT=call.state(call.to_first(dzT), own=True)),
      dict(dq=call.out_queries(H, q.dtype), dk=call.out_keys(H, k.dtype),
           dv=call.out_keys(V, v.dtype),
           ddecay=None if decay is None else call.out_decays(),
           ds0=call.out_state(S), dz0=z and call.out_state(z)),
      dict(dS=S, dz=z, S=(chunks, *S), z=z and (chunks, *z),
           **_decay_scratch(call, decay, 'before', 'after')),
      name='chunked_backward',
      products=call.spec.chunk * (3 * H + 2 * V) + 5 * H * V)
  dk, dv = (jnp.swapaxes(call.of_heads(out[name], total=True), 1, 2)
            for name in ('dk', 'dv'))
  ddecay = call.of_heads(out['ddecay'], total=True)
  if ddecay is not None:
    ddecay = jnp.swapaxes(ddecay[:, :, 0, :q.shape[1]], 1, 2)
  return chunked.Operands(
      call.restore(out['dq'], q.shape[-1]), dk[..., :k.shape[-1]],
      dv[..., :v.shape[-1]], ddecay,
      *_restore_states(call, operands, out['ds0'], out['dz0'], total=True))


def _states(call):
  """Shapes of S and z in the kernels, z None without a normaliser."""
  z = None if call.spec.eps is None else (1, call.H)
  return (call.H, call.V), z


def _decay_scratch(call, decay, *names):
  """Shapes of what `_write_decays` writes."""
  n, C = call.spec.chunks, call.spec.chunk
  if decay is None:
    return dict.fromkeys(('pairs', *names))
  return dict(pairs=(n, C, C), **dict.fromkeys(names, (n, C, _LANES)))


def _restore_states(call, operands, S, z, *, total):
  """[B,K,H,V] and [B,K,H] of the kernels' states."""
  S, z = call.of_heads(S, total=total), call.of_heads(z, total=total)
  H, V = operands.s0.shape[2:]
  return S[:, :, :H, :V], None if z is None else z[:, :, 0, :H]


def _dot(a, b, contract):
  """Matmul over one dimension of each, exact products, float32 sums."""
  exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
      a, b, (((contract[0],), (contract[1],)), ((), ())), precision=exact,
      preferred_element_type=jnp.float32)


def _flat(x):
  """[G,C,H] -> [G C,H]."""
  return x.reshape(-1, x.shape[-1])


def _quotient(x, divisor):
  """Of numbers that are not negative: // would ask the chip for its name."""
  return jax.lax.div(jnp.asarray(x, jnp.int32), jnp.int32(divisor))


def _read(ref, at=...):
  return None if ref is None else ref[at]


def _forward_kernel(r, spec):
  @pl.when(pl.program_id(2) == 0)
  def _():
    r.S[...] = r.s0[...]
    if r.z is not None:
      r.z[...] = r.z0[...]

  r.Ss[...] = r.S[...]
  if r.z is not None:
    r.zs[...] = r.z[...]

  def visit(piece, fresh):
    _clear(fresh, r.S, r.z)
    if r.decay is not None:
      _each_chunk(spec, piece, [functools.partial(_write_decays, r)])
    _each_chunk(spec, piece, [
        functools.partial(stage, r, spec)
        for stage in (_start_forward, _finish_forward)], distance=2)

  tpu_blocks.walk(spec, r.pieces, visit)

  @pl.when(pl.program_id(2) == spec.blocks - 1)
  def _():
    r.sT[...] = r.S[...]
    if r.z is not None:
      r.zT[...] = r.z[...]


def _clear(fresh, *states):
  """Zeroes states where a document starts."""
  if fresh is None:
    return

  @pl.when(fresh)
  def _():
    for state in states:
      if state is not None:
        state[...] = jnp.zeros_like(state)


def _each_chunk(spec, piece, stages, *, distance=1, reverse=False):
  """Takes the chunks that a piece has steps in through stages, in order.

  A stage is called with the chunk and what the stage before returned. In a
  whole block, a stage is `distance` chunks behind the stage before: while one
  waits for its products, the matrix unit has those of the other.
  """
  if piece is None:
    order = [_Chunk(spec, c, None) for c in range(spec.chunks)]
    if reverse:
      order.reverse()
    results = [()] * len(order)
    for turn in range(len(order) + distance * (len(stages) - 1)):
      for n, stage in reversed(list(enumerate(stages))):
        at = turn - n * distance
        if 0 <= at < len(order):
          results[at] = stage(order[at], *(results[at] or ()))
    return

  def through(index):
    result = ()
    for stage in stages:
      result = stage(_Chunk(spec, index, piece), *(result or ()))

  if spec.chunks == 1:
    through(0)
    return
  first = _quotient(piece[0], spec.chunk)
  end = _quotient(piece[1] + spec.chunk - 1, spec.chunk)
  jax.lax.fori_loop(
      first, end, lambda n, _: through(first + end - 1 - n if reverse else n),
      None)


class _Chunk:
  """The steps of a chunk that belong to a piece: how they load and store."""

  def __init__(self, spec, index, piece):
    self.index = index
    self.start = index * spec.chunk
    if not isinstance(index, int):
      self.start = pl.multiple_of(self.start, spec.chunk)
    self.rows = pl.ds(self.start, spec.chunk)
    self.piece = piece

  def _inside(self, shape, axis):
    step = jax.lax.broadcasted_iota(jnp.int32, shape, axis) + self.start
    return (step >= self.piece[0]) & (step < self.piece[1])

  def load(self, ref):
    """[..., C, width] of a ref of the block, zero outside the piece."""
    x = ref[..., self.rows, :]
    if self.piece is None:
      return x
    inside = self._inside(x.shape, x.ndim - 2)
    return jnp.where(inside, x.astype(jnp.float32), 0.0).astype(x.dtype)

  def store(self, ref, x):
    """Writes the steps inside the piece."""
    if self.piece is not None:
      old = ref[..., self.rows, :].astype(jnp.float32)
      x = jnp.where(self._inside(x.shape, x.ndim - 2), x, old)
    ref[..., self.rows, :] = x.astype(ref.dtype)

  def load_row(self, ref):
    """[1,C] of a ref of the block, zero outside the piece."""
    x = ref[:, self.rows]
    return x if self.piece is None else jnp.where(
        self._inside(x.shape, 1), x, 0.0)

  def store_row(self, ref, x):
    """Writes the lanes [1,C] inside the piece."""
    if self.piece is not None:
      x = jnp.where(self._inside(x.shape, 1), x, ref[:, self.rows])
    ref[:, self.rows] = x


class _Decays:
  """Decays of a chunk that `_write_decays` left.

  Attributes:
    pairs: [C,C], from step s to step t, where s <= t: exp of a sum of logs over
      exactly the steps between.
    after: [1,C], from step s to the state after the chunk.
    all: [1,1], from the state before to the state after.
  """

  def __init__(self, r, chunk):
    self._before, self._after = r.before, getattr(r, 'after', None)
    self._index = chunk.index
    self.pairs = r.pairs[chunk.index]
    self.after = self.pairs[-1:]
    self.all = r.before[chunk.index, -1:, :1]

  def from_state(self, x):
    """[...,C,width] times the decay from the state before the chunk."""
    return x * _columns(self._before[self._index], x.shape[-1])

  def to_state(self, x):
    """[C,width] times the decay to the state after the chunk."""
    return x * _columns(self._after[self._index], x.shape[-1])


def _columns(x, width):
  """[C,128], whose lanes are equal, as [C,width]."""
  return jnp.concatenate([x] * pl.cdiv(width, _LANES), axis=1)[:, :width]


def _decays(r, chunk):
  return None if r.decay is None else _Decays(r, chunk)


def _write_decays(r, chunk):
  """Writes the decays of a chunk.

  Nothing is subtracted: sums of logs are <= 0 however they round, and exact
  beside a decay of any size. They are products of ones with the three bfloat16
  that make a float32.
  """
  logs = rest = chunk.load_row(r.decay)
  steps = logs.shape[1]
  row = jax.lax.broadcasted_iota(jnp.int32, (steps, steps), 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, (steps, steps), 1)
  later = (row > lane).astype(jnp.float32).astype(jnp.bfloat16)
  between = 0.0
  for _ in range(3):
    part = rest.astype(jnp.bfloat16).astype(jnp.float32)
    rest = rest - part
    part = jnp.where(row >= lane, part, 0.0).astype(jnp.bfloat16)
    between = between + _dot(part, later, _NN)
  pairs = jnp.exp2(between)
  r.pairs[chunk.index] = pairs
  r.before[chunk.index] = jnp.broadcast_to(
      pairs[:, :1] * jnp.exp2(logs[:, :1]), (steps, _LANES))
  if hasattr(r, 'after'):
    r.after[chunk.index] = jnp.broadcast_to(pairs[-1:], (_LANES, steps)).T


def _causal(shape):
  query = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  key = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
  return key <= query


def _start_forward(r, spec, chunk):
  """The weights of a chunk, and what it adds to the states."""
  q, k, v = chunk.load(r.q), chunk.load(r.k), chunk.load(r.v)
  decays = _decays(r, chunk)
  return _weights(q, k, decays), _update(k, v, decays, spec.eps)


def _finish_forward(r, spec, chunk, W, update):
  """Writes y of a chunk and takes S and z over it."""
  q, v = chunk.load(r.q), chunk.load(r.v)
  decays = _decays(r, chunk)
  carried = _dot(_flat(q), r.S[...].astype(q.dtype), _NN)
  carried = carried.reshape(*q.shape[:2], -1)
  if decays is not None:
    carried = decays.from_state(carried)
  y = _dot(_flat(W.astype(v.dtype)), v, _NN).reshape(carried.shape) + carried
  if r.z is not None:
    y *= 1 / _denominator(q, W, r.z[...], decays, spec.eps)
  chunk.store(r.y, y)
  for state, added in zip((r.S, r.z), update):
    if state is not None:
      state[...] = _kept(state[...], decays) + added


def _weights(q, k, decays):
  """W [G,C,C], of q [G,C,H] and k [C,H]."""
  W = _dot(_flat(q), k, _NT).reshape(*q.shape[:2], -1)
  if decays is not None:
    W *= decays.pairs
  return jnp.where(_causal(W.shape), W, 0.0)


def _denominator(q, W, z, decays, eps):
  """[G,C,1]."""
  carried = q.astype(jnp.float32) * z
  if decays is not None:
    carried = decays.from_state(carried)
  return _row_sums(W, carried) + eps


def _row_sums(x, y):
  """Sums [G,C,1] over the rows of both: across lanes once if they can."""
  if x.shape == y.shape:
    return jnp.sum(x + y, axis=-1, keepdims=True)
  return (jnp.sum(x, axis=-1, keepdims=True)
          + jnp.sum(y, axis=-1, keepdims=True))


def _update(k, v, decays, eps):
  """What a chunk adds to S, and to z, None without a normaliser."""
  ones = jnp.ones((1, len(k)), jnp.float32)
  turned = k.T
  if decays is not None:
    ones = decays.after
    turned = (turned.astype(jnp.float32) * decays.after).astype(k.dtype)
  return _dot(turned, v, _NN), (
      None if eps is None else _dot(ones.astype(k.dtype), k, _NN))


def _kept(state, decays):
  """What a chunk leaves of a state."""
  return state if decays is None else state * decays.all


def _backward_kernel(r, spec):
  @pl.when(pl.program_id(2) == 0)
  def _():
    r.dS[...] = r.dsT[...]
    if r.z is not None:
      r.dz[...] = r.dzT[...]

  def visit(piece, fresh):
    first = 0 if piece is None else _quotient(piece[0], spec.chunk)
    r.S[first] = r.Ss[...]
    if r.z is not None:
      r.z[first] = r.zs[...]
    _clear(fresh, r.S.at[first], None if r.z is None else r.z.at[first])
    if r.decay is not None:
      _each_chunk(spec, piece, [functools.partial(_write_decays, r)])
    # The state after the last chunk of a block is not asked for.
    if spec.chunks > 1:
      _each_chunk(spec, piece, [
          functools.partial(stage, r, spec)
          for stage in (_start_states, _finish_states)])
    _each_chunk(spec, piece, [
        functools.partial(stage, r, spec)
        for stage in (_start_backward, _weigh_backward, _finish_backward)], reverse=True)
    _clear(fresh, r.dS, r.dz)

  tpu_blocks.walk(spec, r.pieces, visit, reverse=True)

  @pl.when(pl.program_id(2) == spec.blocks - 1)
  def _():
    r.ds0[...] = r.dS[...]
    if r.z is not None:
      r.dz0[...] = r.dz[...]


def _start_states(r, spec, chunk):
  """What a chunk adds to the states."""
  k, v = chunk.load(r.k), chunk.load(r.v)
  decays = _decays(r, chunk)
  return decays, _update(k, v, decays, spec.eps)


def _finish_states(r, spec, chunk, decays, update):
  """Writes the states after a chunk, but for the last of the block."""
  after = chunk.index + 1

  def write():
    for states, added in zip((r.S, r.z), update):
      if states is not None:
        states[after] = _kept(states[chunk.index], decays) + added

  if not isinstance(after, int):
    pl.when(after < spec.chunks)(write)
  elif after < spec.chunks:
    write()


def _start_backward(r, spec, chunk):
  """The products of a chunk that depend on its inputs alone."""
  q, k, v, dy = (chunk.load(ref) for ref in (r.q, r.k, r.v, r.dy))
  S, decays = r.S[chunk.index], _decays(r, chunk)
  W = _weights(q, k, decays)
  dW = _dot(_flat(dy), v, _NT).reshape(W.shape)
  dq = _dot(_flat(dy), S.astype(q.dtype), _NT).reshape(q.shape)
  if decays is not None:
    dq = decays.from_state(dq)
  inverse = None
  if r.z is not None:
    inverse = 1 / _denominator(q, W, r.z[chunk.index], decays, spec.eps)
  return W, dW, dq, inverse


def _weigh_backward(r, spec, chunk, W, dW, dq, inverse):
  """Gradients of the weights, of the state's share of y and of z.

  dn is the gradient of the numerator of y, -m that of the denominator.
  """
  q, dn = chunk.load(r.q), chunk.load(r.dy)
  decays = _decays(r, chunk)
  dtype = q.dtype
  dz = None
  if r.z is not None:
    wide_q = q.astype(jnp.float32)
    dn = (dn.astype(jnp.float32) * inverse).astype(dtype)
    dW *= inverse
    dq *= inverse
    m = inverse * _row_sums(W * dW, wide_q * dq)
    dW -= m
    mq, mz = m * wide_q, m * r.z[chunk.index]
    if decays is not None:
      mq, mz = decays.from_state(mq), decays.from_state(mz)
    dq -= mz
    dz = -jnp.sum(_flat(mq), axis=0, keepdims=True)
  dW = jnp.where(_causal(W.shape), dW, 0.0)
  ddecay = None
  if decays is not None:
    ddecay = _decay_gradient(
        jnp.sum(W * dW, axis=0),
        jnp.sum(jnp.sum(q.astype(jnp.float32) * dq, axis=0), axis=-1,
                keepdims=True), dtype)
    dW *= decays.pairs
  return W.astype(dtype), dW.astype(dtype), dq, dn, dz, ddecay


def _finish_backward(r, spec, chunk, W, dW, dq, dn, dz, ddecay):
  """Writes the gradients of a chunk and takes dS and dz back over it."""
  del spec
  q, k, v = (chunk.load(ref) for ref in (r.q, r.k, r.v))
  decays = _decays(r, chunk)
  dS = r.dS[...]
  half = dS.astype(k.dtype)
  dk = _dot(v, half, _NT)
  dv = _dot(k, half, _NN)
  dn_before = dn
  if r.z is not None:
    dk += r.dz[...]
  if decays is not None:
    dk, dv = decays.to_state(dk), decays.to_state(dv)
    dn_before = decays.from_state(dn.astype(jnp.float32)).astype(dn.dtype)
    through = jnp.sum(_kept(dS, decays) * r.S[chunk.index], keepdims=True)
    if r.z is not None:
      through += jnp.sum(_kept(r.dz[...], decays) * r.z[chunk.index],
                         keepdims=True)
    after = jnp.sum(k.astype(jnp.float32) * dk, axis=-1, keepdims=True)
    chunk.store_row(r.ddecay, ddecay + _earlier(after) + through)
  W, dW, dn = _flat(W), _flat(dW), _flat(dn)
  chunk.store(r.dq, dq + _dot(dW, k, _NN).reshape(dq.shape))
  chunk.store(r.dk, dk + _dot(dW, _flat(q), _TN))
  chunk.store(r.dv, dv + _dot(W, dn, _TN))
  r.dS[...] = _kept(dS, decays) + _dot(_flat(q), _flat(dn_before), _TN)
  if r.z is not None:
    r.dz[...] = _kept(r.dz[...], decays) + dz


def _decay_gradient(pairs, before, dtype):
  """Gradient [1,C] of a chunk's decays, but for those of the state after.

  A decay is in the weight of each pair that it lies between, and in that of
  the state for its own and later steps: sums over exactly those.

  Args:
    pairs: [C,C], gradients of the logarithms of `_Decays.pairs`.
    before: [C,1], likewise.
    dtype: of the product.
  """
  earlier = _earlier_steps(len(pairs))
  crossing = _dot(pairs.astype(dtype), earlier.astype(jnp.float32).astype(dtype), _NN)
  return jnp.sum(jnp.where(earlier, 0.0, crossing + before), axis=0,
                 keepdims=True)


def _earlier_steps(steps):
  """[C,C], whether row s is earlier than column t."""
  shape = steps, steps
  return (jax.lax.broadcasted_iota(jnp.int32, shape, 0)
          < jax.lax.broadcasted_iota(jnp.int32, shape, 1))


def _earlier(x):
  """Sums [1,C] of a column [C,1] over the steps before each."""
  return jnp.sum(jnp.where(_earlier_steps(len(x)), x, 0.0), axis=0,
                 keepdims=True)
