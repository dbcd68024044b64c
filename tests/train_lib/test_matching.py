"""Sweeps whose runs all have as much of something as the first."""

import itertools

import pytest

import attention
from configs import default, grid
from train_lib import matching, run
from train_lib.state import AbstractModel

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture
def of(config):
  """Makes points of dicts of flags, as a sweep does."""
  def make(*dicts):
    points = []
    for number, given in enumerate(dicts, 1):
      own = config.copy_and_resolve_references()
      own.update(given)
      points.append(grid.Point(f'run{number}', own, given))
    return points
  return make


def has(point, tmp_path, what):
  opened = run.open_run(point.config, tmp_path)
  return matching.MEASURES[what][0](opened.model)


def variants(*names):
  return [{'attention_variant': name} for name in names]


def test_what_there_is_to_match():
  choices = default.fields()['match'].metadata['choices']
  assert set(choices) == {'none', *matching.MEASURES}


@pytest.mark.parametrize('what', ['params', 'flops'])
def test_runs_have_as_much_as_the_first(what, of, tmp_path, capsys):
  points = of(*variants('ssm', 'causal', 'linear'),
              {'attention_list': ('causal', 'ssm')})
  found = matching.matched(points, what)
  wanted, *others = [has(point, tmp_path, what) for point in found]
  assert has(points[1], tmp_path, what) != wanted
  # A step of the width is that much of every layer.
  config = points[0].config
  step = {'params': 2, 'flops': 12}[what] * config.n_embd * config.n_layer
  assert all(abs(other - wanted) <= step / 2 for other in others)
  out = capsys.readouterr().out.splitlines()
  assert len(out) == 4 and out[1].startswith('run2: mlp_width=')
  assert out[0].endswith(f'+0 {matching.MEASURES[what][1]} (+0.00%) beside the '
                         'first run')
  assert found[0].config.mlp_width is not None
  assert points[0].config.mlp_width is None


def test_unmatched_runs_are_left_as_they_are(of):
  points = of(*variants('ssm', 'causal'))
  assert matching.matched(points, 'none') is points


@pytest.mark.parametrize('what', ['params', 'flops'])
def test_a_width_of_its_own_contradicts(what, of):
  points = of({}, {'mlp_width': 8})
  with pytest.raises(ValueError, match='run2 sets it'):
    matching.matched(points, what)


@pytest.mark.parametrize('what', ['params', 'flops'])
def test_a_model_that_is_too_large_without_any_mlp(what, of):
  with pytest.raises(ValueError, match='run2 has more than') as error:
    matching.matched(of(*variants('linear', 'ssm')), what)
  assert '\n' not in str(error.value)


SCALED = [name for name in attention.names() if attention.state_flag(name)]


def test_a_flag_scales_the_state_of_nearly_every_variant():
  assert set(attention.names()) - {*SCALED} == {'hgrn2', 'identity', 'linear'}
  assert attention.state_flag('causal') == 'window_size'
  assert attention.state_flag('mla') == 'mla_latent_dim'


@pytest.mark.parametrize('name', SCALED)
def test_what_is_chosen_is_the_nearest_state(name, config, of, capsys):
  flag = attention.state_flag(name)
  assert default.fields()[flag].metadata['scales_state'] in ('width', 'tokens')
  config.attention_variant = name

  def amount(value):
    own = config.copy_and_resolve_references()
    own.update(vocab_size=256, **{flag: value})
    return AbstractModel(own).state_bytes()
  # Those that there are: the heads may have to divide them.
  values = {}
  for value in range(1, 9):
    try:
      values[value] = amount(value)
    except ValueError:
      continue
  amounts = list(values.values())
  assert len(amounts) >= 4
  steps = {b - a for a, b in itertools.pairwise(amounts)}
  assert len(steps) == 1 and min(steps) > 0  # Evenly, for `nearest`.
  wanted = amounts[2] + min(steps) // 3
  assert matching.nearest(amount, wanted) == list(values)[2]


