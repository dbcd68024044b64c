"""--help, --help=VARIANT and --help=FLAG."""

import pytest

import attention
import main
from configs import default, help


@pytest.fixture
def said(capsys):
  """What main prints for a command line, then it is done."""
  def say(*argv):
    with pytest.raises(SystemExit) as end:
      main.parse(['main.py', *argv])
    assert not end.value.code
    return capsys.readouterr().out
  return say


@pytest.mark.parametrize('argv', [
    ['-h'], ['--help'], ['--n_layer=2', '--help', '--n_head=1']], ids=' '.join)
def test_every_flag_is_there(said, argv):
  text = said(*argv)
  assert set(text.split()) >= {
      flag if attention.users(flag) else f'--{flag}'
      for flag in default.fields()}
  for title in default.groups():
    assert f'\n\n{title}' in text
  for name in attention.names():
    assert f'\n  {name}: ' in text


@pytest.mark.parametrize('name', attention.names())
def test_a_variant_explains_itself_and_its_flags(said, name):
  text = said(f'--help={name}')
  assert attention.get(name).__doc__.splitlines()[0] in text
  shown = {line.split()[0] for line in text.splitlines()
           if line.startswith('  --')}
  assert shown == {f'--{flag}' for flag in attention.flags(name)}


@pytest.mark.parametrize('topic', ['window_size', '--window_size'])
def test_a_flag_is_explained(said, topic):
  assert said(f'--help={topic}') == (
      '  --window_size  (none)\n'
      '      tokens that a query sees, itself included; none: all\n'
      '  of causal, differential, infinite, mla\n')
  assert said('--help', 'seed') == help.text('seed') + '\n'


def test_another_name_gets_the_nearest():
  with pytest.raises(SystemExit, match='--help=windw: .* mean window_size?'):
    main.parse(['main.py', '--help=windw'])
