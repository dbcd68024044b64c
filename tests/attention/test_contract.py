"""What every attention variant promises, tested once for all of them.

Each case is one compiled program (`measure`), whose results the tests look at
one promise at a time. The defaults of a variant and most of its flags together
run always; the rows that hold the other flags and values, and every flag alone
against the oracle, are in the slow tier.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention.kernels import dispatch
from model.layers import segment_positions
from model.sharding import Context
from tests.attention import cases, oracles
from tests.attention.cases import build, close, inputs, plain

T = 12
# Three documents a row. An id says nothing but "the same document".
LENGTH = 4
IDS = np.repeat([[4, 1, 2], [0, 7, 3]], LENGTH, axis=1)
# Of other lengths in each row, cut in other places.
UNEVEN = np.repeat([[4, 4, 2, 0, 5], [1, 0, 0, 0, 6]], (1, 4, 2, 2, 3), axis=1)
PADDING = np.array([3, 6])
# Where a sequence is handed on: between two documents or inside of one.
HANDOFF = 6

# Variants of deltanet's layer: all their flags at once are in the slow tier.
RELATED = 'gated_deltanet', 'kda'

slow = lambda case: pytest.param(case, marks=pytest.mark.slow)
# Of one scope, all tests of a case come one after the other: its program is
# then still there.
every_case = pytest.mark.parametrize('case', [
    *(slow(c) if c.flags and c.variant in RELATED else c for c in cases.MAIN),
    *(slow(c) for c in cases.REST if not cases.shared(c))], ids=str,
    scope='module')
every_variant = pytest.mark.parametrize('name', attention.names())


def packed(mixer, x, ids):
  return mixer(x, Context(segment_positions(ids), ids))[0]


def continued(mixer, x, ids, positions, *, chunks):
  """The outputs when x comes in chunks, then one token at a time."""
  state = mixer.init_state(x.shape[0], x.shape[1] + 3)
  cut = lambda a, start, size: None if a is None else a[:, start:][:, :size]
  ys, start = [], 0
  for size in chunks:
    ctx = Context(*(cut(a, start, size) for a in (positions, ids)))
    y, state = mixer(cut(x, start, size), ctx, state)
    ys.append(y)
    start += size
  if start == x.shape[1]:
    return jnp.concatenate(ys, 1)

  def step(state, xs):
    x, position, token_id = jax.tree.map(lambda a: a[:, None], xs)
    y, state = mixer(x, Context(position, token_id), state)
    return state, y[:, 0]
  rest = jax.tree.map(
      lambda a: a[:, start:].swapaxes(0, 1), (x, positions, ids))
  y = jax.lax.scan(step, state, rest)[1].swapaxes(0, 1)
  return jnp.concatenate([*ys, y], 1)


def sensitivity(mixer, x):
  """([T,T,B], tree): sizes of d y_t / d x_s, gradients of the parameters.

  Of a random part of y_t.
  """
  y, pull = jax.vjp(plain, mixer, x)
  part = jax.random.normal(jax.random.key(1), y.shape)
  at = jnp.arange(T)
  weights, rows = jax.vmap(lambda t: pull(part * (at == t)[:, None]))(at)
  return jnp.abs(rows).sum(-1).swapaxes(1, 2), jax.tree.map(
      lambda w: w.sum(0), weights)


@jax.jit
def program(mixer, half, x, ids):
  """All that the tests look at; `half` is the mixer for bfloat16."""
  padded = jnp.arange(T) - PADDING[:, None]
  shifted = jnp.stack([jnp.roll(row, -n, 0) for row, n in zip(x, PADDING)])
  # Three ways to continue, side by side: one document, several, padding.
  rows = jnp.concatenate([x, x, x])
  row_ids = jnp.concatenate([jnp.zeros_like(ids), ids, padded >= 0])
  positions = jnp.concatenate([
      cases.counted(x), segment_positions(ids), jnp.maximum(padded, 0)])
  both = plain(mixer, jnp.concatenate([x, shifted]))
  stepped = continued(mixer, rows, row_ids, positions, chunks=(5,))
  chunked = continued(mixer, rows, row_ids, positions,
                      chunks=(HANDOFF, T - HANDOFF))
  sizes, gradient = sensitivity(mixer, x)
  documents = x.reshape(-1, LENGTH, x.shape[-1])
  return {
      'plain': both[:2], 'shifted': both[2:], 'packed': packed(mixer, x, ids),
      'alone': plain(mixer, documents).reshape(x.shape),
      'stepped': jnp.split(stepped, 3), 'chunked': jnp.split(chunked, 3),
      'bfloat16': continued(
          half, x.astype(jnp.bfloat16), None, cases.counted(x),
          chunks=(HANDOFF, T - HANDOFF)).astype(x.dtype),
      'sensitivity': sizes, 'gradient': gradient,
  }


@functools.cache
def measure(case, changed=None):
  """The program's results; `changed` is the document that differs."""
  x = inputs(T)
  if changed is not None:
    x = jnp.where(document(changed)[:, None], 100 * inputs(T, seed=1), x)
  half = build(case, compute_dtype='bfloat16')
  return jax.device_get(program(build(case), half, x, jnp.asarray(IDS)))


