"""The feed-forward half of a block."""

import jax
from flax import nnx

from model.layers import Einsum


class Gelu(nnx.Module):
  """gelu(x W_in) W_out, four times as wide as the model unless told."""

  def __init__(self, config, *, rngs):
    D, F = config.n_embd, config.mlp_width or 4 * config.n_embd
    residual = config.init_std / (2 * config.n_layer) ** 0.5
    self.up = Einsum('BTD,DF->BTF', (D, F), std=config.init_std,
                     bias=config.bias, rngs=rngs)
    self.down = Einsum('BTF,FD->BTD', (F, D), std=residual,
                       bias=config.bias, rngs=rngs)

    self.flops = self.up.flops + self.down.flops

  def __call__(self, x):
    return self.down(jax.nn.gelu(self.up(x)))


class SwiGlu(nnx.Module):
  """(silu(x W_gate) * x W_in) W_out (Shazeer 2020).

  8/3 as wide as the model, rounded up to 64, unless told: the parameters of
  a gelu mlp.
  """

  def __init__(self, config, *, rngs):
    D = config.n_embd
    F = config.mlp_width or -(-8 * D // 3 // 64) * 64
    residual = config.init_std / (2 * config.n_layer) ** 0.5
    into = dict(std=config.init_std, bias=config.bias, rngs=rngs)
    self.gate = Einsum('BTD,DF->BTF', (D, F), **into)
    self.up = Einsum('BTD,DF->BTF', (D, F), **into)
    self.down = Einsum('BTF,FD->BTD', (F, D), std=residual,
                       bias=config.bias, rngs=rngs)
    self.flops = self.gate.flops + self.up.flops + self.down.flops

  def __call__(self, x):
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


MLPS = {'gelu': Gelu, 'swiglu': SwiGlu}


def build(config, *, rngs):
  """The mlp that mlp_variant names."""
  return MLPS[config.mlp_variant](config, rngs=rngs)
