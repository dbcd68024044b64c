"""What a run tells: a header, lines or a progress bar, files, a table."""

import contextlib
import itertools
import json
import math
import pathlib
import shutil
import sys
import textwrap
import time
import types

import jax

from train_lib import disk

# Peak dense bfloat16 FLOP/s of one device, from the makers' data sheets.
PEAK_FLOPS = {
    'TPU v3': 61.5e12, 'TPU v4': 275e12, 'TPU v5 lite': 197e12,
    'TPU v5e': 197e12, 'TPU v5p': 459e12, 'TPU v5': 459e12,
    'TPU v6 lite': 918e12, 'TPU v6e': 918e12, 'TPU7x': 1154e12,
    'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12,
    'NVIDIA L4': 121e12, 'NVIDIA B200': 2250e12,
}


def peak_flops():
  """Of one of the devices here, or None where it is not known."""
  kind = jax.devices()[0].device_kind
  known = [name for name in PEAK_FLOPS if kind.startswith(name)]
  return PEAK_FLOPS[max(known, key=len)] if known else None


class Diverged(ValueError):
  """The loss is not finite; the message says what to do.

  Attributes:
    broken: the state after this step is what gave that loss.
  """

  def __init__(self, message, broken):
    super().__init__(message)
    self.broken = broken


class Logger:
  """Shows metrics, and writes them to metrics.jsonl, TensorBoard and wandb.

  docs/running.md says what the columns are.

  Attributes:
    history: the rows of this process.
    tokens: trained on since step 0.
    failed: the OSError of a row that could not be written, or None. The run
      is to be saved before anything is made of it.
  """

  def __init__(self, config, workdir):
    self.history, self.failed = [], None
    self.config, self.workdir = config, pathlib.Path(workdir)
    self.chief = jax.process_index() == 0
    self.tokens, self._start = 0, time.perf_counter()
    self._file = self._board = self._wandb = self._bar = None
    if self.chief:  # Before anything is compiled: a package may be missing.
      self._packages = {
          flag: _import(package, flag) for flag, package in (
              ('tensorboard', 'tensorboardX'), ('wandb', 'wandb'))
          if config[flag]}

  def elapsed(self):
    """Seconds of training since step 0, over all parts of the run."""
    return time.perf_counter() - self._start

  def begin(self, first, *, tokens=0, elapsed=0.0):
    """Opens the files at the step that the run starts from.

    Args:
      first: the step.
      tokens: trained on before it.
      elapsed: seconds spent before it.
    """
    self.tokens, self._start = tokens, time.perf_counter() - elapsed
    if not self.chief:
      return
    path = self.workdir / 'metrics.jsonl'
    later, foreign = _rewind(path, first)
    if later:
      self.say(f'{path}: {later} rows after step {first} will be written anew')
    if foreign:
      self.say(f'{path}: {foreign} rows were cut off or no metrics, and are '
               'left out')
    self._file = path.open('a')
    if self.config.tensorboard:
      self._board = self._packages['tensorboard'].SummaryWriter(
          str(self.workdir), purge_step=first)
    if self.config.wandb:
      config, name = self.config, self.workdir.name
      self._wandb = self._packages['wandb'].init(
          project=config.wandb, name=config.wandb_name or name,
          group=config.wandb_group, notes=config.wandb_notes,
          config=config.to_dict(), dir=str(self.workdir), id=name,
          resume='allow')
    if sys.stderr.isatty() or 'ipykernel' in sys.modules:
      from tqdm.auto import tqdm
      self._bar = tqdm(total=self.config.max_iters, initial=first,
                       unit='step', dynamic_ncols=True)

  def write(self, step, values):
    """Records {name: number} of a step, and shows it."""
    row = {'step': step, **values, 'tokens': self.tokens,
           'elapsed_s': round(self.elapsed(), 3)}
    self.history.append(row)
    if not self.chief:
      return
    try:
      self._show(step, values, row)
    except OSError as error:  # A full disk, or nobody reads the output.
      self.failed = self.failed or OSError(
          f'the metrics of step {step} cannot be written in {self.workdir} '
          f'({error.strerror})')

  def _show(self, step, values, row):
    # JSON has no number that is not finite.
    row = {name: value if math.isfinite(value) else None
           for name, value in row.items()}
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for name, value in values.items():
      if self._board:
        self._board.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(values, step=step)
    self.say(fitted([f'step {step:>6}', *(
        f'{name} {short(value)}' for name, value in values.items())]))

  def progress(self, step, loss, rate):
    """Moves the progress bar, where there is one."""
    if self._bar is not None:
      self._bar.set_postfix_str(
          f'loss {loss:.4f}, {short(rate)} tokens/s', refresh=False)
      self._bar.update(step - self._bar.n)

  def say(self, text):
    """Prints a line, above the progress bar where there is one."""
    if not self.chief:
      return
    if self._bar is not None:
      self._bar.write(text)
    else:
      print(text, flush=True)

  def close_bar(self):
    """Leaves the progress bar as it is: what is said next stays below it."""
    if self._bar is not None:
      self._bar.close()
      self._bar = None

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close_bar()
    for end in (self._file, self._board):
      if end is not None:
        with contextlib.suppress(OSError):  # Of a row that has failed.
          end.close()
    if self._wandb:
      self._wandb.finish()


