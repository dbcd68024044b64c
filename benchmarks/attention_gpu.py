"""Times attention on a Hopper GPU: these kernels, cuDNN and PyTorch.

All contenders take turns in one process; the best of the turns counts. Each
turn queues a number of calls and waits for the last, so that what is timed is
the GPU. TFLOP/s count the products of visible query-key pairs alone: two in the
forward pass, five in the backward pass.

  python benchmarks/attention_gpu.py --lengths 1024 4096 --widths 128
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels.flash import flash_attention, reference

try:
  import torch
except ImportError:
  torch = None

TOKENS = 32_768  # of a batch, at every length
MODEL_WIDTH = 2_048  # heads times width
WINDOW = 1_024
SOFTCAP = 50.0
BASELINE = 'jax.nn cudnn'


def parse_arguments():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--lengths', type=int, nargs='+',
                      default=[1024 * 2 ** i for i in range(6)])
  parser.add_argument('--widths', type=int, nargs='+', default=[64, 128])
  parser.add_argument('--group', type=int, default=1,
                      help='query heads of a key head')
  parser.add_argument('--turns', type=int, default=5)
  parser.add_argument('--calls', type=int, default=20, help='in a turn')
  parser.add_argument('--features', action='store_true',
                      help='what softcap, segments and sink cost instead')
  return parser.parse_args()


def missing_gpu(script):
  """Why nothing can be timed here, or ''."""
  if jax.default_backend() != 'gpu':
    return f'{script} needs a GPU; jax runs on {jax.default_backend()}'
  device = jax.devices()[0]
  if device.compute_capability != '9.0':
    return (f'{script} times Hopper kernels (compute capability 9.0); this is '
            f'{device.device_kind} ({device.compute_capability})')
  return ''


def visible_pairs(T, window):
  seen = np.arange(1, T + 1, dtype=np.float64)
  return np.sum(np.minimum(seen, window) if window else seen)


def make_arrays(T, H, group):
  """q, k, v and dout of one row of the table."""
  N = MODEL_WIDTH // H
  B = max(1, TOKENS // T)
  shapes = [(B, T, n, H) for n in (N, N // group, N // group, N)]
  keys = jax.random.split(jax.random.key(0), 4)
  return [jax.random.normal(key, shape, jnp.bfloat16)
          for key, shape in zip(keys, shapes)]


def jax_contenders(window, scale):
  """{name: function of q, k, v}."""
  ours = lambda implementation: lambda q, k, v: flash_attention(
      q, k, v, scale=scale, window=window, implementation=implementation)[0]
  return {
      'gpu': ours('gpu'), 'cudnn': ours('cudnn'),
      BASELINE: functools.partial(
          jax.nn.dot_product_attention, scale=scale, is_causal=True,
          local_window_size=(window - 1, 0) if window else None,
          implementation='cudnn')}


def feature_contenders(arrays, window, scale):
  """The same kernel with more asked of it, the first row being plain."""
  B, T, N, _ = arrays[0].shape
  ids = jnp.broadcast_to(jnp.zeros(T, jnp.int32), (B, T))
  options = {
      'plain': {}, 'softcap': dict(softcap=SOFTCAP),
      'one segment': dict(segment_ids=ids), 'sink': dict(sink=jnp.zeros(N))}
  options['all'] = functools.reduce(dict.__or__, options.values())
  return {
      name: lambda q, k, v, extra=extra: flash_attention(
          q, k, v, scale=scale, window=window, implementation='gpu', **extra)[0]
      for name, extra in options.items()}


def jax_pair(function, arrays):
  """Thunks that queue the forward and the backward pass, and what waits."""
  *inputs, dout = arrays
  forward = jax.jit(function)
  _, pull = jax.jit(lambda *x: jax.vjp(function, *x))(*inputs)
  backward = jax.jit(lambda pull, dout: pull(dout))
  return (lambda: forward(*inputs), lambda: backward(pull, dout),
          jax.block_until_ready)


def torch_pair(arrays, scale):
  """The same of scaled_dot_product_attention, which picks its own kernel."""
  attend = functools.partial(
      torch.nn.functional.scaled_dot_product_attention, is_causal=True,
      scale=scale, enable_gqa=arrays[0].shape[2] != arrays[1].shape[2])
  q, k, v, dout = (
      torch.from_dlpack(x).transpose(1, 2).contiguous() for x in arrays)
  leaves = [x.requires_grad_() for x in (q, k, v)]
  out = attend(*leaves)

  def forward():
    with torch.no_grad():
      attend(*leaves)

  backward = lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
  return forward, backward, lambda _: torch.cuda.synchronize()


def measure(pairs, turns, calls):
  """{name: [seconds forward, seconds backward]}, the best of the turns."""
  best = {name: [np.inf, np.inf] for name in pairs}
  for turn in range(turns + 1):
    for name, (*thunks, wait) in pairs.items():
      for i, thunk in enumerate(thunks):
        wait(thunk())
        start = time.perf_counter()
        for _ in range(calls):
          result = thunk()
        wait(result)
        if turn:  # the first warms up
          seconds = (time.perf_counter() - start) / calls
          best[name][i] = min(best[name][i], seconds)
  return best


def check_results():
  """Raises unless the kernels are right: wrong ones are not worth timing."""
  q, k, v, _ = (x[:1, :, :2] for x in make_arrays(1024, 128, 1))
  scale = 128 ** -0.5
  wide = [x.astype(jnp.float32) for x in (q, k, v)]
  wanted = reference.attention(*wide, scale=scale, window=300)[0]
  for name, function in jax_contenders(300, scale).items():
    error = function(q, k, v).astype(jnp.float32) - wanted
    relative = jnp.sqrt(jnp.mean(error ** 2) / jnp.mean(wanted ** 2))
    if not relative < 1e-2:
      raise RuntimeError(f'{name} is wrong: relative error {relative:.1e}')


def bench_row(T, H, window, arguments):
  """Prints one line a contender."""
  arrays = make_arrays(T, H, arguments.group)
  scale = H ** -0.5
  if arguments.features:
    contenders = feature_contenders(arrays, window, scale)
  else:
    contenders = jax_contenders(window, scale)
  pairs = {name: jax_pair(f, arrays) for name, f in contenders.items()}
  if not arguments.features and not window and (
      torch is not None and torch.cuda.is_available()):
    pairs['torch SDPA'] = torch_pair(arrays, scale)
  best = measure(pairs, arguments.turns, arguments.calls)
  base = best['plain' if arguments.features else BASELINE]
  B, _, N, _ = arrays[0].shape
  product = 2 * B * N * H * visible_pairs(T, window) / 1e12
  for name, (forward, backward) in best.items():
    print(f'{T:6d} {H:4d} {window:6d}  {name:12s} {forward * 1e3:8.3f} '
          f'{backward * 1e3:8.3f} {2 * product / forward:8.0f} '
          f'{5 * product / backward:8.0f}   {base[0] / forward:6.2f} '
          f'{base[1] / backward:6.2f}', flush=True)


def main():
  arguments = parse_arguments()
  reason = missing_gpu('attention_gpu.py')
  if reason:
    raise SystemExit(reason)
  check_results()
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, torch '
        f'{torch.__version__ if torch else "absent"}, {TOKENS} tokens, '
        f'{arguments.group} query heads a key head, bfloat16, causal')
  print('length  width window contender   ms forward, backward, '
        'TFLOP/s forward, backward, speed over '
        + ('plain' if arguments.features else BASELINE))
  for H in arguments.widths:
    for T in arguments.lengths:
      for window in (0, WINDOW) if T > WINDOW else (0,):
        bench_row(T, H, window, arguments)


if __name__ == '__main__':
  main()
