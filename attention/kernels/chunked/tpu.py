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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.kernels import chunked
from attention.kernels.chunked import tpu_blocks

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
      dict(S=S, z=z),
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
      dict(dS=S, dz=z, S=(chunks, *S), z=z and (chunks, *z)),
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
    _each_chunk(spec, piece, lambda chunk: _forward_chunk(r, spec, chunk))

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


def _each_chunk(spec, piece, body, *, reverse=False):
  """Calls body with each _Chunk that a piece has steps in."""
  if piece is None:
    order = range(spec.chunks)
    for c in reversed(order) if reverse else order:
      body(_Chunk(spec, c, None))
    return
  start, stop = piece
  first, end = start // spec.chunk, pl.cdiv(stop, spec.chunk)

  def at(n, _):
    body(_Chunk(spec, first + end - 1 - n if reverse else n, piece))

  jax.lax.fori_loop(first, end, at, None)


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

  def load_decays(self, ref):
    """[8,C] of a ref of `Launch.decays`."""
    x = ref[:, self.rows]
    if self.piece is None:
      return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    step = (lane & ~7) + row + self.start
    return jnp.where((step >= self.piece[0]) & (step < self.piece[1]), x, 0.0)

  def store_row(self, ref, x):
    """Writes the lanes [1,C] inside the piece."""
    if self.piece is not None:
      x = jnp.where(self._inside(x.shape, 1), x, ref[:, self.rows])
    ref[:, self.rows] = x


class _Decays:
  """Decays of a chunk, None without.

  Attributes:
    pairs: [C,C], from step s to step t: exp of a sum of logs over exactly the
      steps between, 0 for s > t.
    before: [C,1], from the state before the chunk to step t.
    after: [C,1], from step s to the state after the chunk.
    all: [1,1], from state to state.
  """

  def __init__(self, spread):
    logs = _log_decays(spread)
    self.pairs = jnp.exp2(logs)
    first = spread[:1, :1]
    self.before = jnp.exp2(logs[:, :1] + first)
    self.all = self.before[-1:]
    last = jnp.broadcast_to(self.pairs[-1:], (8, logs.shape[1]))
    self.after = last.T[:, :1]


def _log_decays(spread):
  """Sums [C,C] of the decays of steps s+1..t, -inf for s > t.

  Nothing is subtracted: sums of logs are <= 0 however they round, exact
  beside a decay of any size. Rows are made eight at a time: the sum from s to
  the end of the eight before, plus one from there to t.

  Args:
    spread: [8,C], see `tpu_blocks.Launch.decays`.
  """
  C = spread.shape[1]
  row = jax.lax.broadcasted_iota(jnp.int32, spread.shape, 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, spread.shape, 1)
  place = lane & 7
  upto = _running_sum(spread, row)
  within = _running_sum(jnp.where(row > place, spread, 0.0), row)
  within = jnp.where(row >= place, within, -jnp.inf)
  ended = jnp.full_like(spread, -jnp.inf)
  tiles = []
  for start in range(0, C, 8):
    here = (lane & ~7) == start
    logs = jnp.where(here, within, ended + upto[:, start:start + 1])
    tiles.append(logs)
    ended = jnp.broadcast_to(logs[7:], spread.shape)
  return jnp.concatenate(tiles, axis=0)


def _running_sum(x, row):
  """Sum of each of eight rows and those above it."""
  for shift in (1, 2, 4):
    x = x + jnp.where(row >= shift, pltpu.roll(x, shift, 0), 0.0)
  return x


def _causal(shape):
  query = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  key = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
  return key <= query


def _forward_chunk(r, spec, chunk):
  """Writes y of a chunk and takes S and z over it."""
  q, k, v = chunk.load(r.q), chunk.load(r.k), chunk.load(r.v)
  decays = None if r.decay is None else _Decays(chunk.load_decays(r.decay))
  W = _dot(_flat(q), k, _NT).reshape(len(q), spec.chunk, spec.chunk)
  carried = _dot(_flat(q), r.S[...].astype(q.dtype), _NN)
  carried = carried.reshape(*q.shape[:2], -1)
  if decays is not None:
    W *= decays.pairs
    carried *= decays.before
  W = jnp.where(_causal(W.shape), W, 0.0)
  y = _dot(_flat(W.astype(v.dtype)), v, _NN).reshape(carried.shape) + carried
  if r.z is not None:
    y *= 1 / _denominator(q, W, r.z[...], decays, spec.eps)
  chunk.store(r.y, y)
  S, z = _advance(k, v, r.S[...], _read(r.z), decays)
  r.S[...] = S
  if z is not None:
    r.z[...] = z


def _denominator(q, W, z, decays, eps):
  """[G,C,1]."""
  carried = jnp.sum(q.astype(jnp.float32) * z, axis=-1, keepdims=True)
  if decays is not None:
    carried *= decays.before
  return jnp.sum(W, axis=-1, keepdims=True) + carried + eps


def _advance(k, v, S, z, decays):
  """The states after a chunk."""
  if decays is not None:
    k = (k.astype(jnp.float32) * decays.after).astype(k.dtype)
    S = S * decays.all
  S = S + _dot(k, v, _TN)
  if z is None:
    return S, None
  if decays is not None:
    z = z * decays.all
  return S, z + jnp.sum(k.astype(jnp.float32), axis=0, keepdims=True)


