"""The options that programs for a CPU are compiled with."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train_lib import evaluate, host, session, trainer


def test_this_jax_takes_them(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')
  options = host.compiler_options(jax.devices('cpu')[0])
  assert options
  x = jnp.linspace(-3, 3, 1001)
  np.testing.assert_allclose(
      jax.jit(jnp.exp, compiler_options=options)(x), np.exp(x), rtol=1e-6)


def test_other_devices_and_other_wishes_have_none(monkeypatch):
  assert host.compiler_options(types.SimpleNamespace(platform='tpu')) is None
  cpu = jax.devices('cpu')[0]
  monkeypatch.setenv('XLA_FLAGS', f'--{host.VECTOR_WIDTH}=128')
  assert host.compiler_options(cpu) is None
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
  assert host.compiler_options(cpu)


def test_steps_and_evaluations_are_compiled_with_them(
    config, tmp_path, monkeypatch):
  monkeypatch.setattr(host, 'compiler_options', lambda _: {'no_such': 1})
  config.mesh_data = -1
  run = session.open_session(config, tmp_path)
  for program, state in ((trainer.make_step(run), run.template),
                         (evaluate.make_evaluator(run), run.template.params)):
    with pytest.raises(jax.errors.JaxRuntimeError, match='no_such'):
      program.lower(state, run.batch(0)).compile()
