"""The dialect of all TPU kernels, in Pallas (Mosaic TPU).

An implementation is a package `tpu` in the op's folder, of the same files in
every op:

  __init__.py         check, forward, backward: see `attention.kernels.contract`
  launch.py           the refs of the kernels by name, in a glossary; Plan, what
                      a kernel is specialised to; Launch, which lays arrays out
                      and cuts them into blocks
  forward_kernel.py   kernel(ref, plan)
  backward_kernel.py  likewise
  blocks.py           how work is cut: Blocks, and `sizes`, which chooses them
  chunk.py            what both kernels do with a chunk

A kernel gets its refs in a namespace, None for an array that the call lacks.
Logarithms are to base 2, as in the hardware.
"""

import math
import types
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.kernels import dispatch

LANES, SUBLANES = 128, 8  # of a vector of float32
LOG2E = math.log2(math.e)

# Contractions of `dot`, by the dimensions they sum over: a b, a b^T, a^T b.
NN, NT, TN = (1, 0), (1, 1), (0, 0)


class Chip(NamedTuple):
  """A generation: its smallest topology, and a core's VMEM in bytes."""
  topology: str
  vmem: int


CHIPS = {
    'v4': Chip('v4:2x2x1', 16 << 20),
    'v5e': Chip('v5e:2x2', 128 << 20),
    'v5p': Chip('v5p:2x2x1', 64 << 20),
    'v6e': Chip('v6e:2x2', 128 << 20),
    '7x': Chip('tpu7x:2x2x1', 64 << 20),
}


def vmem_bytes():
  """Returns the bytes of VMEM of a core: the least of all where unknown."""
  chip = CHIPS.get(dispatch.target().chip)
  return chip.vmem if chip else min(chip.vmem for chip in CHIPS.values())


def check_dtypes(**arrays):
  """Raises NotImplementedError for an array that no kernel takes."""
  for name, array in arrays.items():
    if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
      raise NotImplementedError(
          f'{name} of dtype {array.dtype}: the TPU kernels take bfloat16 and '
          'float32')


def check_widths(H, V):
  """Raises NotImplementedError for heads that are too wide for a tile."""
  if max(H, V) > 256:
    raise NotImplementedError(
        f'H ({H}) and V ({V}): the TPU kernels take widths up to 256')


def round_up(x, multiple):
  return -(-x // multiple) * multiple


def padded_width(width):
  """H or V in a kernel: whole sublanes of bfloat16 when transposed."""
  return round_up(width, 16)


def pad(x, *sizes):
  """Pads the ends of the last axes with zeros, to these sizes."""
  kept = x.shape[:x.ndim - len(sizes)]
  return jnp.pad(x, [
      (0, to - size) for size, to in zip(x.shape, (*kept, *sizes))])


def dot(a, b, contract):
  """Matmul over one dimension of each, exact products, float32 sums."""
  exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
      a, b, (((contract[0],), (contract[1],)), ((), ())), precision=exact,
      preferred_element_type=jnp.float32)


def copy(*pairs):
  """Copies refs, given as (from, to), where there is one to copy to."""
  for source, target in pairs:
    if target is not None:
      target[...] = source[...]


def pipeline(items, stages, *, distance=1):
  """Takes items through stages, in order: an unrolled software pipeline.

  Args:
    items: a list.
    stages: functions of an item and of what the stage before returned for it, a
      tuple or None.
    distance: how many items a stage is behind the stage before: while one
      waits for its products, the matrix unit has those of the others.
  """
  results = [()] * len(items)
  for turn in range(len(items) + distance * (len(stages) - 1)):
    for n, stage in reversed(list(enumerate(stages))):
      at = turn - n * distance
      if 0 <= at < len(items):
        results[at] = stage(items[at], *(results[at] or ()))


class Layout(NamedTuple):
  """The shape of an array in a kernel's launch, and how it is cut."""
  shape: tuple
  spec: pl.BlockSpec

  def of(self, x):
    """An operand, its ends padded with zeros; None for None."""
    return None if x is None else (pad(x, *self.shape), self.spec)

  def out(self, dtype=jnp.float32):
    """An output."""
    return jax.ShapeDtypeStruct(self.shape, dtype), self.spec


class Launch:
  """One launch of a kernel; an op's own lays out its arrays.

  Attributes:
    plan: what the kernel is specialised to.
    grid: its sizes. The cores of a chip share the first two dimensions; the
      others run in order.
    axes: {name: (size, block)} of what is cut. Block None is a block of one,
      whose axis the kernel does not see.
    prefetch: {name: array}, in scalar memory before the first block is fetched.
    bounds_checks: whether copies are checked.
    vmem: bytes that the kernel may use, None for the compiler's choice.
  """
  prefetch: Mapping = types.MappingProxyType({})
  bounds_checks = True
  vmem = None

  def place(self, *indices):
    """Where a program is: {name of axis: number of its block}.

    Args:
      indices: of the grid, then the prefetched refs.
    """
    raise NotImplementedError

  def layout(self, *axes, place=None, memory_space=None):
    """Returns the Layout of an array.

    Args:
      axes: names of axes that are cut, and sizes of those that are not.
      place: a function like the method, None for that.
      memory_space: None for VMEM.
    """
    place = place or self.place
    shape, block = zip(*(self.axes.get(axis, (axis, axis)) for axis in axes))

    def index_map(*indices):
      numbers = place(*indices)
      return tuple(numbers.get(axis, 0) for axis in axes)

    return Layout(
        shape, pl.BlockSpec(block, index_map, memory_space=memory_space))

  def run(self, kernel, *, name, operands, outputs, scratch, flops,
          transcendentals):
    """Runs a kernel on operands, outputs and scratch memory that have names.

    Args:
      kernel: kernel(ref, plan); ref has the refs by the names below.
      name: of the kernel, in profiles.
      operands: {name: `Layout.of` or None}.
      outputs: {name: `Layout.out` or None}.
      scratch: {name: shape in VMEM, float32, or None}.
      flops: of all its programs.
      transcendentals: likewise.

    Returns:
      A namespace of the outputs, None for what is None.
    """
    refs = {**self.prefetch, **operands, **outputs, **scratch}
    plan = self.plan

    def body(*args):
      kernel(types.SimpleNamespace(**_by_name(refs, args)), plan)

    arrays, in_specs = zip(*_present(operands))
    shapes, out_specs = zip(*_present(outputs))
    results = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(self.prefetch), grid=self.grid,
            in_specs=in_specs, out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM(shape, jnp.float32) for shape in _present(scratch)]),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                *['parallel'] * 2, *['arbitrary'] * (len(self.grid) - 2)),
            vmem_limit_bytes=self.vmem,
            disable_bounds_checks=not self.bounds_checks),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=transcendentals,
            bytes_accessed=sum(
                x.size * x.dtype.itemsize for x in (*arrays, *shapes))),
        name=name,
    )(*self.prefetch.values(), *arrays)
    return types.SimpleNamespace(**_by_name(outputs, results))


def _present(named):
  return [value for value in named.values() if value is not None]


def _by_name(named, values):
  """The names of what is not None with values, the others with None."""
  present = [name for name, value in named.items() if value is not None]
  return dict.fromkeys(named) | dict(zip(present, values, strict=True))
