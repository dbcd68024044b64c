"""Selective scan for TPU, forward and backward, in Pallas (Mosaic TPU)."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.kernels import scan
from attention.kernels.scan import tpu_kernels
from attention.kernels.scan.tpu_kernels import LANES, LOG2E, STEPS, SUBLANES

# Channels times states of a program. 8192 are eight vectors of state.
_STATES = 8192


def check(operands, starts, *, dt_softplus):
  """Raises NotImplementedError for what these kernels decline."""
  del starts, dt_softplus
  for name in ('x', 'dt', 'z'):
    array = getattr(operands, name)
    if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
      raise NotImplementedError(
          f'{name} of dtype {array.dtype}: the TPU kernels take bfloat16 and '
          'float32')
  if operands.A.shape[1] > 64:
    raise NotImplementedError(
        f'M ({operands.A.shape[1]}): the TPU kernels take up to 64 states')


def forward(operands, starts, *, dt_softplus):
  """See `attention.kernels.scan`."""
  call = _Launch(operands, starts, dt_softplus)
  x = operands.x
  y, hT, states = call.run(
      tpu_kernels.forward,
      {'y': call.series(x.dtype), 'hT': call.state(),
       'states': call.boundaries()},
      {'h': (call.spec.M, call.spec.lanes), 'd': call.tiles, 'u': call.tiles,
       's': call.tiles, 'part': call.parts},
      name='scan_forward', operations=6)
  E, M = operands.A.shape
  return y, hT[:, :M, :E].swapaxes(1, 2), states


def backward(operands, starts, states, dy, dhT, *, dt_softplus):
  """See `attention.kernels.scan`."""
  call = _Launch(operands, starts, dt_softplus, backward=True)
  spec = call.spec
  call.inputs |= {
      'dy': (dy, call.series(dy.dtype)[1]),
      'dhT': (call.turned(dhT), call.state()[1]),
      'states': (states, call.boundaries()[1])}
  outputs = {'dx': call.series(operands.x.dtype),
             'ddt': call.series(operands.dt.dtype)}
  scratch = {'dh': (spec.M, spec.lanes), 'd': call.tiles, 'u': call.tiles,
             'ds': call.tiles, 'du': call.tiles, 'dd': call.tiles,
             'part': call.parts, 'part2': call.parts,
             'all': (spec.chunk + 1, len(spec.streams()), spec.M, LANES)}
  if operands.z is not None:
    outputs['dz'] = call.series(operands.z.dtype)
    scratch['s'] = call.tiles
  outputs |= {'dB': call.columns(), 'dC': call.columns(), 'dA': call.state(),
              'dD': call.state(SUBLANES), 'ddt_bias': call.state(SUBLANES),
              'dh0': call.state()}
  results = dict(zip(outputs, call.run(
      tpu_kernels.backward, outputs, scratch, name='scan_backward',
      operations=20)))
  (E, M), T = operands.A.shape, operands.x.shape[1]
  dB, dC = (results[name].sum(1)[:, :M, :T].swapaxes(1, 2)
            for name in ('dB', 'dC'))
  dD, ddt_bias = (
      results[name].sum((0, 1))[:E] for name in ('dD', 'ddt_bias'))
  return scan.Operands(
      results['dx'], results['ddt'], results['dA'].sum(0)[:M, :E].T, dB, dC,
      dD, results.get('dz'), None if operands.dt_bias is None else ddt_bias,
      results['dh0'][:, :M, :E].swapaxes(1, 2))


class _Launch:
  """One kernel launch: layouts, block specs and grid."""

  def __init__(self, operands, starts, dt_softplus, *, backward=False):
    x, dt, A, B, C, D, z, dt_bias, h0 = operands
    self.B, T, E = x.shape
    M = _round_up(A.shape[1], SUBLANES)
    lanes = min(_STATES // M // LANES * LANES, _round_up(E, LANES))
    rows = next(r for r in (4, 2, 1)
                if self.B % r == 0 and r * lanes * M <= max(_STATES, lanes * M))
    chunk = min(LANES, _round_up(T, STEPS))
    self.spec = tpu_kernels.Spec(
        rows, chunk, lanes, T, E, M, dt_softplus, (), (), ())
    self.reverse = backward
    self.grid = self.B // rows, pl.cdiv(E, lanes), pl.cdiv(T, chunk)
    self.E, self.T = self.grid[1] * lanes, self.grid[2] * chunk
    self.tiles = rows, chunk // SUBLANES, SUBLANES, lanes
    self.parts = rows * lanes // LANES * STEPS * SUBLANES, LANES
    channels = lambda x: jnp.zeros((1, self.E)).at[0, :E].set(
        0.0 if x is None else x.astype(jnp.float32))
    row = pl.BlockSpec((1, lanes), lambda b, e, t: (0, e))
    self.inputs = {
        'x': (x, self.series(x.dtype)[1]),
        'dt': (dt, self.series(dt.dtype)[1]),
        'A': (_padded(A.astype(jnp.float32).T * LOG2E, (M, self.E)),
              pl.BlockSpec((M, lanes), lambda b, e, t: (0, e))),
        'B': self._columns(B), 'C': self._columns(C),
        'D': (channels(D), row), 'dt_bias': (channels(dt_bias), row)}
    if z is not None:
      self.inputs['z'] = z, self.series(z.dtype)[1]
    if not backward:
      self.inputs['h0'] = self.turned(h0), self.state()[1]
    if starts is not None:
      starts = _padded(starts.astype(jnp.int32), (self.B, self.T))
      self.inputs['starts'] = (
          starts.reshape(self.B, self.grid[2], 1, chunk),
          pl.BlockSpec((rows, None, 1, chunk),
                       lambda b, e, t: (b, self._chunk(t), 0, 0),
                       memory_space=pltpu.SMEM))

  def _chunk(self, t):
    return self.grid[2] - 1 - t if self.reverse else t

  def series(self, dtype):
    """Shape and block of an array laid out as x."""
    spec = self.spec
    return jax.ShapeDtypeStruct((self.B, spec.T, spec.E), dtype), pl.BlockSpec(
        (spec.rows, spec.chunk, spec.lanes),
        lambda b, e, t: (b, self._chunk(t), e))

  def state(self, states=None):
    """Of an array [B,M,E], kept while time passes."""
    spec = self.spec
    states = states or spec.M
    return (jax.ShapeDtypeStruct((self.B, states, self.E), jnp.float32),
            pl.BlockSpec((spec.rows, states, spec.lanes),
                         lambda b, e, t: (b, 0, e)))

  def boundaries(self):
    """Of the states [B,chunks,M,E] before each chunk."""
    spec = self.spec
    shape = self.B, self.grid[2], spec.M, self.E
    return jax.ShapeDtypeStruct(shape, jnp.float32), pl.BlockSpec(
        (spec.rows, None, spec.M, spec.lanes),
        lambda b, e, t: (b, self._chunk(t), 0, e))

  def columns(self):
    """Of the gradients [B,blocks of channels,M,T] of B and C."""
    spec = self.spec
    shape = self.B, self.grid[1], spec.M, self.grid[2] * LANES
    return jax.ShapeDtypeStruct(shape, jnp.float32), pl.BlockSpec(
        (spec.rows, None, spec.M, LANES),
        lambda b, e, t: (b, e, 0, self._chunk(t)))

  def _columns(self, x):
    """B or C [B,T,M] -> ([B,M,T], its block)."""
    spec = self.spec
    x = _padded(x.astype(jnp.float32).swapaxes(1, 2),
                (self.B, spec.M, self.grid[2] * LANES))
    return x, pl.BlockSpec((spec.rows, spec.M, LANES),
                           lambda b, e, t: (b, 0, self._chunk(t)))

  def turned(self, h):
    """[B,E,M] -> [B,M,E]."""
    return _padded(h.astype(jnp.float32).swapaxes(1, 2),
                   (self.B, self.spec.M, self.E))

  def run(self, kernel, outputs, scratch, *, name, operations):
    """Launches a kernel.

    Args:
      kernel: of the refs of inputs, outputs and scratch.
      outputs: {name: (shape, block)}.
      scratch: {name: shape}. A state has one for each row.
      name: of the kernel.
      operations: floating point operations per step, channel and state.
    """
    spec = self.spec._replace(
        inputs=tuple(self.inputs), outputs=tuple(outputs),
        scratch=tuple(scratch))
    inputs, in_specs = zip(*self.inputs.values())
    shapes, out_specs = zip(*outputs.values())
    scratch = [
        pltpu.VMEM(shape if len(shape) > 2 or shape == self.parts
                   else (spec.rows, *shape), jnp.float32)
        for shape in scratch.values()]
    size = self.B * self.T * self.E * spec.M
    return pl.pallas_call(
        functools.partial(kernel, spec=spec),
        grid=self.grid, in_specs=in_specs, out_specs=out_specs,
        out_shape=shapes, scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary'),
            disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(
            flops=operations * size, transcendentals=size,
            bytes_accessed=sum(
                x.size * x.dtype.itemsize for x in (*inputs, *shapes))),
        name=name,
    )(*inputs)


def _padded(x, shape):
  """Pads the ends of the axes with zeros."""
  return jnp.pad(x, [(0, to - size) for to, size in zip(shape, x.shape)])


def _round_up(x, multiple):
  return -(-x // multiple) * multiple
