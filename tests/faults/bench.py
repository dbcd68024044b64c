"""A tiny run to be disturbed, and what is known of it when it is not."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
HALF, WHOLE = 30, 60  # steps
FLAGS = ('--n_layer=2', '--n_embd=32', '--n_head=2', '--block_size=32',
         '--batch_size=4', f'--lr_decay_iters={WHOLE}', '--eval_interval=10',
         '--eval_iters=2', '--checkpoint_interval=5', '--noeval_final',
         '--log_interval=1', '--max_new_tokens=5', '--mesh_data=1')
LONGEST = 240  # seconds that a run may take on a busy machine


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process of main.py ended.

  Attributes:
    code: its exit code.
    out, err: what it printed.
  """
  code: int
  out: str
  err: str

  @property
  def line(self):
    """The last line that it printed."""
    lines = (self.err.strip() or self.out.strip()).splitlines()
    return lines[-1] if lines else ''


def start(workdir, *flags, steps=WHOLE):
  """A process of main.py in a workdir."""
  cache = pathlib.Path(tempfile.gettempdir()) / 'attention-lab-faults-cache'
  # Files for its output: nobody reads a pipe while a fault waits for a step.
  told = pathlib.Path(tempfile.mkdtemp(prefix='faults-told-'))
  with open(told / 'out', 'w') as out, open(told / 'err', 'w') as err:
    process = subprocess.Popen(
        [sys.executable, 'main.py', *FLAGS, f'--max_iters={steps}',
         f'--workdir={workdir}', *flags], cwd=ROOT, stdout=out, stderr=err,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1',
             'XLA_FLAGS': '--xla_backend_optimization_level=0',
             'JAX_COMPILATION_CACHE_DIR': str(cache),
             'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
             'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'})
  process.told = told
  return process


def end(process):
  """Waits for a process, and says how it ended."""
  code = process.wait(timeout=LONGEST)
  texts = [(process.told / name).read_text() for name in ('out', 'err')]
  shutil.rmtree(process.told)
  return Ended(code, *texts)


def printed(process):
  """What a process has printed so far."""
  return (process.told / 'out').read_text()


def numbered(workdir):
  """The steps that folders of checkpoints are named after."""
  folder = workdir / 'checkpoints'
  return sorted(int(path.name) for path in folder.glob('*')
                if path.name.isdigit()) if folder.is_dir() else []


def marks(workdir, step):
  """The fingerprint that a checkpoint has of its arrays."""
  path = workdir / f'checkpoints/{step}/meta/metadata'
  return json.loads(path.read_text())['meta']['fingerprint']


def losses(workdir):
  """{(step, name): loss} of metrics.jsonl."""
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {(row['step'], name): row[name] for row in rows
          for name in ('loss', 'val_loss') if name in row}


def content(folder):
  """{path: bytes} of what is below a folder."""
  return {path.relative_to(folder): path.read_bytes()
          for path in folder.rglob('*') if path.is_file()}


class Bench:
  """An undisturbed run, and copies of its first half to disturb."""

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    self.half, self.whole = self.folder / 'half', self.folder / 'whole'
    for workdir, steps in ((self.half, HALF), (self.whole, WHOLE)):
      ended = end(start(workdir, steps=steps))
      if ended.code:
        raise RuntimeError(f'exit code {ended.code}: {ended.err or ended.out}')
    self.marks, self.losses = marks(self.whole, WHOLE), losses(self.whole)

  def copy(self, name):
    """A workdir with the first half."""
    return shutil.copytree(self.half, self.folder / name, symlinks=True)
