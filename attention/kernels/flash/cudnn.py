"""Softmax attention by cuDNN, where it does exactly what is asked.

jax.nn.dot_product_attention(implementation='cudnn') gives lse in the dtype of q
and computes its own residuals, so the entry points below it are called: they
return lse in float32 and take it back. Their backward pass takes the output,
not delta = rowsum(dout out), and so is given an output with that delta.

cuDNN may add up dq in another order on every run, unless XLA runs with
--xla_gpu_deterministic_ops.
"""

import inspect

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused


def check(q, k, v, *, scale, causal, window, softcap, segment_ids, sink,
          q_offset):
  """Raises NotImplementedError for what cuDNN does otherwise or not at all."""
  del scale, sink
  capability = _capability()
  if capability is None:
    raise NotImplementedError('cudnn needs an NVIDIA GPU')
  try:
    fused.check_cudnn_version()
  except RuntimeError as reason:
    raise NotImplementedError(f'cudnn cannot be loaded: {reason}') from reason
  if capability < 8.0:
    raise NotImplementedError(
        f'cudnn needs compute capability 8.0, not {capability}')
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
        f'cudnn takes bfloat16 and float16, not {q.dtype}')
  H, V = q.shape[-1], v.shape[-1]
  widest = 256 if capability >= 9.0 else 128
  if H != V or H % 8 or widest < H:
    raise NotImplementedError(
        f'cudnn takes H = V that 8 divides, up to {widest}, not {H} and {V}')
  if softcap:
    raise NotImplementedError(f'cudnn has no softcap ({softcap})')
  if segment_ids is not None:
    raise NotImplementedError('cudnn has no segment_ids')
  if causal and not (isinstance(q_offset, int) and q_offset == 0
                     and q.shape[1] == k.shape[1]):
    raise NotImplementedError(
        f'cudnn takes causal with T = S and q_offset 0, not T {q.shape[1]}, '
        f'S {k.shape[1]}, q_offset {q_offset}')


def forward(q, k, v, q_ids, kv_ids, q_offset, *, scale, causal, window,
            softcap):
  """Returns out [B,T,N,V] and lse [B,N,T]; see the package."""
  del q_ids, kv_ids, q_offset, softcap  # declined by check
  return fused.dot_product_attention(
      q, k, v, scale=scale, mask_type=_mask(causal),
      sliding_window_length=window or None, return_residual=True)


def backward(q, k, v, q_ids, kv_ids, q_offset, dout, lse, delta, *, scale,
             causal, window, softcap):
  """Returns the gradients of q, k and v; see the package.

  Where a row of dout is zero and its delta is not (lse is differentiated and
  out is not used), no output has that delta: the gradients are NaN.
  """
  del q_ids, kv_ids, q_offset, softcap  # declined by check
  dout = dout.astype(q.dtype)
  unused = jnp.zeros(0, q.dtype)
  extra = {}
  if 'score_mod' in inspect.signature(fused.dot_product_attention).parameters:
    extra['score_mod'] = None  # since jax 0.12
  return tuple(fused._dot_product_attention_bwd_p_wrapper.bind(
      q, k, v, *[unused] * 7, lse, _output_of(dout, delta), dout, scale=scale,
      seed=42, dropout_rate=0.0, variadic_args=(False, False),
      mask_type=_mask(causal), layout=fused.AttentionLayout.BTNH.value,
      sliding_window_length=window or None, **extra))


def _output_of(dout, delta):
  """The shortest out [B,T,N,V] with rowsum(dout out) = delta [B,N,T]."""
  wide = dout.astype(jnp.float32)
  square = jnp.sum(wide * wide, axis=-1, keepdims=True)
  delta = jnp.swapaxes(delta, 1, 2)[..., None]
  ratio = jnp.where(delta == 0, 0.0, delta / square)
  ratio = jnp.where(jnp.isinf(ratio), jnp.nan, ratio)
  return (wide * ratio).astype(dout.dtype)


def _mask(causal):
  return fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK


def _capability():
  """Of the first GPU; 9.0 on a CPU, which compiles ahead of time; or None."""
  platform = jax.default_backend()
  if platform == 'cpu':
    return 9.0
  if platform != 'gpu':
    return None
  # A ROCm device says 'gfx...'.
  capability = str(jax.devices()[0].compute_capability)
  return None if capability.startswith('gfx') else float(capability)
