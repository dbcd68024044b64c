"""Every flag once, and every spelling of it."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import attention
from attention.common import options
from configs import default, flags

CONFIGS = pathlib.Path(default.__file__).parent
PRESETS = sorted(path for path in CONFIGS.glob('*.py')
                 if path.stem not in ('__init__', 'default', 'exploration',
                                      'flags', 'grid', 'help'))
FIELDS = default.fields()
every_flag = pytest.mark.parametrize('name', FIELDS)


def parse(*argv, **kwargs):
  return flags.parse(list(argv), **kwargs)[0]


def error(*argv, **kwargs):
  """The one line that a command line is refused with."""
  with pytest.raises(flags.FlagError) as raised:
    parse(*argv, **kwargs)
  assert '\n' not in str(raised.value)
  return str(raised.value)


@pytest.mark.parametrize('argv, name, value', [
    ('--n_layer=7', 'n_layer', 7),
    ('--n_layer 7', 'n_layer', 7),
    ('--config.n_layer=7', 'n_layer', 7),
    ('--config.n_layer 7', 'n_layer', 7),
    ('--n_layer=7 --n_layer=8', 'n_layer', 8),
    ('--learning_rate=3e-4', 'learning_rate', 3e-4),
    ('--learning_rate 1', 'learning_rate', 1.0),
    ('--mesh_data=-1', 'mesh_data', -1),
    ('--mesh_data -1', 'mesh_data', -1),
    ('--flash_lobo_log_const -0.5 --use_flash_lobo', 'flash_lobo_log_const',
     -0.5),
    ('--mlp_variant swiglu', 'mlp_variant', 'swiglu'),
    ('--prompt=a=b', 'prompt', 'a=b'),
    ('--prompt=', 'prompt', ''),
    ('--prompt --n_layer=2', 'prompt', None),
])
def test_spellings_of_values(argv, name, value):
  if value is None:  # A value cannot begin with --, unless after =.
    assert 'needs a value' in error(*argv.split())
    assert parse('--prompt=--n_layer=2').prompt == '--n_layer=2'
    return
  config = parse(*argv.split(' '))
  assert config[name] == value
  assert type(config[name]) is type(value)


@pytest.mark.parametrize('argv, value', [
    ('--use_qk_norm', True), ('--use_qk_norm=true', True),
    ('--use_qk_norm=True', True), ('--use_qk_norm true', True),
    ('--use_qk_norm=1', True), ('--config.use_qk_norm', True),
    ('--config.use_qk_norm=true', True), ('--use_qk_norm --bias', True),
    ('--nouse_qk_norm', False), ('--use_qk_norm=false', False),
    ('--use_qk_norm False', False), ('--config.nouse_qk_norm', False),
    ('--config.use_qk_norm=0', False), ('--use_qk_norm --nouse_qk_norm', False),
    ('--nouse_qk_norm --use_qk_norm', True),
])
def test_spellings_of_booleans(argv, value):
  assert parse(*argv.split()).use_qk_norm is value


def test_a_false_boolean_can_overrule_a_default_of_true():
  assert FIELDS['eval_final'].default is True
  assert parse('--noeval_final').eval_final is False
  assert parse('--config.eval_final=false').eval_final is False


@pytest.mark.parametrize('argv', [
    '--attention_list causal causal identity',
    '--attention_list=causal,causal,identity',
    '--attention_list causal,causal,identity',
    '--attention_list causal, causal, identity',
    '--attention_list=causal --attention_list=causal --attention_list=identity',
    '--attention_list causal causal --attention_list identity',
    '--config.attention_list=causal,causal,identity',
    '--config.attention_list causal causal identity --n_layer=3',
    '--n_layer 3 --attention_list causal causal identity --bias',
])
def test_spellings_of_lists(argv):
  assert parse(*argv.split()).attention_list == (
      'causal', 'causal', 'identity')


@pytest.mark.parametrize('argv', [
    ['--attention_list=2*causal(window_size=4, n_head=2) ssm'],
    ['--attention_list', '2*causal(window_size=4, n_head=2)', 'ssm'],
    ['--attention_list=2*causal(window_size=4, n_head=2)',
     '--config.attention_list=ssm'],
], ids=len)
def test_lists_of_layers_with_options(argv):
  assert parse(*argv).attention_list == (
      '2*causal(window_size=4, n_head=2)', 'ssm')


RANGES = [(name, value) for name, field in FIELDS.items()
          for word, bound in field.metadata['bounds'].items()
          for value in [bound + {'at least': -1, 'less than': 0,
                                 'at most': 1, 'more than': 0}[word]]]


@pytest.mark.parametrize('name, value', RANGES)
def test_a_number_out_of_range_is_one_line(name, value):
  if name == 'attn_logit_softcapping' and value == 0:
    pytest.skip('0 is none')
  message = error(f'--{name}={value}')
  kind, _ = options.types(FIELDS[name])
  assert message.startswith(f'{name} ({kind(value)}) must be ')
  config = default.get_config()  # A notebook is told the same.
  config[name] = kind(value)
  with pytest.raises(ValueError) as raised:
    default.check(config)
  assert str(raised.value) == message


@pytest.mark.parametrize('name', [
    n for n, f in FIELDS.items() if options.types(f)[0] in (int, float)])
def test_every_number_has_a_range(name):
  """But for what may be any number."""
  assert FIELDS[name].metadata['bounds'] or name in (
      'flash_lobo_log_const', 'mla_lobo_init', 'consmax_initial_beta',
      'consmax_v2_clamp_value', 'consmax_saturation', 'strongermax_xmax_guess',
      'strongermax_clamp_value', 'pfla_softmax_obo', 'forget_gate_bias_init')
  if options.types(FIELDS[name])[0] is float:
    assert f'{name} (nan) must be' in error(f'--{name}=nan')


@pytest.mark.parametrize('name', [
    n for n, f in FIELDS.items() if f.metadata['choices']])
def test_an_unknown_choice_names_the_nearest(name):
  choices = FIELDS[name].metadata['choices']
  assert FIELDS[name].default in (None, *choices)
  message = error(f'--{name}={choices[0]}x')
  assert f'unknown {name}' in message and ', '.join(choices) in message
  assert f'did you mean {choices[0]}' in message
  assert ', '.join(choices) in options.text(FIELDS[name])


@every_flag
def test_none_where_it_has_a_meaning(name):
  _, optional = options.types(FIELDS[name])
  if optional:
    for spelling in ('none', 'None', 'NONE'):
      assert parse(f'--{name}={spelling}')[name] is None
      assert parse(f'--{name}', spelling)[name] is None
    assert parse(f'--config.{name}=none')[name] is None
  elif options.types(FIELDS[name])[0] is not str:
    assert f'--{name}=none is not' in error(f'--{name}=none')


def test_none_can_be_taken_back_and_set_again():
  assert parse('--top_k=none').top_k is None
  assert parse('--top_k=none', '--top_k=5').top_k == 5
  assert parse('--window_size=9', '--window_size=none').window_size is None


@pytest.mark.parametrize('argv, value', [
    ('--attn_logit_softcapping', 50.0),
    ('--attn_logit_softcapping=true', 50.0),
    ('--attn_logit_softcapping True', 50.0),
    ('--config.attn_logit_softcapping', 50.0),
    ('--attn_logit_softcapping --bias', 50.0),
    ('--attn_logit_softcapping=30', 30.0),
    ('--attn_logit_softcapping 1', 1.0),
    ('--attn_logit_softcapping=1', 1.0),
    ('--attn_logit_softcapping=false', None),
    ('--attn_logit_softcapping=0', None),
    ('--attn_logit_softcapping=0.0', None),
    ('--attn_logit_softcapping 0', None),
    ('--attn_logit_softcapping=none', None),
    ('--noattn_logit_softcapping', None),
])
def test_softcapping_is_a_number_that_was_once_a_boolean(argv, value):
  got = parse(*argv.split()).attn_logit_softcapping
  assert got == value and type(got) is type(value)


@pytest.mark.parametrize('argv, parts', [
    (['--n_layr=3'], ['--n_layr', 'did you mean n_layer?']),
    (['--config.n_layr=3'], ['n_layr', 'did you mean n_layer?']),
    (['--mla_latent=3'], ['--mla_latent']),
    (['--nobiass'], ['--nobiass', 'bias']),
    (['--zzz'], ['--zzz']),
    (['--n_layer'], ['--n_layer needs a value', 'layers']),
    (['--n_layer='], ['--n_layer', 'an integer']),
    (['--n_layer=x'], ['--n_layer=x', 'an integer', 'layers']),
    (['--n_layer=1.5'], ['--n_layer=1.5', 'an integer']),
    (['--n_layer=true'], ['--n_layer=true', 'an integer']),
    (['--n_layer', '3', '4'], ['4']),
    (['--learning_rate=fast'], ['--learning_rate=fast', 'a number']),
    (['--bias=maybe'], ['--bias=maybe', 'true or false']),
    (['--nobias=1'], ['--nobias', 'takes no value']),
    (['--nolearning_rate'], ['--nolearning_rate']),
    (['--attention_list'], ['--attention_list needs a value']),
    (['n_layer=3'], ["'n_layer=3'", 'begin with --']),
    (['-n_layer=3'], ["'-n_layer=3'", 'begin with --']),
    (['--config'], ['--config needs a path']),
    (['--config='], ['--config needs a path']),
    (['--config=nowhere.py'], ['nowhere.py', 'no such file']),
    (['--config=README.md'], ['README.md']),
], ids=' '.join)
def test_errors_name_the_flag_and_the_way_out(argv, parts):
  message = error(*argv)
  for part in parts:
    assert part in message


def test_flags_of_others_are_left_to_them():
  config, given, rest = flags.parse(
      ['--verbosity=1', '--bias', '--nologtostderr'],
      others={'verbosity', 'logtostderr'})
  assert rest == ['--verbosity=1', '--nologtostderr']
  assert config.bias and given == {'bias'}


def test_a_preset_and_flags_over_it(tmp_path):
  path = tmp_path / 'small.py'
  path.write_text('''
from configs import default


def get_config():
  config = default.get_config()
  config.update(n_layer=9, n_head=3)
  return config
''')
  for argv in ([f'--config={path}', '--n_head=1'],
               ['--n_head=1', '--config', str(path)]):
    config = parse(*argv)
    assert (config.n_layer, config.n_head) == (9, 1)
    assert config.n_embd == FIELDS['n_embd'].default


def test_json_goes_there_and_back(tmp_path):
  given = ['--attention_list', 'causal', 'identity', '--top_k=none', '--bias',
           '--attn_logit_softcapping', '--learning_rate=0.1', '--wandb=x',
           '--n_kv_group=2', '--prompt=two\nlines']
  config = parse(*given)
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(config.to_dict()))
  again = parse(f'--config={path}')
  assert again.to_dict() == config.to_dict()
  assert {k: type(v) for k, v in again.items()} == {
      k: type(v) for k, v in config.items()}
  changed = parse(f'--config={path}', '--n_kv_group=none', '--n_layer=2')
  assert changed.n_kv_group is None and changed.n_layer == 2


@pytest.mark.parametrize('text, part', [
    ('{"n_layr": 3}', 'did you mean n_layer?'),
    ('{"n_layer": "many"}', 'n_layer'),
    ('{"n_layer": ', 'config.json'),
    ('[1]', 'config.json'),
], ids=['unknown', 'type', 'truncated', 'list'])
def test_a_bad_json_is_an_error_of_one_line(tmp_path, text, part):
  path = tmp_path / 'config.json'
  path.write_text(text)
  assert part in error(f'--config={path}')


def test_a_bad_preset_is_an_error_of_one_line(tmp_path):
  path = tmp_path / 'empty.py'
  path.write_text('x = 1\n')
  assert 'get_config' in error(f'--config={path}')


@pytest.mark.parametrize('path', PRESETS, ids=lambda path: path.stem)
def test_presets(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 30
  docstring = ast.get_docstring(ast.parse(text)) or ''
  assert f'python main.py --config=configs/{path.name}' in docstring, (
      'a preset says which command it is for')
  for word in ('loss', 'minutes|hours|days|ms'):
    assert any(w in docstring for w in word.split('|')), (
        f'a preset says what to expect: {word}')
  config = flags.load(path)
  assert set(config) == set(FIELDS)
  attention.check(config)
  changed = [n for n in FIELDS if config[n] != FIELDS[n].default]
  assert changed


@every_flag
def test_every_flag_is_documented(name):
  field = FIELDS[name]
  assert field.metadata['help']
  assert '\n' not in field.metadata['help']
  assert name.isidentifier()
  assert name == name.lower() or name == 'fire_init_L'  # ReaLLM-Forge's.


@every_flag
def test_a_default_has_its_type(name):
  kind, optional = options.types(FIELDS[name])
  assert kind in (bool, int, float, str, tuple)
  value = FIELDS[name].default
  assert type(value) is kind or optional and value is None


def test_every_flag_has_one_place():
  """Names are in one group, and no name reads as the no of another."""
  names = [name for table in default.groups().values() for name in table]
  assert len(names) == len(set(names))
  clashes = [n for n in names if 'no' + n in names]
  assert not clashes


def test_a_flag_is_the_same_in_every_variant():
  fields = {}
  for variant in attention.names():
    for name, field in attention.flags(variant).items():
      fields.setdefault(name, set()).add(
          (field.default, str(field.type), field.metadata['help']))
  assert {n: f for n, f in fields.items() if len(f) > 1} == {}


def test_a_config_is_locked():
  config = default.get_config()
  with pytest.raises(AttributeError, match='n_layer'):
    config.n_layr = 3
  with pytest.raises(KeyError):
    config.update(n_layr=3)
  assert set(config) == set(FIELDS)
  assert {n: config[n] for n in FIELDS} == {
      n: f.default for n, f in FIELDS.items()}


def test_two_configs_share_nothing():
  one, other = default.get_config(), default.get_config()
  one.n_layer += 1
  assert other.n_layer == FIELDS['n_layer'].default


DOCUMENTED = dict(
    attention_variant='causal', attention_list=None,
    disable_flash_attention=False, use_qk_norm=False, use_qk_norm_scale=False,
    attn_logit_softcapping=None, n_kv_group=None, use_flash_lobo=False,
    use_flash_lobo_per_head=False, use_flash_obo_const=False,
    flash_lobo_log_const=0.0, mla_latent_dim=None, mla_rotary_dim=32,
    use_mla_lobo=False, mla_lobo_init=0.0, n_latent=4, triadic_loops=1,
    mod_fn='cooperation', n_qk_head_dim=None, n_v_head_dim=None, n_cproj=None,
    use_concat_heads=False, ssm_mamba_expand=2, ssm_conv_kernel_size=3,
    ssm_dt_rank=8, ssm_d_state=16, ssm_io_bias=False, mesh_data=-1,
    mesh_fsdp=1, mesh_tensor=1)


@pytest.mark.parametrize('name', DOCUMENTED)
def test_documented_defaults(name):
  assert FIELDS[name].default == DOCUMENTED[name]


def run_main(*argv):
  root = CONFIGS.parent
  return subprocess.run([sys.executable, root / 'main.py', *argv], cwd='/',
                        capture_output=True, text=True, timeout=120)


def test_a_typing_error_is_told_in_one_line():
  done = run_main('--n_layr=3')
  assert done.returncode != 0
  assert done.stderr.strip() == (
      'error: unknown flag --n_layr, did you mean n_layer?')


def test_what_reads_a_run_takes_its_config(tmp_path):
  config = parse('--n_layer=9')
  (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
  place = f'--workdir={tmp_path}'
  assert parse('--mode=sample', place).n_layer == 9
  assert parse('--mode=eval', place, '--n_layer=2').n_layer == 2
  assert parse(place).n_layer == FIELDS['n_layer'].default