# What Meter.sums is at step 0.
NO_SUMS = types.MappingProxyType(
    {'loss': 0.0, 'steps': 0, 'tokens': 0, 'elapsed': 0.0})


class Meter:
  """Reads what the steps report, one step late, and logs it now and then.

  Args:
    run: the Run.
    log: the Logger.
    first: the step that the run starts from.
    sums: what `sums` was at that step, so that the row after a resume is a
      mean over the same steps as that of a run that was never stopped.
  """

  def __init__(self, run, log, first, sums=NO_SUMS):
    self.config, self.log = run.config, log
    self.tokens = run.config.batch_size * run.config.block_size
    self.flops = self.tokens * run.flops_per_token() / jax.device_count()
    self.step, self.skipping = first, 0
    self.pending = self.ended = None
    self.loss, self.steps = sums['loss'], sums['steps']
    self.start = time.perf_counter()

  def sums(self):
    """What a checkpoint keeps of the rows, as JSON."""
    return {'loss': self.loss, 'steps': self.steps, 'tokens': self.log.tokens,
            'elapsed': self.log.elapsed()}

  def add(self, values):
    """Takes the metrics of the step just dispatched."""
    self.flush()
    self.step, self.pending = self.step + 1, values
    self.log.tokens += self.tokens
    # A program on a CPU may have run while it was dispatched.
    ready = values['loss'].is_ready()
    self.ended = time.perf_counter() if ready else None

  def flush(self):
    """Reads the metrics that are pending; Diverged if they are not finite."""
    if self.pending is None:
      return
    values = {n: x.item() for n, x in jax.device_get(self.pending).items()}
    self.pending, ended = None, self.ended or time.perf_counter()
    if math.isfinite(values['loss']) and math.isfinite(values['grad_norm']):
      self.loss, self.steps = self.loss + values['loss'], self.steps + 1
      self.skipping = 0
    else:
      self.skipping += 1
    if self.step % self.config.log_interval == 0:
      self._report(values, ended)
    skipped = self.config.nan_patience * (self.config.nan_policy == 'skip')
    if self.skipping and self.skipping >= skipped:
      self.diverged(f'loss {values["loss"]}, gradient norm '
                    f'{values["grad_norm"]}')

  def diverged(self, what):
    """Raises Diverged, for what was found with the state as it is."""
    many = self.skipping > 1
    raise Diverged(
        f'step {self.step}: {what}' + f', {self.skipping} steps in a row' * many
        + '; try a lower --learning_rate, longer --warmup_iters, --grad_clip=1'
        + ' or --nan_policy=skip' * (self.config.nan_policy == 'stop'),
        broken=self.step - self.skipping)

  def _report(self, values, ended):
    steps = self.config.log_interval
    rate = max(ended - self.start, 1e-9) / steps
    row = {'loss': self.loss / self.steps if self.steps else math.nan,
           'grad_norm': values['grad_norm'],
           'learning_rate': values['learning_rate'],
           'ms_per_step': 1e3 * rate, 'tokens_per_s': self.tokens / rate}
    peak = peak_flops()
    if peak:
      row['mfu'] = self.flops / rate / peak
    if self.config.nan_policy == 'skip':
      row['skipped'] = values['skipped']
    self.log.write(self.step, row)
    self.log.progress(self.step, row['loss'], row['tokens_per_s'])
    self.loss, self.steps, self.start = 0.0, 0, ended

  @contextlib.contextmanager
  def pause(self):
    """Leaves the time spent inside out of the rates."""
    self.flush()
    before = time.perf_counter()
    yield
    self.start += time.perf_counter() - before


