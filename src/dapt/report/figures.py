"""Figures by matplotlib: SVG whose colours follow the page, and SVG and PNG for papers.

A figure is drawn in the light colours of `PALETTE`. In the page's copy each of them becomes a CSS
variable of the same name, so that one drawing serves light and dark. Its legend, which the page
has as text, stands below the axes in the files and is cut off in the page.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from dapt.report.statistics import Estimate

# Name of the CSS variable -> (light, dark). No two light ones may be equal.
PALETTE = {
    "ink": ("#1c2024", "#e8eaed"),
    "muted": ("#5f6773", "#a3abb6"),
    "rule": ("#dfe3e8", "#343a42"),
    "accent": ("#c2410d", "#fb8c4b"),
    "zero-shot": ("#6b7281", "#9aa3b0"),
    "linear-probe": ("#a16208", "#e3b341"),
    "coop": ("#2563ec", "#6ea8fe"),
    "vpt": ("#0d9489", "#3cd5c1"),
    "vlpt": ("#7c3aee", "#b294fb"),
    "dapt-text": ("#db2778", "#f77fb8"),
    "dapt-visual": ("#5f930e", "#a5d94b"),
    "dapt": ("#c2410c", "#fb8b4a"),
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
MARKERS = {"zero-shot": "_", "linear-probe": "s", "coop": "^", "vpt": "D", "vlpt": "v",
           "dapt-text": "P", "dapt-visual": "X", "dapt": "o"}  # fmt: skip
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and has the page's font
    "svg.hashsalt": "dapt",  # the same drawing is the same file
    "text.parse_math": False,  # a class name is no formula
    "font.size": 10,
    "axes.edgecolor": PALETTE["rule"][0],
    "axes.labelcolor": PALETTE["muted"][0],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": PALETTE["rule"][0],
    "grid.linewidth": 0.8,
    "text.color": PALETTE["ink"][0],
    "xtick.color": PALETTE["rule"][0],
    "ytick.color": PALETTE["rule"][0],
    "xtick.labelcolor": PALETTE["muted"][0],
    "ytick.labelcolor": PALETTE["muted"][0],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
_NAMESPACE = "http://www.w3.org/2000/svg"
_LEGEND_ROW, _LEGEND_COLUMNS = 0.24, 4  # inches; entries a row


@dataclass(frozen=True)
class Entry:
    """A line of a legend: a colour of `PALETTE` and what has it."""

    colour: str
    label: str


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    Attributes:
        name: of its files.
        title: one line; what a screen reader says of it.
        caption: the title where its surroundings say the rest already.
        page: SVG element for the page.
        svg, png: the files.
        width: of the page's copy in CSS pixels at its natural size.
    """

    name: str
    title: str
    caption: str
    page: str
    svg: bytes
    png: bytes
    width: int


def method_colour(method: str, methods: Sequence[str]) -> str:
    """Name of a method's colour; methods that the package does not know share three."""
    if method in MARKERS:
        return method
    return f"other-{[m for m in methods if m not in MARKERS].index(method) % 3}"


