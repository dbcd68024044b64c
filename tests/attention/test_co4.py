"""Co4 against its equations, and the running statistics it is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention import co4
from attention.kernels import running
from model.layers import segment_positions
from model.sharding import Context
from tests.attention import cases, oracles
from tests.attention.cases import Case, build, close, inputs
from tests.kernels.measure import largest_buffer, same_bits

MODS = {
    'cooperation': lambda r, c: np.clip(
        r**2 + 2 * r + c * (1 + abs(r)), 0.0, 6.0),
    'tm1': lambda r, c: 0.5 * r * (1 + np.exp(r * c)),
    'tm2': lambda r, c: r * (1 + c),
    'tm3': lambda r, c: r * (1 + np.tanh(r * c)),
    'tm4': lambda r, c: r * 2 ** (r * c),
}


def oracle(mixer, x, *, positions, segment_ids):
  """Adeel 2025, with prefixes for sequences; a whole one if bidirectional."""
  options, mod = mixer.options, MODS[mixer.options.mod_fn]
  K, V = oracles.dense(mixer.key, x), oracles.dense(mixer.value, x)
  latents = np.asarray(mixer.latent[...], np.float64)
  L, N, H = latents.shape
  cap, sink = options.attn_logit_softcapping, np.full(N, -np.inf)
  if options.use_flash_obo_const:
    sink = np.full(N, options.flash_lobo_log_const)
  if options.use_flash_lobo:
    sink = np.zeros(N) + np.asarray(mixer.log_sink[...], np.float64)
  heads = np.zeros(K.shape)
  for b in range(len(x)):
    for segment in np.unique(segment_ids[b]):
      at = np.flatnonzero(segment_ids[b] == segment)
      size, k, v = len(at), K[b, at], V[b, at]
      ends = np.arange(size) + 1
      if options.co4_mode == 'bidirectional':
        ends[:] = size
      q = np.stack([latents] * size)
      for _ in range(options.triadic_loops):
        context = np.stack([(k[:e].mean(0) + v[:e].mean(0)) / 2 for e in ends])
        q = mod(q, context[:, None])
        k = mod(k, (q.mean(1) + v) / 2)
        v = mod(v, (q.mean(1) + k) / 2)
      for t, l, n in np.ndindex(size, L, N):
        asking = q[[t] * ends[t] if options.co4_mode == 'exact'
                   else slice(ends[t])]
        s = (asking[:, l, n] * k[:ends[t], n]).sum(-1) / np.sqrt(H)
        if cap:
          s = cap * np.tanh(s / cap)
        top = max(s.max(), sink[n])
        p = np.exp(s - top)
        heads[b, at[t], n] += (
            p @ v[:ends[t], n] / (p.sum() + np.exp(sink[n] - top)) / L)
  return oracles.dense(mixer.out, heads)


def of(**flags):
  return Case('co4', 'test', tuple(flags.items()))


def encoder(**flags):
  options = co4.Options(co4_mode='bidirectional', **flags)
  return co4.Encoder(cases.config(), options, rngs=nnx.Rngs(0))


@jax.jit
def packed(mixer, x, ids):
  return mixer(x, Context(segment_positions(ids), ids))[0]


def documents(T, size=7):
  """int32 [2,T]: documents that do not begin where chunks do."""
  ids = np.arange(T) // size
  return jnp.asarray([ids, (np.arange(T) + 3) // size + 5], jnp.int32)


EVERYTHING = dict(triadic_loops=2, n_latent=3, mod_fn='tm3',
                  attn_logit_softcapping=0.5, use_flash_lobo=True,
                  use_flash_lobo_per_head=True, flash_lobo_log_const=1.0)


@pytest.mark.parametrize('mode', ['streaming', 'exact', 'bidirectional'])
@pytest.mark.parametrize('flags', [{}, EVERYTHING], ids=['default', 'all'])
def test_matches_the_paper(mode, flags):
  """Over more than one chunk."""
  x, ids = inputs(70), documents(70, 25)
  mixer = (encoder(**flags) if mode == 'bidirectional'
           else build(of(co4_mode=mode, **flags)))
  want = oracle(mixer, np.asarray(x, np.float64), positions=None,
                segment_ids=np.asarray(ids))
  close(packed(mixer, x, ids), want, 1e-5)


def test_every_flag_has_an_effect():
  x, ids = inputs(3), jnp.zeros((2, 3), jnp.int32)
  run = lambda **flags: np.asarray(packed(build(of(**flags)), x, ids))
  seen = [run()]
  for flags in (dict(n_latent=3), dict(triadic_loops=0), dict(mod_fn='tm1'),
                dict(co4_mode='exact'), dict(attn_logit_softcapping=0.1),
                dict(use_flash_obo_const=True, flash_lobo_log_const=1.0)):
    seen.append(run(**flags))
    for other in seen[:-1]:
      assert np.abs(seen[-1] - other).max() > 1e-3, flags


def test_without_loops_the_modes_agree():
  x, ids = inputs(70), documents(70)
  close(*(packed(build(of(triadic_loops=0, co4_mode=mode)), x, ids)
          for mode in ('streaming', 'exact')))


def test_a_bidirectional_segment_has_one_output():
  x, ids = inputs(70), documents(70, 35)
  y = np.asarray(packed(encoder(), x, ids))
  assert same_bits(y[0, :35], np.stack([y[0, 0]] * 35))
  assert same_bits(y[0, 35:], np.stack([y[0, 35]] * 35))
  assert not np.allclose(y[0, 0], y[0, 35])


@pytest.mark.parametrize('mode', ['streaming', 'exact'])
def test_the_state_continues_over_documents_and_chunks(mode):
  x, ids = inputs(150), documents(150, 60)
  mixer = build(of(co4_mode=mode, triadic_loops=2, use_flash_lobo=True))
  step = jax.jit(lambda mixer, x, ctx, state: mixer(x, ctx, state))
  positions = segment_positions(ids)
  state, parts = mixer.init_state(2, 150), []
  for start, stop in ((0, 70), (70, 71), (71, 150)):
    part = slice(start, stop)
    y, state = step(
        mixer, x[:, part], Context(positions[:, part], ids[:, part]), state)
    parts.append(y)
  close(jnp.concatenate(parts, 1), packed(mixer, x, ids))


@pytest.mark.parametrize('mode', ['streaming', 'exact'])
@pytest.mark.parametrize('mod_fn', ['cooperation', 'tm1'])
def test_packed_documents_never_see_each_other(mode, mod_fn):
  """However large the numbers of one become, over several chunks."""
  x = inputs(140)
  ids = jnp.asarray(np.repeat([[1, 2, 3]] * 2, (30, 60, 50), 1))
  mixer = build(of(co4_mode=mode, mod_fn=mod_fn))
  before = packed(mixer, x, ids)
  after = packed(mixer, x.at[:, 30:90].multiply(-1e4), ids)
  assert same_bits(before[:, :30], after[:, :30])
  assert same_bits(before[:, 90:], after[:, 90:])


def test_the_streaming_state_does_not_grow():
  sizes = [jax.tree.map(jnp.shape, build(of()).init_state(2, length))
           for length in (8, 8192)]
  assert sizes[0] == sizes[1]
  numbers = sum(x.size for x in jax.tree.leaves(build(of()).init_state(1, 8)))
  assert numbers == 32 * (4 + 1) + 2 * 4 * 4 + 1  # The count of tokens.


@pytest.mark.parametrize('mode', ['streaming', 'exact', 'bidirectional'])
def test_on_a_mesh(mode):
  mesh = jax.make_mesh((1, 2, 4), ('data', 'fsdp', 'tensor'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  flags = dict(use_flash_lobo=True, triadic_loops=2)
  mixer = (encoder(**flags) if mode == 'bidirectional'
           else build(of(co4_mode=mode, **flags)))
  x, ids = inputs(70), documents(70)

  @functools.partial(jax.jit, static_argnums=3)
  def run(mixer, x, ids, mesh):
    ctx = Context(segment_positions(ids), ids, mesh=mesh)
    if mode == 'bidirectional':
      return mixer(x, ctx)[0]
    return mixer(x, ctx, mixer.init_state(2, 70))[0]
  close(run(mixer, x, ids, mesh), run(mixer, x, ids, None))


def test_no_array_of_all_states():
  """Forward and backward, n_latent values a token would be 8 times D T."""
  mixer = build(of(n_latent=8), n_head=2)
  loss = lambda mixer, x: (cases.plain(mixer, x) ** 2).sum()
  x = jax.ShapeDtypeStruct((1, 4096, 32), jnp.float32)
  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(mixer, x).compile()
  assert largest_buffer(compiled) <= 4 * 4096 * 32


def example(T, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  starts = np.diff(documents(T), axis=1, prepend=0) != 0
  return normal(2, T, 2, 3), normal(2, T, 2, 4), jnp.asarray(starts)


def prefixes(scores, v, sink):
  """The running softmax by definition, of one document."""
  s = np.asarray(scores, np.float64)
  e = np.exp(s - max(s.max(), sink.max()))
  extra = np.exp(sink - max(s.max(), sink.max()))[:, None]
  weighed = np.einsum('TNL,TNV->TNLV', e, v).cumsum(0)
  return (weighed / (e.cumsum(0) + extra)[..., None]).mean(2)


@pytest.mark.parametrize('T', [1, 63, 100])
def test_running_statistics(T):
  scores, v, starts = example(T)
  sink = jnp.array([-1.0, 0.5])
  pool = jax.jit(lambda *inputs: running.in_chunks(
      lambda x, *rest: running.running_softmax(*x, *rest, sink=sink),
      inputs[:2], running.empty_softmax(2, 2, 3, 4), inputs[2], chunk=32)[0])
  mean = jax.jit(lambda x, starts: running.in_chunks(
      running.running_mean, x, (jnp.zeros((2, 2, 4)), jnp.zeros(2, jnp.int32)),
      starts, chunk=32)[0])
  averages, means = pool(scores, v, starts), mean(v, starts)
  for b in range(2):
    bounds = [*np.flatnonzero(starts[b]), T]
    for low, high in zip([0, *bounds], bounds):
      part, size = slice(low, high), high - low
      if size:
        close(averages[b, part],
              prefixes(scores[b, part], v[b, part], np.asarray(sink)), 1e-5)
        close(means[b, part], np.cumsum(np.asarray(v[b, part], np.float64), 0)
              / np.arange(1, size + 1)[:, None, None], 1e-5)


def test_scores_of_any_size():
  """Rising and falling by thousands, nothing overflows or is lost."""
  scores, v, _ = example(100)
  scores = scores + 1e3 * jnp.sin(jnp.arange(100))[:, None, None]

  @jax.jit
  def run(scores, v):
    return running.in_chunks(
        lambda x, *rest: running.running_softmax(*x, *rest),
        (scores, v), running.empty_softmax(2, 2, 3, 4), chunk=32)[0]
  got = run(scores, v)
  for t in (0, 50, 99):
    p = jax.nn.softmax(scores[:, :t + 1], 1)
    close(got[:, t], jnp.einsum('BSNL,BSNV->BNLV', p, v[:, :t + 1]).mean(2))
  grads = jax.grad(lambda *x: (run(*x) ** 2).sum(), (0, 1))(scores, v)
  assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_gradients_of_chunks_are_those_of_one():
  scores, v, starts = example(63)

  def loss(scores, v, chunk):
    y, _ = running.in_chunks(
        lambda x, *rest: running.running_softmax(*x, *rest),
        (scores, v), running.empty_softmax(2, 2, 3, 4), starts, chunk=chunk)
    return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()
  grad = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  for got, want in zip(grad(scores, v, 16), grad(scores, v, 63)):
    close(got, want)


@pytest.mark.parametrize('flags, message', [
    (dict(n_latent=0), r'n_latent \(0\) must be at least 1'),
    (dict(triadic_loops=-1), r'triadic_loops \(-1\) must be at least 0'),
    (dict(mod_fn='tm5'), "unknown mod_fn 'tm5', did you mean tm[1-4]"),
    (dict(co4_mode='fast'), "unknown co4_mode 'fast'"),
    (dict(co4_mode='bidirectional'), 'sees what a language model predicts'),
    (dict(disable_flash_attention=True), 'use co4_mode=exact'),
    (dict(n_head=5), r'n_head \(5\) must divide n_embd'),
], ids=str)
def test_bad_values(flags, message):
  with pytest.raises(ValueError, match=message):
    build(of(**flags))


def test_an_encoder_has_no_state():
  x = inputs(4)
  with pytest.raises(ValueError, match='no state'):
    encoder()(x, Context(cases.counted(x)), ())


def test_flops():
  # D 32, 4 latent queries, in exact mode 4.5 visible tokens of 8.
  assert build(of()).flops(8) == 2 * (3 * 32 * 32 + 2 * 4 * 32)
  exact = build(of(co4_mode='exact')).flops(8)
  assert exact == 2 * (3 * 32 * 32 + 2 * 4 * 32 * 4.5)
