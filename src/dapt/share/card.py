"""The model card of a run: what it is, what it was made from, how well it does, what it is for."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dapt import __version__
from dapt.clip.sources import BUNDLED
from dapt.errors import printable
from dapt.methods import get_method
from dapt.run.directory import RunDirectory
from dapt.settings import FITTED, IMPORTED, Settings, backbone_name, idle_settings

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
    settings, task = run.read_settings(), run.read_task()
    images = run.read_support().train
    given = {IMPORTED: "not recorded", FITTED: "images given in Python"}
    idle = _NOT_TOLD | idle_settings(settings.method)
    backbone_licence, data_licence = _licences(settings, task.dataset)
    test = run.read_metrics().test if run.finished else None
    tuned = {image.class_name for image in images}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        finalize=_plain,  # whatever is not said to be raw
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["raw"] = Markup
    environment.filters["list_of"] = lambda names: Markup(", ".join(map(_plain, names)))
    return environment.get_template("card.md.jinja").render(
        what=what,
        version=__version__,
        method=get_method(settings.method),
        settings=settings,
        task=task,
        data=given.get(task.dataset, task.dataset),
        backbone=backbone_name(settings),
        environment=run.read_environment(),
        images=images,
        added=[name for name in task.class_names if name not in tuned],
        told={k: v for k, v in settings.model_dump().items() if k not in idle and v is not None},
        test=test,
        figures={} if test is None else {
            "top-1 accuracy": test.accuracy, "top-5 accuracy": test.top5,
            "macro-F1": test.macro_f1, "expected calibration error": test.ece,
        },
        backbone_licence=backbone_licence,
        data_licence=data_licence,
        mit=backbone_licence.startswith(_MIT) and data_licence.startswith(_MIT),
    )  # fmt: skip


_MIT = "MIT"


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
    if isinstance(value, Markup):
        return value
    text = html.escape(printable(str(value)), quote=False)
    return re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
