"""What every implementation of every op promises, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.kernels import accelerators, implementations, ops, rows
from tests.kernels.measure import (
    assert_agree,
    assert_rounded,
    same_bits,
)
from tests.kernels.ops import Chunked, Delta, Flash, Scan, Scores

# Values for the series of a document: inside, they may do what they like.
GARBAGE = {
    Scores: dict(finite=dict(
        q=5.0, k=1e3, v=-1e15, row_bias=1e9, column_bias=-1e9)),
    Flash: dict(finite=dict(
        q=5.0, k=1e3, v=-1e15, row_bias=1e9, column_bias=-1e9)),
    Scan: {kind: dict.fromkeys(('x', 'dt', 'B', 'C', 'z'), value)
           for kind, value in (
               ('finite', 3.0), ('inf', np.inf), ('nan', np.nan))},
    Chunked: dict(
        finite=dict(q=5.0, k=1e15, v=-1e15, decay=-1e9),
        huge=dict(q=3e38, k=1e38, v=-3e38, decay=-1e9),
        inf=dict(q=np.inf, k=np.inf, v=np.inf, decay=-np.inf),
        nan=dict(q=np.nan, k=np.nan, v=np.nan, decay=np.nan)),
    Delta: dict(
        finite=dict(q=5.0, k=1e15, v=-1e15, decay=-1e9, beta=1e9),
        huge=dict(q=3e38, k=1e38, v=-3e38, decay=-1e9, beta=2.0),
        inf=dict(q=np.inf, k=np.inf, v=np.inf, decay=-np.inf, beta=np.inf),
        nan=dict(q=np.nan, k=np.nan, v=np.nan, decay=np.nan, beta=np.nan)),
}


def param(row, implementation, *values, fast=None):
  """A case; fast: its tier, if it is not that of the row."""
  if fast is None:
    fast = implementation in row.fast.split()
  marks = [] if fast else [pytest.mark.slow]
  if implementation == 'gpu':
    marks.append(accelerators.gpu_interpreter_exists)
  values_by_name = (getattr(value, '__name__', str(value)) for value in values)
  names = type(row).__name__.lower(), implementation, row.id, *values_by_name
  return pytest.param(row, implementation, *values, marks=marks,
                      id='-'.join(names).replace(' ', '-'))


def everything(kind, implementation):
  """The row of all options, from the fast tier if it is there."""
  return next(row for tier in ('fast', 'slow') for row in rows.ROWS
              if isinstance(row, kind) and 'everything' in row.id
              and implementation in getattr(row, tier).split())


def promises(**implementations):
  """Cases on the row of all options, fast where nothing is interpreted."""
  kinds = dict(flash=Flash, scan=Scan, chunked=Chunked, delta=Delta,
               scores=Scores)
  return [param(everything(kinds[op], name), name,
                fast=name not in ('tpu', 'gpu'))
          for op, names in implementations.items() for name in names.split()]


@pytest.mark.parametrize('row, implementation', [
    param(row, implementation) for row in rows.ROWS
    for implementation in f'{row.fast} {row.slow}'.split()])
def test_matches_definition(row, implementation, results):
  dtype = implementations.dtype(row, implementation)
  operands = row.arguments(dtype)
  got = results(row, implementation, operands)
  if dtype == jnp.float32:
    assert_agree(got, ops.exact(row), row.tolerance)
  else:
    assert_rounded(got, ops.exact(row), ops.defined(row, operands))


@pytest.mark.parametrize('row, implementation', [
    param(row, implementation) for row in rows.SCAN + rows.CHUNKED + rows.DELTA
    if row.id in ('bfloat16', 'float16')
    for implementation in f'{row.fast} {row.slow}'.split()])
def test_low_precision_keeps_a_float32_state(row, implementation, results):
  operands = row.arguments(row.dtype)
  got, want = results(row, implementation, operands), ops.defined(row, operands)
  assert_agree(got, {name: want[name] for name in row.state if name in want})
  assert_agree(got, want, 5e-3)


@pytest.mark.parametrize('row, implementation', promises(
    flash='xla plain tiles tpu gpu', scan='xla tpu gpu',
    chunked='xla tpu gpu', delta='xla', scores='xla plain'))
def test_same_bits_twice(row, implementation, results):
  operands = row.arguments(implementations.dtype(row, implementation))
  one, two = (results(row, implementation, operands) for _ in range(2))
  for name in one:
    assert same_bits(one[name], two[name]), name


@pytest.mark.parametrize('row, implementation', promises(
    scan='xla tpu gpu', chunked='xla tpu gpu', delta='xla'))
def test_first_start_decides_whether_the_state_counts(
    row, implementation, results):
  got = results(row, implementation, row.arguments(
      implementations.dtype(row, implementation)))
  for state in row.state.values():
    gradient = got[f'd{state}']
    assert np.any(gradient[0]), f'row 0 continues the document of {state}'
    assert not np.any(gradient[1]), 'row 1 starts another document'


def isolated(kind, implementation, garbage, first, last, *, id=None):
  """A case of a document in [first, last) of a row."""
  row = everything(kind, implementation) if id is None else next(
      row for row in rows.ROWS if isinstance(row, kind) and row.id == id)
  fast = implementation not in ('tpu', 'gpu') or (
      (kind, implementation, garbage) == (Chunked, 'tpu', 'inf'))
  return param(row, implementation, garbage, first, last, fast=fast)


@pytest.mark.parametrize('row, implementation, garbage, first, last', [
    isolated(Flash, 'plain', 'finite', 25, 50),
    isolated(Flash, 'tiles', 'finite', 75, 150),
    isolated(Flash, 'tpu', 'finite', 75, 150),
    isolated(Scores, 'plain', 'finite', 25, 50),
    isolated(Scores, 'xla', 'finite', 25, 50),
    isolated(Flash, 'plain', 'finite', 75, 150, id='bias everything'),
    isolated(Flash, 'tiles', 'finite', 75, 150, id='bias everything'),
    *(isolated(Scan, 'xla', garbage, 25, 50)
      for garbage in ('finite', 'inf', 'nan')),
    *(isolated(Scan, 'tpu', garbage, 25, 50, id='everything')
      for garbage in ('inf', 'nan')),
    *(isolated(Scan, 'gpu', garbage, 25, 50)
      for garbage in ('finite', 'inf', 'nan')),
    isolated(Scan, 'gpu', 'nan', 5, 20, id='parts'),
    isolated(Chunked, 'xla', 'finite', 25, 50),
    isolated(Chunked, 'xla', 'finite', 75, 150),
    *(isolated(Chunked, 'tpu', garbage, 25, 50)
      for garbage in ('finite', 'inf', 'nan')),
    *(isolated(Delta, 'xla', garbage, first, last, id=id)
      for garbage in ('finite', 'huge', 'inf', 'nan')
      for first, last, id in (
          # Ends at every place of the small blocks of four.
          (25, 50, 'everything'), (75, 96, 'everything by channel'),
          (25, 51, 'everything by channel'), (30, 49, 'everything'),
          (3, 17, 'rule packed'), (25, 50, 'channels packed'))),
    isolated(Chunked, 'xla', 'finite', 25, 50, id='shared and everything'),
    isolated(Chunked, 'tpu', 'nan', 25, 50, id='shared and everything'),
    isolated(Chunked, 'gpu', 'huge', 25, 50, id='hopper shared'),
    isolated(Chunked, 'gpu', 'huge', 25, 50),
    isolated(Chunked, 'gpu', 'huge', 25, 50, id='hopper linear'),
])
def test_documents_are_isolated_bit_for_bit(
    row, implementation, garbage, first, last, results):
  """In the same block, in other blocks and in the state between them."""
  before = row.arguments(implementations.dtype(row, implementation))
  before |= row.document(first, last)
  after = dict(before)
  for name, value in GARBAGE[type(row)][garbage].items():
    if name in before:
      after[name] = before[name].at[:, first:last].set(value)
  before, after = (results(row, implementation, x) for x in (before, after))
  letters = row.outputs | {
      f'd{name}': letters for name, letters in row.letters.items()
      if f'd{name}' in before and (
          name in row.series.split() or name in row.state.values())}
  for name, axes in letters.items():
    one, two = before[name], after[name]
    if 'T' in axes or 'S' in axes:
      axis = axes.replace('S', 'T').index('T')
      one, two = (np.delete(x, np.arange(first, last), axis)
                  for x in (one, two))
    assert same_bits(one, two), name
  inside = after[next(iter(row.outputs))][:, first:last]
  if garbage in ('inf', 'nan'):
    assert not np.isfinite(inside).any()


@pytest.mark.parametrize('row, implementation', promises(
    scan='xla', chunked='xla tpu', delta='xla'))
def test_handing_the_state_on_equals_the_whole(row, implementation, capfd):
  outputs = functools.partial(
      implementations.outputs, row, implementation, capfd=capfd)
  operands = row.arguments(jnp.float32)
  cut = lambda start, stop: {
      name: x[:, start:stop] if name in row.series.split() else x
      for name, x in operands.items()}
  whole, parts, state = outputs(cut(0, 99)), [], {}
  for start, stop in ((0, 49), (49, 50), (50, 99)):
    part = outputs(cut(start, stop) | state)
    parts.append(part['y'])
    state = {name: part[output] for output, name in row.state.items()}
  assert_agree(part | dict(y=np.concatenate(parts, axis=1)), whole)


SHORT = (Flash(id='sink', T=40, has='sink', fast='xla plain tiles'),
         Flash(id='bias', T=40, has='row_bias column_bias', fast='plain tiles'),
         Scan(id='state', T=10, has='h0', fast='xla'),
         Chunked(id='state', T=10, has='s0', slow='xla'),
         Delta(id='state', T=40, has=rows.RULE, channels=True, fast='xla'),
         Scores(id='sink', has='first', fast='xla'))


@functools.cache
def squares(row, implementation):
  """A function of the operands, a dict: the sum of all outputs' squares."""
  function = implementations.function(row, implementation)
  return lambda operands: sum(
      jnp.sum(y ** 2) for y in function(**operands).values())


