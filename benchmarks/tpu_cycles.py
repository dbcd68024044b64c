"""Counts the cycles of TPU attention kernels, without a TPU.

  python benchmarks/tpu_cycles.py --chips v5e v5p v6e --lengths 2048 8192

libtpu compiles for a described chip and writes down the bundles that it
scheduled; one bundle issues a cycle. A kernel's cycles are the bundles of each
region of its program times how often the region runs: a lower bound, which
leaves out waiting for memory, and exact for what it counts. Ours is set beside
jax's flash_attention and splash_attention (with and without its fused
backward, whose sum over partial dq is not counted), causal, bf16, each with the
better of its PEER_BLOCKS. Needs jax and `pip install libtpu`.

Two of XLA's defaults would make the count depend on more than the kernels, and
are turned off for all: operands that happen to fit are put into VMEM before a
kernel starts, which spares it their copies in these small programs and in no
model; and bounds are checked in kernels that do not say otherwise, as ours do.
"""

import argparse
import functools
import itertools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
from jax.sharding import SingleDeviceSharding

from attention.kernels.flash import tpu, tpu_blocks

TOPOLOGIES = {'v4': 'v4:2x2x1', 'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1',
              'v6e': 'v6e:2x2', '7x': 'tpu7x:2x2x1'}
HEADS = 8
PEER_BLOCKS = 512, 1024
FLAGS = '--xla_msa_enable=false', '--xla_jf_bounds_check=false'
# Bundles of the smallest region that computes: others start copies, or count.
SMALLEST = 8

_BUNDLE = re.compile(r'^\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*([> ]*)\{(.*)$')


class Region:
  """A run of bundles: the program, a loop, or what a branch jumps over."""

  def __init__(self, depth=None, end=None):
    self.depth, self.end = depth, end  # of a loop; label after a branch
    self.bundles, self.vector, self.trips = [], 0, 1
    self.inside = []

  def walk(self):
    yield self
    for region in self.inside:
      yield from region.walk()


def parse(text):
  """The tree of Regions of a dump of final bundles."""
  bundles = []
  for line in text.splitlines():
    match = _BUNDLE.match(line)
    if match:
      bundles.append([match[2], match[3].count('>'), match[4]])
    elif bundles:
      bundles[-1][2] += ' ' + line
  labels = [set(re.findall(r'region (\d+)', body)) if mark == 'PF' else set()
            for mark, _, body in bundles]
  ahead = [set()]
  for label in reversed(labels):
    ahead.append(ahead[-1] | label)
  ahead.reverse()
  stack = [Region()]
  for at, (mark, depth, body) in enumerate(bundles):
    while len(stack) > 1 and (
        stack[-1].end in labels[at]
        or stack[-1].depth is not None and depth < stack[-1].depth
        and not body.startswith('}')):
      stack.pop()
    if mark == 'LB':
      stack[-1].inside.append(Region(depth=depth))
      stack.append(stack[-1].inside[-1])
    stack[-1].bundles.append(at)
    stack[-1].vector += len(re.findall(r'%v\w+ = |\bvst', body))
    bound = re.search(r'totalorder %s\w+, (\d+) /\* loop exit test', body)
    loops = [region for region in stack if region.depth is not None]
    if bound and loops:
      loops[-1].trips = int(bound[1])
    branch = re.search(r'sbr\.rel.*?target = \$region(\d+)', body)
    if branch and branch[1] in ahead[at + 1]:
      stack[-1].inside.append(Region(end=branch[1]))
      stack.append(stack[-1].inside[-1])
  return stack[0]


class Kernel(NamedTuple):
  """How often the parts of a kernel run.

  Attributes:
    name: regular expression of its name in the dump.
    steps: grid steps.
    runs: of each conditional region that computes, in program order, as a
      function of their numbers of bundles.
  """
  name: str
  steps: int
  runs: Callable[[list], Sequence]


