"""Their torch layers, and ours with the same weights."""

import dataclasses
import importlib
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from model.layers import segment_positions
from model.sharding import Context
from tests.attention import cases

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

# Letters of the attention package.
D, N, H = 32, 4, 8


def rows(weight, per_head, chosen):
  """Some of every head's outputs, of a Linear's [N x per_head, inputs]."""
  weight = weight.reshape(N, per_head, -1)[:, chosen]
  return weight.reshape(-1, weight.shape[-1])


def numpy(x):
  return x.detach().numpy()


def attended(layer, find, x):
  """Their attention, with the mask that their model would give it."""
  masks = importlib.import_module('transformers.masking_utils')
  windowed = getattr(layer, 'sliding_window', None)  # Not all have it.
  mask = (masks.create_sliding_window_causal_mask if windowed
          else masks.create_causal_mask)
  positions = torch.arange(x.shape[1])[None]
  rotary = find('RotaryEmbedding')(layer.config)
  return layer(
      x, position_embeddings=rotary(x, positions),
      attention_mask=mask(layer.config, x, None, None, positions))[0]


def alone(layer, find, x):
  """A layer that needs nothing but its input."""
  del find
  return layer(x)


@dataclasses.dataclass(frozen=True)
class Model:
  """Their layer, and what ours has to be told to be the same.

  Attributes:
    library: transformers.models.<library>.
    prefix: of the names of its classes.
    layer: the rest of the layer's name.
    settings: of its config.
    variant, flags: of ours.
    weights: {our parameter: theirs}.
    constants: {their parameter: value or array}; the others are random.
    without: our submodules that the model lacks, taken out.
    call: (their layer, their classes by the rest of their name, float32 tensor
      [B,T,D]) -> outputs.
  """
  library: str
  prefix: str
  layer: str
  settings: dict
  variant: str
  flags: dict
  weights: dict[str, str | Callable]
  constants: dict = dataclasses.field(default_factory=dict)
  without: tuple = ()
  call: Callable = attended


class Through(nnx.Module):

  def __call__(self, x):
    return x


def build(model):
  """(our Attention, their layer, it as a function of float32 [B,T,D])."""
  library = importlib.import_module(
      f'transformers.models.{model.library}.modeling_{model.library}')
  find = lambda kind: getattr(library, model.prefix + kind)
  config = find('Config')(**model.settings)
  layer = randomised(find(model.layer)(config, layer_idx=0), model.constants)
  mixer = attention.build(
      model.variant, cases.config(n_embd=D, n_head=N, **model.flags),
      rngs=nnx.Rngs(0))
  for part in model.without:
    setattr(mixer, part, Through())
  copy(layer, mixer, model.weights)
  return mixer, layer, lambda x: model.call(layer, find, x)


def randomised(layer, constants):
  """The layer with random parameters, for inference."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in layer.named_parameters():
      # Mamba multiplies so many of them that its outputs reach 25 with 1 in
      # place of 0.8.
      p.normal_(0, 0.8 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5,
                generator=generator)
      if name in constants:
        p.copy_(torch.as_tensor(constants[name]))
  return layer.eval().requires_grad_(False)


def copy(layer, mixer, table):
  """Sets every parameter of ours to theirs."""
  ours = {name.removesuffix('/value').replace('/', '.')
          for name in cases.parameters(mixer)}
  assert ours == set(table)
  theirs = {name: numpy(p) for name, p in layer.named_parameters()}
  for name, source in table.items():
    parameter = operator.attrgetter(name)(mixer)
    parameter[...] = jnp.asarray(
        ours_of(theirs, source, parameter.shape), jnp.float32)


def ours_of(theirs, source, shape):
  """Our array of this shape, of {name: array} of theirs and a row's source."""
  value = theirs[source] if isinstance(source, str) else source(theirs)
  return np.transpose(value).reshape(shape)


@jax.jit
def run(mixer, x, ctx, state=None):
  return mixer(x, ctx, state)


def plain(mixer, x):
  """Our outputs for one document a row."""
  return run(mixer, x, Context(cases.counted(x)))[0]


def packed(mixer, x, lengths):
  """Our outputs for documents of these lengths, one after the other."""
  ids = np.repeat(np.arange(len(lengths)), lengths)
  ids = jnp.broadcast_to(jnp.asarray(ids), x.shape[:2])
  return run(mixer, x, Context(segment_positions(ids), ids))[0]


def decoded(mixer, x, first):
  """Our outputs for the first tokens at once and then one by one."""
  positions, got = cases.counted(x), []
  state, start = mixer.init_state(*x.shape[:2]), 0
  for end in range(first, x.shape[1] + 1):
    y, state = run(mixer, x[:, start:end],
                   Context(positions[:, start:end]), state)
    got.append(y)
    start = end
  return np.concatenate(got, 1)


def agree(got, want):
  """Asserts a small absolute error, for outputs of order 1.

  It tells an eps of 1e-6 in a norm from one of 1e-5; rounding is below 1e-6.
  """
  assert got.shape == want.shape
  assert 0.5 < np.abs(want).max() < 10
  worst = np.abs(np.asarray(got) - want).max()
  assert worst <= 5e-6, f'error {worst:.2g}'