class Profiler:
  """Writes the trace of the steps that --profile_steps names."""

  def __init__(self, config, workdir):
    steps = config.profile_steps
    self.first, self.last = map(int, steps) if steps else (None, None)
    self.workdir, self.running = workdir, False

  def before(self, step):
    """Called before every step."""
    if step == self.first:
      jax.profiler.start_trace(str(self.workdir))
      self.running = True
    if self.last is not None and step > self.last:
      self.__exit__()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self.running:
      jax.profiler.stop_trace()
    self.running = False


def _rewind(path, step):
  """Drops the rows after the step that a run resumes from.

  The file is replaced, not cut: a kill leaves the one or the other.

  Returns:
    How many rows these were, and how many more were no rows of metrics.
  """
  if not path.exists():
    return 0, 0
  content = path.read_bytes()
  rows = content.splitlines(keepends=True)
  steps = [_step_of(row) for row in rows]
  kept = [row for row, at in zip(rows, steps) if at is not None and at <= step]
  if len(kept) < len(rows):
    disk.write_whole(path, b''.join(kept))
  foreign = steps.count(None)
  return len(rows) - len(kept) - foreign, foreign


def _step_of(row):
  """The step of a row as written, with its end of line; else None."""
  try:
    step = json.loads(row)['step']
    return step if isinstance(step, int) and row.endswith(b'\n') else None
  except (ValueError, KeyError, TypeError, RecursionError):
    return None


def _import(module, flag):
  try:
    return __import__(module)
  except ImportError:
    raise ValueError(f'--{flag} needs the package {module}: '
                     'pip install -e ".[logging]"') from None


def short(value):
  """A number as people read it."""
  if isinstance(value, int):
    return f'{value:,}'
  return f'{value:.4g}' if value < 1000 else f'{value:,.0f}'


def columns(out=None):
  """Of the terminal that is printed to, or None where it is none."""
  out = out or sys.stdout
  return shutil.get_terminal_size().columns if out.isatty() else None


def fitted(parts):
  """As many parts, from the first one on, as fit a line of the terminal."""
  width = columns() or math.inf
  lengths = itertools.accumulate(2 + len(part) for part in parts)
  return '  '.join(part for part, end in zip(parts, lengths)
                   if end - 2 <= width) or parts[0]


def table(rows):
  """Text of aligned (name, value) pairs; a long value has several lines."""
  width, room = max(len(name) for name, _ in rows), columns()
  wrap = textwrap.TextWrapper(
      max(room - width - 4, 10) if room else sys.maxsize,
      break_on_hyphens=False, break_long_words=False)
  return '\n'.join(
      f'  {first:<{width}}  {line}' for name, value in rows
      for first, line in itertools.zip_longest(
          [name], wrap.wrap(value), fillvalue=''))


def columns_of(rows):
  """Text of aligned rows of cells, the first of them the names of columns.

  Numbers stand on the right.
  """
  rows = [[str(cell) for cell in row] for row in rows]
  widths = [max(map(len, cells)) for cells in zip(*rows)]
  right = [all(cell[:1].isdigit() for cell in cells[1:] if cell)
           for cells in zip(*rows)]
  return '\n'.join('  '.join(
      cell.rjust(width) if number else cell.ljust(width)
      for cell, width, number in zip(row, widths, right)).rstrip()
      for row in rows)
