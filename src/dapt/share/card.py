"""The model card of a run: what it is, what it was made from, how well it does, what it is for."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from dapt import __version__
from dapt.clip.backbone import BUNDLED
from dapt.errors import printable
from dapt.methods import get_method
from dapt.run.directory import RunDirectory
from dapt.settings import FITTED, IMPORTED, Settings, backbone_name

# By this a card is known for one of ours, which may be replaced.
_START = "---\nlibrary_name: dapt\n"
# Settings that are told elsewhere in the card, or only say where things lie on one machine.
_NOT_TOLD = frozenset(
    {"dataset", "root", "domain", "class_names", "support_set", "method", "backbone", "pretrained",
     "device", "eval_batch_size", "text_memory", "memory_budget", "checkpoint_every"}
)  # fmt: skip


def is_card(path: Path) -> bool:
    """Whether a file is a model card that `model_card` wrote."""
    with path.open("rb") as file:
        return file.read(len(_START)) == _START.encode()


def model_card(run: RunDirectory, what: str = "a run directory of dapt") -> str:
    """A run's model card as Markdown, with the head that the Hugging Face hub reads.

    Args:
        run: a run whose prompts are there, with or without metrics.
        what: the form that the card goes with; the metrics stay the run's.
    """
    settings = run.read_settings()
    task, environment, method = run.read_task(), run.read_environment(), get_method(settings.method)
    images, names = run.read_support().train, task.class_names
    data = {IMPORTED: "not recorded", FITTED: "images given in Python"}.get(
        task.dataset, task.dataset
    )
    if environment.imported_from is not None:
        made = (
            f"The prompts were read from the checkpoint {_plain(environment.imported_from)} "
            f"(SHA-256 {_plain(environment.imported_sha256)}), tuned by other code; the "
            "settings are those given at import, and the images they were tuned on are not known."
        )
    else:
        made = (
            f"Tuned on {len(images)} images, at most {settings.shots} a class, seed "
            f"{settings.seed}."
        )
        tuned = {image.class_name for image in images}
        if added := [_plain(name) for name in names if name not in tuned]:
            made += f" Known by {'its' if len(added) == 1 else 'their'} name alone: "
            made += f"{', '.join(added)}."
    told = {k: v for k, v in settings.model_dump().items() if k not in _NOT_TOLD and v is not None}
    listed = "\n".join(f"| {name} | {_plain(value)} |" for name, value in told.items())
    data, backbone_licence, data_licence = _plain(data), *_licences(settings, task.dataset)
    template = _plain(settings.template or task.template)
    learned = method.describe(settings) or "class names in a template, nothing learned,"
    mit = backbone_licence.startswith(_MIT) and data_licence.startswith(_MIT)
    return f"""{_START}license: {"mit" if mit else "other"}{"" if mit else _SEE_BELOW}
tags:
- clip
- prompt-tuning
- image-classification
---

# {method.title} on {data}: {len(names)} classes

This is {what}; written by dapt {__version__}. A frozen CLIP-like model
with {learned} classifies images
into the classes listed below.

## Backbone

{_plain(backbone_name(settings))}. Prompts fit its weights, of SHA-256
{_plain(environment.backbone_sha256)}, and no others.

## Data

Dataset: {data}. {made}

Classes, in label order: {", ".join(map(_plain, names))}.

Template for class names without a learned text prompt: "{template}".

## Settings

| setting | value |
|---|---|
{listed}

## Metrics

{_metrics(run)}

## Licence

- Backbone: {backbone_licence}
- Prompts and this file: {_PROMPTS_MIT if mit else _PROMPTS_OTHER}
- Images of {data}: {data_licence}

## Intended use and limits

For images of the kind it was tuned on, one of the classes in each: it names one of them for any
image at all, so what lies outside is misnamed, often with confidence. Unless the calibration
error above is small, its probabilities are not to be taken at their word. It has what the backbone
learned from its training data, biases included. A handful of images a class cannot show how it does
on people, places or conditions that they do not contain: measure that before relying on it, and do
not use it alone for decisions about people.
"""


def _metrics(run: RunDirectory) -> str:
    if not run.metrics_file.is_file():
        return "Not evaluated."
    test = run.read_metrics().test
    names = {"accuracy": "top-1 accuracy", "top5": "top-5 accuracy", "macro_f1": "macro-F1",
             "ece": "expected calibration error"}  # fmt: skip
    found = {label: getattr(test, name) for name, label in names.items()}
    rows = [f"| {label} | {100 * v:.1f} % |" for label, v in found.items() if v is not None]
    return "\n".join([f"On {test.images:,} test images:", "", "| | |", "|---|---|", *rows])


_MIT = "MIT"
_SEE_BELOW = "\nlicense_name: see-below"
_PROMPTS_MIT = "MIT, as what they were made from, unless whoever tuned them says otherwise."
_PROMPTS_OTHER = "whoever tuned them decides; the licence of the images may bind them."


def _licences(settings: Settings, dataset: str) -> tuple[str, str]:
    """Of the backbone and of the images, in words that start with the licence where it is known."""
    backbone = "not known to dapt; see where the weights come from."
    openai = "/" not in settings.backbone and settings.pretrained in (None, "openai")
    if settings.backbone == BUNDLED:
        backbone = (
            f"{_MIT} (the small CLIP in dapt; what it was trained on is listed in its LICENSES.md)."
        )
    elif openai and not Path(settings.backbone).suffix:
        backbone = f"{_MIT} (OpenAI's CLIP)."
    images = "not known to dapt; see where they come from."
    if dataset == "bundled:streamline-emojis":
        images = "CC BY 4.0 (Streamline Emojis; see dapt's LICENSES.md)."
    elif dataset.partition(":")[0] == BUNDLED:
        images = f"{_MIT} (Fluent Emoji; see dapt's LICENSES.md)."
    return backbone, images


def _plain(value: Any) -> str:
    """A value as text that Markdown and HTML take for nothing else, on one line."""
    text = html.escape(printable(str(value)), quote=False)
    return re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
