"""What works on which architecture: ``python -m benchmarks.architectures [NAME ...]``.

Every open_clip architecture of at most so many parameters is built with random weights, the
smallest first, and after them small models in transformers' form; each is asked for everything. An
entry is "works", "refused" with a sentence, or "FAILS": an error that is no sentence, or numbers
that are not finite or not the model's. Vocabularies that only a hub has are stood in for by
letters, as none of this depends on words. With ``--json`` all is kept as it is found, and a later
run goes on from there; ``--only`` asks some columns anew; ``--markdown`` writes the page of the
documentation; ``--speed`` times prompts in the towers of each family (`benchmarks.families`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks import families, page
from benchmarks.families import Letters
from dapt.cli.common import readable_errors
from dapt.clip.backbone import Backbone, Preprocessing
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import Classifier
from dapt.engine.suited import suited
from dapt.errors import UserError
from dapt.methods import Evidence, get_method
from dapt.methods.contract import Examples
from dapt.progress import cell, console, quietly, say, table
from dapt.safe.files import parse_json, read_text, write_atomic, write_json
from dapt.settings import make_settings
from dapt.share.export import TOLERANCE, ImageClassifier

NAMES, TEMPLATE = ["cat", "sea lion", "hot air balloon"], "a photo of a {}."
WORKS, REFUSED, FAILS = "works", "refused", "FAILS"
# The random ones of a text tower by transformers too, for which open_clip would fetch others.
HOW = {"force_custom_text": True, "pretrained_hf": False}
app = typer.Typer(add_completion=False)


def parameters(name: str) -> float:
    """How many millions of numbers an architecture has, without making room for them."""
    if name in families.TRANSFORMERS:
        return 0.0
    with quietly(), torch.device("meta"):
        model = open_clip.create_model(name, device="meta", **HOW)
    return sum(p.numel() for p in model.parameters()) / 1e6


def load(name: str) -> Backbone:
    """An architecture with random weights."""
    how: dict[str, Any] = {"device": torch.device("cpu"), "precision": "fp32"}
    if name in families.TRANSFORMERS:
        with quietly():
            model, size, letters = families.TRANSFORMERS[name]()
        seen = Preprocessing(size, (0.5,) * 3, (0.5,) * 3)
        return Backbone(model, letters, seen, name=name, **how)
    text = open_clip.get_model_config(name)["text_cfg"]
    if not text.get("hf_tokenizer_name"):
        return load_backbone(name, "random", device="cpu")
    with quietly():
        model = open_clip.create_model(name, **HOW)
    length = text.get("context_length", 77)
    seen = Preprocessing(int(model.visual.image_size[0]), (0.5,) * 3, (0.5,) * 3)
    # transformers' towers mask what their configuration calls padding.
    pad = model.text.config.pad_token_id if text.get("hf_model_name") else 1
    return Backbone(model, Letters(length, pad), seen, name=name, **how)


def classifier_of(backbone: Backbone, method: str, **given: Any) -> Classifier:
    """A method's classifier, not tuned; words that a prompt would start from are left out."""
    settings = make_settings({"dataset": "bundled", "method": method, "text_vectors": 4, **given})
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


def tuned(*methods: str, **given: Any) -> Callable[[Backbone], None]:
    """What asks whether a gradient reaches all that methods learn, by the settings given."""

    def check(backbone: Backbone) -> None:
        for method in methods:
            classifier = classifier_of(backbone, method, **given)
            with torch.no_grad():  # away from zeros, behind which no gradient reaches anything
                for tensor in classifier.learned().values():
                    tensor.add_(0.01 * torch.randn_like(tensor))
            labels = torch.tensor([0, 1])
            F.cross_entropy(classifier(views_for(backbone)), labels).backward()
            for name, tensor in classifier.learned().items():
                if tensor.grad is None or not 0 < float(tensor.grad.norm()) < float("inf"):
                    raise ArithmeticError(f"of {method}, no gradient reaches {name}")

    return check


def low_rank(backbone: Backbone) -> None:
    """As published; in the layers' MLPs where there is no attention."""
    try:
        tuned("clip-lora")(backbone)
    except UserError:
        tuned("clip-lora", lora_maps=("fc", "proj"))(backbone)


def fitted(method: str) -> Callable[[Backbone], None]:
    """What asks whether a head is fitted."""

    def check(backbone: Backbone) -> None:
        classifier = classifier_of(backbone, method)
        settings = make_settings({"dataset": "bundled", "method": method, "looks": 2})
        settings = settings.model_copy(update={"prolip_steps": 2, "prolip_views": 1})
        with torch.no_grad():
            text = classifier.text_features()
            raw = classifier.image_features(views_for(backbone), normalized=False)
        # As if of six images: a head knows features alone.
        raw = raw.repeat(3, 1) + 0.1 * raw.std() * torch.randn(6, raw.shape[1])
        support = Examples(F.normalize(raw, dim=-1), torch.arange(6) % 3)
        views = lambda count: raw.expand(count, -1, -1)  # noqa: E731
        evidence = Evidence(support, None, text, backbone.logit_scale, views)
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


