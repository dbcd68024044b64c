"""From scores to weights: what may stand where the softmax does.

A Weigh is a callable (s, seen, *learned) -> w of float32 arrays [B,N,T,S]: s is
finite where seen is False too, where w is 0, and `learned` are its numbers of
each head, [N] or [N,...]. The names are those of ReaLLM-Forge.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Weigh = Callable[..., jax.Array]

# e to more is not squared without overflow in float32.
MOST = 40.0
EPS = 1e-6


def normalised(g, seen, extra=None):
  """e^g over its sum along the last axis, to which e^extra [N,1,1] is added."""
  top = jnp.max(g, -1, keepdims=True, where=seen, initial=-jnp.inf)
  if extra is not None:
    top = jnp.maximum(top, extra)
  top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
  e = masked(jnp.exp(jnp.where(seen, g - top, 0.0)), seen)
  total = e.sum(-1, keepdims=True)
  if extra is not None:
    total = total + jnp.exp(extra - top)
  return e / jnp.where(total == 0, 1.0, total)


def masked(w, seen):
  return jnp.where(seen, w, 0.0)


def heads(x):
  """[N] to [N,1,1]."""
  return x[:, None, None]


class Softmax(NamedTuple):
  """base^s over its sum; with a learned sink, lambda [N], e^lambda joins it."""
  base: float

  def __call__(self, s, seen, *sink):
    return normalised(s * math.log(self.base), seen, *map(heads, sink))


class Sigsoftmax(NamedTuple):
  """e^s sigmoid(s) over its sum (Kanai et al. 2018, arXiv 1805.10829)."""
  base: float

  def __call__(self, s, seen):
    s = s * math.log(self.base)
    return normalised(s + jax.nn.log_sigmoid(s), seen)


class Strongermax(NamedTuple):
  """strength^(s / temperature), over its sum and an offset, or as it is.

  Learned: temperature and offset, which is at least 0.
  """
  strength: float
  divide: bool  # by the sum
  divisor: float
  clamp: float | None  # of the scores
  shift: float | None  # without a sum: off the scores; None: the row's maximum

  def __call__(self, s, seen, temperature, offset):
    if self.clamp is not None:
      s = jnp.minimum(s, self.clamp)
    if not self.divide:
      shift = self.shift
      if shift is None:
        shift = jnp.max(s, -1, keepdims=True, where=seen, initial=-jnp.inf)
        shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
      g = (s - shift) * math.log(self.strength) / heads(temperature)
      return masked(jnp.exp(jnp.minimum(g, MOST)), seen) / self.divisor
    g = s * math.log(self.strength) / heads(temperature)
    # The offset beside e^g as it is, whatever the maximum.
    top = jnp.max(g, -1, keepdims=True, where=seen, initial=0.0)
    top = jax.lax.stop_gradient(top)
    e = masked(jnp.exp(jnp.where(seen, g - top, 0.0)), seen)
    total = e.sum(-1, keepdims=True) + jnp.maximum(
        heads(offset), 0.0) * jnp.exp(-top)
    return e / jnp.where(total == 0, 1.0, total) / self.divisor


class Consmax(NamedTuple):
  """base^(s - beta) / gamma, both learned."""
  base: float
  clamp: float | None  # of s - beta

  def __call__(self, s, seen, beta, gamma):
    s = s - heads(beta)
    if self.clamp is not None:
      s = jnp.minimum(s, self.clamp)
    g = jnp.minimum(s * math.log(self.base), MOST)
    return masked(jnp.exp(g), seen) / heads(gamma)


class Polymax(NamedTuple):
  """0 up to x, a line from there to 0 that ends in y, then s^power + y.

  The line begins at 0, or at 2 y if it falls.
  """
  x: float
  y: float
  power: float
  divisor: float
  falls: bool

  def __call__(self, s, seen):
    slope = self.y / (self.x if self.falls else -self.x)
    line = jnp.where(s >= self.x, slope * s + self.y, 0.0)
    curve = jnp.maximum(s, 0.0) ** self.power + self.y
    return masked(jnp.where(s > 0, curve, line), seen) / self.divisor


class ExpPolymax(NamedTuple):
  """base^s below 0, then (s + shift)^power + y, of the same slope at 0."""
  base: float
  y: float
  power: float
  divisor: float

  def __call__(self, s, seen):
    shift = 0.0 if self.power == 1 else (
        math.log(self.base) / self.power) ** (1 / (self.power - 1))
    low = jnp.exp(jnp.minimum(s, 0.0) * math.log(self.base))
    high = (jnp.maximum(s, 0.0) + shift) ** self.power + self.y
    return masked(jnp.where(s < 0, low, high), seen) / self.divisor


class Relumax(NamedTuple):
  """max(s, 0)^power."""
  power: int
  divisor: float

  def __call__(self, s, seen):
    return masked(jnp.maximum(s, 0.0) ** self.power, seen) / self.divisor


class Sigmoidmax(NamedTuple):
  divisor: float

  def __call__(self, s, seen):
    return masked(jax.nn.sigmoid(s), seen) / self.divisor


class Softplus(NamedTuple):
  divisor: float

  def __call__(self, s, seen):
    return masked(jax.nn.softplus(s), seen) / self.divisor


class Squareplus(NamedTuple):
  """(s + sqrt(s^2 + b)) / 2 (Barron 2021, arXiv 2112.11687), ln 2 at 0."""
  divisor: float

  def __call__(self, s, seen):
    y = 0.5 * (s + jnp.sqrt(s * s + 4 * math.log(2) ** 2))
    return masked(y, seen) / self.divisor


class Pfla(NamedTuple):
  """A curve through learned points (x, y^2), constant beyond them.

  Learned: x and y [N,points], gamma, and the log of what joins the sum.
  """
  scales: bool  # The curve multiplies max(s, 0): y is interpolated, not y^2.
  divide: bool  # by the sum, not by gamma
  joins: bool  # whether anything joins it

  def __call__(self, s, seen, x, y, gamma, extra):
    interpolate = jax.vmap(jnp.interp, in_axes=(1, 0, 0), out_axes=1)
    if self.scales:
      w = jnp.maximum(s, 0.0) * interpolate(s, x, y) ** 2
    else:
      w = interpolate(s, x, y * y)
    w = masked(w, seen)
    if not self.divide:
      return w / (jnp.maximum(heads(gamma), 0.0) + EPS)
    total = w.sum(-1, keepdims=True) + EPS
    return w / (total + jnp.exp(heads(extra)) if self.joins else total)
