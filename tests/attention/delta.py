"""The delta rule in NumPy, one token of one head at a time."""

import numpy as np

from tests.attention import oracles
from tests.attention.oracles import float64


def recurrence(q, k, v, *, positions, beta=None, decay=None):
  """y [B,T,N,V] of float64 q, k [B,T,N,H] and v, as the papers have it.

  Args:
    q, k, v: as above.
    positions: int [B,T]; a document starts where it is 0.
    beta: [B,T,N], or None: nothing is taken out.
    decay: logarithms, [B,T,N] or [B,T,N,H], or None.
  """
  y = np.zeros_like(v)
  for b, n in np.ndindex(v.shape[0], v.shape[2]):
    S = None
    for t in range(v.shape[1]):
      if positions[b, t] == 0:
        S = np.zeros((k.shape[-1], v.shape[-1]))
      if decay is not None:
        S = np.exp(decay[b, t, n])[..., None] * S
      key = k[b, t, n]
      if beta is not None:
        S = (np.eye(len(key)) - beta[b, t, n] * np.outer(key, key)) @ S
      S = S + (1 if beta is None else beta[b, t, n]) * np.outer(
          key, v[b, t, n])
      y[b, t, n] = S.T @ q[b, t, n]
  return y


def layer(mixer, x, *, positions, decay, gate):
  """A layer of the delta rule.

  Args:
    mixer: DeltaLayer.
    x: float64 [B,T,D].
    positions: as in `recurrence`.
    decay: likewise.
    gate: float64 [B,T,N,V], what the normed heads are multiplied by.
  """
  unit = lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
  q, k, v = (
      silu(conv(oracles.dense(project, x), float64(short.weight), positions))
      for project, short in zip(
          (mixer.query, mixer.key, mixer.value), mixer.convs))
  beta = mixer.options.delta_beta_max * sigmoid(oracles.dense(mixer.beta, x))
  y = recurrence(unit(q) / np.sqrt(q.shape[-1]), unit(k), v,
                 positions=positions, beta=beta, decay=decay)
  y = oracles.rms(y) * float64(mixer.norm.weight)
  return oracles.dense(mixer.out, y * gate)


def conv(x, taps, positions):
  """The causal convolution of x [B,T,N,H] with taps [W,N,H]."""
  y = np.zeros_like(x)
  for b, t in np.ndindex(x.shape[:2]):
    for i in range(min(len(taps), positions[b, t] + 1)):
      y[b, t] += taps[-1 - i] * x[b, t - i]
  return y


def low_rank(module, x):
  return oracles.dense(module.up, oracles.dense(module.down, x))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def softplus(x):
  return np.logaddexp(x, 0)
