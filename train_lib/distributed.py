"""Joining the processes of a pod or a cluster before JAX is used."""

import os

import jax


def join(mode):
  """Calls jax.distributed.initialize if several processes were started.

  Args:
    mode: 'yes', 'no', or 'auto': when a launcher says that there are several
      processes. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
      say so by hand; Slurm, Open MPI and Cloud TPU are known to JAX.
  """
  if mode == 'no' or (mode == 'auto' and not _launched()):
    return
  if 'JAX_COORDINATOR_ADDRESS' in os.environ:
    jax.distributed.initialize(
        os.environ['JAX_COORDINATOR_ADDRESS'],
        int(os.environ['JAX_NUM_PROCESSES']),
        int(os.environ['JAX_PROCESS_ID']))
  else:
    jax.distributed.initialize()


def _launched():
  number = lambda name: int(os.environ.get(name, '1') or 1)
  hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '')
  return ('JAX_COORDINATOR_ADDRESS' in os.environ
          or number('SLURM_STEP_NUM_TASKS') > 1
          or number('OMPI_COMM_WORLD_SIZE') > 1
          # libtpu leaves a warning there when it finds no pod.
          or (',' in hosts and ' ' not in hosts))
