"""Tokens (and learned positions) to vectors, and vectors to logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from model.layers import param


class Embed(nnx.Module):

  def __init__(self, config, vocab_size, *, rngs):
    normal = lambda *shape: config.init_std * jax.random.normal(
        rngs.params(), shape)
    D = config.n_embd
    self.dtype = config.compute_dtype
    self.softcap = config.final_logit_softcapping
    self.tokens = param(normal(vocab_size, D), 'UD')
    self.positions = param(
        normal(config.block_size, D), 'TD'
    ) if config.use_abs_pos_embeddings else None
    self.head = None if config.tie_embeddings else param(
        normal(vocab_size, D), 'UD')

  def __call__(self, tokens, ctx):
    """int32 [B,T] -> [B,T,D] in the compute dtype, at the positions of ctx."""
    # Rows are whole where they are looked up: of a table split along D, XLA
    # would make all vectors on every device and then throw most away.
    x = ctx.constrain(self.tokens[...], 'U_')[tokens]
    if self.positions is not None:
      x += ctx.constrain(self.positions[...], 'T_')[ctx.positions]
    return x.astype(self.dtype)

  def logits(self, x):
    """[..., D] -> float32 [..., U]."""
    head = self.tokens if self.head is None else self.head
    logits = jnp.einsum('...D,UD->...U', x, head[...].astype(x.dtype),
                        preferred_element_type=jnp.float32)
    if not self.softcap:
      return logits
    return self.softcap * jnp.tanh(logits / self.softcap)
