"""The bodies of the TPU kernels of the selective scan; see tpu.py.

A body works on one chunk of time of a few streams: a stream is 128 channels of
one row of the batch, and its state is [M, 128], the channels on lanes. Between
the steps of several streams there is no dependence, which is what keeps the
vector units busy. Time goes in pieces of `STEPS` unrolled steps.

Refs of series in float32 are [rows, tiles, 8, lanes]: a step is a sublane, and
is loaded broadcast over the sublanes of the states.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES, SUBLANES = 128, 8
STEPS = 16  # The rows of a tile of bfloat16, too.
LOG2E = math.log2(math.e)

# log(1 + e) / e for e in [0, 1], to a relative 3e-8.
_LOG1P = (0.0052534578, -0.0295885074, 0.078361668, -0.136747697, 0.191114311,
          -0.248443699, 0.333192713, -0.499995015, 0.999999971)


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
    refs: names of the refs: inputs, outputs and scratch.
  """
  rows: int
  chunk: int
  lanes: int
  T: int
  E: int
  M: int
  softplus: bool
  refs: tuple = ()

  @property
  def pieces(self):
    return self.chunk // STEPS

  @property
  def streams(self):
    """(row, channels) of each stream."""
    return [(r, slice(l, l + LANES)) for r in range(self.rows)
            for l in range(0, self.lanes, LANES)]


class _Place(NamedTuple):
  """Where a body is in the grid; all but `reverse` are traced.

  Attributes:
    block: block of channels, of those that share B and C.
    first: whether the chunk is the first to be done.
    last: whether it is the last.
    steps: steps of the series from the chunk's start on.
    channels: channels of the series from the block's start on.
  """
  block: object
  first: object
  last: object
  steps: object
  channels: object


def _place(spec, *, reverse=False):
  t, chunks = pl.program_id(2), pl.num_programs(2)
  e, blocks = pl.program_id(3), pl.num_programs(3)
  chunk = chunks - 1 - t if reverse else t
  return _Place(
      e, t == 0, t == chunks - 1, spec.T - chunk * spec.chunk,
      spec.E - (pl.program_id(1) * blocks + e) * spec.lanes), e == blocks - 1


def forward(*refs, spec):
  """The outputs of one chunk, and the state that it started from."""
  ref = dict(zip(spec.refs, refs))
  at, _ = _place(spec)
  h = ref['h'].at[at.block]

  @pl.when(at.first)
  def _():
    h[...] = ref['h0'][...]

  pl.when(at.block == 0)(lambda: _spread(spec, ref))
  ref['states'][...] = h[...]
  _rows(spec, functools.partial(_before, spec, ref, at))

  def scan(ref):
    def piece(i, states):
      states = _advance(spec, ref, i, states, functools.partial(
          _project, spec, ref, i))
      _collect(spec, ref['part'], ref['s'], i)
      return states
    _store(spec, h, jax.lax.fori_loop(
        0, spec.pieces, piece, _load(spec, h)))

  _where_starts(spec, ref, scan)
  _rows(spec, functools.partial(_after, ref))

  @pl.when(at.last)
  def _():
    ref['hT'][...] = h[...]


def backward(*refs, spec):
  """The gradients of one chunk; chunks come last first."""
  ref = dict(zip(spec.refs, refs))
  at, last_block = _place(spec, reverse=True)
  sums = {name: ref[f'sum_{name}'].at[at.block]
          for name in ('h', 'A', 'D', 'dt_bias')}

  @pl.when(at.first)
  def _():
    sums['h'][...] = ref['dhT'][...]
    for name in ('A', 'D', 'dt_bias'):
      sums[name][...] = jnp.zeros_like(sums[name])

  @pl.when(at.block == 0)
  def _():
    _spread(spec, ref)
    for name in ('sum_B', 'sum_C'):
      def clear(t, _, sums=ref[name]):
        sums[:, t] = jnp.zeros_like(sums[:, t])
      jax.lax.fori_loop(0, ref[name].shape[1], clear, None)

  _rows(spec, functools.partial(_before, spec, ref, at, sum_D=sums['D']))

  _where_starts(spec, ref, functools.partial(_backward_steps, spec, sums))
  _rows(spec, functools.partial(
      _after_backward, spec, ref, at, sums['dt_bias']))

  @pl.when(at.last)
  def _():
    ref['dh0'][...] = sums['h'][...]
    ref['dA'][...] = sums['A'][...]
    ref['dD'][...] = sums['D'][...]
    ref['ddt_bias'][...] = sums['dt_bias'][...]

  pl.when(last_block)(lambda: _gather(spec, ref))


