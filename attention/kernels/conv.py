"""Causal depthwise convolution, the short filter before a recurrence."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention.kernels import arguments


def causal_conv1d(
    x: Float[Array, 'B T E'],
    w: Float[Array, 'W E'],
    bias: Float[Array, 'E'] | None = None,
    *,
    state: Float[Array, 'B W-1 E'] | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    segment_id0: Int[Array, 'B'] | None = None,
) -> tuple[Float[Array, 'B T E'], Float[Array, 'B W-1 E']]:
  """Computes y_t = bias + sum_i w_i x_{t-W+1+i}, channel by channel.

  Args:
    x: input.
    w: filter; its last tap multiplies the current step.
    bias: None: zero.
    state: the W-1 inputs before the first step, oldest first, as a call
      returned them. None: zero.
    segment_ids: id of each step's document; no tap reaches into another one.
      None: one document.
    segment_id0: id of the document that the state belongs to. None: that of
      the first step.

  Returns:
    y in x's dtype, summed in float32, and the state after the last step: the
    last W-1 inputs, zero where they are not of the last step's document.

  Raises:
    ValueError: a shape that does not fit.
  """
  batch, time, channels = x.shape
  past = w.shape[0] - 1
  arguments.check_shape('w', w, W=past + 1, E=channels)
  arguments.check_shape('bias', bias, E=channels)
  arguments.check_shape('state', state, B=batch, T=past, E=channels)
  arguments.check_shape('segment_ids', segment_ids, B=batch, T=time)
  if state is None:
    state = jnp.zeros((batch, past, channels), x.dtype)
  padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)
  starts = arguments.segment_starts(segment_ids, segment_id0)
  document = None
  if starts is not None:
    # Counted from the state's document, so that an id may come back.
    document = jnp.pad(jnp.cumsum(starts, axis=1), ((0, 0), (past, 0)))

  y = jnp.zeros(channels) if bias is None else bias.astype(jnp.float32)
  for i in range(past + 1):
    tap = padded[:, i:i + time].astype(jnp.float32)
    if document is not None and i < past:
      same = document[:, i:i + time] == document[:, past:]
      tap = jnp.where(same[:, :, None], tap, 0.0)
    y = y + tap * w[i].astype(jnp.float32)

  state = padded[:, time:]
  if document is not None:
    same = document[:, time:] == document[:, -1:]
    state = jnp.where(same[:, :, None], state, 0)
  return y.astype(x.dtype), state
