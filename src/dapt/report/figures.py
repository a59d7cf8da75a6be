"""Figures by matplotlib: SVG whose colours follow the page, and SVG and PNG for papers.

A figure is drawn in the light colours of `PALETTE`. In the page's copy each of them becomes a CSS
variable of the same name, so that one drawing serves light and dark. Its legend, which the page
has as text, stands below the axes in the files and is cut off in the page.

A kind of figure is a function that draws on axes, for `draw` to render.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from dapt.methods import METHODS
from dapt.report.tables import PAGE, Estimate, Named

_LOOK = json.loads((PAGE / "figures.json").read_text())
_OWN = {name: row.colour for name, row in METHODS.items() if row.colour}
# Name of the CSS variable -> (light, dark). No two light ones may be equal.
PALETTE = {**_LOOK["palette"], **_OWN}
CLASS_COLOURS = sum(name.startswith("class-") for name in PALETTE)
_LIGHT: dict[str, str] = {name: light for name, (light, _) in PALETTE.items()}
_VARIABLES = {light: f"var(--{name})" for name, light in _LIGHT.items()}
_LEGEND_ROW, _LEGEND_COLUMNS = 0.24, 4  # inches; entries a row
_DASHED = (0, (4, 3))
_ROW = "row-"  # begins the id of a method's marks; after it, a number, "-", and its label


class Entry(NamedTuple):
    """A line of a legend: a colour of `PALETTE` and what has it."""

    colour: str
    label: str


class Drawing(NamedTuple):
    """A finished figure: an SVG element for the page, of some CSS pixels, and files by kind."""

    about: Named
    page: str
    width: int
    files: dict[str, bytes | str]


class Layout(NamedTuple):
    """Inches of a figure without its legend, which is in the files only, and of its margins."""

    width: float = 4.6
    height: float = 3.0
    left: float = 0.55  # with room for an axis and its label
    right: float = 0.12
    top: float = 0.12
    bottom: float = 0.5
    legend: Iterable[Entry] = ()


def marker(colour: str) -> str:
    """The marker that goes with a colour; "_" is a level line, the same for any shots."""
    return METHODS[colour].marker if colour in _OWN else "o"


def method_colour(method: str, methods: Sequence[str]) -> str:
    """Name of a method's colour; methods that have none of their own share three."""
    if method in _OWN:
        return method
    return f"other-{[m for m in methods if m not in _OWN].index(method) % 3}"


def _mark(entry: Entry, *artists: Any) -> None:
    """Say whose marks these are, by which the page greys the others' (see `_for_page`)."""
    for number, artist in enumerate(artists):
        artist.set_gid(f"{_ROW}{number}-{entry.label}")


def draw(paint: Callable[..., Layout], about: Named, *shown: Any) -> Drawing:
    """Let a kind of figure draw what is ``shown`` on axes, and render it three times."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    # Text stays text, which can be searched and has the page's font; a class name is no formula.
    style = {**_LOOK["style"], **_LOOK["kinds"][paint.__name__]}
    style = {name: _LIGHT.get(str(value), value) for name, value in style.items()}
    # The same drawing is the same file, and two in one page have no id in common.
    style["svg.hashsalt"] = about.name
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the PNG's font does not have
        figure = Figure()
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        width, height, left, right, top, bottom, legend = paint(axes, *shown)
        handles = [
            Line2D([], [], color=_LIGHT[e.colour], marker=marker(e.colour), label=e.label)
            for e in legend
        ]
        columns = max(1, min(_LEGEND_COLUMNS, int(width / 1.1)))
        extra = _LEGEND_ROW * math.ceil(len(handles) / columns)
        whole = height + extra
        figure.set_size_inches(width, whole)
        low, wide, high = bottom + extra, width - left - right, height - top - bottom
        axes.set_position((left / width, low / whole, wide / width, high / whole))
        if handles:
            figure.legend(
                handles=handles, loc="lower center", ncols=columns, fontsize=9, handlelength=1.4
            ).set_gid("legend")
        svg, png = io.BytesIO(), io.BytesIO()
        # Without a date, and with our title in place of the library's.
        nothing = {"Date": None, "Creator": None}
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    page = _for_page(svg.getvalue(), about.title, cut=72 * extra)
    files: dict[str, bytes | str] = {"svg": svg.getvalue(), "png": png.getvalue()}
    return Drawing(about, page, round(96 * width), files)


def _for_page(svg: bytes, title: str, cut: float) -> str:
    """The SVG with the page's colours and font, no legend, and the ids that something refers to."""
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)  # our own: matplotlib escapes what it is given
    for parent in root.iter():
        for child in list(parent):
            # A style would hold for the whole page, which says the same itself.
            if child.get("id") == "legend" or child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        if (own := element.get("id", "")).startswith(_ROW):
            element.set("data-row", own.removeprefix(_ROW).partition("-")[2])
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = {i for value in values for i in re.findall(r"(?:^|url\()#([\w.-]+)", value)}
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        if style := element.get("style"):
            style = re.sub(r"font-family: [^;]*;? ?", "", style)
            style = re.sub(r"#[0-9a-f]{6}", lambda m: _VARIABLES.get(m[0], m[0]), style)
            element.set("style", style)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    seen = {"viewBox": f"0 0 {width:g} {height - cut:g}", "role": "img", "aria-label": title}
    root.attrib.clear()
    root.attrib.update(seen)
    return ElementTree.tostring(root, encoding="unicode")


