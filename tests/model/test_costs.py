"""FLOPs and state bytes, against what the compiler and the arrays say."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import attention
from configs import default
from model.sharding import Context
from model.transformer import Transformer

# Wide, so that products of matrices outweigh norms and activations.
CONFIG = dict(n_embd=128, n_head=4, n_layer=1, block_size=64, vocab_size=64)


def config(name, **flags):
  config = default.get_config()
  config.update(attention_variant=name, **CONFIG, **flags)
  return config


def compiled_flops(mixer, length, state=None):
  """Per token, as XLA counts them; the body of a loop counts once."""
  x = jax.ShapeDtypeStruct((1, length, CONFIG['n_embd']), jnp.float32)
  run = lambda mixer, x, state: mixer(
      x, Context(jnp.arange(length)[None]), state)
  cost = jax.jit(run).lower(mixer, x, state).compile().cost_analysis()
  return cost.get('flops', 0.0) / length


@pytest.mark.parametrize('name', attention.names())
def test_flops_of_a_single_token(name):
  mixer = attention.build(name, config(name), rngs=nnx.Rngs(0))
  if name == 'identity':
    assert mixer.flops(1) == 0
  else:
    # A state of zeros that is not given is one that the compiler leaves out.
    state = None if grows(name) else mixer.init_state(1, 1)
    assert 0.8 < mixer.flops(1) / compiled_flops(mixer, 1, state) < 1.05


def grows(name):
  """Whether a token costs more the more tokens it sees."""
  mixer = jax.eval_shape(
      lambda: attention.build(name, config(name), rngs=nnx.Rngs(0)))
  return mixer.flops(2) > mixer.flops(1)


@pytest.mark.parametrize('name', [*filter(grows, attention.names())])
def test_flops_of_the_scores_grow_with_the_visible_tokens(name):
  small = config(name, disable_flash_attention=True)
  mixer = attention.build(name, small, rngs=nnx.Rngs(0))
  T = 64
  square = compiled_flops(mixer, T) - compiled_flops(mixer, 1)
  scores = mixer.flops(T) - mixer.flops(1)
  # The square has T tokens a token, a triangle (T + 1) / 2.
  assert scores == pytest.approx(square * (T + 1) / 2 / T, rel=0.25)


def test_a_window_bounds_the_scores():
  mixer = attention.build(
      'causal', config('causal', window_size=8), rngs=nnx.Rngs(0))
  assert mixer.flops(10**6) == pytest.approx(mixer.flops(10**7), rel=1e-4)


@pytest.mark.parametrize('name', attention.names())
def test_state_bytes(name):
  model = jax.eval_shape(
      lambda: Transformer(config(name), rngs=nnx.Rngs(0)))
  constant, per_token = model.state_bytes()
  state = jax.tree.leaves(model.init_state(1, 500))
  assert constant + 500 * per_token == sum(
      x.size * x.dtype.itemsize for x in state)
  assert (per_token > 0) == grows(name), 'what it sees must be in its state'
  if name == 'mla':  # R + rotary numbers, and the segment.
    assert per_token == 4 * (128 // 4 + 32) + 4


def test_flops_of_the_model():
  model = jax.eval_shape(
      lambda: Transformer(config('identity'), rngs=nnx.Rngs(0)))
  assert model.flops(64) == 2 * (2 * 4 * 128 * 128) + 2 * 64 * 128