def document(index):
  """bool [T]: the tokens of a document."""
  return np.arange(T) // LENGTH == index


@every_case
def test_no_token_sees_a_later_one(case):
  seen = measure(case)['sensitivity']
  later = np.triu(np.ones((T, T), bool), 1)
  assert not seen[later].any(), 'd y_t / d x_s is not 0 for some s > t'


@every_case
def test_every_token_sees_itself(case):
  seen = measure(case)['sensitivity']
  assert np.isfinite(seen).all()
  # What is along its own value is all that a first token sees.
  some = np.arange(int('attn_xsa' in dict(case.flags)), T)
  assert (seen[some, some] > 0).all()


@every_case
@pytest.mark.parametrize('changed', [0, 1, 2])
def test_packed_documents_never_see_each_other(case, changed):
  before = measure(case)['packed']
  after = measure(case, changed=changed)['packed']
  inside = document(changed)
  assert after[:, ~inside].tobytes() == before[:, ~inside].tobytes()
  assert (after[:, inside] != before[:, inside]).any()


@every_case
def test_packed_documents_are_as_if_alone(case):
  results = measure(case)
  close(results['packed'], results['alone'])


@every_case
@pytest.mark.parametrize('way', ['stepped', 'chunked'])
def test_a_state_continues_where_it_ended(case, way):
  """Prefill and single tokens, or chunks; padding as in model.sample."""
  results = measure(case)
  one, several, padded = results[way]
  close(one, results['plain'])
  close(several, results['packed'])
  for row, padding in enumerate(PADDING):
    close(padded[row, padding:], results['shifted'][row, :T - padding])


@every_case
def test_bfloat16_is_close_to_float32(case):
  results = measure(case)
  # A first token sees one key: where that is nearly orthogonal to the query, a
  # norm of what it returns divides by nearly zero.
  rms = lambda a: np.sqrt(np.mean(a[:, 1:].astype(np.float64) ** 2))
  error = results['bfloat16'] - results['plain']
  assert rms(error) <= 0.03 * rms(results['plain'])


@every_case
def test_every_parameter_learns(case):
  for name, grad in cases.parameters(measure(case)['gradient']).items():
    assert np.isfinite(grad).all(), f'the gradient of {name} is not finite'
    assert grad.any(), f'the gradient of {name} is zero'


@every_case
def test_twice_the_same_bits(case):
  again = measure.__wrapped__(case)
  same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(),
                      measure(case), again)
  assert all(jax.tree.leaves(same)), same


@pytest.mark.parametrize('case', [
    *cases.MAIN, *cases.REST, *map(slow, cases.SINGLE)], ids=str)
