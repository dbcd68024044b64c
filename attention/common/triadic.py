"""The triadic modulation of co4 and its softmaxes: pure functions of arrays.

The equations are in attention/co4.py. The functions that make outputs take

  settings: Settings.
  latent: float32 [Q,N,H].
  sink: lambda of every head, float32 [N], or None.
  k, v: [B,T,N,H].
  starts: bool [B,T], where a segment starts, or None: nowhere.

and what `empty_stream` begins, and work on any subset of batch and heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention.kernels import running

# MOD(r, c): how a context c changes a representation r. tm1 to tm4 are
# transfer functions of Kay & Phillips, and leave r as it is where c is 0. Their
# exponents end where it no longer matters how large a number is.
MODS = {
    'cooperation': lambda r, c: jax.nn.relu6(
        r * r + 2 * r + c * (1 + jnp.abs(r))),
    'tm1': lambda r, c: r / 2 * (1 + jnp.exp(jnp.minimum(r * c, 30.0))),
    'tm2': lambda r, c: r + r * c,
    'tm3': lambda r, c: r * (1 + jnp.tanh(r * c)),
    'tm4': lambda r, c: r * jnp.exp2(jnp.minimum(r * c, 40.0)),
}

# Products of larger numbers could be infinite, and 0 * inf in a masked sum
# would carry that from one document to the next.
LARGEST = 1e15

# Letters of latent, sink, k, v, starts; of the sums (one a loop) and the count
# of the means and the three numbers of the running softmax; of q, k and v; of
# scores and values.
INPUTS = ('QNH', 'N', 'BTNH', 'BTNV', 'BT')
MEANS = ('B_NH', 'B')
STREAM = (*MEANS, 'BNQ', 'BNQ', 'BNQV')
QKV = ('BTNQH', 'BTNH', 'BTNV')
SCORED = ('BTNQ', 'BTNV')


class Settings(NamedTuple):
  mod_fn: str  # A key of MODS.
  loops: int
  softcap: float  # Bound of the scores, or 0.
  implementation: str  # Of the statistics, or of attention.


def check(options, modes):
  """Raises ValueError for options of co4 that are not to be had."""
  if options.co4_mode not in modes:
    raise ValueError(
        f'co4_mode ({options.co4_mode}) must be {" or ".join(modes)} here: '
        'bidirectional, for co4.Encoder, sees what a language model predicts')
  if options.disable_flash_attention and options.co4_mode != 'exact':
    raise ValueError('disable_flash_attention has no effect on co4_mode='
                     f'{options.co4_mode}: drop it or use co4_mode=exact')


def empty_stream(batch, shape, *, loops, pooled):
  """The state of the means and, if `pooled`, of a running softmax.

  Args:
    batch: B.
    shape: (Q, N, H).
    loops: each has a mean of its own.
    pooled: whether there is a running softmax.
  """
  Q, N, H = shape
  means = jnp.zeros((batch, loops, N, H)), jnp.zeros(batch, jnp.int32)
  if not pooled:
    return means
  return *means, *running.empty_softmax(batch, N, Q, H)


def _refine(settings, latent, k, v, mean):
  """(q [B,T,Q,N,H], k, v), float32, after the loops.

  `mean` is a function (loop, x) -> the mean of x over what each token sees.
  """
  change = MODS[settings.mod_fn]
  mod = lambda r, c: jnp.clip(change(r, c), -LARGEST, LARGEST)
  k, v = k.astype(jnp.float32), v.astype(jnp.float32)
  q = jnp.broadcast_to(latent, (*k.shape[:2], *latent.shape))
  for i in range(settings.loops):
    q = mod(q, mean(i, (k + v) / 2)[:, :, None])
    question = q.mean(2)
    k = mod(k, (question + v) / 2)
    v = mod(v, (question + k) / 2)
  return q, k, v


def _refine_stream(settings, latent, k, v, means, starts, implementation):
  """`_refine` with running means, and their state after the last step."""
  sums, count = means
  after = []

  def mean(i, x):
    y, (total, counted) = running.running_mean(
        x, (sums[:, i], count), starts, implementation=implementation)
    after.append((total, counted))
    return y
  qkv = _refine(settings, latent, k, v, mean)
  if after:
    sums, count = jnp.stack([total for total, _ in after], 1), after[-1][1]
  return qkv, (sums, count)


def _scores(settings, q, k):
  s = jnp.einsum('BTQNH,BTNH->BTNQ', q, k, precision='highest')
  s *= q.shape[-1] ** -0.5
  cap = settings.softcap
  return cap * jnp.tanh(s / cap) if cap else s


def streaming(settings, latent, sink, k, v, starts, *stream):
  """The averages float32 [B,T,N,H] of tokens scored on arrival; the stream."""
  implementation = settings.implementation

  def step(inputs, stream, starts):
    *means, top, total, acc = stream
    (q, k, v), means = _refine_stream(
        settings, latent, *inputs, means, starts, implementation)
    y, softmax = running.running_softmax(
        _scores(settings, q, k), v, (top, total, acc), starts, sink=sink,
        implementation=implementation)
    return y, (*means, *softmax)
  return running.in_chunks(step, (k, v), stream, starts)


def scored(settings, latent, sink, k, v, starts, *stream):
  """What `streaming` averages, (scores [B,T,N,Q], v), float32; the means."""
  del sink

  def step(inputs, means, starts):
    (q, k, v), means = _refine_stream(
        settings, latent, *inputs, means, starts, settings.implementation)
    return (_scores(settings, q, k), v), means
  return running.in_chunks(step, (k, v), stream[:len(MEANS)], starts)


def exact(settings, latent, sink, k, v, starts, *means):
  """What is to attend, (q [B,T,N,Q,H], k, v) in k's dtype; the means."""
  del sink  # For the attention that follows.
  dtype = k.dtype

  def step(inputs, means, starts):
    (q, k, v), means = _refine_stream(
        settings, latent, *inputs, means, starts, 'auto')
    return tuple(
        x.astype(dtype) for x in (jnp.swapaxes(q, 2, 3), k, v)), means
  return running.in_chunks(step, (k, v), means, starts)


def bidirectional(settings, latent, sink, k, v, starts):
  """Averages float32 [B,T,N,H] where all sums are over the whole segment.

  Such a sum is the running one at the segment's last token.
  """
  B, T, N, H = k.shape
  end = jnp.full((1, T), T - 1)
  if starts is not None:
    last = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(
        jnp.where(last, jnp.arange(T), T), axis=1, reverse=True)

  def whole(statistic, *inputs, **kwargs):
    prefixes, _ = statistic(
        *inputs, starts, implementation=settings.implementation, **kwargs)
    return jnp.take_along_axis(prefixes, end[..., None, None], 1)

  empty = (jnp.zeros((B, N, H)), jnp.zeros(B, jnp.int32))
  q, k, v = _refine(settings, latent, k, v,
                    lambda i, x: whole(running.running_mean, x, empty))
  return whole(
      running.running_softmax, _scores(settings, q, k), v,
      running.empty_softmax(B, N, latent.shape[0], H), sink=sink)
