"""Exploration files of ReaLLM-Forge: what they yield, and what is refused."""

import pytest

from configs import default, exploration, grid


@pytest.fixture
def runs(tmp_path):
  """The runs of a file of that text, beside files of a {name: text}."""
  def make(text, **others):
    for name, other in others.items():
      (tmp_path / f'{name}.yaml').write_text(other)
    path = tmp_path / 'some.yaml'
    path.write_text(text)
    return exploration.read(path)
  return make


def test_lists_are_multiplied_and_the_last_changes_fastest(runs, capsys):
  assert runs('n_layer: [1, 2]\nn_head: [2, "4"]\nseed: 3\n') == [
      {'n_layer': 1, 'n_head': 2, 'seed': 3},
      {'n_layer': 1, 'n_head': 4, 'seed': 3},
      {'n_layer': 2, 'n_head': 2, 'seed': 3},
      {'n_layer': 2, 'n_head': 4, 'seed': 3}]
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize('text, values', [
    ('seed: {range: {start: 1, end: 3}}', [1, 2, 3]),
    ('seed: {range: {start: 1, end: 6, step: 2}}', [1, 3, 5]),
    ('dropout: {range: {start: 0.0, end: 0.3}}', [0.0, 0.1, 0.2, 0.3]),
    ('dropout: {range: {start: 0.1, end: 0.2, step: 0.05}}', [.1, .15, .2])])
def test_ranges_have_both_ends(text, values, runs):
  assert [value for run in runs(text) for value in run.values()] == values


def test_values_are_read_as_on_a_command_line(runs):
  assert runs('learning_rate: ["1e-3"]\nbias: [true]\nn_kv_group: [null]\n'
              'attn_logit_softcapping: [true, 30]\n'
              'attention_list: [[causal, ssm]]\ntokenizer: byte\n')[1] == {
                  'learning_rate': 1e-3, 'bias': True, 'n_kv_group': None,
                  'attn_logit_softcapping': 30.0,
                  'attention_list': ('causal', 'ssm'), 'tokenizer': 'byte'}


CONDITIONED = '''
attention_variant: infinite
use_concat_heads: [true, false]
n_head: [2, 4]
n_cproj:
  conditions: {}
  options: [1, 2]
'''


@pytest.mark.parametrize('conditions, where', [
    ('[[use_concat_heads, false]]', [(False, 2), (False, 4)]),
    ('{use_concat_heads: false}', [(False, 2), (False, 4)]),
    ('[[use_concat_heads, false], [n_head, 4]]', [(False, 4)]),
    ('{use_concat_heads: false, n_head: 4}', [(False, 4)]),
    ('[{use_concat_heads: false, n_head: 4}, {n_head: 2}]',
     [(True, 2), (False, 2), (False, 4)])])
def test_conditions_say_which_runs_have_a_flag(conditions, where, runs):
  found = runs(CONDITIONED.replace('{}', conditions))
  given = [(r['use_concat_heads'], r['n_head']) for r in found
           if 'n_cproj' in r]
  assert given == [place for place in where for _ in range(2)]
  assert len(found) == 4 + len(where)


def test_a_condition_may_be_of_a_flag_that_has_one(runs):
  assert runs('''
use_flash_lobo: [false, true]
use_flash_lobo_per_head: {conditions: [[use_flash_lobo, true]], options: [true]}
flash_lobo_log_const:
  conditions: [[use_flash_lobo_per_head, true]]
  options: ["0.1"]
''') == [{'use_flash_lobo': False},
         {'use_flash_lobo': True, 'use_flash_lobo_per_head': True,
          'flash_lobo_log_const': 0.1}]


def test_parameter_groups_are_alternatives_and_win(runs):
  assert runs('''
n_head: [2, 4]
n_layer: 1
parameter_groups:
  - {n_head: [3], n_kv_group: [1, 3]}
  - seed: 7
    parameter_groups: [{n_head: 8}, {bias: true, n_head: [2]}]
''') == [{'n_head': 3, 'n_layer': 1, 'n_kv_group': 1},
         {'n_head': 3, 'n_layer': 1, 'n_kv_group': 3},
         {'n_head': 8, 'n_layer': 1, 'seed': 7},
         {'n_head': 2, 'n_layer': 1, 'seed': 7, 'bias': True}]


