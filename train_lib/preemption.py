"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import signal
import threading

import jax


class Preemption:
  """While entered, the first signal asks for a stop, a second one leaves.

  One process has its own handler. Several ask JAX, whose preemption service
  agrees on one step for all of them; every process must ask at every step.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.asked = False
    self._before = {}

  def requested(self, store, step):
    """Whether to stop after `step`."""
    if jax.process_count() > 1 and store.manager.reached_preemption(step):
      self.asked = True
    return self.asked

  def _handle(self, number, frame):
    self.asked = True
    self._restore()

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __enter__(self):
    main = threading.current_thread() is threading.main_thread()
    if main and jax.process_count() == 1:
      self._before = {
          n: signal.signal(n, self._handle) for n in self.SIGNALS}
    return self

  def __exit__(self, *error):
    self._restore()