def _backward_kernel(r, spec):
  @pl.when(pl.program_id(2) == 0)
  def _():
    r.dS[...] = r.dsT[...]
    if r.z is not None:
      r.dz[...] = r.dzT[...]

  def visit(piece, fresh):
    first = 0 if piece is None else piece[0] // spec.chunk
    r.S[first] = r.Ss[...]
    if r.z is not None:
      r.z[first] = r.zs[...]
    _clear(fresh, r.S.at[first], None if r.z is None else r.z.at[first])
    if spec.chunks > 1:
      _each_chunk(spec, piece, lambda chunk: _recompute(r, spec, chunk))
    _each_chunk(spec, piece, lambda chunk: _backward_chunk(r, spec, chunk),
                reverse=True)
    _clear(fresh, r.dS, r.dz)

  tpu_blocks.walk(spec, r.pieces, visit, reverse=True)

  @pl.when(pl.program_id(2) == spec.blocks - 1)
  def _():
    r.ds0[...] = r.dS[...]
    if r.z is not None:
      r.dz0[...] = r.dz[...]


def _recompute(r, spec, chunk):
  """Writes the states after a chunk, but for the last of the block."""
  after = chunk.index + 1

  def advance():
    decays = None if r.decay is None else _Decays(chunk.load_decays(r.decay))
    S, z = _advance(chunk.load(r.k), chunk.load(r.v), r.S[chunk.index],
                    _read(r.z, chunk.index), decays)
    r.S[after] = S
    if z is not None:
      r.z[after] = z

  if not isinstance(after, int):
    pl.when(after < spec.chunks)(advance)
  elif after < spec.chunks:
    advance()


def _backward_chunk(r, spec, chunk):
  """Writes the gradients of a chunk and takes dS and dz back over it.

  dn is the gradient of the numerator of y, -m that of the denominator.
  """
  q, k, v, dn = (chunk.load(ref) for ref in (r.q, r.k, r.v, r.dy))
  S, dS = r.S[chunk.index], r.dS[...]
  shape = len(q), spec.chunk, spec.chunk
  dtype = q.dtype
  decays = None if r.decay is None else _Decays(chunk.load_decays(r.decay))
  causal = _causal(shape)

  W = _dot(_flat(q), k, _NT).reshape(shape)
  if decays is not None:
    W *= decays.pairs
  W = jnp.where(causal, W, 0.0)
  dW = _dot(_flat(dn), v, _NT).reshape(shape)
  dq = _dot(_flat(dn), S.astype(dtype), _NT).reshape(q.shape)
  dk = _dot(v, dS.astype(dtype), _NT)
  dv = _dot(k, dS.astype(dtype), _NN)
  if decays is not None:
    dq *= decays.before
  if r.z is not None:
    z, dz = r.z[chunk.index], r.dz[...]
    wide_q = q.astype(jnp.float32)
    inverse = 1 / _denominator(q, W, z, decays, spec.eps)
    dn = (dn.astype(jnp.float32) * inverse).astype(dtype)
    dW *= inverse
    dq *= inverse
    m = inverse * (jnp.sum(W * dW, axis=-1, keepdims=True)
                   + jnp.sum(wide_q * dq, axis=-1, keepdims=True))
    dW -= m
    if decays is not None:
      m *= decays.before
    dq -= m * z
    dk += dz
    dz_before = -jnp.sum(_flat(m * wide_q), axis=0, keepdims=True)
    kept = dz if decays is None else dz * decays.all
    r.dz[...] = kept + dz_before
  dW = jnp.where(causal, dW, 0.0)
  dn_before, kept = dn, dS
  if decays is not None:
    dk *= decays.after
    dv *= decays.after
    kept = dS * decays.all
    through = jnp.sum(kept * S, keepdims=True)
    if r.z is not None:
      through += jnp.sum(dz * decays.all * z, keepdims=True)
    chunk.store_row(r.ddecay, through + _decay_gradient(
        jnp.sum(W * dW, axis=0),
        jnp.sum(jnp.sum(q.astype(jnp.float32) * dq, axis=0), axis=-1,
                keepdims=True),
        jnp.sum(k.astype(jnp.float32) * dk, axis=-1, keepdims=True), dtype))
    dW *= decays.pairs
    dn_before = (dn.astype(jnp.float32) * decays.before).astype(dtype)
  W, dW = _flat(W.astype(dtype)), _flat(dW.astype(dtype))
  q, dn, dn_before = _flat(q), _flat(dn), _flat(dn_before)
  chunk.store(r.dq, dq + _dot(dW, k, _NN).reshape(dq.shape))
  chunk.store(r.dk, dk + _dot(dW, q, _TN))
  chunk.store(r.dv, dv + _dot(W, dn, _TN))
  r.dS[...] = kept + _dot(q, dn_before, _TN)


def _decay_gradient(pairs, before, after, dtype):
  """Gradient [1,C] of a chunk's decays, but for the path from S to S.

  A decay is in the weight of each pair that it lies between, in that of the
  state for its own and later steps, and in that of earlier steps for the state
  after: sums over exactly those.

  Args:
    pairs: [C,C], gradients of the logarithms of `_Decays.pairs`.
    before: [C,1], likewise.
    after: [C,1], likewise.
    dtype: of the product.
  """
  key = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, 0)
  step = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, 1)
  earlier = (key < step).astype(jnp.float32).astype(dtype)
  crossing = _dot(pairs.astype(dtype), earlier, _NN)
  return jnp.sum(jnp.where(key >= step, crossing + before, after), axis=0,
                 keepdims=True)
