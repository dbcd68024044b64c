"""What the TPU kernels of the selective scan do with a whole chunk at once.

Before the steps and after them, in rows of a few tiles: step sizes, gates, the
skip, slopes; B and C as vectors, and their gradients back from vectors. See
tpu.py.

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
LOG2E = math.log2(math.e)

# log(1 + e) / e for e in [0, 1], to a relative 3e-8.
_LOG1P = (0.0052534578, -0.0295885074, 0.078361668, -0.136747697, 0.191114311,
          -0.248443699, 0.333192713, -0.499995015, 0.999999971)


class Spec(NamedTuple):
  """What a body is specialised to.

  Attributes:
    rows: rows of the batch in a block.
    chunk: steps in a block, whole pieces.
    piece: steps that are unrolled, whole vectors.
    lanes: channels in a block, whole vectors.
    T: steps of the series.
    E: channels of the series.
    M: states, whole sublanes.
    softplus: whether step sizes go through softplus.
    refs: names of the refs: inputs, outputs and scratch.
  """
  rows: int
  chunk: int
  piece: int
  lanes: int
  T: int
  E: int
  M: int
  softplus: bool
  refs: tuple = ()

  @property
  def pieces(self):
    return self.chunk // self.piece

  @property
  def streams(self):
    """(row, channels) of each stream."""
    return [(r, slice(l, l + LANES)) for r in range(self.rows)
            for l in range(0, self.lanes, LANES)]


def each_rows(spec, body):
  """Calls body(row of the batch, rows of the chunk, tiles of 8) for all."""
  size = spec.piece * (2 if spec.pieces % 2 == 0 else 1)
  tiles = size // SUBLANES

  def some(i, _):
    for r in range(spec.rows):
      body(r, pl.ds(pl.multiple_of(i * size, size), size),
           pl.ds(i * tiles, tiles))

  jax.lax.fori_loop(0, spec.chunk // size, some, None)


def before(spec, ref, at, r, rows, tiles, sum_D=None):
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


def after(ref, r, rows, tiles):
  """Completes the outputs of some rows."""
  y = _flat(ref['s'][r, tiles])
  y += ref['D'][...] * ref['x'][r, rows].astype(jnp.float32)
  y = _gated(ref, r, rows, y)
  ref['y'][r, rows] = y.astype(ref['y'].dtype)


def after_backward(spec, ref, at, sum_bias, r, rows, tiles):
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
  """1 / (1 + e^-x), to float32 on both sides of zero."""
  e = jnp.exp2(jnp.abs(x) * -LOG2E)
  # The best parabola is within 1/99 of 1 / (1 + e); Newton squares the error.
  inverse = (32 / 99 * e - 80 / 99) * e + 98 / 99
  for _ in range(2):
    inverse *= 2 - (1 + e) * inverse
  return jnp.where(x < 0, e, 1.0) * inverse


def spread(spec, ref):
  """Copies each number of B and C to a vector's lanes: [steps,M,128].

  In B and C a row of 128 is some steps' states, one step after the other. Such
  a row, repeated and turned over, is those steps' columns, repeated. Their
  gradients, if any, are set to zero here, where half of the stores are idle.
  """
  steps = LANES // spec.M

  def eight(i, _):
    for name in 'BC':
      for r in range(spec.rows):
        for j in range(SUBLANES):
          row = ref[name][r, i, j:j + 1]
          columns = jnp.broadcast_to(row, (LANES, LANES)).T
          at = pl.ds((i * SUBLANES + j) * steps, steps)
          columns = columns.reshape(steps, spec.M, LANES)
          ref[f'each_{name}'][r, at] = columns
          if f'sum_{name}' in ref:
            ref[f'sum_{name}'][r, at] = jnp.zeros_like(columns)

  jax.lax.fori_loop(0, ref['B'].shape[1], eight, None)


def gather(spec, ref):
  """Sums dB and dC over the lanes: `spread` the other way round."""
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
