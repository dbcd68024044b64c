"""Odd inputs, as a user gives them: one line, before anything is computed."""

import contextlib
import io
import json
import pickle

import jax
import numpy as np
import pytest

import main
from configs import default
from train_lib import trainer

FIELDS = default.fields()
SMALL = ['--n_layer=2', '--n_embd=16', '--n_head=2', '--block_size=16']

# What is given on a command line, and a part of what it is told. {tmp} is a
# folder with text.txt, of 12 kB, and what `files` makes.
COMMANDS = {
    '--learning_rate=nan': 'learning_rate (nan) must be at least 0',
    '--learning_rate=inf': 'learning_rate (inf) must be',
    '--learning_rate=-1': 'learning_rate (-1.0) must be at least 0',
    '--learning_rate=fast': 'learning_rate=fast is not a number',
    '--beta1=1.5': 'beta1 (1.5) must be at least 0 and less than 1',
    '--beta2=1': 'beta2 (1.0) must be',
    '--grad_clip=-1': 'grad_clip (-1.0) must be at least 0',
    '--grad_clip=inf': 'a finite number',
    '--weight_decay=-0.1': 'weight_decay (-0.1) must be at least 0',
    '--z_loss=-1': 'z_loss (-1.0) must be',
    '--min_lr=-1e-4': 'min_lr (-0.0001) must be',
    '--lr_decay_iters=-5': 'lr_decay_iters (-5) must be at least 1, or none',
    '--rope_base=0 --use_rotary_embeddings': 'rope_base (0.0) must be more',
    '--rope_base=-1 --use_rotary_embeddings': 'rope_base (-1.0) must be more',
    '--temperature=-1': 'temperature (-1.0) must be',
    '--top_k=0': 'top_k (0) must be at least 1',
    '--top_p=0': 'top_p (0.0) must be more than 0',
    '--top_p=1.1': 'top_p (1.1) must be',
    '--max_new_tokens=0': 'max_new_tokens (0) must be',
    '--num_samples=-2': 'num_samples (-2) must be',
    '--seed=-1': 'seed (-1) must be at least 0',
    '--seed=99999999999': 'seed (99999999999) must be',
    '--eval_iters=none': 'eval_iters=none is not an integer',
    '--eval_iters=0': 'eval_iters (0) must be',
    '--eval_batch_size=0': 'eval_batch_size (0) must be',
    '--batch_size=0': 'batch_size (0) must be',
    '--batch_size=100000000000000': 'batch_size (100000000000000) must be',
    '--batch_size=2000000000': 'activations need',
    '--n_layer=100000000000000000000': 'n_layer (1000000000000000',
    '--n_layer=10000 --n_embd=16384': 'parameters need',
    '--n_embd=2000000000': 'n_embd=2000000000',
    '--vocab_size=2000000000': 'GiB or more on a device that has',
    '--block_size=2000000000': 'block_size=2000000000',
    '--mlp_width=2000000000': 'lower one of n_layer=2, n_embd=16, mlp_width=',
    '--attention_variant=ssm --ssm_d_state=2000000000': 'ssm_d_state=20000000',
    '--attention_list=1000000000000*causal': 'at most 10000 times',
    '--attention_list=1,2': "'1'",
    '--attention_list=causal(window_size=0)': 'window_size (0) must be',
    '--attention_variant=co4 --triadic_loops=1000000': 'triadic_loops',
    '--n_head=3': 'n_head (3) must divide n_embd (16)',
    '--workdir=': 'workdir is empty',
    '--dataset=': 'dataset is empty',
    '--tokenizer=': 'tokenizer is empty',
    '--wandb=': 'wandb is empty',
    '--mode=': "unknown mode ''",
    '--dataset={tmp}/nowhere': 'is no file or folder',
    '--dataset={tmp}/empty.txt': 'is empty',
    '--dataset={tmp}/latin.txt': 'is no UTF-8 text',
    '--dataset={tmp}/wide': 'give --bin_dtype=uint32',
    '--dataset={tmp}/floats': 'looks like float32',
    '--dataset={tmp}/odd': 'has 3 bytes',
    '--dataset={tmp}/attack': 'no plain meta.pkl',
    '--bin_dtype=uint32': 'bin_dtype=uint32 has no effect',
    '--bin_dtype=uint8': 'unknown bin_dtype',
    '--tokenizer={tmp}/text.txt': 'is no tokenizer',
    '--tokenizer=bpe:12': 'no room for the 256 bytes',
    '--vocab_size=10': 'vocab_size (10) is less than the 256',
    '--packing': '--packing needs two documents',
    '--val_fraction=1': 'val_fraction (1.0) must be',
    '--profile_steps=1': 'must be two steps',
    '--profile_steps=a,b': 'must be two steps',
    '--prompt=a --prompt=b': '--prompt is given twice',
    '--config={tmp}/nowhere.json': 'no such file',
    '--config={tmp}/text.txt': 'neither a .py nor a .json file',
    '--mesh_data=7': 'does not fit the 8 devices',
    '--mesh_data=0': 'sizes are positive',
    '--mode=eval': '--mode=eval needs --workdir',
    '--mode=sweep': '--mode=sweep needs --sweep',
    '--dry_run': '--dry_run has no effect: it is of --mode=sweep',
    '--mode=report --sweep_workers=2': '--sweep_workers has no effect',
    '--sweep_slurm=2': '--sweep_slurm has no effect',
    '--mode=sweep --sweep_slurm=-1': 'sweep_slurm (-1) must be at least 0',
    '--mode=sweep --sweep={tmp}/nowhere.py': 'no such .py or .yaml file',
    '--mode=report': '--mode=report needs --workdir',
    '--mode=report --workdir={tmp}': 'has no runs',
    '--mode=sample --workdir={tmp}': 'has no checkpoints',
    '--workdir={tmp}/text.txt/run': 'cannot be written to',
    '--gradient_accumulation_steps=3': 'must be a multiple of',
    'n_layer=3': 'flags begin with --',
    '--n_layr=3': 'did you mean n_layer?',
}
# What a config file may hold by mistake.
VALUES = {
    'null': None, 'numbers': [1, 2], 'dict': {'a': 1}, 'true': True,
    'empty': '', 'nan': float('nan'), 'inf': float('inf'), 'huge': 10 ** 20,
    'text': 'x', 'float': 1.5}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  root = tmp_path_factory.mktemp('inputs')
  (root / 'text.txt').write_text(
      ''.join(f'{i} squared is {i * i}.\n' for i in range(600)))
  (root / 'empty.txt').write_text('')
  (root / 'latin.txt').write_bytes('café'.encode('latin-1'))
  ids = np.random.default_rng(0).integers(0, 300, 4000)
  for name, kind in (('wide', 'uint32'), ('floats', 'float32'),
                     ('attack', 'uint16')):
    (root / name).mkdir()
    for split in ('train', 'val'):
      ids.astype(kind).tofile(root / name / f'{split}.bin')
  (root / 'attack/meta.pkl').write_bytes(pickle.dumps(print))
  (root / 'odd').mkdir()
  (root / 'odd/train.bin').write_bytes(b'123')
  return root


