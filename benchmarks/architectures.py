"""What works on which architecture: ``python -m benchmarks.architectures [NAME ...]``.

Every open_clip architecture of at most so many parameters is built with random weights, one after
the other, and asked for everything. An entry is "works", "refused" with the sentence below the
table, or "FAILS": an error that is no sentence, or numbers that are not finite or not the model's.
Vocabularies that only a hub has are stood in for by letters, as none of this depends on words.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from dapt.clip.backbone import Backbone, Preprocessing
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import Classifier
from dapt.engine.suited import suited
from dapt.errors import UserError
from dapt.methods import Evidence, get_method
from dapt.methods.contract import Examples
from dapt.progress import cell, console, quietly, say, table
from dapt.safe.files import write_json
from dapt.settings import make_settings
from dapt.share.export import TOLERANCE, ImageClassifier

NAMES, TEMPLATE = ["cat", "sea lion", "hot air balloon"], "a photo of a {}."
WORKS, REFUSED, FAILS = "works", "refused", "FAILS"
# The random ones of a text tower by transformers too, for which open_clip would fetch others.
HOW = {"force_custom_text": True, "pretrained_hf": False}
app = typer.Typer(add_completion=False)


class Letters:
    """A token a letter, in place of a vocabulary; ends as a text tower that reads the last one."""

    def __init__(self, length: int, pad: int = 1) -> None:
        self.context_length, self.pad = length, pad

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        """(n, L) ids."""
        ids = torch.full((len(texts), context_length or self.context_length), self.pad)
        for row, text in zip(ids, texts, strict=True):
            own = [2 + ord(letter) % 90 for letter in text.replace(" ", "")][: len(row) - 1]
            row[: len(own)] = torch.tensor(own, dtype=torch.long)
        return ids


def parameters(name: str) -> int:
    """How many numbers an architecture has, without making room for them."""
    with quietly(), torch.device("meta"):
        model = open_clip.create_model(name, device="meta", **HOW)
    return sum(p.numel() for p in model.parameters())


def load(name: str) -> Backbone:
    """An architecture with random weights."""
    text = open_clip.get_model_config(name)["text_cfg"]
    if not text.get("hf_tokenizer_name"):
        return load_backbone(name, "random", device="cpu")
    with quietly():
        model = open_clip.create_model(name, **HOW)
    length = text.get("context_length", 77)
    seen = Preprocessing(int(model.visual.image_size[0]), (0.5,) * 3, (0.5,) * 3)
    how: dict[str, Any] = {"device": torch.device("cpu"), "precision": "fp32"}
    # transformers' towers mask what their configuration calls padding.
    pad = model.text.config.pad_token_id if text.get("hf_model_name") else 1
    return Backbone(model, Letters(length, pad), seen, name=name, **how)


def classifier_of(backbone: Backbone, method: str) -> Classifier:
    """A method's classifier, not tuned; words that a prompt would start from are left out."""
    settings = make_settings({"dataset": "bundled", "method": method, "text_vectors": 4})
    settings = suited(settings.model_copy(update={"text_init": None}), NAMES, backbone)
    parts = [part.create(backbone, settings) for part in get_method(method).parts]
    return Classifier(backbone, NAMES, parts, get_method(method).head.create(backbone))


def views_for(backbone: Backbone, count: int = 2) -> Tensor:
    """(count, 3, S, S) of noise."""
    generator, size = torch.Generator().manual_seed(0), backbone.preprocessing.size
    shape = (count, 3, size, size)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def zero_shot(backbone: Backbone) -> None:
    """Logits are those of the model's own towers."""
    views = views_for(backbone)
    classifier = Classifier(backbone, NAMES, template=TEMPLATE)
    sentences = [TEMPLATE.replace("{}", name) for name in NAMES]
    ids = backbone.tokenizer(sentences, context_length=backbone.context_length)
    with torch.no_grad():
        towers = backbone.visual(backbone.normalize(views)), backbone.text(ids)
        image, text = (F.normalize(t[0] if isinstance(t, tuple) else t, dim=-1) for t in towers)
        found = classifier.image_features(views) @ classifier.text_features().T
    torch.testing.assert_close(found, image @ text.T, atol=1e-4, rtol=1e-4)


def tuned(method: str) -> Callable[[Backbone], None]:
    """What asks whether a gradient reaches all that a method learns."""

    def check(backbone: Backbone) -> None:
        classifier = classifier_of(backbone, method)
        for tensor in classifier.learned().values():
            if not tensor.any():  # which would keep gradients from what it is multiplied with
                tensor.data.fill_(0.01)
        labels = torch.tensor([0, 1])
        F.cross_entropy(classifier(views_for(backbone)), labels).backward()
        for name, tensor in classifier.learned().items():
            if tensor.grad is None or not 0 < float(tensor.grad.norm()) < float("inf"):
                raise ArithmeticError(f"no gradient reaches {name}")

    return check


