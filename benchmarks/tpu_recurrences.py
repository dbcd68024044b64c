"""Rows of tpu_cycles.py for the selective scan and chunked linear attention.

Beside the cycles stands what the arithmetic alone would take. For the scan: the
vector unit's slots, for the additions and multiplications of OPERATIONS at each
state. For linear attention: the matrix units' cycles, for the PRODUCTS of a
chunk of 128 steps with 128 x 128 tiles.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from attention.kernels import chunked, dispatch, scan
from benchmarks.bundles import Kernel, compile_for, count, dumped, parse

# Slots of the vector unit in a bundle; 128 x 128 tiles of weights that the
# matrix units take 128 rows through in 128 bundles.
SLOTS = 4
TILES = {'v4': 4, 'v5e': 4, 'v5p': 4, 'v6e': 8, '7x': 8}
# Of a state at a step. Forward: d A, its power times h, u B added, h C added to
# the sum over states. Backward: the first four again; ds C added to dh; dh B
# added to du; dh u added to dB and h ds to dC; d A again and its power times
# dh; that times h, which times A is added to dd, and times d to dA.
OPERATIONS = {'forward': 6, 'backward': 19}
# Forward: q k, W v, q S, k v. Backward: k v again, q k, dy v, two products for
# dq, two for dk, two for dv and one for dS.
PRODUCTS = {'forward': 4, 'backward': 10}


def grids(chip, function, shapes):
  """{name: grid} of the kernels that a function calls on a chip."""
  found = {}

  def search(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == 'pallas_call':
        mapping = equation.params['grid_mapping']
        found[str(equation.params['name'])] = mapping.grid
      for inner in jaxprs_in_params(equation.params):
        search(inner)

  with dispatch.pretend('tpu', chip):
    search(jax.make_jaxpr(function)(*(
        jax.ShapeDtypeStruct(*shape) for shape in shapes)).jaxpr)
  return found


def counted(dump, name, grid, often, unit):
  """Cycles of a kernel, and how busy a unit is; see bundles.count.

  Args:
    dump: folder.
    name: of the kernel.
    grid: its grid.
    often: of each conditional region that computes, how many grid steps have
      one that runs it.
    unit: of the chip.
  """
  steps = math.prod(grid)
  kernel = Kernel(rf'\w*{name}\w*', steps,
                  lambda lengths: [steps // n for n in often])
  cycles, _, busy = count(dump, kernel, unit)
  return cycles, busy


def time_loops(dump, name, trips):
  """Bundles a grid step of the loops over time, known by their trips."""
  program = parse(dumped(dump, rf'\w*{name}\w*', r'final_bundles\.txt'))
  return sum(len(loop.bundles) * trips for loop in program.walk()
             if loop.depth == 2 and loop.trips == trips)


def scan_table(dump, chips):
  """Prints cycles a step of 128 channels x 16 states, bf16, no gate."""
  B, T, M = 2, 2048, 16
  shared = (B, T, M), jnp.bfloat16

  def both(*arrays):
    y, pull = jax.vjp(lambda *arrays: scan.selective_scan(
        *arrays, implementation='tpu')[0], *arrays)
    return pull(y)

  print('| chip | pass | E | loops over time | floor | ratio | VALU busy | '
        'whole kernel |')
  print('|---' * 8 + '|')
  for chip, E in itertools.product(chips, (1024, 4096)):
    series = (B, T, E), jnp.bfloat16
    shapes = [series, series, ((E, M), jnp.float32), shared, shared,
              ((E,), jnp.float32)]
    compile_for(chip, dump, both, *shapes)
    for name, grid in grids(chip, both, shapes).items():
      chunks, blocks = grid[2:]
      # The first chunk, the first block, the last chunk and the last block.
      often = chunks, blocks, chunks, blocks
      often = often if 'backward' in name else often[:3]
      cycles, busy = counted(dump, name, grid, often, 'VALU')
      direction = name.split('_')[-1]
      floor = OPERATIONS[direction] * 2 / SLOTS
      steps = B * T * E * M / (128 * 16)
      loops = time_loops(dump, name, T // chunks // 16)
      loops *= math.prod(grid) / steps
      print(f'| {chip} | {direction} | {E:,} | {loops:.2f} | {floor:.1f} | '
            f'{loops / floor:.2f} | {busy:.0%} | {cycles / steps:.2f} |',
            flush=True)


def chunked_table(dump, chips):
  """Prints cycles a token and head at H = V = 128, bf16."""
  B, T, N, H = 1, 4096, 8, 128
  series, decays = ((B, T, N, H), jnp.bfloat16), ((B, T, N), jnp.float32)
  print('| chip | pass | features | cycles a token | floor | ratio | '
        'MXU busy |')
  print('|---' * 7 + '|')
  for chip in chips:
    for features in ((), ('normalize',), ('decay',), ('decay', 'normalize')):
      def both(*arrays, features=features):
        y, pull = jax.vjp(
            lambda q, k, v, decay: chunked.chunked_linear_attention(
                q, k, v, decay=decay if 'decay' in features else None,
                normalize=1e-6 if 'normalize' in features else None,
                implementation='tpu')[0], *arrays)
        return pull(y)
      shapes = [series] * 3 + [decays]
      compile_for(chip, dump, both, *shapes)
      for name, grid in grids(chip, both, shapes).items():
        # The first block and the last one.
        cycles, busy = counted(dump, name, grid, (grid[2],) * 2, 'MXU')
        direction = name.split('_')[-1]
        floor = PRODUCTS[direction] / TILES[chip]
        each = cycles / (B * T * N)
        asked = ' and '.join(features) or 'none'
        print(f'| {chip} | {direction} | {asked} | '
              f'{each:.2f} | {floor:.1f} | {each / floor:.2f} | {busy:.0%} |',
              flush=True)


TABLES = {'scan': scan_table, 'chunked': chunked_table}
