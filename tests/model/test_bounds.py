"""What is out of bounds is an error wherever it can be known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.transformer import Transformer
from tests.attention import cases

SIZE, VOCAB = 8, 16


@functools.cache
def model(*kinds, **flags):
  return Transformer(cases.config(
      n_embd=16, block_size=SIZE, vocab_size=VOCAB, n_layer=len(kinds),
      attention_list=kinds, **flags), rngs=nnx.Rngs(0))


def tokens(length, token=0):
  return np.full((2, length), token, np.int32)


@pytest.mark.parametrize('token', [-1, VOCAB])
def test_ids_beyond_the_vocabulary(token):
  for kind in (np.asarray, jnp.asarray):
    with pytest.raises(ValueError, match=f'{token}.*vocabulary of {VOCAB}'):
      model('identity')(kind(tokens(3, token)))


def test_more_tokens_than_learned_positions():
  causal = model('causal')
  long = tokens(SIZE + 1)
  with pytest.raises(ValueError, match='position 8 is beyond the 8 learned'):
    causal(long)
  with pytest.raises(ValueError, match='position 8 is beyond'):
    jax.jit(lambda model, x: model(x))(causal, long)  # By shape alone.
  with pytest.raises(ValueError, match='position 9 is beyond'):
    causal(tokens(1), positions=np.full((2, 1), 9))
  free = model('causal', use_abs_pos_embeddings=False)
  assert free(long)[0].shape == (2, SIZE + 1, VOCAB)
  ids = np.repeat([[0, 1, 2]], SIZE, 1).repeat(2, 0)  # Each is short enough.
  assert causal(tokens(3 * SIZE), segment_ids=ids)[0].shape[1] == 3 * SIZE


@pytest.mark.parametrize('kinds', [('causal',), ('ssm', 'co4', 'mla')], ids=str)
def test_a_state_that_is_full(kinds):
  free = model(*kinds, use_abs_pos_embeddings=False)
  call = lambda state, start, length: free(
      tokens(length), state=state, positions=jnp.broadcast_to(
          start + jnp.arange(length), (2, length)))[1]
  state = call(call(free.init_state(2, 5), 0, 3), 3, 2)
  with pytest.raises(ValueError, match='length 5 that holds 5 tokens has no'):
    call(state, 5, 1)
  endless = free.init_state(2, 5, slides=True)
  for start in range(0, 12, 3):
    endless = call(endless, start, 3)


def test_constant_states_are_never_full():
  free = model('ssm', 'linear', use_abs_pos_embeddings=False)
  state = free.init_state(2, 1)
  for start in (0, 4):
    _, state = free(tokens(4), state=state, positions=jnp.broadcast_to(
        start + jnp.arange(4), (2, 4)))
