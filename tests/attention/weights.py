"""From scores to weights in NumPy, one query of one head at a time."""

import math

import numpy as np

from tests.attention.oracles import float64


def of(softmax, s, *, head, distances, position, off_by=0.0):
  """The weights of the keys that a query sees.

  Args:
    softmax: the Softmax module, for its options and learned numbers.
    s: float64, their scores.
    head: of the query.
    distances: of the keys from the query, from 0 up.
    position: of the query in its document.
    off_by: what joins the sum of a softmax.
  """
  options = softmax.options
  if options.use_fire_embeddings:
    s = s + _fire(softmax, head, distances, position)
  learned = {name: float64(p) for name, p in softmax.learned.parameters.items()}
  w = _weights(options, s, learned, head, off_by)
  return w / len(s) if options.div_by_seq_len else w


def _fire(softmax, head, distances, position):
  """Li et al. 2023, equation 3."""
  options, fire = softmax.options, softmax.fire
  c, factor = float64(fire.c), float64(fire.multiplier)
  psi = lambda x: np.log((abs(c) + 1e-6) * x + options.fire_log_bias)
  x = psi(np.array(distances, float)) / psi(
      max(position, abs(factor) * options.fire_init_L, 1.0))
  x = x[:, None]
  for i, (weight, bias) in enumerate(zip(fire.weights, fire.biases)):
    x = (np.maximum(x, 0) if i else x) @ float64(weight) + float64(bias)
  x = x[:, head]
  return np.maximum(x, 0) if options.fire_outermost_sigma else x


def _weights(options, s, learned, head, off_by):
  name = options.softmax_variant_attn
  over_sum = lambda e, more=0.0: e / (e.sum() + more)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  if name == 'softmax':
    return over_sum(np.exp(s), off_by)
  if name == 'softermax':
    return over_sum(2.0 ** s, off_by)
  if name == 'sigsoftmax':
    base = math.e if options.sigsoftmax_use_euler_base else (
        options.sigsoftmax_base)
    return over_sum(base ** s / (1 + base ** -s))
  if name == 'strongermax':
    return _strongermax(options, s, learned, head)
  if name in ('consmax', 'consmax_v2', 'saturatingconsmax'):
    base = math.e if options.consmax_use_euler_base else options.consmax_base
    beta, gamma = (
        first * (learned[key][head] if name == 'consmax_v2' else 1)
        if name == 'consmax_v2' or key not in learned else learned[key]
        for key, first in (('beta', options.consmax_initial_beta),
                           ('gamma', options.consmax_initial_gamma)))
    x = s - beta
    if name == 'consmax_v2' and options.consmax_v2_clamping:
      x = np.minimum(x, options.consmax_v2_clamp_value)
    if name == 'saturatingconsmax':
      x = np.minimum(x, options.consmax_saturation)
    return base ** x / gamma
  if name in ('polymax', 'vpolymax'):
    x0, y0 = options.polymax_x_intercept, options.polymax_y_intercept
    line = y0 + s * y0 / (x0 if name == 'vpolymax' else -x0)
    return np.where(s > 0, np.abs(s) ** options.polymax_power + y0, np.where(
        s < x0, 0.0, line)) / options.polymax_divisor
  if name == 'exppolymax':
    base, power = options.exppolymax_base, options.exppolymax_power
    base = math.e if options.exppolymax_use_euler_base else base
    shift = 0 if power == 1 else (math.log(base) / power) ** (1 / (power - 1))
    high = np.abs(s + shift) ** power + options.exppolymax_y_intercept
    return np.where(s < 0, base ** s, high) / options.exppolymax_divisor
  if name == 'pfla_softmax':
    return _pfla(options, s, learned)
  return {
      'relumax': lambda: np.maximum(s, 0) / options.relumax_divisor,
      'relu2max': lambda: np.maximum(s, 0) ** 2 / options.relu2max_divisor,
      'sigmoidmax': lambda: sigmoid(s) / options.sigmoidmax_divisor,
      'softplus': lambda: np.log1p(np.exp(s)) / options.softplus_divisor,
      'squareplus': lambda: (s + np.sqrt(s * s + 4 * math.log(2) ** 2)) / (
          2 * options.squareplus_divisor),
  }[name]()


def _strongermax(options, s, learned, head):
  temperature = learned.get(
      'temperature', options.strongermax_temperature_factor)
  offset = np.asarray(learned.get('offset', options.strongermax_obo))
  offset = offset[head] if offset.ndim else offset
  if options.strongermax_clamping:
    s = np.minimum(s, options.strongermax_clamp_value)
  strength, shift = options.strongermax_strength, 0.0
  if options.strongermax_div_by_sum_of_terms:
    e = strength ** (s / temperature)
    return e / (e.sum() + np.maximum(offset, 0)) / options.strongermax_divisor
  if options.strongermax_use_xmax:
    guess = options.strongermax_xmax_guess
    shift = s.max() if guess is None else guess
  return strength ** ((s - shift) / temperature) / options.strongermax_divisor


def _pfla(options, s, learned):
  n = options.pfla_softmax_num_points
  low, high = options.pfla_softmax_left_bound, options.pfla_softmax_right_bound
  between = lambda a, b: a + (b - a) * np.arange(1, n + 1) / (n + 1)
  u = between(-1, 1)
  x = learned.get('x', {
      'linear': between(low, high),
      'quad': np.sign(u) * u * u * max(-low, high),
      'exp': np.sign(u) * (np.exp(np.abs(u)) - 1) / (math.e - 1) * max(
          -low, high)}[options.pfla_softmax_density])
  y = learned.get('y')
  if y is None:
    curve = {
        'gelu': x * (1 + np.tanh((2 / np.pi) ** 0.5 * (
            x + 0.044715 * x ** 3))) / 2,
        'relu': np.maximum(x, 0), 'squared_relu': np.maximum(x, 0) ** 2,
        'silu': x / (1 + np.exp(-x)), 'softplus': np.log1p(np.exp(x)),
        'sigmoid': 1 / (1 + np.exp(-x)),
    }[options.pfla_softmax_init_activation]
    y = np.sqrt(np.maximum(curve, 1e-6))
  if options.pfla_softmax_mode == 'quadratic':
    w = np.maximum(s, 0) * np.interp(s, x, y) ** 2
  else:
    w = np.interp(s, x, y * y)
  if options.pfla_softmax_use_learned_divisor:
    return w / (np.maximum(learned['gamma'], 0) + 1e-6)
  joins = np.exp(learned.get('extra', options.pfla_softmax_obo))
  return w / (w.sum() + 1e-6 + joins * options.pfla_softmax_use_obo)
