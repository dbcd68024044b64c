"""Plots of a comparison as SVG that takes the colours of its page."""

import collections
import dataclasses
import html
import io
import re
import statistics

from train_lib import metrics, results, tasks

# Okabe and Ito's colours, told apart by the colour-blind, on light and dark.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9',
           '#8c6d31', '#7b61b8')
DASHES = {'-': '', '--': '6 3', ':': '2 2', '-.': '6 2 2 2'}
STYLES = tuple(DASHES)
# Stands for the page's own colour of text until the plot is text itself.
INK = '#010203'
SIZE = 4.6, 3.2  # Inches, of which a page makes what it has room for.
ROW = 13  # Points from one line of a key to the next.


def matplotlib():
  """The package, set up; ValueError where it is missing."""
  try:
    import matplotlib as package
  except ImportError:
    raise ValueError('--mode=report needs the package matplotlib: '
                     "pip install -e '.[report]'") from None
  package.use('agg')
  package.rcParams.update({
      'svg.fonttype': 'none', 'font.family': 'sans-serif', 'font.size': 9,
      'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': INK,
      'xtick.color': INK, 'ytick.color': INK, 'axes.grid': True,
      'grid.color': INK, 'grid.alpha': 0.15, 'axes.spines.top': False,
      'axes.spines.right': False, 'figure.constrained_layout.use': True})
  return package


def plots(comparison):
  """[(title, what it shows, SVG)] of a comparison."""
  matplotlib()
  column = comparison.metric.removesuffix('_full')
  found = _slices(comparison)
  for x, of in (('steps', lambda run, row: row['step']),
                ('tokens', lambda run, row: row.get('tokens')),
                ('seconds', lambda run, row: row.get('elapsed_s')),
                ('FLOPs', _flops)):
    svg = _curves(comparison, column, x, of)
    if svg:
      found.append((f'{column} over {x}', 'Thick: the mean over the seeds at '
                    'the best learning rate; thin: each seed.', svg))
  svg = _curves(comparison, 'loss', 'steps', lambda run, row: row['step'])
  if svg:
    found.append(('training loss over steps', 'As above.', svg))
  if any(v.best.runs[0].state_bytes() is not None for v in comparison.variants):
    found.append((
        f'{comparison.metric} against state',
        'Bytes that decoding a sequence of block_size tokens keeps; bars: '
        'standard deviation over the seeds.', _state(comparison)))
  if any(len(variant.cells) > 1 for variant in comparison.variants):
    found.append((
        f'{comparison.metric} against learning rate', 'Rings: the best of each '
        'variant; bars: standard deviation over the seeds.',
        _rates(comparison)))
  return found


