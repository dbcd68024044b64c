"""Selective scan for Hopper GPUs, in Mosaic GPU.

A thread block takes 128 channels through a piece of the sequence, a channel in
each thread with its states in registers, 16 steps at a time. Inputs come by TMA
into two stages of shared memory, so that copies run while the chunk before is
computed; B and C are the same for all threads, which read them as wide words.
What limits it are the exponentials, M for each step and channel: the special
function unit gives 16 a clock. All else is made to fit beside them.

Where the blocks of channels do not fill the chip, the sequence is cut into
pieces that run at once (pieces.py): a first pass finds what each of them ends
with (gpu_ends.py).
"""

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import dispatch, scan
from attention.kernels.scan import gpu_backward, gpu_ends, lanes, pieces

_STAGES = 2
_UNROLL = 4  # steps whose loads and exponentials overlap
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_MOST_STATES = 64


def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  del rule
  dispatch.require_hopper()
  for name, array in operands._replace(starts=None)._asdict().items():
    if array is not None and array.dtype not in _DTYPES:
      raise NotImplementedError(
          f'gpu takes float32, bfloat16 and float16, not {array.dtype}, '
          f'which {name} is')
  M = operands.A.shape[1]
  if M > _MOST_STATES:
    raise NotImplementedError(
        f'gpu takes up to {_MOST_STATES} states (M), which fit the registers, '
        f'not {M}')


def forward(operands, rule):
  """See `attention.kernels.scan`."""
  plan, inputs = lanes.prepare(operands, rule)
  E, M = operands.A.shape
  h0 = operands.h0.astype(jnp.float32)[:, None]
  if plan.pieces > 1:
    ends, decay = gpu_ends.states(plan, inputs, operands.A)
    h0 = pieces.entering(
        h0[:, 0], ends, decay, gpu_ends.cut(plan, operands.starts))
  h0 = lanes.split_states(plan, h0)
  B, T, E8 = inputs.series[0].shape
  x = inputs.series[0]
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  y, hT, states = lanes.launch(
      _kernel, plan, [*inputs.series, *inputs[1:], h0],
      [jax.ShapeDtypeStruct(x.shape, x.dtype), f32(B, plan.S, E8, plan.W),
       f32(B, plan.chunks, plan.S, E8, plan.W)],
      dict(
          series=[lanes.series_buffer(_STAGES, a.dtype) for a in inputs.series],
          common=lanes.common_buffer(plan, _STAGES),
          y=lanes.series_buffer(_STAGES, x.dtype),
          state=lanes.tile_buffer(plan, plan.S),
          rows=plgpu.SMEM((2, lanes.LANES), jnp.float32),
          ready=plgpu.Barrier(
              num_arrivals=len(inputs.series) + 1, num_barriers=_STAGES),
          once=plgpu.Barrier(num_arrivals=2),
          entered=plgpu.Barrier(num_arrivals=1)),
      name='forward')
  return (y[..., :E], lanes.join_states(hT, E, M)), states


