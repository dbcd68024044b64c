"""Memory-efficient attention in plain jnp, shaped for XLA on CPU.

docs/kernels.md has the design. The online softmax is Milakov and Gimelshein's
(https://arxiv.org/abs/1805.02867), the backward pass that of FlashAttention
(https://arxiv.org/abs/2205.14135). Tiles are [queries, keys] in the forward
pass and [keys, queries] in the backward pass: with these, no matmul reads its
left side transposed, which takes XLA:CPU twice the time.
"""

import jax
import jax.numpy as jnp

from attention.kernels.flash import plain
from attention.kernels.flash.plain import check

__all__ = ['backward', 'check', 'forward']

# Rows (queries times heads of a group) and columns of a tile: 1 MiB of scores.
ROWS = 512
COLUMNS = 512
# Up to so many scores of a key head are computed at once.
UNCUT_SCORES = 256 * 512
# Up to so many queries read a cache where it lies, so many keys at a time.
DECODE_QUERIES = 16
DECODE_KEYS = 2048


def forward(operands, rule):
  """Returns out [B,T,N,V] and lse [B,N,T]; see the package."""
  q, k, v, q_ids, kv_ids, _, row_bias, column_bias = operands
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  G = N // K
  if T <= DECODE_QUERIES:
    return _decode(operands, rule)
  if G * T * S <= UNCUT_SCORES:
    return plain.forward(operands, rule)
  tiles = _Tiles(operands, rule)
  accumulator = jnp.promote_types(q.dtype, jnp.float32)

  def one_head(operands):
    q, k, v, q_ids, kv_ids, row_bias, column_bias = operands

    def one_block(operands):
      i, q, q_ids, row_bias = operands

      def one_tile(masked, j, carry):
        acc, top, total = carry
        keys = _block(k, j, tiles.columns)
        s = _scores(q, keys, rule)[0]
        if row_bias is not None:
          s += tiles.bias(row_bias, [c[j] for c in column_bias])
        if masked:
          seen = tiles.seen(i, j, q_ids, kv_ids)
          s = jnp.where(jnp.tile(seen, (G, 1)), s, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(s, axis=1))
        shift = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
        p = jnp.exp(s - shift[:, None])
        kept = jnp.exp(top - shift)
        total = total * kept + jnp.sum(p, axis=1)
        values = _block(v, j, tiles.columns)
        acc = acc * kept[:, None] + _dot(p.astype(v.dtype), values, 1, 0)
        return acc, new_top, total

      rows = q.shape[0]
      carry = (jnp.zeros_like(q, accumulator, shape=(rows, v.shape[1])),
               jnp.full_like(q, -jnp.inf, accumulator, shape=(rows,)),
               jnp.zeros_like(q, accumulator, shape=(rows,)))
      acc, top, total = tiles.loop(tiles.keys_of(i), one_tile, carry)
      out = acc / jnp.where(total == 0, 1.0, total)[:, None]
      return out.astype(q.dtype), top + jnp.log(total)

    return jax.lax.map(one_block, (tiles.row_blocks(), q, q_ids, row_bias))

  operands = (tiles.split_queries(q), tiles.split_keys(k), tiles.split_keys(v),
              *tiles.split_ids(q_ids, kv_ids, K),
              *tiles.split_bias(row_bias, column_bias))
  out, lse = jax.lax.map(one_head, operands)
  lse = tiles.join_queries(lse[..., None], B)[..., 0]
  return tiles.join_queries(out, B), jnp.swapaxes(lse, 1, 2)


