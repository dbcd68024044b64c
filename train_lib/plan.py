"""What a run needs at the very least, before any of it is made."""

import math
import os

import jax

from configs import default
from model.sharding import mesh_size

GiB = 1 << 30


def memory():
  """Bytes that one device has, or None where nothing says so."""
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    return (device.memory_stats() or {}).get('bytes_limit')
  try:
    whole = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (AttributeError, OSError, ValueError):
    return None
  return whole // jax.local_device_count()


def check_sizes(config, mesh):
  """Raises ValueError for a model or a step that no device here can hold.

  Bounds from below, of the flags alone: they take no time and no memory
  however large the numbers are.
  """
  D = config.n_embd
  table = (config.vocab_size or 1) * D
  layers = config.n_layer * 2 * D * (config.mlp_width or 4 * D)
  positions = config.block_size * D * config.use_abs_pos_embeddings
  copies = mesh_size(mesh, 'D') * mesh_size(mesh, 'F')
  # Parameters and their gradients, in float32.
  check('parameters', 2 * 4 * (table + layers + positions) // copies, config,
        flags=('n_layer', 'n_embd', 'mlp_width', 'vocab_size', 'block_size'))
  part = config.batch_size // config.gradient_accumulation_steps
  width = 2 if config.compute_dtype == 'bfloat16' else 4
  for rows, flag in ((part, 'batch_size'),
                     (config.eval_batch_size or 0, 'eval_batch_size')):
    check('activations', rows * config.block_size * D * width
          // mesh_size(mesh, 'B'), config, flags=(flag, 'block_size', 'n_embd'))


def check_state(template, config):
  """Raises ValueError if an abstract TrainState does not fit the devices."""
  size = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(template))
  sizes = [flag for flag in sorted(default.model_flags())
           if isinstance(config[flag], int)]
  check('parameters and optimiser', size, config, flags=sizes)


def check_samples(model, prompt, config):
  """Raises ValueError if the states of all samples do not fit a device.

  Args:
    model: the Transformer.
    prompt: its token ids.
    config: the flags.
  """
  whole, per_token = model.state_bytes()
  tokens = min(len(prompt) + config.max_new_tokens, config.block_size)
  check('states', config.num_samples * (whole + per_token * tokens), config,
        flags=('num_samples', 'block_size'))


def check(what, needed, config, *, flags):
  """Raises ValueError if a device has less than the bytes that are needed.

  Args:
    what: needs them.
    needed: bytes.
    config: the flags.
    flags: those that it depends on; of these, the ones that were set are told.
  """
  limit = memory()
  if limit is None or needed <= limit:
    return
  fields = default.fields()
  told = [flag for flag in flags if config[flag] != fields[flag].default]
  values = ', '.join(f'{flag}={config[flag]}' for flag in told or flags)
  raise ValueError(
      f'{what} need {needed / GiB:,.1f} GiB or more on a device that has '
      f'{limit / GiB:,.1f}: lower one of {values}'
      + ', or use more devices' * (jax.device_count() > 1))
