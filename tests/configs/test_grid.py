"""What a sweep's file gives: dicts, names, shards, and lines on mistakes."""

import pathlib

import pytest

from configs import default, grid

ROOT = pathlib.Path(grid.__file__).parents[1]
SWEEPS = sorted((ROOT / 'sweeps').glob('*.py'))


def write(tmp_path, *yields):
  path = tmp_path / 'some.py'
  path.write_text('from configs.grid import product, zip_\n\ndef sweep():\n'
                  + ''.join(f'  yield from {text}\n' for text in yields))
  return path


def test_product_changes_the_last_flag_fastest():
  assert list(grid.product(a=[1, 2], b=['x', 'y'], c=3)) == [
      {'a': 1, 'b': 'x', 'c': 3}, {'a': 1, 'b': 'y', 'c': 3},
      {'a': 2, 'b': 'x', 'c': 3}, {'a': 2, 'b': 'y', 'c': 3}]


def test_a_tuple_is_one_value():
  assert list(grid.product(a=('x', 'y'))) == [{'a': ('x', 'y')}]


def test_zip_takes_values_together():
  assert list(grid.zip_(a=[1, 2], b=[3, 4], c=5)) == [
      {'a': 1, 'b': 3, 'c': 5}, {'a': 2, 'b': 4, 'c': 5}]
  with pytest.raises(ValueError, match='2 .a., 1 .b.'):
    list(grid.zip_(a=[1, 2], b=[3]))


def test_names_say_what_differs():
  dicts = [{'attention_variant': 'ssm', 'seed': 1, 'n_layer': 2},
           {'attention_list': ('causal(window_size=8)', 'ssm'), 'n_layer': 2}]
  assert grid.names(dicts) == ['ssm,seed=1', 'causal-window_size=8-ssm']


def test_a_long_name_is_cut_and_still_its_own():
  dicts = [{'prompt': 'x' * 200 + end} for end in 'ab']
  first, second = grid.names(dicts)
  assert len(first) == grid.LONGEST and first != second


def test_points_have_configs(tmp_path):
  base = default.get_config()
  base.update(mode='sweep', sweep='some.py', dry_run=True, n_embd=64)
  path = write(tmp_path, 'product(seed=[1, 2], n_layer=2)',
               '[dict(name="deep", n_layer=8)]')
  points = grid.load(path, base)
  assert [p.name for p in points] == ['seed=1', 'seed=2', 'deep']
  config = points[-1].config
  assert (config.n_layer, config.n_embd, config.mode) == (8, 64, 'train')
  assert config.sweep is None and not config.dry_run


def test_a_variant_wins_over_the_list_of_the_command_line(tmp_path):
  base = default.get_config()
  base.attention_list = ('causal',)
  point, = grid.load(write(tmp_path, '[dict(attention_variant="ssm")]'), base)
  assert point.config.attention_list is None


@pytest.mark.parametrize('yields, told', [
    ('[]', 'yields no run'),
    ('[dict(n_layr=2)]', 'unknown flag n_layr, did you mean n_layer'),
    ('[dict(n_layer="two")]', 'n_layer=.two. is not an integer'),
    ('[dict(n_layer=0)]', 'n_layer=0: n_layer .0. must be at least 1'),
    ('[dict(attention_variant="casual")]', 'did you mean causal'),
    ('[dict(workdir="x")]', 'workdir is not for a run to say'),
    ('[dict(name="a/b")]', 'name .a/b. may have letters'),
    ('[dict(seed=1), dict(seed=1)]', 'two dicts are the same run'),
    ('[dict(name="a", seed=1), dict(name="a")]', 'two dicts are one name'),
])
def test_mistakes_are_told(yields, told, tmp_path):
  with pytest.raises(ValueError, match=told) as error:
    grid.load(write(tmp_path, yields), default.get_config())
  assert '\n' not in str(error.value)


def test_a_file_that_is_none(tmp_path):
  (tmp_path / 'empty.py').write_text('')
  for name, told in (('nowhere.py', 'no such'), ('empty.py', 'no function')):
    with pytest.raises(ValueError, match=told):
      grid.load(tmp_path / name, default.get_config())


def test_shards_are_every_point_once():
  points = list(range(10))
  shards = [grid.shard(points, f'{i}/3') for i in (1, 2, 3)]
  assert sorted(sum(shards, [])) == points
  assert grid.shard(points, None) == points
  for text in ('0/3', '4/3', '1', 'a/b', '1/0'):
    with pytest.raises(ValueError, match='sweep_shard'):
      grid.shard(points, text)


def test_a_run_is_known_by_its_saved_config():
  config = default.get_config()
  saved = {**config.to_dict(), 'vocab_size': 256, 'mesh_data': 1}
  del saved['nan_policy']  # A run that is older than the flag.
  assert grid.same(config, saved) == []
  config.learning_rate = 1.0
  assert grid.same(config, saved) == ['learning_rate']


@pytest.mark.parametrize('path', SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_that_are_here(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 30
  assert f'--mode=sweep --sweep=sweeps/{path.name}' in text
  assert grid.load(path, default.get_config())
