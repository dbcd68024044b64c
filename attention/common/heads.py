"""Heads: how many, how wide, and the projections into them."""

from model.layers import Einsum, mesh_size


def head_width(config):
  """H, the width of heads that share n_embd."""
  if config.n_embd % config.n_head:
    raise ValueError(f'n_head ({config.n_head}) must divide n_embd '
                     f'({config.n_embd})')
  return config.n_embd // config.n_head


def check_groups(flag, groups, n_head):
  """Raises unless the heads fall into so many groups of one size."""
  if groups < 1 or n_head % groups:
    divisors = [str(d) for d in range(1, n_head + 1) if n_head % d == 0]
    raise ValueError(f'{flag} ({groups}) must divide n_head ({n_head}): use '
                     + ' or '.join(filter(None, (
                         ', '.join(divisors[:-1]), divisors[-1]))))


def kv_heads(config, options):
  """K, checked against n_head."""
  groups = (config.n_head if options.n_kv_group is None
            else options.n_kv_group)
  check_groups('n_kv_group', groups, config.n_head)
  return groups


def head_shards(ctx, n_head):
  """The shards over which the mesh lays n_head heads."""
  shards = mesh_size(ctx.mesh, 'heads')
  if n_head % shards:
    raise ValueError(f'mesh_tensor ({shards}) must divide n_head ({n_head})')
  return shards


def qkv(config, *, groups, widths, rngs):
  """The projections to N queries and to so many keys and values.

  Args:
    config: the flags.
    groups: K.
    widths: (H, V).
    rngs: of nnx.
  """
  D, N, (H, V) = config.n_embd, config.n_head, widths
  dense = dict(std=config.init_std, bias=config.bias, rngs=rngs)
  return (
      Einsum('BTD,DNH->BTNH', (D, N, H), axes=('embed', 'heads', None),
             **dense),
      Einsum('BTD,DKH->BTKH', (D, groups, H), axes=('embed', 'kv_heads', None),
             **dense),
      Einsum('BTD,DKV->BTKV', (D, groups, V), axes=('embed', 'kv_heads', None),
             **dense))


def out(config, *, heads, width, rngs):
  """The projection of heads back to the model's width.

  GPT-2: the 2 L sums of the residual stream keep its variance.
  """
  return Einsum(
      'BTNV,NVD->BTD', (heads, width, config.n_embd),
      axes=('heads', None, 'embed'), bias=config.bias, rngs=rngs,
      std=config.init_std / (2 * config.n_layer) ** 0.5)
