"""Selective scan for TPU, forward and backward, in Pallas (Mosaic TPU).

The state of 128 channels is [M, 128]: M / 8 vectors. A step multiplies it by
e^(d A), adds (d x) B and sums its product with C over the states. Everything
else is done for a whole chunk of time at once, before the steps (softplus, d x,
dy silu(z)) or after them (D x, the gate, slopes), in the same kernel: series
are read once and written once.

- d and d x lie in VMEM in float32; a load repeats a step's row over the states.
- B and C become vectors of equal lanes, [steps, M, 128], once for all channels
  of a chunk: repeat a row of 128 numbers, and turn it over. So blocks of
  channels are the innermost dimension of the grid; their states stay in VMEM.
- The sum over the states stops at 8 sublanes. They are stored 8 rows apart, so
  that those of 8 steps make 8 vectors whose sum has a step in each sublane.
  A sum within each vector would take three rotations and additions a step.
- Four groups of 128 channels (at M = 16) take 16 steps in turn, unrolled: eight
  vectors that do not wait for each other fill the vector unit. One group alone
  still runs at 60% of that, so that pieces of time side by side, which need
  more than twice the arithmetic, would never pay; with few channels two rows of
  the batch go together.
- Where a document starts, states are zeroed by selection, never by a product.
  Chunks without a start run a body without selections.

The forward kernel saves the state before each chunk. The backward kernel takes
chunks last first: it recomputes the states of a chunk into VMEM, then walks
back. Exponentials are computed again: to store them would cost more. dB and dC
are summed over channels in VMEM, in order, and over lanes at the end of a
chunk; dA, dD and ddt_bias over time in VMEM and over the batch outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.kernels import scan
from attention.kernels.scan import tpu_chunk, tpu_kernels
from attention.kernels.scan.tpu_chunk import LANES, LOG2E, SUBLANES
from attention.kernels.tpu_tiles import round_up

# Steps that are unrolled: the rows of a tile of bfloat16, too.
_PIECE = 16

# Channels times states of a block: eight vectors of state. With those of A and
# dA they leave half of the 64 registers to what a step computes.
_STATES = 8192

# Channels times states, of which the backward kernel keeps two float32 arrays.
_MOST_STATES = 1 << 19


def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  del rule
  for name in ('x', 'dt', 'z'):
    array = getattr(operands, name)
    if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
      raise NotImplementedError(
          f'{name} of dtype {array.dtype}: the TPU kernels take bfloat16 and '
          'float32')
  E, M = operands.A.shape
  if M > 64:
    raise NotImplementedError(
        f'M ({M}): the TPU kernels take up to 64 states')
  if E * M > _MOST_STATES:
    raise NotImplementedError(
        f'E ({E}) x M ({M}): the TPU kernels keep up to {_MOST_STATES} states '
        'in VMEM: shard the channels')


def forward(operands, rule):
  """See `attention.kernels.scan`."""
  call = _Launch(operands, rule)
  y, hT, states = call.run(
      tpu_kernels.forward,
      {'y': call.series(operands.x.dtype), 'hT': call.end(),
       'states': call.boundaries()},
      {'h': call.each_block(), **call.spread, 'd': call.tiles,
       'u': call.tiles, 's': call.tiles, 'part': call.parts},
      name='scan_forward', operations=6)
  E, M = operands.A.shape
  return (y, hT[:, :M, :E].swapaxes(1, 2)), states


def backward(operands, rule, states, cotangents):
  """See `attention.kernels.scan`."""
  dy, dhT = cotangents
  call = _Launch(operands, rule, reverse=True)
  spec = call.spec
  call.inputs |= {
      'dy': (dy, call.series(dy.dtype)[1]), 'dhT': call.start(dhT),
      'states': (states, call.boundaries()[1])}
  outputs = {'dx': call.series(operands.x.dtype),
             'ddt': call.series(operands.dt.dtype)}
  scratch = {
      'sum_h': call.each_block(), 'sum_A': call.each_block(),
      'sum_D': call.each_block(SUBLANES),
      'sum_dt_bias': call.each_block(SUBLANES), **call.spread,
      'sum_B': call.spread['each_B'], 'sum_C': call.spread['each_C'],
      'd': call.tiles, 'u': call.tiles, 'ds': call.tiles, 'du': call.tiles,
      'dd': call.tiles, 'part': call.parts, 'part_A': call.parts,
      'all': (spec.chunk + 1, len(spec.streams), spec.M, LANES)}
  if operands.z is not None:
    outputs['dz'] = call.series(operands.z.dtype)
    scratch['s'] = call.tiles
  outputs |= {
      'dB': call.shared(), 'dC': call.shared(), 'dA': call.end(),
      'dD': call.end(SUBLANES), 'ddt_bias': call.end(SUBLANES),
      'dh0': call.end()}
  results = dict(zip(outputs, call.run(
      tpu_kernels.backward, outputs, scratch, name='scan_backward',
      operations=20)))
  E, M = operands.A.shape
  dB, dC = (call.together(results[name])[:, :, :M] for name in ('dB', 'dC'))
  dD, ddt_bias = (
      results[name].sum((0, 1))[:E] for name in ('dD', 'ddt_bias'))
  return scan.Operands(
      results['dx'], results['ddt'], results['dA'].sum(0)[:M, :E].T, dB, dC,
      dD, results.get('dz'), None if operands.dt_bias is None else ddt_bias,
      results['dh0'][:, :M, :E].swapaxes(1, 2), None)


class _Launch:
  """One kernel launch: layouts, block specs and grid.

  The grid is (rows of the batch, parts of the channels, chunks, blocks of
  channels). Blocks of channels come innermost, so that they share the chunk's
  B and C; their states stay in VMEM.
  """

  def __init__(self, operands, rule, *, reverse=False):
    x, dt, A, B, C, D, z, dt_bias, h0, starts = operands
    self.B, T, E = x.shape
    M = round_up(A.shape[1], SUBLANES)
    if LANES % M:
      M = 64
    lanes = min(_STATES // M // LANES * LANES, round_up(E, LANES))
    # Few channels: two rows of the batch at a time.
    rows = 2 if self.B % 2 == 0 and 2 * lanes * M <= _STATES else 1
    chunk = min(LANES if M < 64 and rows == 1 else LANES // 2,
                round_up(T, _PIECE))
    self.spec = tpu_chunk.Spec(
        rows, chunk, _PIECE, lanes, T, E, M, rule.dt_softplus)
    self.reverse = reverse
    blocks, chunks = pl.cdiv(E, lanes), pl.cdiv(T, chunk)
    # Two parts where two cores would not find two rows.
    parts = 2 if self.B // rows % 2 and blocks % 2 == 0 else 1
    self.grid = self.B // rows, parts, chunks, blocks // parts
    self.T, self.E = chunks * chunk, blocks * lanes
    self.tiles = rows, chunk // SUBLANES, SUBLANES, lanes
    self.parts = (
        len(self.spec.streams) * _PIECE * SUBLANES, LANES)
    # B and C as rows of 128 numbers, eight at a time.
    self.eights = pl.cdiv(chunk * M, SUBLANES * LANES)
    each = rows, self.eights * SUBLANES * LANES // M, M, LANES
    self.spread = {'each_B': each, 'each_C': each}
    self.inputs = {
        'x': (x, self.series(x.dtype)[1]),
        'dt': (dt, self.series(dt.dtype)[1]),
        'A': self._channels(A.astype(jnp.float32).T * LOG2E, M),
        'B': self._shared(B), 'C': self._shared(C),
        'D': self._channels(D[None], 1),
        'dt_bias': self._channels(
            jnp.zeros((1, E)) if dt_bias is None else dt_bias[None], 1)}
    if z is not None:
      self.inputs['z'] = z, self.series(z.dtype)[1]
    if not reverse:
      self.inputs['h0'] = self.start(h0)
    if starts is not None:
      starts = _padded(starts.astype(jnp.int32), (self.B, self.T))
      starts = starts.reshape(self.B, chunks, 1, chunk)
      # Behind a chunk's starts stands their number.
      starts = jnp.append(starts, starts.sum(3, keepdims=True), axis=3)
      self.inputs['starts'] = starts, self._block(
          (rows, None, 1, chunk + 1), lambda b, p, t, e: (b, t, 0, 0),
          memory_space=pltpu.SMEM)

  def _block(self, shape, index, **kwargs):
    """A block chosen by rows, part, chunk and block of all channels."""
    chunks, blocks = self.grid[2:]

    def index_map(b, p, t, e):
      return index(b, p, chunks - 1 - t if self.reverse else t, p * blocks + e)

    return pl.BlockSpec(shape, index_map, **kwargs)

  def series(self, dtype):
    """Shape and block of an array laid out as x."""
    spec = self.spec
    return (jax.ShapeDtypeStruct((self.B, spec.T, spec.E), dtype),
            self._block((spec.rows, spec.chunk, spec.lanes),
                        lambda b, p, t, e: (b, t, e)))

  def start(self, h):
    """[B,E,M] -> ([B,M,E], its block), which is needed with the first chunk."""
    spec, blocks = self.spec, self.grid[3]
    h = _padded(h.astype(jnp.float32).swapaxes(1, 2),
                (self.B, spec.M, self.E))
    return h, pl.BlockSpec(
        (spec.rows, spec.M, spec.lanes), lambda b, p, t, e: (
            b, 0, p * blocks + jnp.where(t == 0, e, blocks - 1)))

  def end(self, states=None):
    """Of an array [B,M,E] that is written with the last chunk."""
    spec, (*_, chunks, blocks) = self.spec, self.grid
    states = states or spec.M
    return (jax.ShapeDtypeStruct((self.B, states, self.E), jnp.float32),
            pl.BlockSpec(
                (spec.rows, states, spec.lanes), lambda b, p, t, e: (
                    b, 0, p * blocks + jnp.where(t == chunks - 1, e, 0))))

  def boundaries(self):
    """Of the states [B,chunks,M,E] before each chunk."""
    spec = self.spec
    shape = self.B, self.grid[2], spec.M, self.E
    return jax.ShapeDtypeStruct(shape, jnp.float32), self._block(
        (spec.rows, None, spec.M, spec.lanes), lambda b, p, t, e: (b, t, 0, e))

  def shared(self):
    """Of the gradients [B,parts,chunks,eights,8,128] of B and C."""
    spec = self.spec
    shape = self.B, *self.grid[1:3], self.eights, SUBLANES, LANES
    return jax.ShapeDtypeStruct(shape, jnp.float32), self._block(
        (spec.rows, None, None, *shape[3:]),
        lambda b, p, t, e: (b, p, t, 0, 0, 0))

  def _shared(self, x):
    """B or C [B,T,M] -> ([B,chunks,eights,8,128], its block)."""
    spec = self.spec
    x = _padded(x.astype(jnp.float32), (self.B, self.T, spec.M))
    x = x.reshape(self.B, self.grid[2], -1)
    x = _padded(x, (*x.shape[:2], self.eights * SUBLANES * LANES))
    x = x.reshape(*x.shape[:2], self.eights, SUBLANES, LANES)
    return x, self._block((spec.rows, None, *x.shape[2:]),
                          lambda b, p, t, e: (b, t, 0, 0, 0))

  def together(self, x):
    """`shared` as [B,T,M], summed over the parts."""
    spec = self.spec
    x = x.sum(1).reshape(self.B, self.grid[2], -1)
    x = x[:, :, :spec.chunk * spec.M].reshape(self.B, self.T, spec.M)
    return x[:, :spec.T]

  def _channels(self, x, rows):
    """[states,E] -> (the same in whole blocks, its block)."""
    return (_padded(x.astype(jnp.float32), (rows, self.E)),
            self._block((rows, self.spec.lanes), lambda b, p, t, e: (0, e)))

  def each_block(self, states=None):
    """Shape of states that stay in VMEM."""
    spec = self.spec
    return self.grid[3], spec.rows, states or spec.M, spec.lanes

  def run(self, kernel, outputs, scratch, *, name, operations):
    """Launches a kernel.

    Args:
      kernel: of the refs of inputs, outputs and scratch.
      outputs: {name: (shape, block)}.
      scratch: {name: shape}.
      name: of the kernel.
      operations: floating point operations per step, channel and state.
    """
    spec = self.spec._replace(refs=(*self.inputs, *outputs, *scratch))
    inputs, in_specs = zip(*self.inputs.values())
    shapes, out_specs = zip(*outputs.values())
    size = self.B * self.T * self.E * spec.M
    return pl.pallas_call(
        functools.partial(kernel, spec=spec),
        grid=self.grid, in_specs=in_specs, out_specs=out_specs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM(x, jnp.float32) for x in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                'parallel', 'parallel', 'arbitrary', 'arbitrary'),
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
