"""How the TPU kernels of chunked linear attention cut and lay out their work.

A program of the grid is one key head of one row of the batch, with some of its
query heads; it takes the sequence in blocks, in order. A block is a few chunks.
"""

import math
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.kernels.tpu_tiles import pad, padded_width, round_up

# Steps of a chunk: where the products within it and those with the state cost
# the least together for the usual widths.
CHUNK = 128

# Query rows of a program in a block, all heads together, of 128 bfloat16; fewer
# of wider ones. A body is unrolled over them: more hide more latency and save
# fewer states, fewer make a shorter program.
_ROWS = 1024

LOG2E = math.log2(math.e)

# Rows of a table of pieces, see `_pieces`.
_START, _STOP = 0, 1


class Spec(NamedTuple):
  """What a kernel is specialised to."""
  T: int
  chunk: int  # C
  chunks: int  # in a block
  blocks: int
  eps: float | None

  @property
  def steps(self):
    return self.chunk * self.chunks


def query_heads(group, rows):
  """Query heads of a program: the most that fit and divide N/K."""
  most = max(rows // CHUNK, 1)
  return max(n for n in range(1, most + 1) if group % n == 0)


def query_rows(q, v):
  """Query rows of a program in a block."""
  width = max(round_up(x.shape[-1], 128) for x in (q, v))
  return _ROWS * 128 // width * 2 // q.dtype.itemsize


def specification(T, rows, heads, eps):
  """Returns the Spec for T steps, in whole tiles of bfloat16.

  Args:
    T: steps.
    rows: of `query_rows`.
    heads: query heads of a program.
    eps: of the normaliser, or None.
  """
  if T <= CHUNK:
    return Spec(T, round_up(T, 16), 1, 1, eps)
  chunks = min(max(rows // (heads * CHUNK), 1), pl.cdiv(T, CHUNK))
  return Spec(T, CHUNK, chunks, pl.cdiv(T, CHUNK * chunks), eps)


def walk(spec, table, visit, *, reverse=False):
  """Visits the pieces of this grid step's block, in order or in reverse.

  A piece is a run of steps of one document: of a block without a document's
  start, the whole, unless the sequence ends in it.

  Args:
    spec: Spec.
    table: ref of the block's part of `_pieces`, or None without documents.
    visit: called with the piece, (start, stop) or None for the whole block,
      and whether a document starts with it (None: certainly not).
    reverse: whether blocks and pieces are visited from the last.
  """
  block = pl.program_id(2)
  if reverse:
    block = spec.blocks - 1 - block
  if table is None:
    tail = spec.T % spec.steps
    if spec.blocks == 1 or not tail:
      visit((0, tail) if tail else None, None)
      return
    last = block == spec.blocks - 1
    pl.when(last)(lambda: visit((0, tail), None))
    pl.when(~last)(lambda: visit(None, None))
    return

  whole = table[_STOP, 0] == spec.steps
  valid = jnp.minimum(spec.T - block * spec.steps, spec.steps)

  def forth(start):
    stop = table[_STOP, start]
    visit((start, stop), table[_START, start] >= 0)
    return stop

  def back(stop):
    first = table[_START, stop - 1]
    start = jnp.maximum(first, 0)
    visit((start, stop), first >= 0)
    return start

  if spec.steps <= spec.T:
    pl.when(whole)(lambda: visit(None, table[_START, 0] >= 0))

  @pl.when(~whole)
  def _():
    if reverse:
      jax.lax.while_loop(lambda stop: stop > 0, back, valid)
    else:
      jax.lax.while_loop(lambda start: start < valid, forth, jnp.int32(0))


def _pieces(starts, spec):
  """Where the piece of each step starts and stops, [B,blocks,2,steps].

  Counted from the block's first step; a start of -1 is in an earlier block.
  """
  T, steps = spec.T, spec.steps
  starts = jnp.pad(starts, ((0, 0), (0, spec.blocks * steps - T)))
  starts = starts.reshape(-1, spec.blocks, steps)
  step = jnp.arange(steps, dtype=jnp.int32)
  first = jax.lax.cummax(jnp.where(starts, step, -1), axis=2)
  valid = jnp.minimum(T - jnp.arange(spec.blocks) * steps, steps)
  valid = jnp.broadcast_to(valid[:, None], starts.shape).astype(jnp.int32)
  later = jnp.where(starts, step, valid)[..., 1:]
  later = jnp.concatenate([later, valid[..., :1]], axis=2)
  stop = jax.lax.cummin(later, axis=2, reverse=True)
  return jnp.stack([first, stop], axis=2)


class Launch:
  """One kernel launch: layouts, block specs and grid.

  The P programs of a row of the batch are the K key heads, each several times
  if it has more query heads than one program takes: k, v and the states are
  read where they lie, the gradients of a head's programs are to be added up.

  A method returns an array as the kernel sees it, or the shape of an output,
  with the spec of its blocks; None for an array that is None.
  """

  def __init__(self, operands, rule, *, reverse):
    self.B, T, N, H = operands.q.shape
    self.K, V = operands.v.shape[2:]
    rows = query_rows(operands.q, operands.v)
    self.G = query_heads(N // self.K, rows)
    self.P = N // self.G
    self.H, self.V = padded_width(H), padded_width(V)
    self.spec = specification(T, rows, self.G, rule.normalize)
    self.starts = operands.starts
    self.reverse = reverse

  def _spec(self, shape, index, **kwargs):
    """A block chosen by batch, program, key head and block of steps."""
    def index_map(b, p, i):
      if self.reverse:
        i = self.spec.blocks - 1 - i
      head = jax.lax.div(p, jnp.int32(self.P // self.K))
      return index(b, p, head, i)
    return pl.BlockSpec(shape, index_map, **kwargs)

  def pieces(self):
    if self.starts is None:
      return None
    return _pieces(self.starts, self.spec), self._spec(
        (None, None, 2, self.spec.steps), lambda b, p, h, i: (b, i, 0, 0),
        memory_space=pltpu.SMEM)

  def queries(self, x):
    """[B,T,N,H] -> [B,P,G,T,H]."""
    x = jnp.swapaxes(pad(x, 3, padded_width(x.shape[3])), 1, 2)
    x = x.reshape(self.B, self.P, self.G, *x.shape[2:])
    return x, self.out_queries(x.shape[4], x.dtype)[1]

  def keys(self, x):
    """[B,T,K,H] -> [B,K,T,H]."""
    x = jnp.swapaxes(pad(x, 3, padded_width(x.shape[3])), 1, 2)
    return x, self._spec((None, None, self.spec.steps, x.shape[3]),
                         lambda b, p, h, i: (b, h, i, 0))

  def decays(self, x):
    """[B,T,K] -> [B,K,1,steps], to base 2."""
    if x is None:
      return None
    # A product has no room for 0 * inf; exp of this is 0 just the same.
    x = jnp.maximum(x.astype(jnp.float32), -1e30) * LOG2E
    x = pad(jnp.swapaxes(x, 1, 2), 2, self.spec.blocks * self.spec.steps)
    return x[:, :, None], self.out_decays(own=False)[1]

  def state(self, x, *, own=False):
    """[B,K,H,V], or [B,K,H] as a row; own: [B,P,...], one each program."""
    if x is None:
      return None
    x = pad(x.astype(jnp.float32), 2, self.H)
    x = x[:, :, None] if x.ndim == 3 else pad(x, 3, self.V)
    return x, self._spec((None, None, *x.shape[2:]),
                         lambda b, p, h, i: (b, p if own else h, 0, 0))

  def saved(self, x):
    return None if x is None else (x, self.out_saved(x.shape[3:])[1])

  def out_queries(self, width, dtype):
    shape = self.B, self.P, self.G, self.spec.T, width
    return jax.ShapeDtypeStruct(shape, dtype), self._spec(
        (None, None, self.G, self.spec.steps, width),
        lambda b, p, h, i: (b, p, 0, i, 0))

  def out_keys(self, width, dtype):
    shape = self.B, self.P, self.spec.T, width
    # Parts of a sum are not rounded.
    dtype = dtype if self.P == self.K else jnp.float32
    return jax.ShapeDtypeStruct(shape, dtype), self._spec(
        (None, None, self.spec.steps, width), lambda b, p, h, i: (b, p, i, 0))

  def out_decays(self, *, own=True):
    shape = self.B, self.P, 1, self.spec.blocks * self.spec.steps
    return jax.ShapeDtypeStruct(shape, jnp.float32), self._spec(
        (None, None, 1, self.spec.steps),
        lambda b, p, h, i: (b, p if own else h, 0, i))

  def out_state(self, shape):
    return jax.ShapeDtypeStruct((self.B, self.P, *shape), jnp.float32), (
        self._spec((None, None, *shape), lambda b, p, h, i: (b, p, 0, 0)))

  def out_saved(self, shape):
    """States before each block."""
    return jax.ShapeDtypeStruct(
        (self.B, self.P, self.spec.blocks, *shape), jnp.float32), self._spec(
            (None, None, None, *shape), lambda b, p, h, i: (b, p, i, 0, 0))

  def run(self, kernel, inputs, outputs, scratch, *, name, products):
    """Launches a kernel.

    Args:
      kernel: of a namespace of refs, by the names below, and the Spec. A ref
        that does not exist is None.
      inputs: {name: (array, spec) or None}; pieces are added.
      outputs: {name: (shape, spec) or None}.
      scratch: {name: shape in VMEM, float32, or None}.
      name: of the kernel.
      products: multiplications a step of one query head, of all its matmuls.

    Returns:
      {name: array or None} of the outputs.
    """
    inputs = {'pieces': self.pieces(), **inputs}
    names = [n for group in (inputs, outputs, scratch)
             for n, value in group.items() if value is not None]
    absent = dict.fromkeys(inputs | outputs | scratch)

    def body(*refs):
      kernel(types.SimpleNamespace(**absent | dict(zip(names, refs))),
             self.spec)

    arrays, in_specs = zip(*filter(None, inputs.values()))
    shapes, out_specs = zip(*filter(None, outputs.values()))
    steps = self.B * self.P * self.G * self.spec.T
    results = pl.pallas_call(
        body,
        grid=(self.B, self.P, self.spec.blocks),
        in_specs=in_specs, out_specs=out_specs, out_shape=shapes,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32)
                        for shape in scratch.values() if shape],
        compiler_params=pltpu.CompilerParams(dimension_semantics=(
            'parallel', 'parallel', 'arbitrary')),
        cost_estimate=pl.CostEstimate(
            flops=2 * steps * products, transcendentals=0,
            bytes_accessed=sum(
                x.size * x.dtype.itemsize for x in (*arrays, *shapes))),
        name=name,
    )(*arrays)
    written = [n for n, value in outputs.items() if value is not None]
    return dict.fromkeys(outputs) | dict(zip(written, results))

  def restore(self, x, width):
    """[B,P,G,T,H] -> [B,T,N,H]."""
    x = x.reshape(self.B, self.P * self.G, *x.shape[3:])
    return jnp.swapaxes(x[..., :width], 1, 2)

  def to_first(self, x):
    """[B,K,...] -> [B,P,...]: to the first of a head's programs, else 0."""
    if x is None or self.P == self.K:
      return x
    x = pad(x[:, :, None], 2, self.P // self.K)
    return x.reshape(self.B, self.P, *x.shape[3:])

  def of_heads(self, x, *, total):
    """[B,P,...] -> [B,K,...]: the sum of a head's programs, or any one."""
    if x is None or self.P == self.K:
      return x
    x = x.reshape(self.B, self.K, -1, *x.shape[2:])
    return x.sum(2) if total else x[:, :, 0]
