"""Parts of a sequence that run at once, and the states that pass between them.

With h_t = a_t h_{t-1} + b_t, a part does to the state that enters it

  h -> (the product of its a_t) h + (what it ends with from zero)

and where a document starts inside, the first term is gone. So there are two
passes: `kernel` over all parts from zero, for what they end with, and after
`entering` the real one, each part from the state that enters it. The adjoint,
of the state before a step, g <- a (g + ds C) with ds = dy silu(z), is a
recurrence of the same kind backwards in time, with the same products.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import mosaic_gpu
from attention.kernels.scan.gpu import chunk as chunks
from attention.kernels.scan.gpu.chunk import CHUNK, load_row, per_channel

# An H100 has 132 multiprocessors, and two warpgroups of this kind keep the
# exponentials of one busy. The first pass costs 0.7 of the real one, as nothing
# but its C and its output is missing, so that cutting pays below 2 / 1.7.
_FULL = 264
_LEAST = 156
_CHUNKS = 4  # in a part at least: entering and leaving cost as much as one
_MOST = 32  # parts: the states that enter them are computed one by one
_UNROLL = 4


def number(blocks, chunks):
  """How many parts a sequence is cut into; tests replace it.

  Args:
    blocks: thread blocks that one part would run.
    chunks: chunks of a sequence.

  Returns:
    A number of parts, none of them empty: 1 where the chip is full.
  """
  if blocks >= _LEAST:
    return 1
  wanted = min(pl.cdiv(_FULL, blocks), _MOST, max(1, chunks // _CHUNKS))
  return pl.cdiv(chunks, pl.cdiv(chunks, wanted))


def entering(initial, ends, log_decay, cut, *, reverse=False):
  """The state that enters each part.

  Args:
    initial: [B,E,M], what enters the first part (reverse: the last one).
    ends: [B,parts,E,M], what parts end with from zero.
    log_decay: [B,parts,E,M], logarithm of the product of a part's decays.
    cut: [B,parts], whether nothing comes through a part. None: something
      always.
    reverse: for the adjoint.

  Returns:
    [B,parts,E,M]
  """
  n = ends.shape[1]
  states = [initial]
  order = range(n)[::-1] if reverse else range(n)
  for p in order[:-1]:
    through = jnp.exp(log_decay[:, p]) * states[-1]
    if cut is not None:
      through = jnp.where(cut[:, p, None, None], 0.0, through)
    states.append(ends[:, p] + through)
  return jnp.stack(states[::-1] if reverse else states, axis=1)


def cut(plan, starts):
  """[B,parts]: whether a document starts in a part, None if none ever does."""
  if starts is None:
    return None
  length = pl.cdiv(plan.chunks, plan.parts) * CHUNK
  fill = ((0, 0), (0, plan.parts * length - plan.T))
  return jnp.pad(starts, fill).reshape(-1, plan.parts, length).any(-1)


def kernel(gmem, smem, plan):
  """What parts end with from zero, and the sums of their step sizes."""
  batch, part, channels = place = chunks.coordinates()
  tiles = range(plan.tiles)
  mosaic_gpu.copy_in(
      [(gmem.A.at[:, channels], smem.state),
       (gmem.rows.at[:, channels], smem.rows)], smem.once)
  mosaic_gpu.wait(smem.once)
  A = [chunks.load_tile(smem.state.at[s]) for s in tiles]
  bias = load_row(smem.rows.at[0])
  plgpu.commit_smem()

  def visit(chunk, slot, carry):
    def group(i, carry):
      total, *h = carry
      steps = [i * _UNROLL + k for k in range(_UNROLL)]
      if plan.reverse:
        steps = [CHUNK - 1 - t for t in steps]
      loaded = lambda series: [load_row(series.at[slot, t]) for t in steps]
      dt, inputs = loaded(smem.dt), loaded(
          smem.dy if plan.reverse else smem.x)
      z = loaded(smem.z) if plan.reverse and plan.gated else None
      for k, t in enumerate(steps):
        d, _ = chunks.step_size(plan, dt[k] + bias, chunk * CHUNK + t)
        total = total + d
        value = inputs[k]
        if not plan.reverse:
          value = value * d if plan.rule.scale_input else value
        elif plan.gated:
          value = value * chunks.silu(z[k])
        common = smem.common.at[slot, t]
        h = [_step(plan, s, h[s], A[s], d, value, common) for s in tiles]
      return total, *h

    carry = lax.fori_loop(0, CHUNK // _UNROLL, group, carry)
    plgpu.commit_smem()
    return carry

  zero = [chunks.zero_tile(plan) for _ in tiles]
  total, *h = chunks.walk(
      gmem, smem, plan, place, visit=visit, carry=(chunks.zero_row(), *zero),
      reverse=plan.reverse)
  smem.rows[0] = total
  for s in tiles:
    smem.state[s] = h[s]
  mosaic_gpu.copy_out([
      (smem.rows.at[0], gmem.sums.at[batch, part, channels]),
      (smem.state, gmem.ends.at[batch, part, :, channels])])
  mosaic_gpu.wait_written()


def _step(plan, s, h, A, d, value, common):
  """A tile of the state, or of its adjoint, after a step."""
  start = chunks.starts(plan, common)
  B, C = chunks.directions(plan, common, s)
  decay = jnp.exp2(per_channel(d, A) * A)
  direction = C if plan.reverse else B
  into = per_channel(value, A) * chunks.per_state(direction, A)
  if plan.reverse:
    return chunks.unless(start, decay * (h + into))
  return decay * chunks.unless(start, h) + into
