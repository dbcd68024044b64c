"""A signal asks once; the next one is the process's own again."""

import os
import signal
import threading

import pytest

from train_lib.preemption import Preemption


@pytest.mark.parametrize('number', Preemption.SIGNALS)
def test_the_first_signal_asks_and_the_second_leaves(number):
  seen, before = [], signal.getsignal(number)
  signal.signal(number, lambda *_: seen.append(number))
  try:
    with Preemption() as preemption:
      assert not preemption.requested(None, 1)
      os.kill(os.getpid(), number)
      assert preemption.requested(None, 2) and not seen
      os.kill(os.getpid(), number)
      assert seen == [number]
  finally:
    signal.signal(number, before)


def test_handlers_are_put_back():
  before = [signal.getsignal(number) for number in Preemption.SIGNALS]
  with Preemption():
    assert signal.getsignal(signal.SIGTERM) not in before
  assert [signal.getsignal(n) for n in Preemption.SIGNALS] == before


def test_a_thread_may_train_too():
  """Only the main thread can set handlers."""
  asked = []

  def train():
    with Preemption() as preemption:
      asked.append(preemption.requested(None, 1))
  thread = threading.Thread(target=train)
  thread.start()
  thread.join()
  assert asked == [False]
