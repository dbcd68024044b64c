"""The leaf of the house: parameters, dense layers, norms, rotary, sharding."""

import dataclasses
import difflib
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# Logical axis -> mesh axes: the one table of how arrays lie on the mesh. An
# axis that is not listed is not sharded. Activations have no 'embed' axis:
# along it parameters alone are split, to be gathered where they are used.
RULES = {
    'batch': ('data', 'fsdp'),
    'embed': 'fsdp',
    'vocab': 'tensor',
    'mlp': 'tensor',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'inner': 'tensor',
}


def pick(flag, value, table):
  """table[value], or a ValueError that names the flag and what it takes."""
  if value in table:
    return table[value]
  near = difflib.get_close_matches(str(value), table, 1)
  raise ValueError(
      f'unknown {flag} {value!r}' + (f', did you mean {near[0]!r}?' if near
                                     else '') + f' known: {", ".join(table)}')


def mesh_size(mesh, axis):
  """Number of shards of a logical axis; 1 without a mesh."""
  if mesh is None:
    return 1
  names = RULES.get(axis) or ()
  names = (names,) if isinstance(names, str) else names
  return math.prod(mesh.shape[name] for name in names)


def spec(axes, shape, mesh):
  """PartitionSpec of an array with logical `axes`, aligned to the right.

  Leading dimensions without an axis (stacked layers) and dimensions that the
  mesh does not divide are replicated.
  """
  axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
  return P(*(
      RULES.get(axis) if size % mesh_size(mesh, axis) == 0 else None
      for axis, size in zip(axes, shape)))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['positions', 'segment_ids', 'dropout_key'],
    meta_fields=['mesh'])
@dataclasses.dataclass(frozen=True)
class Context:
  """What a layer may know besides its input.

  Attributes:
    positions: int32 [B,T], of each token within its document.
    segment_ids: int32 [B,T] or None (all one document); tokens of different
      segments never see each other. Where there are segments, one starts
      wherever the position is 0.
    dropout_key: random key, or None when nothing is to be dropped.
    mesh: the device mesh, or None on a single device.
  """
  positions: jax.Array
  segment_ids: jax.Array | None = None
  dropout_key: jax.Array | None = None
  mesh: jax.sharding.Mesh | None = None

  @property
  def starts(self):
    """bool [B,T], where a document starts, or None: nowhere after a state."""
    return None if self.segment_ids is None else self.positions == 0

  def constrain(self, x, *axes):
    """Lays an activation out on the mesh by its logical axes."""
    if self.mesh is None:
      return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(self.mesh, spec(axes, x.shape, self.mesh)))

  def sharded(self, fn, *, inputs, outputs):
    """fn, run by every device on its own shard (jax.shard_map).

    Args:
      fn: a function of arrays (None is allowed where an array is).
      inputs: logical axes of every argument.
      outputs: logical axes of every result. An axis must be divisible by its
        share of the mesh.
    """
    if self.mesh is None or self.mesh.size == 1:
      return fn
    to_spec = lambda axes: P(*(RULES.get(axis) for axis in axes))
    is_axes = lambda x: isinstance(x, tuple) and not any(
        isinstance(a, tuple) for a in x)

    def call(*args):
      given = [arg is not None for arg in args]
      specs = tuple(to_spec(a) for a, g in zip(inputs, given) if g)

      def body(*present):
        present = iter(present)
        return fn(*(next(present) if g else None for g in given))
      return jax.shard_map(
          body, mesh=self.mesh, in_specs=specs, check_vma=False,
          out_specs=jax.tree.map(to_spec, outputs, is_leaf=is_axes),
      )(*(arg for arg in args if arg is not None))
    return call

  def dropout(self, x, rate, *, salt):
    """Zeroes a `rate` of x; `salt` tells the uses within one layer apart."""
    if self.dropout_key is None or rate == 0:
      return x
    key = jax.random.fold_in(self.dropout_key, salt)
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def param(value, *axes, decay=None, n_inputs=0):
  """A float32 parameter, with what the trainer has to know about it.

  Args:
    value: the initial array.
    *axes: the logical axis, or None, of every dimension: how it is sharded.
    decay: whether weight decay applies; by default to matrices alone.
    n_inputs: of a matrix that multiplies activations, the number of leading
      dimensions that are summed over (Muon needs it); else 0.
  """
  decay = len(axes) > 1 if decay is None else decay
  return nnx.Param(jnp.asarray(value, jnp.float32), axes=axes, decay=decay,
                   n_inputs=n_inputs)


class Einsum(nnx.Module):
  """y = einsum(equation, x, w) for 'BT<in>,<in><out>->BT<out>'.

  Computed as one product of two matrices, which on CPU is up to twice as fast
  as the einsum and elsewhere the same.
  """

  def __init__(self, equation, shape, *, axes, std, rngs, bias=False):
    source, rest = equation.split(',')
    weight, target = rest.split('->')
    self.n_contracted = len(source) - 2
    self.out_shape = tuple(shape[self.n_contracted:])
    if (source[2:] + target[2:] != weight or len(shape) != len(weight)
        or source[:2] != 'BT' or target[:2] != 'BT'):
      raise ValueError(f'not of the form BT<in>,<in><out>->BT<out>: {equation}')
    self.flops = 2 * math.prod(shape)  # Forward, per token.
    self.weight = param(
        std * jax.random.normal(rngs.params(), shape), *axes,
        n_inputs=self.n_contracted)
    self.bias = param(
        jnp.zeros(self.out_shape), *axes[self.n_contracted:], decay=False
    ) if bias else None

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

  def __init__(self, width, *, bias=False):
    del bias  # Has none, by definition.
    self.weight = param(jnp.ones(width), None)

  def __call__(self, x):
    return rms_normalize(x) * self.weight[...].astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer norm with a weight and, if asked for, a bias (Ba et al. 2016)."""

  def __init__(self, width, *, bias=False):
    self.weight = param(jnp.ones(width), None)
    self.bias = param(jnp.zeros(width), None) if bias else None

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)
    y = y * self.weight[...]
    return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


NORMS = {'rmsnorm': RMSNorm, 'layernorm': LayerNorm}


def norm(config, width):
  """The norm that norm_variant names."""
  return pick('norm_variant', config.norm_variant, NORMS)(
      width, bias=config.bias)


def rotary(x, positions, *, base):
  """Rotates pairs (h, h + H/2) by their positions (Su et al. 2021).

  Args:
    x: [B,T,N,H], H even.
    positions: [B,T].
    base: wavelengths run from 2 pi to 2 pi base.

  Returns:
    [B,T,N,H], in x's dtype; angles are float32.
  """
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
