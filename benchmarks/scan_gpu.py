"""Times the recurrent ops on a Hopper GPU, beside what the hardware allows.

  python -m benchmarks.scan_gpu
  python -m benchmarks.scan_gpu --op chunked --lengths 2048 --calls 50

All contenders take turns in one process; the best of the turns counts. A turn
queues a number of calls and waits for the last, so that what is timed is the
GPU. The floor is the larger of two times: the bytes that must move over the
bandwidth of a copy, measured here, and the arithmetic over the data sheet's
rate (exponentials of the scan, tensor core products of linear attention). The
rows of mamba_ssm and fla appear where those are installed.
"""

import argparse
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels import chunked, scan
from attention.kernels.chunked import reference as chunked_reference
from attention.kernels.scan import reference as scan_reference
from benchmarks.attention_gpu import measure, missing_gpu

# H100 SXM and H200: 132 multiprocessors at 1.755 GHz with all of them at work.
EXPONENTIALS = 132 * 16 * 1.755e9  # a second
PRODUCTS = 989e12 / 2  # of bfloat16, a second
COPY_BYTES = 1 << 30
TOKENS = 16_384  # of a batch, at every length
CHANNELS = (1_536, 4_096)  # E
STATES = (16, 64)  # M
HEADS = 16
WIDTHS = (64, 128)  # H = V
CHUNK = 64  # of linear attention


def parse_arguments():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--op', choices=('scan', 'chunked'), default='scan')
  parser.add_argument('--lengths', type=int, nargs='+',
                      default=[2_048, 16_384])
  parser.add_argument('--turns', type=int, default=5)
  parser.add_argument('--calls', type=int, default=20, help='in a turn')
  # The code paths at a tiny size, without a GPU.
  parser.add_argument('--smoke', action='store_true', help=argparse.SUPPRESS)
  return parser.parse_args()


def optional(module, name):
  """A function of a package, None where that is not installed."""
  try:
    return getattr(importlib.import_module(module), name)
  except ImportError:
    return None


def normal(shapes, dtype):
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [jax.random.normal(key, shape, dtype)
          for key, shape in zip(keys, shapes)]


def scan_arrays(batch, T, E, M):
  """x, dt, A, B, C, D, z, dt_bias and the gradient of y."""
  series, shared = (batch, T, E), (batch, T, M)
  x, dt, B, C, z, dy = normal(
      [series, series, shared, shared, series, series], jnp.bfloat16)
  A, D, bias = normal([(E, M), (E,), (E,)], jnp.float32)
  return [x, dt, -jnp.exp(A), B, C, D, z, bias - 4, dy]


def scan_op(op, x, dt, A, B, C, D, z, dt_bias):
  return op(x, dt, A, B, C, D, z=z, dt_bias=dt_bias)[0]


def scan_torch(op, x, dt, A, B, C, D, z, dt_bias):
  """The CUDA kernel of mamba_ssm, which wants time last."""
  x, dt, B, C, z = (a.transpose(1, 2).contiguous() for a in (x, dt, B, C, z))
  y = op(x, dt, A, B, C, D=D, z=z, delta_bias=dt_bias, delta_softplus=True)
  return y.transpose(1, 2)


def scan_floor(bandwidth, x, dt, A, B, C, D, z, dt_bias, dy):
  """Least seconds of the forward pass, and of both.

  Backwards every exponential is computed again, and four series are read and
  three written, where forwards three are read and one is written.
  """
  series, shared = x.nbytes, B.nbytes + C.nbytes
  exponentials = x.size * A.shape[1] / EXPONENTIALS
  forward = max((4 * series + shared) / bandwidth, exponentials)
  backward = max((7 * series + 3 * shared) / bandwidth, exponentials)
  return forward, forward + backward


def chunked_arrays(batch, T, H):
  """q, k, v and the gradient of y."""
  arrays = normal([(batch, T, HEADS, H)] * 4, jnp.bfloat16)
  return [array * H ** -0.5 for array in arrays]


def chunked_op(op, q, k, v):
  return op(q, k, v)[0]


def chunked_torch(op, q, k, v):
  return op(q, k, v, scale=1.0, normalize=False)[0]


def chunked_floor(bandwidth, q, k, v, dy):
  """Least seconds of the forward pass, and of both.

  Forwards two products with the state and two with half a chunk; backwards
  each has two of its size.
  """
  products = q.size * (2 * v.shape[-1] + CHUNK) / PRODUCTS
  forward = max(4 * q.nbytes / bandwidth, products)
  backward = max(7 * q.nbytes / bandwidth, 2 * products)
  return forward, forward + backward


