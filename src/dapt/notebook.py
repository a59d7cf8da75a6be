"""A fitted classifier as notebooks show it: figures, a report, and photos with their classes."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment as Templates

from dapt.data.grey import Scale
from dapt.data.images import read_picture
from dapt.data.pictures import data_uri
from dapt.engine.classifier import Classifier
from dapt.engine.words import nearest_words
from dapt.errors import UserError, readable
from dapt.methods import get_method
from dapt.run.records import Environment, SupportRecord, TaskRecord
from dapt.settings import backbone_name, make_settings

# Whatever is put in is escaped. Colours are the notebook's own, light or dark.
_TABLE = """<table>
{%- if head %}<tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>{% endif %}
{%- for row in rows %}<tr>{% for cell in row %}<td style="text-align: left">{{ cell }}</td>
{%- endfor %}</tr>{% endfor %}</table>"""
_PHOTOS = """<div style="display: flex; flex-wrap: wrap; gap: 12px">
{%- for picture, classes in photos %}<figure style="margin: 0; width: {{ side }}px">
<img src="{{ picture }}" alt="" style="max-width: 100%"><figcaption>
{%- for name, share in classes %}{{ name }} {{ share }}<br>{% endfor %}</figcaption></figure>
{%- endfor %}</div>"""
_MAKE = Templates(autoescape=True).from_string
_SIDE = 160  # pixels of a photo


@dataclass(frozen=True)
class Page:
    """HTML where a notebook shows it, and the text of a terminal."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> Page:
    """Rows of texts, below a ``head``."""
    lines = "\n".join("  ".join(row) for row in (head, *rows) if row)
    return Page(_MAKE(_TABLE).render(rows=rows, head=head), lines)


def figures(files: Mapping[str, bytes], learned: int, forecast: Mapping[str, Any] | None) -> Page:
    """What a run's files tell of it, its ``learned`` parameters, and what to expect of it."""
    settings = make_settings(json.loads(files["settings.json"]))
    task = TaskRecord.model_validate_json(files["task.json"])
    images = SupportRecord.model_validate_json(files["support_set.json"]).train
    spent = Environment.model_validate_json(files["environment.json"]).tuning_seconds
    shown = [readable(name) for name in task.class_names[:10]]
    more = len(task.class_names) - len(shown)
    names = ", ".join([*shown, f"{more:,} more"] if more else shown)
    rows = [
        ("method", get_method(settings.method).title),
        ("backbone", backbone_name(settings)),
        ("classes", f"{len(task.class_names):,}: {names}"),
        ("tuned on", f"{len(images):,} images"),
        ("learned parameters", f"{learned:,}"),
    ]
    rows += [("tuned in", f"{spent:g} s")] if spent else []
    if forecast is not None:
        share, low, high = (100 * forecast[name] for name in ("accuracy", "low", "high"))
        expected = f"{share:.0f} % right, most likely {low:.0f} to {high:.0f} %"
        rows.append(("expected on new photos", f"{expected} ({forecast['images']:,} held out)"))
        rows.append(("advice", forecast["advice"]))
    return table(rows)


def report(
    files: Mapping[str, bytes], classifier: Classifier, forecast: Mapping[str, Any] | None
) -> Page:
    """Figures, images of each class, classes taken for each other, loss terms, nearest words."""
    pages = [figures(files, classifier.learned_parameters, forecast)]
    items = SupportRecord.model_validate_json(files["support_set.json"]).train
    counts = Counter(readable(item.class_name) for item in items)
    pages.append(table([(n, f"{k:,}") for n, k in counts.items()], ("class", "images tuned on")))
    if forecast and forecast["confused"]:
        pairs = [(*map(readable, p["classes"]), f"{p['images']:,}") for p in forecast["confused"]]
        pages.append(table(pairs, ("one class", "the other", "held-out images confused")))
    if "log.csv" in files:
        header, *rows = csv.reader(io.StringIO(files["log.csv"].decode()))
        at = [i for i, name in enumerate(header) if name not in ("step", "epoch")]
        ends = [(header[i], *(f"{float(row[i]):.3g}" for row in (rows[0], rows[-1]))) for i in at]
        pages.append(table(ends, ("of a step", "first", "last")))
    with suppress(UserError):
        words = nearest_words(classifier)[:64]
        told = [
            (f"{w.class_name} {w.vector}".strip(), ", ".join(f"{n} {d:.2f}" for n, d in w.nearest))
            for w in words
        ]
        pages.append(table(told, ("text vector", "nearest words (Euclidean distance)")))
    return Page("\n".join(page.html for page in pages), "\n\n".join(page.text for page in pages))


def photos(
    images: Sequence[Any],
    found: Sequence[Sequence[tuple[str, float]]],
    grey: Scale | None,
) -> Page:
    """Small copies of images, each above its classes with their probabilities."""
    told = [[(readable(name), f"{share:.1%}") for name, share in classes] for classes in found]
    shown = [data_uri(read_picture(image, grey), _SIDE) for image in images]
    html = _MAKE(_PHOTOS).render(photos=list(zip(shown, told, strict=True)), side=_SIDE)
    lines = (", ".join(" ".join(one) for one in classes) for classes in told)
    return Page(html, "\n".join(f"{place}: {line}" for place, line in enumerate(lines)))


class Shown:
    """What makes of an estimator one that notebooks show, once it is fitted."""

    files_: dict[str, bytes]
    forecast_: Mapping[str, Any] | None

    def _ready(self) -> Classifier:
        """The fitted classifier; scikit-learn's NotFittedError before."""
        raise NotImplementedError

    def report(self) -> Page:
        """What was fitted, as a notebook shows it inline, or text; before `fit`, NotFittedError."""
        classifier = self._ready()
        return report(self.files_, classifier, self.forecast_)

    def _repr_html_(self) -> str:
        if not hasattr(self, "files_"):
            return str(super()._repr_html_())  # type: ignore[misc]
        return figures(self.files_, self._ready().learned_parameters, self.forecast_).html

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self._repr_html_()}
