"""The mesh, and where on it parameters, optimiser state and batches lie."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from model.sharding import RULES, mesh_size, spec

AXES = ('data', 'fsdp', 'tensor')


def make_mesh(config):
  """The mesh of mesh_data x mesh_fsdp x mesh_tensor devices."""
  devices = jax.device_count()
  sizes = [config[f'mesh_{axis}'] for axis in AXES]
  asked = ' x '.join(f'mesh_{axis}={n}' for axis, n in zip(AXES, sizes))
  if any(n == 0 or n < -1 for n in sizes) or sizes.count(-1) > 1:
    raise ValueError(f'{asked}: sizes are positive, and at most one is -1')
  fixed = int(np.prod([n for n in sizes if n != -1]))
  if devices % fixed or (-1 not in sizes and fixed != devices):
    raise ValueError(f'{asked} does not fit the {devices} devices that are '
                     'here: their product must be that number')
  sizes = [devices // fixed if n == -1 else n for n in sizes]
  mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  rows = config.batch_size // max(config.gradient_accumulation_steps, 1)
  shards = mesh_size(mesh, 'B')
  if (config.gradient_accumulation_steps < 1 or rows < 1
      or config.batch_size % config.gradient_accumulation_steps
      or rows % shards):
    raise ValueError(
        f'batch_size ({config.batch_size}) must be a multiple of '
        f'gradient_accumulation_steps ({config.gradient_accumulation_steps}) '
        f'x mesh_data x mesh_fsdp ({shards})')
  evaluated = config.eval_batch_size or config.batch_size
  if evaluated % shards:
    raise ValueError(f'eval_batch_size ({evaluated}) must be a multiple of '
                     f'mesh_data x mesh_fsdp ({shards})')
  return mesh


def state_shardings(state, model, mesh):
  """Shardings of a TrainState: moments lie where their parameters lie.

  Args:
    state: the TrainState, abstract.
    model: the AbstractModel that it is of.
    mesh: the mesh.
  """
  specs = {name: spec(model.variables[name].letters, shape.shape, mesh)
           for name, shape in model.shapes.items()}

  def of(path, leaf):
    keys = [getattr(key, 'key', None) for key in path]
    name = next((k for k in keys if k in specs), None)
    same = name and leaf.shape == model.shapes[name].shape
    return NamedSharding(mesh, specs[name] if same else P())
  return jax.tree_util.tree_map_with_path(of, state)


def replicated(model, mesh):
  """The parameters that the rules would split but the mesh does not divide."""
  def whole(name, letters):
    shape = model.shapes[name].shape
    parts = tuple(spec(letters, shape, mesh))[len(shape) - len(letters):]
    return any(mesh_size(mesh, letter) > 1 and part is None
               for letter, part in zip(letters, parts))
  return [n for n, v in model.variables.items() if whole(n, v.letters)]


def global_batch(make, rows, mesh):
  """A batch over all processes, each making its own rows alone.

  Args:
    make: function of a slice of global rows -> {name: np.ndarray}.
    rows: how many rows the whole batch has.
    mesh: the mesh.

  Returns:
    {name: jax.Array [rows, ...]}, rows over data and fsdp.
  """
  sharding = NamedSharding(mesh, P(RULES['B']))
  places = sharding.addressable_devices_indices_map((rows,)).values()
  bounds = [index[0].indices(rows) for index in places]
  low, high = min(b[0] for b in bounds), max(b[1] for b in bounds)

  def spread(local):
    def part(index):
      start, stop, _ = index[0].indices(rows)
      return local[start - low:stop - low]
    return jax.make_array_from_callback(
        (rows, *local.shape[1:]), sharding, part)
  return jax.tree.map(spread, make(slice(low, high)))
