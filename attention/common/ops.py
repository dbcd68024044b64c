"""The ops as variants call them: on the mesh, every array by its letters.

XLA cannot split a Pallas kernel, so that on several devices each runs its own
shard. Variants call these, never the ops of attention.kernels, and so cannot
forget it. What there is to see of an op is recorded here too (Context.record).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from attention.kernels import chunked, delta, flash, running, scan, scores
from attention.kernels.conv import causal_conv1d
from attention.kernels.sums import running_sum as _running_sum
from model.sharding import mesh_size

__all__ = [
    'causal_conv1d', 'delta_rule', 'flash_attention', 'linear_attention',
    'linear_recurrence', 'running_mean', 'selective_scan',
    'weighted_attention']


def _records_weights(**plain):
  """Wraps an op (q, k, v, ctx, **options) -> y [B,T,N,V], or (y, state).

  It then records its values, its outputs and, as `attention` [B,N,T,S], how
  much of the value of s is in the output of t: as these ops are linear in their
  values, what they make of unit vectors, one a token, whatever the scores,
  masks, sinks, decays and rules may be. In float32.

  Args:
    **plain: options of the op that makes the weights: of an implementation for
      values of any width, and that of no state, whose values are of another.
  """
  def wrap(op):

    @functools.wraps(op)
    def recording(q, k, v, ctx, **options):
      result = op(q, k, v, ctx, **options)

      def weights():
        B, S, K, _ = v.shape
        units = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, K, S))
        y = op(*(x.astype(jnp.float32) for x in (q, k)), units,
               dataclasses.replace(ctx, tape=None), **{**options, **plain})
        return jnp.swapaxes(jax.tree.leaves(y)[0], 1, 2)
      ctx.record('attention', weights)
      ctx.record('value', lambda: v)
      ctx.record('head_output', lambda: jax.tree.leaves(result)[0])
      return result
    return recording
  return wrap


@_records_weights(implementation='plain')
def flash_attention(q, k, v, ctx, *, segment_ids=None, q_offset=0, sink=None,
                    bias=None, **options):
  """attention.kernels.flash: [B,T,N,V] of q [B,T,N,H], k and v [B,S,K,...].

  Args:
    q, k, v: as there.
    ctx: the Context.
    segment_ids: None or the pair (of queries [B,T], of keys [B,S]).
    q_offset: as there.
    sink: float32 [N] or None.
    bias: None or the pair (of queries [B,T,N,A], of keys [B,S,N,A]).
    **options: as there.
  """
  k, v = (_repeated(x, ctx, q.shape[2], axis=2) for x in (k, v))

  def local(q, k, v, ids, sink, bias, q_offset):
    return flash.flash_attention(
        q, k, v, segment_ids=ids, sink=sink, bias=bias, q_offset=q_offset,
        **options)[0]

  letters = ('BTNH', 'BSKH', 'BSKV', ('BT', 'BS'), 'N', ('BTNA', 'BSNA'), '')
  if isinstance(q_offset, int):  # Static: the kernel can plan its blocks.
    local, offset = functools.partial(local, q_offset=q_offset), ()
  else:
    offset = (q_offset,)
  return ctx.sharded(
      local, inputs=letters[:6 + len(offset)],
      outputs='BTNV')(q, k, v, segment_ids, sink, bias, *offset)


@_records_weights(implementation='plain')
def weighted_attention(q, k, v, ctx, *, learned=(), fire_learned=None,
                       bias=None, segment_ids=None, q_offset=0, **options):
  """attention.kernels.scores: [B,T,N,V] of q [B,T,N,H], k and v [B,S,K,...].

  Args:
    q, k, v, learned, fire_learned, q_offset: as there.
    ctx: the Context, whose positions are those of the queries.
    bias: None or the pair (of queries [B,T,N,A], of keys [B,S,N,A]).
    segment_ids: None or the pair (of queries [B,T], of keys [B,S]).
    **options: as there.
  """
  k, v = (_repeated(x, ctx, q.shape[2], axis=2) for x in (k, v))
  fire_letters = None
  if fire_learned is not None:
    hidden = len(fire_learned) - 3  # c, what multiplies L, and the last layer.
    fire_letters = ('', '', *[('__', '_')] * hidden, ('_N', 'N'))

  def local(q, k, v, ids, bias, q_offset, positions, learned, fire):
    return scores.weighted_attention(
        q, k, v, segment_ids=ids, bias=bias, q_offset=q_offset,
        positions=positions, learned=learned, fire_learned=fire, **options)

  return ctx.sharded(
      local, outputs='BTNV', inputs=(
          'BTNH', 'BSKH', 'BSKV', ('BT', 'BS'), ('BTNA', 'BSNA'), '', 'BT',
          tuple('N' + '_' * (x.ndim - 1) for x in learned), fire_letters),
  )(q, k, v, segment_ids, bias, jnp.asarray(q_offset, jnp.int32),
    ctx.positions, learned, fire_learned)


@_records_weights(implementation='xla', state=None)
def linear_attention(q, k, v, ctx, *, decay=None, state=None, normalize=None,
                     **options):
  """attention.kernels.chunked: y [B,T,N,V] and the state.

  Args:
    q, k, v, decay, normalize: as there.
    ctx: the Context, whose starts zero the state.
    state: S [B,K,H,V] before the first step, with normalize the pair of it and
      z [B,K,H]; or None: zero.
    **options: as there.
  """
  if decay is not None:
    log_decay = decay
    ctx.record('decay', lambda: jnp.broadcast_to(
        jnp.exp(log_decay), v.shape[:3]))
  K = v.shape[2]
  repeated = functools.partial(
      _repeated, ctx=ctx, n_head=max(q.shape[2], K))
  q, k, v = (repeated(x, axis=2) for x in (q, k, v))
  decay = repeated(decay, axis=-1)
  state = jax.tree.map(lambda x: repeated(x, axis=1), state)

  def local(q, k, v, decay, state, starts):
    return chunked.chunked_linear_attention(
        q, k, v, decay=decay, s0=state, starts=starts, normalize=normalize,
        **options)

  per_head = decay is not None and decay.ndim == 1
  sums = 'BKHV' if normalize is None else ('BKHV', 'BKH')
  y, state = ctx.sharded(
      local, outputs=('BTNV', sums),
      inputs=('BTNH', 'BTJH', 'BTKV', 'K' if per_head else 'BTK', sums, 'BT'),
  )(q, k, v, decay, state, ctx.starts)
  copies = v.shape[2] // K
  return y, jax.tree.map(lambda x: x[:, ::copies], state)


def _repeated(x, ctx, n_head, *, axis):
  """An array, or None, with its heads repeated until the mesh divides them.

  Every shard then holds those that its part of n_head heads needs.
  """
  if x is None:
    return None
  heads, shards = x.shape[axis], mesh_size(ctx.mesh, 'N')
  if n_head % shards:
    raise ValueError(
        f'mesh_tensor ({shards}) must divide the {n_head} heads of a layer')
  copies = math.lcm(heads, shards) // heads
  return x if copies == 1 else jnp.repeat(x, copies, axis)


@_records_weights(implementation='xla', state=None)
def delta_rule(q, k, v, ctx, *, beta=None, decay=None, state=None, **options):
  """attention.kernels.delta: y [B,T,N,V] and the state [B,N,H,V].

  Args:
    q, k, v, beta, decay: as there, of as many heads.
    ctx: the Context, whose starts zero the state.
    state: of before the first step, or None: zero.
    **options: as there.
  """
  if beta is not None:
    ctx.record('beta', lambda: beta)
  if decay is not None:
    ctx.record('decay', lambda: jnp.exp(decay))

  def local(q, k, v, beta, decay, state, starts):
    return delta.delta_rule(q, k, v, beta=beta, decay=decay, s0=state,
                            starts=starts, **options)

  channels = decay is not None and decay.ndim == 4
  return ctx.sharded(
      local, outputs=('BTNV', 'BNHV'), inputs=(
          'BTNH', 'BTNH', 'BTNV', 'BTN', 'BTNH' if channels else 'BTN', 'BNHV',
          'BT'),
  )(q, k, v, beta, decay, state, ctx.starts)


def selective_scan(x, dt, A, B, C, D, ctx, *, z=None, dt_bias=None, h0=None,
                   **options):
  """attention.kernels.scan: y [B,T,E] and the state [B,E,M].

  Args:
    x, dt, A, B, C, D, z, dt_bias, h0: as there.
    ctx: the Context, whose starts zero the state.
    **options: as there.
  """
  def local(x, dt, A, B, C, D, z, dt_bias, h0, starts):
    return scan.selective_scan(
        x, dt, A, B, C, D, z=z, dt_bias=dt_bias, h0=h0, starts=starts,
        **options)

  return ctx.sharded(
      local, outputs=('BTE', 'BEM'),
      inputs=('BTE', 'BTE', 'EM', 'BTM', 'BTM', 'E', 'BTE', 'E', 'BEM', 'BT'),
  )(x, dt, A, B, C, D, z, dt_bias, h0, ctx.starts)


def linear_recurrence(x, log_decay, ctx, *, h0=None, **options):
  """attention.kernels.scan: h [B,T,E] and the state [B,E].

  Args:
    x, log_decay, h0: as there.
    ctx: the Context, whose starts zero the state.
    **options: as there.
  """
  ctx.record('decay', lambda: jnp.exp(log_decay))

  def local(x, log_decay, h0, starts):
    return scan.linear_recurrence(
        x, log_decay, h0=h0, starts=starts, **options)

  return ctx.sharded(
      local, inputs=('BTE', 'BTE', 'BE', 'BT'), outputs=('BTE', 'BE'),
  )(x, log_decay, h0, ctx.starts)


def running_mean(x, ctx, state, **options):
  """The mean of x [B,T,N,H] over the document up to each step, and the state.

  Args:
    x: of any float dtype, which the mean has too.
    ctx: the Context.
    state: of before the first step, at first `empty_mean`; or None.
    **options: of attention.kernels.running.
  """
  B, _, N, H = x.shape
  mean = ('BNH', 'B')
  y, state = ctx.sharded(
      functools.partial(running.running_mean, **options),
      inputs=('BTNH', mean, 'BT'), outputs=('BTNH', mean),
  )(x.astype(jnp.float32), state or empty_mean(B, N, H), ctx.starts)
  return y.astype(x.dtype), state


def running_sum(x, ctx, before):
  """attention.kernels.sums: [B,T,N,2] of x [B,T,N].

  Args:
    x: as there.
    ctx: the Context, whose starts zero the sum.
    before: as there.
  """
  return ctx.sharded(
      _running_sum, inputs=('BTN', 'BNA', 'BT'), outputs='BTNA')(
          x, before, ctx.starts)


def empty_mean(batch, heads, width):
  """The state of `running_mean` before the first step."""
  return jnp.zeros((batch, heads, width)), jnp.zeros(batch, jnp.int32)
