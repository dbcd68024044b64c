"""Decoding with a state is the model's own next tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import sample
from tests.attention import cases
from train_lib.state import AbstractModel

SIZE, VOCAB = 16, 24
KEY = jax.random.key(0)
PROMPTS = [[3], [1, 2, 3, 4, 5], [7, 7, 0, 9, 11, 23, 2, 4, 6]]


@functools.cache
def model(*kinds, **flags):
  config = cases.config(**dict(dict(
      n_embd=16, block_size=SIZE, vocab_size=VOCAB, n_layer=len(kinds),
      attention_list=kinds, init_std=0.5, tie_embeddings=False), **flags))
  abstract = AbstractModel(config)
  return abstract.merge(jax.jit(abstract.init)(KEY))


@jax.jit
def _last(model, tokens, length):
  hidden, _ = model.hidden(tokens)
  return model.logits(jax.lax.dynamic_index_in_dim(
      hidden[0], length - 1, keepdims=False))


def recompute(model, prompt, n):
  """n greedy tokens, each from all of the context, with no state."""
  bounded = model.longest is not None
  context, tokens = list(prompt)[-SIZE if bounded else 0:], []
  for _ in range(n):
    # After the end: not seen.
    padded = np.zeros((1, SIZE if bounded else 6 * SIZE), np.int32)
    padded[0, :len(context)] = context
    tokens.append(int(jnp.argmax(_last(model, padded, len(context)))))
    context.append(tokens[-1])
    if bounded and len(context) > SIZE:
      context = context[-SIZE // 2:]
  return tokens


def generate(model, prompts, n, **kwargs):
  chunks = sample.generate(
      model, prompts, **dict(dict(max_new_tokens=n, key=KEY), **kwargs))
  return np.concatenate([np.asarray(c) for c in chunks], 1).tolist()


@pytest.mark.parametrize('kinds', [
    ('causal', 'causal'), ('causal', 'linear', 'ssm')], ids='-'.join)
def test_greedy_decoding_is_recomputing(kinds):
  """Prompts of different lengths in one batch, up to a full context."""
  n = SIZE + 1 - max(map(len, PROMPTS))
  got = generate(model(*kinds), PROMPTS, n, temperature=0)
  assert got == [recompute(model(*kinds), p, n) for p in PROMPTS]
  assert len({*sum(got, [])}) > 3, 'a model that says one thing proves nothing'


def test_decoding_goes_on_when_the_context_is_full():
  """Its later half is read anew; nothing is lost in between."""
  causal = model('causal', 'causal')
  for prompt in PROMPTS[1:]:
    got = generate(causal, [prompt], 3 * SIZE, temperature=0)
    assert got == [recompute(causal, prompt, 3 * SIZE)]


def test_every_row_of_a_batch_keeps_its_own_context():
  """None is read anew before it is full, whatever the lengths of others."""
  causal = model('causal', 'causal')
  got = generate(causal, PROMPTS, 3 * SIZE, temperature=0)
  assert got == [recompute(causal, p, 3 * SIZE) for p in PROMPTS]


LONG = np.random.default_rng(0).integers(0, VOCAB, 2 * SIZE + 3).tolist()
# Models, and the same ones with a window where softmax has none.
ENDLESS = [
    (('ssm', 'linear', 'co4'),) * 2,
    (('causal(use_rotary_embeddings=true)', 'mla'),
     (f'causal(use_rotary_embeddings=true, window_size={SIZE})',
      f'mla(window_size={SIZE})')),
    (('causal(window_size=5)', f'mla(window_size={SIZE})'),) * 2,
    (('causal', 'ssm', 'infinite'),
     (f'causal(window_size={SIZE})', 'ssm', f'infinite(window_size={SIZE})')),
]


@pytest.mark.parametrize('kinds, windowed', ENDLESS, ids=str)
def test_without_learned_positions_a_state_goes_on_for_ever(kinds, windowed):
  """Softmax sees the last block_size tokens, all others see all."""
  free = dict(use_abs_pos_embeddings=False, init_std=1.0)
  prompts = [*PROMPTS, LONG]
  got = generate(model(*kinds, **free), prompts, 3 * SIZE, temperature=0)
  whole = model(*windowed, **free)
  assert got == [recompute(whole, p, 3 * SIZE) for p in prompts]
  assert len({*sum(got, [])}) > 2


def test_exact_co4_slides_too():
  exact = model('co4(co4_mode=exact)', use_abs_pos_embeddings=False)
  together = generate(exact, PROMPTS, 3 * SIZE, temperature=0)
  assert together == [
      generate(exact, [p], 3 * SIZE, temperature=0)[0] for p in PROMPTS]


def test_a_windowed_cache_decodes_too():
  windowed = model('causal', 'causal', window_size=4,
                   use_rotary_embeddings=True)
  got = generate(windowed, PROMPTS, 6, temperature=0)
  assert got == [recompute(windowed, p, 6) for p in PROMPTS]


def test_a_long_prompt_keeps_its_end():
  long = np.random.default_rng(0).integers(0, VOCAB, 3 * SIZE).tolist()
  got = generate(model('causal', 'causal'), [long], 5, temperature=0)
  assert got == generate(
      model('causal', 'causal'), [long[-SIZE:]], 5, temperature=0)
  assert got == [recompute(model('causal', 'causal'), long, 5)]


@pytest.mark.parametrize('n', [1, 2, 7, 2 * SIZE + 1])
def test_as_many_tokens_as_asked_for(n):
  assert np.shape(generate(model('identity'), PROMPTS[:2], n)) == (2, n)


def test_tokens_come_a_few_at_a_time():
  chunks = list(sample.generate(
      model('identity'), [[1]], max_new_tokens=15, key=KEY))
  assert len(chunks) > 1 and sum(c.shape[1] for c in chunks) == 15


def test_the_same_key_gives_the_same_tokens():
  draw = lambda seed: generate(
      model('identity'), [[1, 2]], 12, key=jax.random.key(seed))
  assert draw(0) == draw(0)
  assert draw(0) != draw(1)


def test_rows_draw_independently():
  one, other = generate(model('identity'), [[1, 2]] * 2, 12, temperature=2.0)
  assert one != other


LOGITS = np.log([0.4, 0.3, 0.2, 0.06, 0.04])


def drawn(n=20000, logits=LOGITS, **rule):
  """Frequencies of n draws."""
  rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
  tokens = sample.choose(rows, KEY, **rule)
  assert tokens.dtype == jnp.int32 and tokens.shape == (n,)
  return np.bincount(tokens, minlength=len(logits)) / n


def normalized(*p):
  return np.array(p) / sum(p)


@pytest.mark.parametrize('rule, want', [
    (dict(), np.exp(LOGITS)),
    (dict(temperature=0), [1, 0, 0, 0, 0]),
    (dict(temperature=0.5), normalized(*np.exp(2 * LOGITS))),
    (dict(temperature=2.0), normalized(*np.exp(LOGITS / 2))),
    (dict(top_k=1), [1, 0, 0, 0, 0]),
    (dict(top_k=2), normalized(4, 3, 0, 0, 0)),
    (dict(top_k=5), np.exp(LOGITS)), (dict(top_k=99), np.exp(LOGITS)),
    (dict(top_p=0.01), [1, 0, 0, 0, 0]),
    (dict(top_p=0.39), [1, 0, 0, 0, 0]),
    (dict(top_p=0.41), normalized(4, 3, 0, 0, 0)),
    (dict(top_p=0.75), normalized(4, 3, 2, 0, 0)),
    (dict(top_p=1.0), np.exp(LOGITS)),
    (dict(top_k=3, top_p=0.5), normalized(4, 3, 0, 0, 0)),
    # The temperature comes first: at 0.5, the two likeliest have 0.85.
    (dict(temperature=0.5, top_p=0.8), normalized(16, 9, 0, 0, 0)),
], ids=str)
def test_choose(rule, want):
  np.testing.assert_allclose(drawn(**rule), want, atol=0.015)


def test_choose_takes_each_row_for_itself():
  logits = jnp.asarray([[0.0, 9.0, 1.0], [9.0, 0.0, 1.0]])
  for rule in (dict(temperature=0), dict(top_k=1), dict(top_p=0.1)):
    assert sample.choose(logits, KEY, **rule).tolist() == [1, 0]


@pytest.mark.parametrize('flags, part', [
    (dict(temperature=-0.1), 'temperature (-0.1)'),
    (dict(top_k=-1), 'top_k (-1)'), (dict(top_k=0), 'top_k (0)'),
    (dict(top_p=0.0), 'top_p (0.0)'), (dict(top_p=1.5), 'top_p (1.5)'),
    (dict(max_new_tokens=0), 'max_new_tokens (0)'),
    (dict(max_new_tokens=-5), 'max_new_tokens (-5)')], ids=str)
def test_bad_flags_are_named(flags, part):
  with pytest.raises(ValueError) as error:
    generate(model('identity'), [[1]], 3, **flags)
  assert part in str(error.value)


def test_an_empty_prompt_is_an_error():
  with pytest.raises(ValueError, match='no tokens'):
    generate(model('identity'), [[1], []], 3)


@pytest.mark.parametrize('prompt', [[VOCAB], [1, -1]], ids=str)
def test_a_token_beyond_the_vocabulary_is_an_error(prompt):
  with pytest.raises(ValueError, match=str(VOCAB)):
    generate(model('identity'), [prompt], 3)


def test_few_compilations():
  """Prompts of 5 to 8 tokens, any number of new ones: one program."""
  identity = model('identity')
  generate(identity, [[1] * 5], 3)
  before = sample._prefill._cache_size(), sample._decode._cache_size()
  for length in (6, 7, 8):
    generate(identity, [[1] * length], 4)
  after = sample._prefill._cache_size(), sample._decode._cache_size()
  assert after == before
