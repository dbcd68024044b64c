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

import jax

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
  """The loss is not finite; the message says what to do."""


class Logger:
  """Shows metrics, and writes them to metrics.jsonl, TensorBoard and wandb."""

  def __init__(self, config, workdir):
    self.history = []
    self.config, self.workdir = config, pathlib.Path(workdir)
    self.chief = jax.process_index() == 0
    self._file = self._board = self._wandb = self._bar = None
    if self.chief:  # Before anything is compiled: a package may be missing.
      self._packages = {
          flag: _import(package, flag) for flag, package in (
              ('tensorboard', 'tensorboardX'), ('wandb', 'wandb'))
          if config[flag]}

  def begin(self, first):
    """Opens the files at the step that the run starts from."""
    if not self.chief:
      return
    path = self.workdir / 'metrics.jsonl'
    _truncate(path, first)
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
    row = {'step': step, **values}
    self.history.append(row)
    if not self.chief:
      return
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
        end.close()
    if self._wandb:
      self._wandb.finish()


class Meter:
  """Reads what the steps report, one step late, and logs it now and then."""

  def __init__(self, run, log, first):
    self.config, self.log, self.workdir = run.config, log, run.workdir
    self.tokens = run.config.batch_size * run.config.block_size
    self.flops = self.tokens * run.flops_per_token() / jax.device_count()
    self.step, self.losses = first, []
    self.pending = self.ended = None
    self.skipped, self.start = 0, time.perf_counter()

  def add(self, values):
    """Takes the metrics of the step just dispatched."""
    self.flush()
    self.step, self.pending = self.step + 1, values
    # A program on a CPU may have run while it was dispatched.
    ready = values['loss'].is_ready()
    self.ended = time.perf_counter() if ready else None

  def flush(self):
    """Reads the metrics that are pending; Diverged if they are not finite."""
    if self.pending is None:
      return
    values = {n: x.item() for n, x in jax.device_get(self.pending).items()}
    self.pending, ended = None, self.ended or time.perf_counter()
    finite = math.isfinite(values['loss']) and math.isfinite(
        values['grad_norm'])
    if finite:
      self.losses.append(values['loss'])
    elif self.config.nan_policy == 'stop':
      raise Diverged(self._advice(values))
    if self.step % self.config.log_interval == 0 and self.losses:
      self._report(values, ended)

  def _report(self, values, ended):
    steps = self.config.log_interval
    rate = max(ended - self.start, 1e-9) / steps
    row = {'loss': sum(self.losses) / len(self.losses),
           'grad_norm': values['grad_norm'],
           'learning_rate': values['learning_rate'],
           'ms_per_step': 1e3 * rate, 'tokens_per_s': self.tokens / rate}
    peak = peak_flops()
    if peak:
      row['mfu'] = self.flops / rate / peak
    if values['skipped']:
      row['skipped'] = values['skipped']
    self.log.write(self.step, row)
    self.log.progress(self.step, row['loss'], row['tokens_per_s'])
    self.losses, self.start = [], ended

  @contextlib.contextmanager
  def pause(self):
    """Leaves the time spent inside out of the rates."""
    self.flush()
    before = time.perf_counter()
    yield
    self.start += time.perf_counter() - before

  def _advice(self, values):
    saved = sorted(int(p.name) for p in (self.workdir / 'checkpoints').iterdir()
                   if p.name.isdigit())
    where = f'step {saved[-1]}' if saved else 'none yet'
    return (f'step {self.step}: loss {values["loss"]}, gradient norm '
            f'{values["grad_norm"]}; last good checkpoint: {where}. Try a '
            'lower --learning_rate, longer --warmup_iters, --grad_clip=1, or '
            '--nan_policy=skip')


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


def _truncate(path, step):
  """Drops the rows after the step that a run resumes from."""
  if path.exists():
    rows = [r for r in path.read_text().splitlines() if _step_of(r) <= step]
    path.write_text(''.join(row + '\n' for row in rows))


def _step_of(row):
  try:
    return json.loads(row)['step']
  except (json.JSONDecodeError, KeyError):  # Cut off by a kill.
    return float('inf')


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


def columns():
  """Of the terminal that is printed to, or None where it is none."""
  return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


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
