"""How figures look, and how they are written."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from mepa_ds.files import atomic_path
from mepa_ds.safety.text import printable, printable_lines

# Okabe and Ito's: told apart with every kind of colour vision, and in grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT, HELD_OUT = "#222222", "#888888", "#D55E00"
BAND = 0.15
_SETTINGS = {
    "font.size": 11.0,
    "axes.titlesize": 12.0,
    "axes.labelsize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "legend.frameon": False,
    "legend.fontsize": 10.0,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "mepa",  # the same figure has the same bytes
    "svg.fonttype": "path",
}
_WIDTH, _HEIGHT = 5.6, 4.3  # inches, of a panel
_DPI = 150
_LINE = 12.0  # points from one label to the next


@contextmanager
def drawing() -> Iterator[None]:
    """The settings of all figures; what matplotlib and NumPy would warn of is nothing that a user can mend."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def new_figure(panels: int = 1, title: str = "") -> tuple[Figure, list[Axes]]:
    """Returns a figure with `panels` side by side."""
    figure = Figure(figsize=(_WIDTH * panels + 0.8, _HEIGHT), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=13)
    return figure, list(np.ravel(figure.subplots(1, panels)))


def plain(name: str, most: int) -> str:
    """A name out of a file, for the label of a tick: matplotlib would read what stands between two dollars."""
    return printable(name)[:most].replace("$", r"\$")


def _without_formulas(figure: Figure) -> None:
    """All texts are names and words, but for the numbers at ticks, which matplotlib writes as formulas itself."""
    ticks = {id(label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
             for label in (*axis.get_ticklabels(which="both"), axis.get_offset_text())}  # fmt: skip
    for text in figure.findobj(Text):
        if isinstance(text, Text) and id(text) not in ticks:
            text.set_parse_math(False)
            text.set_text(printable_lines(text.get_text()))


def save_png(figure: Figure, path: Path) -> None:
    _without_formulas(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})


def save(figure: Figure, path: Path) -> str:
    """Writes path.png and path.svg; returns the SVG as it can stand in a page, its ids made the figure's own."""
    save_png(figure, path.with_suffix(".png"))
    figure.set_layout_engine("none")  # it has found its places
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    with atomic_path(path.with_suffix(".svg")) as temporary:
        temporary.write_text(buffer.getvalue())
    return _inlined(buffer.getvalue(), path.name)


def _inlined(svg: str, name: str) -> str:
    """The svg element alone. Clip paths and glyphs of several figures in one page must not share ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'((?:\sid="|href="#|url\(#))', rf"\g<1>{name}-", svg)


def log_axes(axes: Axes, x: str, y: str, log_y: bool = True) -> None:
    """Labels both axes and makes them logarithmic, with ticks at 1, 2 and 5 times powers of ten, or the powers alone.

    The loss has plain numbers as ticks; so have counts (100k, 2M), while FLOPs have powers (1e15).
    """
    axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in _decades(low, high) if low <= tick <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value) if "FLOPs" in x else count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(low, high)
    if log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 8 * low:  # less than a decade: powers of ten would leave one tick or none
            axes.set_ylim(low, high)
            ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
            axes.set_yticks(ticks)
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def _decades(low: float, high: float) -> list[float]:
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1, 2, 5) if high < 150 * low else (1,)
    return [step * 10.0**decade for decade in decades for step in steps]


def end_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes (x, y, text, color) to the right of the ends of curves, moved apart where they would overlap.

    The axes must have their final scale and limits.
    """
    height = 0.8 * 72 * axes.figure.get_figheight()  # type: ignore[union-attr]  # points, about
    inverse = axes.transAxes.inverted()
    placed = sorted((float(inverse.transform(axes.transData.transform((x, y)))[1]) * height, x, y, text, color)
                    for x, y, text, color in labels)  # fmt: skip
    lowest = -np.inf
    for at, x, y, text, color in placed:
        moved = max(at, lowest + _LINE)
        lowest = moved
        axes.annotate(
            text, (x, y), xytext=(6, moved - at), textcoords="offset points", color=color, va="center", fontsize=9.5,
            annotation_clip=False,
        )  # fmt: skip


def shades(count: int) -> list[str]:
    """Returns colours for ordered values, light to dark, all dark enough on white."""
    ramp = matplotlib.colormaps["viridis_r"](np.linspace(0.33, 1.0, max(count, 1)))
    return [str(matplotlib.colors.to_hex(color)) for color in ramp]


def kinds(names: Sequence[Any]) -> dict[Any, tuple[str, str]]:
    """Returns a colour and a marker for each name of an unordered kind."""
    return {name: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def count(value: float) -> str:
    """Returns a count as people write it: 61.4k, 0.803M, 1.5B. Values below 0.01 as 2e-3."""
    if 0 < abs(value) < 0.01:
        return power(value)
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


def power(value: float) -> str:
    """Returns 2e15 for 2.0e+15, with three digits at most."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
