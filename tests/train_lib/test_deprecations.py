"""Nothing that jax, flax, optax or orbax are to remove is used.

Their DeprecationWarnings are errors of every test, by pyproject.toml. Here is
a test of that, and a fresh process, where imports may warn as well.
"""

import os
import subprocess
import sys
import warnings

import pytest

from tests.train_lib import runs

CODE = """
import sys, warnings

dataset, workdir, *modules = sys.argv[1:]
for module in modules:
  warnings.filterwarnings('error', category=DeprecationWarning, module=module)

from tests.train_lib import runs
from train_lib import inference, trainer

config = runs.small(dataset, max_iters=2, eval_interval=1, eval_final=True)
trainer.train(config, workdir)
config.max_iters = 3
assert len(runs.losses(trainer.train(config, workdir))) == 1
inference.evaluate_run(config, workdir)
inference.sample_run(config, workdir)
"""


@pytest.mark.parametrize('module', [
    'jax.numpy', 'flax.nnx', 'optax', 'orbax.checkpoint', 'attention.causal',
    'benchmarks.scan', 'configs.default', 'main', 'model.layers',
    'train_lib.trainer'])
def test_deprecations_are_errors(module):
  with pytest.raises(DeprecationWarning):
    warnings.warn_explicit('soon gone', DeprecationWarning, 'file', 1, module)


@pytest.mark.slow
def test_a_run_from_start_to_sample_uses_nothing_deprecated(
    squares, tmp_path, pytestconfig):
  modules = [line.rpartition(':')[2]
             for line in pytestconfig.getini('filterwarnings')]
  done = subprocess.run(
      [sys.executable, '-c', CODE, squares, tmp_path / 'run', *modules],
      cwd=runs.ROOT, text=True, capture_output=True,
      env={**os.environ, 'XLA_FLAGS': '--xla_backend_optimization_level=0'})
  assert done.returncode == 0, done.stderr
  assert 'val_loss_full' in done.stdout
