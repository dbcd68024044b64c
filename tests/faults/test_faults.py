"""The fault suite: a few of its events in every run of the tests."""

import pytest

from tests.faults import bench, events

FAST = (events.stopped, events.cut)


@pytest.fixture(scope='module')
def known(tmp_path_factory):
  return bench.Bench(tmp_path_factory.mktemp('faults'))


@pytest.mark.parametrize(
    'event', [e if e in FAST else pytest.param(e, marks=pytest.mark.slow)
              for e in events.EVENTS], ids=lambda e: e.__name__)
def test_nothing_good_is_lost(event, known):
  events.happen(event, 0, known)


@pytest.mark.slow
@pytest.mark.parametrize('event', events.EVENTS, ids=lambda e: e.__name__)
def test_nothing_good_is_lost_by_chance(event, known):
  """Once more; `python -m tests.faults` goes on for as long as is wanted."""
  events.happen(event, 1, known)