def mapped(loss, batched, shared):
  one = lambda row: loss(shared | {name: x[None] for name, x in row.items()})
  return jnp.sum(jax.vmap(one)(batched))


def scanned(loss, batched, shared):
  step = lambda total, row: (total + loss(shared | row), None)
  return jax.lax.scan(
      step, 0.0, {name: x[:, None] for name, x in batched.items()})[0]


def sharded(loss, batched, shared):
  mesh = jax.make_mesh((2,), ('data',), devices=jax.devices()[:2],
                       axis_types=(jax.sharding.AxisType.Auto,))
  return jax.shard_map(
      lambda batched, shared: jax.lax.psum(loss(batched | shared), 'data'),
      mesh=mesh, in_specs=(P('data'), P()), out_specs=P())(batched, shared)


def checkpointed(loss, batched, shared):
  return jax.checkpoint(loss)(batched | shared)


def plain(loss, batched, shared):
  return loss(batched | shared)


@functools.cache
def gradients(row, implementation, transformed):
  operands = row.arguments(jnp.float32)
  batched = {name: operands.pop(name) for name, letters in row.letters.items()
             if 'B' in letters}
  loss = functools.partial(transformed, squares(row, implementation))
  batched, shared = jax.jit(jax.grad(loss, argnums=(0, 1)))(batched, operands)
  return batched | shared


# Inside jax.shard_map the others want check_vma=False: what they begin with
# does not vary over the mesh, what they end with does.
TRANSFORMATIONS = {Flash: (checkpointed, scanned, mapped, sharded),
                   Scan: (checkpointed, mapped),
                   Chunked: (checkpointed, mapped),
                   Delta: (checkpointed, mapped),
                   Scores: (checkpointed, scanned, mapped)}


@pytest.mark.parametrize('row, implementation, transformation', [
    param(row, implementation, transformation) for row in SHORT
    for transformation in TRANSFORMATIONS[type(row)]
    for implementation in f'{row.fast} {row.slow}'.split()])
def test_composes_with(row, implementation, transformation, capfd):
  with implementations.prepared(row, implementation, capfd):
    assert_agree(gradients(row, implementation, transformation),
                 gradients(row, implementation, plain), 1e-6)


@pytest.mark.slow
def test_tpu_kernels_compose_with_scan(capfd):
  """The interpreter's callbacks allow neither checkpoint nor vmap."""
  row = SHORT[0]
  with implementations.prepared(row, 'tpu', capfd):
    assert_agree(gradients(row, 'tpu', scanned), gradients(row, 'tpu', plain),
                 1e-6)
