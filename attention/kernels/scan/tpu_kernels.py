"""The bodies of the TPU kernels of the selective scan; see tpu.py.

A body works on one chunk of time of a few streams: a stream is 128 channels of
one row of the batch, and its state is [M, 128], the channels on lanes. Between
the steps of several streams there is no dependence, which is what keeps the
vector units busy. Time goes in pieces of `STEPS` unrolled steps.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
STEPS = 16  # The rows of a tile of bfloat16, too.
LOG2E = math.log2(math.e)

# 2 atanh(s) / s in q = s^2, for q in [0, 1/9], to a relative 4e-9.
_ATANH = (0.281746573, 0.279614188, 0.400248537, 0.666663159, 2.0)


class Spec(NamedTuple):
  """What a body is specialised to.

  Attributes:
    rows: rows of the batch in a block.
    chunk: steps in a block, whole pieces.
    lanes: channels in a block, whole vectors.
    T: steps of the series.
    E: channels of the series.
    M: states, whole sublanes.
    softplus: whether step sizes go through softplus.
    inputs: names of the refs of the inputs, in order.
    outputs: likewise.
    scratch: likewise.
  """
  rows: int
  chunk: int
  lanes: int
  T: int
  E: int
  M: int
  softplus: bool
  inputs: tuple
  outputs: tuple
  scratch: tuple

  def streams(self):
    """(row, channels) of each stream."""
    return [(r, slice(l, l + LANES)) for r in range(self.rows)
            for l in range(0, self.lanes, LANES)]

  def named(self, refs):
    """The refs by their names."""
    return dict(zip(self.inputs + self.outputs + self.scratch, refs))


def forward(*refs, spec):
  """The outputs of one chunk, and the state that it started from."""
  ref = spec.named(refs)
  h = ref['h']
  chunk, chunks = pl.program_id(2), pl.num_programs(2)

  @pl.when(chunk == 0)
  def _():
    h[...] = ref['h0'][...]

  ref['states'][...] = h[...]
  _rows(spec, functools.partial(_before, spec, ref, _left(spec, chunk)))
  streams, project = spec.streams(), _columns(spec, ref['C'])

  def output(piece, k, columns, each):
    for g, (_, state) in enumerate(each):
      _put(ref['part'], g * STEPS + k, state * columns[streams[g][0]])

  def piece(i, states):
    columns = project(i)
    states = _advance(
        spec, ref, i, states,
        lambda k, each: output(i, k, columns(k), each))
    for g, (r, lanes) in enumerate(streams):
      _collect(ref['part'], g, ref['s'].at[r, :, :, lanes], i)
    return states

  states = jax.lax.fori_loop(
      0, spec.chunk // STEPS, piece, _load(spec, h))
  _store(spec, h, states)
  _rows(spec, functools.partial(_after, ref))

  @pl.when(chunk == chunks - 1)
  def _():
    ref['hT'][...] = h[...]


def backward(*refs, spec):
  """The gradients of one chunk; chunks come last first."""
  ref = spec.named(refs)
  dh, dA, states = ref['dh'], ref['dA'], ref['all']
  step, chunks = pl.program_id(2), pl.num_programs(2)
  chunk = chunks - 1 - step
  streams = spec.streams()

  @pl.when(step == 0)
  def _():
    dh[...] = ref['dhT'][...]
    for name in ('dA', 'dD', 'ddt_bias'):
      ref[name][...] = jnp.zeros_like(ref[name])

  left = _left(spec, chunk)
  _rows(spec, functools.partial(_before, spec, ref, left))
  project = _columns(spec, ref['C'])

  def again(i, h):
    columns = project(i)

    def keep(k, each):
      for g, (before, h) in enumerate(each):
        states[i * STEPS + k, g] = before
        if 's' in ref:
          _put(ref['part'], g * STEPS + k, h * columns(k)[streams[g][0]])

    h = _advance(spec, ref, i, h, keep)
    if 's' in ref:
      for g, (r, lanes) in enumerate(streams):
        _collect(ref['part'], g, ref['s'].at[r, :, :, lanes], i)
    return h

  pieces = spec.chunk // STEPS
  h = jax.lax.fori_loop(0, pieces, again, _load(spec, ref['states']))
  for g, state in enumerate(h):
    states[spec.chunk, g] = state

  ref['dB'][...] = jnp.zeros_like(ref['dB'])
  ref['dC'][...] = jnp.zeros_like(ref['dC'])
  carry = _load(spec, dh), _load(spec, dA)
  carry = jax.lax.fori_loop(
      0, pieces, lambda i, carry: _retreat(spec, ref, pieces - 1 - i, carry),
      carry)
  _store(spec, dh, carry[0])
  _store(spec, dA, carry[1])
  _rows(spec, functools.partial(_after_backward, spec, ref, left))

  @pl.when(step == chunks - 1)
  def _():
    ref['dh0'][...] = dh[...]


def _advance(spec, ref, i, states, visit):
  """Takes the states of the streams through the steps of piece i.

  Args:
    spec: Spec.
    ref: refs by name: d and u, the step sizes and those times x, A, B, starts.
    i: number of the piece.
    states: [M,128] of each stream.
    visit: called with k, for each step of the piece, and for each stream the
      states before and after.
  """
  streams, columns = spec.streams(), _columns(spec, ref['B'])(i)
  states = list(states)
  for k in range(STEPS):
    into, each = columns(k), []
    for g, (r, lanes) in enumerate(streams):
      before = states[g]
      decay = jnp.exp2(_step(ref['d'], i, k, r, lanes) * ref['A'][:, lanes])
      kept = _unless_starts(ref, r, i * STEPS + k, decay * before)
      states[g] = kept + _step(ref['u'], i, k, r, lanes) * into[r]
      each.append((before, states[g]))
    visit(k, each)
  return tuple(states)


def _retreat(spec, ref, i, carry):
  """Takes the gradients of state and A back through the steps of piece i."""
  streams, states = spec.streams(), ref['all']
  into, project = (_columns(spec, ref[name])(i) for name in 'BC')
  dh, dA = (list(each) for each in carry)
  lane = jax.lax.broadcasted_iota(jnp.int32, (spec.M, LANES), 1)
  dB, dC = ([ref[name][r] for r in range(spec.rows)] for name in ('dB', 'dC'))
  after = [states[(i + 1) * STEPS, g] for g in range(len(streams))]
  for k in reversed(range(STEPS)):
    t = i * STEPS + k
    B, C = into(k), project(k)
    sums = [[None, None] for _ in range(spec.rows)]
    for g, (r, lanes) in enumerate(streams):
      d, u, ds = (_step(ref[name], i, k, r, lanes) for name in ('d', 'u', 'ds'))
      A, before = ref['A'][:, lanes], states[t, g]
      dh[g] = dh[g] + ds * C[r]
      _put(ref['part'], g * STEPS + k, dh[g] * B[r])
      sums[r] = [x if y is None else x + y
                 for x, y in zip((dh[g] * u, after[g] * ds), sums[r])]
      dh[g] = dh[g] * jnp.exp2(d * A)
      exponent = _unless_starts(ref, r, t, dh[g] * before)
      dh[g] = _unless_starts(ref, r, t, dh[g])
      _put(ref['part2'], g * STEPS + k, exponent * A)
      dA[g] = dA[g] + exponent * d
      after[g] = before
    for r, (to_B, to_C) in enumerate(sums):
      dB[r], dC[r] = (
          jnp.where(lane == t, jnp.sum(x, axis=1, keepdims=True), total)
          for x, total in ((to_B, dB[r]), (to_C, dC[r])))
  for r in range(spec.rows):
    ref['dB'][r], ref['dC'][r] = dB[r], dC[r]
  for g, (r, lanes) in enumerate(streams):
    _collect(ref['part'], g, ref['du'].at[r, :, :, lanes], i)
    _collect(ref['part2'], g, ref['dd'].at[r, :, :, lanes], i)
  return tuple(dh), tuple(dA)


def _before(spec, ref, left, r, at, tiles):
  """Computes d, u and ds of some rows, as zeros beyond the series."""
  x = ref['x'][r, at].astype(jnp.float32)
  d = _raw(ref, r, at)
  if spec.softplus:
    d = _softplus(d)
  values = {'d': d, 'u': d * x}
  if 'dy' in ref:
    values['ds'] = _gated(ref, r, at, ref['dy'][r, at].astype(jnp.float32))
    values['xds'] = values['ds'] * x
  valid = _valid(spec, left, at)
  for name, value in values.items():
    if valid is not None:
      value = jnp.where(valid, value, 0.0)
    if name == 'xds':
      ref['dD'][r] += _tiles(value).sum(0)
    else:
      ref[name][r, tiles] = _tiles(value)


def _after(ref, r, at, tiles):
  """Completes the outputs of some rows."""
  y = ref['s'][r, tiles].reshape(at.size, -1)
  y += ref['D'][...] * ref['x'][r, at].astype(jnp.float32)
  y = _gated(ref, r, at, y)
  ref['y'][r, at] = y.astype(ref['y'].dtype)


def _after_backward(spec, ref, left, r, at, tiles):
  """Completes the gradients of some rows of x, dt and z."""
  x = ref['x'][r, at].astype(jnp.float32)
  rows = lambda name: ref[name][r, tiles].reshape(at.size, -1)
  du = rows('du')
  dx = rows('d') * du + ref['D'][...] * rows('ds')
  ref['dx'][r, at] = dx.astype(ref['dx'].dtype)
  ddt = x * du + rows('dd') * (1 / LOG2E)
  if spec.softplus:
    ddt *= jax.nn.sigmoid(_raw(ref, r, at))
  ref['ddt'][r, at] = ddt.astype(ref['ddt'].dtype)
  valid = _valid(spec, left, at)
  if valid is not None:
    ddt = jnp.where(valid, ddt, 0.0)
  ref['ddt_bias'][r] += _tiles(ddt).sum(0)
  if 'z' in ref:
    z = ref['z'][r, at].astype(jnp.float32)
    gate = jax.nn.sigmoid(z)
    dy = ref['dy'][r, at].astype(jnp.float32)
    y = rows('s') + ref['D'][...] * x
    dz = dy * y * (gate * (1 + z * (1 - gate)))
    ref['dz'][r, at] = dz.astype(ref['dz'].dtype)


def _rows(spec, body):
  """Calls body(row of the batch, rows of the chunk, tiles of 8) for all."""
  size = 32 if spec.chunk % 32 == 0 else STEPS
  tiles = size // SUBLANES

  def at(i, _):
    for r in range(spec.rows):
      body(r, pl.ds(pl.multiple_of(i * size, size), size),
           pl.ds(i * tiles, tiles))

  jax.lax.fori_loop(0, spec.chunk // size, at, None)


def _raw(ref, r, at):
  """Step sizes before softplus."""
  return ref['dt'][r, at].astype(jnp.float32) + ref['dt_bias'][...]


def _gated(ref, r, at, y):
  if 'z' not in ref:
    return y
  z = ref['z'][r, at].astype(jnp.float32)
  return y * (z * jax.nn.sigmoid(z))


def _softplus(x):
  """log(1 + e^x), to float32 also where it is small.

  Hardware logarithms of 1 + e lose e's low bits, and small steps are the rule:
  log(1 + e) = 2 atanh(e / (2 + e)) instead.
  """
  e = jnp.exp2(jnp.abs(x) * -LOG2E)
  s = e / (2 + e)
  q, series = s * s, _ATANH[0]
  for coefficient in _ATANH[1:]:
    series = series * q + coefficient
  return jnp.maximum(x, 0.0) + series * s


def _left(spec, chunk):
  """Steps and channels of the series from the start of this block on."""
  return (spec.T - chunk * spec.chunk,
          spec.E - pl.program_id(1) * spec.lanes)


def _valid(spec, left, at):
  """Mask [rows,lanes] of what the series has, None where that is all."""
  shape, masks = (at.size, spec.lanes), []
  if spec.T % spec.chunk:
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    masks.append(row < left[0] - at.start)
  if spec.E % spec.lanes:
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    masks.append(lane < left[1])
  return functools.reduce(jnp.logical_and, masks) if masks else None


def _tiles(rows):
  return rows.reshape(-1, SUBLANES, rows.shape[-1])


def _step(ref, i, k, r, lanes):
  """Step k of piece i as a row [1,128]."""
  tile = i * (STEPS // SUBLANES) + k // SUBLANES
  return ref[r, tile, pl.ds(k % SUBLANES, 1), lanes]


def _unless_starts(ref, r, t, x):
  """Zero where step t is the first of a document."""
  if 'starts' not in ref:
    return x
  return jnp.where(ref['starts'][r, 0, t] != 0, 0.0, x)


def _columns(spec, ref):
  """Returns i -> k -> columns [M,128] of B or C, of each row of the batch."""
  def piece(i):
    # Brings the piece's steps to the first lanes.
    turned = [pltpu.roll(ref[r], jax.lax.rem(LANES - i * STEPS, LANES), 1)
              for r in range(spec.rows)]
    return lambda k: [
        jnp.broadcast_to(x[:, k:k + 1], (spec.M, LANES)) for x in turned]
  return piece


def _put(part, row, x):
  """Sums [M,128] down to 8 sublanes, and stores them."""
  x = sum(x[j:j + SUBLANES] for j in range(SUBLANES, x.shape[0], SUBLANES)
          ) + x[:SUBLANES]
  part[row * SUBLANES:(row + 1) * SUBLANES] = x


def _collect(part, g, out, i):
  """Sums over sublanes what `_put` has stored for a stream and a piece."""
  for tile in range(STEPS // SUBLANES):
    first = (g * STEPS + tile * SUBLANES) * SUBLANES
    out[i * (STEPS // SUBLANES) + tile] = functools.reduce(jnp.add, [
        part[pl.ds(first + j, SUBLANES, stride=SUBLANES)]
        for j in range(SUBLANES)])


def _load(spec, ref):
  return tuple(ref[r, :, lanes] for r, lanes in spec.streams())


def _store(spec, ref, values):
  for (r, lanes), value in zip(spec.streams(), values):
    ref[r, :, lanes] = value