def test_states_are_those_of_the_first_run(of, tmp_path, capsys):
  first = {'attention_variant': 'ssm', 'ssm_d_state': 6}
  points = of(first, *variants('causal', 'mamba2', 'linear'),
              {'attention_variant': 'gla', 'gla_key_width': 3},
              {**first, 'learning_rate': 0.5})
  found = matching.matched(points, 'state')
  wanted = has(points[0], tmp_path, 'state')
  states = [has(point, tmp_path, 'state') for point in found]
  assert states[0] == states[5] == wanted
  assert found[0].config == points[0].config
  assert found[1].config.window_size < points[1].config.block_size
  # Half of what another token, or another number a channel, would add.
  assert abs(states[1] - wanted) <= (2 * 16 * 4 + 4) * 2 / 2
  assert abs(states[2] - wanted) <= abs(has(
      points[2], tmp_path, 'state') - wanted)
  assert found[3].config == points[3].config
  assert found[4].config == points[4].config
  first, causal, _, linear, gla = capsys.readouterr().out.splitlines()
  assert first == ('run1: as it is, +0 bytes of decode state (+0.00%) beside '
                   'the first run')
  assert causal.startswith('run2: window_size=')
  assert 'run4: linear has no flag that scales its state, ' in linear
  assert 'run5: sets gla_key_width itself, ' in gla


def test_more_than_any_window_is_no_window(of):
  # A state that is larger than all tokens of the other one.
  points = of({'attention_variant': 'retention', 'retention_expand_v': 64},
              {'attention_variant': 'causal'})
  assert matching.matched(points, 'state')[1].config.window_size is None


def test_no_state_at_all(of, capsys):
  found = matching.matched(of(*variants('identity', 'ssm')), 'state')
  assert found[1].config.ssm_d_state == 1
  assert '%' not in capsys.readouterr().out


def test_a_state_that_its_flag_does_not_change(of, capsys):
  exact = {'attention_variant': 'co4', 'co4_mode': 'exact'}
  matching.matched(of({'attention_variant': 'ssm'}, exact), 'state')
  assert 'n_latent does not change its state' in capsys.readouterr().out


def test_layers_of_several_variants_have_no_one_flag(of):
  hybrid = {'attention_list': ('causal', 'ssm')}
  with pytest.raises(ValueError, match='run2 has layers of causal and of ssm'):
    matching.matched(of({'attention_variant': 'ssm'}, hybrid), 'state')
  first, second = matching.matched(
      of(hybrid, {'attention_variant': 'gla'}), 'state')
  assert second.config.gla_key_width is not None
  own = {'attention_list': ('ssm(ssm_d_state=8)', 'ssm')}
  assert matching.matched(
      of({}, own), 'state')[1].config.ssm_d_state == 16


def test_rows_are_as_long_as_the_task_has_them(config, tmp_path):
  config.dataset = 'task:mqar'
  points = [grid.Point(name, config.copy_and_resolve_references(), {})
            for name in ('ssm', 'causal')]
  for point in points:
    point.config.attention_variant = point.name
  found = matching.matched(points, 'flops')
  ssm, causal = [has(point, tmp_path, 'flops') for point in found]
  assert causal == pytest.approx(ssm, rel=0.02)


def test_the_nearest_integer():
  assert matching.nearest(lambda v: 10 * v, 34) == 3
  assert matching.nearest(lambda v: 10 * v, 36) == 4
  assert matching.nearest(lambda v: 10 * v, 1000, most=7) == 7
  assert matching.nearest(lambda v: 10 * v, -5) == 1
  assert matching.nearest(lambda v: 5, 5) is None

  def even(value):
    if value % 4:
      raise ValueError
    return value
  assert matching.nearest(even, 17) == 16
  assert matching.nearest(even, 19) == 20


def test_many_runs_of_a_shape_are_looked_at_once(of, monkeypatch):
  dicts = [{'attention_variant': name, 'n_layer': n}
           for name in ('ssm', 'causal', 'gla') for n in (2, 3)]
  made = []

  def count(config):
    made.append(config)
    return AbstractModel(config)
  monkeypatch.setattr(matching, 'AbstractModel', count)
  matching.matched(of(*dicts), 'state')
  few = len(made)
  matching.matched(of(*(given for given in dicts for _ in range(50))), 'state')
  # A model of each run would be 300 alone; a search takes a dozen or so.
  assert len(made) == 2 * few <= 2 * 20 * len(dicts)
