"""What each piece of a sequence ends with, from zero: the first of two passes.

Forwards it is the state, h <- a h + (d x) B. Backwards it is the adjoint of the
state before a step, g <- a (g + ds C) with ds = dy silu(z).
"""

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels.scan import lanes

_STAGES = 2
_UNROLL = 4


def states(plan, inputs, A):
  """Ends and logarithms of decays [B, P, E, M]: see pieces.entering."""
  return _launch(plan, inputs, A, inputs.series[:2][::-1], reverse=False)


def adjoints(plan, inputs, A, dy):
  """The same of the adjoint, of the gradient of y [B, T, E]."""
  series = [inputs.series[1], dy, *inputs.series[2:]]
  return _launch(plan, inputs, A, series, reverse=True)


def cut(plan, starts):
  """[B, P]: whether a document starts in a piece, None if none ever does."""
  if starts is None:
    return None
  length = -(-plan.chunks // plan.pieces) * lanes.CHUNK
  fill = ((0, 0), (0, plan.pieces * length - plan.T))
  return jnp.pad(starts, fill).reshape(-1, plan.pieces, length).any(-1)


def _launch(plan, inputs, A, series, *, reverse):
  E, M = A.shape
  B, _, E8 = series[0].shape
  f32 = lambda *shape: jax.ShapeDtypeStruct(
      (B, plan.pieces, *shape), jnp.float32)
  ends, sums = lanes.launch(
      functools.partial(_kernel, reverse), plan, [*series, *inputs[1:]],
      [f32(plan.S, E8, plan.W), f32(E8)],
      dict(
          series=[lanes.series_buffer(_STAGES, a.dtype) for a in series],
          common=lanes.common_buffer(plan, _STAGES),
          state=lanes.tile_buffer(plan, plan.S),
          rows=plgpu.SMEM((2, lanes.LANES), jnp.float32),
          ready=plgpu.Barrier(
              num_arrivals=len(series) + 1, num_barriers=_STAGES),
          once=plgpu.Barrier(num_arrivals=2)),
      name='adjoint_ends' if reverse else 'ends')
  decay = sums[..., :E, None] * A.astype(jnp.float32)
  return lanes.join_states(ends, E, M), decay


def _kernel(reverse, plan, *refs, **scratch):
  *series, common, rows, A, ends, sums = refs
  smem = types.SimpleNamespace(**scratch)
  batch, piece, channels = lanes.coordinates()
  first, n = lanes.span(plan, piece)
  tiles = range(plan.S)
  lanes.fetch(smem.once, [(A.at[:, channels], smem.state),
                          (rows.at[:, channels], smem.rows)])
  decay = [lanes.load(smem.state.at[s], lanes.TILE) for s in tiles]
  bias = lanes.load_row(smem.rows.at[0])
  plgpu.commit_smem()

  def copies(chunk):
    steps = lanes.steps_of(chunk)
    return [(source.at[batch, steps, channels], buffer)
            for source, buffer in zip(series, smem.series)] + [
                (common.at[batch, steps], smem.common)]

  def visit(chunk, slot, carry):
    def group(i, carry):
      total, *h = carry
      steps = [i * _UNROLL + k for k in range(_UNROLL)]
      if reverse:
        steps = [lanes.CHUNK - 1 - t for t in steps]
      dt, inputs, *z = ([lanes.load_row(buffer.at[slot, t]) for t in steps]
                        for buffer in smem.series)
      for t, dt_t, value, *z_t in zip(steps, dt, inputs, *z):
        d, _ = lanes.step_size(plan, dt_t + bias, chunk * lanes.CHUNK + t)
        total = total + d
        if not reverse:
          value = value * d
        elif z_t:
          value = value * (z_t[0] * lanes.sigmoid(z_t[0]))
        at = smem.common.at[slot, t]
        h = [_step(plan, reverse, s, h[s], decay[s], d, value, at)
             for s in tiles]
      return total, *h

    carry = lax.fori_loop(0, lanes.CHUNK // _UNROLL, group, carry)
    plgpu.commit_smem()
    return carry

  order = lambda i: first + (n - 1 - i if reverse else i)
  zero = [lanes.zeros((lanes.LANES, plan.W), lanes.TILE) for _ in tiles]
  total, *h = lanes.walk(
      order, n, _STAGES, copies, smem.ready, visit,
      (lanes.zeros((lanes.LANES,), lanes.ROW), *zero))
  smem.rows[0] = total
  for s in tiles:
    smem.state[s] = h[s]
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem.rows.at[0], sums.at[batch, piece, channels])
  plgpu.copy_smem_to_gmem(smem.state, ends.at[batch, piece, :, channels])
  plgpu.wait_smem_to_gmem(0)


def _step(plan, reverse, s, h, A, d, value, common):
  start = lanes.starts(plan, common)
  B, C = lanes.directions(plan, common, s)
  decay = jnp.exp2(lanes.by_row(d, A) * A)
  into = lanes.by_row(value, A) * lanes.by_column(C if reverse else B, A)
  if reverse:
    return lanes.unless(start, decay * (h + into))
  return decay * lanes.unless(start, h) + into
