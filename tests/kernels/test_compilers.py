"""Every op compiled: for this machine, and for chips that are not there.

The compilers are the real ones: libtpu and the CUDA plugin build for devices
that are only described. No array of a program may be as large as all scores,
or as the states of all steps.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attention.kernels import dispatch
from attention.kernels.flash import cudnn
from attention.kernels.mosaic_tpu import CHIPS, padded_width, round_up
from tests.kernels import accelerators, ops
from tests.kernels.measure import largest_buffer
from tests.kernels.ops import Chunked, Flash, Scan

AXES = {'B': 'data', 'N': 'tensor', 'K': 'tensor', 'E': 'tensor'}
IDS = dict(q_ids=jnp.int32, kv_ids=jnp.int32, q_offset=jnp.int32, starts=bool)

class Target(NamedTuple):
  implementation: str
  chip: str
  devices: Callable  # () -> devices [data,tensor]


TARGETS = {
    'cpu': Target('xla', '', lambda: np.array(jax.devices('cpu')[:1])[:, None]),
    **{chip: Target('tpu', chip,
                    lambda chip=chip: np.array([[accelerators.tpu(chip)]]))
       for chip in CHIPS},
    'pod': Target('tpu', 'v5p', lambda: accelerators.tpu_pod(8, 8)),
    'h100': Target('gpu', '9.0', lambda: accelerators.h100s(1)[:, None]),
    'h100s': Target('gpu', '9.0', lambda: accelerators.h100s(8)[:, None]),
}
TPUS = ' '.join(CHIPS)
PACKED = 'q_ids kv_ids'


def flash(id, targets='v4', *, B=2, N=4, K=2, H=128, V=128, T=1024, **options):
  return Flash(id=id, slow=targets, B=B, N=N, K=K, H=H, V=V, T=T, **options)


def scan(id, targets=TPUS, *, T=1000, E=1024, M=16, **options):
  return Scan(id=id, slow=targets, T=T, E=E, M=M, **options)


def chunked(id, targets='v5e', *, N=4, K=2, H=128, V=128, T=2048, **options):
  return Chunked(id=id, slow=targets, N=N, K=K, H=H, V=V, T=T, **options)


ALL = 'z dt_bias h0 starts'
F32, F16 = dict(dtype=jnp.float32), dict(dtype=jnp.float16)
LONE = dict(B=1, N=1, K=1, H=8, V=8, T=2048, dtype=jnp.float32)
HOPPER = dict(B=1, N=8, K=2)
NORMAL = dict(normalize=1e-6)
SHARED = dict(shared='q k')

# The v4, which has the least VMEM, takes all of flash; the others what has
# other blocks.
ROWS = (
    Flash(id='causal', fast='cpu', **LONE),
    Flash(id='bidirectional', fast='cpu', causal=False, **LONE),
    Flash(id='window', fast='cpu', window=300, **LONE),
    flash('H32', H=32, V=32),
    flash('H64', TPUS, H=64, V=64),
    flash('H80', H=80, V=80),
    flash('H96', H=96, V=96),
    flash('H128'),
    flash('H192 V128', H=192),
    flash('H256', H=256, V=256),
    flash('float32', **F32),
    flash('float32 H256', H=256, V=256, **F32),
    flash('everything', TPUS, H=64, V=96, T=1000, keys=1500, window=300,
          softcap=30.0, has=f'{PACKED} q_offset'),
    flash('long', TPUS, T=4096),
    flash('packed', TPUS, T=4096, has=PACKED),
    flash('decode', T=1, keys=4000, has='q_offset'),
    flash('split', 'pod', B=8, N=16, K=16, T=2048, has=PACKED),
    *(flash(f'{T} by {S}, {H} by {V}', 'h100', T=T, keys=S, H=H, V=V,
            q_offset=S - T, softcap=30.0, window=100, **HOPPER)
      for T, S, H, V in (
          (1, 4096, 128, 128), (1000, 1000, 32, 32), (257, 1001, 80, 80),
          (300, 300, 96, 96), (512, 512, 64, 128), (512, 512, 192, 128),
          (512, 512, 256, 256))),
    flash('float16', 'h100', T=512, H=64, V=64, **HOPPER, **F16),
    flash('split', 'h100s', B=8, N=8, has=PACKED),

    Scan(id='long', fast='cpu', T=512, E=64, M=16, has='z', **F32),
    scan('long', T=2048, E=4096, has='dt_bias'),
    scan('everything', has=ALL),
    scan('float32', B=1, E=1000, has='z', **F32),
    scan('narrow', T=100, E=256, M=64, has='starts z'),
    scan('two rows', B=4, E=200, has='dt_bias starts'),
    scan('M8', B=1, E=2048, M=8),
    scan('M32', B=1, M=32, has=ALL),
    scan('wide', B=1, E=8192, M=64, has=ALL, **F32),
    scan('decode', T=1, E=1536, has='dt_bias h0'),
    scan('recurrence', f'{TPUS} h100', M=1, has='h0 starts', dt_softplus=False,
         scale_input=False),
    scan('split', 'pod', B=8, T=2048, E=4096, has='starts'),
    scan('split', 'h100s', B=16, T=256, E=512, has='z dt_bias starts'),

    Chunked(id='long', fast='cpu', B=1, T=1024, N=2, H=32, V=32, has='decay',
            **F32),
    chunked('H32', H=32, V=32, has='s0'),
    chunked('H64', H=64, V=64, has='s0'),
    chunked('H128', TPUS, has='s0'),
    chunked('normalized', has='s0 z0', **NORMAL),
    chunked('H192 V80', H=192, V=80, T=1300, has='decay s0'),
    chunked('H256', H=256, V=256, has='decay s0 z0', **NORMAL),
    chunked('float32 H256', TPUS, H=256, V=256, K=1, has='decay s0 z0',
            **NORMAL, **F32),
    chunked('everything', TPUS, N=8, K=1, T=1500, has='decay s0 z0 starts',
            **NORMAL),
    chunked('short', H=24, V=6, T=100, has='decay s0 starts'),
    chunked('decode', T=1, has='s0 z0 starts', **NORMAL),
    chunked('shared', TPUS, N=8, K=8, V=64, has='decay s0 starts', **SHARED),
    chunked('shared keys', N=8, K=4, J=2, H=64, T=1300, shared='k',
            has='decay s0 z0', **NORMAL),
    chunked('shared decode', T=1, N=8, K=8, V=64, has='decay s0', **SHARED),
    chunked('split shared', 'pod', B=8, N=16, K=16, has='decay s0', **SHARED),
    chunked('split', 'pod', B=8, N=16, K=16, has='s0 z0 starts', **NORMAL),
    *(chunked(f'{T}, {H} by {V}', 'h100', T=T, H=H, V=V, has='decay starts',
              **HOPPER, **NORMAL)
      for T, H, V in ((100, 64, 64), (1, 128, 128), (257, 80, 96),
                      (300, 16, 128), (300, 112, 48))),
    *(chunked(f'shared {T}, {H} by {V}', 'h100', B=1, T=T, N=8, K=8, H=H, V=V,
              has='decay starts', **SHARED)
      for T, H, V in ((1000, 128, 64), (1, 64, 32), (257, 80, 48))),
    chunked('split', 'h100s', B=8, N=8, T=512, V=64, has='decay starts',
            **NORMAL),
)

# Rows whose kernels keep what they compute in an H100's registers, and the
# bytes that a kernel may spill nevertheless.
REGISTERS = (
    # The slope of a softcap wants six more registers.
    *((flash(f'{feature} H{H}', T=2048, H=H, V=H, **HOPPER, **options),
       dict(flash_dk_dv=24) if H == 128 and 'softcap' in options else {})
      for H in (64, 128) for feature, options in dict(
          plain={}, bidirectional=dict(causal=False), window=dict(window=1024),
          softcap=dict(softcap=50.0), segments=dict(has=PACKED),
          everything=dict(window=1024, softcap=50.0, has=PACKED)).items()),
    # Of 255 registers a thread, some words in a group of four steps.
    *((scan(f'{T} by {E}, M{M}', T=T, E=E, M=M, **options),
       dict(scan_backward=64))
      for T, E, M, options in (
          (2048, 4096, 16, dict(B=8, has='z dt_bias starts')),
          (2048, 4096, 16, {}),
          (2048, 256, 16, dict(has='z dt_bias starts')),
          (1001, 1024, 16, dict(B=16, has='z dt_bias starts', **F32)),
          (512, 1021, 8, dict(has='z dt_bias starts')),
          (256, 512, 64, dict(has='z dt_bias starts')),
          (256, 512, 64, dict(has='z dt_bias starts', **F32)),
          (512, 512, 32, dict(has='z dt_bias starts', **F16)))),
    # At 128 the sums of dk and dv leave too few registers for all the rest.
    *((chunked(f'{has} {options} H{H}', H=H, V=H, has=has, **HOPPER,
               **options),
       dict(chunked_backward=192) if H == 128 else {})
      for H in (64, 128) for has, options in (
          ('', NORMAL), ('', {}), ('starts', NORMAL), ('decay starts', NORMAL),
          ('decay starts', {}))),
    (chunked('shared', B=1, N=8, K=8, V=64, has='decay starts', **SHARED), {}),
)


def compiled(row, target, implementation=None):
  """A row's outputs and gradients, split over the devices of a target."""
  own, chip, devices = TARGETS[target]
  implementation = implementation or own
  mesh = Mesh(devices(), ('data', 'tensor'))
  spec = lambda letters: P(*(AXES.get(letter) for letter in letters))
  struct = lambda letters, dtype: jax.ShapeDtypeStruct(
      row.shape(letters), dtype, sharding=NamedSharding(mesh, spec(letters)))
  low = dict.fromkeys(row.low.split(), row.dtype or jnp.bfloat16)
  operands = {name: struct(letters, (low | IDS).get(name, jnp.float32))
              for name, letters in row.letters.items()}
  cotangents = {name: struct(letters, jnp.float32)
                for name, letters in row.outputs.items()}
  op = ops.function(
      type(row), lambda **arguments: row.op(
          **arguments, implementation=implementation), row.options)
  split = jax.shard_map(
      lambda operands: op(**operands), mesh=mesh, check_vma=False,
      in_specs=({name: spec(x) for name, x in row.letters.items()},),
      out_specs={name: spec(x) for name, x in row.outputs.items()})
  run = lambda operands, cotangents: ops.run(
      lambda **operands: split(operands), operands, cotangents)
  platform = dispatch.PLATFORM.get(implementation, 'cpu')
  with dispatch.pretend(platform, chip):
    return jax.jit(run).lower(operands, cotangents).compile()


