"""Optimisers and schedules, from optax, by flag."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Steps of the shortest table of learning rates: runs of fewer share a program;
# and of the longest, of 16 MiB: runs of more have one of their own.
SHORTEST, LONGEST = 1 << 10, 1 << 22


def schedule(config):
  """The learning rate as a function of the step."""
  peak, end, warm = config.learning_rate, config.min_lr, config.warmup_iters
  last = config.lr_decay_iters or config.max_iters
  steps = max(last - warm, 1)
  cooldown = max(steps // 5, 1)  # wsd: the last fifth (Hu et al. 2024).
  after = {
      'constant': optax.constant_schedule(peak),
      'cosine': optax.cosine_decay_schedule(
          peak, steps, end / peak if peak else 0.0),
      'linear': optax.linear_schedule(peak, end, steps),
      'wsd': optax.linear_schedule(peak, end, cooldown, steps - cooldown),
  }[config.lr_schedule]
  # As nanoGPT: the first step already moves.
  ramp = optax.linear_schedule(peak / (warm + 1), peak, max(warm, 1))
  return optax.join_schedules([ramp, after], [warm])


def rates(config):
  """The learning rate of every step, as an array [steps], or None.

  An argument of the compiled step, where the schedule's numbers would be its
  constants: runs that differ in them share a program. Its length is rounded up
  to a power of two, so that runs of about one length do too. None for a run of
  more than LONGEST steps.
  """
  if config.max_iters > LONGEST:
    return None
  steps = max(SHORTEST, 1 << (config.max_iters - 1).bit_length())
  return np.asarray(jax.jit(jax.vmap(schedule(config)))(
      jnp.arange(steps)), np.float32)


def notes(config):
  """Lines on a schedule that does not do what its flags say."""
  warm = config.warmup_iters
  if config.max_iters <= warm:
    return [f'max_iters ({config.max_iters}) is not above warmup_iters '
            f'({warm}): the learning rate does not get to its peak']
  if config.lr_schedule != 'constant' and (
      config.lr_decay_iters or config.max_iters) <= warm:
    return [f'lr_decay_iters ({config.lr_decay_iters}) is not above '
            f'warmup_iters ({warm}): the learning rate falls at once']
  return []


def build(config, model, learning_rate=None):
  """The optax transformation of a config.

  Args:
    config: the flags.
    model: the AbstractModel, for what its parameters say of themselves: weight
      decay applies to those with `decay`, Muon to those with `n_inputs`.
    learning_rate: a function of the step; none: the schedule.
  """
  b1, b2 = config.beta1, config.beta2
  direction = {
      'adamw': lambda: optax.scale_by_adam(b1, b2),
      'lion': lambda: optax.scale_by_lion(b1, b2),
      'adafactor': lambda: optax.chain(
          optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
      'muon': lambda: _muon(b1, b2, model),
      'sgd': lambda: optax.trace(b1),
  }[config.optimizer]()
  decay = {n: v.decay for n, v in model.variables.items()}
  clip = optax.clip_by_global_norm(config.grad_clip)
  return optax.chain(
      clip if config.grad_clip else optax.identity(),
      direction,
      optax.add_decayed_weights(config.weight_decay, mask=decay),
      optax.scale_by_learning_rate(learning_rate or schedule(config)))


def _muon(b1, b2, model):
  """Muon for matrices between activations, Nesterov Adam for all else.

  The updates have Adam's size (root mean square 0.2, Liu et al. 2025), so
  that one learning rate serves both.
  """
  def dimensions(name, variable):
    if not variable.n_inputs:
      return None
    stacked = len(model.shapes[name].shape) - len(variable.letters)
    axes = range(stacked, len(model.shapes[name].shape))
    return optax.contrib.MuonDimensionNumbers(
        tuple(axes[:variable.n_inputs]), tuple(axes[variable.n_inputs:]))
  numbers = {n: dimensions(n, v) for n, v in model.variables.items()}
  return optax.chain(
      optax.contrib.muon(
          1.0, adam_b1=b1, adam_b2=b2, consistent_rms=0.2,
          muon_weight_dimension_numbers=numbers),
      optax.scale(-1.0))  # A direction, not yet a descent.
