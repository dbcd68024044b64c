"""Who imports whom, and that importing touches no device."""

import ast
import pathlib
import subprocess
import sys

import pytest

import attention

ROOT = pathlib.Path(attention.__file__).parents[1]
PACKAGES = ('attention', 'configs', 'model', 'train_lib')
HOUSE = (*PACKAGES, 'main', 'tests', 'benchmarks')
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES
               for path in (ROOT / package).rglob('*.py'))
VARIANTS = [f'attention/{name}.py' for name in attention.names()]

# Where a file lies -> what it may import of the house, and of everybody else
# (None: anything). The longest entry that a path begins with counts.
RULES = {
    'attention/__init__.py': (('attention.common.options',
                               'attention.common.specs'), ()),
    'attention/common/options.py': ((), ()),
    'attention/common/specs.py': (('attention.common.options',), ()),
    'attention/kernels': (('attention.kernels',),
                          ('jax', 'jaxtyping', 'numpy')),
    'attention/common': (
        ('attention.common', 'attention.kernels', 'model.layers',
         'model.sharding'), ('flax', 'jax')),
    # Not the kernels: attention.common.ops runs them on the mesh.
    'attention': (('attention.common', 'model.layers'), ('flax', 'jax')),
    'model/layers.py': ((), ('flax', 'jax')),
    'model/sharding.py': ((), ('jax',)),
    'model': (('attention', 'configs.default', 'model'),
              ('flax', 'jax', 'numpy')),
    'configs': (('attention', 'configs'), ('ml_collections',)),
    'configs/exploration.py': (('attention', 'configs'), ('yaml',)),
    'train_lib': (('attention', 'configs.default', 'configs.grid', 'model',
                   'train_lib'), None),
    'train_lib/tasks': (
        ('attention.common.options', 'attention.common.specs', 'train_lib'),
        ('numpy',)),
    'train_lib/text_slices.py': (
        ('attention.common.options', 'train_lib.tasks'), ('numpy',)),
    'train_lib/slurm.py': (
        ('attention.common.options', 'train_lib'), ('submitit',)),
    'main.py': (PACKAGES, ('absl',)),
}
DENIED = {  # Allowed by a rule above, but for these.
    'model': ('attention.kernels', 'attention.common',
              *(f'attention.{name}' for name in attention.names())),
    'configs': ('attention.kernels',
                *(f'attention.{name}' for name in attention.names())),
    'train_lib': ('attention.common',
                  *(f'attention.{name}' for name in attention.names())),
    # Options of tasks, slices and jobs are declared and checked as a layer's.
    'train_lib/tasks': ('attention.kernels',),
    'train_lib/text_slices.py': ('attention.kernels',),
    'train_lib/slurm.py': ('attention.kernels',),
}


def imported(path):
  """The modules that a file imports, `from a import b` as both a and a.b."""
  found = set()
  for node in ast.walk(ast.parse((ROOT / path).read_text())):
    if isinstance(node, ast.Import):
      found |= {(alias.name,) for alias in node.names}
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}:{node.lineno}: imports are absolute'
      found |= {(node.module, f'{node.module}.{a.name}') for a in node.names}
  return found


def within(name, packages):
  return any(name == p or name.startswith(p + '.') for p in packages)


def rule(path, rules):
  places = [p for p in rules if path == p or path.startswith(p + '/')]
  return rules[max(places, key=len)] if places else ()


@pytest.mark.parametrize('path', [*map(str, FILES), 'main.py'])
def test_imports_what_its_place_allows(path):
  house, others = rule(path, RULES)
  for names in imported(path):
    if names[0].split('.')[0] not in HOUSE:
      allowed = others is None or within(names[0], others)
      assert allowed or names[0].split('.')[0] in sys.stdlib_module_names, (
          f'{path} imports {names[0]}: its place allows {others}')
      continue
    assert any(within(n, house) for n in names), (
        f'{path} imports {names[-1]}: its place allows {house or "nothing"}')
    assert not any(within(n, rule(path, DENIED)) for n in names), (
        f'{path} imports {names[-1]}, which is not for others to know')


@pytest.mark.parametrize('path', VARIANTS)
def test_no_variant_imports_another(path):
  variants = [f'attention.{name}' for name in attention.names()]
  assert not [n for names in imported(path) for n in names
              if within(n, variants)]


@pytest.mark.parametrize('path', [*map(str, FILES), 'main.py'])
def test_files_are_short(path):
  limit = 60 if path == 'main.py' else 400
  assert len((ROOT / path).read_text().splitlines()) <= limit


def test_importing_everything_touches_no_device():
  """jax.distributed.initialize must be able to come first."""
  modules = ['main'] + [
      '.'.join(path.with_suffix('').parts).removesuffix('.__init__')
      for path in FILES]
  code = '\n'.join([
      *(f'import {module}' for module in modules),
      'from configs import default',
      'default.get_config()',
      'from jax._src import xla_bridge',
      'assert not xla_bridge._backends, xla_bridge._backends'])
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


# The rooms of an op: a newcomer who knows one knows all.
OPS = ('flash', 'scan', 'chunked', 'delta', 'scores')
ENTRIES = {'__init__.py', 'reference.py', 'xla.py', 'tpu', 'gpu'}
MORE = {'flash': {'plain.py', 'cudnn.py'},
        'delta': {'decays.py', 'products.py'},
        'scores': {'plain.py', 'weights.py', 'fire.py'}}
WITHOUT_KERNELS = ('delta', 'scores')
ROOM = {'__init__.py', 'launch.py', 'forward_kernel.py', 'backward_kernel.py'}
MORE_IN_ROOM = {'blocks.py', 'chunk.py', 'states.py'}


def entries(*place):
  folder = ROOT.joinpath('attention', 'kernels', *place)
  return {path.name for path in folder.iterdir() if path.name[0] not in '._'
          or path.name == '__init__.py'} - {'__pycache__'}


@pytest.mark.parametrize('op', OPS)
def test_every_op_has_the_same_rooms(op):
  rooms = () if op in WITHOUT_KERNELS else ('tpu', 'gpu')
  found = entries(op) | ({'tpu', 'gpu'} - {*rooms})
  assert found == ENTRIES | MORE.get(op, set())
  for room in rooms:
    assert ROOM <= entries(op, room) <= ROOM | MORE_IN_ROOM


def test_every_op_is_known():
  folders = {path.name for path in (ROOT / 'attention/kernels').iterdir()
             if path.is_dir()} - {'__pycache__'}
  assert folders == set(OPS)
