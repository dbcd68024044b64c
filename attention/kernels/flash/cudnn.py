"""Softmax attention by cuDNN, where it does exactly what is asked.

jax.nn.dot_product_attention(implementation='cudnn') gives lse in the dtype of q
and computes its own residuals, so the entry points below it are called: they
return lse in float32 and take it back. Their backward pass takes the output,
not delta = rowsum(dout out), and so is given an output with that delta.

cuDNN may add up dq in another order on every run, unless XLA runs with
--xla_gpu_deterministic_ops.
"""

import inspect

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

from attention.kernels import dispatch
from attention.kernels.flash import decline_bias


def check(operands, rule):
  """Raises NotImplementedError for what cuDNN does otherwise or not at all."""
  q, k, v, q_ids, _, q_offset, *_ = operands
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
  decline_bias('cudnn', operands)
  H, V = q.shape[-1], v.shape[-1]
  widest = 256 if capability >= 9.0 else 128
  if H != V or H % 8 or widest < H:
    raise NotImplementedError(
        f'cudnn takes H = V that 8 divides, up to {widest}, not {H} and {V}')
  if rule.softcap:
    raise NotImplementedError(f'cudnn has no softcap ({rule.softcap})')
  if q_ids is not None:
    raise NotImplementedError('cudnn has no segment_ids')
  if rule.causal and (rule.q_offset != 0 or q.shape[1] != k.shape[1]):
    raise NotImplementedError(
        f'cudnn takes causal with T = S and q_offset 0, not T {q.shape[1]}, '
        f'S {k.shape[1]}, q_offset {q_offset}')


def forward(operands, rule):
  """Returns out [B,T,N,V] and lse [B,N,T]; see the package."""
  q, k, v, *_ = operands
  return fused.dot_product_attention(
      q, k, v, scale=rule.scale, mask_type=_mask(rule),
      sliding_window_length=rule.window or None, return_residual=True)


def backward(operands, rule, saved, dout):
  """Returns the gradients of q, k and v; see the package.

  Where a row of dout is zero and its delta is not (lse is differentiated and
  out is not used), no output has that delta: the gradients are NaN.
  """
  q, k, v, *_ = operands
  lse, delta = saved
  dout = dout.astype(q.dtype)
  unused = jnp.zeros(0, q.dtype)
  extra = {}
  if 'score_mod' in inspect.signature(fused.dot_product_attention).parameters:
    extra['score_mod'] = None  # since jax 0.12
  return tuple(fused._dot_product_attention_bwd_p_wrapper.bind(
      q, k, v, *[unused] * 7, lse, _output_of(dout, delta), dout,
      scale=rule.scale,
      seed=42, dropout_rate=0.0, variadic_args=(False, False),
      mask_type=_mask(rule), layout=fused.AttentionLayout.BTNH.value,
      sliding_window_length=rule.window or None, **extra))


def _output_of(dout, delta):
  """The shortest out [B,T,N,V] with rowsum(dout out) = delta [B,N,T]."""
  wide = dout.astype(jnp.float32)
  square = jnp.sum(wide * wide, axis=-1, keepdims=True)
  delta = jnp.swapaxes(delta, 1, 2)[..., None]
  ratio = jnp.where(delta == 0, 0.0, delta / square)
  ratio = jnp.where(jnp.isinf(ratio), jnp.nan, ratio)
  return (wide * ratio).astype(dout.dtype)


def _mask(rule):
  return fused.MaskType.CAUSAL if rule.causal else fused.MaskType.NO_MASK


def _capability():
  """Of the target, None where it is no GPU of NVIDIA's (ROCm says 'gfx...')."""
  platform, chip = dispatch.target()
  return None if platform != 'gpu' or chip.startswith('gfx') else float(chip)
