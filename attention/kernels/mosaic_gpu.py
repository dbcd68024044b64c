"""The words that the Mosaic GPU kernels of every op are written in.

A kernel is kernel(gmem, smem, plan): its references in global and in shared
memory, by name and None where a call has none, and what it is compiled for.
`launch` runs it.

Copies are asynchronous, and no word here both starts one and waits: `copy_in`
and `copy_out` start, `wait`, `wait_read` and `wait_written` wait.

Arrays in registers have layouts. TILE is that of wgmma's sums; vectors with a
value for each of a tile's rows, or columns, are PER_ROW, or PER_COLUMN.
"""

import math
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
LN2 = math.log(2)
ROWS = 64  # of a warpgroup's product
TILE = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = TILE.reduce(1), TILE.reduce(0)


def launch(kernel, plan, *, name, grid, operands, outputs, scratch,
           warpgroups=1, automatic_barriers=True):
  """Runs a kernel on operands, outputs and scratch memory that have names.

  Args:
    kernel: kernel(gmem, smem, plan); gmem has operands and outputs, smem the
      scratch memory.
    plan: what it is compiled for, beside the shapes of its operands.
    name: of the kernel, in profiles.
    grid: {axis: size}, the last one varies fastest.
    operands: {name: array or None}.
    outputs: {name: ShapeDtypeStruct or None}.
    scratch: {name: type of a reference or None}.
    warpgroups: of a thread block, axis 'warpgroup'.
    automatic_barriers: whether the compiler puts a barrier of a warpgroup's
      threads around their accesses of shared memory.

  Returns:
    {name: array or None} of the outputs.
  """
  present = lambda named: {
      name: x for name, x in named.items() if x is not None}

  def body(*refs, **buffers):
    names = *present(operands), *present(outputs)
    arrays = dict(zip(names, refs, strict=True))
    gmem = dict.fromkeys((*operands, *outputs)) | arrays
    smem = dict.fromkeys(scratch) | buffers
    kernel(types.SimpleNamespace(**gmem), types.SimpleNamespace(**smem), plan)

  results = plgpu.kernel(
      body, out_type=list(present(outputs).values()),
      scratch_types=present(scratch),
      grid=tuple(grid.values()), grid_names=tuple(grid),
      num_threads=warpgroups, thread_name='warpgroup', kernel_name=name,
      compiler_params=plgpu.CompilerParams(
          approx_math=True,
          # jax 0.11 made Warpgroup the default, which searches for layouts and
          # gives up on these kernels. They name theirs.
          lowering_semantics=plgpu.LoweringSemantics.Lane,
          unsafe_no_auto_barriers=not automatic_barriers))(
              *present(operands).values())
  return dict.fromkeys(outputs) | dict(
      zip(present(outputs), results, strict=True))


def pad(x, *, axis, multiple=8, mode='constant'):
  """Fills an axis up to a multiple, by default with zeros.

  TMA cuts arrays in tiles of 8 rows, and its rows are multiples of 16 bytes.
  Longer ends need no padding: copies run over them, read zeros and drop what
  they write there.
  """
  missing = -x.shape[axis] % multiple
  if not missing:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, missing)
  return jnp.pad(x, widths, mode)


def output(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def like(x):
  """The output that has the shape and dtype of an array."""
  return output(*x.shape, dtype=x.dtype)


def buffer(*shape, dtype=jnp.float32):
  """Shared memory for vectors."""
  return plgpu.SMEM(shape, dtype)


def tile(*shape, dtype, cut=None):
  """Shared memory for tiles, as TMA writes and wgmma reads them.

  Threads that read it meet no bank conflicts either.

  Args:
    *shape: (.., rows, width).
    dtype: of the tiles.
    cut: divides the widths of the arrays that they are cut from, None: their
      own. wgmma wants both of its operands in the same swizzle.
  """
  size = jnp.dtype(dtype).itemsize
  lanes = math.gcd(cut or shape[-1], 128 // size)
  return plgpu.SMEM(shape, dtype, transforms=(
      plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(lanes * size)))


def barrier(arrivals, number=1):
  """So many barriers, each of which waits for so many copies or warpgroups."""
  return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)


def optional(ref, index, buffer):
  """What to copy of an operand: nothing where a call has no such operand."""
  return [] if ref is None else [(ref.at[index], buffer)]


def copy_in(copies, ready):
  """Starts copies into shared memory, each of which arrives at a barrier.

  Args:
    copies: pairs of a source and a buffer.
    ready: the barrier, to wait for before the buffers are read.
  """
  for source, destination in copies:
    plgpu.copy_gmem_to_smem(source, destination, ready)


def arrive(barrier):
  plgpu.barrier_arrive(barrier)


def wait(barrier):
  """Waits until all that a barrier expects has arrived."""
  plgpu.barrier_wait(barrier)


def copy_out(copies):
  """Makes what threads wrote visible, and starts copies of it out.

  Args:
    copies: pairs of a buffer and a target.
  """
  plgpu.commit_smem()
  for source, target in copies:
    plgpu.copy_smem_to_gmem(source, target)


def wait_read():
  """Waits until all buffers on their way out may be written again."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def wait_written():
  """Waits until all copies out have ended."""
  plgpu.wait_smem_to_gmem(0)


def load(ref, layout=TILE):
  """Shared memory to registers; what has bank conflicts does not compile."""
  return plgpu.layout_cast(ref[...], layout)


def filled(shape, value, layout=TILE):
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def by_row(x, shape, layout=TILE):
  """A value per row, broadcast over a tile of that shape and layout."""
  return _broadcast(x, shape, layout, axis=0)


def by_column(x, shape, layout=TILE):
  """A value per column, broadcast over a tile of that shape and layout."""
  return _broadcast(x, shape, layout, axis=1)


def _broadcast(x, shape, layout, *, axis):
  x = plgpu.layout_cast(x, layout.reduce(1 - axis))
  return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [axis]), layout)


def transposed(ref):
  return ref.transpose((1, 0))


def product(a, b):
  """a b in float32: a in registers or shared memory, b in shared memory."""
  return products((a, b))[0]


def products(*pairs):
  """The product of each pair, queued together."""
  def multiply(*sums):
    for total, (a, b) in zip(sums, pairs, strict=True):
      plgpu.wgmma(total, a, b)
    return [total[...] for total in sums]

  return pl.run_scoped(
      multiply, *(plgpu.ACC((a.shape[0], b.shape[1])) for a, b in pairs))
