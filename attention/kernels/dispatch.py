"""Picks the implementation of an op: 'auto' may fall back, a name never does.

An op is a folder with one module or folder per implementation; see
`attention.kernels.contract`. This module alone knows which of them runs on
which platform.
"""

import contextlib
import contextvars
import importlib
import logging
import types
from typing import NamedTuple

import jax

# What 'auto' tries on each platform, best first. Elsewhere: xla alone.
PREFERENCE = {'tpu': ('tpu', 'xla'), 'gpu': ('gpu', 'cudnn', 'xla')}

# The platform of implementations that run on one alone.
PLATFORM = {'tpu': 'tpu', 'gpu': 'gpu', 'cudnn': 'gpu'}


class Call(NamedTuple):
  """A call of an op, as it was traced.

  Attributes:
    op: package of the op.
    implementation: its name.
    operands: of jax.ShapeDtypeStruct.
    rule: of the op.
  """
  op: str
  implementation: str
  operands: tuple
  rule: tuple


class Target(NamedTuple):
  """What programs are compiled for.

  Attributes:
    platform: 'cpu', 'gpu', 'tpu' or another one of jax.
    chip: of a TPU its generation ('v4', 'v5e', 'v5p', 'v6e', '7x'), of a GPU
      its compute capability ('9.0'), else ''.
  """
  platform: str
  chip: str


_pretended: contextvars.ContextVar = contextvars.ContextVar(
    'pretended', default=None)
_choices: contextvars.ContextVar = contextvars.ContextVar(
    'choices', default=None)
_calls: contextvars.ContextVar = contextvars.ContextVar(
    'calls', default=None)
_avoided: contextvars.ContextVar = contextvars.ContextVar(
    'avoided', default=types.MappingProxyType({}))


def target():
  """The Target: of jax's default backend, unless one is pretended."""
  return pretended() or _attached()


def pretended():
  """The Target that is pretended, or None."""
  return _pretended.get()


def _attached():
  platform = jax.default_backend()
  if platform == 'gpu':
    return Target(platform, str(jax.devices()[0].compute_capability))
  if platform == 'tpu':
    # Nothing for a CPU to load.
    from jax.experimental.pallas import tpu as pltpu
    return Target(platform, str(pltpu.get_tpu_info().chip_version))
  return Target(platform, '')


@contextlib.contextmanager
def pretend(platform, chip):
  """Traces as if for another target: to interpret, or to compile ahead.

  A function that jax.jit has traced before is not traced again: make a new one
  inside.
  """
  with _set(_pretended, Target(platform, chip)):
    yield


@contextlib.contextmanager
def record():
  """Yields {op: {implementation: why not a better one, or ''}}.

  Of every call that is traced inside: what really runs.
  """
  with _set(_choices, {}) as choices:
    yield choices


@contextlib.contextmanager
def listen():
  """Yields the list of Calls that are traced inside, all of them by xla.

  A kernel that cannot even be traced is heard of, too.
  """
  with _set(_calls, []) as calls:
    yield calls


@contextlib.contextmanager
def avoid(reasons):
  """Declines implementations inside: {(op, implementation): why}."""
  with _set(_avoided, {**_avoided.get(), **reasons}):
    yield


@contextlib.contextmanager
def _set(variable, value):
  token = variable.set(value)
  try:
    yield value
  finally:
    variable.reset(token)


def check(implementation):
  """Raises ValueError if a named implementation does not run on the target."""
  platform = target().platform
  if PLATFORM.get(implementation, platform) != platform:
    raise ValueError(f'attention_kernel={implementation} does not run on '
                     f'{platform}: use auto or xla')


def select(op, implementation, known, operands, rule):
  """Returns the module that implements one call of an op, and records it.

  Args:
    op: package of the op, such as 'attention.kernels.flash'.
    implementation: 'auto' or one of `known`.
    known: the names of the implementations in the op's package.
    operands: of the call.
    rule: of the call.

  Raises:
    ValueError: an unknown name, or one that does not run on the target.
    NotImplementedError: the named implementation declines the call.
  """
  if implementation != 'auto' and implementation not in known:
    raise ValueError(
        f'unknown implementation {implementation!r} of {op}: use auto, '
        + ', '.join(known))
  check(implementation)
  candidates = (implementation,)
  if implementation == 'auto':
    preferred = PREFERENCE.get(target().platform, ('xla',))
    candidates = [name for name in preferred if name in known]
  declined = []
  for name in candidates:
    module = importlib.import_module(f'{op}.{name}')
    try:
      if (op, name) in _avoided.get():
        raise NotImplementedError(_avoided.get()[op, name])
      module.check(operands, rule)
    except NotImplementedError as reason:
      declined.append(f'{name}: {reason}')
      continue
    _record(op, name, '; '.join(declined))
    if _calls.get() is not None:
      shapes = jax.eval_shape(lambda: operands)
      _calls.get().append(Call(op, name, shapes, rule))
      return importlib.import_module(f'{op}.xla')
    return module
  raise NotImplementedError(f'{op} cannot run here: ' + '; '.join(declined))


def _record(op, name, note):
  choices = _choices.get()
  known = {} if choices is None else choices.setdefault(op, {})
  if note and name not in known:
    logging.warning('%s falls back to %s (%s)', op, name, note)
  known[name] = note


def require_hopper():
  """Raises NotImplementedError where kernels for Hopper cannot run."""
  chip = target().chip
  if chip != '9.0':
    raise NotImplementedError(
        f'gpu needs Hopper (compute capability 9.0), not {chip}')
