"""Times attention on a CPU: this codebase, plain jnp, jax.nn and PyTorch.

All contenders take turns in one process, so that a busy machine is busy for
all; the best of the turns counts. Times are in ms, temporaries in MB.

  python benchmarks/attention_cpu.py --lengths 64 512 4096 --turns 5
"""

import argparse
import os
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels.flash import flash_attention
from train_lib import cpu

try:
  import torch
except ImportError:
  torch = None

# Length: (batch, heads, width). Short lengths are those of small recipes.
SHAPES = {64: (12, 4, 32), 256: (8, 6, 64)}
DEFAULT_SHAPE = (2, 8, 64)
# Above it, what stores its scores would need more than 8 GB.
LONGEST_STORED = 4096


def parse_arguments():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--lengths', type=int, nargs='+',
                      default=[64, 256, 512, 1024, 2048, 4096, 8192])
  parser.add_argument('--window', type=int, default=256,
                      help='window of a second row at each length >= 4096')
  parser.add_argument('--turns', type=int, default=5,
                      help='turns at length 4096; shorter ones get more')
  parser.add_argument('--keep_memory', action=argparse.BooleanOptionalAction,
                      default=True, help='have glibc keep freed memory mapped')
  return parser.parse_args()


def plain_jnp(q, k, v, *, scale, window):
  """The attention that one writes first."""
  T = q.shape[1]
  s = jnp.einsum('BTNH,BSNH->BNTS', q, k) * scale
  distance = jnp.arange(T)[:, None] - jnp.arange(T)
  seen = (distance >= 0) & ((distance < window) | (window == 0))
  p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf))
  return jnp.einsum('BNTS,BSNH->BTNH', p, v)


def jax_contenders(T, window, scale):
  """{name: function of q, k, v}."""
  ours = lambda q, k, v: flash_attention(
      q, k, v, scale=scale, window=window)[0]
  contenders = {'ours': ours}
  if T <= LONGEST_STORED:
    contenders['plain jnp'] = lambda q, k, v: plain_jnp(
        q, k, v, scale=scale, window=window)
    contenders['jax.nn'] = lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True,
        local_window_size=(window - 1, 0) if window else None)
  return contenders


def compiled_pair(function, arrays):
  """Thunks of the forward and the forward-and-backward pass, and its MB."""
  q, k, v, dout = map(jnp.asarray, arrays)

  def both(q, k, v, dout):
    out, pull = jax.vjp(function, q, k, v)
    return out, pull(dout)

  forward = jax.jit(function).lower(q, k, v).compile()
  both = jax.jit(both).lower(q, k, v, dout).compile()
  megabytes = both.memory_analysis().temp_size_in_bytes / 1e6
  return (lambda: jax.block_until_ready(forward(q, k, v)),
          lambda: jax.block_until_ready(both(q, k, v, dout)), megabytes)


def torch_pair(arrays, scale):
  """The same of PyTorch, which does not tell its temporaries."""
  attend = torch.nn.functional.scaled_dot_product_attention
  q, k, v, dout = (
      torch.tensor(x).transpose(1, 2).contiguous() for x in arrays)
  leaves = [x.requires_grad_() for x in (q, k, v)]

  def forward():
    with torch.no_grad():
      attend(*leaves, is_causal=True, scale=scale)

  def both():
    out = attend(*leaves, is_causal=True, scale=scale)
    torch.autograd.grad(out, leaves, dout)

  return forward, both, float('nan')


def measure(pairs, turns):
  """{name: [seconds forward, seconds both]}, the best of the turns."""
  best = {name: [np.inf, np.inf] for name in pairs}
  for turn in range(turns + 1):
    for name, (*thunks, _) in pairs.items():
      for i, thunk in enumerate(thunks):
        start = time.perf_counter()
        thunk()
        if turn:  # the first warms up
          best[name][i] = min(best[name][i], time.perf_counter() - start)
  return best


def bench_row(T, window, turns):
  """Prints one line a contender."""
  B, N, H = SHAPES.get(T, DEFAULT_SHAPE)
  random = np.random.default_rng(0)
  arrays = [random.normal(size=(B, T, N, H)).astype(np.float32)
            for _ in range(4)]
  scale = H ** -0.5
  pairs = {name: compiled_pair(function, arrays)
           for name, function in jax_contenders(T, window, scale).items()}
  if torch is not None and not window:
    pairs['torch SDPA'] = torch_pair(arrays, scale)
  best = measure(pairs, max(turns, min(200, turns * 1024 // T)))
  for name, (forward, both) in best.items():
    print(f'{T:6d} {window:6d}  {name:10s} {forward * 1e3:9.2f} '
          f'{both * 1e3:9.2f}   {best["ours"][0] / forward:6.2f} '
          f'{best["ours"][1] / both:6.2f}   {pairs[name][2]:8.1f}', flush=True)


def main():
  arguments = parse_arguments()
  if arguments.keep_memory:
    cpu.keep_memory()
  print('length window  contender    forward fwd + bwd   ours/it: fwd, both'
        '   temporaries')
  for T in arguments.lengths:
    for window in (0, arguments.window) if T >= 4096 else (0,):
      bench_row(T, window, arguments.turns)


if __name__ == '__main__':
  main()
