"""A config to change, and a trained run to look at or to go on with."""

import shutil
import types

import pytest

from tests.train_lib import runs
from train_lib import trainer


@pytest.fixture(scope='session')
def squares(tmp_path_factory):
  """A text file of 12 kB."""
  path = tmp_path_factory.mktemp('text') / 'squares.txt'
  path.write_text(''.join(f'{i} squared is {i * i}.\n' for i in range(600)))
  return str(path)


@pytest.fixture
def config(squares):
  return runs.small(squares)


@pytest.fixture
def one_device():
  with runs.one_device():
    yield


@pytest.fixture(scope='session')
def trained(squares, tmp_path_factory):
  """A finished run on one device: (workdir, to be read only; history)."""
  workdir = tmp_path_factory.mktemp('runs') / 'trained'
  with runs.one_device():
    history = trainer.train(runs.small(squares, eval_final=True), workdir)
  return types.SimpleNamespace(workdir=workdir, history=history)


@pytest.fixture
def workdir(trained, tmp_path):
  """A copy of the trained run, to be changed."""
  return shutil.copytree(trained.workdir, tmp_path / 'run')