def test_the_outputs_are_those_of_the_paper(case):
  """Against float64 NumPy, with documents packed."""
  oracle = oracles.find(case.variant)
  mixer, x, ids = build(case), inputs(T), jnp.asarray(UNEVEN)
  got = jax.jit(packed)(mixer, x, ids)
  close(got, oracle(
      mixer, np.asarray(x, np.float64), segment_ids=UNEVEN,
      positions=np.asarray(segment_positions(ids))), 1e-5)


@every_variant
def test_every_flag_has_a_row(name):
  missing = [f for f in attention.flags(name) if f not in cases.SETTINGS]
  assert not missing, (
      f'{", ".join(missing)} of {name}: give each a row in SETTINGS of '
      'tests/attention/cases.py, {flag: [values that are not its default]}')
  defaults = {f: field.default for f, field in attention.flags(name).items()}
  for case in cases.single(name):
    assert dict(case.flags)[case.flag] != defaults[case.flag], str(case)


@every_variant
def test_every_variant_has_an_oracle(name):
  assert callable(oracles.find(name))


def footprint(case, monkeypatch):
  """All that a flag can change: parameters, computation, kernels asked for."""
  asked, select = [], dispatch.select

  def record(op, implementation, *args, **kwargs):
    asked.append((op, implementation))
    return select(op, implementation, *args, **kwargs)
  with monkeypatch.context() as patch:
    patch.setattr(dispatch, 'select', record)
    mixer = build(case)
    # A new function, as traces of an old one are remembered.
    jaxpr = jax.make_jaxpr(lambda *args: plain(*args))(mixer, inputs(T))
  jaxpr = re.sub(r'0x[0-9a-f]+', '', f'{jaxpr} {jaxpr.consts}')
  return ({k: v.tolist() for k, v in cases.parameters(mixer).items()}, jaxpr,
          asked, jax.tree.map(jnp.shape, mixer.init_state(2, 16)))


@pytest.mark.parametrize('case', cases.SINGLE, ids=str)
def test_every_flag_is_read(case, monkeypatch):
  without = footprint(case.base(), monkeypatch)
  assert without == footprint(case.base(), monkeypatch)
  assert footprint(case, monkeypatch) != without, (
      f'{case.flag} changes nothing in {case.variant}')


@pytest.mark.parametrize(
    'case', [c for c in cases.SINGLE if c.needs], ids=str)
def test_a_flag_that_does_nothing_is_an_error(case):
  """A flag without those that give it a meaning."""
  needed = dict(case.needs)
  flags = {k: v for k, v in case.flags if k not in needed}
  with pytest.raises(ValueError, match=case.flag):
    attention.check(cases.config(attention_variant=case.variant, **flags))
    build(cases.Case(case.variant, case.flag, tuple(flags.items())))


@every_variant
def test_a_flag_that_no_layer_honours_is_an_error(name):
  """It names the flag, the variants in use and those that would do."""
  own = attention.flags(name)
  foreign = {flag: other for other in attention.names()
             for flag in attention.flags(other) if flag not in own}
  assert foreign or name != 'identity'
  for flag, other in foreign.items():
    value, needs = cases.settings(other, flag)[0]
    config = cases.config(attention_variant=name, **value)
    with pytest.raises(ValueError) as error:
      attention.check(config)
    for part in (flag, f'in use: {name}', other):
      assert part in str(error.value)
    config.update(attention_list=(other, name), **needs)
    attention.check(config)


