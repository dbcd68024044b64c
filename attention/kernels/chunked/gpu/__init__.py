"""Chunked linear attention for Hopper GPUs, in Mosaic GPU.

Two passes each way: `states` walks over the chunks, then every chunk is on its
own. docs/kernels.md has the design. States are float32 in registers; what the
outputs read of them is rounded to the dtype of the inputs, as every operand of
the tensor cores.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels import chunked, dispatch
from attention.kernels.chunked.gpu import chunk, launch
from attention.kernels.mosaic_gpu import pad


def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  del rule
  dispatch.require_hopper()
  for name in ('q', 'k', 'v'):
    dtype = getattr(operands, name).dtype
    if dtype == jnp.float16:
      raise NotImplementedError(
          f'gpu takes no float16 ({name}): sums over the steps leave its range')
    if dtype != jnp.bfloat16:
      raise NotImplementedError(
          f'gpu takes bfloat16, not {dtype} ({name}), which the tensor cores '
          'would round')
  for name, width in (('H', operands.q.shape[-1]), ('V', operands.v.shape[-1])):
    if width % 16 or not 16 <= width <= 128:
      raise NotImplementedError(
          f'gpu takes {name} that 16 divides, up to 128, not {width}')


def forward(operands, rule):
  """See `attention.kernels.chunked`."""
  q, k, v, decay, s0, z0, starts = operands
  time = q.shape[1]
  plan = _plan(q, v, rule)
  weights = chunk.weights(v, decay, starts)
  q, k, v = (pad(x, axis=1) for x in (q, k, v))
  scales = None
  if weights.kept is not None:
    sums = () if rule.normalize is None else (weights.after,)
    scales = _scales(weights.after, weights.kept, *sums)
  S = launch.walk(plan._replace(G=1), x=k, y=v, scales=scales, s=s0, z=z0)
  out = launch.forward(plan, q=q, k=k, v=v, states=S['states'],
                       z=S['z_states'], weights=weights)
  y = out['y'][:, :time]
  saved = (S['states'], S['z_states'])
  if rule.normalize is not None:
    saved += (y, out['inverse'])
  return (y, S['last'], S['z_last']), saved


def backward(operands, rule, saved, cotangents):
  """See `attention.kernels.chunked`."""
  dy, dsT, dzT = cotangents
  q, k, v, decay, _, _, starts = operands
  time = q.shape[1]
  states, z, *normalized = saved
  plan = _plan(q, v, rule)
  weights = chunk.weights(v, decay, starts)
  dy = dy.astype(q.dtype)
  inverse = delta = None
  if rule.normalize is not None:
    y, inverse = normalized
    delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), -1)
    delta = chunk.chunks(jnp.swapaxes(delta, 1, 2)).reshape(inverse.shape)
  q, k, v, dy = (pad(x, axis=1) for x in (q, k, v, dy))
  dS = launch.walk(
      plan._replace(reverse=True), x=q, y=dy,
      scales=_reverse_scales(plan, weights, inverse, delta), s=dsT, z=dzT)
  out = launch.gradients(
      plan, q=q, k=k, v=v, dy=dy, states=states, dstates=dS['states'],
      inverse=inverse, z=z, dz=dS['z_states'], weights=weights)
  ddecay = None
  if decay is not None:
    passed = jnp.sum(states.astype(jnp.float32) * dS['states'], (1, 2))
    passed = passed.reshape(weights.kept.shape)
    if rule.normalize is not None:
      passed += jnp.sum(z * dS['z_states'], -1).reshape(passed.shape)
    ddecay = chunk.decay_gradient(weights, starts, passed, out)
    ddecay = jnp.swapaxes(ddecay, 1, 2)[:, :time]
  dq, dk, dv = (out[name][:, :time] for name in ('dq', 'dk', 'dv'))
  dq, dk = _summed(dq, operands.q), _summed(dk, operands.k)
  return chunked.Operands(dq, dk, dv, ddecay, dS['last'], dS['z_last'], None)


def _plan(q, v, rule):
  K = v.shape[2]
  return launch.Plan(
      K, max(q.shape[2] // K, 1), pl.cdiv(q.shape[1], chunk.CHUNK),
      rule.normalize)


def _summed(x, like):
  """[B,T,heads,H] summed over the heads in a row that share one of another."""
  if x.shape[2] == like.shape[2]:
    return x
  return x.reshape(*x.shape[:2], like.shape[2], -1, x.shape[-1]).sum(3)


def _reverse_scales(plan, weights, inverse, delta):
  """What the gradients of the states weigh queries with, see _scales."""
  before, kept = weights.before, weights.kept
  if inverse is None:
    if before is None:
      return None
    scale, more = jnp.repeat(before, plan.G, axis=1), ()
  else:
    scale = chunk.chunks(inverse)
    if before is not None:
      before = jnp.repeat(before, plan.G, axis=1)
      scale = jnp.where(before > 0, before * scale, 0.0)
    delta = chunk.chunks(delta)
    more = (jnp.where(scale != 0, -scale * delta, 0.0),)
  # The first of a group forgets for all.
  every = jnp.ones(scale.shape[:-1])
  if kept is not None:
    every = every.at[:, ::plan.G].set(kept)
  return _scales(scale, every, *more)


def _scales(weights, kept, *more):
  """The rows that launch.walk takes: weights, kept, more or none."""
  rows = [weights, jnp.broadcast_to(kept[..., None], weights.shape)]
  rows = jnp.stack([*rows, *more], axis=-2)
  return rows.reshape(*rows.shape[:2], -1, chunk.CHUNK)
