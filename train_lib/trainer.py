"""The training loop."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import optax

from attention.kernels import dispatch
from model.sharding import mesh_size
from train_lib import (
    checkpoints,
    cpu,
    goal,
    kernel_check,
    loss,
    metrics,
    optim,
    record,
    report,
)
from train_lib import lock as lock_lib
from train_lib import run as run_lib
from train_lib.evaluate import Evaluator
from train_lib.preemption import Preemption, Stopped
from train_lib.state import TrainState


def make_step(run):
  """Returns (state, batch, Run.constants) -> (state, metrics): one step.

  Rows are split over gradient_accumulation_steps parts; the loss is the mean
  over all targets of the batch, so that the split changes nothing.
  """
  config, mesh = run.config, run.mesh
  parts = config.gradient_accumulation_steps
  shards = mesh_size(mesh, 'B')

  def part_loss(params, batch, key, count):
    module = run.model.merge(params)
    inputs, targets, ids = loss.targets_of(batch)
    hidden, _ = module.hidden(
        inputs, segment_ids=ids, dropout_key=key if config.dropout else None,
        mesh=mesh)
    sums = loss.cross_entropy(
        module, loss.at_targets(hidden, batch), targets, z_loss=config.z_loss,
        shards=shards)
    return sums.total / count, sums.plain / count

  def step(state, batch, constants):
    learning_rate = optim.schedule(config) if constants['rates'] is None else (
        constants['rates'].__getitem__)
    optimizer = optim.build(config, run.model, learning_rate)
    key = jax.random.fold_in(jax.random.key(constants['seed']), state.step)
    count = jnp.maximum((loss.targets_of(batch)[1] >= 0).sum(), 1)
    # Row r goes to part r % parts: every part lies over the whole mesh.
    batch = jax.tree.map(lambda x: jnp.moveaxis(
        x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def gradient(part, index):
      (_, plain), grads = jax.value_and_grad(part_loss, has_aux=True)(
          state.params, part, jax.random.fold_in(key, index), count)
      return plain, grads

    mean, grads = gradient(jax.tree.map(lambda x: x[0], batch), 0)
    if parts > 1:
      (mean, grads), _ = jax.lax.scan(
          lambda total, xs: (jax.tree.map(jnp.add, total, gradient(*xs)), None),
          (mean, grads),
          (jax.tree.map(lambda x: x[1:], batch), jnp.arange(1, parts)))
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params)
    after = TrainState(
        state.step + 1, optax.apply_updates(state.params, updates), opt_state,
        state.skipped)
    if config.nan_policy == 'skip':
      good = jnp.isfinite(mean) & jnp.isfinite(norm)
      kept = dataclasses.replace(
          state, step=after.step, skipped=state.skipped + 1)
      after = jax.tree.map(lambda a, b: jnp.where(good, a, b), after, kept)
    return after, {'loss': mean, 'grad_norm': norm, 'skipped': after.skipped,
                   'learning_rate': learning_rate(state.step)}

  shardings = jax.tree.map(lambda x: x.sharding, run.template)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None),
                 compiler_options=cpu.compiler_options(mesh.devices.flat[0]))


@kernel_check.proven
def train(config, workdir=None):
  """Trains, or goes on training, and returns the history of metrics.

  Args:
    config: a config of configs.default.get_config.
    workdir: folder of the run, config.workdir by default; a run that is
      there is resumed, bit for bit.

  Returns:
    A list of {'step': ..., name: value}; the last row has the final losses.

  Raises:
    ValueError: one line on what does not fit, before anything is computed.
    metrics.Diverged: the loss became infinite or no number.
    preemption.Stopped: a signal came; the run is saved.
    OSError: something could not be read or written.
  """
  run = run_lib.open_run(config, workdir)
  evaluator = Evaluator(run)
  aim = goal.parse(run.config, run.dataset)
  with (lock_lib.Lock(run.workdir) as lock,
        checkpoints.Checkpoints(run.workdir) as store,
        metrics.Logger(run.config, run.workdir) as log,
        metrics.Profiler(run.config, run.workdir) as profiler):
    state, first, meta = run_lib.restore(run, store)
    run_lib.write_config(run)
    with dispatch.record() as choices:
      step = make_step(run).lower(state, run.batch(first), run.constants)
    record.begin(run, choices)
    log.say(report.header(run, first, choices, meta))
    started = time.perf_counter()
    step = step.compile()
    log.say(report.compiled(step, time.perf_counter() - started))
    sums = meta['meter'] if meta else metrics.NO_SUMS
    log.begin(first, tokens=sums['tokens'], elapsed=sums['elapsed'])
    meter = metrics.Meter(run, log, first, sums)
    with Preemption() as preemption:
      try:
        if not goal.met(run.config, meta):
          state = _loop(
              run, step, state, first, aim=aim, evaluator=evaluator,
              store=store, lock=lock, log=log, meter=meter, profiler=profiler,
              preemption=preemption)
        store.wait()
      except metrics.Diverged as error:
        raise _without_broken(error, store) from None
    lock.check()
    if log.failed:
      raise log.failed
    if preemption.asked:
      raise Stopped(_stopped(run, store))
    report.finish(run, state, evaluator=evaluator, log=log)
    if log.failed:
      raise log.failed
    record.finish(run, state)
  return log.history


def _loop(run, step, state, first, *, aim, evaluator, store, lock, log, meter,
          profiler, preemption):
  """Runs steps [first, max_iters), or until the Goal: never waited for."""
  config = run.config
  save_every = config.checkpoint_interval
  save_every = config.eval_interval if save_every is None else save_every
  for index in range(first, config.max_iters):
    profiler.before(index)
    state, values = step(state, run.batch(index), run.constants)
    meter.add(values)  # The host reads the step before.
    store.check()
    done, last = index + 1, index + 1 == config.max_iters
    val_loss = ended = None
    if config.eval_interval and (due(done, config.eval_interval) or last):
      with meter.pause():
        columns = evaluator.columns(state.params)
        val_loss = columns['val_loss']
        log.write(done, columns)
        if aim and not last and aim.reached(columns, meter.sums()):
          log.say(f'step {done:,}: {aim.text}, as stop_when asks for')
          last, ended = True, aim.text
    if last:
      _try_last(run, state, val_loss, evaluator=evaluator, meter=meter)
    if log.failed:
      preemption.ask()
    stop = preemption.requested(done)
    if stop or last or due(done, save_every):
      with meter.pause():  # A loss that is not finite ends here, unsaved.
        if not meter.skipping:
          lock.check()
          store.save(done, state, val_loss=val_loss,
                     meta={**run.meta(), 'meter': meter.sums(),
                           'stopped_when': ended})
    if stop or last:
      break
  return state


def _try_last(run, state, val_loss, *, evaluator, meter):
  """Diverged unless the last update, that no step follows, gives a loss."""
  with meter.pause():
    if val_loss is None:
      val_loss = evaluator.loss(state.params, run.batch(run.config.max_iters))
    if meter.skipping:
      meter.diverged('it was skipped')
    if not math.isfinite(val_loss):
      meter.diverged(f'the loss after it is {val_loss}')


def _without_broken(error, store):
  """The Diverged that says what is left, without the update that broke it."""
  newest = store.withdraw(error.broken)
  left = 'no checkpoint is left: the next start begins anew' if (
      newest is None) else f'the newest checkpoint is now that of step {newest}'
  return metrics.Diverged(f'{error}. {left.capitalize()}', error.broken)


def _stopped(run, store):
  saved = store.steps()
  where = f'goes on from step {saved[-1]}' if saved else 'begins anew'
  return (f'stopped by a signal; the same command with --workdir='
          f'{run.workdir} {where}')


def due(step, interval):
  """Whether something done every `interval` steps (0: never) is due."""
  return interval > 0 and step % interval == 0
