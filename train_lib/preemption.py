"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import os
import signal
import socket
import threading

import jax
from jax.experimental import multihost_utils


class Stopped(KeyboardInterrupt):
  """A signal ended the run, which is saved; the message says how to go on."""


class Preemption:
  """While entered, the first signal asks for a stop, a second one leaves.

  One process has its own handler. Several ask JAX, whose preemption service
  agrees on one step for all of them; every process must ask at every step.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.asked = False
    self._before, self._sockets, self._outer = {}, None, -1

  def ask(self):
    """Asks for a stop, as a signal does."""
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the others.
    self.asked = True

  def requested(self, step):
    """Whether to stop after `step`."""
    if jax.process_count() > 1:
      self.asked = multihost_utils.reached_preemption_sync_point(step)
    return self.asked

  def _handle(self, number, frame):
    # Python runs this once for all the signals that came while it waited for
    # a step, but writes a byte for each of them.
    came = self._sockets[0].recv(4096)
    if self.asked or sum(n in self.SIGNALS for n in came) > 1:
      self._restore()
      os.kill(os.getpid(), number)
    self.asked = True

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __enter__(self):
    main = threading.current_thread() is threading.main_thread()
    if main and jax.process_count() == 1:
      self._sockets = socket.socketpair()
      self._sockets[1].setblocking(False)
      self._outer = signal.set_wakeup_fd(
          self._sockets[1].fileno(), warn_on_full_buffer=False)
      self._before = {
          n: signal.signal(n, self._handle) for n in self.SIGNALS}
    return self

  def __exit__(self, *error):
    self._restore()
    if self._sockets:
      signal.set_wakeup_fd(self._outer)
      for end in self._sockets:
        end.close()
