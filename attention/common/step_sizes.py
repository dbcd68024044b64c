"""How the step sizes of state space models start."""

import math

import jax
import jax.numpy as jnp

DT_RANGE = (1e-3, 1e-1)  # Mamba's section 3.6, and Mamba-2's.


def dt_bias(key, width):
  """Biases [width] whose softplus is log-uniform in DT_RANGE."""
  low, high = (math.log(dt) for dt in DT_RANGE)
  dt = jnp.exp(jax.random.uniform(key, (width,), minval=low, maxval=high))
  return dt + jnp.log(-jnp.expm1(-dt))
