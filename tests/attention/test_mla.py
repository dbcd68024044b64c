"""Latent attention against its paper, and its latent cache."""

import jax
import numpy as np
import pytest

from model.sharding import Context
from tests.attention import cases, oracles
from tests.attention.cases import Case, build, close, inputs


def oracle(mixer, x, *, positions, segment_ids):
  """DeepSeek-V2, equations 9 to 19, one head and one query at a time."""
  options, T = mixer.options, x.shape[1]
  R, H = mixer.key.weight.shape[0], mixer.key.weight.shape[2]
  turn = lambda x: oracles.rotate(x, positions, options.rope_base)
  down, q = oracles.dense(mixer.down, x), oracles.dense(mixer.query, x)
  c = oracles.rms(down[..., :R]) * np.asarray(
      mixer.norm.weight[...], np.float64)
  k_turned = turn(down[:, :, None, R:])[:, :, 0]
  q_content, q_turned = q[..., :H], turn(q[..., H:])
  k, v = oracles.dense(mixer.key, c), oracles.dense(mixer.value, c)
  scale = 1 / np.sqrt(H + options.mla_rotary_dim)
  cap, window = options.attn_logit_softcapping, options.window_size or T
  heads = np.zeros(v.shape)
  for b, t, n in np.ndindex(*v.shape[:3]):
    s = np.array([j for j in range(max(0, t - window + 1), t + 1)
                  if segment_ids[b, j] == segment_ids[b, t]])
    scores = scale * (k[b, s, n] @ q_content[b, t, n]
                      + k_turned[b, s] @ q_turned[b, t, n])
    if cap:
      scores = cap * np.tanh(scores / cap)
    total = np.exp(scores).sum()
    if options.use_mla_lobo:
      total += np.exp(np.float64(mixer.log_sink[...][n]))
    heads[b, t, n] = np.exp(scores) @ v[b, s, n] / total
  return oracles.dense(mixer.out, oracles.gated(mixer.gate, x, heads))


def of(**flags):
  return Case('mla', 'test', tuple(flags.items()))


def outputs(case):
  return cases.plain(build(case), inputs(3))


@pytest.mark.parametrize('flags', [
    dict(mla_rotary_dim=0), dict(mla_rotary_dim=6, mla_latent_dim=5),
    dict(window_size=3, use_mla_lobo=True, mla_lobo_init=1.0)], ids=str)
def test_matches_the_paper(flags):
  mixer, x = build(of(**flags), bias=True), inputs(12)
  positions = np.asarray(cases.counted(x))
  want = oracle(mixer, np.asarray(x, np.float64), positions=positions,
                segment_ids=np.zeros_like(positions))
  close(jax.jit(cases.plain)(mixer, x), want, 1e-5)


def test_the_absorbed_form_is_the_same():
  """Keys, values and biases, of a whole sequence read with a state."""
  mixer, x = build(of(use_mla_lobo=True), bias=True), inputs(12)
  ctx = Context(cases.counted(x))
  got, _ = jax.jit(lambda m, x: m(x, ctx, m.init_state(2, 16)))(mixer, x)
  close(got, jax.jit(cases.plain)(mixer, x))


def test_the_cache_holds_latents_alone():
  state = build(of(mla_latent_dim=5, mla_rotary_dim=6)).init_state(2, 64)
  assert [v.shape for v in state['values']] == [(2, 64, 5 + 6)]
  windowed = build(of(window_size=4)).init_state(2, 64)
  assert windowed['values'][0].shape[1] == 3


def test_every_flag_has_an_effect():
  base = outputs(of())
  for flags in (dict(mla_latent_dim=5), dict(mla_rotary_dim=6),
                dict(use_mla_lobo=True), dict(rope_base=3.0),
                dict(attn_logit_softcapping=0.1), dict(window_size=2)):
    assert np.abs(outputs(of(**flags)) - base).max() > 1e-3, flags
  lobo = [outputs(of(use_mla_lobo=True, mla_lobo_init=i)) for i in (0.0, 2.0)]
  assert np.abs(lobo[0] - lobo[1]).max() > 1e-3


@pytest.mark.parametrize('flags, message', [
    (dict(mla_rotary_dim=7), r'mla_rotary_dim \(7\) must be even'),
    (dict(mla_rotary_dim=-2), r'mla_rotary_dim \(-2\)'),
    (dict(mla_latent_dim=0), r'mla_latent_dim \(0\) must be at least 1'),
    (dict(mla_lobo_init=1.0), 'without use_mla_lobo'),
    (dict(n_head=5), r'n_head \(5\) must divide n_embd \(32\)'),
    (dict(window_size=-1), r'window_size \(-1\)'),
    (dict(attn_logit_softcapping=-1.0), r'attn_logit_softcapping \(-1.0\)'),
], ids=str)
def test_bad_values(flags, message):
  with pytest.raises(ValueError, match=message):
    build(of(**flags))


def test_flops():
  # D 32, N 4, H 8, R 8, rotary 32, and 4.5 visible tokens of 8.
  want = 2 * (32 * 4 * 40 + 32 * 40 + 2 * 8 * 32 + 32 * 32 + 4 * 48 * 4.5)
  assert build(of()).flops(8) == want