def _backward_steps(spec, sums, ref):
  """Recomputes the states of a chunk, and walks back through it."""
  def again(i, h):
    def keep(k, each):
      for g, (before, _) in enumerate(each):
        ref['all'][i * STEPS + k, g] = before
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
  for k in range(STEPS):
    t, each = i * STEPS + k, []
    for g, (r, lanes) in enumerate(spec.streams):
      before = states[g]
      decay = jnp.exp2(_step(ref['d'], i, k, r, lanes) * ref['A'][:, lanes])
      kept = _unless_starts(ref, r, t, decay * before)
      new = _step(ref['u'], i, k, r, lanes) * ref['each_B'][r, t]
      states[g] = kept + new
      each.append((before, states[g]))
    visit(k, each)
  return tuple(states)


def _project(spec, ref, i, k, each):
  """Begins the sums of h C of a step; `each` as `_advance` has it."""
  for g, (r, _) in enumerate(spec.streams):
    _put(ref['part'], g, k, each[g][1] * ref['each_C'][r, i * STEPS + k])


def _retreat(spec, ref, i, dh, dA):
  """Takes the gradients of state and A back through the steps of piece i."""
  dh, dA = list(dh), list(dA)
  for k in reversed(range(STEPS)):
    t = i * STEPS + k
    for r in range(spec.rows):
      B, C = ref['each_B'][r, t], ref['each_C'][r, t]
      dB, dC = ref['sum_B'][r, t], ref['sum_C'][r, t]
      for g, (row, lanes) in enumerate(spec.streams):
        if row != r:
          continue
        d, u, ds = (
            _step(ref[name], i, k, r, lanes) for name in ('d', 'u', 'ds'))
        A = ref['A'][:, lanes]
        dh[g] += ds * C
        _put(ref['part'], g, k, dh[g] * B)
        dB += dh[g] * u
        dC += ref['all'][t + 1, g] * ds
        dh[g] *= jnp.exp2(d * A)
        exponent = _unless_starts(ref, r, t, dh[g] * ref['all'][t, g])
        dh[g] = _unless_starts(ref, r, t, dh[g])
        _put(ref['part_A'], g, k, exponent * A)
        dA[g] += exponent * d
      ref['sum_B'][r, t], ref['sum_C'][r, t] = dB, dC
  _collect(spec, ref['part'], ref['du'], i)
  _collect(spec, ref['part_A'], ref['dd'], i)
  return tuple(dh), tuple(dA)


def _before(spec, ref, at, r, rows, tiles, sum_D=None):
  """Computes d, u and ds of some rows, as zeros beyond the series."""
  x = ref['x'][r, rows].astype(jnp.float32)
  d = _raw(ref, r, rows)
  if spec.softplus:
    d = _softplus(d)
  values = {'d': d, 'u': d * x}
  if 'dy' in ref:
    ds = _gated(ref, r, rows, ref['dy'][r, rows].astype(jnp.float32))
    values |= {'ds': ds, 'dD': ds * x}
  valid = _valid(spec, at, rows)
  for name, value in values.items():
    if valid is not None:
      value = jnp.where(valid, value, 0.0)
    if name == 'dD':
      sum_D[r] += _tiles(value).sum(0)
    else:
      ref[name][r, tiles] = _tiles(value)


def _after(ref, r, rows, tiles):
  """Completes the outputs of some rows."""
  y = _flat(ref['s'][r, tiles])
  y += ref['D'][...] * ref['x'][r, rows].astype(jnp.float32)
  y = _gated(ref, r, rows, y)
  ref['y'][r, rows] = y.astype(ref['y'].dtype)


def _after_backward(spec, ref, at, sum_bias, r, rows, tiles):
  """Completes the gradients of some rows of x, dt and z."""
  x = ref['x'][r, rows].astype(jnp.float32)
  d, ds, du, dd = (
      _flat(ref[name][r, tiles]) for name in ('d', 'ds', 'du', 'dd'))
  dx = d * du + ref['D'][...] * ds
  ref['dx'][r, rows] = dx.astype(ref['dx'].dtype)
  ddt = x * du + dd * (1 / LOG2E)
  if spec.softplus:
    ddt *= _sigmoid(_raw(ref, r, rows))
  ref['ddt'][r, rows] = ddt.astype(ref['ddt'].dtype)
  valid = _valid(spec, at, rows)
  if valid is not None:
    ddt = jnp.where(valid, ddt, 0.0)
  sum_bias[r] += _tiles(ddt).sum(0)
  if 'z' in ref:
    z = ref['z'][r, rows].astype(jnp.float32)
    gate = _sigmoid(z)
    dy = ref['dy'][r, rows].astype(jnp.float32)
    y = _flat(ref['s'][r, tiles]) + ref['D'][...] * x
    dz = dy * y * (gate * (1 + z * (1 - gate)))
    ref['dz'][r, rows] = dz.astype(ref['dz'].dtype)