NAMED = '''
named_static_groups:
  - {named_group: rotary, use_rotary_embeddings: [true], rope_base: 500}
  - {named_group: norm, use_qk_norm: true}
  - named_group: both
    named_group_static: [rotary, norm]
  - {named_group: settled, named_group_settings: {use_qk_norm: [true]}}
named_variation_groups:
  - named_group: heads
    parameter_groups: [{n_head: 2}, {n_head: 4, n_kv_group: 1}]
common_group: {max_iters: [9]}
'''
ROTARY = {'use_rotary_embeddings': True, 'rope_base': 500.0}
NORM = {'use_qk_norm': True}


@pytest.mark.parametrize('used, found', [
    ('named_group_static: [rotary, norm]', [{**ROTARY, **NORM}]),
    ('named_group_static: both', [{**ROTARY, **NORM}]),
    ('named_group_static: settled', [NORM]),
    ('named_group_variations: [heads]',
     [{'n_head': 2}, {'n_head': 4, 'n_kv_group': 1}]),
    ('named_group_alternates: [norm, heads, rotary]',
     [NORM, {'n_head': 2}, {'n_head': 4, 'n_kv_group': 1}, ROTARY]),
    ('parameter_groups: [{named_group_static: [norm]}, {seed: 1}]',
     [NORM, {'seed': 1}])])
def test_named_groups(used, found, runs):
  assert runs(f'{NAMED}n_layer: [1]\n{used}\n') == [
      {'max_iters': 9, 'n_layer': 1, **given} for given in found]


def test_groups_of_other_files(runs):
  library = 'named_static_groups: [{named_group: deep, n_layer: 8}]'
  assert runs('named_group_libraries: [more.yaml]\nnamed_group_static: deep\n',
              more=library) == [{'n_layer': 8}]
  with pytest.raises(ValueError, match='two groups deep, one of more.yaml'):
    runs(f'named_group_libraries: [more.yaml]\n{library}', more=library)
  with pytest.raises(ValueError, match='more.yaml has seed, which is no gr'):
    runs('named_group_libraries: [more.yaml]', more='seed: 1')
  with pytest.raises(ValueError, match='none.yaml: no such file'):
    runs('named_group_libraries: none.yaml')


@pytest.mark.parametrize('text', [
    'seed: 1\n---\nseed: 2\n', '- seed: 1\n- seed: 2\n',
    '[{"seed": ["1"]}, {"seed": ["2"]}]'])
def test_a_file_may_have_several_mappings(text, runs):
  assert runs(text) == [{'seed': 1}, {'seed': 2}]


def test_flags_that_do_not_exist_here_are_told_in_one_line(runs, capsys):
  assert runs('seed: [1, 2]\ncompile: [true, false]\ndevice: [cuda]\n') == [
      {'seed': 1}, {'seed': 2}]
  out = capsys.readouterr().out
  assert out.count('\n') == 1
  assert 'no flags here: compile, device; 2 of 4 runs differ in not' in out


def test_flags_of_other_names(runs):
  assert runs('mlp_size: 64\nwte_weight_tying: false\nmlp_variant: mlp\n') == [
      {'mlp_width': 64, 'tie_embeddings': False, 'mlp_variant': 'gelu'}]


def test_flags_that_have_a_value_for_each_layer(runs):
  assert runs('attention_variant: infinite\nn_head_layerlist: [[2, 4, 8]]\n'
              'n_v_head_dim_layerlist: [16]\n') == [{'attention_list': (
                  'infinite(n_head=2, n_v_head_dim=16)',
                  'infinite(n_head=4, n_v_head_dim=16)',
                  'infinite(n_head=8, n_v_head_dim=16)')}]
  assert runs('attention_list: [[causal, infinite]]\n'
              'n_head_layerlist: [[2, 4]]\n') == [{'attention_list': (
                  'causal(n_head=2)', 'infinite(n_head=4)')}]


