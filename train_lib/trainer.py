"""The training loop."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import optax

from attention.kernels import dispatch
from model.sharding import mesh_size
from train_lib import (
    checkpoints,
    cpu,
    kernel_check,
    loss,
    metrics,
    optim,
    report,
)
from train_lib import run as run_lib
from train_lib.evaluate import Evaluator
from train_lib.preemption import Preemption
from train_lib.state import TrainState


def make_step(run):
  """Returns (state, batch) -> (state, metrics): one optimiser step.

  Rows are split over gradient_accumulation_steps parts; the loss is the mean
  over all targets of the batch, so that the split changes nothing.
  """
  config, mesh = run.config, run.mesh
  parts = config.gradient_accumulation_steps
  shards, learning_rate = mesh_size(mesh, 'B'), optim.schedule(config)

  def part_loss(params, batch, key, count):
    module = run.model.merge(params)
    inputs, targets, ids = loss.targets_of(batch)
    hidden, _ = module.hidden(
        inputs, segment_ids=ids, dropout_key=key if config.dropout else None,
        mesh=mesh)
    total, plain, _ = loss.cross_entropy(
        module, hidden, targets, z_loss=config.z_loss, shards=shards)
    return total / count, plain / count

  def step(state, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
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
    updates, opt_state = run.optimizer.update(
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
  """
  run = run_lib.open_run(config, workdir)
  evaluator = Evaluator(run)
  with (checkpoints.Checkpoints(run.workdir) as store,
        metrics.Logger(run.config, run.workdir) as log,
        metrics.Profiler(run.config, run.workdir) as profiler,
        Preemption() as preemption):
    state, first, meta = run_lib.restore(run, store)
    run_lib.write_config(run)
    with dispatch.record() as choices:
      step = make_step(run).lower(state, run.batch(first))
    log.say(report.header(run, first, choices, meta))
    started = time.perf_counter()
    step = step.compile()
    log.say(report.compiled(step, time.perf_counter() - started))
    log.begin(first)
    state = _loop(
        run, step, state, first, evaluator=evaluator, store=store, log=log,
        profiler=profiler, preemption=preemption)
    store.wait()
    if preemption.asked:
      log.say(f'stopped; the same command with --workdir={run.workdir} goes '
              'on from the last checkpoint')
    else:
      report.finish(run, state, evaluator=evaluator, log=log)
  return log.history


def _loop(run, step, state, first, *, evaluator, store, log, profiler,
          preemption):
  """Runs steps [first, max_iters): dispatched, never waited for."""
  config, meter = run.config, metrics.Meter(run, log, first)
  val_loss = float('inf')
  save_every = config.checkpoint_interval
  save_every = config.eval_interval if save_every is None else save_every
  for index in range(first, config.max_iters):
    profiler.before(index)
    state, values = step(state, run.batch(index))
    meter.add(values)  # The host reads the step before.
    done, last = index + 1, index + 1 == config.max_iters
    if due(done, config.eval_interval) or last:
      with meter.pause():
        val_loss = evaluator.quick(state.params)
        log.write(done, {'val_loss': val_loss})
    stop = preemption.requested(store, done)
    if stop or last or due(done, save_every):
      with meter.pause():  # A loss that is not finite ends here, unsaved.
        store.save(done, state, meta=run.meta(), val_loss=val_loss)
    if stop:
      break
  return state


def due(step, interval):
  """Whether something done every `interval` steps (0: never) is due."""
  return interval > 0 and step % interval == 0
