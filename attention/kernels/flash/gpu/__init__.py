"""Flash attention for Hopper GPUs, in Mosaic GPU: three kernels.

docs/kernels.md has the design: who owns which rows, rings, turns. Scores live
in units of log 2, because the hardware's exponential is 2^x. The wgmma
instructions exist on compute capability 9.0 alone.
"""

import jax
import jax.numpy as jnp
from jax._src.lib import cuda_versions

from attention.kernels import dispatch
from attention.kernels.flash import decline_bias
from attention.kernels.flash.gpu import launch
from attention.kernels.flash.gpu.blocks import HEIGHT
from attention.kernels.mosaic_gpu import LOG2E, pad


def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  q, _, v, *_ = operands
  dispatch.require_hopper()
  decline_bias('gpu', operands)
  if rule.causal and jax.default_backend() == 'gpu':
    runtime = cuda_versions.cuda_runtime_get_version() if cuda_versions else 0
    # jax's own Mosaic GPU attention refuses these too: ptxas miscompiles it.
    if 12080 <= runtime < 12091:
      raise NotImplementedError(
          f'gpu needs CUDA 12.9.1 for causal masks, not {runtime}: '
          'CUDA 12.8 and 12.9.0 miscompile them')
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
        f'gpu takes bfloat16 and float16, not {q.dtype}, which the tensor '
        'cores would round')
  for name, width in (('H', q.shape[-1]), ('V', v.shape[-1])):
    if width % 16 or not 16 <= width <= 256:
      raise NotImplementedError(
          f'gpu takes {name} that 16 divides, up to 256, not {width}')
  if not rule.scale > 0:
    raise NotImplementedError(f'gpu takes a positive scale, not {rule.scale}')


def forward(operands, rule):
  """Returns out [B,T,N,V] and lse [B,N,T]; see the package."""
  q, k, v, *_ = operands
  T, N, H = q.shape[1:]
  S, K, V = v.shape[1:]
  # 64 registers hold a [64, 128] tile; wider heads need them for the sums.
  block = 128 if max(H, V) <= 128 else 64
  plan = launch.Plan(
      rule, operands.q_ids is not None, S, N // K, block, stages=2)
  arrays = {name: pad(x, axis=1) for name, x in dict(q=q, k=k, v=v).items()}
  results = launch.forward(plan, arrays, operands=operands)
  return results['out'][:, :T], results['lse'][..., :T]


def backward(operands, rule, saved, dout):
  """Returns the gradients of q, k and v; see the package."""
  (q, k, v, *_), (lse, delta) = operands, saved
  T, N, H = q.shape[1:]
  S, K, V = v.shape[1:]
  plan = launch.Plan(
      rule, operands.q_ids is not None, S, N // K, block=64,
      # Two stages take 512 bytes of shared memory for each lane of H and V.
      stages=2 if H + V <= 432 else 1)
  arrays = dict(q=q, k=k, v=v, dout=dout.astype(q.dtype))
  arrays = {name: pad(x, axis=1) for name, x in arrays.items()}
  # Rows past the end have q = dout = 0: with lse = delta = 0 they add nothing.
  arrays |= dict(lse=pad(lse * LOG2E, axis=-1, multiple=HEIGHT),
                 delta=pad(delta, axis=-1, multiple=HEIGHT))
  dq = launch.dq(plan, arrays, operands=operands)
  # Beside the scores, 240 registers do not hold two sums of wider heads.
  parts = [('dk', 'dv')] if max(H, V) <= 128 else [('dk',), ('dv',)]
  gradients = [
      x[:, :S] for names in parts
      for x in launch.dkv(plan, arrays, names=names, operands=operands)]
  return dq[:, :T], *gradients