def accuracy_over_shots(axes: Any, lines: Mapping[Entry, Mapping[int, Estimate]]) -> Layout:
    """Accuracy in percent by shots as lines with bands of the interval, level ones dashed."""
    shots, every = sorted({k for points in lines.values() for k in points}), list[float]()
    for entry, points in lines.items():
        colour, known = _LIGHT[entry.colour], [points[k] for k in sorted(points)]
        means = np.array([point.mean for point in known])
        every += means.tolist()
        if marker(entry.colour) == "_":
            level = float(np.mean(means))
            _mark(entry, axes.axhline(level, color=colour, linestyle=_DASHED, linewidth=1.5))
            continue
        # Two seeds' interval is twelve standard errors wide: only a table can hold it.
        half = np.array([(p.half if p.count > 2 else None) or 0.0 for p in known])
        x, low, high = [shots.index(k) for k in sorted(points)], means - half, means + half
        bands = [axes.fill_between(x, low, high, color=colour, alpha=0.08, linewidth=0)
                 for _ in range(int(half.any()))]  # fmt: skip
        _mark(entry, *axes.plot(x, means, color=colour, marker=marker(entry.colour)), *bands)
    # Wide bands of few seeds must not flatten the lines.
    room = max(0.25 * (max(every) - min(every)), 2.0)
    axes.set(xlabel="shots", ylabel="accuracy, %", xlim=(-0.3, len(shots) - 0.7))
    axes.set(ylim=(min(every) - room, max(every) + room))
    axes.set_xticks(range(len(shots)), [str(k) for k in shots])
    return Layout(legend=lines)


def accuracy_by_method(axes: Any, lines: Mapping[Entry, Mapping[int, Estimate]]) -> Layout:
    """A dot with its interval for each method, where there is one number of shots only."""
    means = {entry: next(iter(points.values())) for entry, points in lines.items()}
    style = {"fmt": "o", "markersize": 7, "capsize": 0, "elinewidth": 2.5}
    for y, entry in enumerate(list(means)[::-1]):
        mean, half = means[entry].mean, means[entry].half or None
        drawn = axes.errorbar(mean, y, xerr=half, color=_LIGHT[entry.colour], **style)
        _mark(entry, *(artist for artist in drawn.get_children() if artist is not None))
    ends = [mean.mean + side * (mean.half or 0.0) for mean in means.values() for side in (-1, 1)]
    return _by_method(axes, "accuracy, %", list(means), ends, room=(0.08, 1))


def before_and_after(axes: Any, what: str, changes: Mapping[Entry, tuple[float, float]]) -> Layout:
    """For each method a hollow dot (before), a filled one (after), and the way between."""
    for y, entry in enumerate(list(changes)[::-1]):
        (before, after), colour = changes[entry], _LIGHT[entry.colour]
        way = axes.plot([before, after], [y, y], color=colour, linewidth=2.2)
        hollow = axes.plot(before, y, "o", markersize=7, markerfacecolor="none", color=colour)
        _mark(entry, *way, *hollow, *axes.plot(after, y, "o", markersize=7.5, color=colour))
    axes.locator_params(axis="x", nbins=5)
    ends = [value for pair in changes.values() for value in pair]
    return _by_method(axes, what, list(changes), ends, room=(0.1, 0.002))


