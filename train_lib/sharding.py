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
  return mesh


def state_shardings(state, skeleton, mesh):
  """Shardings of a TrainState: moments lie where their parameters lie.

  Args:
    state: the TrainState, abstract.
    skeleton: of its model.
    mesh: the mesh.
  """
  specs = {name: spec(skeleton.variables[name].letters, shape.shape, mesh)
           for name, shape in skeleton.shapes.items()}

  def of(path, leaf):
    keys = [getattr(key, 'key', None) for key in path]
    name = next((k for k in keys if k in specs), None)
    same = name and leaf.shape == skeleton.shapes[name].shape
    return NamedSharding(mesh, specs[name] if same else P())
  return jax.tree_util.tree_map_with_path(of, state)


def replicated(skeleton, mesh):
  """The parameters that the rules would split but the mesh does not divide."""
  def whole(name, letters):
    shape = skeleton.shapes[name].shape
    parts = tuple(spec(letters, shape, mesh))[len(shape) - len(letters):]
    return any(mesh_size(mesh, letter) > 1 and part is None
               for letter, part in zip(letters, parts))
  return [n for n, v in skeleton.variables.items() if whole(n, v.letters)]


def global_batch(make, shape_of_rows, mesh):
  """A batch over all processes, each making its own rows alone.

  Args:
    make: function of a slice of global rows -> {name: np.ndarray}.
    shape_of_rows: number of rows of the whole batch.
    mesh: the mesh.

  Returns:
    {name: jax.Array [rows, ...]}, rows over data and fsdp.
  """
  sharding = NamedSharding(mesh, P(RULES['B']))
  probe = sharding.addressable_devices_indices_map((shape_of_rows,))
  starts = [index[0].indices(shape_of_rows) for index in probe.values()]
  low, high = min(s[0] for s in starts), max(s[1] for s in starts)
  local = make(slice(low, high))
  return {
      name: jax.make_array_from_callback(
          (shape_of_rows, *rows.shape[1:]), sharding,
          lambda index, rows=rows: rows[
              index[0].indices(shape_of_rows)[0] - low:
              index[0].indices(shape_of_rows)[1] - low])
      for name, rows in local.items()}