def legend(comparison):
  """[(label, colour, style)] of the variants, as all plots draw them."""
  return [(variant.label, COLOURS[i % len(COLOURS)],
           STYLES[i // len(COLOURS) % len(STYLES)])
          for i, variant in enumerate(comparison.variants)]


def _flops(run, row):
  each = run.record.get('flops_per_token')
  return each and row.get('tokens') and each * row['tokens']


def _curves(comparison, column, x, of):
  """A column over something; None where no run has both."""
  figure, axes = _figure(x, column)
  for variant, (_, colour, style) in zip(
      comparison.variants, legend(comparison)):
    points = collections.defaultdict(list)  # {step: (x, y) of each seed}
    for run in variant.best.runs:
      rows = [(row['step'], of(run, row), row[column]) for row in run.rows
              if row.get(column) is not None and of(run, row) is not None]
      for step, at, value in rows:
        points[step].append((at, value))
      if len(variant.best.runs) > 1:
        axes.plot([at for _, at, _ in rows], [y for *_, y in rows],
                  color=colour, linewidth=0.6, alpha=0.45)
    whole = [[statistics.fmean(part) for part in zip(*points[step])]
             for step in sorted(points)
             if len(points[step]) == max(map(len, points.values()))]
    if whole:
      axes.plot(*zip(*whole), style, color=colour, linewidth=1.8,
                marker='o' if len(whole) == 1 else None)
  return _svg(figure, f'{column} over {x}') if axes.lines else None


def _slices(comparison):
  """[(title, what it shows, SVG)] of the score over what slices change."""
  first = comparison.variants[0]
  axis = _axis(first.best.runs[0])
  if axis is None:
    return []
  option, parts = axis
  figure, axes = _figure(option, comparison.metric)
  axes.set_xscale('log', base=2)
  axes.set_xticks(ticks := sorted(value for value, _ in parts.values()),
                  [_tick(at) for at in ticks], minor=False)
  axes.minorticks_off()
  for variant, (_, colour, style) in zip(
      comparison.variants, legend(comparison)):
    points = []
    for mark, (value, _) in parts.items():
      scores = variant.best.values(comparison.metric + mark)
      if scores and variant.data == first.data:
        points.append((value, statistics.fmean(scores), (
            statistics.stdev(scores) if len(scores) > 1 else 0.0)))
    if points:
      axes.errorbar(*zip(*sorted(points)), color=colour, linestyle=style,
                    capsize=2, marker='.')
  axes.plot(*zip(*sorted(parts.values())), ':', color=INK, alpha=0.6)
  trained, _ = parts['']
  return [(f'{comparison.metric} against {option}', f'Trained at {trained}; '
           'dotted: chance; bars: standard deviation over the seeds.',
           _svg(figure, f'{comparison.metric} against {option}'))]


def _axis(run):
  """(option, {what a column ends with: (its value, chance)}), or None.

  Of the option of a task by whose values its slices are told apart.
  """
  entries = run.config.get('eval_slices')
  if not entries or not tasks.named(run.config['dataset']):
    return None
  task = tasks.parse(run.config['dataset'])
  parts = {'': task} | {f'[{entry}]': part for entry, part in tasks.slices(
      task, entries).items()}
  for field in dataclasses.fields(task):
    values = [getattr(part, field.name) for part in parts.values()]
    if len(set(values)) == len(values) and all(
        type(value) in (int, float) and value > 0 for value in values):
      return field.name, {mark: (value, part.chance) for value, (
          mark, part) in zip(values, parts.items(), strict=True)}
  return None


def _state(comparison):
  from matplotlib import ticker
  figure, axes = _figure('state, bytes', comparison.metric)
  sizes, points = [], []
  for variant, (label, colour, _) in zip(
      comparison.variants, legend(comparison)):
    size = variant.best.runs[0].state_bytes()
    if size is not None:
      sizes.append(size)
      axes.errorbar(size, variant.best.mean, variant.best.deviation,
                    fmt='o', color=colour, capsize=3)
      points.append((size, variant.best.mean, label, colour))
  if all(sizes):
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  else:  # No bytes have a place, to the left of all others.
    axes.set_xscale('symlog', linthresh=min(filter(None, sizes), default=1))
  axes.xaxis.set_major_formatter(lambda value, _: _tick(value))
  axes.margins(x=0.25)
  _name(axes, points)
  return _svg(figure, f'{comparison.metric} against bytes of state')


def _name(axes, points):
  """Writes labels beside points (x, y, label, colour), none over another."""
  axes.autoscale_view()
  placed = []  # (left, right, height) in points.
  for x, y, label, colour in sorted(points, key=lambda point: -point[1]):
    left, up = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
    right, lift = left + 4.5 * len(label), 4
    while any(left < end and start < right and abs(up + lift - height) < 9
              for start, end, height in placed):
      lift -= 3
    placed.append((left, right, up + lift))
    axes.annotate(label, (x, y), xytext=(6, lift), fontsize=8, color=colour,
                  textcoords='offset points')


def _rates(comparison):
  figure, axes = _figure('learning rate', comparison.metric)
  axes.set_xscale('log')
  for variant, (_, colour, style) in zip(
      comparison.variants, legend(comparison)):
    axes.errorbar(
        [cell.learning_rate for cell in variant.cells],
        [cell.mean for cell in variant.cells],
        [cell.deviation or 0.0 for cell in variant.cells],
        color=colour, linestyle=style, capsize=2, marker='.')
    axes.plot(variant.best.learning_rate, variant.best.mean, 'o', ms=11,
              color=colour, fillstyle='none')
  return _svg(figure, f'{comparison.metric} against learning rate')


def _figure(x, y):
  from matplotlib.figure import Figure
  figure = Figure(figsize=SIZE)
  axes = figure.add_subplot()
  better = 'higher' if results.higher_is_better(y) else 'lower'
  axes.set(xlabel=x, ylabel=f'{y} ({better} is better)')
  axes.xaxis.set_major_formatter(lambda value, _: _tick(value))
  return figure, axes


def _tick(value):
  if value >= 1e4:
    for power, letter in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'),
                          (1e3, 'k')):
      if value >= power:
        return f'{value / power:.3g}{letter}'
  return metrics.short(value)


def _svg(figure, title):
  """A figure as an element of a page, without a background or names."""
  import matplotlib as package
  text = io.StringIO()
  # Salted by its title, no id of a plot is that of another one.
  with package.rc_context({'svg.hashsalt': title}):
    figure.savefig(text, format='svg', transparent=True,
                   metadata={'Date': None, 'Creator': None})
  svg = text.getvalue()
  svg = svg[svg.index('<svg'):].replace(INK, 'currentColor')
  svg = re.sub(r' id="[a-z_0-9]*_\d+"', '', svg)
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  width, height = (round(72 * inches, 1) for inches in SIZE)
  return re.sub(r'<svg [^>]*>', (
      f'<svg role="img" aria-label="{title}" viewBox="0 0 {width} {height}" '
      'xmlns="http://www.w3.org/2000/svg" '
      'xmlns:xlink="http://www.w3.org/1999/xlink">'), svg, count=1)


def standalone(svg, comparison):
  """A plot as a file: with its key below, and colours for light and dark."""
  width, height = (float(n) for n in re.search(
      r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
  key = []
  for i, (label, colour, style) in enumerate(legend(comparison)):
    x, y = i % 2 * width / 2 + 8, height + ROW * (i // 2 + 0.5)
    key.append(
        f'<path d="M{x} {y}h20" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{DASHES[style]}"/><text x="{x + 25}" y="{y + 3}">'
        f'{html.escape(label)}</text>')
  below = height + ROW * -(-len(key) // 2) + 4
  style = ('<style>svg{color:#1a1a1a;font:9px sans-serif}text{fill:'
           'currentColor}@media(prefers-color-scheme:dark){svg{color:#e6e6e6}}'
           '</style>')
  svg = svg.replace(f'viewBox="0 0 {width} {height}"',
                    f'viewBox="0 0 {width} {below}"')
  return svg.replace('>', f'>{style}', 1).replace(
      '</svg>', f'{"".join(key)}</svg>')
