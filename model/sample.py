"""Continues token sequences with the state of the model's mixers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import default

# Tokens of one jitted loop, between two of which the host sees them.
CHUNK = 16


def choose(logits, key, *, temperature=1.0, top_k=None, top_p=None):
  """Draws a token from each row of logits.

  Args:
    logits: float32 [B,U].
    key: random key.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draw from this many likeliest tokens.
    top_p: draw from the fewest likeliest tokens whose probabilities add up
      to at least this (Holtzman et al. 2020).

  Returns:
    int32 [B].
  """
  if temperature == 0:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  logits = logits / temperature
  if top_k is not None and top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is not None and top_p < 1:
    ordered = jnp.sort(logits, -1, descending=True)
    p = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(p, -1) - p
    least = jnp.min(
        jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.random.categorical(key, logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=('length', 'slides', 'rule'))
def _prefill(model, tokens, lengths, key, *, length, slides, rule):
  """Reads left-padded prompts [B,T] and draws the token after each."""
  B, T = tokens.shape
  positions = jnp.arange(T) - (T - lengths[:, None])
  # The padding is a document of its own, which no mixer lets a prompt see.
  hidden, state = model.hidden(
      tokens, positions=jnp.maximum(positions, 0),
      segment_ids=(positions >= 0).astype(jnp.int32),
      state=model.init_state(B, length, slides=slides))
  drawn = choose(model.logits(hidden[:, -1]), key, **dict(rule))
  return drawn, state


@functools.partial(
    jax.jit, static_argnames=('steps', 'rule'), donate_argnames=('state',))
def _decode(model, state, token, position, key, *, steps, rule):
  """Draws `steps` tokens, [steps,B], one after another."""
  def step(carry, key):
    state, token, position = carry
    hidden, state = model.hidden(
        token[:, None], positions=position[:, None],
        segment_ids=jnp.ones_like(token)[:, None], state=state)
    token = choose(model.logits(hidden[:, 0]), key, **dict(rule))
    return (state, token, position + 1), token

  (state, token, position), tokens = jax.lax.scan(
      step, (state, token, position), jax.random.split(key, steps))
  return state, token, position, tokens


def generate(model, prompts, *, max_new_tokens, key, temperature=1.0,
             top_k=None, top_p=None):
  """Yields int arrays [B,n] of new tokens, a few at a time.

  Every row is as it would be alone. A model without learned positions goes on
  for ever from its state, of which softmax mixers see the last block_size
  tokens. With learned positions, of a context that is full the later half is
  read anew, as are the last block_size tokens of a longer prompt.

  Args:
    model: a Transformer.
    prompts: B sequences of token ids, of any lengths from 1.
    max_new_tokens: how many tokens to add to each.
    key: random key; the same one gives the same tokens.
    temperature, top_k, top_p: as in `choose`.
  """
  default.check_flags(temperature=temperature, top_k=top_k, top_p=top_p,
                      max_new_tokens=max_new_tokens)
  rule = (('temperature', temperature), ('top_k', top_k), ('top_p', top_p))
  contexts = [list(map(int, p)) for p in prompts]
  if not all(contexts):
    raise ValueError('a prompt has no tokens: give at least one')
  for token in (t for c in contexts for t in c):
    if not 0 <= token < model.vocab_size:
      raise ValueError(f'a prompt has the token id {token}, beyond the '
                       f'vocabulary of {model.vocab_size}')
  size, left = model.block_size, max_new_tokens
  if model.longest:
    contexts = [c[-size:] for c in contexts]
  while left:
    lengths = np.array([len(c) for c in contexts], np.int32)
    longest, steps = int(lengths.max()), left - 1
    # Powers of two, so that few prompt lengths mean few compilations.
    padded = 1 << (longest - 1).bit_length()
    if model.longest:
      padded, steps = min(padded, size), min(steps, size - longest)
    tokens = np.stack([np.pad(c, (padded - len(c), 0)) for c in contexts])
    chunks = -(-steps // CHUNK)
    length, slides = padded + chunks * CHUNK, False
    if not model.longest and length > size:
      length, slides = size - 1, True
    key, now = jax.random.split(key)
    token, state = _prefill(
        model, tokens.astype(np.int32), lengths, now, length=length,
        slides=slides, rule=rule)
    new, position = [np.asarray(token)[:, None]], jnp.asarray(lengths)
    yield new[0]
    for i in range(chunks):
      state, token, position, drawn = _decode(
          model, state, token, position, jax.random.fold_in(now, i),
          steps=CHUNK, rule=rule)
      new.append(np.asarray(drawn).T[:, :steps - i * CHUNK])
      yield new[-1]
    added = np.concatenate(new, 1)
    left -= added.shape[1]
    contexts = [c + list(a) for c, a in zip(contexts, added)]
    contexts = [c if len(c) <= size else c[-max(size // 2, 1):]
                for c in contexts]
