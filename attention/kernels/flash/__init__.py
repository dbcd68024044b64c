"""Softmax attention that never stores its scores: the op and its gradient.

The sink and the gradient of lse are handled here, once: both only change the
lse and the delta that the gradient is made from. So an implementation (see
`attention.kernels.contract`) knows neither:

  forward(operands, rule) -> (out [B,T,N,V], lse [B,N,T])
  backward(operands, rule, (lse, delta), dout) -> (dq, dk, dv)
      of p = exp(s - lse) and ds = p * (dout v^T - delta). With a bias also the
      sums of ds: over keys [B,T,N], and over queries, negative, [B,S,N].
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention.kernels import dispatch

IMPLEMENTATIONS = ('xla', 'plain', 'tpu', 'gpu', 'cudnn')

# exp of more overflows float32. A row whose tokens hold e^-80 of the mass has
# p = 0 to float32, so that the clamped value is never seen.
_MAX_EXPONENT = 80.0


class Operands(NamedTuple):
  """What an implementation gets."""
  q: Float[Array, 'B T N H']
  k: Float[Array, 'B S K H']
  v: Float[Array, 'B S K V']
  q_ids: Int[Array, 'B T'] | None
  kv_ids: Int[Array, 'B S'] | None
  q_offset: int | Int[Array, ''] | None  # an int where the rule has it
  row_bias: Float[Array, 'B T N A'] | None = None
  column_bias: Float[Array, 'B S N A'] | None = None


class Rule(NamedTuple):
  """What a program is compiled for."""
  scale: float
  causal: bool = True
  window: int = 0
  softcap: float = 0.0
  q_offset: int | None = 0  # None: it is an array


def flash_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K V'],
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    segment_ids: (
        Int[Array, 'B T'] | tuple[Int[Array, 'B T'], Int[Array, 'B S']] | None
    ) = None,
    sink: Float[Array, 'N'] | None = None,
    bias: tuple[Float[Array, 'B T N A'], Float[Array, 'B S N A']] | None = None,
    q_offset: int | Int[Array, ''] = 0,
    implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N T']]:
  """Attends from q to k and v, with s_ij = scale * q_i k_j before the mask.

  Query head n reads key and value head n // (N / K). A query that sees no key
  gets output 0, lse -inf and zero gradients.

  Args:
    q: queries.
    k: keys, of the dtype of q.
    v: values, of the dtype of q.
    scale: factor of the scores.
    causal: query i sees key j only if j <= i + q_offset.
    window: 0, or the number of tokens seen, oneself included:
      j > i + q_offset - window. Needs causal.
    softcap: 0, or the bound c of the scores: s <- c tanh(s / c).
    segment_ids: one array for queries and keys (T == S) or a pair of them; a
      query sees the keys of its own id alone.
    sink: lambda, log of a constant in each head's denominator:
      p_ij = e^{s_ij} / (e^lambda + sum_j e^{s_ij}).
    bias: numbers r of every query and c of every key, for each query head:
      s_ij <- s_ij + sum_a (r_ia - c_ja), after the softcap, which bounds what
      the products say. Addends are subtracted one by one: sums of many terms,
      given as a float32 and what it lost, have differences to the last bit.
    q_offset: position of the first query counted from the first key, an int
      (blocks are skipped at compile time) or an int32 scalar.
    implementation: 'auto' or one of IMPLEMENTATIONS.

  Returns:
    out, in the dtype of q, and lse, the log-sum-exp of each query's visible
    scores without the sink, in float32. Both are differentiable.

  Raises:
    ValueError: arguments that contradict each other.
    NotImplementedError: the named implementation cannot do what is asked.
  """
  _check_arguments(q, k, v, causal, window, softcap, segment_ids, sink, bias)
  q_ids, kv_ids = (segment_ids if isinstance(segment_ids, (tuple, list))
                   else (segment_ids, segment_ids))
  static = None
  if not isinstance(q_offset, jax.Array):
    static = q_offset = operator.index(q_offset)
  rule = Rule(
      float(scale), bool(causal), int(window), float(softcap), static)
  row_bias, column_bias = bias or (None, None)
  operands = Operands(
      q, k, v, q_ids, kv_ids, q_offset, row_bias, column_bias)
  module = dispatch.select(
      __name__, implementation, IMPLEMENTATIONS, operands, rule)
  q, k, v, sink, row_bias, column_bias = _varying_alike(
      q, k, v, sink, row_bias, column_bias)
  operands = Operands(
      q, k, v, q_ids, kv_ids, None if static is not None else q_offset,
      row_bias, column_bias)
  return _attend(module, rule, operands, sink)


def run(module, rule, operands):
  """(out, lse) of an implementation, differentiable in its operands."""
  return _attend(module, rule, operands, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(module, rule, operands, sink):
  return _attend_forward(module, rule, operands, sink)[0]


def _attend_forward(module, rule, operands, sink):
  q = operands.q
  out, lse = module.forward(_with_offset(operands, rule), rule)
  if sink is not None:
    kept = jax.nn.sigmoid(lse - sink.astype(lse.dtype)[:, None])
    # An empty row against a sink of -inf would be inf - inf.
    kept = jnp.where(jnp.isneginf(lse), 0.0, kept)
    out = (out * jnp.swapaxes(kept, 1, 2)[..., None]).astype(q.dtype)
  return (out, lse), (operands, sink, out, lse)


def _attend_backward(module, rule, residuals, cotangents):
  operands, sink, out, lse = residuals
  dout, dlse = cotangents
  delta = jnp.sum(dout.astype(lse.dtype) * out.astype(lse.dtype), axis=-1)
  delta = jnp.swapaxes(delta, 1, 2)
  finite_lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
  dsink = None
  if sink is None:
    backward_lse = finite_lse
    backward_delta = delta - dlse
  else:
    log_sink = sink.astype(lse.dtype)[:, None]
    backward_lse = jnp.logaddexp(lse, log_sink)
    backward_lse = jnp.where(jnp.isneginf(backward_lse), 0.0, backward_lse)
    dsink = -jnp.sum(jnp.exp(log_sink - backward_lse) * delta, axis=(0, 2))
    dsink = dsink.astype(sink.dtype)
    backward_delta = delta - dlse * jnp.exp(
        jnp.minimum(backward_lse - finite_lse, _MAX_EXPONENT))
  dq, dk, dv, *dbias = module.backward(
      _with_offset(operands, rule), rule, (backward_lse, backward_delta), dout)
  # All addends of a number have its gradient.
  dbias = [jnp.broadcast_to(dx[..., None], x.shape).astype(x.dtype)
           for dx, x in zip(dbias, operands[-2:])]
  return Operands(dq, dk, dv, None, None, None, *dbias), dsink


_attend.defvjp(_attend_forward, _attend_backward)


def _with_offset(operands, rule):
  """A static offset is no operand: a traced function would make it an array."""
  if rule.q_offset is None:
    return operands
  return operands._replace(q_offset=rule.q_offset)


def _varying_alike(*arrays):
  """Marks all as varying over the mesh axes of any, inside jax.shard_map.

  Its transpose sums the gradient of what was replicated, a sink for one, over
  those axes. XLA removes the sum with zero.
  """
  zero = sum(jnp.zeros_like(x, jnp.float32, shape=())
             for x in arrays if x is not None)
  return [x if x is None else x + zero.astype(x.dtype) for x in arrays]


def decline_bias(name, operands):
  """Raises NotImplementedError if there is a bias, which `name` has not."""
  if operands.row_bias is not None:
    raise NotImplementedError(f'{name} has no bias of the scores')


def _check_arguments(
    q, k, v, causal, window, softcap, segment_ids, sink, bias):
  """Raises ValueError for what no implementation could mean."""
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  if k.shape != (B, S, K, H) or v.shape[:3] != (B, S, K) or v.ndim != 4:
    raise ValueError(
        f'k {k.shape} and v {v.shape} must be [B,S,K,H] and [B,S,K,V] for q '
        f'[B,T,N,H] = {q.shape}')
  if N % K:
    raise ValueError(f'the heads of k ({K}) must divide those of q ({N})')
  if not q.dtype == k.dtype == v.dtype:
    raise ValueError(
        f'q, k and v must share a dtype, not {q.dtype}, {k.dtype}, {v.dtype}: '
        'cast them')
  if window < 0 or (window and not causal):
    raise ValueError(
        f'window ({window}) must be 0 (none) or positive with causal=True')
  if softcap < 0:
    raise ValueError(f'softcap ({softcap}) must be positive, or 0 for none')
  if sink is not None and sink.shape != (N,):
    raise ValueError(f'sink {sink.shape} must have one entry a head: ({N},)')
  if bias is not None:
    shapes = tuple(x.shape for x in bias)
    A = shapes[0][-1]
    if shapes != ((B, T, N, A), (B, S, N, A)):
      raise ValueError(
          f'bias {shapes} must be [B,T,N,A] and [B,S,N,A] = '
          f'{(B, T, N, A)}, {(B, S, N, A)}')
  if segment_ids is None:
    return
  pair = isinstance(segment_ids, (tuple, list))
  shapes = tuple(x.shape for x in (segment_ids if pair else [segment_ids] * 2))
  if shapes != ((B, T), (B, S)):
    raise ValueError(
        f'segment_ids {shapes} must be [B,T] and [B,S] = {(B, T)}, {(B, S)}: '
        'give a pair where T != S')
