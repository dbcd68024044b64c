"""Looks inside of layers: what they record, and what can be asked of any.

One layer at a time, each by itself, so that nothing of it is in the program
that trains or samples.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp

from model.block import Block
from model.sharding import Context

PROBES = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
  """A layer at work on B sequences of T tokens.

  Attributes:
    index: its number, from 0.
    variant: the name of its mixer.
    before: [B,T,D], the residual stream that it reads.
    after: [B,T,D], the residual stream that it leaves.
    internals: {name: array}, what it recorded (Context.record). Of every layer
      `mixer_input` and `mixer_output` [B,T,D]. What else there is depends on
      the variant:

        attention    [B,N,T,S]  how much of the value of s is in head_output of
                                t: of softmaxes the map, whose rows and sink add
                                up to 1; linear attention and delta rules have
                                one too, of either sign.
        value        [B,S,K,V]  of every head.
        head_output  [B,T,N,V]  their sums, before gates, norms, projections.
        decay        [B,T,...]  factors in (0, 1] of what is kept of a state.
        step_size    [B,T,...]  of state spaces.
        beta         [B,T,N]    of the delta rule.
        gate         [B,T,...]  and `input_gate`: factors of outputs, of inputs.

      The second of a name has a number: attention_2 is differential's other
      map.
    block: the model.block.Block.
    ctx: its Context.
  """
  index: int
  variant: str
  before: jax.Array
  after: jax.Array
  internals: dict
  block: Block
  ctx: Context

  def influence(self, *, probes=PROBES):
    """Sizes of d y_t / d x_s of the mixer, float32 [B,T,S].

    Frobenius norms, estimated as root mean squares of the gradients of r . y_t
    for random directions r: what is zero is exactly zero, the standard error
    of all else is at most 1 / sqrt(2 probes) of it.

    Args:
      probes: the number of directions; time is T times as many gradients.
    """
    return _influence(self.block.mixer, self.internals['mixer_input'],
                      self.ctx, probes=probes)

  def states(self):
    """The state after every token, from feeding the mixer one at a time.

    Returns:
      A tree as of the mixer's init_state, of arrays with an axis T in front.
    """
    return _states(self.block.mixer, self.internals['mixer_input'], self.ctx)


def trace(model, x, ctx, *, layers=None):
  """The Layers of a Transformer, in the order in which they are asked for.

  Args:
    model: the Transformer.
    x: [B,T,D], before the first layer.
    ctx: Context, of no mesh.
    layers: as in Transformer.trace.
  """
  n_layer = model.n_layer
  wanted = range(n_layer) if layers is None else [*layers]
  for index in wanted:
    if index not in range(-n_layer, n_layer):
      raise ValueError(f'layers: there is no layer {index!r}: the model has '
                       f'{n_layer}, 0 to {n_layer - 1} (or -{n_layer} to -1)')
  wanted = [index % n_layer for index in wanted]
  found = {}
  for index in range(max(wanted, default=-1) + 1):
    block = model.block(index)
    here = dataclasses.replace(ctx, depth=jnp.asarray(index))
    after, internals = _run(block, x, here)
    if index in wanted:
      variant = type(block.mixer).__module__.rpartition('.')[2]
      found[index] = Layer(index, variant, x, after, internals, block, here)
    x = after
  return tuple(found[index] for index in wanted)


@jax.jit
def _run(block, x, ctx):
  """(x after a layer, {name: what it recorded})."""
  tape = []
  x, _ = block(x, dataclasses.replace(ctx, tape=tape))
  return x, named(tape)


def named(tape):
  """{name: array} of a tape: the second of a name is name_2."""
  times, found = collections.Counter(), {}
  for name, value in tape:
    times[name] += 1
    found[name if times[name] == 1 else f'{name}_{times[name]}'] = value
  return found


@functools.partial(jax.jit, static_argnames=('probes',))
def _influence(mixer, x, ctx, *, probes):
  """See Layer.influence."""
  y, pull = jax.vjp(lambda x: mixer(x, ctx)[0], x)
  directions = jax.random.normal(jax.random.key(0), (probes, *y.shape), y.dtype)
  steps = jnp.arange(y.shape[1])

  def row(t):
    def squares(direction):
      gradient, = pull(jnp.where((steps == t)[:, None], direction, 0))
      return (gradient.astype(jnp.float32) ** 2).sum(-1)
    # One after another: kernels need no batching rule, and memory stays small.
    return jnp.sqrt(jax.lax.map(squares, directions).mean(0))
  return jnp.swapaxes(jax.lax.map(row, steps), 0, 1)


@jax.jit
def _states(mixer, x, ctx):
  """See Layer.states."""
  batch, length, _ = x.shape

  def step(state, t):
    now = lambda a: jax.lax.dynamic_slice_in_dim(a, t, 1, 1)
    token = jax.tree.map(now, (x, ctx.positions, ctx.segment_ids,
                               ctx.first_values))
    _, state = mixer(token[0], dataclasses.replace(
        ctx, positions=token[1], segment_ids=token[2], first_values=token[3]),
                     state)
    return state, state
  return jax.lax.scan(
      step, mixer.init_state(batch, length), jnp.arange(length))[1]
