"""Layers that mix the first layer's values into their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import causal
from model import transformer
from model.sharding import Context
from tests.attention import cases
from tests.attention.cases import close
from train_lib.state import AbstractModel

T = 12
TOKENS = np.random.default_rng(0).integers(0, 32, (2, T)).astype(np.int32)
MIXED = ('causal(causal_value_residual=true)', 'identity',
         'causal(causal_value_residual=true, window_size=3)', 'causal')


def build(**flags):
  abstract = AbstractModel(cases.config(init_std=0.3, **flags))
  params = jax.jit(abstract.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  return abstract.merge({
      name: x + rng.standard_normal(x.shape).astype(np.float32)
      if name.endswith('mix') else x for name, x in params.items()})


def one_by_one(model):
  """The logits, with the values handed from layer to layer by hand."""
  ctx = Context(jnp.tile(jnp.arange(T), (2, 1)))
  x = model.embed(TOKENS, ctx)
  blocks = [jax.tree.map(lambda p, i=i: p[i], block)
            for i in range(model.repeats) for block in model.periods]
  blocks += model.tail
  first = blocks[0].mixer.value(blocks[0].mixer_norm(x))
  for block in blocks:
    normed, mixer = block.mixer_norm(x), block.mixer
    if isinstance(mixer, causal.Attention) and mixer.mix is not None:
      own, other = mixer.mix[...]
      mixed = own * mixer.value(normed) + other * first
      mixer.mix, mixer.value = None, lambda x, mixed=mixed: mixed
    x = x + mixer(normed, ctx)[0]
    x = x + block.mlp(block.mlp_norm(x))
  return model.logits(model.norm(x))


STACKS = [dict(n_layer=3, scan_unroll=1, causal_value_residual=True),
          dict(n_layer=3, n_kv_group=2, remat='full',
               causal_value_residual=True),
          dict(n_layer=6, attention_list=MIXED)]


@pytest.mark.parametrize('flags', STACKS, ids=str)
def test_every_layer_mixes_the_values_of_the_first(flags):
  model = build(**flags)
  got, _ = model(TOKENS)
  close(got, one_by_one(model))


@pytest.mark.parametrize('flags', STACKS, ids=str)
def test_a_state_needs_no_more_than_the_tokens_of_the_call(flags):
  model = build(**flags)
  want, _ = model(TOKENS)
  state, got = model.init_state(2, T), []
  for start, stop in ((0, 7), (7, 8), (8, T)):
    y, state = model(TOKENS[:, start:stop], state=state,
                     positions=np.tile(np.arange(start, stop), (2, 1)))
    got.append(y)
  close(np.concatenate(got, 1), want)


def test_the_first_layer_learns_from_all():
  """Its values reach the second, although it returns nothing itself."""
  for flag in (True, False):
    model = build(n_layer=2, causal_value_residual=flag)
    out = model.periods[0].mixer.out.weight
    out[...] = out[...].at[0].set(0)
    slopes = jax.grad(lambda model: (model(TOKENS)[0] ** 2).sum())(model)
    first = slopes.periods[0].mixer.value.weight[...][0]
    assert first.any() == flag


@pytest.mark.parametrize('layers', [
    ('identity', 'causal(causal_value_residual=true)'),
    ('causal', 'causal(causal_value_residual=true)'),
    ('causal(causal_value_residual=true)',
     'causal(causal_value_residual=true, n_kv_group=2)'),
    ('causal(causal_value_residual=true)',
     'causal(causal_value_residual=true, n_head=8)')], ids=str)
def test_the_first_layer_must_have_such_values(layers):
  with pytest.raises(ValueError) as error:
    transformer.check(cases.config(attention_list=layers))
  for part in ('causal_value_residual of', *layers):
    assert part in str(error.value)


def test_other_models_do_not_make_them():
  assert not attention.mixes_values(cases.config())
  assert attention.mixes_values(cases.config(causal_value_residual=True))