def backward(operands, rule, saved, dout):
  """Returns the gradients of q, k, v and of a bias; see the package."""
  q, k, v, q_ids, kv_ids, _, row_bias, column_bias = operands
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  G = N // K
  if T <= DECODE_QUERIES or G * T * S <= UNCUT_SCORES:
    return plain.backward(operands, rule, saved, dout)
  tiles = _Tiles(operands, rule)
  accumulator = jnp.promote_types(q.dtype, jnp.float32)

  def one_head(operands):
    q, k, v, q_ids, kv_ids, row_bias, column_bias, dout, lse, delta = operands

    def one_block(carry, operands):
      j, keys, values, column_bias = operands
      keys_transposed = keys.T

      def one_tile(masked, i, carry):
        (dq, drow), (dk, dv, dcolumn) = carry
        s, slope = _scores(keys, q[i], rule)
        if row_bias is not None:
          s += tiles.bias(
              [r[i] for r in row_bias], column_bias, transposed=True)
        p = jnp.exp(s - lse[i])
        if masked:
          seen = tiles.seen(i, j, None if q_ids is None else q_ids[i], kv_ids)
          p = jnp.where(jnp.tile(seen.T, (1, G)), p, 0.0)
        dp = _dot(values, dout[i], 1, 1)
        ds = p * (dp - delta[i])
        if row_bias is not None:
          drow = drow.at[i].add(ds.sum(0))
          dcolumn -= ds.reshape(*dcolumn.shape, -1).sum(2)
        ds = (ds * slope).astype(q.dtype)
        dv += _dot(p.astype(q.dtype), dout[i], 1, 0)
        dk += _dot(ds, q[i], 1, 0)
        dq = dq.at[i].add(_dot(keys_transposed, ds, 1, 0))
        return (dq, drow), (dk, dv, dcolumn)

      sums = (jnp.zeros_like(keys, accumulator),
              jnp.zeros_like(values, accumulator),
              biased(jnp.zeros_like(keys, accumulator, shape=(len(keys), G))))
      carry, (dk, dv, dcolumn) = tiles.loop(
          tiles.queries_of(j), one_tile, (carry, sums))
      return carry, ((dk * rule.scale).astype(q.dtype), dv.astype(q.dtype),
                     dcolumn)

    biased = lambda x: None if row_bias is None else x
    blocks, rows, _ = q.shape
    dq = jnp.zeros_like(q, accumulator, shape=(blocks, H, rows))
    drow = biased(jnp.zeros_like(q, accumulator, shape=(blocks, rows)))
    cut = lambda x: x.reshape(tiles.n_columns, tiles.columns, -1)
    (dq, drow), (dk, dv, dcolumn) = jax.lax.scan(
        one_block, (dq, drow),
        (jnp.arange(tiles.n_columns), cut(k), cut(v), column_bias))
    dq = jnp.swapaxes(dq * rule.scale, 1, 2).astype(q.dtype)
    return dq, dk, dv, drow, dcolumn

  operands = (tiles.split_queries(q), tiles.split_keys(k), tiles.split_keys(v),
              *tiles.split_ids(q_ids, kv_ids, K),
              *tiles.split_bias(row_bias, column_bias),
              tiles.split_queries(dout),
              *(tiles.split_queries(jnp.swapaxes(x, 1, 2)[..., None])[..., 0]
                for x in saved))
  dq, dk, dv, drow, dcolumn = jax.lax.map(one_head, operands)
  dbias = () if row_bias is None else (
      tiles.join_queries(drow[..., None], B)[..., 0],
      tiles.join_keys(dcolumn, B).reshape(B, S, N))
  return (tiles.join_queries(dq, B), tiles.join_keys(dk, B),
          tiles.join_keys(dv, B), *dbias)


