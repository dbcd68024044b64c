"""What can happen to a run. Each takes a workdir, and chance, and says what."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import time

from tests.faults import bench

# Flags that make another run than the one in the workdir.
OTHERS = ('--optimizer=lion', '--optimizer=sgd', '--optimizer=muon',
          '--n_embd=64', '--n_layer=3', '--n_head=4', '--use_rotary_embeddings',
          '--tokenizer=char', '--mlp_variant=swiglu', '--block_size=16',
          '--attention_variant=ssm', '--vocab_size=300', '--val_fraction=0',
          '--batch_size=3 --gradient_accumulation_steps=2', '--seed=-1',
          '--dataset=/nowhere', '--block_size=100000000')


class Violated(AssertionError):
  """The invariant does not hold."""


def finish(workdir, spared, known, *, rows=True, reason=None):
  """Runs the plain command: the result of an undisturbed run, or one line.

  Args:
    workdir: the run's folder.
    spared: steps of the checkpoints that no fault touched, and that were
      there: they may not be moved, nor called damaged.
    known: the bench.Bench.
    rows: whether metrics.jsonl was left alone too.
    reason: what a refusal may say although checkpoints were spared.

  Returns:
    What came of it, in a few words.
  """
  before = {step: bench.content(workdir / f'checkpoints/{step}')
            for step in spared}
  ended = bench.end(bench.start(workdir))
  told(ended)
  aside = {int(path.name.split('-')[0])
           for path in (workdir / 'damaged').glob('*')}
  if aside & set(spared):
    raise Violated(f'moved, though good: {aside & set(spared)}')
  if ended.code:
    newer = set(bench.numbered(workdir)) - set(before)
    for step in [] if newer else spared:  # Older ones may be deleted then.
      if bench.content(workdir / f'checkpoints/{step}') != before[step]:
        raise Violated(f'checkpoint {step} is gone after: {ended.line}')
    if ended.code != 1 or not ended.line.startswith('error: '):
      raise Violated(f'exit code {ended.code}: {ended.line}')
    if spared and not (reason and reason in ended.line):
      raise Violated(f'did not go on from {spared}: {ended.line}')
    return f'refused: {ended.line[:100]}'
  if bench.marks(workdir, bench.WHOLE) != known.marks:
    raise Violated('ends with other parameters than undisturbed')
  if rows and bench.losses(workdir) != known.losses:
    raise Violated('other rows of metrics than undisturbed')
  return 'as undisturbed'


def told(ended, codes=(0, 1)):
  """Violated unless a process says in one line why it ended."""
  for sign in ('Traceback', 'Error:', 'Exception ignored'):
    if sign in ended.err + ended.out:
      raise Violated(f'{sign} in the output: {ended.err[-800:]}')
  if ended.code not in codes:
    raise Violated(f'exit code {ended.code}: {ended.line}')
  if len(ended.err.strip().splitlines()) > 3:
    raise Violated(f'more than a few lines: {ended.err[:800]}')


def running(process, chance, *, at_least=bench.HALF):
  """Waits until a run is somewhere in its loop; false if it has ended."""
  step = chance.randint(at_least, bench.WHOLE)
  deadline = time.time() + bench.LONGEST
  while time.time() < deadline and process.poll() is None:
    if f'step {step:>6}' in bench.printed(process):
      time.sleep(chance.random() * 0.05)
      return process.poll() is None
    time.sleep(0.002)
  return False


def killed(workdir, chance, known):
  """kill -9, once or more, in a step or in a save."""
  for _ in range(chance.randint(1, 3)):
    process = bench.start(workdir)
    running(process, chance)
    process.kill()
    bench.end(process)
  return finish(workdir, bench.numbered(workdir), known)


def killed_at_any_time(workdir, chance, known):
  """kill -9 while it imports, reads, compiles or ends."""
  process = bench.start(workdir)
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(timeout=chance.random() * 5)
  process.kill()
  bench.end(process)
  return finish(workdir, bench.numbered(workdir), known)


def stopped(workdir, chance, known):
  """SIGTERM or Ctrl-C in the loop, perhaps twice."""
  process = bench.start(workdir)
  number = chance.choice([signal.SIGTERM, signal.SIGINT])
  if running(process, chance):
    for _ in range(chance.randint(1, 2)):
      process.send_signal(number)
      time.sleep(chance.random() * 0.3)
  ended = bench.end(process)
  told(ended, codes=(0, 75))
  return finish(workdir, bench.numbered(workdir), known)


def _files(workdir, step):
  return sorted(path for path in (workdir / f'checkpoints/{step}').rglob('*')
                if path.is_file() and path.stat().st_size)


def flipped(workdir, chance, known):
  """A few bits in files of the newest checkpoint, or of any."""
  steps = bench.numbered(workdir)
  step = chance.choice([steps[-1], *steps])
  for path in chance.choices(_files(workdir, step), k=chance.randint(1, 3)):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
  return finish(workdir, [s for s in steps if s != step], known)


def cut(workdir, chance, known):
  """Files cut, emptied, overwritten, deleted, or folders instead of them."""
  steps = bench.numbered(workdir)
  hit = chance.sample(steps, chance.randint(1, len(steps)))
  for step in hit:
    for path in chance.choices(_files(workdir, step), k=chance.randint(1, 4)):
      _damage(path, chance)
  return finish(workdir, [s for s in steps if s not in hit], known)


def _damage(path, chance):
  if not path.is_file():  # Twice the same.
    return
  size = path.stat().st_size
  kind = chance.choice(['cut', 'empty', 'random', 'zeros', 'gone', 'folder'])
  if kind == 'cut':
    os.truncate(path, chance.randrange(size) if size else 0)
  elif kind == 'empty':
    path.write_bytes(b'')
  elif kind == 'random':
    path.write_bytes(chance.randbytes(size))
  elif kind == 'zeros':
    path.write_bytes(bytes(size))
  else:
    path.unlink()
    if kind == 'folder':
      path.mkdir()


def power_cut(workdir, chance, known):
  """Nothing that was not synced by then is there: the JSON of the newest."""
  steps = bench.numbered(workdir)
  for name in ('meta/metadata', '_CHECKPOINT_METADATA', 'params/_METADATA'):
    if chance.random() < 0.7:
      (workdir / f'checkpoints/{steps[-1]}' / name).write_bytes(b'')
  rows = workdir / 'metrics.jsonl'
  os.truncate(rows, chance.randrange(rows.stat().st_size))
  return finish(workdir, steps[:-1], known, rows=False)


def folders(workdir, chance, known):
  """Folders of checkpoints deleted, emptied, renamed, and strange ones."""
  steps = bench.numbered(workdir)
  folder, step = workdir / 'checkpoints', chance.choice(steps)
  kind = chance.choice(['deleted', 'emptied', 'renamed', 'stray', 'part'])
  if kind in ('deleted', 'emptied'):
    shutil.rmtree(folder / str(step))
  if kind == 'emptied':
    (folder / str(step)).mkdir()
  if kind == 'part':
    shutil.rmtree(folder / str(step) / chance.choice(
        ['meta', 'params', 'rest']))
  if kind == 'renamed':
    (folder / str(step)).rename(folder / str(step + chance.randint(1, 40)))
  if kind == 'stray':
    name = chance.choice(['35', '59', '999', '007', 'x', '-1', '40.tmp'])
    (folder / name).mkdir()
    return finish(workdir, steps, known)
  return finish(workdir, [s for s in steps if s != step], known)


def unreadable(workdir, chance, known):
  """An I/O error: the start stops, and goes on when the disk answers."""
  steps = bench.numbered(workdir)
  step = chance.choice([steps[-1], *steps])
  path = chance.choice(_files(workdir, step))
  content = path.read_bytes()
  path.unlink()
  path.symlink_to('/proc/self/mem')
  ended = bench.end(bench.start(workdir))
  told(ended)
  if (workdir / 'damaged').exists():
    raise Violated(f'{path} could not be read, and was called damaged')
  if ended.code:
    if 'Input/output error' not in ended.line:
      raise Violated(f'not told that {path} cannot be read: {ended.line}')
    path.unlink()
    path.write_bytes(content)
  return finish(workdir, steps if ended.code else [], known)


def full(workdir, chance, known):
  """A disk that is full after some more bytes, and then is not."""
  spare = chance.randrange(0, 600_000)
  disk = workdir.with_name(workdir.name + '-disk')
  disk.mkdir()
  used = sum(map(len, bench.content(workdir).values())) + 600_000
  mounted = not subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', f'size={used + spare}', 'tmpfs', disk],
      capture_output=True).returncode
  try:
    workdir = shutil.copytree(workdir, disk / 'run')
    process = bench.start(workdir)
    if running(process, chance):
      _fill(disk / 'filler', mounted, process)
    ended = bench.end(process)
    told(ended)
    if ended.code and 'space' not in ended.line and 'large' not in ended.line:
      raise Violated(f'not told that the disk is full: {ended.line}')
    (disk / 'filler').unlink(missing_ok=True)
    if not bench.numbered(workdir):
      raise Violated('a full disk left no checkpoint')
    return finish(workdir, bench.numbered(workdir), known, reason='No space')
  finally:
    if mounted:
      subprocess.run(['umount', '-l', disk], check=True)


def _fill(path, mounted, process):
  """Fills a small disk, or lets a process write no more large files."""
  if not mounted:
    import resource
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    return
  with open(path, 'wb', buffering=0) as file:
    try:
      while True:
        file.write(bytes(1024))
    except OSError as error:
      assert error.errno == errno.ENOSPC


def raced(workdir, chance, known):
  """Several at once in one workdir: one goes on, the others say who."""
  steps, processes = bench.numbered(workdir), []
  for _ in range(chance.randint(2, 3)):
    processes.append(bench.start(workdir))
    time.sleep(chance.choice([0, 0, chance.random() * 2]))
  ended = [bench.end(process) for process in processes]
  for one in ended:
    told(one)
    if one.code and 'in use by process' not in one.line:
      raise Violated(f'not told who has the workdir: {one.line}')
  if all(one.code for one in ended):
    raise Violated('none of them finished')
  return finish(workdir, [s for s in steps if s in bench.numbered(workdir)],
                known)


def mutated(workdir, chance, known):
  """Flags of another run: refused in one line, and nothing is changed."""
  before = bench.content(workdir)
  ended = bench.end(bench.start(workdir, *chance.choice(OTHERS).split()))
  told(ended, codes=(1,))
  after = bench.content(workdir)
  if {k: v for k, v in after.items() if k.name != 'lock'} != {
      k: v for k, v in before.items() if k.name != 'lock'}:
    raise Violated('the workdir has changed')
  return finish(workdir, bench.numbered(workdir), known)


def diverged(workdir, chance, known):
  """A learning rate that breaks the model, saved at every step."""
  steps = bench.numbered(workdir)
  ended = bench.end(bench.start(
      workdir, '--learning_rate=1e30', '--warmup_iters=0', '--grad_clip=0',
      '--lr_schedule=constant', '--checkpoint_interval=1',
      *chance.choice([(), ('--nan_policy=skip', '--nan_patience=4')])))
  told(ended, codes=(1,))
  if bench.numbered(workdir)[-1] != steps[-1]:
    raise Violated(f'the newest is {bench.numbered(workdir)}: {ended.line}')
  return finish(workdir, steps[-1:], known)


def metrics_spoilt(workdir, chance, known):
  """metrics.jsonl or config.json cut, filled with noise, or gone."""
  path = workdir / chance.choice(['metrics.jsonl', 'config.json'])
  if chance.random() < 0.4:
    with open(path, 'ab') as file:
      file.write(chance.choice([b'7\n', b'{"st', b'[]\n', b'null', b'\0' * 99]))
  else:
    _damage(path, chance)
    if path.is_dir():
      path.rmdir()
  return finish(workdir, bench.numbered(workdir), known, rows=False)


def read(workdir, chance, known):
  """Evaluated or sampled, perhaps while it trains: nothing is changed."""
  trains = bench.start(workdir) if chance.random() < 0.5 else None
  if trains:
    running(trains, chance)
  before = bench.content(workdir) if not trains else None
  ended = bench.end(bench.start(
      workdir, f'--mode={chance.choice(["eval", "sample"])}'))
  told(ended, codes=(0,))
  if trains:
    told(bench.end(trains), codes=(0,))
  elif bench.content(workdir) != before:
    raise Violated('reading has changed the workdir')
  return finish(workdir, bench.numbered(workdir), known)


def deleted(workdir, chance, known):
  """The workdir goes away while it runs: one line, exit code 1."""
  process = bench.start(workdir)
  running(process, chance)
  away = workdir.with_name(workdir.name + '-away')
  workdir.rename(away)
  ended = bench.end(process)
  told(ended)
  if ended.code == 0 and workdir.exists():
    raise Violated('the run ended well in a folder that was taken away')
  shutil.rmtree(workdir, ignore_errors=True)
  away.rename(workdir)
  return finish(workdir, bench.numbered(workdir), known)


EVENTS = (killed, killed_at_any_time, stopped, flipped, cut, power_cut, folders,
          unreadable, full, raced, mutated, diverged, metrics_spoilt, read,
          deleted)


def happen(event, seed, known):
  """Lets an event happen to a copy; what came of it, or raises Violated."""
  workdir = known.copy(f'{event.__name__}-{seed}')
  result = event(workdir, random.Random(f'{event.__name__} {seed}'), known)
  for path in known.folder.glob(f'{workdir.name}*'):
    shutil.rmtree(path)
  return result
