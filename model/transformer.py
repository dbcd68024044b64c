"""A decoder-only transformer whose layers mix tokens in any of several ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attention
from configs import default
from model import tracing
from model.block import Block
from model.embed import Embed
from model.layers import norm, segment_positions
from model.sharding import Context
from model.state import check_room, concrete, sliding

REMAT = {
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

def check(config):
  """Raises ValueError for a config from which no model can be built."""
  default.check(config)
  if config.vocab_size is None:
    raise ValueError('vocab_size is not set: give the number of token ids, '
                     'which the trainer takes from the dataset')
  if jax.config.jax_enable_x64:
    raise ValueError('JAX_ENABLE_X64 is set, but parameters and states are '
                     'float32 here: unset it')



class Transformer(nnx.Module):
  """Embedding, pre-norm blocks, final norm, head.

  Attributes:
    block_size: the longest context: of learned positions, how many there are.
    longest: that, or None without learned positions: any context will do.

  The layers are the repetitions of one period, the shortest that there is. They
  are stacked and scanned, so that compile time does not grow with depth; what
  is left of the last one (`tail`) is unrolled.
  """

  def __init__(self, config, *, rngs):
    check(config)
    layers = attention.layers(config)
    period = attention.period(layers)
    self.repeats = repeats = config.n_layer // len(period)
    self.remat = config.remat
    self.unroll = config.scan_unroll or repeats
    self.rate = config.dropout
    self.mixes_values = attention.mixes_values(config)
    self.vocab_size, self.width = config.vocab_size, config.n_embd
    self.block_size = config.block_size
    self.longest = (
        config.block_size if config.use_abs_pos_embeddings else None)
    self.embed = Embed(config, config.vocab_size, rngs=rngs)
    build = lambda key: nnx.List(
        [Block(config, layer, rngs=nnx.Rngs(key)) for key, layer in zip(
            jax.random.split(key, len(period)), period)])
    self.periods = jax.vmap(build)(
        jax.random.split(rngs.params(), repeats))
    self.tail = nnx.List([
        Block(config, layer, rngs=rngs)
        for layer in layers[repeats * len(period):]])
    self.norm = norm(config, config.n_embd)

  def hidden(self, tokens, *, segment_ids=None, positions=None, state=None,
             dropout_key=None, mesh=None):
    """The final normed activations [B,T,D], from which `logits` follow.

    Args:
      tokens: int32 [B,T], from 0 to vocab_size - 1.
      segment_ids: int32 [B,T]; tokens of different segments never see each
        other. None: one segment.
      positions: int32 [B,T], 0 where a segment starts and nowhere else. By
        default they count from every segment's start; a call that continues
        from a state must give them.
      state: what `init_state` or the previous call returned; None: no state.
        With these tokens it must not have had more than its length.
      dropout_key: random key while training; None: no dropout.
      mesh: the device mesh; None: a single device.

    Returns:
      ([B,T,D], the state after these tokens).

    Raises:
      ValueError: tokens, positions or state are out of bounds. Under jit,
        shapes alone are checked: of what is traced, ids and positions out of
        bounds become the nearest ones, and a full state loses its last tokens.
    """
    x, ctx = self._begin(
        tokens, segment_ids=segment_ids, positions=positions, state=state,
        dropout_key=dropout_key, mesh=mesh)
    period_states, tail_states = (None, None) if state is None else state

    def body(x, layers):
      index, period, states = layers
      return _run(x, period, states, ctx, first=1 + index * len(period))

    policy = REMAT[self.remat]
    if policy is not None:
      body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    x, period_states = jax.lax.scan(
        body, x, (jnp.arange(self.repeats), self.periods, period_states),
        unroll=min(self.unroll, self.repeats))
    x, tail_states = _run(x, self.tail, tail_states, ctx,
                          first=1 + self.repeats * len(self.periods))
    state = None if state is None else (period_states, tail_states)
    return self.norm(x), state

  def _begin(self, tokens, *, segment_ids, positions=None, state=None,
             dropout_key=None, mesh=None):
    """(x [B,T,D] before the first layer, the Context); as in `hidden`."""
    self._check(tokens, positions, segment_ids, state)
    if positions is None:
      if state is not None:
        raise ValueError('a call with a state needs positions=')
      positions = (
          jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
          if segment_ids is None else segment_positions(segment_ids))
    ctx = Context(positions, segment_ids, dropout_key, mesh)
    x = ctx.dropout(self.embed(tokens, ctx), self.rate, salt=0)
    x = ctx.constrain(x, 'BTD')
    if self.mixes_values:
      # Made once more, so that no layer hands on more than x: of unrolled
      # layers the compiler makes them once.
      first = self.block(0)
      ctx = dataclasses.replace(
          ctx, first_values=first.mixer.value(first.mixer_norm(x)))
    return x, ctx

  def _check(self, tokens, positions, segment_ids, state):
    """Raises ValueError for what can be known to be out of bounds."""
    T, ids = tokens.shape[1], concrete(tokens)
    if ids is not None and ids.size and (
        ids.min() < 0 or ids.max() >= self.vocab_size):
      raise ValueError(f'token ids from {ids.min()} to {ids.max()} are not all '
                       f'in the vocabulary of {self.vocab_size}')
    check_room(state, T)
    if self.longest is None:
      return
    places = concrete(positions)
    if positions is None and segment_ids is None:
      places = np.arange(T)
    if places is not None and places.size and places.max() >= self.longest:
      raise ValueError(
          f'position {places.max()} is beyond the {self.longest} learned ones '
          '(block_size): give fewer tokens, or build the model with '
          'use_abs_pos_embeddings=False')

  def logits(self, x):
    """[..., D] -> float32 [..., vocab_size]."""
    return self.embed.logits(x)

  def lens(self, x):
    """The logits if x [...,D] were the residual stream after the last layer.

    The logit lens (nostalgebraist 2020): float32 [..., vocab_size].
    """
    return self.logits(self.norm(x))

  @property
  def n_layer(self):
    return self.repeats * len(self.periods) + len(self.tail)

  def block(self, index):
    """The Block of a layer, out of the stack of its like."""
    repeat, place = divmod(index, len(self.periods))
    if repeat == self.repeats:
      return self.tail[place]
    return jax.tree.map(lambda p: p[repeat], self.periods[place])

  def trace(self, tokens, *, layers=None, segment_ids=None):
    """What happens inside of layers, as a tuple of tracing.Layer.

    Args:
      tokens: int32 [B,T].
      layers: the numbers of the layers to look at, from 0, or from -1 down for
        the last ones; None: all.
      segment_ids: int32 [B,T] or None, as in `hidden`.

    Raises:
      ValueError: no such layer; what `hidden` raises.
    """
    x, ctx = self._begin(tokens, segment_ids=segment_ids)
    return tracing.trace(self, x, ctx, layers=layers)

  def __call__(self, tokens, **kwargs):
    """(float32 [B,T,vocab_size], state); arguments as in `hidden`."""
    x, state = self.hidden(tokens, **kwargs)
    return self.logits(x), state

  def init_state(self, batch, length, *, slides=False):
    """The state before the first of at most `length` tokens.

    If it slides there may be any number of them: a softmax mixer sees the last
    `length` before each, as with a window, and all others see all.
    """
    states = lambda blocks: [b.mixer.init_state(batch, length) for b in blocks]
    stacked = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (self.repeats, *x.shape)),
        states(self.periods))
    state = stacked, states(self.tail)
    return sliding(state) if slides else state

  def flops(self, length):
    """Of the forward pass, per token of a sequence of `length` tokens."""
    of = lambda blocks: sum(
        b.mixer.flops(length) + b.mlp.flops for b in blocks)
    head = 2 * self.vocab_size * self.width
    return self.repeats * of(self.periods) + of(self.tail) + head

  def state_bytes(self):
    """(bytes, bytes a token) of the state of one sequence."""
    size = lambda length: sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(
            lambda model: model.init_state(1, length), self)))
    # Beyond any window, so that only what grows for ever counts.
    length = 1 << 20
    per_token = (size(2 * length) - size(length)) // length
    return size(length) - length * per_token, per_token


def _run(x, blocks, states, ctx, *, first):
  """Runs blocks in order; `first` is the number of the first of them."""
  after = []
  for i, block in enumerate(blocks):
    key = ctx.dropout_key
    if key is not None:
      key = jax.random.fold_in(key, first + i)
    x, state = block(
        x, dataclasses.replace(ctx, dropout_key=key, depth=first + i - 1),
        None if states is None else states[i])
    after.append(state)
  return x, None if states is None else after
