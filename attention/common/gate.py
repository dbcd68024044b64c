"""A gate on what attention returns (Qiu et al. 2025, arXiv:2505.06708).

  y <- sigmoid(x W_g) * y

before the projection out, with one number a head or one an element. The
product of W_V and W_O is of low rank and linear in between; this breaks both,
and a head can return nothing without a token to attend to that stores nothing.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common import heads


class Gate(nnx.Module):
  """The gate that attn_gate asks for; for `none`, one that is always open.

  Attributes:
    flops: forward, per token.
  """

  def __init__(self, config, options, *, width, rngs):
    gates = {'none': 0, 'head': 1, 'element': width}[options.attn_gate]
    self.project = heads.project(
        'BTD,DNV->BTNV', config, heads=config.n_head, width=gates, rngs=rngs
    ) if gates else None
    self.flops = self.project.flops if gates else 0

  def __call__(self, x, y, ctx):
    """Gates heads y [B,T,N,V] by the layer's input x [B,T,D]; y's dtype."""
    if self.project is None:
      return y
    gate = jax.nn.sigmoid(self.project(x).astype(jnp.float32))
    ctx.record('gate', lambda: gate)
    return (y * gate).astype(y.dtype)
