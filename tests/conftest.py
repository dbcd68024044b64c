"""Eight CPU devices, a compile cache, and fast compiles, set before jax."""

import itertools
import os
import pathlib
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
# Optimisation level 0 halves the time of a test run; results do not change
# beyond rounding, and benchmarks never run under it.
os.environ['XLA_FLAGS'] = ' '.join([
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0'])

import jax

_CACHE = pathlib.Path(tempfile.gettempdir()) / 'attention-lab-test-cache'
jax.config.update('jax_compilation_cache_dir', str(_CACHE / jax.__version__))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

# A compiled program holds a hundred or so of the 65,530 memory maps that Linux
# grants a process; the first mmap after the last one is a segmentation fault.
_MAPS = pathlib.Path('/proc/self/maps')
_MANY = 20_000
_tests = itertools.count(1)


def pytest_runtest_logfinish():
  """Drops the compiled programs when they are many; the disk has them."""
  if next(_tests) % 25 == 0 and _MAPS.exists():
    with _MAPS.open('rb') as maps:
      many = sum(1 for _ in maps) > _MANY
    if many:
      jax.clear_caches()
