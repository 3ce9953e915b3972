"""Pieces of HTML: one self-contained page, light or dark as the reader's system is, without anything from a network."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from mepa_ds.safety.secrets import redacted
from mepa_ds.safety.text import printable_lines

_CSS = """
:root { color-scheme: light; --ink: #222; --soft: #555; --faint: #666; --paper: #fff; --raised: #f6f6f6;
  --line: #e3e3e3; --warn: #fff7e6; --bad: #fdf0e8; --good: #eaf6f1; --accent: #0072b2; --grid: #e8e8e8;
  --guard: #c4450c; --change: #8a5a00; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) { DARK } }
:root[data-theme=dark] { DARK }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.9rem; margin-bottom: .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1.08rem; margin: 1.4rem 0 .3rem; }
a { color: var(--accent); }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--raised); font-weight: 600; position: sticky; top: 0; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; font-size: .85rem; max-height: 36rem; overflow-y: auto; }
.box { border-left: .35rem solid #888; background: var(--raised); padding: .5rem 1rem; margin: .8rem 0;
  overflow-wrap: anywhere; }
.warn { border-color: #E69F00; background: var(--warn); }
.bad { border-color: #D55E00; background: var(--bad); }
.good { border-color: #009E73; background: var(--good); }
.box ul { margin: .2rem 0; padding-left: 1.2rem; }
.faint { color: var(--faint); }
figure { margin: 1.2rem 0 2rem; }
figure svg { max-width: 100%; height: auto; display: block; }
.figure svg { background: #fff; }
figcaption { color: var(--soft); max-width: 60rem; }
code, pre { background: var(--raised); font-size: .9rem; }
pre { padding: .7rem 1rem; overflow-x: auto; }
@media (max-width: 40rem) { body { margin: .8rem auto; padding: 0 .8rem; font-size: 15px; } h1 { font-size: 1.5rem; } }
""".replace(
    "DARK",
    "color-scheme: dark; --ink: #e4e4e4; --soft: #b4b4b4; --faint: #a0a0a0; --paper: #16181c; --raised: #22252b; "
    "--line: #363a42; --warn: #33290f; --bad: #391d10; --good: #10301f; --accent: #6cb8ee; --grid: #2c3037; "
    "--guard: #ff8a50; --change: #e0a93c;",
)


def page(title: str, body: str, style: str = "") -> str:
    """A whole page. `style`: CSS of its own, which may use the colours that `:root` has as variables."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_CSS}{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """A text out of a file, as a page may show it: no markup, nothing unseen, no secrets."""
    return html.escape(printable_lines(redacted(str(value))))


def section(title: str, *parts: str) -> str:
    """A heading and its parts; nothing if there are none."""
    content = "\n".join(part for part in parts if part)
    return f"<h2>{text(title)}</h2>\n{content}\n" if content else ""


def paragraph(content: str, kind: str = "") -> str:
    return f'<p class="{kind}">{text(content)}</p>' if kind else f"<p>{text(content)}</p>"


def box(sentences: Iterable[str], kind: str) -> str:
    """A coloured box with a sentence a line; nothing without sentences. `kind`: warn, bad, good."""
    found = list(sentences)
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in found)
    return f'<div class="box {kind}"><ul>{items}</ul></div>' if found else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], wide: bool = False) -> str:
    """`head` is text, cells are HTML. `wide`: in a frame that scrolls."""
    top = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    content = f"<table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return f'<div class="wide">{content}</div>' if wide else content


def short(value: Any, digits: int = 4) -> str:
    """Returns a number with so many digits; a dash for none."""
    if value is None or math.isnan(float(value)):
        return "–"
    number = float(value)
    if math.isinf(number):
        return "unbounded"
    if number == int(number) and abs(number) < 10**7:
        return str(int(number))
    return f"{number:.{digits}g}"


def number(value: Any, digits: int = 4) -> str:
    """The same as HTML, whose title has the number in full, so that it can be copied from the page."""
    if value is None:
        return short(None)
    return f'<span title="{float(value)!r}">{short(value, digits)}</span>'


def interval(ends: Sequence[Any] | None, digits: int = 4) -> str:
    """Returns "low to high", as HTML; a dash for none."""
    return short(None) if not ends else f"{number(ends[0], digits)} to {number(ends[1], digits)}"
