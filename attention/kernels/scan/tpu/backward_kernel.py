"""The backward TPU kernel of the selective scan: chunks come last first."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels.mosaic_tpu import LOG2E, copy
from attention.kernels.scan.tpu import chunk


def kernel(ref, plan):
  """The gradients of one chunk."""
  place = chunk.place(plan, backward=True)
  dh, dA, dD, ddt_bias = (acc.at[place.block] for acc in (
      ref.dh, ref.dA_acc, ref.dD_acc, ref.ddt_bias_acc))

  @pl.when(place.first)
  def _():
    copy((ref.dhT, dh))
    for acc in (dA, dD, ddt_bias):
      acc[...] = jnp.zeros_like(acc)

  pl.when(place.block == 0)(lambda: chunk.broadcast_lanes(plan, (
      (ref.B, ref.wide_B, ref.dB_acc), (ref.C, ref.wide_C, ref.dC_acc))))
  chunk.each_rows(plan, functools.partial(_before_steps, ref, plan, place, dD))
  chunk.where_starts(ref, plan, functools.partial(_steps, ref, plan, dh, dA))
  chunk.each_rows(
      plan, functools.partial(_after_steps, ref, plan, place, ddt_bias))

  @pl.when(place.last)
  def _():
    copy((dh, ref.dh0), (dA, ref.dA), (dD, ref.dD), (ddt_bias, ref.ddt_bias))

  pl.when(place.last_block)(lambda: chunk.sum_lanes(plan, (
      (ref.dB_acc, ref.dB), (ref.dC_acc, ref.dC))))


def _before_steps(ref, plan, place, dD, r, rows, tiles):
  """Computes d, d x and ds of some rows, as zeros beyond the series."""
  d, u, x = chunk.step_sizes(ref, plan, r, rows)
  ds = chunk.gated(ref, r, rows, ref.dy[r, rows].astype(jnp.float32))
  ds_x = ds * x
  valid = chunk.mask(plan, place, rows)
  ref.d[r, tiles] = chunk.tiled(chunk.masked(valid, d))
  ref.u[r, tiles] = chunk.tiled(chunk.masked(valid, u))
  ref.ds[r, tiles] = chunk.tiled(chunk.masked(valid, ds))
  ds_x = chunk.masked(valid, ds_x)
  dD[r] += chunk.tiled(ds_x).sum(0)


def _steps(ref, plan, dh, dA, starts):
  """Recomputes the states of a chunk, and walks back through it."""
  strip, strips = plan.blocks.strip, plan.blocks.strips

  def recompute(i, states):
    def keep(k, each):
      for g, (before, _) in enumerate(each):
        ref.every_h[i * strip + k, g] = before
      if ref.s is not None:
        chunk.start_output(ref, plan, i, k, each)

    states = chunk.forward_steps(ref, plan, starts, i, states, keep)
    if ref.s is not None:
      chunk.finish_sums(plan, ref.partial, ref.s, i)
    return states

  h = jax.lax.fori_loop(0, strips, recompute, chunk.load(plan, ref.saved_h))
  for g, state in enumerate(h):
    ref.every_h[plan.blocks.chunk, g] = state
  last_dh, last_dA = jax.lax.fori_loop(
      0, strips,
      lambda i, carry: _adjoint_steps(
          ref, plan, starts, strips - 1 - i, *carry),
      (chunk.load(plan, dh), chunk.load(plan, dA)))
  chunk.store(plan, dh, last_dh)
  chunk.store(plan, dA, last_dA)


def _adjoint_steps(ref, plan, starts, i, dh, dA):
  """Takes the gradients of state and A back through the steps of strip i."""
  dh, dA = list(dh), list(dA)
  for k in reversed(range(plan.blocks.strip)):
    t = i * plan.blocks.strip + k
    for row in range(plan.blocks.rows):
      B, C = ref.wide_B[row, t], ref.wide_C[row, t]
      dB, dC = ref.dB_acc[row, t], ref.dC_acc[row, t]
      for g, (r, lanes) in enumerate(plan.blocks.streams):
        if r != row:
          continue
        d, u, ds = (chunk.step(plan, x, i, k, r, lanes)
                    for x in (ref.d, ref.u, ref.ds))
        A = ref.A[:, lanes]
        dh[g] += ds * C
        chunk.start_sum(plan, ref.partial, g, k, dh[g] * B)
        dB += dh[g] * u
        dC += ref.every_h[t + 1, g] * ds
        dh[g] *= jnp.exp2(d * A)
        exponent = chunk.unless_starts(
            starts, r, t, dh[g] * ref.every_h[t, g])
        dh[g] = chunk.unless_starts(starts, r, t, dh[g])
        chunk.start_sum(plan, ref.partial_d, g, k, exponent * A)
        dA[g] += exponent * d
      ref.dB_acc[row, t], ref.dC_acc[row, t] = dB, dC
  chunk.finish_sums(plan, ref.partial, ref.du, i)
  chunk.finish_sums(plan, ref.partial_d, ref.dd, i)
  return tuple(dh), tuple(dA)


def _after_steps(ref, plan, place, ddt_bias, r, rows, tiles):
  """Completes the gradients of some rows of x, dt and z."""
  x = ref.x[r, rows].astype(jnp.float32)
  d, ds, du, dd = (chunk.flat(series[r, tiles])
                   for series in (ref.d, ref.ds, ref.du, ref.dd))
  dx, ddt = du, dd * (1 / LOG2E)
  if plan.rule.scale_input:
    dx, ddt = d * du, x * du + ddt
  dx += ref.D[...] * ds
  ref.dx[r, rows] = dx.astype(ref.dx.dtype)
  if plan.rule.dt_softplus:
    ddt *= chunk.sigmoid(chunk.raw_step_sizes(ref, r, rows))
  ref.ddt[r, rows] = ddt.astype(ref.ddt.dtype)
  valid = chunk.mask(plan, place, rows)
  ddt = chunk.masked(valid, ddt)
  ddt_bias[r] += chunk.tiled(ddt).sum(0)
  if ref.z is not None:
    z = ref.z[r, rows].astype(jnp.float32)
    gate = chunk.sigmoid(z)
    dy = ref.dy[r, rows].astype(jnp.float32)
    y = chunk.flat(ref.s[r, tiles]) + ref.D[...] * x
    dz = dy * y * (gate * (1 + z * (1 - gate)))
    ref.dz[r, rows] = dz.astype(ref.dz.dtype)