def told(argv, monkeypatch):
  """The line that main ends with, which must not compute anything."""
  def computed(*_):
    raise AssertionError('a step was made')
  monkeypatch.setattr(trainer, 'make_step', computed)
  said = io.StringIO()
  with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(said):
    main.main(main.parse(['main.py', *argv]))
  assert not said.getvalue()
  line = str(end.value)
  assert line.startswith('error: ') and '\n' not in line
  return line


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_line(command, files, tmp_path, monkeypatch):
  argv = [f'--dataset={files}/text.txt', *SMALL]
  if '--workdir' not in command and '--mode' not in command:
    argv.append(f'--workdir={tmp_path}')
  given = command.format(tmp=files).split(' ')
  names = {flag.partition('=')[0] for flag in given}
  argv = [flag for flag in argv if flag.partition('=')[0] not in names]
  assert COMMANDS[command] in told([*argv, *given], monkeypatch)


@pytest.mark.parametrize('flag', FIELDS)
def test_a_config_file(flag, tmp_path, monkeypatch):
  """No value makes more than one line of any flag, whatever it is."""
  path = tmp_path / 'config.json'
  monkeypatch.setattr(main.sys, 'exit', lambda text: refused.append(text))
  for name, value in VALUES.items():
    refused = []
    path.write_text(json.dumps({flag: value}))
    with contextlib.suppress(UnboundLocalError):  # sys.exit went on.
      config = main.parse(['main.py', f'--config={path}'])
      json.dumps(config.to_dict(), allow_nan=False)
    assert all('\n' not in line and flag in line for line in refused), name


def test_floats_of_64_bits(files, tmp_path, monkeypatch):
  argv = [f'--dataset={files}/text.txt', f'--workdir={tmp_path}', *SMALL]
  jax.config.update('jax_enable_x64', True)
  try:
    assert 'JAX_ENABLE_X64' in told(argv, monkeypatch)
  finally:
    jax.config.update('jax_enable_x64', False)