def draw(
    name: str,
    title: str,
    paint: Callable[[Any], None],
    *,
    size: tuple[float, float] = (4.6, 3.0),
    margins: tuple[float, float, float, float] = (0.55, 0.12, 0.12, 0.5),
    legend: Sequence[Entry] = (),
    caption: str = "",
) -> Drawing:
    """Let ``paint`` draw on axes of ``size`` inches, and render them three times.

    Args:
        name, title, caption: of the drawing.
        paint: is given the axes.
        size: width and height without the legend.
        margins: left, right, top, bottom in inches.
        legend: below the axes, in the files only.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    width, height = size
    columns = max(1, min(_LEGEND_COLUMNS, int(width / 1.1)))
    extra = _LEGEND_ROW * math.ceil(len(legend) / columns) if legend else 0.0
    left, right, top, bottom = margins
    whole = height + extra
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the PNG's font does not have
        figure = Figure(figsize=(width, whole))
        FigureCanvasAgg(figure)
        box = (left / width, (bottom + extra) / whole,
               (width - left - right) / width, (height - top - bottom) / whole)  # fmt: skip
        paint(figure.add_axes(box))
        if legend:
            handles = [
                Line2D([], [], color=PALETTE[e.colour][0], marker=MARKERS.get(e.colour, "o"))
                for e in legend
            ]
            for handle, entry in zip(handles, legend, strict=True):
                handle.set_label(entry.label)
            shown = figure.legend(
                handles=handles, loc="lower center", ncols=columns, fontsize=9, handlelength=1.4
            )
            shown.set_gid("legend")
        svg, png = io.BytesIO(), io.BytesIO()
        # Without a date, and with our title in place of the library's.
        figure.savefig(
            svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    page = _for_page(svg.getvalue(), name, title, cut=72 * extra)
    return Drawing(
        name, title, caption or title, page, svg.getvalue(), png.getvalue(), round(96 * width)
    )


def _for_page(svg: bytes, name: str, title: str, cut: float) -> str:
    """The SVG with the page's colours and font, ids of its own, and no legend."""
    ElementTree.register_namespace("", _NAMESPACE)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)  # our own: matplotlib escapes what it is given
    prefix = hashlib.sha256(name.encode()).hexdigest()[:8]
    for parent in root.iter():
        for child in list(parent):
            if child.get("id") == "legend" or child.tag == f"{{{_NAMESPACE}}}metadata":
                parent.remove(child)
    used = {
        target
        for element in root.iter()
        for value in element.attrib.values()
        for target in re.findall(r"(?:^|url\()#([\w.-]+)", value)
    }
    for element in root.iter():
        if (own := element.get("id")) is not None:
            if own in used:
                element.set("id", f"{prefix}-{own}")
            else:
                del element.attrib["id"]
        for key, value in list(element.attrib.items()):
            if key.endswith("href") and value.startswith("#"):
                element.set(key, f"#{prefix}-{value[1:]}")
            elif key == "clip-path":
                element.set(key, value.replace("#", f"#{prefix}-"))
            elif key == "style":
                style = re.sub(r"font-family: [^;]*;? ?", "", value)
                style = re.sub(r"#[0-9a-f]{6}", lambda m: _VARIABLES.get(m[0], m[0]), style)
                element.set(key, style)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    height -= cut
    root.set("viewBox", f"0 0 {width:g} {height:g}")
    for key in ("width", "height", "version"):
        del root.attrib[key]
    root.set("role", "img")
    root.set("aria-label", title)
    for rules in root.iter(f"{{{_NAMESPACE}}}style"):
        rules.text = ""  # it would hold for the whole page, which says the same itself
    return ElementTree.tostring(root, encoding="unicode")


# ------------------------------------------------------------------------------ the kinds


@dataclass(frozen=True)
class Series:
    """One method's estimates over shots."""

    colour: str
    label: str
    points: dict[int, Estimate]  # shots -> accuracy in percent
    level: bool = False  # the same for any number of shots


def accuracy_over_shots(name: str, title: str, series: Sequence[Series], caption: str) -> Drawing:
    """Lines with bands of the interval; a level method is a dashed line across."""
    shots = sorted({k for s in series for k in s.points})
    place = {k: i for i, k in enumerate(shots)}

    def paint(axes: Any) -> None:
        means = [e.mean for s in series for e in s.points.values()]
        for s in series:
            colour = PALETTE[s.colour][0]
            if s.level:
                level = float(np.mean([e.mean for e in s.points.values()]))
                axes.axhline(level, color=colour, linestyle=(0, (4, 3)), linewidth=1.5)
                continue
            ks = sorted(s.points)
            x = [place[k] for k in ks]
            y = np.array([s.points[k].mean for k in ks])
            # Two seeds' interval is twelve standard errors wide: only a table can hold it.
            half = np.array(
                [(s.points[k].half if s.points[k].count > 2 else None) or 0.0 for k in ks]
            )
            if half.any():
                axes.fill_between(x, y - half, y + half, color=colour, alpha=0.08, linewidth=0)
            axes.plot(x, y, color=colour, marker=MARKERS.get(s.colour, "o"))
        # Wide bands of few seeds must not flatten the lines.
        low, high = min(means), max(means)
        room = max(0.25 * (high - low), 2.0)
        axes.set(xlabel="shots", ylabel="accuracy, %", ylim=(low - room, high + room))
        axes.set_xticks(range(len(shots)), [str(k) for k in shots])
        axes.set_xlim(-0.3, len(shots) - 0.7)
        axes.grid(visible=False, axis="x")

    return draw(
        name, title, paint, legend=[Entry(s.colour, s.label) for s in series], caption=caption
    )


