"""One layer: x + mixer(norm(x)), then x + mlp(norm(x))."""

from flax import nnx

import attention
from model import mlp
from model.layers import norm


class Block(nnx.Module):

  def __init__(self, config, layer, *, rngs):
    self.rate = config.dropout
    self.mixer_norm = norm(config, config.n_embd)
    self.mixer = attention.build(layer, config, rngs=rngs)
    self.mlp_norm = norm(config, config.n_embd)
    self.mlp = mlp.build(config, rngs=rngs)

  def __call__(self, x, ctx, state=None):
    normed = self.mixer_norm(x)
    y, state = self.mixer(normed, ctx, state)
    ctx.record('mixer_input', lambda: normed)
    ctx.record('mixer_output', lambda: y)
    x = x + ctx.dropout(y, self.rate, salt=0)
    y = self.mlp(self.mlp_norm(x))
    x = x + ctx.dropout(y, self.rate, salt=1)
    return ctx.constrain(x, 'BTD'), state
