"""Runs put together: seeds of one config, learning rates of one variant."""

import collections
import dataclasses
import itertools
import statistics
import types

import attention
from configs import default, grid
from train_lib import results, significance

# Flags that change no number of a run, and the seed, which makes a sample.
_ASIDE = {*grid.OWN, *default.Sampling.__dataclass_fields__, 'seed',
          'wandb', 'wandb_name', 'wandb_group', 'wandb_notes', 'tensorboard',
          'profile_steps', 'kernel_check', 'allow_changed_data'}
_LAYERS = ('attention_list', 'attention_variant')
_TUNED = 'learning_rate'
# Scores on other data, or in other units, are not to be compared.
_DATA = ('dataset', 'tokenizer')


@dataclasses.dataclass(frozen=True)
class Cell:
  """Finished runs that differ in their seed alone.

  Attributes:
    learning_rate: theirs.
    runs: Results with a score, by seed.
  """
  learning_rate: float
  runs: list

  @property
  def scores(self):
    return [run.score for run in self.runs]

  @property
  def mean(self):
    return statistics.fmean(self.scores)

  @property
  def deviation(self):
    """The standard deviation over the seeds; None of a single one."""
    return statistics.stdev(self.scores) if len(self.runs) > 1 else None

  def values(self, name):
    """The last ones of a column, of the runs that have it."""
    return [run.last[name] for run in self.runs if name in run.last]

  def column(self, name):
    """The mean of a column over the runs that have it, or None."""
    found = self.values(name)
    return statistics.fmean(found) if found else None


@dataclasses.dataclass(frozen=True)
class Variant:
  """Finished runs that differ in seed and learning rate alone.

  Attributes:
    label: the flags that tell it from the others.
    data: what it was trained and scored on.
    cells: by learning rate.
    best: the cell of the best mean.
  """
  label: str
  data: tuple
  cells: list
  best: Cell

  @property
  def at_edge(self):
    """'lowest' or 'highest' if the best learning rate is that of several."""
    rates = [cell.learning_rate for cell in self.cells]
    if len(rates) > 1 and self.best.learning_rate in (rates[0], rates[-1]):
      first = self.best.learning_rate == rates[0]
      return 'lowest' if first else 'highest'
    return None


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two variants: how far apart, and how surely.

  Attributes:
    better, worse: the Variants, by mean score.
    difference: of the better one's mean.
    p: of Welch's t-test, corrected by Holm for all pairs; None if one of them
      has a single seed.
  """
  better: Variant
  worse: Variant
  difference: float
  p: float | None

  @property
  def resolved(self):
    return self.p is not None and self.p < significance.LEVEL


@dataclasses.dataclass(frozen=True)
class Comparison:
  """All that can be said of some runs.

  Attributes:
    metric: the column that they are compared by.
    variants: the best one first.
    pairs: Pairs of variants on the same data.
    differing: the flags with more than one value, beside the seed.
    common: {flag: value} of those that are not the default in any.
    runs: every Result, finished or not.
  """
  metric: str
  variants: list
  pairs: list
  differing: list
  common: dict
  runs: list


def compare(runs):
  """The Comparison of Results.

  Raises:
    ValueError: none of them has finished with a score.
  """
  scored = [run for run in runs if run.finished and run.metric]
  if not scored:
    raise ValueError('no run has finished with a validation loss or accuracy')
  metric = collections.Counter(
      run.metric for run in scored).most_common(1)[0][0]
  scored = [run for run in scored if run.metric == metric]
  values = {run.name: _values(run) for run in scored}
  flags = [flag for flag in default.fields() if flag not in _ASIDE]
  differing = [flag for flag in flags if len(
      {str(given[flag]) for given in values.values()}) > 1]
  variants = _variants(scored, values, differing, metric)
  first = values[scored[0].name]
  common = {flag: first[flag] for flag in flags if flag not in differing
            and first[flag] != default.fields()[flag].default}
  return Comparison(metric, variants, _pairs(variants, metric), differing,
                    common, runs)


def _values(run):
  """{flag: value} of a run; one that is older than a flag had its default."""
  return {flag: run.config.get(flag, field.default)
          for flag, field in default.fields().items()}


def _variants(scored, values, differing, metric):
  apart = [flag for flag in differing if flag != _TUNED]
  told = _telling(apart, values)
  found = collections.defaultdict(lambda: collections.defaultdict(list))
  for run in sorted(scored, key=lambda run: run.config.get('seed', 0)):
    given = values[run.name]
    key = tuple(str(given[flag]) for flag in apart)
    found[key][given[_TUNED]].append(run)
  sign = -1 if results.higher_is_better(metric) else 1
  variants = []
  for rates in found.values():
    cells = [Cell(rate, rates[rate]) for rate in sorted(rates)]
    given = values[cells[0].runs[0].name]
    variants.append(Variant(
        _label(told, given), tuple(given[flag] for flag in _DATA), cells,
        min(cells, key=lambda cell: sign * cell.mean)))
  return sorted(variants, key=lambda v: sign * v.best.mean)


def _telling(apart, values):
  """As few of the flags, layers first, as tell all variants apart.

  The width of an mlp that was fitted to a variant says nothing more.
  """
  told, kinds = [], 1
  order = sorted(apart, key=lambda f: (f not in _LAYERS, f == 'mlp_width'))
  for flag in order:
    now = len({tuple(str(given[f]) for f in (*told, flag))
               for given in values.values()})
    if now > kinds:
      told, kinds = [*told, flag], now
  return told


def _label(told, given):
  layers = given['attention_list']
  parts = [' '.join(layers) if layers else given['attention_variant']]
  parts += [f'{flag}={given[flag]}' for flag in told
            if flag not in _LAYERS and _says_something(flag, given)]
  return ', '.join(parts)


def _says_something(flag, given):
  """Whether a flag is no variant's own, or that of a layer of the run."""
  users = attention.users(flag)
  try:
    layers = attention.listed(types.SimpleNamespace(**given))
  except ValueError:  # Of a variant that is not here.
    return True
  return not users or any(layer.variant in users for layer in layers)


def _pairs(variants, metric):
  """Every two variants on the same data, tested."""
  both = [pair for pair in itertools.combinations(variants, 2)
          if pair[0].data == pair[1].data]
  tested = [significance.welch(a.best.scores, b.best.scores) for a, b in both]
  corrected = iter(significance.holm([p for p in tested if p is not None]))
  return [Pair(a, b, a.best.mean - b.best.mean,
               None if p is None else next(corrected))
          for (a, b), p in zip(both, tested)]
