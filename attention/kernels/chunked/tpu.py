"""Linear attention in chunks for TPU, in Pallas (Mosaic TPU).

A program takes one key head and its query heads through the sequence, S [H,V]
and z [1,H] in VMEM in float32. In a chunk of C steps, with rows for the
queries of all G heads:

  W = q k^T * D        D[t,s] = exp(sum of decays of s+1..t) for s <= t
  y = W v + a q S      a[t] = exp(sum of decays up to t)
  S = e S + (b k)^T v  b[s] = exp(sum of decays after s), e that of them all

With a normaliser y is divided by the row sums of W plus a q z, plus eps, where
z is to k as S is to k v^T.

The state is saved before each block of a few chunks, for the backward kernel.
Products take S, W and b k in the dtype of the inputs and add up in float32.

Steps of another document, and those after the last, are zeroed as they are
loaded (see `tpu_blocks.walk`): zeros with a log decay of 0 leave the state as
it is, and nothing that a product multiplies by 0 can be inf or nan.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels import chunked
from attention.kernels.chunked import tpu_backward, tpu_blocks, tpu_chunk
from attention.kernels.chunked.tpu_chunk import decays_of, flat
from attention.kernels.tpu_tiles import NN, dot


def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  del rule
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


def forward(operands, rule):
  """See `attention.kernels.chunked`."""
  q, k, v, decay, s0, z0, _ = operands
  call = tpu_blocks.Launch(operands, rule, reverse=False)
  S, z = _states(call)
  out = call.run(
      _forward_kernel,
      dict(q=call.queries(q), k=call.keys(k), v=call.keys(v),
           decay=call.decays(decay), s0=call.state(s0), z0=call.state(z0)),
      dict(y=call.out_queries(call.V, v.dtype), sT=call.out_state(S),
           zT=z and call.out_state(z), Ss=call.out_saved(S),
           zs=z and call.out_saved(z)),
      dict(S=S, z=z, **tpu_chunk.decay_scratch(call.spec, decay, after=False)),
      name='chunked_forward',
      products=call.spec.chunk * (call.H + call.V) + 2 * call.H * call.V)
  sT, zT = _restore_states(call, operands, out['sT'], out['zT'], total=False)
  return (call.restore(out['y'], v.shape[-1]), sT, zT), (out['Ss'], out['zs'])


def backward(operands, rule, states, cotangents):
  """See `attention.kernels.chunked`."""
  dy, dsT, dzT = cotangents
  q, k, v, decay, *_ = operands
  call = tpu_blocks.Launch(operands, rule, reverse=True)
  S, z = _states(call)
  H, V = call.H, call.V
  chunks = call.spec.chunks
  Ss, zs = states
  out = call.run(
      tpu_backward.kernel,
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
           **tpu_chunk.decay_scratch(call.spec, decay, after=True)),
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
      *_restore_states(call, operands, out['ds0'], out['dz0'], total=True),
      None)


def _states(call):
  """Shapes of S and z in the kernels, z None without a normaliser."""
  z = None if call.spec.eps is None else (1, call.H)
  return (call.H, call.V), z


def _restore_states(call, operands, S, z, *, total):
  """[B,K,H,V] and [B,K,H] of the kernels' states."""
  S, z = call.of_heads(S, total=total), call.of_heads(z, total=total)
  H, V = operands.s0.shape[2:]
  return S[:, :, :H, :V], None if z is None else z[:, :, 0, :H]


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
    tpu_chunk.clear(fresh, r.S, r.z)
    if r.decay is not None:
      tpu_chunk.each_chunk(r, spec, piece, [tpu_chunk.write_decays])
    tpu_chunk.each_chunk(
        r, spec, piece, [_start_forward, _finish_forward], distance=2)

  tpu_blocks.walk(spec, r.pieces, visit)

  @pl.when(pl.program_id(2) == spec.blocks - 1)
  def _():
    r.sT[...] = r.S[...]
    if r.z is not None:
      r.zT[...] = r.z[...]


def _start_forward(r, spec, chunk):
  """The weights of a chunk, and what it adds to the states."""
  q, k, v = chunk.load(r.q), chunk.load(r.k), chunk.load(r.v)
  decays = decays_of(r, chunk)
  return (tpu_chunk.weights(q, k, decays),
          tpu_chunk.update(k, v, decays, spec.eps))


def _finish_forward(r, spec, chunk, W, update):
  """Writes y of a chunk and takes S and z over it."""
  q, v = chunk.load(r.q), chunk.load(r.v)
  decays = decays_of(r, chunk)
  carried = dot(flat(q), r.S[...].astype(q.dtype), NN)
  carried = carried.reshape(*q.shape[:2], -1)
  if decays is not None:
    carried = decays.from_state(carried)
  y = carried + dot(flat(W.astype(v.dtype)), v, NN).reshape(carried.shape)
  if r.z is not None:
    y *= 1 / tpu_chunk.denominator(q, W, r.z[...], decays, spec.eps)
  chunk.store(r.y, y)
  for state, added in zip((r.S, r.z), update):
    if state is not None:
      state[...] = tpu_chunk.kept(state[...], decays) + added
