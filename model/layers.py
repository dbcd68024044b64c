"""The leaf of the house: parameters, dense layers, norms, rotary."""

import math

import jax
import jax.numpy as jnp
from flax import nnx


def param(value, letters, *, decay=None, n_inputs=0):
  """A float32 parameter, with what the trainer has to know about it.

  Args:
    value: the initial array.
    letters: one for every dimension, by which model.sharding splits it; '_' is
      never split.
    decay: whether weight decay applies; by default to matrices alone.
    n_inputs: of a matrix that multiplies activations, the number of leading
      dimensions that are summed over (Muon needs it); else 0.
  """
  decay = len(letters) > 1 if decay is None else decay
  return nnx.Param(jnp.asarray(value, jnp.float32), letters=letters,
                   decay=decay, n_inputs=n_inputs)


class Einsum(nnx.Module):
  """y = einsum(equation, x, w) for 'BT<in>,<in><out>->BT<out>'.

  Computed as one product of two matrices, which on CPU is up to twice as fast
  as the einsum and elsewhere the same.
  """

  def __init__(self, equation, shape, *, std, rngs, bias=False):
    source, rest = equation.split(',')
    weight, target = rest.split('->')
    self.n_contracted = len(source) - 2
    self.out_shape = tuple(shape[self.n_contracted:])
    if (source[2:] + target[2:] != weight or len(shape) != len(weight)
        or source[:2] != 'BT' or target[:2] != 'BT'):
      raise ValueError(f'not of the form BT<in>,<in><out>->BT<out>: {equation}')
    self.flops = 2 * math.prod(shape)  # Forward, per token.
    self.weight = param(
        std * jax.random.normal(rngs.params(), shape), weight,
        n_inputs=self.n_contracted)
    self.bias = param(
        jnp.zeros(self.out_shape), target[2:], decay=False) if bias else None

  def __call__(self, x):
    batch = x.shape[:x.ndim - self.n_contracted]
    width = math.prod(x.shape[x.ndim - self.n_contracted:])
    w = self.weight[...].astype(x.dtype).reshape(width, -1)
    y = (x.reshape(-1, width) @ w).reshape(*batch, *self.out_shape)
    return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def rms_normalize(x, *, eps=1e-6):
  """x / rms(x) over the last axis, computed in float32."""
  y = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
  return (y * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root mean square norm with a weight (Zhang & Sennrich 2019)."""

  def __init__(self, width, *, bias=False, eps=1e-6):
    del bias  # Has none, by definition.
    self.eps = eps
    self.weight = param(jnp.ones(width), '_')

  def __call__(self, x):
    return rms_normalize(x, eps=self.eps) * self.weight[...].astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer norm with a weight and, if asked for, a bias (Ba et al. 2016)."""

  def __init__(self, width, *, bias=False):
    self.weight = param(jnp.ones(width), '_')
    self.bias = param(jnp.zeros(width), '_') if bias else None

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)
    y = y * self.weight[...]
    return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


NORMS = {'rmsnorm': RMSNorm, 'layernorm': LayerNorm}


def norm(config, width):
  """The norm that norm_variant names."""
  return NORMS[config.norm_variant](width, bias=config.bias)


def rotary(x, positions, *, base, fraction=1.0):
  """Rotates pairs (h, h + H/2) by their positions (Su et al. 2021).

  Args:
    x: [B,T,N,H], H even.
    positions: [B,T].
    base: wavelengths run from 2 pi to 2 pi base.
    fraction: if below 1, the part of H that is rotated, rounded down to an
      even number and at least 2: the first numbers of a head, as if they were
      all. The others know nothing of positions.

  Returns:
    [B,T,N,H], in x's dtype; angles are float32.

  Raises:
    ValueError: what is to be rotated is of odd width.
  """
  if fraction < 1:
    turned, still = jnp.split(
        x, [max(int(fraction * x.shape[-1]) // 2 * 2, 2)], -1)
    return jnp.concatenate([rotary(turned, positions, base=base), still], -1)
  half = x.shape[-1] // 2
  if x.shape[-1] % 2:
    raise ValueError(
        f'rotary embeddings need an even head width, not {x.shape[-1]}: '
        'change n_head, n_embd or the flag that sets the width')
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin],
      -1).astype(x.dtype)


def segment_positions(segment_ids):
  """int32 [B,T]: the distance of every token to the start of its segment."""
  t = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
  before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  start = jnp.where(segment_ids != before, t, 0)
  return t - jax.lax.cummax(start, axis=1)
