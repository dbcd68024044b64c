"""The bodies of the TPU kernels of the selective scan; see tpu.py.

A body works on one chunk of time of a few streams: a stream is 128 channels of
one row of the batch, and its state is [M, 128], the channels on lanes. Between
the steps of several streams there is no dependence, which is what keeps the
vector units busy. Time goes in pieces of unrolled steps.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels.scan import tpu_chunk
from attention.kernels.scan.tpu_chunk import SUBLANES


class _Place(NamedTuple):
  """Where a body is in the grid.

  Attributes:
    block: block of channels, of those that share B and C.
    last_block: whether it is the last of them.
    first: whether the chunk is the first to be done.
    last: whether it is the last.
    steps: steps of the series from the chunk's start on.
    channels: channels of the series from the block's start on.
  """
  block: object
  last_block: object
  first: object
  last: object
  steps: object
  channels: object


def _place(spec, *, reverse=False):
  t, chunks = pl.program_id(2), pl.num_programs(2)
  e, blocks = pl.program_id(3), pl.num_programs(3)
  chunk = chunks - 1 - t if reverse else t
  return _Place(
      e, e == blocks - 1, t == 0, t == chunks - 1,
      spec.T - chunk * spec.chunk,
      spec.E - (pl.program_id(1) * blocks + e) * spec.lanes)


def forward(*refs, spec):
  """The outputs of one chunk, and the state that it started from."""
  ref = dict(zip(spec.refs, refs))
  at = _place(spec)
  h = ref['h'].at[at.block]

  @pl.when(at.first)
  def _():
    h[...] = ref['h0'][...]

  pl.when(at.block == 0)(lambda: tpu_chunk.spread(spec, ref))
  ref['states'][...] = h[...]
  tpu_chunk.each_rows(spec, functools.partial(tpu_chunk.before, spec, ref, at))

  def scan(ref):
    def piece(i, states):
      states = _advance(spec, ref, i, states, functools.partial(
          _project, spec, ref, i))
      _collect(spec, ref['part'], ref['s'], i)
      return states
    _store(spec, h, jax.lax.fori_loop(
        0, spec.pieces, piece, _load(spec, h)))

  _where_starts(spec, ref, scan)
  tpu_chunk.each_rows(spec, functools.partial(tpu_chunk.after, ref))

  @pl.when(at.last)
  def _():
    ref['hT'][...] = h[...]


def backward(*refs, spec):
  """The gradients of one chunk; chunks come last first."""
  ref = dict(zip(spec.refs, refs))
  at = _place(spec, reverse=True)
  sums = {name: ref[f'sum_{name}'].at[at.block]
          for name in ('h', 'A', 'D', 'dt_bias')}

  @pl.when(at.first)
  def _():
    sums['h'][...] = ref['dhT'][...]
    for name in ('A', 'D', 'dt_bias'):
      sums[name][...] = jnp.zeros_like(sums[name])

  pl.when(at.block == 0)(lambda: tpu_chunk.spread(spec, ref))
  tpu_chunk.each_rows(spec, functools.partial(
      tpu_chunk.before, spec, ref, at, sum_D=sums['D']))

  _where_starts(spec, ref, functools.partial(_backward_steps, spec, sums))
  tpu_chunk.each_rows(spec, functools.partial(
      tpu_chunk.after_backward, spec, ref, at, sums['dt_bias']))

  @pl.when(at.last)
  def _():
    ref['dh0'][...] = sums['h'][...]
    ref['dA'][...] = sums['A'][...]
    ref['dD'][...] = sums['D'][...]
    ref['ddt_bias'][...] = sums['dt_bias'][...]

  pl.when(at.last_block)(lambda: tpu_chunk.gather(spec, ref))


def _backward_steps(spec, sums, ref):
  """Recomputes the states of a chunk, and walks back through it."""
  def again(i, h):
    def keep(k, each):
      for g, (before, _) in enumerate(each):
        ref['all'][i * spec.piece + k, g] = before
      if 's' in ref:
        _project(spec, ref, i, k, each)
    h = _advance(spec, ref, i, h, keep)
    if 's' in ref:
      _collect(spec, ref['part'], ref['s'], i)
    return h

  h = jax.lax.fori_loop(0, spec.pieces, again, _load(spec, ref['states']))
  for g, state in enumerate(h):
    ref['all'][spec.chunk, g] = state
  dh, dA = jax.lax.fori_loop(
      0, spec.pieces,
      lambda i, carry: _retreat(spec, ref, spec.pieces - 1 - i, *carry),
      (_load(spec, sums['h']), _load(spec, sums['A'])))
  _store(spec, sums['h'], dh)
  _store(spec, sums['A'], dA)


def _where_starts(spec, ref, body):
  """Calls body(ref), without the starts where the chunk has none.

  A start costs a selection for every state, at every step of the chunk.
  """
  if 'starts' not in ref:
    body(ref)
    return
  plain = {name: ref[name] for name in ref if name != 'starts'}
  number = sum(ref['starts'][r, 0, spec.chunk] for r in range(spec.rows))
  pl.when(number > 0)(lambda: body(ref))
  pl.when(number == 0)(lambda: body(plain))


def _advance(spec, ref, i, states, visit):
  """Takes the states of the streams through the steps of piece i.

  Args:
    spec: Spec.
    ref: refs by name: d and u, the step sizes and those times x, A, each_B,
      starts.
    i: number of the piece.
    states: [M,128] of each stream.
    visit: called with k, for each step of the piece, and for each stream the
      states before and after.
  """
  states = list(states)
  for k in range(spec.piece):
    t, each = i * spec.piece + k, []
    for g, (r, lanes) in enumerate(spec.streams):
      before = states[g]
      d, u = (_step(spec, ref[name], i, k, r, lanes) for name in ('d', 'u'))
      kept = jnp.exp2(d * ref['A'][:, lanes]) * before
      kept = _unless_starts(ref, r, t, kept)
      states[g] = kept + u * ref['each_B'][r, t]
      each.append((before, states[g]))
    visit(k, each)
  return tuple(states)


def _project(spec, ref, i, k, each):
  """Begins the sums of h C of a step; `each` as `_advance` has it."""
  for g, (r, _) in enumerate(spec.streams):
    C = ref['each_C'][r, i * spec.piece + k]
    _put(spec, ref['part'], g, k, each[g][1] * C)


def _retreat(spec, ref, i, dh, dA):
  """Takes the gradients of state and A back through the steps of piece i."""
  dh, dA = list(dh), list(dA)
  for k in reversed(range(spec.piece)):
    t = i * spec.piece + k
    for r in range(spec.rows):
      B, C = ref['each_B'][r, t], ref['each_C'][r, t]
      dB, dC = ref['sum_B'][r, t], ref['sum_C'][r, t]
      for g, (row, lanes) in enumerate(spec.streams):
        if row != r:
          continue
        d, u, ds = (
            _step(spec, ref[name], i, k, r, lanes) for name in ('d', 'u', 'ds'))
        A = ref['A'][:, lanes]
        dh[g] += ds * C
        _put(spec, ref['part'], g, k, dh[g] * B)
        dB += dh[g] * u
        dC += ref['all'][t + 1, g] * ds
        dh[g] *= jnp.exp2(d * A)
        exponent = _unless_starts(ref, r, t, dh[g] * ref['all'][t, g])
        dh[g] = _unless_starts(ref, r, t, dh[g])
        _put(spec, ref['part_A'], g, k, exponent * A)
        dA[g] += exponent * d
      ref['sum_B'][r, t], ref['sum_C'][r, t] = dB, dC
  _collect(spec, ref['part'], ref['du'], i)
  _collect(spec, ref['part_A'], ref['dd'], i)
  return tuple(dh), tuple(dA)


def _step(spec, ref, i, k, r, lanes):
  """Step k of piece i as a row [1,128]."""
  tile = i * (spec.piece // SUBLANES) + k // SUBLANES
  return ref[r, tile, pl.ds(k % SUBLANES, 1), lanes]


def _unless_starts(ref, r, t, x):
  """Zero where step t is the first of a document."""
  if 'starts' not in ref:
    return x
  return jnp.where(ref['starts'][r, 0, t] != 0, 0.0, x)


def _put(spec, part, g, k, x):
  """Sums [M,128] down to 8 sublanes, and stores these 8 tiles apart.

  Those of eight steps make eight tiles, to be added up by `_collect`.
  """
  x = sum((x[j:j + SUBLANES] for j in range(SUBLANES, x.shape[0], SUBLANES)),
          start=x[:SUBLANES])
  first = (g * spec.piece + k // SUBLANES * SUBLANES) * SUBLANES
  part[pl.ds(first + k % SUBLANES, SUBLANES, stride=SUBLANES)] = x


def _collect(spec, part, out, i):
  """Completes the sums that `_put` has begun for the steps of piece i."""
  for g, (r, lanes) in enumerate(spec.streams):
    for tile in range(spec.piece // SUBLANES):
      first = (g * spec.piece + tile * SUBLANES) * SUBLANES
      out[r, i * (spec.piece // SUBLANES) + tile, :, lanes] = functools.reduce(
          jnp.add, [part[first + j:first + j + SUBLANES]
                    for j in range(0, SUBLANES * SUBLANES, SUBLANES)])


def _load(spec, ref):
  return tuple(ref[r, :, lanes] for r, lanes in spec.streams)


def _store(spec, ref, values):
  for (r, lanes), value in zip(spec.streams, values):
    ref[r, :, lanes] = value
