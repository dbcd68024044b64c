"""--sweep_slurm: a sweep by array jobs of Slurm, through submitit.

Each job has the same command and a shard of the runs. It becomes main.py, so
that Slurm's signals and the exit code are those of any run.
"""

import dataclasses
import os

from attention.common import options
from attention.common.options import option
from train_lib import workers

FOLDER = 'slurm'  # The jobs' flags, their files of submitit's, what they print.
CLUSTER = 'slurm'
WARNED = 90  # Seconds before the time limit, in which a run is saved.


@dataclasses.dataclass(frozen=True)
class Job(options.Flags):
  """What Slurm is asked for: --sweep_slurm_args. Names are those of sbatch."""
  time: int = option(60, 'minutes', at_least=1)
  partition: str | None = option(None, 'partition')
  account: str | None = option(None, 'account')
  qos: str | None = option(None, 'quality of service')
  constraint: str | None = option(None, 'features that a node must have')
  exclude: str | None = option(None, 'nodes that are not to be used')
  gres: str | None = option(None, 'generic resources')
  mem: float | None = option(None, 'GB a node', above=0)
  cpus_per_task: int | None = option(None, 'cores', at_least=1)
  gpus_per_node: int | None = option(None, 'GPUs', at_least=0)
  array_parallelism: int | None = option(
      None, 'jobs that run at a time', at_least=1)

  def parameters(self, name):
    """The same for submitit, which has names of its own for some."""
    general = {'time': 'timeout_min', 'mem': 'mem_gb'}
    # So that a run is told in time, by the signal that it knows, and begins
    # again when Slurm takes the node for another job.
    more = {'signal': f'TERM@{WARNED}', 'requeue': True}
    return {'name': name, 'slurm_additional_parameters': more, **{
        general.get(flag, f'slurm_{flag}'): value
        for flag, value in dataclasses.asdict(self).items()
        if value is not None}}


def check(config, points):
  """ValueError for flags of jobs that do not fit the points of the sweep."""
  jobs, shard = config.sweep_slurm, config.sweep_shard
  if config.sweep_slurm_args and not jobs:
    raise ValueError('sweep_slurm_args has no effect without sweep_slurm: set '
                     'both or neither')
  if jobs and shard:
    raise ValueError(f'sweep_shard={shard} contradicts sweep_slurm, which gives'
                     ' a shard to each job: drop one of them')
  if jobs > len(points):
    raise ValueError(f'sweep_slurm ({jobs}) must be at most {len(points)}, the '
                     'runs that there are')
  _job(config.sweep_slurm_args)


def submit(config, root):
  """Submits the jobs and returns; prints their ids and how to look at them.

  Args:
    config: of the sweep, checked; its workdir is not looked at.
    root: the sweep's folder, on a disk that the nodes share.

  Raises:
    ValueError: one line on why no job could be submitted.
    ImportError: submitit is missing.
  """
  jobs, job = config.sweep_slurm, _job(config.sweep_slurm_args)
  submitit = _library()
  folder = root / FOLDER
  flags = folder / 'flags.json'
  workers.write_flags(flags, config, root, sweep_slurm=0, sweep_slurm_args=None)
  try:
    executor = submitit.AutoExecutor(folder=folder, cluster=CLUSTER)
    executor.update_parameters(**job.parameters(root.name))
    with executor.batch():
      submitted = [executor.submit(os.execv, command[0], command)
                   for command in (
                       workers.command(flags, f'--sweep_shard={i}/{jobs}')
                       for i in range(1, jobs + 1))]
  except RuntimeError as error:
    reason = ' '.join(str(error).split())
    raise ValueError(f'--sweep_slurm: no job could be submitted ({reason}): '
                     'give the command where sbatch works') from None
  print(f'{jobs} jobs submitted: ' + ' '.join(job.job_id for job in submitted))
  print(f'how far they are:  python main.py --config={flags} --dry_run\n'
        f'what they print:   {folder}/*_log.out\n'
        f'afterwards:        python main.py --mode=report --workdir={root}',
        flush=True)


def _job(text):
  """The Job that --sweep_slurm_args asks for."""
  fields = {field.name: field for field in dataclasses.fields(Job)}
  return Job(**options.read_pairs(
      text or '', fields, unknown='sweep_slurm_args: Slurm is not asked for',
      where=f'sweep_slurm_args={text}'))


def _library():
  try:
    import submitit  # Of no use on most machines.
  except ImportError:
    raise ImportError('--sweep_slurm needs submitit: pip install -e ".[slurm]"'
                      ', or start array jobs with --sweep_shard') from None
  return submitit
