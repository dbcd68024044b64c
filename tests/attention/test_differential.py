"""Differential attention against its paper, and its lambda by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from model.sharding import Context
from tests.attention import cases, oracles
from tests.attention.cases import Case, build, close, inputs
from train_lib.state import AbstractModel


def oracle(mixer, x, *, positions, segment_ids):
  """Ye et al. 2024, equations 1 to 3, of a first layer, one head at a time."""
  options, T = mixer.options, x.shape[1]
  q, k, v = (oracles.dense(m, x) for m in (mixer.query, mixer.key, mixer.value))
  (B, T, N, V), per_key = q.shape, q.shape[2] // k.shape[2]
  H = V // 2

  def placed(a):
    if options.use_rotary_embeddings:
      a = oracles.rotate(
          a, positions, options.rope_base, options.rope_fraction)
    return oracles.rms(a) if options.use_qk_norm else a
  maps = [(placed(q[..., half]), placed(k[..., half]))
          for half in (slice(0, H), slice(H, V))]
  l_q, l_k = (oracles.float64(p) for p in (mixer.lambda_q, mixer.lambda_k))
  start = options.differential_lambda_init
  start = 0.2 if start is None else start
  weight = np.exp(l_q[0] @ l_k[0]) - np.exp(l_q[1] @ l_k[1]) + start
  cap, window = options.attn_logit_softcapping, options.window_size or T
  y = np.zeros((B, T, N, V))
  for b, t, n in np.ndindex(B, T, N):
    s = np.array([j for j in range(max(0, t - window + 1), t + 1)
                  if segment_ids[b, j] == segment_ids[b, t]])
    for sign, (q, k) in zip((1, -weight), maps):
      scores = k[b, s, n // per_key] @ q[b, t, n] / np.sqrt(H)
      if cap:
        scores = cap * np.tanh(scores / cap)
      e = np.exp(scores)
      y[b, t, n] += sign * (e / e.sum()) @ v[b, s, n // per_key]
  y = oracles.rms(y, 1e-5) * oracles.float64(mixer.norm.weight)
  return oracles.dense(mixer.out, (1 - start) * y)


def of(**flags):
  return Case('differential', 'test', tuple(flags.items()))


def fresh(**flags):
  """One that a test may change."""
  return build.__wrapped__(of(**flags))


def test_without_the_second_map_it_is_causal_with_half_the_width():
  """lambda = 0, and a second map that is not there to be subtracted."""
  mixer, x = fresh(differential_lambda_init=0.0), inputs(12)
  mixer.lambda_q[...] *= 0.0
  other = attention.build('infinite(use_concat_heads=true, n_qk_head_dim=4)',
                          cases.config(), rngs=nnx.Rngs(0))
  for name in ('query', 'key'):
    getattr(other, name).weight[...] = getattr(mixer, name).weight[..., :4]
  other.value.weight[...] = mixer.value.weight[...]
  # Heads as they are, before they are projected.
  eye = jnp.eye(32).reshape(4, 8, 32)
  mixer.out.weight[...] = other.out.weight[...] = eye
  close(cases.plain(mixer, x).reshape(2, 12, 4, 8),
        oracles.rms(np.asarray(cases.plain(other, x)).reshape(2, 12, 4, 8),
                    1e-5))


def test_equal_maps_cancel_to_a_part():
  """a - lambda a is (1 - lambda) a, which the norm makes a again."""
  mixer, x = fresh(), inputs(12)
  for part in (mixer.query, mixer.key):
    part.weight[..., 4:] = part.weight[..., :4]
  one = cases.plain(mixer, x)
  mixer.lambda_q[...] *= 0.0
  close(one, cases.plain(mixer, x), 1e-3)  # Up to eps.


@pytest.mark.parametrize('depth, start', [(0, 0.2), (1, 0.355509), (40, 0.8)])
def test_lambda_grows_with_depth(depth, start):
  mixer, x = build(of()), inputs(12)
  deep = lambda mixer, depth: mixer(
      x, Context(cases.counted(x), depth=depth))[0]
  constant = build(of(differential_lambda_init=start))
  close(jax.jit(deep)(mixer, depth), cases.plain(constant, x))


@pytest.mark.parametrize('flags', [
    dict(n_layer=3, scan_unroll=1),
    dict(n_layer=5, attention_list=('differential', 'identity'))], ids=str)
def test_a_stack_knows_how_deep_its_layers_are(flags):
  """As with layers one by one, each with the lambda of its depth."""
  flags = dict(attention_variant='differential', init_std=0.3) | flags
  stack = AbstractModel(cases.config(**flags))
  kinds = flags.get('attention_list', ('differential',))
  single = AbstractModel(cases.config(**flags | dict(attention_list=tuple(
      f'differential(differential_lambda_init={0.8 - 0.6 * np.exp(-0.3 * i)})'
      if kinds[i % len(kinds)] == 'differential' else 'identity'
      for i in range(flags['n_layer'])))))
  tokens = np.random.default_rng(0).integers(0, 32, (2, 12)).astype(np.int32)
  params = jax.jit(stack.init)(jax.random.key(0))
  model = stack.merge(params)
  want = single.merge(jax.jit(single.init)(jax.random.key(0)))
  blocks = [jax.tree.map(lambda p, i=i: p[i:i + 1], block)
            for i in range(stack.module.repeats) for block in model.periods]
  blocks += [jax.tree.map(lambda p: p[None], block) for block in model.tail]
  want.periods = jax.tree.unflatten(
      jax.tree.structure(want.periods), jax.tree.leaves(blocks))
  want.embed, want.norm = model.embed, model.norm
  close(model(tokens)[0], want(tokens)[0])
  _, after = model(tokens[:, :8], positions=np.tile(np.arange(8), (2, 1)),
                   state=model.init_state(2, 12))
  rest, _ = model(tokens[:, 8:], positions=np.tile(np.arange(8, 12), (2, 1)),
                  state=after)
  close(rest, model(tokens)[0][:, 8:])


def test_large_scores_and_lambdas_are_finite():
  mixer, x = fresh(), inputs(65)
  mixer.query.weight[...] *= 1e4
  mixer.lambda_q[...] = mixer.lambda_k[...] = jnp.full((2, 4), 3.0)
  y, slopes = jax.value_and_grad(
      lambda mixer: (cases.plain(mixer, x) ** 2).sum())(mixer)
  assert np.isfinite(y)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(slopes))


@pytest.mark.parametrize('flags, message', [
    (dict(differential_lambda_init=1.0), 'must be at least 0 and less than 1'),
    (dict(n_embd=36, n_head=4), r'n_embd \(36\) / n_head \(4\) must be even'),
    (dict(n_kv_group=3), r'n_kv_group \(3\) must divide n_head'),
    (dict(use_flash_lobo=True), 'use_flash_lobo=True has no effect'),
], ids=str)
def test_bad_values(flags, message):
  with pytest.raises(ValueError, match=message):
    build(of(**flags))


def test_the_state_is_as_large_as_that_of_causal():
  size = lambda name: sum(a.size for a in build(
      Case(name, 'test', (('n_kv_group', 2),))).init_state(2, 64)['values'])
  assert size('differential') == size('causal')


def test_flops():
  # D 32, N 4, H 4, V 8, and 4.5 visible tokens of 8.
  want = 2 * (4 * 32 * 32 + 4 * 2 * (4 + 8) * 4.5)
  assert build(of()).flops(8) == want
