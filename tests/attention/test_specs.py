"""Layers that carry options: entries of attention_list."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import attention
from attention.common import specs
from tests.attention.cases import config


def layers(*entries, **flags):
  flags.setdefault('n_layer', max(len(entries), 1))
  return attention.layers(config(attention_list=entries, **flags))


@pytest.mark.parametrize('entry, variant, flags', [
    ('causal', 'causal', {}),
    ('causal()', 'causal', {}),
    (' causal(window_size=8) ', 'causal', {'window_size': 8}),
    ('causal(window_size=none)', 'causal', {'window_size': None}),
    ('causal(window_size=8, n_head=2)', 'causal',
     {'window_size': 8, 'n_head': 2}),
    ('causal(use_qk_norm, attn_logit_softcapping)', 'causal',
     {'use_qk_norm': True, 'attn_logit_softcapping': 50.0}),
    ('co4(mod_fn=tm1,n_latent=2)', 'co4', {'mod_fn': 'tm1', 'n_latent': 2}),
])
def test_an_entry_is_a_variant_with_flags(entry, variant, flags):
  layer, = layers(entry)
  assert layer.variant == variant and dict(layer.flags) == flags
  assert layers(str(layer)) == (layer,), 'its text means the same'


def test_a_number_repeats_and_the_list_is_tiled():
  found = layers('2*causal(window_size=8)', 'ssm', n_layer=7)
  assert attention.shortest(found) == (
      '2*causal(window_size=8) ssm 2*causal(window_size=8) ssm '
      'causal(window_size=8)')
  assert attention.period(found) == found[:3]
  assert attention.period(layers('2*causal', n_layer=6)) == layers('causal')


def test_the_layer_has_its_own_flags_and_else_the_global_ones():
  small = config(window_size=4, use_qk_norm=True)
  mixers = [attention.build(entry, small, rngs=nnx.Rngs(0)) for entry in (
      'causal', 'causal(window_size=8)', 'causal(window_size=none)',
      'causal(n_head=2, use_qk_norm=false)')]
  assert [m.softmax.window for m in mixers] == [4, 8, 0, 4]
  assert [m.softmax.n_head for m in mixers] == [4, 4, 4, 2]
  assert [m.softmax.options.use_qk_norm for m in mixers] == [True] * 3 + [False]


@pytest.mark.parametrize('entry, message', [
    ('casual', "unknown attention variant 'casual', did you mean causal?"),
    ('causal(windw_size=8)', "causal has no flag 'windw_size', did you mean "
     "window_size?"),
    ('ssm(window_size=8)', "ssm has no flag 'window_size'"),
    ('causal(window_size=wide)', 'causal(window_size=wide): window_size=wide '
     'is not an integer or none'),
    ('causal(window_size=0)', 'window_size (0) must be at least 1, or none'),
    ('causal(window_size)', 'window_size needs a value'),
    ('co4(mod_fn=tm5)', "unknown mod_fn 'tm5', did you mean tm"),
    ('causal(n_head=0)', 'n_head (0) must be at least 1'),
    ('0*causal', 'repeat it at least once'),
    ('causal(window_size=8', 'is no layer: write a name'),
    ('', 'is no layer'),
    (3, '3 is no layer'),
    ('causal(n_head=3)', 'n_head (3) must divide n_embd (32)'),
    ('causal(n_kv_group=3)', 'n_kv_group (3) must divide n_head (4)'),
    ('causal(rope_base=50)', 'attention_list: causal(rope_base=50.0): '
     'rope_base=50.0 has no effect without use_rotary_embeddings'),
    ('causal(use_qk_norm_scale=true)', 'use_qk_norm_scale needs use_qk_norm'),
], ids=str)
def test_what_is_wrong_with_an_entry_is_one_line(entry, message):
  small = config(attention_list=(entry, 'identity'))
  with pytest.raises(ValueError) as error:
    attention.check(small)
    for layer in attention.layers(small):
      attention.build(layer, small, rngs=nnx.Rngs(0))
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_a_flag_may_be_needed_by_one_layer_alone():
  """mla always rotates; a causal layer beside it need not."""
  small = config(attention_list=('causal', 'mla'), rope_base=50.0)
  attention.check(small)
  small.attention_list = ('causal', 'identity')
  with pytest.raises(ValueError, match='rope_base=50.0 has no effect without'):
    attention.check(small)


def test_more_layers_than_there_are():
  with pytest.raises(ValueError, match='3 layers for n_layer .2.'):
    layers('2*causal', 'ssm', n_layer=2)


def test_a_list_is_split_outside_of_parentheses():
  from attention.common.options import split_list
  assert split_list('a(b=1, c=2) d,3*e(f) ') == ('a(b=1, c=2)', 'd', '3*e(f)')


def test_layers_of_one_model_differ_as_their_entries_say():
  from model.transformer import Transformer
  small = config(attention_list=('2*causal(window_size=2)', 'causal'),
                 n_layer=7)
  model = jax.eval_shape(lambda: Transformer(small, rngs=nnx.Rngs(0)))
  assert model.repeats == 2 and len(model.periods) == 3 and len(model.tail) == 1
  assert [b.mixer.softmax.window for b in model.periods] == [2, 2, 0]
  model = Transformer(small, rngs=nnx.Rngs(0))
  tokens = jnp.arange(12)[None] % 32
  x, y = (jax.jit(model.hidden)(t)[0] for t in (tokens, tokens.at[0, 0].add(1)))
  assert (x[0, -1] != y[0, -1]).any(), 'a layer without a window sees it'


def test_spec_without_runtime_flags():
  layer, = layers('causal(attention_kernel=xla, window_size=4)')
  assert layer.without({'attention_kernel'}) == specs.LayerSpec(
      'causal', (('window_size', 4),))
