"""The yardstick: what a table of pairs of tokens knows of a text."""

import numpy as np

LONGEST = 10_000_000  # tokens that are counted; more change no digit shown


def entropy(tokens):
  """H(x_t | x_{t-1}) of the tokens in nats, of the first LONGEST at most.

  What a model that sees one token back can reach at best on this very text.
  """
  tokens = np.asarray(tokens[:LONGEST], np.int64)
  if len(tokens) < 2:
    raise ValueError(f'{len(tokens)} tokens have no bigram: use 2 or more')
  pairs = tokens[:-1] * (tokens.max() + 1) + tokens[1:]

  counts = lambda ids: np.unique(ids, return_counts=True)[1]
  surprise = lambda count: (count * np.log(count)).sum() / len(pairs)
  return float(surprise(counts(tokens[:-1])) - surprise(counts(pairs)))


def loss(dataset, *, prior=0.1):
  """What a table of the training split's pairs gives on the validation split.

  In nats a token, of the first LONGEST tokens at most of each. What a model
  that sees one token back could learn; every pair is counted `prior` times
  more than it was seen.
  """
  train, val = (np.asarray(x[:LONGEST], np.int64)
                for x in (dataset.train, dataset.val))
  size = dataset.vocab_size
  pairs, counts = np.unique(train[:-1] * size + train[1:], return_counts=True)
  wanted = val[:-1] * size + val[1:]
  place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
  seen = np.where(pairs[place] == wanted, counts[place], 0)
  first = np.bincount(train[:-1], minlength=size)[val[:-1]]
  return float(np.log((first + prior * size) / (seen + prior)).mean())
