"""How each implementation is run on this machine.

Natively, or interpreted as if for a chip, with its work cut so small that few
tokens make several blocks.
"""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp

from attention.kernels import dispatch
from attention.kernels.chunked.tpu import blocks as chunked_blocks
from attention.kernels.flash import xla
from attention.kernels.flash.tpu import blocks as flash_blocks
from attention.kernels.scan.gpu import states
from attention.kernels.scan.tpu import blocks as scan_blocks
from attention.kernels.scores import xla as scores_xla_module
from tests.kernels import accelerators, ops
from tests.kernels.ops import Chunked, Flash, Scan, Scores

# Those that do not take float32.
DTYPES = {(Flash, 'gpu'): jnp.bfloat16, (Chunked, 'gpu'): jnp.bfloat16}


def dtype(row, implementation):
  """What the row's operands are given in."""
  return row.dtype or DTYPES.get((type(row), implementation), jnp.float32)


def flash_sizes(*_, mxu_sums=False, **__):
  """All work in blocks of 128, two tiles of scores ahead."""
  return flash_blocks.Blocks(128, 128, 128, 128, 2, mxu_sums)


def even_parts(blocks, chunks, *, parts):
  """As even as states.number makes them."""
  return -(-chunks // -(-chunks // parts))


def _replace(module, name, function, **options):
  return mock.patch.object(
      module, name, functools.partial(function, **options))


def flash_tpu(most_keys=None, **options):
  yield _replace(flash_blocks, 'sizes', flash_sizes, **options)
  if most_keys:
    yield _replace(flash_blocks, 'most_keys', lambda *_: most_keys)


def flash_tiles():
  """Several tiles, with ragged ends."""
  yield mock.patch.multiple(
      xla, ROWS=96, COLUMNS=32, UNCUT_SCORES=0, DECODE_KEYS=32)


def scan_tpu(**options):
  """Short strips: they compile faster."""
  yield _replace(scan_blocks, 'sizes', scan_blocks.sizes,
                 **dict(strip=8) | options)


def scan_gpu(parts=1):
  yield _replace(states, 'number', even_parts, parts=parts)


def chunked_tpu(rows=256):
  """Chunks of 32; a block has two of two heads of float32."""
  yield _replace(chunked_blocks, 'sizes', chunked_blocks.sizes,
                 chunk=32, rows=rows)


def scores_xla():
  """Several blocks of queries, the last one not whole."""
  yield mock.patch.object(scores_xla_module, 'SCORES', 1500)


# What a row's `cut` are the options of.
CUTS = {(Flash, 'tpu'): flash_tpu, (Flash, 'tiles'): flash_tiles,
        (Scan, 'tpu'): scan_tpu, (Scan, 'gpu'): scan_gpu,
        (Chunked, 'tpu'): chunked_tpu, (Scores, 'xla'): scores_xla}


def function(row, implementation):
  """A function of the row's operands by name, to its outputs by name.

  One for all rows that differ in values and shapes alone: so it is compiled
  once for the tests of one shape, which is what takes their time.
  """
  cut = None if row.cut is None else tuple(row.cut.items())
  return _function(type(row), implementation, tuple(row.options.items()),
                   (row.chip, row.races, cut))


@functools.cache
def _function(kind, implementation, options, prepared):
  del prepared  # Traced anew, where it is prepared in another way.
  name = 'xla' if implementation == 'tiles' else implementation
  op = functools.partial(kind.op, implementation=name)
  return ops.function(kind, op, dict(options))


@functools.cache
def _with_gradients(function):
  return jax.jit(functools.partial(ops.run, function))


@contextlib.contextmanager
def prepared(row, implementation, capfd):
  """Has what is traced and run inside run as it does here.

  Fails the test on a race in an interpreted kernel.
  """
  with contextlib.ExitStack() as stack:
    cut = CUTS.get((type(row), implementation))
    if cut and row.cut is not None:
      for patch in cut(**row.cut):
        stack.enter_context(patch)
    if implementation == 'tpu':
      stack.enter_context(dispatch.pretend('tpu', row.chip))
      stack.enter_context(
          accelerators.tpu_interpreter(capfd, races=row.races))
    if implementation == 'gpu':
      stack.enter_context(dispatch.pretend('gpu', '9.0'))
      stack.enter_context(accelerators.gpu_interpreter())
    yield


def outputs(row, implementation, operands, capfd):
  """{name: value} of the outputs of an implementation."""
  with prepared(row, implementation, capfd):
    return jax.device_get(jax.jit(function(row, implementation))(**operands))


def results(row, implementation, operands, capfd):
  """Likewise, and of all gradients."""
  with prepared(row, implementation, capfd):
    return jax.device_get(_with_gradients(function(row, implementation))(
        operands, row.cotangents()))
