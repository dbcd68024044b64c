"""Other weights than the softmax's, and FIRE's bias: flags and parameters.

Names and defaults of the flags are those of ReaLLM-Forge's command line.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common import options as flags
from attention.common.options import option
from attention.kernels.scores import weights
from attention.kernels.scores.fire import Fire
from model.layers import param

NORMALISED = ('softmax', 'softermax', 'strongermax', 'sigsoftmax')
CONSMAX = ('consmax', 'consmax_v2', 'saturatingconsmax')
POLYMAX = ('polymax', 'vpolymax')
VARIANTS = (*NORMALISED, *CONSMAX, *POLYMAX, 'exppolymax', 'relumax',
            'relu2max', 'sigmoidmax', 'softplus', 'squareplus', 'pfla_softmax')
CURVES = {'gelu': jax.nn.gelu, 'relu': jax.nn.relu,
          'squared_relu': lambda x: jax.nn.relu(x) ** 2, 'silu': jax.nn.silu,
          'softplus': jax.nn.softplus, 'sigmoid': jax.nn.sigmoid}


def _of(*variants):
  """Declares flags of some values of softmax_variant_attn."""
  return functools.partial(option, needs=tuple(
      f'softmax_variant_attn={name}' for name in variants))


_consmax, _saturating = _of(*CONSMAX), _of('saturatingconsmax')
_polymax, _exppolymax = _of(*POLYMAX), _of('exppolymax')
_strongermax, _pfla = _of('strongermax'), _of('pfla_softmax')
_of_sum = functools.partial(option, needs=('strongermax_div_by_sum_of_terms',))


@dataclasses.dataclass(frozen=True)
class Weights(flags.ScoreBias, flags.Lobo, flags.Flash):
  softmax_variant_attn: str = option(
      'softmax', 'from scores to the weights of values', choices=VARIANTS)
  div_by_seq_len: bool = option(
      False, 'divide weights by the number of tokens that a query sees')
  consmax_initial_beta: float = _consmax(
      2.5, 'beta of base^(s - beta) / gamma at first, learned')
  consmax_initial_gamma: float = _consmax(
      100.0, 'gamma at first, learned', above=0)
  consmax_use_euler_base: bool = _consmax(
      True, 'the base is e, not consmax_base')
  consmax_base: float = option(
      2.0, 'base of the exponential', above=1,
      needs=('consmax_use_euler_base=false',))
  consmax_v2_clamping: bool = _of('consmax_v2')(
      False, 's - beta is at most consmax_v2_clamp_value')
  consmax_v2_clamp_value: float = option(
      80.0, 'largest exponent', needs=('consmax_v2_clamping',))
  consmax_saturation: float = _saturating(11.0, 's - beta is at most so much')
  consmax_learnable_beta: bool = _saturating(True, 'whether beta is learned')
  consmax_learnable_gamma: bool = _saturating(True, 'whether gamma is learned')
  polymax_x_intercept: float = _polymax(
      -100.0, 'score up to which weights are 0', below=0)
  polymax_y_intercept: float = _polymax(
      1.0, 'weight of a score of 0', at_least=0)
  polymax_power: float = _polymax(2.0, 'power of scores above 0', at_least=1)
  polymax_divisor: float = _polymax(1000.0, 'divides the weights', above=0)
  exppolymax_use_euler_base: bool = _exppolymax(
      True, 'the base is e, not exppolymax_base')
  exppolymax_base: float = option(
      4.0, 'base of the exponential below 0', above=1,
      needs=('exppolymax_use_euler_base=false',))
  exppolymax_y_intercept: float = _exppolymax(
      1.0, 'added to the power of scores above 0', at_least=0)
  exppolymax_power: float = _exppolymax(
      2.0, 'power of scores above 0', at_least=1)
  exppolymax_divisor: float = _exppolymax(
      1000.0, 'divides the weights', above=0)
  relumax_divisor: float = _of('relumax')(
      256.0, 'divides max(s, 0)', above=0)
  relu2max_divisor: float = _of('relu2max')(
      256.0, 'divides max(s, 0)^2', above=0)
  sigmoidmax_divisor: float = _of('sigmoidmax')(
      256.0, 'divides sigmoid(s)', above=0)
  softplus_divisor: float = _of('softplus')(
      100.0, 'divides softplus(s)', above=0)
  squareplus_divisor: float = _of('squareplus')(
      100.0, 'divides (s + sqrt(s^2 + (2 ln 2)^2)) / 2', above=0)
  sigsoftmax_use_euler_base: bool = _of('sigsoftmax')(
      True, 'the base is e, not sigsoftmax_base')
  sigsoftmax_base: float = option(
      2.0, 'base of the exponentials', above=1,
      needs=('sigsoftmax_use_euler_base=false',))
  strongermax_strength: float = _strongermax(
      math.e, 'base of the exponential', above=1)
  strongermax_div_by_sum_of_terms: bool = _strongermax(
      True, 'weights are divided by their sum')
  strongermax_divisor: float = _strongermax(
      1.0, 'divides the weights', above=0)
  strongermax_use_xmax: bool = option(
      True, 'a shift off the scores: xmax_guess, or the largest score',
      needs=('strongermax_div_by_sum_of_terms=false',))
  strongermax_xmax_guess: float | None = option(
      None, 'what is taken off the scores; none: the largest of a query',
      needs=('strongermax_div_by_sum_of_terms=false',))
  strongermax_clamping: bool = _strongermax(
      False, 'scores are at most strongermax_clamp_value')
  strongermax_clamp_value: float = option(
      88.0, 'largest score', needs=('strongermax_clamping',))
  strongermax_obo: float = _of_sum(
      0.0, 'added to the sum of weights', at_least=0)
  strongermax_use_learned_obo: bool = _of_sum(
      False, 'strongermax_obo is learned, one a layer')
  strongermax_use_learned_obo_per_head: bool = _of_sum(
      False, 'strongermax_obo is learned, one a head')
  strongermax_temperature_factor: float = _strongermax(
      1.0, 'divides the scores', above=0)
  strongermax_use_learned_temperature_factor: bool = _strongermax(
      False, 'strongermax_temperature_factor is learned')
  pfla_softmax_num_points: int = _pfla(30, 'points of the curve', at_least=2)
  pfla_softmax_left_bound: float = _pfla(-10.0, 'score left of them', below=0)
  pfla_softmax_right_bound: float = _pfla(10.0, 'score right of them', above=0)
  pfla_softmax_learn_x: bool = _pfla(False, 'the points\' scores are learned')
  pfla_softmax_learn_y: bool = _pfla(True, 'the points\' weights are learned')
  pfla_softmax_init_activation: str = _pfla(
      'gelu', 'what the curve is at first', choices=tuple(CURVES))
  pfla_softmax_density: str = _pfla(
      'linear', 'how the points lie', choices=('linear', 'quad', 'exp'))
  pfla_softmax_use_learned_divisor: bool = _pfla(
      False, 'weights are divided by a learned gamma, not by their sum')
  pfla_softmax_gamma_init: float = option(
      1.0, 'gamma at first', above=0,
      needs=('pfla_softmax_use_learned_divisor',))
  pfla_softmax_use_obo: bool = option(
      False, 'e^pfla_softmax_obo is added to the sum',
      needs=('pfla_softmax_use_learned_divisor=false',))
  pfla_softmax_use_learned_obo: bool = option(
      False, 'pfla_softmax_obo is learned', needs=('pfla_softmax_use_obo',))
  pfla_softmax_obo: float = option(
      0.0, 'log of what is added', needs=('pfla_softmax_use_obo',))
  pfla_softmax_mode: str = _pfla(
      'linear', 'between the points: weights are linear, or the score times '
      'the square of a line', choices=('linear', 'quadratic'))
  use_fire_embeddings: bool = option(
      False, 'FIRE: a learned function of the distance is added to the scores')
  fire_log_bias: float = option(
      1.0, 'b of psi(x) = log(c x + b)', at_least=1,
      needs=('use_fire_embeddings',))
  fire_num_hidden_layers: int = option(
      1, 'hidden layers of the function', at_least=0,
      needs=('use_fire_embeddings',))
  fire_mlp_width: int = option(
      32, 'their width', at_least=1, needs=('use_fire_embeddings',))
  fire_init_c: float = option(
      0.1, 'c at first, learned', above=0, needs=('use_fire_embeddings',))
  fire_init_L: float = option(
      512.0, 'L, which a learned number multiplies', above=0,
      needs=('use_fire_embeddings',))
  fire_outermost_sigma: bool = option(
      False, 'the function ends in a ReLU', needs=('use_fire_embeddings',))

  def __post_init__(self):
    super().__post_init__()
    sinks = self.use_flash_lobo or self.use_flash_obo_const
    if sinks and self.softmax_variant_attn not in ('softmax', 'softermax'):
      raise ValueError(
          'an off-by-one softmax (use_flash_lobo, use_flash_obo_const) has no '
          f'place in softmax_variant_attn={self.softmax_variant_attn}: drop '
          'one of them')

  @property
  def fused(self):
    """Whether this is a softmax that flash computes."""
    biased = self.use_alibi or self.use_forget_gate
    name = self.softmax_variant_attn
    # Of softermax flash gets scores times log 2, which would round a bias.
    softmax = name == 'softmax' or (name == 'softermax' and not biased)
    return softmax and not (self.use_fire_embeddings or self.div_by_seq_len)

  @property
  def log_base(self):
    """What the scores of a softmax are multiplied by: of softermax, log 2."""
    return math.log(2) if self.softmax_variant_attn == 'softermax' else 1.0

  def base(self, variant):
    """The base of the exponential of a variant that has flags for it."""
    euler = getattr(self, f'{variant}_use_euler_base')
    return math.e if euler else getattr(self, f'{variant}_base')

  @property
  def weigh(self):
    """The Weigh that these flags ask for."""
    name = self.softmax_variant_attn
    return {
        'softmax': lambda: weights.Softmax(math.e),
        'softermax': lambda: weights.Softmax(2.0),
        'sigsoftmax': lambda: weights.Sigsoftmax(self.base('sigsoftmax')),
        'strongermax': self._strongermax,
        'consmax': lambda: weights.Consmax(self.base('consmax'), None),
        'consmax_v2': lambda: weights.Consmax(
            self.base('consmax'), self.consmax_v2_clamp_value
            if self.consmax_v2_clamping else None),
        'saturatingconsmax': lambda: weights.Consmax(
            self.base('consmax'), self.consmax_saturation),
        'polymax': self._polymax, 'vpolymax': self._polymax,
        'exppolymax': lambda: weights.ExpPolymax(
            self.base('exppolymax'), self.exppolymax_y_intercept,
            self.exppolymax_power, self.exppolymax_divisor),
        'relumax': lambda: weights.Relumax(1, self.relumax_divisor),
        'relu2max': lambda: weights.Relumax(2, self.relu2max_divisor),
        'sigmoidmax': lambda: weights.Sigmoidmax(self.sigmoidmax_divisor),
        'softplus': lambda: weights.Softplus(self.softplus_divisor),
        'squareplus': lambda: weights.Squareplus(self.squareplus_divisor),
        'pfla_softmax': lambda: weights.Pfla(
            self.pfla_softmax_mode == 'quadratic',
            not self.pfla_softmax_use_learned_divisor,
            self.pfla_softmax_use_obo),
    }[name]()

  def _strongermax(self):
    guess = self.strongermax_xmax_guess if self.strongermax_use_xmax else 0.0
    return weights.Strongermax(
        self.strongermax_strength, self.strongermax_div_by_sum_of_terms,
        self.strongermax_divisor, self.strongermax_clamp_value
        if self.strongermax_clamping else None, guess)

  def _polymax(self):
    return weights.Polymax(
        self.polymax_x_intercept, self.polymax_y_intercept,
        self.polymax_power, self.polymax_divisor,
        self.softmax_variant_attn == 'vpolymax')


class Number(NamedTuple):
  """A number of a Weigh, a parameter or not.

  Attributes:
    value: the parameter at first, or all that it ever is.
    letters: of its axes; one without N is that of every head.
    learned: whether it is a parameter.
    scale: multiplies it.
  """
  value: jax.Array | float
  letters: str = ''
  learned: bool = True
  scale: float = 1.0


class Learned(nnx.Module):
  """What the weights of the flags learn."""

  def __init__(self, options, *, n_head):
    self.options, self.n_head = options, n_head
    self.parameters = nnx.Dict({
        name: param(number.value, number.letters, decay=False)
        for name, number in self._numbers().items() if number.learned})

  def __call__(self):
    """The learned numbers of the Weigh, [N] or [N,...] each."""
    found = []
    for name, number in self._numbers().items():
      x = self.parameters[name][...] if number.learned else number.value
      x = jnp.asarray(x * number.scale, jnp.float32)
      found.append(x if number.letters == 'N' else jnp.broadcast_to(
          x, (self.n_head, *x.shape)))
    return tuple(found)

  def _numbers(self):
    """{name: Number}, in the order of the Weigh."""
    options, name = self.options, self.options.softmax_variant_attn
    if name in CONSMAX:
      return _consmax_numbers(options, name, self.n_head)
    if name == 'strongermax':
      per_head = options.strongermax_use_learned_obo_per_head
      obo = options.strongermax_obo
      return dict(
          temperature=Number(
              options.strongermax_temperature_factor,
              learned=options.strongermax_use_learned_temperature_factor),
          offset=Number(
              jnp.full(self.n_head, obo) if per_head else obo, 'N' * per_head,
              learned=per_head or options.strongermax_use_learned_obo))
    if name == 'pfla_softmax':
      return _pfla_numbers(options)
    return {}


def _consmax_numbers(options, name, n_head):
  beta, gamma = options.consmax_initial_beta, options.consmax_initial_gamma
  if name == 'consmax_v2':
    # Factors of them, which a step changes as fast as it changes any number.
    ones = jnp.ones(n_head)
    return dict(beta=Number(ones, 'N', scale=beta),
                gamma=Number(ones, 'N', scale=gamma))
  fixed = name == 'saturatingconsmax'
  return dict(
      beta=Number(beta, learned=not fixed or options.consmax_learnable_beta),
      gamma=Number(gamma, learned=not fixed or options.consmax_learnable_gamma))


def _pfla_numbers(options):
  low, high = options.pfla_softmax_left_bound, options.pfla_softmax_right_bound
  inner = lambda a, b: jnp.linspace(a, b, options.pfla_softmax_num_points + 2)[
      1:-1]
  u, most = inner(-1, 1), max(-low, high)
  x = {'linear': inner(low, high), 'quad': most * u * jnp.abs(u),
       'exp': most * jnp.sign(u) * jnp.expm1(jnp.abs(u)) / math.expm1(1),
       }[options.pfla_softmax_density]
  curve = CURVES[options.pfla_softmax_init_activation](x)
  return dict(
      x=Number(x, '_', learned=options.pfla_softmax_learn_x),
      y=Number(jnp.sqrt(jnp.maximum(curve, 1e-6)), '_',
               learned=options.pfla_softmax_learn_y),
      gamma=Number(options.pfla_softmax_gamma_init,
                   learned=options.pfla_softmax_use_learned_divisor),
      extra=Number(options.pfla_softmax_obo,
                   learned=options.pfla_softmax_use_learned_obo))


class FireBias(nnx.Module):
  """The parameters of FIRE: c, what multiplies L, and the layers of f."""

  def __init__(self, options, *, n_head, rngs):
    self.rule = Fire(options.fire_log_bias, options.fire_init_L,
                     options.fire_outermost_sigma)
    widths = (1, *[options.fire_mlp_width] * options.fire_num_hidden_layers)
    uniform = lambda shape, inputs: jax.random.uniform(
        rngs.params(), shape, minval=-inputs ** -0.5, maxval=inputs ** -0.5)
    self.c = param(options.fire_init_c, '', decay=False)
    self.multiplier = param(1.0, '', decay=False)
    self.weights, self.biases = nnx.List(), nnx.List()
    for inputs, outputs, letter in zip(
        widths, (*widths[1:], n_head), '_' * (len(widths) - 1) + 'N'):
      self.weights.append(param(
          uniform((inputs, outputs), inputs), '_' + letter))
      self.biases.append(param(uniform((outputs,), inputs), letter))

  def __call__(self):
    """What attention.kernels.scores.fire.bias learns."""
    return (self.c[...], self.multiplier[...], *(
        (weight[...], bias[...])
        for weight, bias in zip(self.weights, self.biases)))
