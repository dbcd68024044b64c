"""Counts the bundles of TPU kernels in the dumps of libtpu, without a TPU.

libtpu compiles for a described chip and writes down the bundles that it
scheduled; one bundle issues a cycle. A kernel's cycles are the bundles of each
region of its program times how often the region runs: a lower bound, which
leaves out waiting for memory, and exact for what it counts.

Two of XLA's defaults would make the count depend on more than the kernels, and
are turned off for all: operands that happen to fit are put into VMEM before a
kernel starts, which spares it their copies in these small programs and in no
model; and bounds are checked in kernels that do not say otherwise, as ours do.
"""

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from attention.kernels import dispatch
from attention.kernels.mosaic_tpu import CHIPS

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
      while stack[-1].depth is not None and stack[-1].depth >= depth:
        stack.pop()  # One loop ends where the next one begins.
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


def count(dump, kernel, unit='MXU'):
  """Returns (cycles, bundles of each such region, how busy a unit is).

  Args:
    dump: folder of the dump.
    kernel: the Kernel.
    unit: of the chip, as the dump calls it, such as MXU or VALU. Told is how
      much of it the region uses in which it works most.
  """
  text = dumped(dump, kernel.name, r'final_bundles\.txt')
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

  lines = dumped(
      dump, kernel.name, r'final_hlo-static-per-bundle-util.*').splitlines()
  column = [name.strip() for name in lines[1].split(',')].index(unit)
  capacity = int(lines[2].split()[column])
  used = [int(line.split()[column]) for line in lines[4:]
          if re.match(r'[\d ]+$', line)]
  work, size = max((sum(used[at] for at in region.bundles),
                    len(region.bundles)) for region in program.walk())
  busy = work / size / capacity
  return cycles(program, 1), lengths, busy


def dumped(dump, kernel, stage):
  """The text that libtpu wrote for a stage of a kernel."""
  pattern = re.compile(rf'\d+-{kernel}(\.\d+)?-\d+-{stage}$')
  (path,) = [path for path in dump.iterdir() if pattern.match(path.name)]
  return path.read_text(errors='replace')


def compile_for(chip, dump, function, *shapes):
  """Compiles a function for one chip, into an empty dump."""
  for path in dump.iterdir():
    path.unlink()
  device = topologies.get_topology_desc(
      platform='tpu', topology_name=CHIPS[chip].topology).devices[0]
  arguments = [jax.ShapeDtypeStruct(shape, dtype,
                                    sharding=SingleDeviceSharding(device))
               for shape, dtype in shapes]
  with dispatch.pretend('tpu', chip):
    jax.jit(function).lower(*arguments).compile()


@contextlib.contextmanager
def dumps():
  """A folder into which libtpu, not loaded yet, writes what it compiles."""
  with tempfile.TemporaryDirectory() as folder:
    os.environ['LIBTPU_INIT_ARGS'] = (
        f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true '
        + ' '.join(FLAGS))
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    # No chip is opened: another process may hold libtpu's lock.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    jax.config.update('jax_platforms', 'cpu')
    yield pathlib.Path(folder)
