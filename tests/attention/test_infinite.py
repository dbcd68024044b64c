"""Heads of free width against a loop over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.sharding import Context
from tests.attention import cases, oracles, weights
from tests.attention.cases import Case, build, close, inputs
from tests.attention.test_causal import score_bias


def oracle(mixer, x, *, positions, segment_ids):
  """Softmax attention of Vaswani et al. 2017, heads summed in groups."""
  options = mixer.softmax.options
  q, k, v = (oracles.dense(m, x) for m in (mixer.query, mixer.key, mixer.value))
  (B, T, N, H), per_key, V = q.shape, q.shape[2] // k.shape[2], v.shape[-1]
  if options.use_rotary_embeddings:
    q, k = (oracles.rotate(
        a, positions, options.rope_base, options.rope_fraction)
            for a in (q, k))
  scale = 1 / np.sqrt(H)
  if options.use_qk_norm:
    q, k = oracles.rms(q), oracles.rms(k)
  if options.use_qk_norm_scale:
    scale = float(mixer.softmax.g[...]) / H
  sink = None
  if options.use_flash_obo_const:
    sink = np.full(N, options.flash_lobo_log_const)
  if options.use_flash_lobo:
    sink = np.zeros(N) + np.asarray(mixer.softmax.log_sink[...], np.float64)
  cap, window = options.attn_logit_softcapping, options.window_size or T
  groups = N if options.use_concat_heads else options.n_cproj or 1
  y = np.zeros((B, T, N, V))
  for b, t, n in np.ndindex(B, T, N):
    s = np.array([j for j in range(max(0, t - window + 1), t + 1)
                  if segment_ids[b, j] == segment_ids[b, t]])
    scores = scale * k[b, s, n // per_key] @ q[b, t, n]
    if cap:
      scores = cap * np.tanh(scores / cap)
    scores = scores + score_bias(mixer.softmax, x[b], t, s, n)
    w = weights.of(
        mixer.softmax, scores, head=n, distances=t - s,
        position=positions[b, t], off_by=0 if sink is None else np.exp(sink[n]))
    y[b, t, n] = w @ v[b, s, n // per_key]
    if options.attn_xsa:
      own = v[b, t, n // per_key]
      y[b, t, n] -= own * (y[b, t, n] @ own) / (own @ own)
  y = oracles.gated(mixer.gate, x, y)
  return oracles.dense(
      mixer.out, y.reshape(B, T, groups, N // groups, V).sum(3))


def of(**flags):
  return Case('infinite', 'test', tuple(flags.items()))


WIDE = dict(n_head=6, n_qk_head_dim=10, n_v_head_dim=7)


@pytest.mark.parametrize('flags', [
    {**WIDE, 'n_cproj': 3, 'n_kv_group': 2},
    {**WIDE, 'use_concat_heads': True, 'use_flash_lobo': True},
    dict(n_cproj=2, n_v_head_dim=5, use_rotary_embeddings=True,
         use_qk_norm=True, use_qk_norm_scale=True, attn_logit_softcapping=2.0,
         window_size=4)], ids=str)
def test_matches_the_paper(flags):
  mixer, x = build(of(**flags), bias=True), inputs(12)
  positions = np.asarray(cases.counted(x))
  want = oracle(mixer, np.asarray(x, np.float64), positions=positions,
                segment_ids=np.zeros_like(positions))
  close(jax.jit(cases.plain)(mixer, x), want, 1e-5)


def test_every_flag_has_an_effect():
  shapes = lambda **flags: [
      p.shape for p in cases.parameters(build(of(**flags))).values()]
  base = shapes()
  for flags in (dict(n_qk_head_dim=6), dict(n_v_head_dim=6), dict(n_cproj=2),
                dict(use_concat_heads=True), dict(n_kv_group=2)):
    assert shapes(**flags) != base, flags


def test_summed_heads_on_a_mesh():
  """The heads of a group lie on several devices."""
  axes = ('data', 'fsdp', 'tensor')
  mesh = jax.make_mesh((1, 2, 4), axes,
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  x = inputs(12)
  run = jax.jit(lambda mixer, x, mesh: mixer(
      x, Context(cases.counted(x), mesh=mesh))[0], static_argnums=2)
  for groups in (1, 2):
    mixer = build(of(n_head=8, n_cproj=groups, n_v_head_dim=6))
    close(run(mixer, x, mesh), run(mixer, x, None))


def test_one_projection_of_the_sum():
  """With equal matrices, groups add up to the sum of all heads."""
  grouped, summed = build(of(n_cproj=2)), build(of())
  weight = summed.out.weight[...]
  tree = cases.parameters(grouped)
  tree = {name: jnp.concatenate([weight] * 2) if name.startswith('out') else p
          for name, p in tree.items()}
  grouped = jax.tree.unflatten(jax.tree.structure(grouped), tree.values())
  source = cases.parameters(summed)
  summed = jax.tree.unflatten(jax.tree.structure(summed), [
      tree[name] if not name.startswith('out') else p
      for name, p in source.items()])
  run = jax.jit(cases.plain)
  close(run(grouped, inputs(12)), run(summed, inputs(12)))


@pytest.mark.parametrize('flags, message', [
    (dict(n_cproj=3), r'n_cproj \(3\) must divide n_head \(4\): use 1, 2 or 4'),
    (dict(n_cproj=0), r'n_cproj \(0\) must be at least 1'),
    (dict(n_cproj=2, use_concat_heads=True), r'n_cproj \(2\) sums heads'),
    (dict(n_qk_head_dim=0), r'n_qk_head_dim \(0\) must be at least 1'),
    (dict(n_v_head_dim=-3), r'n_v_head_dim \(-3\) must be at least 1'),
    (dict(n_head=5, n_qk_head_dim=8), 'set n_v_head_dim'),
    (dict(n_kv_group=3), r'n_kv_group \(3\) must divide n_head'),
], ids=str)
def test_bad_values(flags, message):
  with pytest.raises(ValueError, match=message):
    build(of(**flags))


def test_flops():
  # D 32, N 6, H 10, V 7, and 4.5 visible tokens of 8.
  want = 2 * (32 * 6 * (10 + 10 + 7) + 2 * 7 * 32 + 6 * (10 + 7) * 4.5)
  assert build(of(**WIDE, n_cproj=2)).flops(8) == want
