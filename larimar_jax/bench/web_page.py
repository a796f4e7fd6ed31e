"""A report's sections as Markdown and as one HTML page that needs nothing beside it."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from larimar_jax.bench.report import CaseText, Item, Picture, Section
from larimar_jax.bench.tables import Grid

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --mark: #f5c54233; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 68rem; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
p.title { font-weight: 600; margin: 1rem 0 -.7rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left;
  vertical-align: top; white-space: pre-line; }
td + td { white-space: pre; }
th { vertical-align: bottom; }
td.number, th.number { text-align: right; }
/* The name of a row stays in sight when its table is scrolled. */
td:first-child, th:first-child { position: sticky; left: 0; background: Canvas; }
@media (max-width: 40rem) { th, td { padding: .3rem .4rem; font-size: .9rem; } }
tr.mark td { background: linear-gradient(var(--mark), var(--mark)), Canvas; }
p.note { font-size: .9rem; opacity: .8; }
img { max-width: 100%; height: auto; background: #fff; }
details { background: var(--soft); padding: .4rem .8rem; margin: .4rem 0; overflow-wrap: anywhere; }
"""


_NUMBER, _MARK = ' class="number"', ' class="mark"'


def write(sections: Sequence[Section], folder: str | Path, title: str) -> list[Path]:
    """Write report.md and report.html into a folder; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"report.md": markdown(sections, title), "report.html": page(sections, title)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def markdown(sections: Sequence[Section], title: str) -> str:
    """Return tables and texts; pictures are in the page alone."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", *filter(None, map(_markdown, section.items))]
    return "\n\n".join(parts) + "\n"


def _markdown(item: Item) -> str:
    match item:
        case Picture():
            return ""
        case CaseText(heading, lines):
            return "\n".join([f"**{_plain(heading)}**", "", *(f"* {_plain(x)}" for x in lines)])
        case Grid(title, header, rows, caption, _):
            cells = [[_plain(x).replace("\n", "<br>") for x in row] for row in (header, *rows)]
            head, *lines = [f"| {' | '.join(row)} |" for row in cells]
            above = [f"**{_plain(title)}**", ""] if title else []
            below = ["", f"*{_plain(caption)}*"] if caption else []
            return "\n".join([*above, head, "|" + "---|" * len(header), *lines, *below])
    return _plain(item)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)


def page(sections: Sequence[Section], title: str) -> str:
    """Return one page of HTML; nothing is fetched, and nothing runs in it."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    if len(sections) > 1:
        links = (
            f'<li><a href="#s{number}">{html.escape(section.title)}</a></li>'
            for number, section in enumerate(sections)
        )
        body.append(f"<nav><ul>{''.join(links)}</ul></nav>")
    for number, section in enumerate(sections):
        body.append(f'<h2 id="s{number}">{html.escape(section.title)}</h2>')
        body += map(_html, section.items)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _html(item: Item) -> str:
    match item:
        case Picture(alt, source):
            return f'<p><img alt="{html.escape(alt, quote=True)}" src="{source}"></p>'
        case CaseText(heading, lines):
            items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
            return f"<details><summary>{html.escape(heading)}</summary><ul>{items}</ul></details>"
        case Grid():
            return _html_table(item)
    return f'<p class="note">{html.escape(item)}</p>'


def _html_table(grid: Grid) -> str:
    # Numbers stand at the right; the first column names its row, even by a number.
    numeric = [
        place > 0 and any(row[place].lstrip("-−–+.")[:1].isdigit() for row in grid.rows)
        for place in range(len(grid.header))
    ]

    def row(cells: Sequence[str], tag: str, marked: bool = False) -> str:
        inside = "".join(
            f"<{tag}{_NUMBER * number}>{html.escape(cell)}</{tag}>"
            for cell, number in zip(cells, numeric, strict=True)
        )
        return f"<tr{_MARK * marked}>{inside}</tr>"

    rows = "".join(row(cells, "td", n in grid.marks) for n, cells in enumerate(grid.rows))
    # Above the box: a title does not scroll away with its table.
    title = f'<p class="title">{html.escape(grid.title)}</p>' if grid.title else ""
    note = f'<p class="note">{html.escape(grid.caption)}</p>' if grid.caption else ""
    # Wider than a narrow screen, a table scrolls in its own box, by the keyboard too.
    name = html.escape(grid.title or "table", quote=True)
    box = f'<div class="wide" role="region" tabindex="0" aria-label="{name}">'
    head = f"<thead>{row(grid.header, 'th')}</thead>"
    return f"{title}{box}<table>{head}<tbody>{rows}</tbody></table></div>{note}"
