"""The real training step, compiled for pods and GPUs that are not there.

The mesh is made of devices that are only described, and 'auto' prefers what it
would prefer on them; everything else is what main.py runs.
"""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attention.kernels import dispatch
from tests.kernels import accelerators
from train_lib import report, sharding, trainer
from train_lib import run as run_lib

# Which kernels each list of layers must run.
LAYERS = {
    ('causal', 'mla'): {'flash'},
    ('ssm',): {'scan'},
    ('linear',): {'chunked'},
    ('retention', 'mamba2'): {'chunked'},
    ('co4',): {'chunked'},
}


@pytest.fixture
def compile_step(config, tmp_path, monkeypatch):
  """A function (kinds, devices [data,fsdp,tensor]) -> (compiled, choices)."""

  def compile_step(kinds, devices):
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    monkeypatch.setattr(sharding, 'make_mesh', lambda config: mesh)
    config.update(
        attention_list=kinds, n_layer=2 * len(kinds), n_embd=512, n_head=8,
        block_size=1536, batch_size=devices.size, compute_dtype='bfloat16',
        dropout=0.0, val_fraction=0.2)
    run = run_lib.open_run(config, tmp_path / 'run')
    batch = {'tokens': jax.ShapeDtypeStruct(
        (config.batch_size, config.block_size + 1), np.int32,
        sharding=NamedSharding(mesh, P(('data', 'fsdp'))))}
    whole = NamedSharding(mesh, P())
    constants = {
        'rates': jax.ShapeDtypeStruct((1024,), np.float32, sharding=whole),
        'seed': jax.ShapeDtypeStruct((), np.uint32, sharding=whole)}
    with dispatch.record() as choices:
      return trainer.make_step(run).lower(
          run.template, batch, constants).compile(), choices

  return compile_step


def assert_runs(kinds, kernel, compiled, choices):
  assert choices == {f'attention.kernels.{op}': {kernel: ''}
                     for op in LAYERS[kinds]}
  assert kernel in report.kernels(choices)
  assert '1536,1536]' not in compiled.as_text()


@pytest.mark.slow
@pytest.mark.parametrize('kinds', LAYERS, ids='-'.join)
def test_step_of_64_chips(kinds, compile_step):
  devices = accelerators.tpu_pod(2, 8, 4)
  with dispatch.pretend('tpu', 'v5p'):
    assert_runs(kinds, 'tpu', *compile_step(kinds, devices))


@pytest.mark.slow
@pytest.mark.parametrize(
    'kinds', [kinds for kinds in LAYERS if kinds != ('co4',)], ids='-'.join)
def test_step_of_eight_gpus(kinds, compile_step, monkeypatch, capfd):
  """Without co4, whose float32 statistics the tensor cores would round."""
  accelerators.require_h100_compiler(monkeypatch)
  devices = accelerators.h100s(8).reshape(2, 2, 2)
  with dispatch.pretend('gpu', '9.0'):
    assert_runs(kinds, 'gpu', *compile_step(kinds, devices))
  # XLA's word for arrays that it makes whole on every device.
  assert 'full rematerialization' not in capfd.readouterr().err