def count(dump, kernel):
  """Returns (cycles, bundles of each region, busy MXU where it works most)."""
  text = _dumped(dump, kernel.name, r'final_bundles\.txt')
  program = parse(text)

  def computes(region):
    size = sum(len(r.bundles) for r in region.walk())
    return region.end and size >= SMALLEST and any(
        r.vector for r in region.walk())

  regions = [r for r in program.walk() if computes(r) and not any(
      computes(inner) for inner in r.walk() if inner is not r)]
  lengths = [sum(len(r.bundles) for r in region.walk()) for region in regions]
  runs = dict(zip(map(id, regions), kernel.runs(lengths), strict=True))

  def cycles(region, times):
    times = runs.get(id(region), times)
    if region.depth is not None:
      times *= kernel.steps if region.depth == 1 else region.trips
    return len(region.bundles) * times + sum(
        cycles(inner, times) for inner in region.inside)

  lines = _dumped(
      dump, kernel.name, r'final_hlo-static-per-bundle-util.*').splitlines()
  column = [name.strip() for name in lines[1].split(',')].index('MXU')
  capacity = int(lines[2].split()[column])
  used = [int(line.split()[column]) for line in lines[4:]
          if re.match(r'[\d ]+$', line)]
  work, size = max((sum(used[at] for at in region.bundles),
                    len(region.bundles)) for region in regions)
  busy = work / size / capacity
  return cycles(program, 1), lengths, busy


def _dumped(dump, kernel, stage):
  pattern = re.compile(rf'\d+-{kernel}(\.\d+)?-\d+-{stage}$')
  (path,) = [path for path in dump.iterdir() if pattern.match(path.name)]
  return path.read_text(errors='replace')


def compile_for(chip, dump, function, *shapes):
  """Compiles a function for one chip, into an empty dump."""
  for path in dump.iterdir():
    path.unlink()
  device = topologies.get_topology_desc(
      platform='tpu', topology_name=TOPOLOGIES[chip]).devices[0]
  arguments = [jax.ShapeDtypeStruct(shape, dtype,
                                    sharding=SingleDeviceSharding(device))
               for shape, dtype in shapes]
  jax.jit(function).lower(*arguments).compile()


def sizes(chip, T, H, backward, window=0, packed=False):
  """The blocks that our kernels take on a chip."""
  tpu_blocks.generation = lambda: chip
  return tpu_blocks.block_sizes(
      T, T, widest=H, itemsize=2, backward=backward, window=window,
      packed=packed)


def ours(chip, dump, T, H, backward, ids=False, **options):
  """Counts our forward or backward kernel, causal.

  With ids the cycles are those of one document: no block is left out.
  """
  options = dict(dict(scale=H ** -0.5, causal=True, window=0, softcap=0.0),
                 **options)
  blocks = sizes(chip, T, H, backward, options['window'], ids)
  operand = ((1, T, HEADS, H), jnp.bfloat16)
  row = ((1, HEADS, T), jnp.float32)
  segments = ((1, T), jnp.int32)

  def run(*operands):
    *operands, segments = operands
    segments = segments if ids else None
    operands[3:3] = segments, segments, 0
    return (tpu.backward if backward else tpu.forward)(*operands, **options)

  compile_for(chip, dump, run, *[operand] * (4 if backward else 3),
              *[row] * (2 if backward else 0), segments)
  _, _, kinds = tpu_blocks.candidates(
      blocks, T, T, 0, causal=True, window=options['window'])
  found = range(tpu_blocks.PARTIAL, 4) if ids else np.unique(kinds)
  visits = tuple(HEADS * int(np.sum(kinds == kind)) for kind in found)
  rows = HEADS * -(-T // blocks.q)
  steps = HEADS * kinds.size
  if backward:
    runs = HEADS, rows, *visits, rows, HEADS
    return count(dump, Kernel('flash_backward', steps, lambda _: runs))
  runs = rows, *visits, rows
  return count(dump, Kernel('flash_forward', steps, lambda _: runs))


class Count(NamedTuple):
  """Of a kernel or several: all cycles, those of a full block's 512 x 512."""
  cycles: int
  full: float


def flash_of_jax(chip, dump, T, H, block):
  """Counts jax's flash_attention: Counts of the forward, backward pass."""
  sizes = jax_flash.BlockSizes(**{
      name: 1 if name == 'block_b' else block
      for name in jax_flash.BlockSizes.__dataclass_fields__})
  attend = lambda q, k, v: jax_flash.flash_attention(
      q, k, v, causal=True, sm_scale=H ** -0.5, block_sizes=sizes)
  return _peer(chip, dump, attend, (1, HEADS, T, H), block, (
      r'(?!.*bwd)\w*flash\w*', r'\w*bwd_dkv\w*', r'\w*bwd_dq\w*'))


def splash_of_jax(chip, dump, T, H, block, fused=False):
  """Counts jax's splash_attention, on q that is already scaled."""
  names = ['block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv',
           'block_kv_dkv', 'block_kv_dkv_compute']
  names += [] if fused else ['block_q_dq', 'block_kv_dq']
  mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((T, T))] * HEADS)
  attend = splash.make_splash_mha(
      mask=mask, head_shards=1, q_seq_shards=1, block_sizes=splash.BlockSizes(
          **dict.fromkeys(names, block), use_fused_bwd_kernel=fused))
  kernels = [r'splash_mha_fwd\w*', r'splash_mha_dkv\w*', r'splash_mha_dq\w*']
  return _peer(chip, dump, attend, (HEADS, T, H), block,
               kernels[:2 if fused else 3])


