"""The model around the mixers, with layers of several kinds mixed.

What every variant promises is tested in tests/attention; here the kinds of
SOME stand for all, but for one loss of all of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

import attention
from model import mlp
from model.layers import segment_positions
from model.sharding import Context, spec
from model.transformer import Transformer
from tests.attention import cases
from tests.attention.cases import close
from train_lib import loss
from train_lib.state import AbstractModel

B, T = 8, 12
SHAPE = dict(n_embd=16, block_size=16, vocab_size=32)
TOKENS = np.random.default_rng(0).integers(0, 32, (B, T + 1)).astype(np.int32)
IDS = np.repeat([[0, 1, 2]] * B, (5, 3, T - 7), axis=1)
BATCH = {'tokens': TOKENS, 'segment_ids': IDS}


def config(*kinds, **flags):
  flags = {**SHAPE, **flags}
  if kinds:
    flags.setdefault('attention_list', kinds)
    flags.setdefault('n_layer', len(kinds))
  return cases.config(**flags)


def init(abstract):
  """{name: array} of a model, with random numbers where it has constants."""
  rng = np.random.default_rng(0)
  return {name: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32)
          for name, x in abstract.init(jax.random.key(0)).items()}


def losses(small, *, mesh=None, params=None, dropout_keys=(None,)):
  """(mean loss, {name: gradient}) of a batch of packed documents.

  Of one program; with several dropout keys, a list of such pairs.
  """
  abstract = AbstractModel(small)
  params = init(abstract) if params is None else params
  if mesh is not None:
    lie = lambda name, x: NamedSharding(
        mesh, spec(abstract.variables[name].letters, x.shape, mesh))
    params = {n: jax.device_put(x, lie(n, x)) for n, x in params.items()}

  @jax.jit
  @jax.value_and_grad
  def both(params, dropout_key):
    model = abstract.merge(params)
    inputs, targets, ids = loss.targets_of(
        jax.tree.map(jnp.asarray, BATCH))
    hidden, _ = model.hidden(
        inputs, segment_ids=ids, mesh=mesh, dropout_key=dropout_key)
    sums = loss.cross_entropy(model, hidden, targets)
    return sums.total / sums.number
  first, *others = [
      jax.device_get(both(params, key)) for key in dropout_keys]
  return [first, *others] if others else first


def same(one, other, tolerance):
  """Loss and every gradient, next to the size of all gradients."""
  assert one[0] == pytest.approx(other[0], rel=tolerance)
  assert one[1].keys() == other[1].keys()
  size = max(np.abs(g).max() for g in other[1].values())
  for name in one[1]:
    error = np.abs(one[1][name] - other[1][name]).max() / size
    assert error <= tolerance, f'{name}: {error:.2g}'


ALL = attention.names()
# A cache, a cache of the last tokens, a constant state, none.
SOME = 'causal', 'causal(window_size=4)', 'ssm', 'identity'


@functools.cache
def reference():
  """All variants, one layer each, on one device."""
  return losses(config(*ALL))


def test_every_parameter_of_every_variant_learns():
  value, grads = reference()
  assert value == pytest.approx(math.log(32), rel=0.5)
  for name, grad in grads.items():
    assert np.isfinite(grad).all() and grad.any(), name


@pytest.mark.parametrize('sizes', [
    pytest.param((8, 1, 1), marks=pytest.mark.slow),
    pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str)
def test_every_mesh_gives_the_loss_of_one_device(sizes):
  """Rounding grows with layers, of which there is one for each variant."""
  same(losses(config(*ALL), mesh=mesh_of(*sizes)), reference(), 3e-5)


def mesh_of(*sizes):
  return jax.make_mesh(
      sizes, ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.slow
@pytest.mark.parametrize('case', cases.MAIN, ids=str)
def test_every_variant_and_its_flags_on_a_mesh(case):
  """Of flags, with fewer key heads than shards."""
  sizes = (2, 1, 4) if case.flags else (2, 2, 2)
  small = config(case.variant, n_embd=32, **dict(case.flags))
  same(losses(small, mesh=mesh_of(*sizes)), losses(small), 1e-5)


def test_fewer_key_heads_than_shards():
  small = config('causal', n_kv_group=1)
  same(losses(small, mesh=mesh_of(2, 1, 4)), losses(small), 1e-5)


def test_how_it_is_computed_changes_nothing():
  small = functools.partial(config, 'causal', 'identity', n_layer=5)
  base = losses(small())
  for flags in (dict(remat='full'), dict(remat='dots'), dict(scan_unroll=1)):
    same(losses(small(**flags)), base, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_changes_nothing_in_any_variant(remat):
  small = config(*ALL, n_layer=2 * len(ALL), scan_unroll=1)
  other = config(*ALL, n_layer=2 * len(ALL), scan_unroll=1, remat=remat)
  same(losses(other), losses(small), 1e-5)


@pytest.mark.slow
def test_bfloat16_trains_every_variant():
  value, grads = losses(config(*ALL, compute_dtype='bfloat16'))
  assert value == pytest.approx(reference()[0], rel=0.02)
  size = max(np.abs(g).max() for g in reference()[1].values())
  for name, grad in grads.items():
    assert grad.dtype == np.float32 and np.isfinite(grad).all(), name
    # Norms of first tokens, which see one key, divide by nearly zero.
    assert np.abs(grad - reference()[1][name]).max() < 0.3 * size, name


def test_thirty_mixed_layers():
  """Scanned periods and a tail of what is left."""
  small = config(*SOME, n_layer=30, scan_unroll=1, init_std=0.02)
  abstract = AbstractModel(small)
  assert abstract.module.repeats == 30 // len(SOME)
  assert len(abstract.module.tail) == 30 % len(SOME)
  value, grads = losses(small, params=abstract.init(jax.random.key(0)))
  assert value == pytest.approx(math.log(32), rel=0.2)
  for name, grad in grads.items():
    assert np.isfinite(grad).all(), name
    assert all(layer.any() for layer in (
        grad if name.startswith('periods') else [grad])), name


def build(*kinds, **flags):
  abstract = AbstractModel(config(*kinds, **flags))
  return abstract.merge(init(abstract))


def test_a_tail_is_the_beginning_of_the_period():
  layers = attention.layers(config('causal', 'identity', 'causal', n_layer=8))
  assert [str(layer) for layer in layers] == [
      'causal', 'identity', 'causal'] * 2 + ['causal', 'identity']
  model = AbstractModel(
      config('causal', 'identity', 'causal', n_layer=8)).module
  names = [type(b.mixer).__module__ for b in (*model.periods, *model.tail)]
  assert [n.removeprefix('attention.') for n in names] == [
      'causal', 'identity', 'causal', 'causal', 'identity']
  assert model.repeats == 2


def test_layers_come_in_the_order_of_the_list():
  """Scanned, with a tail, against the blocks one after another."""
  model = build('causal', 'identity', n_layer=5)

  def unrolled(model, tokens):
    ctx = Context(jnp.broadcast_to(jnp.arange(T), tokens.shape))
    x = model.embed(tokens, ctx)
    blocks = [jax.tree.map(lambda w, i=i: w[i], block)
              for i in range(model.repeats) for block in model.periods]
    for block in blocks:
      x, _ = block(x, ctx)
    for block in model.tail:
      x, _ = block(x, ctx)
    return model.logits(model.norm(x))
  tokens = TOKENS[:, :T]
  close(jax.jit(Transformer.__call__)(model, tokens)[0],
        jax.jit(unrolled)(model, tokens))


def test_without_a_list_every_layer_is_the_variant():
  layers = attention.layers(config(attention_variant='identity', n_layer=3))
  assert [str(layer) for layer in layers] == ['identity'] * 3


def test_a_state_continues_a_mixed_model():
  """Several kinds, a tail, packed documents: prefill, then token by token."""
  model = build(*SOME, n_layer=len(SOME) + 1)
  tokens, ids = TOKENS[:2, :T], jnp.asarray(IDS[:2, :T])
  positions, cut = segment_positions(ids), 6

  whole, nothing = jax.jit(lambda model, tokens: model(
      tokens, segment_ids=ids))(model, tokens)
  assert nothing is None

  @jax.jit
  def call(model, tokens, ids, positions, state):
    return model(tokens, segment_ids=ids, positions=positions, state=state)
  state = jax.jit(lambda model: model.init_state(2, T))(model)
  ys, start = [], 0
  for size in (cut, *[1] * (T - cut)):
    at = np.s_[:, start:start + size]
    y, state = call(model, tokens[at], ids[at], positions[at], state)
    ys.append(y)
    start += size
  close(jnp.concatenate(ys, 1), whole)


def test_no_document_sees_another():
  model = build(*SOME)
  run = jax.jit(lambda model, tokens: model(
      tokens, segment_ids=jnp.asarray(IDS[:, :T]))[0])
  before = np.asarray(run(model, TOKENS[:, :T]))
  inside = IDS[0, :T] == 1
  changed = np.where(inside, 31 - TOKENS[:, :T], TOKENS[:, :T])
  after = np.asarray(run(model, changed))
  assert after[:, ~inside].tobytes() == before[:, ~inside].tobytes()
  assert (after[:, inside] != before[:, inside]).any()


def test_dropout_is_another_one_in_every_layer_and_step():
  small = config('causal', n_layer=2, dropout=0.5)
  drawn = losses(small, dropout_keys=[jax.random.key(i) for i in (0, 0, 1)])
  one, again, other = (float(value) for value, _ in drawn)
  without = float(losses(small)[0])
  assert without == losses(config('causal', n_layer=2))[0]
  assert one == again
  assert len({one, other, without}) == 3


@pytest.mark.parametrize('flags', [
    dict(use_abs_pos_embeddings=False), dict(tie_embeddings=False),
    dict(bias=True), dict(mlp_variant='swiglu'), dict(mlp_width=20),
    dict(norm_variant='layernorm'), dict(norm_variant='layernorm', bias=True),
    dict(n_head=2), dict(init_std=0.01), dict(dropout=0.3),
    dict(compute_dtype='bfloat16'), dict(vocab_size=40)],
    ids=lambda flags: '-'.join(f'{k}={v}' for k, v in flags.items()))
def test_the_flags_of_the_model_are_read(flags):
  def footprint(small):
    abstract = AbstractModel(small)
    jaxpr = jax.make_jaxpr(lambda params: abstract.merge(params).hidden(
        TOKENS[:, :T], dropout_key=jax.random.key(0))[0])(abstract.shapes)
    start = jax.make_jaxpr(abstract.init)(jax.random.key(0))
    return str(jaxpr), str(start)
  base = footprint(config('causal'))
  assert base == footprint(config('causal'))
  assert base != footprint(config('causal', **flags))


@pytest.mark.parametrize('flags, parts', [
    (dict(vocab_size=None), ['vocab_size']),
    (dict(n_layer=0), ['n_layer (0)']),
    (dict(n_head=0), ['n_head (0)']),
    (dict(n_head=3), ['n_head (3)', 'n_embd (16)']),
    (dict(n_embd=-1), ['n_embd (-1)']),
    (dict(block_size=0), ['block_size (0)']),
    (dict(dropout=1.0), ['dropout (1.0)']),
    (dict(dropout=-0.1), ['dropout (-0.1)']),
    (dict(mlp_width=-1), ['mlp_width (-1)']),
    (dict(vocab_size=-1), ['vocab_size (-1)']),
    (dict(scan_unroll=-1), ['scan_unroll (-1)']),
    (dict(mlp_variant='glu'), ['mlp_variant', "'glu'", 'gelu', 'swiglu']),
    (dict(norm_variant='rms'), ['norm_variant', "'rms'", 'layernorm']),
    (dict(compute_dtype='float16'), ['compute_dtype', 'bfloat16']),
    (dict(remat='some'), ['remat', "'some'", 'dots']),
    (dict(attention_variant='casual'), ["'casual'", 'causal', 'identity']),
    (dict(attention_list=('causal', 'nope')), ["'nope'", 'identity']),
    (dict(attention_list=('causal',) * 3), ['attention_list', '3', '(2)']),
    (dict(attention_variant='identity', window_size=3),
     ['window_size=3', 'identity', 'causal']),
], ids=lambda v: '-'.join(map(str, v)) if isinstance(v, dict) else None)
def test_bad_flags_are_named_when_the_model_is_built(flags, parts):
  with pytest.raises(ValueError) as error:
    AbstractModel(config(**flags))
  for part in parts:
    assert part in str(error.value)
  assert '\n' not in str(error.value)


def test_a_state_needs_positions():
  model = build('identity')
  with pytest.raises(ValueError, match='positions'):
    model(TOKENS[:2, :T], state=model.init_state(2, T))


@pytest.mark.parametrize('kind', ['gelu', 'swiglu'])
def test_mlps_by_hand(kind):
  small = config(mlp_variant=kind, mlp_width=10, bias=True)
  layer = mlp.build(small, rngs=nnx.Rngs(0))
  x = np.random.default_rng(0).standard_normal((1, 3, 16))
  w = {n: np.asarray(getattr(layer, n).weight[...], np.float64)
       for n in ('gate', 'up', 'down') if hasattr(layer, n)}
  if kind == 'gelu':
    inner = jax.nn.gelu(x @ w['up'])
  else:
    gate = x @ w['gate']
    inner = gate / (1 + np.exp(-gate)) * (x @ w['up'])
  close(layer(jnp.asarray(x, jnp.float32)), inner @ w['down'])
  assert layer.flops == 2 * sum(m.size for m in w.values())


def test_widths_of_mlps():
  width = lambda **flags: mlp.build(
      config(n_embd=24, **flags), rngs=nnx.Rngs(0)).up.out_shape
  assert width() == (96,)
  assert width(mlp_variant='swiglu') == (64,)
  assert width(mlp_width=7) == (7,)


def test_parameters_are_float32_and_know_their_letters():
  abstract = AbstractModel(config(*ALL, n_layer=2 * len(ALL) + 1))
  for name, variable in abstract.variables.items():
    shape = abstract.shapes[name]
    stacked = name.startswith('periods')
    assert shape.dtype == jnp.float32, name
    assert len(variable.letters) + stacked == len(shape.shape), name
    assert isinstance(variable.decay, bool), name


def test_the_count_of_parameters_of_a_gpt2():
  """The 124M of GPT-2: 50,257 tokens, 1,024 positions, 12 layers of 768."""
  small = config('causal', n_layer=12, n_head=12, n_embd=768, bias=True,
                 block_size=1024, vocab_size=50257, norm_variant='layernorm')
  assert AbstractModel(small).n_params() == 124_439_808


def test_flops_of_a_model():
  """Twice its matrices, and the attention of the tokens seen on average."""
  model = AbstractModel(config('causal', n_layer=3)).module
  dense = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 32 * 16
  seen = (T + 1) / 2
  assert model.flops(T) == pytest.approx(2 * dense + 3 * 4 * 16 * seen)


@pytest.mark.parametrize('name', ALL)
def test_scanned_layers_cost_what_single_ones_do(name):
  """The mixers of a period hold the weights of all of its repetitions."""
  cost = lambda n: AbstractModel(config(
      name, n_layer=n, vocab_size=40)).module.flops(T) - 2 * 40 * 16
  assert cost(3) == pytest.approx(3 * cost(1))
  assert cost(1) > 0


@pytest.mark.parametrize('name', ALL)
def test_scanned_layers_have_the_state_of_single_ones(name):
  shapes = lambda n: jax.tree.map(
      lambda x: x.shape[1:],
      jax.eval_shape(lambda: AbstractModel(
          config(name, n_layer=n)).module.init_state(2, T))[0])
  assert shapes(3) == shapes(1)
