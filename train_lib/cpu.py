"""What makes programs on a CPU faster than its defaults do."""

import ctypes
import os
import sys

# Options of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8

VECTOR_WIDTH = 'xla_cpu_prefer_vector_width'


def keep_memory():
  """Has glibc keep freed memory instead of handing it back to the system.

  XLA's CPU client frees its temporaries after every step, and mapping them
  anew costs a third of a small step in page faults. The arenas of threads
  give memory back whatever the thresholds say, so there must be but one: a
  program calls this first, before NumPy or JAX starts a thread. A library
  does not: how a process allocates is for the program to say.
  """
  if sys.platform != 'linux':
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2 ** 31 - 1),
                          (M_ARENA_MAX, 1)):
      mallopt(option, value)


def compiler_options(device):
  """Options for jax.jit of programs for a device: None, or for a CPU a dict.

  XLA uses half of an AVX-512 register unless told otherwise. With all of it a
  selective scan takes a third less time; CPUs without AVX-512 ignore the
  option. What XLA_FLAGS says of it is left alone.
  """
  chosen = VECTOR_WIDTH in os.environ.get('XLA_FLAGS', '')
  if device.platform != 'cpu' or chosen:
    return None
  return {VECTOR_WIDTH: 512}