def _peer(chip, dump, attend, shape, block, kernels):
  """Counts a forward kernel and its backward kernels, all on one grid."""
  compile_for(chip, dump, lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](
      dout), *[(shape, jnp.bfloat16)] * 4)
  rows = -(-shape[-2] // block)
  body = HEADS * rows * (rows + 1) // 2
  # The longest region takes a block; the others begin or end an output's.
  runs = lambda lengths: [body if length == max(lengths) else HEADS * rows
                          for length in lengths]
  counts = []
  for name in kernels:
    cycles, lengths, _ = count(dump, Kernel(name, HEADS * rows ** 2, runs))
    counts.append(Count(cycles, max(lengths) * (512 / block) ** 2))
  forward, *backward = counts
  return forward, Count(*map(sum, zip(*backward)))


def compare(dump, args):
  """Prints cycles beside jax's kernels, each with its better block."""
  print('| chip | pass | H | T | ours | flash_attention | splash | '
        'splash, fused | ours / best | full block | best full | MXU busy | '
        'bundles |')
  print('|---' * 13 + '|')
  for chip, H, T in itertools.product(args.chips, args.widths, args.lengths):
    peers = [[peer(chip, dump, T, H, block) for block in PEER_BLOCKS]
             for peer in (flash_of_jax, splash_of_jax, functools.partial(
                 splash_of_jax, fused=True))]
    for backward in (False, True):
      cycles, regions, busy = ours(chip, dump, T, H, backward)
      full = full_block(regions, sizes(chip, T, H, backward), backward)
      best = [min(of_block[backward] for of_block in peer) for peer in peers]
      cells = [chip, 'backward' if backward else 'forward', H, T,
               *(f'{x:,}' for x in (cycles, *(x.cycles for x in best))),
               f'{cycles / min(best).cycles:.2f}', f'{full:,.0f}',
               f'{min(x.full for x in best):,.0f}', f'{busy:.0%}',
               f'{sum(regions):,}']
      print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)


def full_block(regions, blocks, backward):
  """Bundles of the unmasked body, for 512 x 512 scores of its block."""
  # It is the last body before the block's outputs.
  return regions[-3 if backward else -2] * 512 ** 2 / (blocks.q * blocks.k)


def features(dump, args):
  """Prints the bundles of 512 x 512 full scores with each feature."""
  print('| chip | pass | H | plain | softcap | window | segments |')
  print('|---' * 7 + '|')
  for chip, backward, H in itertools.product(
      args.chips, (False, True), args.widths):
    bundles = []
    for options in ({}, {'softcap': 30.0}, {'window': 2048}, {'ids': True}):
      regions = ours(chip, dump, 2048, H, backward, **options)[1]
      blocks = sizes(chip, 2048, H, backward, options.get('window', 0),
                     'ids' in options)
      bundles.append(full_block(regions, blocks, backward))
    cells = [chip, 'backward' if backward else 'forward', H,
             f'{bundles[0]:,.0f}']
    cells += [f'{x:,.0f} ({x / bundles[0] - 1:+.0%})' for x in bundles[1:]]
    print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--chips', nargs='+', default=['v5e', 'v5p', 'v6e'],
                      choices=list(TOPOLOGIES))
  parser.add_argument('--lengths', nargs='+', type=int, default=[2048, 8192])
  parser.add_argument('--widths', nargs='+', type=int, default=[64, 128])
  parser.add_argument('--features', action='store_true',
                      help='what features cost instead of the comparison')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    os.environ['LIBTPU_INIT_ARGS'] = (
        f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true '
        + ' '.join(FLAGS))
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    # No chip is opened: another process may hold libtpu's lock.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    jax.config.update('jax_platforms', 'cpu')
    (features if args.features else compare)(pathlib.Path(folder), args)


if __name__ == '__main__':
  main()
