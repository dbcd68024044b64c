"""Looking inside of layers: what is recorded, and that it costs nothing."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from model import tracing
from model.layers import segment_positions
from model.sharding import Context
from model.transformer import Transformer
from tests.attention import cases
from tests.attention.cases import close
from tests.model.test_transformer import ALL, SOME, build

T = 12
IDS = jnp.asarray(np.repeat([[4, 1, 2], [0, 7, 3]], (5, 3, T - 8), axis=1))
TOKENS = np.random.default_rng(0).integers(0, 32, (2, T)).astype(np.int32)
LATER = np.triu(np.ones((T, T), bool), 1)
ELSEWHERE = np.asarray(IDS[:, :, None] != IDS[:, None])

# What a variant is to have, by default, of what it records.
MAPS = {'attention', 'value', 'head_output'}
OTHER_MAPS = {f'{name}_2' for name in MAPS}
INTERNALS = {
    'causal': MAPS, 'co4': MAPS, 'deltanet': MAPS | {'beta', 'gate'},
    'differential': MAPS | OTHER_MAPS | {'lambda'},
    'gated_deltanet': MAPS | {'beta', 'decay', 'gate'},
    'gla': MAPS | {'decay', 'gate'}, 'hgrn2': MAPS | {'decay'},
    'identity': set(), 'infinite': MAPS,
    'kda': MAPS | {'beta', 'decay', 'gate'}, 'linear': MAPS,
    'mamba2': MAPS | {'decay', 'gate', 'step_size'}, 'mla': MAPS,
    'retention': MAPS | {'decay', 'gate'},
    'rglru': {'decay', 'gate', 'input_gate'},
    'ssm': {'decay', 'gate', 'step_size'},
}
every_case = pytest.mark.parametrize('case', cases.MAIN, ids=str)
slow_but = lambda fast: [
    name if name in fast else pytest.param(name, marks=pytest.mark.slow)
    for name in ALL]


@functools.cache
def recorded(case):
  """{name: array} of a mixer on packed documents."""
  @jax.jit
  def run(mixer, x, ctx):
    tape = []
    mixer(x, dataclasses.replace(ctx, tape=tape))
    return tracing.named(tape)
  return jax.device_get(run(
      cases.build(case), cases.inputs(T), Context(segment_positions(IDS), IDS)))


def maps(found):
  """The triples (attention, value, head_output), numbered or not."""
  return [tuple(found[name + number] for name in (
      'attention', 'value', 'head_output')) for number in ('', '_2')
      if 'attention' + number in found]


@pytest.mark.parametrize('name', ALL)
def test_variants_record_what_they_have(name):
  assert recorded(cases.Case(name)).keys() == INTERNALS.get(name, set())


@every_case
def test_maps_make_the_heads_of_the_values(case):
  """Of all flags: groups, windows, caps, sinks, biases, other weights."""
  for weights, values, outputs in maps(recorded(case)):
    N, K = weights.shape[1], values.shape[2]
    close(np.einsum('BNTS,BSNV->BTNV', weights, values.repeat(N // K, 2)),
          outputs)


@every_case
def test_maps_are_zero_for_the_future_and_other_documents(case):
  for weights, *_ in maps(recorded(case)):
    assert np.isfinite(weights).all()
    assert not weights[:, :, LATER].any()
    assert not np.moveaxis(weights, 1, -1)[ELSEWHERE].any()


@pytest.mark.parametrize(
    'name', ['causal', 'co4', 'differential', 'infinite', 'linear', 'mla'])
def test_rows_of_a_softmax_add_up_to_one(name):
  for weights, *_ in maps(recorded(cases.Case(name))):
    assert weights.min() >= 0
    close(weights.sum(-1), np.ones(weights.shape[:3]))


@pytest.mark.parametrize('mode', ['streaming', 'exact'])
def test_maps_of_latent_queries_are_averaged(mode):
  """co4's heads are means over them, with sinks."""
  model = build('co4', n_layer=1, co4_mode=mode, use_flash_lobo=True)
  layer, = model.trace(TOKENS, segment_ids=IDS)
  heads = layer.internals['head_output']
  heads = heads.reshape(2, T, 4, -1, heads.shape[-1])
  close(layer.block.mixer.out(heads.mean(3)), layer.internals['mixer_output'])


