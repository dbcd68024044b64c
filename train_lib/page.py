"""A report as a page of HTML that needs nothing else, and as Markdown."""

import html
import re

from train_lib import plots, tables

STYLE = '''
:root { color-scheme: light dark; --line: #8885; --faint: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto;
  padding: 1rem; color: light-dark(#1a1a1a, #e6e6e6);
  background: light-dark(#ffffff, #15181c); }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.lead { font-size: 1.1rem; }
.plots { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure svg { width: 100%; height: auto; font-family: inherit; }
figcaption { font-size: .9rem; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none;
  padding: 0; }
.key svg { width: 2rem; height: .6rem; margin-right: .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
.numbers th:not(:first-child), .numbers td:not(:first-child) {
  text-align: right; white-space: nowrap; }
pre { background: var(--faint); padding: .7rem; overflow-x: auto; }
@media print {
  body { color: #000; background: #fff; max-width: none; padding: 0;
    font-size: 11px; }
  .plots { grid-template-columns: 1fr 1fr; }
  .wide, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  tr { break-inside: avoid; }
}
'''


def sections(comparison, commands):
  """[(title, kind, content)] of a report, in order.

  Kinds: 'numbers' and 'words' are tables, 'plots', 'code' and 'list'.
  """
  found = [('Variants', 'numbers', tables.variants(comparison)),
           ('Curves', 'plots', plots.plots(comparison)),
           ('Which differences are resolved', 'words',
            tables.pairs(comparison)),
           ('Learning rates', 'numbers', tables.rates(comparison)),
           ('How to read this', 'list', tables.notes(comparison)),
           ('Runs', 'words', tables.runs(comparison)),
           ('What was set', 'words', tables.configs(comparison)),
           ('Where it ran', 'words', tables.places(comparison)),
           ('Commands', 'code', commands)]
  empty = lambda kind, content: not content or (
      kind in ('numbers', 'words') and len(content) < 2)
  return [part for part in found if not empty(*part[1:])]


def as_html(title, comparison, parts):
  """The whole page, as text."""
  body = [f'<h1>{html.escape(title)}</h1>',
          f'<p class="lead">{html.escape(tables.summary(comparison))}</p>']
  for heading, kind, content in parts:
    body.append(f'<h2>{html.escape(heading)}</h2>')
    if kind == 'plots':
      body.append(_key(comparison) + _figures(content))
    elif kind == 'code':
      body.append(f'<pre>{html.escape(chr(10).join(content))}</pre>')
    elif kind == 'list':
      items = ''.join(f'<li>{html.escape(line)}</li>' for line in content)
      body.append(f'<ul>{items}</ul>')
    else:
      body.append(_table(content, kind))
  return ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
          '<meta name="viewport" content="width=device-width, '
          f'initial-scale=1">\n<title>{html.escape(title)}</title>\n'
          f'<style>{STYLE}</style>\n</head>\n<body>\n' + '\n'.join(body)
          + '\n</body>\n</html>\n')


def _table(rows, kind):
  line = lambda tag, row: '<tr>' + ''.join(
      f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row) + '</tr>'
  head, *rest = rows
  above = f'<thead>{line("th", head)}</thead>' if any(head) else ''
  return (f'<div class="wide"><table class="{kind}">{above}<tbody>'
          + '\n'.join(line('td', row) for row in rest)
          + '</tbody></table></div>')


def _figures(content):
  return '<div class="plots">' + '\n'.join(
      f'<figure>{svg}<figcaption><b>{html.escape(title)}.</b> '
      f'{html.escape(caption)}</figcaption></figure>'
      for title, caption, svg in content) + '</div>'


def _key(comparison):
  return '<ul class="key">' + ''.join(
      f'<li><svg viewBox="0 0 32 8"><path d="M0 4H32" stroke="{colour}" '
      f'stroke-width="3" stroke-dasharray="{plots.DASHES[style]}"/></svg>'
      f'{html.escape(label)}</li>'
      for label, colour, style in plots.legend(comparison)) + '</ul>'


def as_markdown(title, comparison, parts):
  """The same as text, its plots the files of `pictures`."""
  lines = [f'# {title}', '', tables.summary(comparison)]
  for heading, kind, content in parts:
    lines += ['', f'## {heading}', '']
    if kind == 'plots':
      lines += [f'![{title}]({_file(title)})\n\n{caption}\n'
                for title, caption, _ in content]
    elif kind == 'code':
      lines += ['```sh', *content, '```']
    elif kind == 'list':
      lines += [f'- {line}' for line in content]
    else:
      head, *rest = content
      rule = '--:' if kind == 'numbers' else '---'
      lines += [_cells(head), _cells(['---'] + [rule] * (len(head) - 1)),
                *map(_cells, rest)]
  return '\n'.join(lines) + '\n'


def _cells(row):
  return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |'


def pictures(comparison, parts):
  """{file: SVG} of the plots, each with its key."""
  return {_file(title): plots.standalone(svg, comparison)
          for _, kind, content in parts if kind == 'plots'
          for title, _, svg in content}


def _file(title):
  return re.sub(r'\W+', '-', title) + '.svg'
