"""A signal asks once; the next one is the process's own again."""

import hashlib
import os
import signal
import threading
import time

import pytest

from train_lib.preemption import Preemption


@pytest.mark.parametrize('number', Preemption.SIGNALS)
def test_the_first_signal_asks_and_the_second_leaves(number):
  seen, before = [], signal.getsignal(number)
  signal.signal(number, lambda *_: seen.append(number))
  try:
    with Preemption() as preemption:
      assert not preemption.requested(1)
      os.kill(os.getpid(), number)
      assert preemption.requested(2) and not seen
      os.kill(os.getpid(), number)
      assert seen == [number]
  finally:
    signal.signal(number, before)


def test_two_signals_during_one_call_are_two():
  """Python runs a handler once for all that came while it was elsewhere."""
  def send():
    for _ in range(2):
      time.sleep(0.1)
      os.kill(os.getpid(), signal.SIGINT)
  with pytest.raises(KeyboardInterrupt), Preemption():
    thread = threading.Thread(target=send)
    thread.start()
    hashlib.pbkdf2_hmac('sha256', b'', b'', 3_000_000)  # Holds the main thread.
    thread.join()


def test_the_run_itself_may_ask():
  with Preemption() as preemption:
    preemption.ask()
    assert preemption.requested(1)


def test_handlers_are_put_back():
  before = [signal.getsignal(number) for number in Preemption.SIGNALS]
  wakeup = signal.set_wakeup_fd(-1)
  with Preemption():
    assert signal.getsignal(signal.SIGTERM) not in before
  assert [signal.getsignal(n) for n in Preemption.SIGNALS] == before
  assert signal.set_wakeup_fd(wakeup) == wakeup


def test_a_thread_may_train_too():
  """Only the main thread can set handlers."""
  asked = []

  def train():
    with Preemption() as preemption:
      asked.append(preemption.requested(1))
  thread = threading.Thread(target=train)
  thread.start()
  thread.join()
  assert asked == [False]
