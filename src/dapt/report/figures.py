"""Figures by matplotlib: SVG whose colours follow the page, and SVG and PNG for papers.

A figure is drawn in the light colours of `PALETTE`. In the page's copy each of them becomes a CSS
variable of the same name, so that one drawing serves light and dark. Its legend, which the page
has as text, stands below the axes in the files and is cut off in the page.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from dapt.report.rows import LOOKS
from dapt.report.tables import Cell, Named

# Name of the CSS variable -> (light, dark). No two light ones may be equal.
PALETTE = {
    "ink": ("#1c2024", "#e8eaed"),
    "muted": ("#5f6773", "#a3abb6"),
    "rule": ("#dfe3e8", "#343a42"),
    "accent": ("#c2410d", "#fb8c4b"),
    **{method: colours for method, (colours, _) in LOOKS.items()},
    "other-0": ("#0891b3", "#3fcbe8"),
    "other-1": ("#be123d", "#fb7189"),
    "other-2": ("#4338cb", "#9aa4fc"),
    "class-0": ("#2563ed", "#6ea9fe"),
    "class-1": ("#c2410e", "#fb8d4b"),
    "class-2": ("#0d948a", "#3dd5c1"),
    "class-3": ("#7c3aef", "#b395fb"),
    "class-4": ("#ca8a05", "#f0c43c"),
    "class-5": ("#db2779", "#f780b8"),
    "class-6": ("#16a34b", "#55d98a"),
    "class-7": ("#78350f", "#d0976a"),
    "class-8": ("#0ea5ea", "#56c5f8"),
    "class-9": ("#525253", "#bdbdbe"),
}
CLASS_COLOURS = 10
_LIGHT = {name: light for name, (light, _) in PALETTE.items()}
_VARIABLES = {light: f"var(--{name})" for name, light in _LIGHT.items()}

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and has the page's font
    "text.parse_math": False,  # a class name is no formula
    "font.size": 10,
    "text.color": _LIGHT["ink"],
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _LIGHT["muted"]),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _LIGHT["rule"]),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size"), 0),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.axisbelow", "axes.grid"), True),
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
_NAMESPACE = "http://www.w3.org/2000/svg"
_LEGEND_ROW, _LEGEND_COLUMNS = 0.24, 4  # inches; entries a row
_FAR = (0.55, 0.12, 0.12, 0.5)  # margins with room for an axis and its label


class Entry(NamedTuple):
    """A line of a legend: a colour of `PALETTE` and what has it."""

    colour: str
    label: str


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    Attributes:
        about: its name and title, which a screen reader says of it.
        page: SVG element for the page.
        svg, png: the files.
        width: of the page's copy in CSS pixels at its natural size.
    """

    about: Named
    page: str
    svg: bytes
    png: bytes
    width: int

    def files(self) -> dict[str, bytes | str]:
        """Content by kind of file."""
        return {"svg": self.svg, "png": self.png}


def marker(colour: str) -> str:
    """The marker that goes with a colour; "_" is a level line."""
    return LOOKS[colour][1] if colour in LOOKS else "o"


def method_colour(method: str, methods: Sequence[str]) -> str:
    """Name of a method's colour; methods that have none of their own share three."""
    if method in LOOKS:
        return method
    return f"other-{[m for m in methods if m not in LOOKS].index(method) % 3}"


def draw(
    about: Named,
    paint: Callable[[Any], None],
    *,
    size: tuple[float, float] = (4.6, 3.0),
    margins: tuple[float, float, float, float] = _FAR,
    legend: Iterable[Entry] = (),
) -> Drawing:
    """Let ``paint`` draw on axes, and render them three times.

    Args:
        about: name and title.
        paint: is given the axes.
        size: width and height in inches, without the legend.
        margins: left, right, top, bottom in inches.
        legend: below the axes, in the files only.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    (width, height), (left, right, top, bottom) = size, margins
    legend = list(legend)
    columns = max(1, min(_LEGEND_COLUMNS, int(width / 1.1)))
    extra = _LEGEND_ROW * math.ceil(len(legend) / columns)
    whole = height + extra
    # The same drawing is the same file, and two in one page have no id in common.
    style = {**_STYLE, "svg.hashsalt": about.name}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the PNG's font does not have
        figure = Figure(figsize=(width, whole))
        FigureCanvasAgg(figure)
        box = (left / width, (bottom + extra) / whole,
               (width - left - right) / width, (height - top - bottom) / whole)  # fmt: skip
        paint(figure.add_axes(box))
        if legend:
            handles = [
                Line2D([], [], color=_LIGHT[e.colour], marker=marker(e.colour), label=e.label)
                for e in legend
            ]
            figure.legend(
                handles=handles, loc="lower center", ncols=columns, fontsize=9, handlelength=1.4
            ).set_gid("legend")
        svg, png = io.BytesIO(), io.BytesIO()
        # Without a date, and with our title in place of the library's.
        nothing = {"Date": None, "Creator": None}
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    page = _for_page(svg.getvalue(), about.title, cut=72 * extra)
    return Drawing(about, page, svg.getvalue(), png.getvalue(), round(96 * width))


def _for_page(svg: bytes, title: str, cut: float) -> str:
    """The SVG with the page's colours and font, no legend, and the ids that something refers to."""
    ElementTree.register_namespace("", _NAMESPACE)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)  # our own: matplotlib escapes what it is given
    for parent in root.iter():
        for child in list(parent):
            if child.get("id") == "legend" or child.tag == f"{{{_NAMESPACE}}}metadata":
                parent.remove(child)
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
    root.set("viewBox", f"0 0 {width:g} {height - cut:g}")
    for key in ("width", "height", "version"):
        del root.attrib[key]
    root.set("role", "img")
    root.set("aria-label", title)
    for rules in root.iter(f"{{{_NAMESPACE}}}style"):
        rules.text = ""  # it would hold for the whole page, which says the same itself
    return ElementTree.tostring(root, encoding="unicode")


