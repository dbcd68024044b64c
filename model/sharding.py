"""How arrays lie on the mesh: by the letters of their axes.

The letters are those of every einsum and shape of this project (see
`attention`). They are the logical axes: an array's letters say how it is split.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# Letter -> mesh axes. Letters that are not listed are not split. An array has
# a mesh axis once: activations BTD are split along B, and D is what parameters
# alone are split along, to be gathered where they are used.
RULES = {
    'B': ('data', 'fsdp'),
    'D': ('fsdp',),
    'U': ('tensor',),
    'F': ('tensor',),
    'N': ('tensor',),
    'K': ('tensor',),
    'J': ('tensor',),
    'E': ('tensor',),
}


def mesh_size(mesh, letter):
  """Number of shards along a letter; 1 without a mesh."""
  if mesh is None:
    return 1
  return math.prod(mesh.shape[axis] for axis in RULES.get(letter, ()))


def spec(letters, shape, mesh):
  """PartitionSpec of an array by its letters, aligned to the right.

  Leading dimensions without a letter (stacked layers) and dimensions that the
  mesh does not divide are replicated.
  """
  letters = '_' * (len(shape) - len(letters)) + letters
  return _spec(
      letter if size % mesh_size(mesh, letter) == 0 else '_'
      for letter, size in zip(letters, shape))


def _spec(letters):
  taken, axes = set(), []
  for letter in letters:
    free = tuple(a for a in RULES.get(letter, ()) if a not in taken)
    taken.update(free)
    axes.append(free[0] if len(free) == 1 else free or None)
  return P(*axes)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['positions', 'segment_ids', 'dropout_key', 'depth',
                 'first_values'],
    meta_fields=['mesh'], drop_fields=['tape'])
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
    depth: the number of layers before this one. Not known while compiling, as
      layers that are alike share a program.
    first_values: [B,T,K,V], the values of the first layer, where a layer mixes
      them into its own, or None: this is the first layer.
    tape: a list that layers `record` their internals on, or None. It belongs to
      one function that jax traces, and is not handed on to another: a copy of
      the Context that goes through jit has none.
  """
  positions: jax.Array
  segment_ids: jax.Array | None = None
  dropout_key: jax.Array | None = None
  mesh: jax.sharding.Mesh | None = None
  depth: int | jax.Array = 0
  first_values: jax.Array | None = None
  tape: list | None = None

  def record(self, name, make):
    """Puts (name, make()) on the tape; without one, does not call `make`.

    Args:
      name: what it is. One name may come more than once in a layer.
      make: a function without arguments that returns an array.
    """
    if self.tape is not None:
      self.tape.append((name, make()))

  @property
  def starts(self):
    """bool [B,T], where a document starts, or None: nowhere after a state."""
    return None if self.segment_ids is None else self.positions == 0

  def constrain(self, x, letters):
    """Lays an activation out on the mesh."""
    if self.mesh is None:
      return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(self.mesh, spec(letters, x.shape, self.mesh)))

  def sharded(self, fn, *, inputs, outputs):
    """fn, run by every device on its own shard (jax.shard_map).

    Args:
      fn: a function of trees of arrays (None is allowed where a tree is).
      inputs: the letters of every argument: a tree of strings each.
      outputs: the letters of the result.

    Raises (when called):
      ValueError: the mesh does not divide a letter's size.
    """
    if self.mesh is None or self.mesh.size == 1:
      return fn

    def call(*args):
      leaves, structure = jax.tree.flatten(args)
      letters = _letters(inputs, args)
      for names, x in zip(letters, leaves, strict=True):
        self._check_divides(names, x.shape)
      return jax.shard_map(
          lambda *leaves: fn(*jax.tree.unflatten(structure, leaves)),
          mesh=self.mesh, in_specs=tuple(map(_spec, letters)),
          out_specs=jax.tree.map(_spec, outputs), check_vma=False)(*leaves)
    return call

  def _check_divides(self, letters, shape):
    for letter, size in zip(letters, shape, strict=True):
      shards = mesh_size(self.mesh, letter)
      if size % shards:
        flags = ' x '.join(f'mesh_{axis}' for axis in RULES[letter])
        raise ValueError(f'{flags} ({shards}) must divide {letter} ({size})')

  def dropout(self, x, rate, *, salt):
    """Zeroes a `rate` of x; `salt` tells the uses within one layer apart."""
    if self.dropout_key is None or rate == 0:
      return x
    key = jax.random.fold_in(self.dropout_key, salt)
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _letters(wanted, tree):
  """The letters of every array of a tree, in the order of its leaves."""
  if tree is None:
    return []
  if isinstance(wanted, str):
    return [wanted]
  return [letters for parts in zip(wanted, tree, strict=True)
          for letters in _letters(*parts)]