def fitted(method: str) -> Callable[[Backbone], None]:
    """What asks whether a head is fitted."""

    def check(backbone: Backbone) -> None:
        classifier, views = classifier_of(backbone, method), views_for(backbone, 6)
        settings = make_settings({"dataset": "bundled", "method": method, "auto_views": 1})
        settings = settings.model_copy(update={"prolip_steps": 2, "prolip_views": 1})
        with torch.no_grad():
            text = classifier.text_features()
            raw = classifier.image_features(views, normalized=False)
        support = Examples(F.normalize(raw, dim=-1), torch.arange(6) % 3)
        mirrored = lambda: support.features  # noqa: E731
        evidence = Evidence(support, None, text, backbone.logit_scale,
                            lambda count: raw.expand(count, -1, -1), 1.0, mirrored)  # fmt: skip
        classifier.head.fit(evidence, settings)
        if not bool(classifier.logits(support.features, text).isfinite().all()):
            raise ArithmeticError("its logits are not finite")

    return check


@quietly()
def onnx(backbone: Backbone) -> None:
    """The graph with what a method puts into the image tower, else without, computes the same."""
    import onnxruntime

    method = "zero-shot" if backbone.refusal("image") else "vpt"
    views = backbone.normalize(views_for(backbone))
    model = ImageClassifier(classifier_of(backbone, method))
    with torch.inference_mode():
        expected = model(views)
    free = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (views,), dynamic_shapes=free)
    made: Any = torch.onnx.export(program, (views,), input_names=["images"], verbose=False)
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString())
    for count in (1, 2):
        found = session.run(None, {"images": views[:count].numpy()})[0]
        if float((torch.from_numpy(found) - expected[:count]).abs().max()) > TOLERANCE:
            raise ArithmeticError("the graph computes something else")


CHECKS: dict[str, Callable[[Backbone], None]] = {
    "zero-shot": zero_shot,
    "text prompt": tuned("coop"),
    "visual prompt": tuned("vpt"),
    "deep prompts": tuned("ivlp"),
    "low rank": tuned("clip-lora"),
    "head": fitted("auto"),
    "projection": fitted("prolip"),
    "ONNX": onnx,
}


def asked(name: str) -> dict[str, tuple[str, str]]:
    """What became of each check on an architecture: its entry, and a sentence where it is one."""
    found: dict[str, tuple[str, str]] = {}
    backbone: Any = None

    def keep(what: str, check: Callable[[], Any]) -> Any:
        found[what] = (WORKS, "")
        try:
            return check()
        except UserError as error:
            found[what] = (REFUSED, str(error))
        except Exception as error:
            needs = "pip install" in str(error)  # a library that is not here says so itself
            found[what] = (REFUSED if needs else FAILS, f"{type(error).__name__}: {error}")
        return None

    if (backbone := keep("loads", partial(load, name))) is not None:
        for what, check in CHECKS.items():
            keep(what, partial(check, backbone))
    return found


@app.command()
def architectures(
    names: Annotated[list[str] | None, typer.Argument(help="Some, not all.")] = None,
    most: Annotated[float, typer.Option(help="Millions of parameters, at most.")] = 200.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all to it.")] = None,
) -> None:
    """Ask every open_clip architecture, with random weights, for everything."""
    made = table("architecture", "loads", *CHECKS, figures=["million"])
    said, all_found, failed = dict[str, str](), dict[str, Any](), 0
    for name in names or open_clip.list_models():
        count = None
        try:
            count = parameters(name) / 1e6
        except Exception as error:  # the same is told of loading it
            say(f"{name}: {type(error).__name__}: {error}")
        if count is not None and count > most and not names:
            continue
        found = all_found[name] = asked(name)
        entries = [found.get(what, ("", ""))[0] for what in ("loads", *CHECKS)]
        made.add_row(cell(name), *entries, "" if count is None else f"{count:.0f}")
        say(f"{name}: {', '.join(entries)}")
        failed += entries.count(FAILS)
        said |= {f"{name}, {what}": why for what, (_, why) in found.items() if why}
        if json_file:
            write_json(json_file, all_found)
        gc.collect()
    console.print(made)
    for what, why in said.items():
        say(f"{what}: {why}")
    raise typer.Exit(failed > 0)


if __name__ == "__main__":
    app()
