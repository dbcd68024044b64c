"""Picks the implementation of an op: 'auto' may fall back, a name never does.

An op is a folder with one module per implementation (`xla.py`, `tpu.py`,
`gpu.py`). Each module has a function `check(...)`, called with the op's
arguments, that raises NotImplementedError for what the implementation cannot
do, before anything is lowered.
"""

import collections
import importlib
import logging

import jax

# What 'auto' tries on each platform, best first. Elsewhere: xla alone.
PREFERENCE = {'tpu': ('tpu', 'xla'), 'gpu': ('gpu', 'cudnn', 'xla')}

# {op: {implementation: reason it was not the first choice, or ''}}, of every
# call traced so far: the record of what really runs.
CHOICES: dict[str, dict[str, str]] = collections.defaultdict(dict)


def select(op, implementation, known, *args, **kwargs):
  """Returns the module that implements one call of an op, and records it.

  Args:
    op: package of the op, such as 'attention.kernels.flash'.
    implementation: 'auto' or one of `known`.
    known: the names of the modules in the op's package.
    *args: the op's arguments, passed to `check`.
    **kwargs: likewise.

  Raises:
    ValueError: an unknown name.
    NotImplementedError: the named implementation declines the call.
  """
  if implementation != 'auto' and implementation not in known:
    raise ValueError(
        f'unknown implementation {implementation!r} of {op}: use auto, '
        + ', '.join(known))
  candidates = (implementation,)
  if implementation == 'auto':
    preferred = PREFERENCE.get(jax.default_backend(), ('xla',))
    candidates = [name for name in preferred if name in known]
  declined = []
  for name in candidates:
    module = importlib.import_module(f'{op}.{name}')
    try:
      module.check(*args, **kwargs)
    except NotImplementedError as reason:
      declined.append(f'{name}: {reason}')
      continue
    note = '; '.join(declined)
    if note and name not in CHOICES[op]:
      logging.warning('%s falls back to %s (%s)', op, name, note)
    CHOICES[op][name] = note
    return module
  raise NotImplementedError(f'{op} cannot run here: ' + '; '.join(declined))


def require_hopper():
  """Raises NotImplementedError where Mosaic GPU kernels for Hopper cannot run.

  A CPU passes: it interprets the kernels, or compiles them ahead of time.
  """
  platform = jax.default_backend()
  if platform == 'gpu':
    capability = jax.devices()[0].compute_capability
    if capability != '9.0':
      raise NotImplementedError(
          f'gpu needs Hopper (compute capability 9.0), not {capability}')
  elif platform != 'cpu':
    raise NotImplementedError(f'gpu cannot run on {platform}')
