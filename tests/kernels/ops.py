"""The ops as their tests see them: a row of sizes and options is a case.

Operands, outputs and gradients go by name. An operand's letters (see
`attention`) give its shape from the row's sizes and its place on a mesh.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels import chunked, delta, flash, scan, scores
from attention.kernels.chunked import reference as chunked_reference
from attention.kernels.delta import reference as delta_reference
from attention.kernels.flash import reference as flash_reference
from attention.kernels.scan import reference as scan_reference
from attention.kernels.scores import reference as scores_reference
from attention.kernels.scores.fire import Fire
from attention.kernels.scores.weights import Softmax, Weigh
from tests.kernels.row import Row, random_starts


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
class Delta(Row):
  """A row of delta_rule."""
  N: int = 4
  K: int = 2
  H: int = 8
  V: int = 6
  channels: bool = False  # Each decays by itself.
  same_keys: bool = False  # At every step.
  decays: tuple = ()  # Repeated, in place of random ones.
  betas: tuple = ()  # Likewise.

  op = staticmethod(delta.delta_rule)
  definition = staticmethod(delta_reference.delta_rule)
  operands = dict(q='BTNH', k='BTKH', v='BTKV', beta='BTK', decay='BTK',
                  s0='BKHV', starts='BT')
  optional = 'beta decay s0 starts'
  low = 'q k v'
  series = 'q k v beta decay starts'
  static = ''
  results = dict(y='BTNV', sT='BKHV')
  state = dict(sT='s0')

  @property
  def letters(self):
    decay = {'decay': 'BTKH'} if self.channels else {}
    return super().letters | decay

  def suit(self, normal, rng):
    every = dict(normal, starts=random_starts(rng, self.B, self.T))
    k = normal['k'][:, :1] + 0 * normal['k'] if self.same_keys else normal['k']
    every['k'] = k / np.linalg.norm(k, axis=-1, keepdims=True)
    if 'decay' in normal:
      every['decay'] = -np.exp(normal['decay'] - 1)
    if 'beta' in normal:
      every['beta'] = 2 / (1 + np.exp(-normal['beta']))
    for name, values in (('decay', self.decays), ('beta', self.betas)):
      if name in normal and values:
        steps = np.resize(np.float32(values), (1, self.T) + (1,) * (
            normal[name].ndim - 2))
        every[name] = np.broadcast_to(steps, normal[name].shape)
    return {name: every[name] for name in normal}

  call = Scan.call


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
