"""The scan: 128 channels of a thread block through a part of the sequence."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import mosaic_gpu
from attention.kernels.scan.gpu import chunk as chunks
from attention.kernels.scan.gpu.chunk import (
    CHUNK,
    load_row,
    per_channel,
    per_state,
)

_UNROLL = 4  # steps whose loads and exponentials overlap


def kernel(gmem, smem, plan):
  batch, part, channels = place = chunks.coordinates()
  first, n = chunks.span(plan, part)
  tiles = range(plan.tiles)
  load_states = lambda: [chunks.load_tile(smem.state.at[s]) for s in tiles]
  mosaic_gpu.copy_in(
      [(gmem.A.at[:, channels], smem.state),
       (gmem.rows.at[:, channels], smem.rows)], smem.once)
  mosaic_gpu.wait(smem.once)
  A = load_states()
  bias, skip = load_row(smem.rows.at[0]), load_row(smem.rows.at[1])
  plgpu.commit_smem()
  mosaic_gpu.copy_in(
      [(gmem.h0.at[batch, part, :, channels], smem.state)], smem.entered)
  mosaic_gpu.wait(smem.entered)
  # As it came: no thread has written it, and there is nothing to commit.
  plgpu.copy_smem_to_gmem(
      smem.state, gmem.states.at[batch, first, :, channels])

  def visit(chunk, slot, h):
    def group(i, h):
      steps = [i * _UNROLL + k for k in range(_UNROLL)]
      loaded = lambda series: [load_row(series.at[slot, t]) for t in steps]
      x, dt = loaded(smem.x), loaded(smem.dt)
      z = loaded(smem.z) if plan.gated else None
      sums = []
      for t, x_t, dt_t in zip(steps, x, dt):
        d, _ = chunks.step_size(plan, dt_t + bias, chunk * CHUNK + t)
        u = d * x_t if plan.rule.scale_input else x_t
        h, total = _step(plan, h, A, d, u, smem.common.at[slot, t])
        sums.append(total + skip * x_t)
      for k, t in enumerate(steps):
        y = sums[k] * chunks.silu(z[k]) if plan.gated else sums[k]
        chunks.store_row(smem.y.at[slot, t], y)
      return h

    h = lax.fori_loop(0, CHUNK // _UNROLL, group, h)
    # The outputs of the chunk before are on their way: their buffer is free.
    mosaic_gpu.wait_read()
    for s in tiles:
      smem.state[s] = h[s]
    mosaic_gpu.copy_out([
        (smem.y.at[slot], gmem.y.at[batch, chunks.steps(chunk), channels])])
    # Where another part begins it writes its own state.
    for here, target in (
        (chunk + 1 < first + n, gmem.states.at[batch, chunk + 1]),
        (chunk + 1 == plan.chunks, gmem.hT.at[batch])):
      pl.when(here)(functools.partial(
          plgpu.copy_smem_to_gmem, smem.state, target.at[:, channels]))
    return h

  chunks.walk(gmem, smem, plan, place, visit=visit, carry=load_states())
  mosaic_gpu.wait_written()


def _step(plan, h, A, d, u, common):
  """The tiles of h after a step, and its output before skip and gate."""
  start = chunks.starts(plan, common)
  new, total = [], None
  for s, (h_s, A_s) in enumerate(zip(h, A)):
    B, C = chunks.directions(plan, common, s)
    kept = jnp.exp2(per_channel(d, A_s) * A_s) * chunks.unless(start, h_s)
    h_s = kept + per_channel(u, A_s) * per_state(B, A_s)
    part = jnp.sum(h_s * per_state(C, A_s), axis=1)
    total = part if total is None else total + part
    new.append(h_s)
  return new, total