def _decode(operands, rule):
  """Few queries: merges the blocks of keys that they can see.

  Laying a whole cache out by heads, as the tiles want it, costs more than the
  attention.
  """
  q, k, v, _, kv_ids, q_offset, _, column_bias = operands
  T, S = q.shape[1], k.shape[1]
  keys = dict(k=k, v=v, kv_ids=kv_ids, column_bias=column_bias)

  def partial(start, size):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
    return plain.forward(operands._replace(
        **jax.tree.map(cut, keys), q_offset=q_offset - start), rule)

  def merge(j, carry):
    out, lse = carry
    new_out, new_lse = partial(j * DECODE_KEYS, DECODE_KEYS)
    total = jnp.logaddexp(lse, new_lse)
    shift = jnp.where(jnp.isneginf(total), 0.0, total)
    share = lambda x: jnp.swapaxes(jnp.exp(x - shift), 1, 2)[..., None]
    return out * share(lse) + new_out * share(new_lse), total

  count = -(-S // DECODE_KEYS) - 1
  out, lse = partial(count * DECODE_KEYS, S - count * DECODE_KEYS)
  if count:
    start, stop = 0, count
    if rule.causal:
      stop = jnp.clip(-(-(q_offset + T) // DECODE_KEYS), 0, count)
    if rule.window:
      start = jnp.clip((q_offset - rule.window + 1) // DECODE_KEYS, 0, stop)
    out, lse = jax.lax.fori_loop(
        start, stop, merge, (out.astype(lse.dtype), lse))
  return out.astype(q.dtype), lse


class _Tiles:
  """How queries and keys are cut, and which tiles are empty, full or mixed."""

  def __init__(self, operands, rule):
    self.T, N = operands.q.shape[1:3]
    self.S, K = operands.k.shape[1:3]
    self.G = N // K
    self.rule, self.q_offset = rule, operands.q_offset
    self.segmented = operands.q_ids is not None
    self.n_rows, self.rows = _cut(self.T, max(ROWS // self.G, 1))
    self.n_columns, self.columns = _cut(self.S, COLUMNS)

  def row_blocks(self):
    return jnp.arange(self.n_rows)

  def keys_of(self, i):
    """Bounds (first, first full, end of full, end) of key blocks of block i."""
    first = i * self.rows + self.q_offset
    last = first + self.rows - 1
    start = full_start = 0
    end, full_end = self.S, self.S
    if self.rule.causal:
      end, full_end = jnp.clip(last + 1, 0, end), jnp.minimum(first + 1, end)
    if self.rule.window:
      start = jnp.clip(first - self.rule.window + 1, 0, end)
      full_start = last - self.rule.window + 1
    return self._bounds(start, full_start, full_end, end, self.columns,
                        self.n_columns)

  def queries_of(self, j):
    """The same of query blocks, for key block j."""
    first = j * self.columns - self.q_offset
    last = first + self.columns - 1
    start = full_start = 0
    end = full_end = self.n_rows * self.rows
    if self.rule.causal:
      start, full_start = jnp.clip(first, 0, end), last
    if self.rule.window:
      end = jnp.clip(last + self.rule.window, 0, end)
      full_end = first + self.rule.window
    # Padded keys must not reach dq; padded queries have zero cotangents.
    full_end = jnp.where((j + 1) * self.columns > self.S, 0, full_end)
    return self._bounds(start, full_start, full_end, end, self.rows,
                        self.n_rows)

  def _bounds(self, start, full_start, full_end, end, size, count):
    first, stop = start // size, jnp.minimum((end + size - 1) // size, count)
    stop = jnp.maximum(first, stop)
    if self.segmented:
      return first, stop, stop, stop
    full_first = jnp.clip((full_start + size - 1) // size, first, stop)
    return first, full_first, jnp.clip(full_end // size, full_first, stop), stop

  def loop(self, bounds, one_tile, carry):
    """Runs the full tiles without a mask, then those at the edges with it."""
    first, full_first, full_stop, stop = bounds
    if not self.segmented:
      carry = jax.lax.fori_loop(
          full_first, full_stop, lambda j, c: one_tile(False, j, c), carry)
    before = full_first - first

    def edge(n, carry):
      skipped = jnp.where(n < before, first, full_stop - before)
      return one_tile(True, n + skipped, carry)

    return jax.lax.fori_loop(0, before + stop - full_stop, edge, carry)

  def seen(self, i, j, q_ids, kv_ids):
    """The mask [rows, columns] of one tile."""
    row = i * self.rows + jnp.arange(self.rows) + self.q_offset
    column = j * self.columns + jnp.arange(self.columns)
    seen = plain.visible(row, column, None, None, self.rule)
    if self.n_columns * self.columns != self.S:
      seen &= column < self.S
    if q_ids is not None:
      seen &= q_ids[:, None] == _block(kv_ids, j, self.columns)
    return seen

  def bias(self, row, column, *, transposed=False):
    """The bias of the scores of one tile, [G rows, columns] or transposed.

    Args:
      row: of each addend [G,rows], of `split_bias`.
      column: of each addend [G,columns], likewise.
      transposed: whether keys come first, as in the backward pass.
    """
    if transposed:
      tile = plain.difference(row, [c.T[..., None] for c in column])
      return tile.reshape(self.columns, -1)
    tile = plain.difference(
        [r[..., None] for r in row], [c[:, None] for c in column])
    return tile.reshape(-1, self.columns)

  def split_bias(self, row, column):
    """[B,T,N,A], [B,S,N,A] -> A of [B K, blocks, G, rows or columns] each.

    Arrays of their own: to cut an addend out of one array in every tile costs
    XLA:CPU half the time of the backward pass. The bias of padded queries is
    -inf: their weights are zero whatever the keys have.
    """
    if row is None:
      return None, None
    B, S, N, A = column.shape
    row = self.split_queries(row, padding=-jnp.inf)
    row = row.reshape(-1, self.n_rows, self.G, self.rows, A)
    column = self.split_keys(column.reshape(B, S, N // self.G, -1))
    column = column.reshape(-1, self.n_columns, self.columns, self.G, A)
    return ([row[..., a] for a in range(A)],
            [jnp.swapaxes(column[..., a], 2, 3) for a in range(A)])

  def split_queries(self, x, padding=0.0):
    """[B,T,N,X] -> [B K, blocks, G rows, X]."""
    B, _, N, X = x.shape
    x = _pad(x, self.n_rows * self.rows, padding)
    x = x.reshape(B, self.n_rows, self.rows, N // self.G, self.G, X)
    x = jnp.transpose(x, (0, 3, 1, 4, 2, 5))
    return x.reshape(-1, self.n_rows, self.G * self.rows, X)

  def join_queries(self, x, B):
    """[B K, blocks, G rows, X] -> [B,T,N,X]."""
    X = x.shape[-1]
    x = x.reshape(B, -1, self.n_rows, self.G, self.rows, X)
    x = jnp.transpose(x, (0, 2, 4, 1, 3, 5))
    return x.reshape(B, self.n_rows * self.rows, -1, X)[:, :self.T]

  def split_keys(self, x):
    """[B,S,K,X] -> [B K, padded S, X]."""
    x = jnp.swapaxes(_pad(x, self.n_columns * self.columns), 1, 2)
    return x.reshape(-1, *x.shape[2:])

  def join_keys(self, x, B):
    """[B K, blocks, columns, X] -> [B,S,K,X]."""
    x = x.reshape(B, -1, self.n_columns * self.columns, x.shape[-1])
    return jnp.swapaxes(x, 1, 2)[:, :self.S]

  def split_ids(self, q_ids, kv_ids, K):
    """[B,T], [B,S] -> [B K, blocks, rows], [B K, padded S]."""
    if q_ids is None:
      return None, None
    q_ids = _pad(q_ids, self.n_rows * self.rows)
    q_ids = q_ids.reshape(-1, self.n_rows, self.rows)
    kv_ids = _pad(kv_ids, self.n_columns * self.columns)
    return jnp.repeat(q_ids, K, axis=0), jnp.repeat(kv_ids, K, axis=0)


def _scores(a, b, rule):
  """Scores of two blocks and d score / d (scale a b), 1 without a softcap."""
  s, softcap = _dot(a, b, 1, 1) * rule.scale, rule.softcap
  if not softcap:
    return s, 1.0
  bounded = jnp.tanh(s / softcap)
  return softcap * bounded, 1 - bounded * bounded


def _dot(a, b, a_axis, b_axis):
  return jax.lax.dot_general(
      a, b, (((a_axis,), (b_axis,)), ((), ())),
      preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _block(x, index, size):
  return jax.lax.dynamic_slice_in_dim(x, index * size, size)


def _cut(length, block):
  """Number and size of blocks of about `block` with the least padding."""
  count = -(-length // block)
  size = -(-length // count)
  return count, min(-(-size // 16) * 16, block)


def _pad(x, length, value=0):
  widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths, constant_values=value)

