"""One HTML page that needs nothing but itself."""

import base64
from collections.abc import Iterable, Mapping, Sequence
import html
import io
import pathlib
from typing import Any

from calm_jax.reporting import scores
from calm_jax.reporting.scores import Score

_LONG = 12  # letters of a word that is better broken than kept whole
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570;
  --line: #d6dbe0; --paper: #fff; --best: #e3f1e4; --warn: #fff4d6;
  --lost: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb7;
  --line: #3a424a; --paper: #15181b; --best: #1f3d26; --warn: #40361a;
  --lost: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin-top: 2.2rem;
  border-bottom: 1px solid var(--line); }
p, li, figcaption { max-width: 44rem; }
.soft, figcaption, small { color: var(--soft); }
small { font-size: .8em; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); white-space: normal; min-width: 8rem;
  overflow-wrap: anywhere; }
td small, th small { display: block; font-weight: normal; }
.best { background: var(--best); font-weight: 700; }
.lost { color: var(--lost); }
.gaps { background: var(--warn); padding: .6rem 1rem; border-radius: .4rem; }
.gaps li { overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
.beside { display: flex; flex-wrap: wrap; gap: 0 1.5rem; }
.beside figure { margin: .5rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff;
  border-radius: .3rem; }
pre { overflow-x: auto; font-size: .8rem; border: 1px solid var(--line);
  padding: .6rem; }
@media print { :root { --ink: #000; --paper: #fff; --soft: #444;
  --line: #bbb; --best: #e3f1e4; }
  body { font-size: 10pt; max-width: none; padding: 0; }
  .wide { overflow: visible; } table { font-size: 8pt; }
  .beside figure { width: 47%; }
  th, td { padding: .2rem .3rem; } th:first-child { min-width: 0; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def write(file: pathlib.Path, *, title: str, parts: Iterable[str]) -> None:
  """Writes the page of some parts, which are HTML."""
  text = _PAGE.format(
    title=html.escape(title), style=_STYLE, body='\n'.join(parts)
  )
  file.write_text(text, encoding='utf-8')


def section(title: str, *parts: str) -> str:
  """Returns a part of the page under its title."""
  return f'<h2>{html.escape(title)}</h2>\n' + '\n'.join(parts)


def paragraph(text: str) -> str:
  """Returns plain text as a paragraph."""
  return f'<p>{html.escape(text)}</p>'


def gaps(sentences: Sequence[str]) -> str:
  """Returns the list of what is missing; nothing if nothing is."""
  if not sentences:
    return ''
  items = '\n'.join(f'<li>{html.escape(text)}</li>' for text in sentences)
  return (
    '<div class="gaps"><strong>What is missing here</strong>\n<ul>\n'
    f'{items}\n</ul></div>'
  )


def picture(
  file: pathlib.Path, figure: Any, *, caption: str, told: bool = True
) -> str:
  """Writes a figure as PNG, and returns it with the same bytes inside.

  Args:
    file: the PNG.
    figure: of matplotlib.
    caption: what one sees.
    told: whether it is printed below; a screen reader says it in any case.
  """
  bytes_ = io.BytesIO()
  figure.savefig(bytes_, format='png', dpi=150)
  file.write_bytes(bytes_.getvalue())
  data = base64.b64encode(bytes_.getvalue()).decode()
  width = round(100 * figure.get_figwidth())
  text = html.escape(caption)
  below = f'<figcaption>{text}</figcaption>' if told else ''
  return (
    f'<figure><img width="{width}" alt="{text}"'
    f' src="data:image/png;base64,{data}">{below}</figure>'
  )


def side_by_side(figures: Iterable[str]) -> str:
  """Returns pictures beside each other, as many as the screen has room for."""
  return f'<div class="beside">{"".join(figures)}</div>'


def table(
  head: Iterable[str], body: Iterable[tuple[str, Sequence[str]]]
) -> str:
  """Returns a table that scrolls sideways.

  Args:
    head: of the columns, as `heading` makes them.
    body: for each row its heading, and its cells as `cell` makes them.
  """
  columns = ''.join(f'<th>{title}</th>' for title in head)
  rows = '\n'.join(
    f'<tr><th>{title}</th>{"".join(cells)}</tr>' for title, cells in body
  )
  return (
    f'<div class="wide"><table>\n<thead><tr>{columns}</tr></thead>\n'
    f'<tbody>\n{rows}\n</tbody></table></div>'
  )


def heading(text: str, note: str = '') -> str:
  """Returns the text of a cell, with a note below it."""
  small = f'<small>{html.escape(note)}</small>' if note else ''
  return _may_break(text) + small


def cell(text: str, note: str = '', *, kind: str = '') -> str:
  """Returns a cell of a table; `kind` is 'best', 'lost' or nothing."""
  mark = f' class="{kind}"' if kind else ''
  return f'<td{mark}>{heading(text, note)}</td>'


def score_row(cells: Mapping[str, Score]) -> list[str]:
  """Returns the cells of one row of scores, the best one marked."""
  top, places = scores.best(cells), scores.digits(cells)
  return [
    score_cell(one, places=places, kind='best' if name in top else '')
    for name, one in cells.items()
  ]


def score_cell(
  one: Score, *, places: int, kind: str = '', sign: bool = False
) -> str:
  """Returns mean ± deviation, and for how many seeds; or that there is none."""
  if not one.values:
    return cell('—', 'not measured')
  text = scores.show(one, places=places, sign=sign)
  count = f'n = {len(one.values)}'
  if len(one.values) < one.runs:
    count += f' of {one.runs}'
  return cell(text, count, kind=kind)


def details(title: str, text: str) -> str:
  """Returns text that is folded away until it is asked for."""
  return (
    f'<details><summary>{_may_break(title)}</summary>'
    f'<pre>{html.escape(text)}</pre></details>'
  )


def _may_break(text: str) -> str:
  """Returns HTML that a narrow screen may break within long names and paths."""
  return ' '.join(
    word.replace('/', '/<wbr>').replace('_', '_<wbr>')
    if len(word) > _LONG
    else word
    for word in html.escape(text).split(' ')
  )
