"""Every variant, compiled for the chips of a TPU slice that is not there.

jax refuses a Pallas kernel that several chips run outside of jax.shard_map.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import attention
from attention.kernels import dispatch
from model.sharding import Context
from tests.attention import cases, readme
from tests.kernels import accelerators

# Which op each variant must run, and those that have a Pallas kernel.
OPS = {'causal': 'flash', 'differential': 'flash', 'infinite': 'flash',
       'mla': 'flash', 'rglru': 'scan', 'ssm': 'scan', 'identity': None,
       **dict.fromkeys(
           ('deltanet', 'gated_deltanet', 'gla', 'hgrn2', 'kda'), 'delta')}
KERNELS = ('flash', 'scan', 'chunked')


@pytest.mark.slow
@pytest.mark.parametrize('name', [*attention.names(), readme.NAME])
def test_compiles_for_a_slice(name, tmp_path):
  devices = np.reshape(accelerators.tpus('v5p', 'v5p:2x2x2'), (2, 2, 2))
  mesh = Mesh(devices, ('data', 'fsdp', 'tensor'),
              axis_types=(AxisType.Auto,) * 3)
  with contextlib.ExitStack() as stack:
    if name == readme.NAME:
      stack.enter_context(readme.variant(tmp_path))
    stack.enter_context(dispatch.pretend('tpu', 'v5p'))
    choices = stack.enter_context(dispatch.record())
    config = cases.config(
        attention_variant=name, n_embd=512, n_head=4, block_size=256,
        compute_dtype='bfloat16')
    mixer = jax.eval_shape(
        lambda: attention.build(name, config, rngs=nnx.Rngs(0)))
    whole = NamedSharding(mesh, P())
    mixer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=whole), mixer)
    x = jax.ShapeDtypeStruct(
        (4, 256, 512), jnp.bfloat16,
        sharding=NamedSharding(mesh, P(('data', 'fsdp'))))

    def loss(mixer, x):
      ids = jnp.zeros(x.shape[:2], jnp.int32)
      y, _ = mixer(x, Context(cases.counted(x), ids, mesh=mesh))
      return (y.astype(jnp.float32) ** 2).sum()
    text = jax.jit(jax.grad(loss)).lower(mixer, x).compile().as_text()
  op = OPS.get(name, 'chunked')
  made = {'tpu': ''} if op in KERNELS else {'xla': ''}
  assert choices == ({f'attention.kernels.{op}': made} if op else {})
  assert ('tpu_custom_call' in text) == (op in KERNELS)
