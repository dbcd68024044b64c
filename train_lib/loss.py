"""Next-token cross-entropy that never holds [B, T, vocab] at once."""

import typing

import jax
import jax.numpy as jnp

# Bytes of float32 logits that one device may hold at once.
LOGITS_BYTES = 2 ** 27


class Sums(typing.NamedTuple):
  """Over the targets: the losses with the z-loss and without, in float32, the
  likeliest tokens that were right, and how many targets there are; of masks
  all but the first as arrays [1+M], of all targets and of each mask's."""
  total: jax.Array
  plain: jax.Array
  correct: jax.Array
  number: jax.Array


def targets_of(batch):
  """(inputs, targets, segment_ids) of a batch.

  Of T + 1 tokens a row the inputs are the first T, and their targets [B,T] the
  last; where a batch has 'targets' [B,P], all T tokens are inputs, and the
  targets belong to its 'places' [B,P] among them. A target is -1 where there
  is none: padding (token -1), or the first token of another document.
  """
  tokens, ids = batch['tokens'], batch.get('segment_ids')
  if 'places' in batch:
    return jnp.maximum(tokens, 0), batch['targets'], ids
  inputs, targets = jnp.maximum(tokens[:, :-1], 0), tokens[:, 1:]
  if ids is None:
    return inputs, targets, None
  return inputs, jnp.where(ids[:, 1:] == ids[:, :-1], targets, -1), ids[:, :-1]


def at_targets(hidden, batch):
  """The rows of hidden [B,T,D] that targets_of belong to: [B,P,D], or all."""
  places = batch.get('places')
  return hidden if places is None else jnp.take_along_axis(
      hidden, places[..., None], axis=1)


def cross_entropy(model, hidden, targets, *, masks=None, z_loss=0.0, shards=1):
  """Sums over the targets, in float32.

  Args:
    model: for its `logits`.
    hidden: [B,T,D].
    targets: int32 [B,T], -1 where there is none.
    masks: bool [B,T,M] of targets, or None.
    z_loss: weight of the squared log normaliser.
    shards: devices that the rows are spread over.

  Returns:
    The Sums.
  """
  B, T, D = hidden.shape
  parts = _parts(T, B * T * model.vocab_size * 4 // shards)

  def part(x, y, masks):
    logits = model.logits(x)
    normaliser = jax.nn.logsumexp(logits, -1)
    picked = jnp.take_along_axis(logits, jnp.maximum(y, 0)[..., None], -1)
    valid = y >= 0
    loss = jnp.where(valid, normaliser - picked[..., 0], 0)
    penalty = jnp.where(valid, normaliser * normaliser, 0).sum()
    correct = (valid & (logits.argmax(-1) == y)).astype(jnp.int32)
    return (loss.sum() + z_loss * penalty, _count(loss, masks),
            _count(correct, masks))

  if parts == 1:
    sums = part(hidden, targets, masks)
  else:
    # The logits of a part are computed again in its backward pass.
    split = lambda x: jnp.moveaxis(
        x.reshape(B, parts, T // parts, *x.shape[2:]), 1, 0)
    arrays = jax.tree.map(split, (hidden, targets, masks))
    zero = _count(jnp.zeros((1, 1)), None if masks is None else masks[:1, :1])
    sums, _ = jax.lax.scan(
        lambda total, part_of: (jax.tree.map(
            jnp.add, total, jax.checkpoint(part)(*part_of)), None),
        (jnp.float32(0), zero, zero.astype(jnp.int32)), arrays)
  return Sums(*sums, _count((targets >= 0).astype(jnp.int32), masks))


def _count(values, masks):
  """The sum of values [B,T], and with masks those over each: [1+M]."""
  if masks is None:
    return values.sum()
  inside = jnp.where(masks, values[..., None], 0).sum((0, 1))
  return jnp.concatenate([values.sum()[None], inside])


def _parts(length, size):
  """The fewest equal parts of T whose logits fit LOGITS_BYTES."""
  return next(n for n in range(1, length + 1)
              if length % n == 0 and (size <= n * LOGITS_BYTES or n == length))
