"""Trains, evaluates or samples a language model: python main.py --help."""

import io
import os
import signal
import sys

from absl import app, logging
from absl import flags as absl_flags

from train_lib import cpu

STOPPED = 75  # sysexits.h: a temporary failure, try the same command again.


def parse(argv):
  """The config of a command line; what is left goes to absl."""
  from configs import flags, help
  try:
    if (topic := help.asked(argv[1:])) is not None:
      print(help.text(topic))
      sys.exit(0)
    config, _, rest = flags.parse(argv[1:], others=absl_flags.FLAGS)
  except ValueError as error:
    sys.exit(f'error: {error}')
  absl_flags.FLAGS(argv[:1] + rest)
  if not absl_flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.FATAL)  # Orbax has a lot to tell.
  return config


def main(config):
  # Imported after the flags, so that a typing error is told at once.
  from train_lib import distributed, inference, report_page, sweep, trainer
  try:
    distributed.join(config.distributed)
    {'train': trainer.train, 'eval': inference.evaluate_run,
     'sample': inference.sample_run, 'sweep': sweep.sweep,
     'report': report_page.report}[config.mode](config)
  except (OSError, ValueError, NotImplementedError, ImportError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  if isinstance(sys.stdout, io.TextIOWrapper):  # As stderr has it.
    sys.stdout.reconfigure(errors='backslashreplace')
  cpu.keep_memory()  # NumPy and JAX, not imported yet, start threads.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  sys.unraisablehook = lambda _: None  # Pages, of Orbax's threads that fail.
  try:
    app.run(main, flags_parser=parse)
  except KeyboardInterrupt as stop:
    print(str(stop) or 'stopped by a signal', file=sys.stderr, flush=True)
    sys.exit(STOPPED)
  except SystemExit as end:
    if not isinstance(end.code, str):
      raise
    print(end.code, file=sys.stderr, flush=True)
    os._exit(1)  # At once: threads may wait for a disk or another process.