# ------------------------------------------------------------------------------ the kinds


def accuracy_over_shots(about: Named, lines: Mapping[Entry, Mapping[int, Cell]]) -> Drawing:
    """Accuracy in percent by shots as lines with bands of the interval, level ones dashed."""
    shots = sorted({k for points in lines.values() for k in points})

    def paint(axes: Any) -> None:
        for entry, points in lines.items():
            colour, shape = _LIGHT[entry.colour], marker(entry.colour)
            means = np.array([points[k].value for k in sorted(points)])
            if shape == "_":
                level = float(np.mean([p.value for p in points.values()]))
                axes.axhline(level, color=colour, linestyle=(0, (4, 3)), linewidth=1.5)
                continue
            x = [shots.index(k) for k in sorted(points)]
            # Two seeds' interval is twelve standard errors wide: only a table can hold it.
            known = (points[k] for k in sorted(points))
            half = np.array([(p.half if p.count > 2 else None) or 0.0 for p in known])
            if half.any():
                axes.fill_between(
                    x, means - half, means + half, color=colour, alpha=0.08, linewidth=0
                )
            axes.plot(x, means, color=colour, marker=shape)
        # Wide bands of few seeds must not flatten the lines.
        every = [p.value or 0.0 for points in lines.values() for p in points.values()]
        low, high = min(every), max(every)
        room = max(0.25 * (high - low), 2.0)
        axes.set(xlabel="shots", ylabel="accuracy, %", ylim=(low - room, high + room))
        axes.set_xticks(range(len(shots)), [str(k) for k in shots])
        axes.set_xlim(-0.3, len(shots) - 0.7)
        axes.grid(visible=False, axis="x")

    return draw(about, paint, legend=lines)


def _dots(
    about: Named,
    what: str,
    rows: Mapping[Entry, Any],
    put: Callable[[Any, int, str, Any], None],
    ends: Sequence[float],
    room: float,
) -> Drawing:
    """What ``put`` draws for each method, one above the other, the first on top.

    Args:
        about: name and title.
        what: label of the axis.
        rows: a method's legend, and what ``put`` is given with axes, row and colour.
        put: draws it.
        ends: values that must be in sight.
        room: beyond them.
    """
    entries = list(rows)[::-1]

    def paint(axes: Any) -> None:
        for i, entry in enumerate(entries):
            put(axes, i, _LIGHT[entry.colour], rows[entry])
        axes.set(xlabel=what, xlim=(min(ends) - room, max(ends) + room))
        axes.set(ylim=(-0.6, len(entries) - 0.4))
        axes.set_yticks(range(len(entries)), [entry.label for entry in entries])
        axes.tick_params(axis="y", labelcolor=_LIGHT["ink"])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")

    labels = min(2.0, 0.25 + 0.078 * max(len(entry.label) for entry in entries))
    size = (4.6, 0.8 + 0.32 * len(entries))
    return draw(about, paint, size=size, margins=(labels, 0.15, 0.1, 0.5))


def accuracy_by_method(about: Named, lines: Mapping[Entry, Mapping[int, Cell]]) -> Drawing:
    """A dot with its interval for each method, where there is one number of shots only."""

    def put(axes: Any, row: int, colour: str, point: Cell) -> None:
        axes.errorbar(
            point.value, row, xerr=point.half or None, fmt="o", markersize=7, capsize=0,
            elinewidth=2.5, color=colour,
        )  # fmt: skip

    rows = {entry: next(iter(points.values())) for entry, points in lines.items()}
    ends = [(p.value or 0.0) + side * (p.half or 0.0) for p in rows.values() for side in (-1, 1)]
    room = 0.08 * (max(ends) - min(ends)) + 1
    return _dots(about, "accuracy, %", rows, put, ends, room)


def before_and_after(about: Named, what: str, rows: Mapping[Entry, tuple[float, float]]) -> Drawing:
    """For each method a hollow dot (before), a filled one (after), and the way between."""

    def put(axes: Any, row: int, colour: str, ends: tuple[float, float]) -> None:
        axes.plot(ends, [row, row], color=colour, linewidth=2.2)
        axes.plot(ends[0], row, "o", markersize=7, markerfacecolor="none", color=colour)
        axes.plot(ends[1], row, "o", markersize=7.5, color=colour)
        axes.locator_params(axis="x", nbins=5)

    ends = [value for pair in rows.values() for value in pair]
    return _dots(about, what, rows, put, ends, 0.1 * (max(ends) - min(ends)) + 0.002)