def _by_method(
    axes: Any, what: str, entries: list[Entry], ends: list[float], room: tuple[float, float]
) -> Layout:
    """Axes of methods one above the other, with a share of the spread and more as room beside."""
    beside = room[0] * (max(ends) - min(ends)) + room[1]
    axes.set(xlabel=what, xlim=(min(ends) - beside, max(ends) + beside))
    axes.set(ylim=(-0.6, len(entries) - 0.4))
    axes.set_yticks(range(len(entries)), [entry.label for entry in entries[::-1]])
    labels = min(2.0, 0.25 + 0.078 * max(len(entry.label) for entry in entries))
    return Layout(height=0.8 + 0.32 * len(entries), left=labels, right=0.15, top=0.1)


def training_curves(axes: Any, what: str, curves: Mapping[Entry, np.ndarray]) -> Layout:
    """Mean over seeds of (seeds, epochs) by epoch, in a band from the lowest to the highest.

    Rows of fewer epochs end in NaN.
    """
    for entry, values in curves.items():
        # More points than pixels would only make the page larger.
        step = max(1, values.shape[1] // 200)
        colour, x = _LIGHT[entry.colour], np.arange(1, values.shape[1] + 1)[::step]
        values, bands = values[:, ::step], list[Any]()
        if len(values) > 1:
            low, high = np.nanmin(values, 0), np.nanmax(values, 0)
            bands = [axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)]
        look = {"color": colour, "linewidth": 1.6, "marker": "o" if len(x) == 1 else None}
        _mark(entry, *axes.plot(x, np.nanmean(values, 0), **look), *bands)
    axes.set(xlabel="epoch", ylabel=what)
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return Layout(4.0, 2.7, left=0.72, legend=curves)


def confusion_matrix(axes: Any, names: Sequence[str], shares: np.ndarray) -> Layout:
    """Share of each true class (row) that is named as each class (column), (C, C)."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    size, short = len(names), [n if len(n) <= 22 else n[:21] + "…" for n in names]
    cells, colours = [], []
    for row, column in np.argwhere(shares > 0):
        cells.append(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92))
        kind = _LIGHT["right" if row == column else "accent"]
        colours.append(to_rgba(kind, 0.08 + 0.92 * shares[row, column]))
    axes.add_collection(PatchCollection(cells, facecolors=colours, linewidths=0))
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="named", ylabel="true")
    letters = max(6.0, 9.0 - size / 20)
    axes.set_xticks(range(size), short, rotation=90, fontsize=letters)
    axes.set_yticks(range(size), short, fontsize=letters)
    labels = 0.4 + 0.056 * max(len(name) for name in [*short, "class"])
    side = max(2.0, 0.17 * size) + labels + 0.15
    return Layout(side, side, labels, 0.15, 0.15, labels)


def reliability(
    axes: Any, colour: str, confidence: np.ndarray, correct: np.ndarray, bins: int
) -> Layout:
    """Accuracy by confidence in equal bins, beside the diagonal of perfect calibration.

    Both are (n,): the probability of the class that was named, and whether it was the right one.
    """
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    inside = np.bincount(which, minlength=bins)
    right = np.bincount(which, correct.astype(float), minlength=bins)
    for i in np.flatnonzero(inside):
        # How full a bin is shows as how solid its bar is.
        alpha = float(0.25 + 0.75 * np.sqrt(inside[i] / inside.max()))
        place, height = (i + 0.5) / bins, right[i] / inside[i]
        axes.bar(place, height, width=0.9 / bins, color=_LIGHT[colour], alpha=alpha)
    axes.plot([0, 1], [0, 1], color=_LIGHT["muted"], linewidth=1, linestyle=_DASHED)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_yticks([0.5, 1], ["0.5", "1"])
    return Layout(3.2, left=0.52)


def feature_map(
    axes: Any, points: np.ndarray, span: np.ndarray, colours: list[str | None], legend: list[Entry]
) -> Layout:
    """Embedded features (n, 2) as dots, between the ends (2, 2) of maps that belong together.

    Those without a colour stay in the background.
    """
    for colour in dict.fromkeys(sorted(colours, key=lambda c: c is not None)):
        size, alpha = (9, 0.35) if colour is None else (16, 0.85)
        x, y = points[[c == colour for c in colours]].T
        axes.scatter(x, y, s=size, linewidths=0, color=_LIGHT[colour or "muted"], alpha=alpha)
    low, high = span
    room = 0.04 * (high - low)
    (left, bottom), (right, top) = low - room, high + room
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    return Layout(3.2, 3.0, 0.05, 0.05, 0.05, 0.05, legend)