def _rows(spec, body):
  """Calls body(row of the batch, rows of the chunk, tiles of 8) for all."""
  size = 2 * STEPS if spec.pieces % 2 == 0 else STEPS
  tiles = size // SUBLANES

  def some(i, _):
    for r in range(spec.rows):
      body(r, pl.ds(pl.multiple_of(i * size, size), size),
           pl.ds(i * tiles, tiles))

  jax.lax.fori_loop(0, spec.chunk // size, some, None)


def _tiles(rows):
  return rows.reshape(-1, SUBLANES, rows.shape[-1])


def _flat(tiles):
  return tiles.reshape(-1, tiles.shape[-1])


def _valid(spec, at, rows):
  """Mask [rows,lanes] of what the series has, None where that is all."""
  shape, masks = (rows.size, spec.lanes), []
  if spec.T % spec.chunk:
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    masks.append(row < at.steps - rows.start)
  if spec.E % spec.lanes:
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    masks.append(lane < at.channels)
  return functools.reduce(jnp.logical_and, masks) if masks else None


def _raw(ref, r, rows):
  """Step sizes before softplus."""
  return ref['dt'][r, rows].astype(jnp.float32) + ref['dt_bias'][...]


def _gated(ref, r, rows, y):
  if 'z' not in ref:
    return y
  z = ref['z'][r, rows].astype(jnp.float32)
  return y * (z * _sigmoid(z))


def _softplus(x):
  """log(1 + e^x), to float32 also where it is small.

  Small steps are the rule, and 1 + e^x would lose their low bits.
  """
  e = jnp.exp2(jnp.abs(x) * -LOG2E)
  series = _LOG1P[0]
  for coefficient in _LOG1P[1:]:
    series = series * e + coefficient
  return jnp.maximum(x, 0.0) + series * e


def _sigmoid(x):
  """1 / (1 + e^-x); the divisor is in [1, 2] and needs no care."""
  e = jnp.exp2(jnp.abs(x) * -LOG2E)
  whole = 1 + e
  inverse = pl.reciprocal(whole, approx=True)
  for _ in range(2):  # Newton: 8 bits, 16, 32.
    inverse *= 2 - whole * inverse
  return jnp.where(x < 0, e, 1.0) * inverse


def _step(ref, i, k, r, lanes):
  """Step k of piece i as a row [1,128]."""
  tile = i * (STEPS // SUBLANES) + k // SUBLANES
  return ref[r, tile, pl.ds(k % SUBLANES, 1), lanes]


def _unless_starts(ref, r, t, x):
  """Zero where step t is the first of a document."""
  if 'starts' not in ref:
    return x
  return jnp.where(ref['starts'][r, 0, t] != 0, 0.0, x)


def _spread(spec, ref):
  """Copies each number of B and C to a vector's lanes: [steps,M,128].

  In B and C a row of 128 is some steps' states, one step after the other. Such
  a row, repeated and turned over, is those steps' columns, repeated.
  """
  steps = LANES // spec.M

  def eight(i, _):
    for name in 'BC':
      for r in range(spec.rows):
        for j in range(SUBLANES):
          row = ref[name][r, i, j:j + 1]
          columns = jnp.broadcast_to(row, (LANES, LANES)).T
          at = pl.ds((i * SUBLANES + j) * steps, steps)
          ref[f'each_{name}'][r, at] = columns.reshape(steps, spec.M, LANES)

  jax.lax.fori_loop(0, ref['B'].shape[1], eight, None)


def _gather(spec, ref):
  """Sums dB and dC over the lanes: `_spread` the other way round."""
  steps = LANES // spec.M

  def eight(i, _):
    for name in 'BC':
      for r in range(spec.rows):
        for j in range(SUBLANES):
          at = pl.ds((i * SUBLANES + j) * steps, steps)
          columns = ref[f'sum_{name}'][r, at].reshape(LANES, LANES)
          ref[f'd{name}'][r, i, j:j + 1] = jnp.sum(
              columns.T, axis=0, keepdims=True)

  jax.lax.fori_loop(0, ref['B'].shape[1], eight, None)


def _put(part, g, k, x):
  """Sums [M,128] down to 8 sublanes, and stores these 8 tiles apart.

  Those of eight steps make eight tiles, to be added up by `_collect`.
  """
  x = sum((x[j:j + SUBLANES] for j in range(SUBLANES, x.shape[0], SUBLANES)),
          start=x[:SUBLANES])
  first = (g * STEPS + k // SUBLANES * SUBLANES) * SUBLANES
  part[pl.ds(first + k % SUBLANES, SUBLANES, stride=SUBLANES)] = x


def _collect(spec, part, out, i):
  """Completes the sums that `_put` has begun for the steps of piece i."""
  for g, (r, lanes) in enumerate(spec.streams):
    for tile in range(STEPS // SUBLANES):
      first = (g * STEPS + tile * SUBLANES) * SUBLANES
      out[r, i * (STEPS // SUBLANES) + tile, :, lanes] = functools.reduce(
          jnp.add, [part[first + j:first + j + SUBLANES]
                    for j in range(0, SUBLANES * SUBLANES, SUBLANES)])


def _load(spec, ref):
  return tuple(ref[r, :, lanes] for r, lanes in spec.streams)


def _store(spec, ref, values):
  for (r, lanes), value in zip(spec.streams, values):
    ref[r, :, lanes] = value
