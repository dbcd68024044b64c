"""What programs for a CPU are compiled with, and how they keep memory."""

import ast
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train_lib import cpu, trainer
from train_lib import run as run_lib
from train_lib.evaluate import Evaluator

ROOT = pathlib.Path(cpu.__file__).parents[1]


@pytest.fixture
def device():
  """A CPU, there before a test changes the XLA_FLAGS that made it."""
  return jax.devices('cpu')[0]


def test_this_jax_takes_them(device, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')
  options = cpu.compiler_options(device)
  assert options
  x = jnp.linspace(-3, 3, 1001)
  np.testing.assert_allclose(
      jax.jit(jnp.exp, compiler_options=options)(x), np.exp(x), rtol=1e-6)


def test_other_devices_and_other_wishes_have_none(device, monkeypatch):
  assert cpu.compiler_options(types.SimpleNamespace(platform='tpu')) is None
  monkeypatch.setenv('XLA_FLAGS', f'--{cpu.VECTOR_WIDTH}=128')
  assert cpu.compiler_options(device) is None
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
  assert cpu.compiler_options(device)


@pytest.mark.usefixtures('one_device')
def test_steps_and_evaluations_are_compiled_with_them(
    config, tmp_path, monkeypatch):
  monkeypatch.setattr(cpu, 'compiler_options', lambda _: {'no_such': 1})
  run = run_lib.open_run(config, tmp_path)
  batch = run.batch(0)
  for program, arguments in (
      (trainer.make_step(run), (run.template, batch, run.constants)),
      (Evaluator(run).sums, (run.template.params, batch))):
    with pytest.raises(jax.errors.JaxRuntimeError, match='no_such'):
      program.lower(*arguments).compile()


@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc and glibc')
def test_main_keeps_memory_while_it_is_the_only_thread():
  code = '\n'.join([
      'import os, runpy, sys',
      'from train_lib import cpu',
      'def told():',
      '  threads = len(os.listdir("/proc/self/task"))',
      '  sys.exit(f"{threads} {sys.modules.keys() & {\'jax\', \'numpy\'}}")',
      'cpu.keep_memory = told',
      'runpy.run_path("main.py", run_name="__main__")'])
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT,
                        capture_output=True, text=True)
  assert done.stderr.strip() == '1 set()'


def test_the_library_leaves_the_process_alone():
  for package in ('attention', 'configs', 'model', 'train_lib'):
    for path in (ROOT / package).rglob('*.py'):
      called = {getattr(node.func, 'attr', getattr(node.func, 'id', ''))
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call)}
      assert 'keep_memory' not in called, path


def test_other_systems_have_no_such_library(monkeypatch):
  monkeypatch.setattr(cpu.sys, 'platform', 'win32')
  monkeypatch.setattr(cpu.ctypes, 'CDLL', None)  # Of None it is a TypeError.
  cpu.keep_memory()
