"""Targets that the kernels' tests pretend to compile for."""

import pytest

from attention.kernels import dispatch


@pytest.fixture
def on_tpu():
  with dispatch.pretend('tpu', ''):
    yield


@pytest.fixture
def on_h100():
  with dispatch.pretend('gpu', '9.0'):
    yield
