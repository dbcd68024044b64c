"""Kernels that are not what they should be are found out, and avoided."""

import sys

import pytest

from attention.kernels import dispatch
from tests.train_lib import faulty
from train_lib import kernel_check, trainer

FLASH = 'attention.kernels.flash'
SAID = {
    'wrong': 'dk is off by 0.1', 'nan': 'dv is off by nan',
    'raises': 'raises RuntimeError: no such instruction',
    'restless': 'dq has other bits the second time',
}


@pytest.fixture(autouse=True)
def no_memory(tmp_path, monkeypatch):
  """Nothing is remembered from one test to another."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def install(monkeypatch):
  """A function (implementation of flash, its fault)."""
  def install(name, fault):
    monkeypatch.setitem(sys.modules, f'{FLASH}.{name}', faulty.kernel(fault))
  return install


@pytest.mark.parametrize('fault', SAID)
def test_a_kernel_that_fails_is_avoided(fault, config, install, tmp_path):
  install('tpu', fault)
  config.update(max_iters=1, n_layer=1)
  with (dispatch.pretend('tpu', 'v5e'), kernel_check.checked(config),
        dispatch.record() as choices):
    kernel_check.calls(config)
  (name, why), = choices[FLASH].items()
  assert name == 'xla' and SAID[fault] in why
  assert why.startswith('tpu: failed its check on this device')


def test_a_sound_kernel_is_used_and_remembered(config, install, monkeypatch):
  install('tpu', 'sound')
  proofs = []
  prove = kernel_check.proof.prove
  monkeypatch.setattr(
      kernel_check.proof, 'prove',
      lambda call: proofs.append(call) or prove(call))

  def proved():
    proofs.clear()
    with (dispatch.pretend('tpu', 'v5e'), kernel_check.checked(config),
          dispatch.record() as choices):
      kernel_check.calls(config)
    assert choices == {FLASH: {'tpu': ''}}
    return len(proofs)

  # Training, prefill and a step of decoding.
  assert proved() == 3
  assert proved() == 0, 'what has passed is remembered'
  config.kernel_check = 'always'
  assert proved() == 3
  config.kernel_check = 'auto'
  config.window_size = 4
  assert proved() == 3, 'other features are other programs'
  assert proved() == 0
  monkeypatch.setattr(kernel_check.jax, '__version__', '99')
  assert proved() == 3, 'another version of jax may compile another program'


def test_off_is_off(config, install):
  install('tpu', 'raises')
  config.kernel_check = 'off'
  with dispatch.pretend('tpu', 'v5e'), kernel_check.checked(config):
    pass


@pytest.mark.parametrize('how', ['flag', 'entry'])
def test_a_named_kernel_that_fails_is_an_error_with_figures(
    how, config, install):
  install('tpu', 'wrong')
  if how == 'flag':
    config.attention_kernel = 'tpu'
  else:
    config.attention_list = ('causal', 'causal(attention_kernel=tpu)')
  with (dispatch.pretend('tpu', 'v5e'), pytest.raises(ValueError) as error,
        kernel_check.checked(config)):
    pass
  assert str(error.value).startswith('attention_kernel=tpu: the kernel of')
  assert 'dk is off by 0.1' in str(error.value)
  assert '\n' not in str(error.value)


def test_a_run_goes_on_with_what_works(
    config, install, tmp_path, capsys, one_device):
  install('tpu', 'wrong')
  config.update(max_iters=2, n_layer=1, eval_interval=0)
  with dispatch.pretend('tpu', 'v5e'):
    trainer.train(config, tmp_path / 'run')
  header, = [line for line in capsys.readouterr().out.splitlines()
             if line.startswith('  kernels')]
  assert 'flash: xla (tpu: failed its check on this device (dk is' in header


CHILD = '''
from attention.kernels import dispatch
from tests.train_lib import faulty
from train_lib import kernel_check
faulty.install('gpu', {fault!r})
with dispatch.pretend('gpu', '9.0'):
  kernel_check.child()
'''


@pytest.mark.parametrize('fault, said', [
    ('wrong', 'dk is off by 0.1'), ('dies', 'died (exit status 11)'),
    pytest.param('hangs', 'did not answer within 25 s',
                 marks=pytest.mark.slow),
    ('sound', '')])
def test_gpu_kernels_are_proved_in_another_process(
    fault, said, config, monkeypatch):
  """There a hang is a fallback, and so is a crash."""
  monkeypatch.setattr(kernel_check, 'CHILD', (
      sys.executable, '-c', CHILD.format(fault=fault)))
  monkeypatch.setattr(kernel_check, 'LIMIT', 25)
  with (dispatch.pretend('gpu', '9.0'),
        kernel_check.checked(config) as failed):
    assert set(failed) == ({(FLASH, 'gpu')} if said else set())
    assert said in failed.get((FLASH, 'gpu'), '')


def test_a_child_that_says_nothing_is_one_line(config, monkeypatch):
  monkeypatch.setattr(kernel_check, 'CHILD', (
      sys.executable, '-c', 'raise SystemExit("no driver")'))
  with (dispatch.pretend('gpu', '9.0'), pytest.raises(
      ValueError, match='died .exit status 1. beside its kernels .no driver.'),
        kernel_check.checked(config)):
    pass