def test_rows_and_the_sink_add_up_to_one():
  """With a sink of e^0, a first token sees its own score and the sink."""
  case = cases.Case('causal', 'sink', (('use_flash_obo_const', True),))
  with_sink, = maps(recorded(case))
  without, = maps(recorded(cases.Case('causal')))
  kept = with_sink[0].sum(-1)
  assert ((kept > 0) & (kept < 1)).all()
  close(with_sink[0], without[0] * kept[..., None])


def test_a_map_is_float32_in_bfloat16_too():
  x, ctx = cases.inputs(T).astype(jnp.bfloat16), Context(
      segment_positions(IDS), IDS, tape=[])
  cases.build(cases.Case('causal'), compute_dtype='bfloat16')(x, ctx)
  weights = tracing.named(ctx.tape)['attention']
  assert weights.dtype == jnp.float32
  close(weights.sum(-1), np.ones(weights.shape[:3]))


@every_case
def test_decays_are_factors(case):
  found = recorded(case)
  for name in found:
    if name.partition('_')[0] == 'decay':
      assert found[name].shape[:2] == IDS.shape
      assert (found[name] > 0).all() and (found[name] <= 1).all()
  if 'step_size' in found:
    assert (found['step_size'] > 0).all()


@every_case
def test_nothing_is_computed_without_a_tape(case, monkeypatch):
  """The program is that of a Context which cannot record."""
  mixer = cases.build(case)

  def program(tape=None):
    # A new function, as traces of an old one are remembered.
    jaxpr = jax.make_jaxpr(lambda mixer, x: mixer(
        x, Context(segment_positions(IDS), IDS, tape=tape))[0])(
            mixer, cases.inputs(T))
    return re.sub(r'0x[0-9a-f]+', '', f'{jaxpr} {jaxpr.consts}')
  without = program()
  if case.variant != 'identity':
    assert program(tape=[]) != without
  monkeypatch.setattr(Context, 'record', lambda self, name, make: None)
  assert program() == without


def test_a_tape_does_not_go_through_jit():
  """What it would hold afterwards are not arrays."""
  ctx, tape = Context(jnp.zeros((1, 1), jnp.int32)), []
  taped = dataclasses.replace(ctx, tape=tape)
  assert jax.tree.structure(taped) == jax.tree.structure(ctx)
  jax.jit(lambda ctx: ctx.record('x', lambda: ctx.positions))(taped)
  assert not tape


@functools.cache
def everything():
  """(the model of all variants with a tail, its Layers), packed."""
  model = build(*ALL, n_layer=len(ALL) + 2)
  return model, model.trace(TOKENS, segment_ids=IDS)


def test_layers_are_those_of_the_model():
  """Scanned and in the tail: the stream, and logits at its end."""
  model, layers = everything()
  want, _ = jax.jit(lambda model: model(TOKENS, segment_ids=IDS))(model)
  close(model.lens(layers[-1].after), want, 1e-5)
  assert [x.index for x in layers] == [*range(len(ALL) + 2)]
  assert [x.variant for x in layers] == [*ALL, *ALL[:2]]
  for one, other in zip(layers, layers[1:]):
    assert one.after is other.before
  lens = model.lens(jnp.stack([x.after for x in layers]))
  assert lens.shape == (len(layers), *TOKENS.shape, 32)
  for layer in layers:
    for name in ('mixer_input', 'mixer_output'):
      assert layer.internals[name].shape == layer.before.shape
    known = INTERNALS.get(layer.variant, set())
    assert layer.internals.keys() == known | {'mixer_input', 'mixer_output'}


