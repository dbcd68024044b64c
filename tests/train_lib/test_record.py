"""run.json: what a run is made of, and whether it has ended."""

import json

from train_lib import record


def test_a_run_leaves_its_record(trained):
  found = record.read(trained.workdir)
  config = json.loads((trained.workdir / 'config.json').read_text())
  assert found['finished'] == config['max_iters']
  assert found['kernels'].startswith('flash: xla')
  assert found['devices'].endswith('x cpu')
  shown = f'{found["state_bytes"]:,} bytes + {found["state_bytes_per_token"]:,}'
  assert shown in trained.said
  assert f'{found["parameters"]:,}' in trained.said


def test_no_record(tmp_path):
  assert record.read(tmp_path) == {}
  (tmp_path / 'run.json').write_text('{"finished": ')
  assert record.read(tmp_path) == {}


def test_the_commit_is_that_of_the_code():
  commit = record.commit()
  assert commit is None or len(commit.rstrip('+')) == 12