def _kernel(plan, *refs, **scratch):
  *series, common, rows, A, h0, y, hT, states = refs
  smem = types.SimpleNamespace(**scratch)
  batch, piece, channels = lanes.coordinates()
  first, n = lanes.span(plan, piece)
  tiles = range(plan.S)
  load_states = lambda: [
      lanes.load(smem.state.at[s], lanes.TILE) for s in tiles]
  lanes.fetch(smem.once, [(A.at[:, channels], smem.state),
                          (rows.at[:, channels], smem.rows)])
  decay = load_states()
  bias, skip = map(lanes.load_row, (smem.rows.at[0], smem.rows.at[1]))
  plgpu.commit_smem()
  lanes.fetch(smem.entered, [(h0.at[batch, piece, :, channels], smem.state)])
  plgpu.copy_smem_to_gmem(smem.state, states.at[batch, first, :, channels])

  def copies(chunk):
    steps = lanes.steps_of(chunk)
    return [(source.at[batch, steps, channels], buffer)
            for source, buffer in zip(series, smem.series)] + [
                (common.at[batch, steps], smem.common)]

  def visit(chunk, slot, h):
    def group(i, h):
      steps = [i * _UNROLL + k for k in range(_UNROLL)]
      x, dt, *z = ([lanes.load_row(buffer.at[slot, t]) for t in steps]
                   for buffer in smem.series)
      sums = []
      for t, x_t, dt_t in zip(steps, x, dt):
        d, _ = lanes.step_size(plan, dt_t + bias, chunk * lanes.CHUNK + t)
        at = smem.common.at[slot, t]
        h, total = _step(plan, h, decay, d, d * x_t, at)
        sums.append(total + skip * x_t)
      for t, total, *z_t in zip(steps, sums, *z):
        if plan.gated:
          total = total * (z_t[0] * lanes.sigmoid(z_t[0]))
        smem.y[slot, t] = total.astype(y.dtype)
      return h

    h = lax.fori_loop(0, lanes.CHUNK // _UNROLL, group, h)
    # The outputs of the chunk before are on their way: their buffer is free.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for s in tiles:
      smem.state[s] = h[s]
    plgpu.commit_smem()
    steps = lanes.steps_of(chunk)
    plgpu.copy_smem_to_gmem(smem.y.at[slot], y.at[batch, steps, channels])
    # Where another piece begins it writes its own state.
    for here, target in ((chunk + 1 < first + n, states.at[batch, chunk + 1]),
                         (chunk + 1 == plan.chunks, hT.at[batch])):
      pl.when(here)(functools.partial(
          plgpu.copy_smem_to_gmem, smem.state, target.at[:, channels]))
    return h

  lanes.walk(lambda i: first + i, n, _STAGES, copies, smem.ready, visit,
             load_states())
  plgpu.wait_smem_to_gmem(0)


def _step(plan, h, decay, d, u, common):
  """The tiles of h after a step, and its output before skip and gate."""
  start = lanes.starts(plan, common)
  new, total = [], None
  for s, (h_s, A) in enumerate(zip(h, decay)):
    B, C = lanes.directions(plan, common, s)
    kept = jnp.exp2(lanes.by_row(d, A) * A) * lanes.unless(start, h_s)
    h_s = kept + lanes.by_row(u, A) * lanes.by_column(B, A)
    part = jnp.sum(h_s * lanes.by_column(C, A), axis=1)
    total = part if total is None else total + part
    new.append(h_s)
  return new, total


def backward(operands, rule, states, cotangents):
  """See `attention.kernels.scan`."""
  dy, dhT = cotangents
  plan, inputs = lanes.prepare(operands, rule)
  T, (E, M) = plan.T, operands.A.shape
  dy = lanes.pad_channels(dy)
  dhT = dhT.astype(jnp.float32)[:, None]
  if plan.pieces > 1:
    ends, decay = gpu_ends.adjoints(plan, inputs, operands.A, dy)
    dhT = pieces.entering(
        dhT[:, 0], ends, decay, gpu_ends.cut(plan, operands.starts),
        reverse=True)
  *series, dA, drows, dh0, dcommon = gpu_backward.gradients(
      plan, inputs, states, dy, lanes.split_states(plan, dhT))
  dx, ddt, *dz = (array[..., :E] for array in series)
  dbias, dD = drows.sum((0, 1))[:, :E]
  # [B, 2, S, T W] to [2, B, T, S W]
  dcommon = dcommon.sum(1).reshape(-1, 2, plan.S, plan.steps, plan.W)
  dB, dC = dcommon.transpose(1, 0, 3, 2, 4).reshape(
      2, -1, plan.steps, plan.S * plan.W)[:, :, :T, :M]
  return scan.Operands(
      dx, ddt, lanes.join_states(dA.sum((0, 1)), E, M), dB, dC, dD,
      dz[0] if dz else None, None if operands.dt_bias is None else dbias,
      lanes.join_states(dh0, E, M), None)