class Column(NamedTuple):
    """A column of the table: what it stands for, and what asks."""

    about: str
    check: Callable[[Backbone], None]


# After "loads".
CHECKS: dict[str, Column] = {
    "zero-shot": Column("`zero-shot`: class names alone", zero_shot),
    "text prompt": Column("`coop`, and what else learns a context (`dapt`)", tuned("coop")),
    "visual prompt": Column("`vpt`, and `dapt`", tuned("vpt")),
    "deep visual": Column("`vpt-deep`: a visual prompt in every layer", tuned("vpt-deep")),
    "deep in both": Column("`ivlp`, `maple`: prompts in both towers' layers",
                           tuned("ivlp", "maple")),
    "LoRA": Column("`clip-lora`: low-rank changes in both towers", low_rank),
    "head": Column("`auto`, as every head on features", fitted("auto")),
    "projection": Column("`prolip`: the image tower's projection", fitted("prolip")),
    "ONNX": Column("the export, with a visual prompt inside where there can be one", onnx),
}  # fmt: skip
COLUMNS = ("loads", *CHECKS)
Entries = dict[str, tuple[str, str]]  # by column: what became of it, and a sentence where it is one


def asked(name: str, columns: tuple[str, ...] = COLUMNS) -> Entries:
    """What became of each check on an architecture."""
    found: Entries = {}

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

    backbone = keep("loads", partial(load, name))
    for what in (column for column in columns if column in CHECKS):
        if backbone is None:
            found[what] = ("", "")  # the same is told of loading it
        else:
            keep(what, partial(CHECKS[what].check, backbone))
    return found


def some(names: list[str] | None, most: float, sizes: dict[str, float]) -> list[str]:
    """The architectures to ask, the smallest first; what is learned of their sizes is kept."""
    found = dict[str, float]()
    for name in names or (*open_clip.list_models(), *families.TRANSFORMERS):
        try:
            found[name] = sizes[name] = sizes.get(name) or parameters(name)
        except Exception as error:
            # Such as of a text tower of transformers, whose configuration only the hub has.
            say(f"{name} is left out: {type(error).__name__}: {error}")
    return sorted((n for n in found if names or found[n] <= most), key=found.__getitem__)


def columns_of(only: list[str] | None) -> tuple[str, ...]:
    """The columns that are asked for; a `UserError` if there is no such one."""
    known = {column.lower(): column for column in CHECKS}
    if unknown := [one for one in only or () if one.lower() not in known]:
        raise UserError(f"there is no column '{unknown[0]}'; use one of {', '.join(CHECKS)}")
    return tuple(known[one.lower()] for one in only or ())


def show(rows: dict[str, Any], sizes: dict[str, float]) -> None:
    """Print the table, and every sentence below it."""
    made = table("architecture", *COLUMNS, figures=["million"])
    for name, row in rows.items():
        made.add_row(cell(name), *(row[what][0] for what in COLUMNS), f"{sizes[name]:.0f}")
    console.print(made)
    for name, row in rows.items():
        for what, (_, why) in row.items():
            if why:
                say(f"{name}, {what}: {why}")


@app.command()
def architectures(
    names: Annotated[list[str] | None, typer.Argument(help="Some, not all.")] = None,
    most: Annotated[float, typer.Option(help="Millions of parameters, at most.")] = 200.0,
    only: Annotated[list[str] | None, typer.Option(help="Ask this column anew.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep all in it.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the page to it.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Time prompts in the towers.")] = False,
) -> None:
    """Ask every open_clip architecture, with random weights, for everything."""
    with readable_errors():
        again = columns_of(only)
        kept: dict[str, Any] = {"rows": {}, "sizes": {}, "speed": []}
        if json_file and json_file.is_file():
            kept |= parse_json(read_text(json_file))

        def keep() -> None:
            kept["versions"] = page.versions()
            if json_file:
                write_json(json_file, kept)

        if speed:
            kept["speed"] = families.timed(say)
            return keep()
        rows = dict[str, Entries]()
        for name in some(names, most, kept["sizes"]):
            rows[name] = row = kept["rows"].setdefault(name, {})
            if wanted := again or tuple(one for one in COLUMNS if one not in row):
                row |= asked(name, wanted)
                say(f"{name}: {', '.join(row[what][0] for what in COLUMNS if what in row)}")
                keep()
            gc.collect()
        show(rows, kept["sizes"])
        if markdown:
            columns = {"loads": "the towers are built and found usable"}
            columns |= {name: column.about for name, column in CHECKS.items()}
            write_atomic(markdown, page.written(kept, columns, most).encode())
    raise typer.Exit(any(entry == FAILS for row in rows.values() for entry, _ in row.values()))


if __name__ == "__main__":
    app()