LIMITS = {
    'no cap': (dict(attn_logit_softcapping=1e5), {}),
    'a window of everything': (dict(window_size=T), {}),
    'as many keys as queries': (dict(n_kv_group=4), {}),
    'a constant of zero': (
        dict(use_flash_obo_const=True, flash_lobo_log_const=-1e4), {}),
    'a learned constant of zero': (
        dict(use_flash_lobo=True, flash_lobo_log_const=-1e4), {}),
    'one learned constant for all heads': (
        dict(use_flash_lobo=True, use_flash_lobo_per_head=True),
        dict(use_flash_lobo=True)),
    'a learned constant that is not learned yet': (
        dict(use_flash_lobo=True, flash_lobo_log_const=0.7),
        dict(use_flash_obo_const=True, flash_lobo_log_const=0.7)),
    'a latent constant of zero': (
        dict(use_mla_lobo=True, mla_lobo_init=-1e4), {}),
    'gates that forget nothing': (
        dict(use_forget_gate=True, forget_gate_bias_init=1e3), {}),
    'gates that forget everything': (
        dict(use_forget_gate=True, forget_gate_bias_init=-1e4),
        dict(window_size=1)),
    'no flash': (dict(disable_flash_attention=True), {}),
    'a group of one head': (dict(n_cproj=4), dict(use_concat_heads=True)),
}


@pytest.mark.parametrize('limit', LIMITS)
@every_variant
def test_limits(name, limit):
  """Two settings that mean the same give the same."""
  one, other = LIMITS[limit]
  if not {*one, *other} <= set(attention.flags(name)):
    pytest.skip(f'not of {name}')
  needs = {k: v for flag in (*one, *other)
           for k, v in cases.NEEDS.get((name, flag), {}).items()}
  first, second = (
      cases.Case(name, 'limit', tuple({**needs, **flags}.items()))
      for flags in (one, other))
  close(cases.outputs(first), cases.outputs(second))


@pytest.mark.skipif('infinite' not in attention.names(), reason='no infinite')
def test_infinite_with_concatenated_heads_is_causal():
  infinite = build(cases.Case('infinite'), use_concat_heads=True)
  causal = build(cases.Case('causal'))
  source = cases.parameters(infinite)
  target = cases.parameters(causal)
  assert {k: v.shape for k, v in source.items()} == {
      k: v.shape for k, v in target.items()}
  causal = jax.tree.unflatten(
      jax.tree.structure(causal), [source[name] for name in target])
  x = inputs(T)
  close(jax.jit(plain)(infinite, x), jax.jit(plain)(causal, x))


LONG = 2048


@pytest.mark.parametrize('name', [
    n for n in attention.names() if n != 'identity'])
def test_no_array_of_every_pair_of_tokens(name):
  """Forward and backward, compiled: the scores are never there at once."""
  def loss(mixer, x):
    ctx = Context(cases.counted(x), jnp.zeros(x.shape[:2], jnp.int32))
    return (mixer(x, ctx)[0] ** 2).sum()
  mixer = build(cases.Case(name), n_head=2)
  x = jax.ShapeDtypeStruct((1, LONG, 32), jnp.float32)
  text = jax.jit(jax.value_and_grad(loss)).lower(mixer, x).compile().as_text()
  found = re.findall(r'\b(?:f32|bf16|pred|s32)\[([\d,]+)\]', text)
  shapes = {tuple(map(int, dims.split(','))) for dims in found}
  assert shapes
  squares = [s for s in shapes if sum(d >= LONG for d in s) > 1]
  largest = max(shapes, key=np.prod)
  assert not squares
  assert np.prod(largest) < LONG * LONG / 2, largest


@pytest.mark.slow
@pytest.mark.parametrize('case', cases.MAIN, ids=str)
def test_long_documents_continue_too(case):
  """More tokens than one tile of scores has."""
  x, length = inputs(900), 900
  ids = jnp.asarray(np.repeat([[0, 1, 2]] * 2, (400, 37, length - 437), 1))
  mixer, positions = build(case, block_size=1024), segment_positions(ids)
  chunked = jax.jit(functools.partial(
      continued, chunks=(500, 1, 380)))
  close(chunked(mixer, x, ids, positions), jax.jit(packed)(mixer, x, ids),
        5e-5)
