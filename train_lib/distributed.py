"""Joining the processes of a pod or a cluster before JAX is used."""

import os

import jax

BY_HAND = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def join(mode):
  """Calls jax.distributed.initialize if several processes were started.

  Args:
    mode: 'yes', 'no', or 'auto': when a launcher says that there are several
      processes. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
      say so by hand; Slurm, Open MPI and Cloud TPU are known to JAX.

  Raises:
    ValueError: the environment says only half of it, or nobody answers.
  """
  if mode == 'no' or (mode == 'auto' and not _launched()):
    return
  given = [name for name in BY_HAND if name in os.environ]
  if given and len(given) < len(BY_HAND):
    missing = [name for name in BY_HAND if name not in given]
    raise ValueError(f'{" and ".join(given)} without {" and ".join(missing)}: '
                     'set all three, or none of them, or --distributed=no')
  try:
    if given:
      address, *numbers = (os.environ[name] for name in BY_HAND)
      jax.distributed.initialize(address, *map(int, numbers))
    else:
      jax.distributed.initialize()
  except (ValueError, RuntimeError) as error:
    reason = ' '.join(str(error).split())
    raise ValueError(f'--distributed={mode}: the processes cannot be joined '
                     f'({reason})') from None


def _launched():
  hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '')
  return ('JAX_COORDINATOR_ADDRESS' in os.environ
          or _number('SLURM_STEP_NUM_TASKS') > 1
          or _number('OMPI_COMM_WORLD_SIZE') > 1
          # libtpu leaves a warning there when it finds no pod.
          or (',' in hosts and ' ' not in hosts))


def _number(name):
  text = os.environ.get(name) or '1'
  return int(text) if text.isdecimal() else 1
