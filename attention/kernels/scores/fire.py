"""The bias of FIRE (Li et al. 2023, arXiv 2310.04418, equation 3).

  b_ij = f(psi(i - j) / psi(max(i, L)))      psi(x) = log(c x + 1)

with f a small network from one number to one for each head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EPS = 1e-6


class Fire(NamedTuple):
  """What of it is not learned.

  Attributes:
    log_bias: the 1 in psi.
    length: L, which a learned number multiplies.
    rectified: whether the network ends in a ReLU.
  """
  log_bias: float
  length: float
  rectified: bool


def bias(rule, learned, distances, positions):
  """float32 [B,N,T,S].

  Args:
    rule: Fire.
    learned: (c, the number that multiplies L, (weight, bias), ...): scalars,
      and the layers of f, [inputs, outputs] and [outputs].
    distances: [T,S], i - j; what is negative is not seen.
    positions: [B,T], of the queries in their documents.
  """
  c, multiplier, *layers = learned
  # Neither c nor the length may come to 0, where psi has none to divide by.
  psi = lambda x: jnp.log1p((jnp.abs(c) + EPS) * x + rule.log_bias - 1)
  length = jnp.maximum(jnp.abs(multiplier * rule.length), 1.0)
  longest = jnp.maximum(positions.astype(jnp.float32), length)
  distances = jnp.maximum(distances, 0).astype(jnp.float32)
  x = (psi(distances) / psi(longest)[..., None])[..., None]
  for i, (weight, offset) in enumerate(layers):
    x = jnp.dot(x if i == 0 else jax.nn.relu(x), weight) + offset
  if rule.rectified:
    x = jax.nn.relu(x)
  return jnp.moveaxis(x, -1, 1)
