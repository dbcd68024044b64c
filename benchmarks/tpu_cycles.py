"""Counts the cycles of the TPU kernels, without a TPU; see bundles.py.

  python -m benchmarks.tpu_cycles --chips v5e v5p v6e --lengths 2048 8192
  python -m benchmarks.tpu_cycles --features
  python -m benchmarks.tpu_cycles --op scan      # or chunked

Ours is set beside jax's flash_attention and splash_attention (with and without
its fused backward, whose sum over partial dq is not counted), causal, bf16,
each with the better of its PEER_BLOCKS; the recurrences beside what their
arithmetic must take (tpu_recurrences.py). Needs jax and `pip install libtpu`.
"""

import argparse
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)

from attention.kernels import dispatch
from attention.kernels.flash import Operands, Rule, tpu
from attention.kernels.flash.tpu import blocks
from attention.kernels.mosaic_tpu import CHIPS
from benchmarks import tpu_recurrences
from benchmarks.bundles import Kernel, compile_for, count, dumps

HEADS = 8
PEER_BLOCKS = 512, 1024


def sizes(chip, T, H, backward, window=0, packed=False):
  """The blocks that our kernels take on a chip."""
  with dispatch.pretend('tpu', chip):
    return blocks.sizes(
        T, T, widest=H, itemsize=2, backward=backward, window=window,
        packed=packed)


def ours(chip, dump, T, H, backward, ids=False, **options):
  """Counts our forward or backward kernel, causal.

  With ids the cycles are those of one document: no block is left out.
  """
  rule = Rule(scale=H ** -0.5, **options)
  cut = sizes(chip, T, H, backward, rule.window, ids)
  operand = ((1, T, HEADS, H), jnp.bfloat16)
  row = ((1, HEADS, T), jnp.float32)
  segments = ((1, T), jnp.int32)

  def run(q, k, v, segments, *gradient):
    segments = segments if ids else None
    operands = Operands(q, k, v, segments, segments, 0)
    if not backward:
      return tpu.forward(operands, rule)
    dout, *saved = gradient
    return tpu.backward(operands, rule, saved, dout)

  compile_for(chip, dump, run, *[operand] * 3, segments,
              *([operand, row, row] if backward else []))
  _, _, kinds = blocks.candidates(
      cut, T, T, 0, causal=True, window=rule.window)
  found = range(blocks.PARTIAL, 4) if ids else np.unique(kinds)
  visits = tuple(HEADS * int(np.sum(kinds == kind)) for kind in found)
  rows = HEADS * -(-T // cut.q)
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


def full_block(regions, cut, backward):
  """Bundles of the unmasked body, for 512 x 512 scores of its block."""
  # It is the last body before the block's outputs.
  return regions[-3 if backward else -2] * 512 ** 2 / (cut.q * cut.k)


def features(dump, args):
  """Prints the bundles of 512 x 512 full scores with each feature."""
  print('| chip | pass | H | plain | softcap | window | segments |')
  print('|---' * 7 + '|')
  for chip, backward, H in itertools.product(
      args.chips, (False, True), args.widths):
    bundles = []
    for options in ({}, {'softcap': 30.0}, {'window': 2048}, {'ids': True}):
      regions = ours(chip, dump, 2048, H, backward, **options)[1]
      cut = sizes(chip, 2048, H, backward, options.get('window', 0),
                  'ids' in options)
      bundles.append(full_block(regions, cut, backward))
    cells = [chip, 'backward' if backward else 'forward', H,
             f'{bundles[0]:,.0f}']
    cells += [f'{x:,.0f} ({x / bundles[0] - 1:+.0%})' for x in bundles[1:]]
    print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--op', choices=('flash', *tpu_recurrences.TABLES),
                      default='flash')
  parser.add_argument('--chips', nargs='+', default=['v5e', 'v5p', 'v6e'],
                      choices=list(CHIPS))
  parser.add_argument('--lengths', nargs='+', type=int, default=[2048, 8192])
  parser.add_argument('--widths', nargs='+', type=int, default=[64, 128])
  parser.add_argument('--features', action='store_true',
                      help='what features cost instead of the comparison')
  args = parser.parse_args()
  with dumps() as dump:
    if args.op == 'flash':
      (features if args.features else compare)(dump, args)
    else:
      tpu_recurrences.TABLES[args.op](dump, args.chips)


if __name__ == '__main__':
  main()
