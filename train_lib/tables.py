"""The tables of a report: rows of text, whatever they are written as."""

import re
import statistics

from train_lib import metrics, results, significance

NONE = '–'


def number(value):
  """A number, or a dash."""
  return NONE if value is None else metrics.short(value)


def spread(cell):
  """Mean and standard deviation of a cell's scores."""
  deviation = cell.deviation
  return number(cell.mean) + (
      '' if deviation is None else f' ± {deviation:.2g}')


def summary(comparison):
  """The result in a sentence or two."""
  best, *others = comparison.variants
  direction = ('higher' if results.higher_is_better(comparison.metric)
               else 'lower')
  text = (f'{best.label} is best: {comparison.metric} {spread(best.best)} over '
          f'{seeds(len(best.best.runs))} ({direction} is better).')
  rivals = [pair for pair in comparison.pairs if pair.better is best]
  if not others:
    return text
  if not rivals:
    return text + ' The others have other data: they are not compared with it.'
  if any(pair.p is None for pair in rivals):
    return text + (' Variants with one seed cannot be told apart: give two or '
                   'more.')
  tied = [pair.worse.label for pair in rivals if not pair.resolved]
  if not tied:
    return text + ' Its lead over every other variant is resolved.'
  return text + f' Its lead over {"; ".join(tied)} is not resolved.'


def seeds(count):
  return f'{count} seed' + 's' * (count != 1)


def variants(comparison):
  """A row for each variant, at its best learning rate."""
  extra = _columns(comparison)
  head = ['variant', comparison.metric, 'n', 'learning rate', 'parameters',
          'state bytes', 'tokens', 'seconds', *extra]
  rows = []
  for variant in comparison.variants:
    cell, first = variant.best, variant.best.runs[0]
    edge = f' ({variant.at_edge} tried)' if variant.at_edge else ''
    rows.append([
        variant.label, spread(cell), str(len(cell.runs)),
        number(cell.learning_rate) + edge,
        number(first.record.get('parameters')), number(first.state_bytes()),
        number(first.last.get('tokens')),
        number(statistics.fmean(run.seconds for run in cell.runs)),
        *(number(cell.column(name)) for name in extra)])
  return [head, *rows]


def _columns(comparison):
  """The other scores that a run may have, slices among them."""
  found = {name for variant in comparison.variants
           for run in variant.best.runs for name in run.last
           if name.startswith('val_') or name == 'bits_per_byte'}
  # A quick evaluation says little beside that of the whole split.
  quick = {name for name in found
           if re.sub('^(val_loss|val_accuracy)', r'\1_full', name) in found}
  by_number = lambda name: [int(part) if part.isdigit() else part
                            for part in re.split(r'(\d+)', name)]
  return sorted(found - quick - {comparison.metric, 'val_tokens'},
                key=by_number)


def pairs(comparison):
  """A row for each two variants."""
  rows = [['better', 'worse', 'difference', 'p', '']]
  for pair in comparison.pairs:
    word = 'resolved' if pair.resolved else 'not resolved'
    if pair.p is None:
      word = 'not resolved: one seed'
    rows.append([pair.better.label, pair.worse.label,
                 f'{pair.difference:+.3g}', _p(pair.p), word])
  return rows


def _p(value):
  if value is None:
    return NONE
  return '<\u00a00.001' if value < 0.001 else f'{value:.3f}'


def rates(comparison):
  """A row for each variant and learning rate; none where none was tuned."""
  if all(len(variant.cells) == 1 for variant in comparison.variants):
    return []
  return [['variant', 'learning rate', comparison.metric, 'n', '']] + [
      [variant.label, number(cell.learning_rate), spread(cell),
       str(len(cell.runs)), 'best' if cell is variant.best else '']
      for variant in comparison.variants for cell in variant.cells]


def runs(comparison):
  """A row for each run, finished or not."""
  return [['run', 'state', 'score', 'step', 'seconds', 'error']] + [
      [run.name, run.state,
       f'{run.metric} {number(run.score)}' if run.metric else NONE,
       number(run.step), number(run.seconds),
       (run.error or '') if run.state == 'failed' else '']
      for run in comparison.runs]


def configs(comparison):
  """What differs between variants and what all have that is no default."""
  rows = [['flag', 'values']]
  for flag in comparison.differing:
    values = {str(run.config.get(flag)) for variant in comparison.variants
              for cell in variant.cells for run in cell.runs}
    rows.append([flag, ', '.join(sorted(values))])
  return rows + [[flag, f'{value} (all)']
                 for flag, value in comparison.common.items()]


def places(comparison):
  """Where and with what the runs were made, each different thing once."""
  rows = [['', '']]
  for name in ('commit', 'devices', 'jax', 'kernels', 'dataset_sha256'):
    found = {str(run.record[name]) for run in comparison.runs
             if run.record.get(name) is not None}
    if found:
      rows.append([name, '; '.join(sorted(found))])
  return rows


def notes(comparison):
  """What should be known before the numbers are believed."""
  lines = [
      'The score is that of the end of a run, not the best on the way. '
      'n: runs that differ in their seed alone; ±: their standard deviation.',
      "Resolved: Welch's t-test at each variant's best learning rate, "
      f'p < {significance.LEVEL} after the correction of Holm for all '
      f'{sum(pair.p is not None for pair in comparison.pairs)} pairs. Not '
      'resolved does not mean equal: more seeds may tell.']
  for variant in comparison.variants:
    if variant.at_edge:
      lines.append(
          f'{variant.label}: the best learning rate is the {variant.at_edge} '
          'that was tried, so a better one may lie beyond.')
  if any(len(variant.cells) > 1 for variant in comparison.variants):
    lines.append('Learning rates are chosen by the same scores that are '
                 'compared, which flatters variants with more of them.')
  else:
    lines.append('Every variant has one learning rate: none was tuned.')
  if len({variant.data for variant in comparison.variants}) > 1:
    lines.append('Variants on other data or with another tokenizer are listed, '
                 'and not tested against each other.')
  other = [r.name for r in comparison.runs if r.finished
           and r.metric != comparison.metric]
  if other:
    lines.append(f'Without {comparison.metric}, and left out: '
                 + ', '.join(other))
  unfinished = [r.name for r in comparison.runs if not r.finished]
  if unfinished:
    lines.append(f'{len(unfinished)} of {len(comparison.runs)} runs have not '
                 'finished and are left out of all means.')
  return lines
