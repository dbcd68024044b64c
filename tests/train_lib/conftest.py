"""A config to change, and trained runs to look at or to go on with."""

import contextlib
import functools
import io
import math
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
  with runs.devices(1):
    yield


@pytest.fixture(scope='session')
def trained(squares, tmp_path_factory):
  """A finished run on one device: its workdir, history and what it said.

  All tests read the same folder; `workdir` is a copy of it, to be changed.
  """
  workdir = tmp_path_factory.mktemp('runs') / 'trained'
  config = runs.small(squares, eval_final=True, profile_steps=('1', '2'))
  with runs.devices(1), contextlib.redirect_stdout(io.StringIO()) as said:
    history = trainer.train(config, workdir)
  return types.SimpleNamespace(
      workdir=workdir, history=history, said=said.getvalue())


@pytest.fixture
def workdir(trained, tmp_path):
  return shutil.copytree(trained.workdir, tmp_path / 'run')


@pytest.fixture(scope='session')
def spread(squares, tmp_path_factory):
  """A function mesh -> (workdir, losses) of three steps without dropout."""

  @functools.cache
  def train(mesh):
    workdir = tmp_path_factory.mktemp('mesh')
    config = runs.small(squares, max_iters=3, dropout=0.0)
    runs.set_mesh(config, mesh)
    with runs.devices(math.prod(mesh)):
      return workdir, runs.losses(trainer.train(config, workdir))

  return train
