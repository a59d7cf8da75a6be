"""The model card of a run, and both of them on the Hugging Face hub."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dapt import __version__
from dapt.clip.known import STAND_IN, each_of, known_models, names_of
from dapt.clip.sources import BUNDLED
from dapt.errors import DISTRIBUTION, printable, refusing
from dapt.methods import get_method
from dapt.progress import Reporter
from dapt.run.directory import RunDirectory
from dapt.settings import FITTED, IMPORTED, Settings, backbone_name, idle_settings

# By this a card is known for one of ours, which may be replaced.
_START = "---\nlibrary_name: dapt\n"
# Settings that are told elsewhere in the card, or only say where things lie on one machine.
_NOT_TOLD = frozenset(
    {"dataset", "root", "domain", "class_names", "support_set", "method", "backbone", "pretrained",
     "test_fraction", "device", "eval_batch_size", "text_memory", "memory_budget",
     "recompute", "checkpoint_every"}
)  # fmt: skip
# Licences of weights that dapt knows beside those of `known_models`.
_OWN = {
    BUNDLED: "MIT (the small CLIP in dapt; what it was trained on is listed in its LICENSES.md).",
    "openai": "MIT (OpenAI's CLIP).",
}
_UNKNOWN = "not known to dapt; see where the weights come from."


def is_card(path: Path) -> bool:
    """Whether a file is a model card that `model_card` wrote."""
    with path.open("rb") as file:
        return file.read(len(_START)) == _START.encode()


# How each form is used; names are put in for "{}".
_USE = {
    "run": """```bash
pip install {package}
dapt predict {name} photos/
```

```python
from dapt import PromptClassifier

model = PromptClassifier.load("{name}")
model.predict(["photo.jpg"])
```""",
    "onnx": """```python
import onnxruntime

session = onnxruntime.InferenceSession("{name}")
told = session.get_modelmeta().custom_metadata_map  # labels and preprocessing, as JSON
(probabilities,) = session.run(None, {{"images": images}})  # normalised, (n, 3, S, S) in float32
```""",
    "torch": """```python
import torch

told = {{"labels.json": "", "preprocessing.json": ""}}
model = torch.export.load("{name}", extra_files=told).module()
probabilities = model(images)  # normalised, (n, 3, S, S)
```""",
    "peft": """It is an adapter of PEFT's, for the model that it was tuned on:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(clip, ".")  # the folder of {name}; clip is transformers' model
```""",
    "coop": """Give it to code that reads CoOp's checkpoints, or to dapt again:

```bash
dapt import {name} -o runs/again -b BACKBONE --class-names NAMES.json
```""",
}


def model_card(
    run: RunDirectory, what: str = "a run directory of dapt", form: str = "run", name: str = ""
) -> str:
    """A run's model card as Markdown, with the head that the Hugging Face hub reads.

    Args:
        run: a run whose prompts are there, with or without metrics.
        what: the form that the card goes with; the metrics stay the run's.
        form: how that is used: "run", or a form of exports.
        name: what it is used by: a repository's name, a folder or a file.
    """
    settings, task, images = run.read_settings(), run.read_task(), run.read_support().train
    given = {IMPORTED: "not recorded", FITTED: "images given in Python"}
    idle = _NOT_TOLD | idle_settings(settings.method, settings.loss_weights)
    tuned = {item.class_name for item in images}
    metrics = run.read_metrics() if run.finished else None
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
        use=_USE[form].format(
            name=printable(name or run.name).replace("`", "'"), package=DISTRIBUTION
        ),
        version=__version__,
        method=get_method(settings.method),
        settings=settings,
        task=task,
        data=given.get(task.dataset, task.dataset),
        backbone=backbone_name(settings),
        warning=f"{STAND_IN}." if run.stands_in() else "",
        environment=run.read_environment(),
        images=images,
        added=[name for name in task.class_names if name not in tuned],
        told={k: v for k, v in settings.model_dump().items() if k not in idle and v is not None},
        test=metrics.test if metrics else None,
        forecast=metrics.forecast if metrics else None,
        backbone_licences=(weights := _licences(settings)),
        mit_weights=all(licence.startswith("MIT") for licence in weights),
    )


def _licences(settings: Settings) -> list[str]:
    """Of the weights of each model, in a sentence."""
    known, found = {(m.name, m.pretrained): f"{m.licence}." for m in known_models()}, list[str]()
    names = names_of(settings.backbone)
    for name, tag in zip(names, each_of(names, settings.pretrained), strict=True):
        openai = tag in (None, "openai") and not (set("/:") & set(name) or Path(name).suffix)
        own = _OWN.get("openai" if openai and name != BUNDLED else name)
        found.append(own or known.get((name, tag or ""), _UNKNOWN))
    return found


def _plain(value: Any) -> str:
    """A value as text that Markdown and HTML take for nothing else, on one line."""
    if isinstance(value, Markup):
        return value
    text = html.escape(printable(str(value)), quote=False)
    return re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def files_to_push(run: RunDirectory, repo_id: str = "") -> dict[str, bytes | Path]:
    """What of a run goes to the hub, by its name there: its records and results, and its card.

    The card says how to use it from ``repo_id``.

    A `UserError` if no finished run is here, or a file of it is a link.
    """
    run.require()
    kept = sorted({*run.files(), *run.path.glob("eval-*.json")})
    run.check_links(kept)
    return {
        "README.md": model_card(run, name=repo_id).encode(),
        **{file.name: file for file in kept},
    }


def push(
    run: RunDirectory, repo_id: str, *, private: bool = False, reporter: Reporter | None = None
) -> str:
    """Upload a run to the repository ``repo_id``, made if need be; returns the commit's address.

    A `UserError` if no finished run is here, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = files_to_push(run, repo_id)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api = HfApi(library_name="dapt")
    stage = (reporter or Reporter()).stage(f"pushing to {repo_id}", 2)
    what = f"{run.path} could not be pushed to '{repo_id}'"
    hint = "check the name and the connection, and log in with 'hf auth login'"
    with refusing(what, hint, Exception), stage as advance:  # its client raises a wide family
        api.create_repo(repo_id, private=private, exist_ok=True)
        advance(1)
        said = "Run directory of dapt and its model card"
        commit = api.create_commit(repo_id, operations, commit_message=said)
        advance(1)
    return str(commit.commit_url)
