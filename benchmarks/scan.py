"""Times the recurrent ops against the other ways to write them.

  python -m benchmarks.scan                      # everything
  python -m benchmarks.scan --op scan --defaults
  python -m benchmarks.scan --op chunked --times 512 2048
  python -m benchmarks.scan --op delta --times 2048 4096 8192 16384 32768

All candidates of a table are checked against the op first, then timed in turns
of three runs in one process; a time is the least of its runs, as others may use
the machine, and threads of the candidate before may still spin.
All are compiled, and memory is kept, as training does it (train_lib/cpu.py).
The PyTorch rows appear where torch is installed.
"""

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels import chunked, delta, scan
from attention.kernels.delta import reference as delta_reference
from attention.kernels.scan import reference
from train_lib import cpu

try:
  import torch
except ImportError:
  torch = None


def associative_scan(x, dt, A, B, C, D):
  """All states at once, by a parallel prefix over the whole length."""
  delta = jax.nn.softplus(dt)[..., None]
  decay, inputs = jnp.exp(delta * A), delta * x[..., None] * B[:, :, None]

  def combine(left, right):
    return left[0] * right[0], left[1] * right[0] + right[1]

  _, h = jax.lax.associative_scan(combine, (decay, inputs), axis=1)
  return jnp.einsum('BTEM,BTM->BTE', h, C) + D * x


def torch_loop(x, dt, A, B, C, D):
  """One step after the other, the coefficients of all steps beforehand."""
  delta = torch.nn.functional.softplus(dt)
  decay = torch.exp(torch.einsum('bte,em->btem', delta, A))
  inputs = torch.einsum('bte,btm->btem', delta * x, B)
  h, y = torch.zeros_like(decay[:, 0]), []
  # Unbound at once: the gradient of an index is an array of zeros each step.
  for decay_t, inputs_t, C_t in zip(*(a.unbind(1) for a in (decay, inputs, C))):
    h = decay_t * h + inputs_t
    y.append(torch.einsum('bem,bm->be', h, C_t))
  return torch.stack(y, dim=1) + D * x


def quadratic(q, k, v):
  """Linear attention with all its weights, as softmax attention has them."""
  weights = jnp.einsum('BTNH,BSNH->BNTS', q, k)
  weights = jnp.where(jnp.tril(jnp.ones(weights.shape[2:], bool)), weights, 0.0)
  return jnp.einsum('BNTS,BSNV->BTNV', weights, v)


def torch_softmax(q, k, v):
  q, k, v = (array.transpose(1, 2) for array in (q, k, v))
  y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
  return y.transpose(1, 2)


def jax_calls(function, arguments, options):
  """Forward and forward+backward of a jax function, and its temporaries."""
  places = tuple(range(len(arguments)))
  both = jax.value_and_grad(
      lambda *arguments: function(*arguments).sum(), argnums=places)
  forward, both = (
      jax.jit(f, compiler_options=options).lower(*arguments).compile()
      for f in (function, both))
  megabytes = [program.memory_analysis().temp_size_in_bytes / 1e6
               for program in (forward, both)]
  return (lambda: jax.block_until_ready(forward(*arguments)),
          lambda: jax.block_until_ready(both(*arguments)), megabytes)


def torch_calls(function, arguments):
  arrays = [torch.tensor(np.asarray(a), requires_grad=True) for a in arguments]

  def forward():
    with torch.no_grad():
      return function(*arrays)

  def both():
    return torch.autograd.grad(function(*arrays).sum(), arrays)

  return forward, both, [math.nan, math.nan]


def compare(title, candidates, arguments, repeats, options):
  """Prints one table; the first candidate is ours, the others tell which.

  Args:
    title: what is printed above.
    candidates: {name: (function, whether its output must equal ours)}.
    arguments: jax arrays, handed to all.
    repeats: rounds, in each of which every candidate has a turn.
    options: compiler options for those of jax.
  """
  calls = {}
  for name, (function, _) in candidates.items():
    calls[name] = (
        torch_calls(function, arguments) if name.startswith('torch')
        else jax_calls(function, arguments, options))
  ours = next(iter(candidates))
  want = np.asarray(calls[ours][0]())
  for name, (_, equal) in candidates.items():
    got = np.asarray(calls[name][0]())
    if equal and not np.abs(got - want).max() <= 1e-4 * np.abs(want).max():
      raise SystemExit(f'{name} disagrees with {ours}: nothing is timed')

  seconds = {name: [math.inf, math.inf] for name in candidates}
  for _ in range(repeats):
    for name, (forward, both, _) in calls.items():
      for i, call in enumerate((forward, both)):
        for _ in range(3):
          start = time.perf_counter()
          call()
          elapsed = time.perf_counter() - start
          seconds[name][i] = min(seconds[name][i], elapsed)
  print(f'\n{title}\n{"":24} {"forward":>16} {"with backward":>16} '
        f'{"temporaries":>15}')
  for name, (forward, both) in seconds.items():
    versus = [t / base for t, base in zip((forward, both), seconds[ours])]
    print(f'{name:24} {1e3 * forward:7.1f} ms {versus[0]:4.1f}x '
          f'{1e3 * both:8.1f} ms {versus[1]:4.1f}x '
          f'{calls[name][2][1]:11.0f} MB')


