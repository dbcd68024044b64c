"""Targets that the kernels' tests pretend to have, and how they run there."""

import functools

import pytest

from attention.kernels import dispatch
from tests.kernels import accelerators, implementations


@pytest.fixture
def results(capfd):
  """A function (row, implementation, operands): what it computes, by name."""
  return functools.partial(implementations.results, capfd=capfd)


@pytest.fixture
def on_tpu():
  with dispatch.pretend('tpu', ''):
    yield


@pytest.fixture
def on_h100():
  with dispatch.pretend('gpu', '9.0'):
    yield


@pytest.fixture
def h100_compiler(monkeypatch):
  accelerators.require_h100_compiler(monkeypatch)