def jax_pair(function, arrays):
  """Thunks of the forward pass and of both passes, and what waits for them."""
  *inputs, dy = arrays
  forward = jax.jit(function)
  both = jax.jit(lambda dy, *inputs: jax.vjp(function, *inputs)[1](dy))
  return (lambda: forward(*inputs), lambda: both(dy, *inputs),
          jax.block_until_ready)


def torch_pair(function, arrays):
  import torch
  *inputs, dy = (torch.from_dlpack(array) for array in arrays)
  leaves = [array.clone().requires_grad_() for array in inputs]

  def forward():
    with torch.no_grad():
      return function(*leaves)

  return (forward, lambda: torch.autograd.grad(function(*leaves), leaves, dy),
          lambda _: torch.cuda.synchronize())


def copy_bandwidth(size, turns, calls):
  """Bytes a second, read and written, of a copy."""
  array = jnp.zeros(size // 4, jnp.float32)
  copy = jax.jit(lambda array: array + 1)
  thunk = lambda: copy(array)
  best = measure(
      {'copy': (thunk, thunk, jax.block_until_ready)}, turns, calls)
  return 2 * array.nbytes / min(best['copy'])


def bench_row(op, shape, arrays, floor, bandwidth, implementations, arguments):
  """Checks the contenders against the definition, then prints a line each."""
  adapt, jax_op, definition, torch_adapt, torch_op = op
  *inputs, _ = arrays
  wanted = np.asarray(
      jax.jit(functools.partial(adapt, definition))(*inputs), np.float32)
  pairs = {}
  for name in implementations:
    function = functools.partial(
        adapt, functools.partial(jax_op, implementation=name))
    pairs[name] = jax_pair(function, arrays)
  if torch_op is not None:
    pairs['torch'] = torch_pair(
        functools.partial(torch_adapt, torch_op), arrays)
  for name, (forward, _, wait) in pairs.items():
    got = forward()
    wait(got)
    got = np.asarray(got if name in implementations else got.float().cpu(),
                     np.float32)
    error = np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted ** 2))
    if not error < 2e-2:
      raise RuntimeError(f'{name} is wrong: relative error {error:.1e}')
  best = measure(pairs, arguments.turns, arguments.calls)
  least = floor(bandwidth, *arrays)
  for name, seconds in best.items():
    print(f'{shape:30s} {name:6s}' + ''.join(
        f'{s * 1e3:10.3f} {low * 1e3:10.3f} {low / s:6.1%}'
        for s, low in zip(seconds, least)), flush=True)


def main():
  arguments = parse_arguments()
  reason = missing_gpu('scan_gpu.py')
  if reason and not arguments.smoke:
    raise SystemExit(reason)
  if arguments.smoke:
    arguments.turns, arguments.calls, arguments.lengths = 1, 1, [64]
  tokens, size = (64, 1 << 16) if arguments.smoke else (TOKENS, COPY_BYTES)
  bandwidth = copy_bandwidth(size, arguments.turns, arguments.calls)
  is_scan = arguments.op == 'scan'
  if is_scan:
    op = (scan_op, scan.selective_scan, scan_reference.selective_scan,
          scan_torch, optional('mamba_ssm.ops.selective_scan_interface',
                               'selective_scan_fn'))
    known = scan.IMPLEMENTATIONS
  else:
    op = (chunked_op, chunked.chunked_linear_attention,
          chunked_reference.chunked_linear_attention, chunked_torch,
          optional('fla.ops.linear_attn', 'chunk_linear_attn'))
    known = chunked.IMPLEMENTATIONS
  implementations = [
      name for name in ('gpu', 'xla')
      if name in known and not (arguments.smoke and name == 'gpu')]
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, bfloat16, '
        f'{tokens} tokens, copies at {bandwidth / 1e9:.0f} GB/s')
  print(f'{"":37s}forward ms,      floor, reached; both passes ms, floor, '
        'reached')
  for T in arguments.lengths:
    batch = max(1, tokens // T)
    if is_scan:
      rows = [(f'B {batch} T {T} E {E} M {M}', scan_arrays(batch, T, E, M))
              for E in ((128,) if arguments.smoke else CHANNELS)
              for M in STATES]
    else:
      rows = [(f'B {batch} T {T} N {HEADS} H {H}', chunked_arrays(batch, T, H))
              for H in WIDTHS]
    for shape, arrays in rows:
      bench_row(op, shape, arrays, scan_floor if is_scan else chunked_floor,
                bandwidth, implementations, arguments)


if __name__ == '__main__':
  main()