def accuracy_by_method(name: str, title: str, series: Sequence[Series], caption: str) -> Drawing:
    """A dot with its interval for each method, where there is one number of shots only."""
    rows = list(series)[::-1]

    def paint(axes: Any) -> None:
        low, high = math.inf, -math.inf
        for i, s in enumerate(rows):
            point = next(iter(s.points.values()))
            half = point.half or 0.0
            low, high = min(low, point.mean - half), max(high, point.mean + half)
            axes.errorbar(
                point.mean, i, xerr=half or None, fmt="o", markersize=7, capsize=0, elinewidth=2.5,
                color=PALETTE[s.colour][0],
            )  # fmt: skip
        room = 0.08 * (high - low) + 1
        axes.set(xlabel="accuracy, %", xlim=(low - room, high + room), ylim=(-0.6, len(rows) - 0.4))
        axes.set_yticks(range(len(rows)), [s.label for s in rows])
        axes.tick_params(axis="y", labelcolor=PALETTE["ink"][0])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")

    return draw(
        name, title, paint,
        size=(4.6, 0.8 + 0.32 * len(rows)), margins=(_label_room(rows), 0.15, 0.1, 0.5),
        caption=caption,
    )  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A figure of one method before and after tuning."""

    colour: str
    label: str
    before: float
    after: float


def before_and_after(
    name: str, title: str, what: str, changes: Sequence[Change], caption: str
) -> Drawing:
    """For each method a hollow dot (before), a filled one (after), and the way between."""
    rows = list(changes)[::-1]

    def paint(axes: Any) -> None:
        values = [v for c in rows for v in (c.before, c.after)]
        for i, c in enumerate(rows):
            colour = PALETTE[c.colour][0]
            axes.plot([c.before, c.after], [i, i], color=colour, linewidth=2.2)
            axes.plot(c.before, i, "o", markersize=7, markerfacecolor="none", color=colour)
            axes.plot(c.after, i, "o", markersize=7.5, color=colour)
        room = 0.1 * (max(values) - min(values)) + 0.002
        axes.set(xlabel=what, xlim=(min(values) - room, max(values) + room))
        axes.set(ylim=(-0.6, len(rows) - 0.4))
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(range(len(rows)), [c.label for c in rows])
        axes.tick_params(axis="y", labelcolor=PALETTE["ink"][0])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")

    return draw(
        name, title, paint,
        size=(4.6, 0.8 + 0.32 * len(rows)), margins=(_label_room(rows), 0.15, 0.1, 0.5),
        caption=caption,
    )  # fmt: skip


def _label_room(rows: Sequence[Series] | Sequence[Change]) -> float:
    return min(2.0, 0.25 + 0.078 * max(len(row.label) for row in rows))


@dataclass(frozen=True)
class Curve:
    """A loss term of one method by epoch, one row a seed; shorter ones end in NaN."""

    colour: str
    label: str
    values: np.ndarray  # (seeds, epochs)


def training_curves(
    name: str, title: str, what: str, curves: Sequence[Curve], caption: str
) -> Drawing:
    """Mean over seeds by epoch, in a band from the lowest seed to the highest."""

    def paint(axes: Any) -> None:
        for curve in curves:
            colour, epochs = PALETTE[curve.colour][0], np.arange(1, curve.values.shape[1] + 1)
            # More points than pixels would only make the page larger.
            step = max(1, len(epochs) // 200)
            x, values = epochs[::step], curve.values[:, ::step]
            if len(values) > 1:
                low, high = np.nanmin(values, 0), np.nanmax(values, 0)
                axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            marker = "o" if len(x) == 1 else None
            axes.plot(x, np.nanmean(values, 0), color=colour, linewidth=1.6, marker=marker)
        axes.set(xlabel="epoch", ylabel=what)
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False, axis="x")

    return draw(
        name, title, paint, size=(4.0, 2.7), margins=(0.72, 0.12, 0.12, 0.5),
        legend=[Entry(c.colour, c.label) for c in curves], caption=caption,
    )  # fmt: skip


def confusion_matrix(
    name: str, title: str, names: Sequence[str], shares: np.ndarray, caption: str
) -> Drawing:
    """Share of each true class (row) that is named as each class (column), (C, C)."""
    size = len(names)

    def paint(axes: Any) -> None:
        from matplotlib.collections import PatchCollection
        from matplotlib.colors import to_rgba
        from matplotlib.patches import Rectangle

        cells, colours = [], []
        for row, column in np.argwhere(shares > 0):
            cells.append(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92))
            kind = "coop" if row == column else "accent"
            colours.append(to_rgba(PALETTE[kind][0], 0.08 + 0.92 * shares[row, column]))
        axes.add_collection(PatchCollection(cells, facecolors=colours, linewidths=0))
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="named", ylabel="true")
        letters = max(6.0, 9.0 - size / 20)
        short = [n if len(n) <= 22 else n[:21] + "…" for n in names]
        axes.set_xticks(range(size), short, rotation=90, fontsize=letters)
        axes.set_yticks(range(size), short, fontsize=letters)
        axes.tick_params(labelcolor=PALETTE["ink"][0])
        axes.grid(linewidth=0.5)
        axes.spines[:].set_visible(False)

    side = max(2.0, 0.17 * size)
    labels = 0.4 + 0.056 * max(len(n) for n in [*(n[:22] for n in names), "class"])
    return draw(
        name, title, paint,
        size=(side + labels + 0.15, side + labels + 0.15), margins=(labels, 0.15, 0.15, labels),
        caption=caption,
    )  # fmt: skip


def reliability(
    name: str,
    title: str,
    colour: str,
    confidence: np.ndarray,
    correct: np.ndarray,
    bins: int,
    caption: str,
) -> Drawing:
    """Accuracy by confidence in equal bins, beside the diagonal of perfect calibration.

    Args:
        name, title, colour, caption: of the drawing.
        confidence: (n,) probability of the class that was named.
        correct: (n,) whether it was the right one.
        bins: as many as the calibration error is computed with.
    """
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    inside = np.bincount(which, minlength=bins)
    right = np.bincount(which, correct.astype(float), minlength=bins)

    def paint(axes: Any) -> None:
        full = inside > 0
        x = (np.arange(bins)[full] + 0.5) / bins
        # How full a bin is shows as how solid its bar is.
        weight = 0.25 + 0.75 * np.sqrt(inside[full] / inside.max())
        heights = right[full] / inside[full]
        for at, height, alpha in zip(x, heights, weight, strict=True):
            axes.bar(at, height, width=0.9 / bins, color=PALETTE[colour][0], alpha=float(alpha))
        axes.plot([0, 1], [0, 1], color=PALETTE["muted"][0], linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_yticks([0.5, 1], ["0.5", "1"])

    return draw(
        name, title, paint, size=(3.2, 3.0), margins=(0.52, 0.12, 0.12, 0.5), caption=caption
    )


def feature_map(
    name: str,
    title: str,
    points: np.ndarray,
    limits: np.ndarray,
    colours: Sequence[str | None],
    legend: Sequence[Entry],
    caption: str,
) -> Drawing:
    """Embedded features as dots; those without a colour stay in the background.

    Args:
        name, title, legend, caption: of the drawing.
        points: (n, 2).
        limits: (2, 2) lowest and highest point, shared by the maps that belong together.
        colours: n names in `PALETTE`, or None.
    """

    def paint(axes: Any) -> None:
        for colour in dict.fromkeys(sorted(colours, key=lambda c: c is not None)):
            x, y = points[[c == colour for c in colours]].T
            axes.scatter(
                x, y, s=9 if colour is None else 16, linewidths=0,
                color=PALETTE[colour or "muted"][0], alpha=0.35 if colour is None else 0.85,
            )  # fmt: skip
        room = 0.04 * (limits[1] - limits[0])
        axes.set(xlim=(limits[0][0] - room[0], limits[1][0] + room[0]))
        axes.set(ylim=(limits[0][1] - room[1], limits[1][1] + room[1]))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines[:].set_visible(True)

    return draw(
        name,
        title,
        paint,
        size=(3.2, 3.0),
        margins=(0.05, 0.05, 0.05, 0.05),
        legend=legend,
        caption=caption,
    )


def data_uri(image: bytes, kind: str) -> str:
    """An image for an ``src``, which needs no other file."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