def training_curves(about: Named, what: str, curves: Mapping[Entry, np.ndarray]) -> Drawing:
    """Mean over seeds by epoch, in a band from the lowest seed to the highest.

    Args:
        about: name and title.
        what: loss term.
        curves: (seeds, epochs) of each method; shorter rows end in NaN.
    """

    def paint(axes: Any) -> None:
        for entry, values in curves.items():
            colour, epochs = _LIGHT[entry.colour], np.arange(1, values.shape[1] + 1)
            # More points than pixels would only make the page larger.
            step = max(1, len(epochs) // 200)
            x, values = epochs[::step], values[:, ::step]
            if len(values) > 1:
                low, high = np.nanmin(values, 0), np.nanmax(values, 0)
                axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            shape = "o" if len(x) == 1 else None
            axes.plot(x, np.nanmean(values, 0), color=colour, linewidth=1.6, marker=shape)
        axes.set(xlabel="epoch", ylabel=what)
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False, axis="x")

    return draw(about, paint, size=(4.0, 2.7), margins=(0.72, *_FAR[1:]), legend=curves)


def confusion_matrix(about: Named, names: Sequence[str], shares: np.ndarray) -> Drawing:
    """Share of each true class (row) that is named as each class (column), (C, C)."""
    size, short = len(names), [n if len(n) <= 22 else n[:21] + "…" for n in names]

    def paint(axes: Any) -> None:
        from matplotlib.collections import PatchCollection
        from matplotlib.colors import to_rgba
        from matplotlib.patches import Rectangle

        cells, colours = [], []
        for row, column in np.argwhere(shares > 0):
            cells.append(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92))
            kind = _LIGHT["coop" if row == column else "accent"]
            colours.append(to_rgba(kind, 0.08 + 0.92 * shares[row, column]))
        axes.add_collection(PatchCollection(cells, facecolors=colours, linewidths=0))
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="named", ylabel="true")
        letters = max(6.0, 9.0 - size / 20)
        axes.set_xticks(range(size), short, rotation=90, fontsize=letters)
        axes.set_yticks(range(size), short, fontsize=letters)
        axes.tick_params(labelcolor=_LIGHT["ink"])
        axes.grid(linewidth=0.5)
        axes.spines[:].set_visible(False)

    labels = 0.4 + 0.056 * max(len(name) for name in [*short, "class"])
    side = max(2.0, 0.17 * size) + labels + 0.15
    return draw(about, paint, size=(side, side), margins=(labels, 0.15, 0.15, labels))


def reliability(
    about: Named, colour: str, confidence: np.ndarray, correct: np.ndarray, bins: int
) -> Drawing:
    """Accuracy by confidence in equal bins, beside the diagonal of perfect calibration.

    Args:
        about: name and title.
        colour: of the bars.
        confidence: (n,) probability of the class that was named.
        correct: (n,) whether it was the right one.
        bins: as many as the calibration error is computed with.
    """
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    inside = np.bincount(which, minlength=bins)
    right = np.bincount(which, correct.astype(float), minlength=bins)

    def paint(axes: Any) -> None:
        for i in np.flatnonzero(inside):
            # How full a bin is shows as how solid its bar is.
            alpha = float(0.25 + 0.75 * np.sqrt(inside[i] / inside.max()))
            place, height = (i + 0.5) / bins, right[i] / inside[i]
            axes.bar(place, height, width=0.9 / bins, color=_LIGHT[colour], alpha=alpha)
        axes.plot([0, 1], [0, 1], color=_LIGHT["muted"], linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_yticks([0.5, 1], ["0.5", "1"])

    return draw(about, paint, size=(3.2, 3.0), margins=(0.52, *_FAR[1:]))


def feature_map(
    about: Named,
    points: np.ndarray,
    limits: np.ndarray,
    colours: Sequence[str | None],
    legend: Sequence[Entry],
) -> Drawing:
    """Embedded features as dots; those without a colour stay in the background.

    Args:
        about: name and title.
        points: (n, 2).
        limits: (2, 2) lowest and highest point, shared by the maps that belong together.
        colours: n names in `PALETTE`, or None.
        legend: what the colours mean.
    """

    def paint(axes: Any) -> None:
        for colour in dict.fromkeys(sorted(colours, key=lambda c: c is not None)):
            size, alpha = (9, 0.35) if colour is None else (16, 0.85)
            x, y = points[[c == colour for c in colours]].T
            axes.scatter(x, y, s=size, linewidths=0, color=_LIGHT[colour or "muted"], alpha=alpha)
        low, high = limits
        room = 0.04 * (high - low)
        (left, bottom), (right, top) = low - room, high + room
        axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(True)

    return draw(about, paint, size=(3.2, 3.0), margins=(0.05, 0.05, 0.05, 0.05), legend=legend)


def data_uri(image: bytes, kind: str) -> str:
    """An image for an ``src``, which needs no other file."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
