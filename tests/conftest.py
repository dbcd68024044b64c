"""Eight CPU devices, a compile cache, and fast compiles, set before jax."""

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