# Elements of all scores or of the states of all steps, and of what is no
# larger than an operand, or than the scores or the states of a chunk.
FORBIDDEN = {
    Flash: lambda row: row.B * row.N * row.T * row.S,
    Scan: lambda row: row.B * row.T * row.E * max(row.M, 8),  # As kernels pad.
    Chunked: lambda row: row.B * round_up(row.T, 128) * row.N * min(
        row.H * row.V, round_up(row.T, 128))}
LARGEST = {
    Flash: lambda row: row.B * row.N * max(row.T, row.S) * max(width(row), 256),
    Scan: lambda row: row.B * round_up(row.T, 128) * round_up(row.E, 128)
    * max(1, row.M // 16),
    Chunked: lambda row: row.B * max(
        round_up(row.T, 128) * row.N * width(row), 2 * row.K * width(row)**2)}


def width(row):
  return padded_width(max(row.H, row.V))


def check_memory(row, target, program):
  """On each device of a target, which has its part of the row."""
  data, tensor = TARGETS[target].devices().shape
  parts = dict(data=data, tensor=tensor)
  row = dataclasses.replace(row, **{
      letter: getattr(row, letter) // parts[axis]
      for letter, axis in AXES.items() if hasattr(row, letter)})
  if row.T > 1 and not isinstance(row, Scan):
    keys = getattr(row, 'S', row.T)
    assert f'{row.T},{keys}]' not in program.as_text()
  assert largest_buffer(program) <= LARGEST[type(row)](row)
  if row.T > 1:
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * FORBIDDEN[type(row)](row)


def params(tier):
  name = lambda row, target: f'{type(row).__name__}-{target}-{row.id}'.lower()
  return [pytest.param(row, target, id=name(row, target).replace(' ', '-'))
          for row in ROWS for target in getattr(row, tier).split()]


@pytest.mark.parametrize('row, target', params('fast'))
def test_stores_no_array_of_all_pairs_or_states(row, target):
  check_memory(row, target, compiled(row, target))


@pytest.mark.slow
@pytest.mark.parametrize('row, target', params('slow'))
def test_compiles(row, target, monkeypatch):
  if target.startswith('h100'):
    accelerators.require_h100_compiler(monkeypatch)
  program = compiled(row, target)
  check_memory(row, target, program)
  if isinstance(row, Scan) and row.id == 'split':
    assert 'all-reduce' in program.as_text(), 'the gradients of A and D'


@pytest.mark.slow
@pytest.mark.parametrize('row, spills', [
    pytest.param(row, spills, id=f'{type(row).__name__}-{row.id}'.lower())
    for row, spills in REGISTERS])
def test_h100_keeps_all_in_registers(row, spills, monkeypatch, capfd):
  accelerators.require_h100_compiler(monkeypatch)
  check_memory(row, 'h100', compiled(row, 'h100'))
  report = capfd.readouterr().out
  found = re.findall(
      r"'(\w+)_mosaic_gpu_kernel' for.*?(\d+) bytes spill stores", report,
      re.DOTALL)
  # A kernel of chunked that was compiled before is not reported again.
  assert len(found) >= {Flash: 3, Scan: 2, Chunked: 1}[type(row)], report
  for kernel, spilled in found:
    assert int(spilled) <= spills.get(kernel, 0), (kernel, report)


@pytest.mark.slow
def test_cudnn_compiles(monkeypatch):
  accelerators.require_h100_compiler(monkeypatch)
  monkeypatch.setattr(cudnn.fused, 'check_cudnn_version', lambda: 91000)
  row = flash('', H=64, V=64, window=256, **HOPPER)
  text = compiled(row, 'h100', 'cudnn').as_text()
  assert 'fmhaSoftmaxBackward' in text and '1024,1024' not in text