@pytest.mark.parametrize('text, told', [
    ('', 'yields no run'), ('{}', 'yields no run'), ('n_head: []', 'no run'),
    ('n_head: [2', 'no YAML, line'), ('3', 'must be a mapping'),
    ('- 3', 'must be a mapping'), ('1: 2', 'must be a mapping'),
    ('colour: red', 'no flag of it exists here: colour'),
    ('n_head: [two]', 'n_head=two is not an integer'),
    ('n_head: [0]', 'n_head .0. must be at least 1'),
    ('workdir: x', 'workdir is not for a run to say'),
    ('n_head_layerlist: [[2, two]]', 'n_head=two is not an integer'),
    ('n_head_layerlist: [[]]', 'list of layers is empty'),
    ('n_head: {values: [1]}', 'n_head has values: a mapping has range'),
    ('n_head: {range: {start: 1}}', 'range has start, end and step'),
    ('n_head: {range: 3}', 'range has start, end and step'),
    ('n_head: {range: {start: 1, end: 2, step: 0}}', 'has no value'),
    ('n_head: {range: {start: a, end: 2}}', 'numbers'),
    ('n_head: {range: {start: 1, end: 1000000}}', 'or more than'),
    ('n_head: {conditions: [[bias, true]]}', 'needs conditions and options'),
    ('n_head: {conditions: [bias], options: [1]}', 'must be pairs'),
    ('named_group_sttic: [a]', 'did you mean named_group_static'),
    ('parameter_groups: [{common_group: {seed: 1}}]', 'common_group has no pl'),
    ('common_group: {parameter_groups: []}', 'has no place in common_group'),
    ('named_group_settings: {named_group_static: a}', 'has no place in named'),
    ('named_group_static: [a]', "no named group 'a' known: none"),
    ('named_static_groups: [{n_head: 2}]', 'without a named_group'),
    ('named_static_groups: [3]', 'must be a mapping'),
    ('parameter_groups: [3]', 'must be a mapping'),
    ('named_group_settings: 3', 'must be a mapping'),
    ('common_group: [3]', 'must be a mapping'),
    ('common_group: {seed: [1, 2]}', 'seed must have one value'),
    ('common_group: {seed: 1}\nseed: 2', 'common_group has seed=1, a run 2'),
    ('seed: 1\nnamed_group_static: a\n'
     'named_static_groups: [{named_group: a, seed: 2}]', 'seed is 1 and 2'),
    ('named_group_static: a\nnamed_static_groups:\n'
     '- {named_group: a, parameter_groups: [{seed: 1}, {seed: 2}]}',
     'a is static, and has 2 alternatives'),
    ('named_group_static: a\nnamed_static_groups:\n'
     '- {named_group: a, named_group_static: b}\n'
     '- {named_group: b, named_group_static: a}', 'each other: a in b in a'),
    ('parameter_groups: &all [{parameter_groups: *all}]', 'contains itself')])
def test_mistakes_are_told(text, told, tmp_path):
  path = tmp_path / 'some.yaml'
  path.write_text(text)
  with pytest.raises(ValueError, match=told) as error:
    grid.load(path, default.get_config())
  assert '\n' not in str(error.value)
  assert str(error.value).startswith(f'--sweep={path}')


def test_too_many_runs(runs):
  with pytest.raises(ValueError, match='more than 100,000 runs'):
    runs(''.join(f'{flag}: {{range: {{start: 1, end: 1000}}}}\n'
                 for flag in ('seed', 'max_iters')))


def test_a_file_is_a_sweep(tmp_path):
  path = tmp_path / 'some.yml'
  path.write_text('attention_variant: [causal, ssm]\nseed: [1, 2]\n')
  base = default.get_config()
  base.n_embd = 64
  points = grid.load(path, base)
  assert [point.name for point in points] == [
      'causal,seed=1', 'causal,seed=2', 'ssm,seed=1', 'ssm,seed=2']
  assert points[-1].config.n_embd == 64
