"""The ops as their tests see them: a row of sizes and options is a case.

Operands, outputs and gradients go by name. An operand's letters (see
`attention`) give its shape from the row's sizes and its place on a mesh.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels import chunked, flash, scan, scores
from attention.kernels.chunked import reference as chunked_reference
from attention.kernels.flash import reference as flash_reference
from attention.kernels.scan import reference as scan_reference
from attention.kernels.scores import reference as scores_reference
from attention.kernels.scores.fire import Fire
from attention.kernels.scores.weights import Softmax, Weigh
from tests.kernels.measure import TOLERANCE


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Row:
  """One case of an op.

  Attributes:
    id: part of the test's name.
    fast: the implementations that the fast tier tries it on.
    slow: likewise.
    has: the optional operands.
    dtype: of the operands in `low`. None: what the implementation takes.
    tolerance: of implementations that compute in float32.
    chip: the TPU that is pretended; '' has what all have.
    races: whether the TPU interpreter looks for them, which takes long.
    cut: arguments of what cuts an implementation's work small (see
      `implementations`). None: it is cut as everywhere.
  """
  id: str = ''
  fast: str = ''
  slow: str = ''
  has: str = ''
  dtype: type | None = None
  tolerance: float = TOLERANCE
  chip: str = ''
  races: bool = True
  cut: dict | None = dataclasses.field(default_factory=dict)
  B: int = 2
  T: int = 63

  operands: ClassVar[dict]  # {name: letters}
  optional: ClassVar[str]
  low: ClassVar[str]  # operands of the dtype, the others are float32
  series: ClassVar[str]  # operands that are cut where time is
  static: ClassVar[str]  # options
  results: ClassVar[dict]  # {name: letters} of the outputs
  state: ClassVar[dict] = {}  # {output: the operand it is handed on as}
  exactly: ClassVar[type] = np.float32  # in which its definition is exact

  @property
  def letters(self):
    """{name: letters} of the operands that the row has."""
    absent = set(self.optional.split()) - set(self.has.split())
    return {name: letters for name, letters in self.operands.items()
            if name not in absent}

  @property
  def outputs(self):
    """{name: letters} of the outputs that the row has."""
    return self.results

  @property
  def options(self):
    """What a program is compiled for: arguments that are no arrays, by name."""
    return {name: getattr(self, name) for name in self.static.split()}

  def shape(self, letters):
    return tuple(getattr(self, letter) for letter in letters)

  def draw(self):
    """{name: array}: the operands in float32, or what integers they are."""
    rng = np.random.default_rng(0)
    normal = {name: rng.standard_normal(self.shape(letters), np.float32)
              for name, letters in self.letters.items()}
    return {name: np.asarray(x) for name, x in self.suit(normal, rng).items()}

  def suit(self, normal, rng):
    """Makes operands of normal numbers."""
    raise NotImplementedError

  def document(self, first, last):
    """Operands for which [first, last) are the steps of one document."""
    ids = np.searchsorted([first, last], np.arange(self.T), side='right')
    marks = np.broadcast_to(np.diff(ids, prepend=0) > 0, (self.B, self.T))
    return dict(starts=marks)

  def cotangents(self):
    rng = np.random.default_rng(1)
    # A mean, so that the sums that are gradients do not cancel.
    return {name: 1 + rng.standard_normal(self.shape(letters), np.float32)
            for name, letters in self.outputs.items()}

  def arguments(self, dtype):
    """The operands, those in `low` cast to a dtype."""
    return {name: jnp.asarray(x, dtype if name in self.low.split() else None)
            for name, x in self.draw().items()}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Flash(Row):
  """A row of flash_attention."""
  keys: int | None = None  # None: as many as queries
  N: int = 4
  K: int = 2
  H: int = 16
  V: int = 16
  A: int = 2
  scale: float = 0.3
  causal: bool = True
  window: int = 0
  softcap: float = 0.0
  q_offset: int = 0  # has='q_offset': traced

  op = staticmethod(flash.flash_attention)
  definition = staticmethod(flash_reference.attention)
  operands = dict(q='BTNH', k='BSKH', v='BSKV', q_ids='BT', kv_ids='BS',
                  sink='N', row_bias='BTNA', column_bias='BSNA', q_offset='')
  optional = 'q_ids kv_ids sink row_bias column_bias q_offset'
  low = 'q k v'
  series = 'q k v row_bias column_bias'
  static = 'scale causal window softcap'
  exactly = np.float64
  results = dict(out='BTNV', lse='BNT')

  @property
  def S(self):
    return self.keys or self.T

  @property
  def options(self):
    traced = 'q_offset' in self.letters
    return super().options | ({} if traced else dict(q_offset=self.q_offset))

  def suit(self, normal, rng):
    ids = np.sort(rng.integers(0, 4, (self.B, max(self.T, self.S))), axis=1)
    ids = ids.astype(np.int32)
    every = dict(
        normal, v=normal['v'] + 0.5, q_ids=ids[:, -self.T:],
        kv_ids=ids[:, :self.S], q_offset=np.int32(self.q_offset))
    return {name: every[name] for name in normal}

  def document(self, first, last):
    ids = np.cumsum(Row.document(self, first, last)['starts'], axis=1)
    return dict(q_ids=ids.astype(np.int32), kv_ids=ids.astype(np.int32))

  @staticmethod
  def call(op, *, q_ids=None, kv_ids=None, row_bias=None, column_bias=None,
           **arguments):
    ids = None if q_ids is None else (q_ids, kv_ids)
    bias = None if row_bias is None else (row_bias, column_bias)
    return op(**arguments, segment_ids=ids, bias=bias)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Scan(Row):
  """A row of selective_scan."""
  races: bool = False
  E: int = 12
  M: int = 4
  dt_softplus: bool = True
  scale_input: bool = True
  steps: tuple = ()  # Repeated, in place of random ones.

  op = staticmethod(scan.selective_scan)
  definition = staticmethod(scan_reference.selective_scan)
  operands = dict(x='BTE', dt='BTE', A='EM', B='BTM', C='BTM', D='E', z='BTE',
                  dt_bias='E', h0='BEM', starts='BT')
  optional = 'z dt_bias h0 starts'
  low = 'x dt B C z'
  series = 'x dt B C z starts'
  static = 'dt_softplus scale_input'
  results = dict(y='BTE', hT='BEM')
  state = dict(hT='h0')

  def suit(self, normal, rng):
    dt = normal['dt'] - 2 if self.dt_softplus else np.abs(normal['dt'])
    if self.steps:
      dt = np.resize(np.float32(self.steps), self.T)[:, None] + 0 * dt
    every = dict(normal, dt=dt, A=-np.exp(normal['A']),
                 starts=random_starts(rng, self.B, self.T))
    return {name: every[name] for name in normal}

  @staticmethod
  def call(op, **arguments):
    return op(**arguments)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Chunked(Row):
  """A row of chunked_linear_attention."""
  N: int = 4
  K: int = 2
  H: int = 8
  V: int = 6
  J: int = 1
  shared: str = ''  # Those of q and k that have J heads; N is K if q has.
  normalize: float | None = None
  per_head: bool = False  # The decay; else it is per step.
  decays: tuple = ()  # Repeated, in place of random ones.

  op = staticmethod(chunked.chunked_linear_attention)
  definition = staticmethod(chunked_reference.chunked_linear_attention)
  operands = dict(q='BTNH', k='BTKH', v='BTKV', decay='BTK', s0='BKHV',
                  z0='BKH', starts='BT')
  optional = 'decay s0 z0 starts'
  low = 'q k v'
  series = 'q k v decay starts'
  static = 'normalize'
  results = dict(y='BTNV', sT='BKHV', zT='BKH')
  state = dict(sT='s0', zT='z0')

  @property
  def letters(self):
    own = {name: f'BTJ{self.operands[name][-1]}'
           for name in self.shared.split()}
    if self.per_head:
      own['decay'] = 'K'
    return super().letters | own

  @property
  def outputs(self):
    results = dict(self.results)
    if self.normalize is None:
      del results['zT']
    return results

  def suit(self, normal, rng):
    every = dict(normal, starts=random_starts(rng, self.B, self.T))
    if self.normalize is not None:
      # As a feature map leaves them: the denominator is a sum of positives.
      every.update(q=np.abs(normal['q']) + 0.1, k=np.abs(normal['k']) + 0.1)
      every.update(z0=np.abs(normal.get('z0', 0)))
    if 'decay' in normal:
      every['decay'] = -np.exp(normal['decay'] - 1)
    if self.decays:
      every['decay'] = np.resize(np.float32(self.decays), self.T)[
          :, None] + 0 * normal['decay']
    return {name: every[name] for name in normal}

  @staticmethod
  def call(op, *, s0=None, z0=None, **arguments):
    return op(**arguments, s0=s0 if z0 is None else (s0, z0))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Scores(Row):
  """A row of weighted_attention; weigh has `first` and `second` to learn."""
  keys: int | None = None  # None: as many as queries
  N: int = 4
  K: int = 2
  H: int = 8
  V: int = 6
  F: int = 3  # width of the network of fire
  X: int = 1  # its inputs
  A: int = 2
  weigh: Weigh = Softmax(2.0)
  scale: float = 0.3
  window: int = 0
  softcap: float = 0.0
  by_length: bool = False
  fire: Fire | None = None
  q_offset: int = 0

  op = staticmethod(scores.weighted_attention)
  definition = staticmethod(scores_reference.weighted_attention)
  operands = dict(q='BTNH', k='BSKH', v='BSKV', q_ids='BT', kv_ids='BS',
                  first='N', second='N', c='', multiplier='', w1='XF', b1='F',
                  w2='FN', b2='N', row_bias='BTNA', column_bias='BSNA',
                  positions='BT')
  optional = ('q_ids kv_ids first second c multiplier w1 b1 w2 b2 row_bias '
              'column_bias positions')
  low = 'q k v'
  series = 'q k v row_bias column_bias'
  static = 'weigh scale window softcap by_length fire q_offset'
  results = dict(y='BTNV')

  S = Flash.S

  def suit(self, normal, rng):
    every = Flash.suit(self, normal, rng) if 'q_ids' in normal else dict(
        normal, v=normal['v'] + 0.5)
    every['positions'] = np.tile(
        np.arange(self.T, dtype=np.int32), (self.B, 1))
    for name in {'first', 'second'} & every.keys():
      every[name] = 1 + np.abs(every[name])
    return {name: every[name] for name in normal}

  document = Flash.document

  @staticmethod
  def call(op, *, q_ids=None, kv_ids=None, first=None, second=None, c=None,
           multiplier=None, w1=None, b1=None, w2=None, b2=None, row_bias=None,
           column_bias=None, **arguments):
    ids = None if q_ids is None else (q_ids, kv_ids)
    learned = tuple(x for x in (first, second) if x is not None)
    fire = None if c is None else (c, multiplier, (w1, b1), (w2, b2))
    bias = None if row_bias is None else (row_bias, column_bias)
    return op(**arguments, segment_ids=ids, learned=learned, fire_learned=fire,
              bias=bias)


def random_starts(rng, rows, time, *, every=9):
  """bool [rows,T]: starts at some multiples of `every`.

  In row 0 the document of before goes on; in the others one starts, so that
  the state before it does not count.
  """
  marks = np.zeros((rows, time), bool)
  marks[:, ::every] = rng.random((rows, -(-time // every))) < 0.7
  marks[:, 0] = np.arange(rows) > 0
  return marks


def function(kind, op, options):
  """An op as a function of operands by name, to its outputs by name."""
  def call(**operands):
    outputs = jax.tree.leaves(kind.call(op, **operands, **options))
    return dict(zip(kind.results, outputs))

  return call


def run(function, operands, cotangents):
  """{name: value} of the outputs of function(**operands) and all gradients."""
  arrays = {name: x for name, x in operands.items()
            if jnp.issubdtype(x.dtype, jnp.floating)}
  others = {name: x for name, x in operands.items() if name not in arrays}
  outputs, pull = jax.vjp(
      lambda arrays: function(**arrays, **others), arrays)
  gradients, = pull(
      {name: cotangents[name].astype(y.dtype) for name, y in outputs.items()})
  return outputs | {f'd{name}': x for name, x in gradients.items()}


@functools.cache
def _definition(kind, options):
  return jax.jit(functools.partial(
      run, function(kind, kind.definition, dict(options))))


def defined(row, operands):
  """What the op is defined to give: outputs and gradients."""
  definition = _definition(type(row), tuple(row.options.items()))
  return jax.device_get(definition(operands, row.cotangents()))


@functools.cache
def exact(row):
  """The definition's, in float64 if it can: errors are not its own."""
  with jax.enable_x64(row.exactly == np.float64):
    return defined(row, row.arguments(row.exactly))