@pytest.mark.parametrize('name', slow_but(SOME))
def test_influence_is_where_a_token_sees(name):
  layer = everything()[1][ALL.index(name)]
  found = np.asarray(layer.influence(probes=2))
  assert found.shape == (2, T, T) and np.isfinite(found).all()
  assert not found[:, LATER].any() and not found[ELSEWHERE].any()
  assert (np.diagonal(found, axis1=1, axis2=2) > 0).all()
  if name == 'identity':
    assert not found[:, ~np.eye(T, dtype=bool)].any()


def test_influence_is_the_size_of_the_jacobian():
  layer = everything()[1][ALL.index('causal')]
  x, ctx = layer.internals['mixer_input'], layer.ctx

  def outputs(x):
    return layer.block.mixer(x, ctx)[0]
  jacobian = jnp.stack([jax.jacobian(outputs)(x)[b, :, :, b]
                        for b in range(2)])  # [B,T,D,S,D]
  want = jnp.sqrt((jacobian ** 2).sum((2, 4)))
  got = layer.influence(probes=400)
  assert np.abs(got - want).max() < 0.1 * want.max()


@pytest.mark.parametrize('name', slow_but(SOME))
def test_states_are_those_of_decoding(name):
  layer = everything()[1][ALL.index(name)]
  mixer, states = layer.block.mixer, layer.states()
  for x in jax.tree.leaves(states):
    assert x.shape[0] == T
  _, whole = jax.jit(lambda mixer, x, ctx: mixer(
      x, ctx, mixer.init_state(2, T)))(
          mixer, layer.internals['mixer_input'], layer.ctx)
  last = jax.tree.map(lambda x: x[-1], states)
  assert jax.tree.structure(last) == jax.tree.structure(whole)
  for one, other in zip(jax.tree.leaves(last), jax.tree.leaves(whole)):
    close(one, other, 1e-4)


def test_layers_of_equal_blocks_are_told_apart():
  """Their depth, which hgrn2 has its bounds from, and their weights."""
  model = build('hgrn2', n_layer=3)
  layers = model.trace(TOKENS)
  least = [float(x.internals['decay'].min()) for x in layers]
  assert least[1] > 1 / 3 and least[2] > 2 / 3
  close(model.lens(layers[-1].after), model(TOKENS)[0], 1e-5)


def test_values_of_the_first_layer_are_mixed_in():
  model = build('causal', n_layer=2, causal_value_residual=True)
  layers = model.trace(TOKENS)
  close(model.lens(layers[-1].after), model(TOKENS)[0], 1e-5)
  assert len(jax.tree.leaves(layers[1].states())) == 4


def test_only_the_layers_asked_for(monkeypatch):
  model = build('causal', 'identity', n_layer=5)
  calls, block = collections.Counter(), Transformer.block

  def count(self, index):
    calls[index] += 1
    return block(self, index)
  monkeypatch.setattr(Transformer, 'block', count)
  one, other = model.trace(TOKENS, layers=(-3, 0))
  assert (one.index, other.index) == (2, 0)
  assert set(calls) == {0, 1, 2}
  assert model.trace(TOKENS, layers=()) == ()


@pytest.mark.parametrize('wrong', [5, -6, 1.5, 'all'])
def test_a_layer_that_is_not_there(wrong):
  model = build('identity', n_layer=5)
  with pytest.raises(ValueError, match='5') as error:
    model.trace(TOKENS, layers=[wrong])
  assert repr(wrong) in str(error.value) and '\n' not in str(error.value)


def test_tokens_are_checked_as_ever():
  with pytest.raises(ValueError, match='vocabulary'):
    build('identity').trace(TOKENS + 32)


def test_every_variant_is_listed():
  assert set(INTERNALS) == set(attention.names())