def scan_table(repeats, options):
  batch, steps, channels, state = 2, 1024, 512, 16
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  series = (batch, steps, channels)
  arguments = (
      normal(*series), normal(*series) - 3, -jnp.exp(normal(channels, state)),
      normal(batch, steps, state), normal(batch, steps, state),
      normal(channels))
  candidates = {
      'selective_scan': (lambda *a: scan.selective_scan(*a)[0], True),
      'lax.associative_scan': (associative_scan, True),
      'lax.scan, autodiff': (lambda *a: reference.selective_scan(*a)[0], True)}
  if torch:
    candidates['torch loop'] = (torch_loop, True)
  compare(f'Selective scan, B {batch}, T {steps}, E {channels}, M {state}',
          candidates, arguments, repeats, options)


def chunked_table(steps, repeats, options):
  batch, heads, width = 2, 8, 64
  rng = np.random.default_rng(0)
  shape = (batch, steps, heads, width)
  q, k, v = (jnp.asarray(rng.standard_normal(shape) / width**0.5, jnp.float32)
             for _ in range(3))
  ours = lambda q, k, v, normalize=None: chunked.chunked_linear_attention(
      q, k, v, normalize=normalize)[0]
  candidates = {
      'chunked': (ours, True),
      'chunked, normalized': (functools.partial(ours, normalize=1.0), False),
      'quadratic': (quadratic, True)}
  if torch:
    candidates['torch softmax'] = (torch_softmax, False)
  compare(f'Linear attention, B {batch}, T {steps}, N {heads}, H {width}',
          candidates, (q, k, v), repeats, options)


def delta_table(steps, repeats, options):
  """First chunked linear attention, last two that go step by step."""
  batch, heads, width = 2, 8, 64
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  shape = (batch, steps, heads, width)
  arguments = (unit(normal(*shape)), unit(normal(*shape)), normal(*shape),
               jax.nn.sigmoid(normal(*shape[:3])), -jnp.exp(normal(*shape) - 2))

  def candidate(op, *, rule, decay):
    """Of what arguments it takes, the others have no gradient."""
    def call(q, k, v, beta, channels):
      by = dict(none=None, head=channels[..., 0], channel=channels)[decay]
      return op(q, k, v, beta=beta if rule else None, decay=by)[0]
    return call

  kinds = {'deltanet': dict(rule=True, decay='none'),
           'gated_deltanet': dict(rule=True, decay='head'),
           'kda': dict(rule=True, decay='channel'),
           'gla, hgrn2': dict(rule=False, decay='channel')}
  candidates = {'chunked': (lambda q, k, v, beta, channels: (
      chunked.chunked_linear_attention(q, k, v)[0]), True)}
  for name, kind in kinds.items():
    candidates[name] = candidate(delta.delta_rule, **kind), False
  if steps <= 2048:
    for name in ('gated_deltanet', 'gla, hgrn2'):
      candidates[f'{name}, lax.scan'] = candidate(
          delta_reference.delta_rule, **kinds[name]), False
  compare(f'The delta rule and decays by channel, B {batch}, T {steps}, '
          f'N {heads}, H {width}', candidates, arguments, repeats, options)


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--op', choices=('scan', 'chunked', 'delta', 'all'),
                      default='all')
  parser.add_argument('--times', type=int, nargs='+', metavar='T',
                      default=[512, 1024, 2048, 4096, 8192],
                      help='lengths for linear attention and the delta rule')
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--defaults', action='store_true',
                      help="XLA's and glibc's, not as training sets them")
  flags = parser.parse_args()
  options = None
  if not flags.defaults:
    cpu.keep_memory()
    options = cpu.compiler_options(jax.devices()[0])
  if flags.op in ('scan', 'all'):
    scan_table(flags.repeats, options)
  if flags.op in ('chunked', 'all'):
    for steps in flags.times:
      chunked_table(steps, flags.repeats, options)
  if flags.op in ('delta', 'all'):
    for steps in flags.times:
      delta_table(steps, flags.repeats, options)


if __name__ == '__main__':
  main()
