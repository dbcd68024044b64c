"""Trains, evaluates or samples a language model: python main.py --help."""

import io
import sys

from absl import app, logging
from absl import flags as absl_flags

from train_lib import cpu


def parse(argv):
  """The config of a command line; what is left goes to absl."""
  from configs import flags
  try:
    if {'-h', '--help'} & set(argv):
      print(flags.describe())
      sys.exit(0)
    config, _, rest = flags.parse(argv[1:], others=absl_flags.FLAGS)
  except flags.FlagError as error:
    sys.exit(f'error: {error}')
  absl_flags.FLAGS(argv[:1] + rest)
  if not absl_flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.ERROR)  # Orbax has a lot to tell.
  return config


def main(config):
  # Imported after the flags, so that a typing error is told at once.
  from train_lib import distributed, inference, trainer
  try:
    distributed.join(config.distributed)
    {'train': trainer.train, 'eval': inference.evaluate_run,
     'sample': inference.sample_run}[config.mode](config)
  except (ValueError, NotImplementedError, ImportError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  if isinstance(sys.stdout, io.TextIOWrapper):  # As stderr has it.
    sys.stdout.reconfigure(errors='backslashreplace')
  cpu.keep_memory()  # NumPy and JAX, not imported yet, start threads.
  app.run(main, flags_parser=parse)
