"""README's example variant is a variant like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from model.layers import segment_positions
from model.sharding import Context
from tests.attention import cases, oracles, readme

IDS = np.repeat([[0, 0, 1], [3, 2, 2]], 4, axis=1)


@pytest.fixture(autouse=True)
def variant(tmp_path):
  with readme.variant(tmp_path):
    yield


def mean(mixer, x, ids):
  """One token at a time."""
  values, y = oracles.dense(mixer.value, x), []
  for b, t in np.ndindex(ids.shape):
    start = t - list(ids[b, :t + 1][::-1] == ids[b, t]).index(False) + 1 if (
        ids[b, :t + 1] != ids[b, t]).any() else 0
    y.append(mixer.scale * values[b, start:t + 1].mean(0))
  return oracles.dense(mixer.out, np.reshape(y, values.shape))


def build(**flags):
  config = cases.config(attention_variant=readme.NAME, **flags)
  attention.check(config)
  return attention.build(readme.NAME, config, rngs=nnx.Rngs(0))


def test_it_is_short():
  assert len(readme.source().splitlines()) <= 35


def test_it_is_its_equation_packed_and_continued():
  mixer, x = build(mean_scale=2.0), cases.inputs(12)
  ids, positions = jnp.asarray(IDS), segment_positions(jnp.asarray(IDS))
  run = jax.jit(lambda x, ctx, state: mixer(x, ctx, state))
  whole, _ = run(x, Context(positions, ids), None)
  cases.close(whole, mean(mixer, np.asarray(x, np.float64), IDS), 1e-5)
  state, parts = mixer.init_state(2, 12), []
  for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
    y, state = run(x[:, part], Context(positions[:, part], ids[:, part]), state)
    parts.append(y)
  cases.close(jnp.concatenate(parts, 1), whole)


def test_a_mesh_changes_nothing():
  mixer, x = build(), cases.inputs(12)
  mesh = jax.make_mesh((1, 2, 4), ('data', 'fsdp', 'tensor'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  one, many = (jax.jit(lambda x, mesh=mesh: mixer(
      x, Context(cases.counted(x), mesh=mesh))[0])(x) for mesh in (None, mesh))
  cases.close(many, one)


def test_its_flag_has_a_range():
  with pytest.raises(ValueError, match=r'mean_scale \(-1.0\) must be more'):
    build(mean_scale=-1.0)
