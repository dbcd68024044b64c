"""The forward TPU kernel of the selective scan: the outputs of a chunk."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels.mosaic_tpu import copy
from attention.kernels.scan.tpu import chunk


def kernel(ref, plan):
  """The outputs of one chunk, and the state that it started from."""
  place = chunk.place(plan)
  h = ref.h.at[place.block]

  @pl.when(place.first)
  def _():
    copy((ref.h0, h))

  pl.when(place.block == 0)(lambda: chunk.broadcast_lanes(plan, (
      (ref.B, ref.wide_B, None), (ref.C, ref.wide_C, None))))
  copy((h, ref.saved_h))
  chunk.each_rows(plan, functools.partial(_before_steps, ref, plan, place))
  chunk.where_starts(ref, plan, functools.partial(_steps, ref, plan, h))
  chunk.each_rows(plan, functools.partial(_after_steps, ref))

  @pl.when(place.last)
  def _():
    copy((h, ref.hT))


def _before_steps(ref, plan, place, r, rows, tiles):
  """Computes d and d x of some rows, as zeros beyond the series."""
  d, u, _ = chunk.step_sizes(ref, plan, r, rows)
  valid = chunk.mask(plan, place, rows)
  ref.d[r, tiles] = chunk.tiled(chunk.masked(valid, d))
  ref.u[r, tiles] = chunk.tiled(chunk.masked(valid, u))


def _steps(ref, plan, h, starts):
  """Takes the states through the chunk, and sums h C over them."""
  def strip(i, states):
    states = chunk.forward_steps(
        ref, plan, starts, i, states,
        functools.partial(chunk.start_output, ref, plan, i))
    chunk.finish_sums(plan, ref.partial, ref.s, i)
    return states

  chunk.store(plan, h, jax.lax.fori_loop(
      0, plan.blocks.strips, strip, chunk.load(plan, h)))


def _after_steps(ref, r, rows, tiles):
  """Completes the outputs of some rows: the skip and the gate."""
  y = chunk.flat(ref.s[r, tiles])
  y += ref.D[...] * ref.x[r, rows].astype(jnp.float32)
  y = chunk.gated(ref, r, rows, y)
  ref.y[r, rows] = y.astype(ref.y.dtype)
