"""A tuned classifier as one file that needs no dapt: ONNX, or a PyTorch program.

Images in, probabilities out; the text tower stays behind. Every file is compared with the
classifier it was made from before it is put in place. No other file is ever opened here: to read a
stranger's program is not among the things that dapt does.
"""

from __future__ import annotations

import importlib
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from dapt import __version__
from dapt.clip.image import encode_image
from dapt.clip.looks import looks
from dapt.engine.classifier import Classifier, inside_of, parts_of
from dapt.engine.data import task_of
from dapt.engine.features import Shared, backbone_of
from dapt.errors import UserError, install, refusing
from dapt.methods import get_method
from dapt.progress import Reporter, quietly
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.safe.files import read_text, write_atomic
from dapt.settings import backbone_name
from dapt.share.card import is_card, model_card
from dapt.share.exchange import ADAPTER, published_files

# Each form, in the words of its card.
FORMATS = {
    "onnx": "an ONNX graph: normalised images in, probabilities out",
    "torch": "a program for torch.export.load: normalised images in, probabilities out",
    "coop": "what was learned alone, as CoOp's code and its descendants save it",
    "peft": "low-rank changes alone, as PEFT saves those of a CLIP of transformers",
}
_LEARNED_ALONE = ("coop", "peft")
_SMALLER = {
    "int8": ", with its linear layers at 8 bits (the metrics below are those of the run at fp32)",
    "fp16": ", computed at 16 bits (the metrics below are those of the run at fp32)",
}
# The lowest set of ONNX operators that torch writes; runtimes know it since early 2023.
_OPSET = 18
# Largest difference of a probability between a file and its classifier.
TOLERANCE = 1e-4
# Images a file is compared on; they are not chosen by anything.
_COMPARED = 16
# Of weights: a protobuf message, which an ONNX file is, cannot be larger than 2 GiB.
_MAX_ONNX = 2**31 - 2**24
# Endings that no form of export has, and a run's records and results do.
_OF_RUNS = {".json", ".csv", ".safetensors"}

Compute = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """What came of an export; the last three are missing where nothing is computed."""

    file: Path
    card: Path  # the model card beside it
    difference: float | None = None  # largest one of a probability
    agreement: float | None = None  # share of images whose most probable class is the same
    images: str = ""  # what it was compared on, in words


class ImageClassifier(nn.Module):
    """A classifier (at fp32, on the CPU) with everything but the image constant."""

    text: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.visual, self.head = classifier.backbone.visual, classifier.head
        self.sigmoids, self.looks = classifier.sigmoids, classifier.looks
        self.parts = nn.ModuleList(parts_of(classifier.parts, "image"))
        with torch.inference_mode(False), torch.no_grad():
            self.register_buffer("text", classifier.text_features().detach().clone())  # (C, D)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C) probabilities of (B, 3, S, S) normalised images."""
        inside = inside_of(self.parts, "image")
        seen = torch.cat(list(looks(images, self.looks)))  # one pass: a graph has one tower
        features = encode_image(self.visual, seen, inside, not self.head.projects)
        features = F.normalize(features, dim=-1).unflatten(0, (self.looks, -1)).mean(0)  # (B, D)
        logits = self.head(F.normalize(features, dim=-1), self.text)
        return logits.softmax(-1) if self.sigmoids is None else self.sigmoids(logits).sigmoid()


def export(
    run: RunDirectory,
    file: Path,
    form: str,
    *,
    int8: bool = False,
    fp16: bool = False,
    batch: int | None = None,
    reporter: Reporter | None = None,
) -> Exported:
    """Write a finished run's classifier to ``file``, and its model card beside it.

    Args:
        run, file: from where and to where; ``<stem>.md`` beside it becomes the card, or
            ``<name>.md`` where that is of another file with this stem.
        form: ``onnx``; ``torch``, a program for ``torch.export.load``; or ``coop``, what was
            learned as the method's published code saves it, or ``peft``, as that library does.
        int8: with ``onnx``, weights of the linear layers at 8 bits.
        fp16: with ``onnx``, weights and what is computed at 16 bits; images and probabilities stay
            at fp32.
        batch: the number of images that the file takes, always, for runtimes that want every
            shape fixed; None takes any number.

    A `UserError` says that input is bad, an extra is missing, or probabilities of the file differ
    by more than `TOLERANCE` from the classifier's (with ``int8`` or ``fp16``: before rounding);
    none is left.
    """
    card = _card_of(file)
    if form not in FORMATS:
        raise UserError(f"unknown format '{form}'; use one of {', '.join(FORMATS)}")
    smaller = [name for name, asked in (("int8", int8), ("fp16", fp16)) if asked]
    if smaller and form != "onnx":
        raise UserError(f"`{smaller[0]}` goes with the format onnx, not with {form}")
    if len(smaller) > 1:
        raise UserError("`int8` and `fp16` exclude each other; give one")
    if batch is not None and (batch < 1 or form in _LEARNED_ALONE):
        raise UserError(f"`batch` {batch} is 1 or more, with the format onnx or torch; change it")
    if file.is_dir() or card == file:
        raise UserError(f"`output` {file} must name a file, such as classifier.onnx")
    adapter = form == "peft"
    if adapter and file.name != ADAPTER:
        raise UserError(f"`output` {file}: PEFT reads {ADAPTER} alone; give folder/{ADAPTER}")
    if file.suffix.lower() in _OF_RUNS and not adapter:
        raise UserError(f"`output` {file} has the name of a run's own files; give classifier.onnx")
    if card.exists() and not is_card(card):
        hint = "choose another `output`"
        raise UserError(f"{card}, where the model card goes, is something else; {hint}")
    run.require()
    if form not in _LEARNED_ALONE and get_method(name := run.read_settings().method).reads_images:
        what = f"class features of method '{name}' are made for each image, by the text tower"
        raise UserError(f"{what}, which no exported file has; use dapt predict or dapt serve")
    exported, beside = Exported(file, card), dict[str, bytes]()
    if form in _LEARNED_ALONE:
        beside = published_files(run, form)
        content = beside.pop("")
    else:
        for name in ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ():
            with refusing(f"ONNX needs {name}", install("onnx"), ImportError):
                importlib.import_module(name)
        with (reporter or Reporter()).stage(f"exporting {file.name}", 3) as advance:
            how = _How(form, "".join(smaller), batch)
            content, exported = _export_graph(run, exported, how, advance)
    fixed = f", {batch} at a time" if batch else ""
    rounded = "".join(_SMALLER[name] for name in smaller)
    said = model_card(run, f"`{file.name}`, {FORMATS[form]}{fixed}{rounded}", form, file.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, more in {file.name: content, **beside}.items():
        write_atomic(file.with_name(name), more)
    write_atomic(card, said)
    return exported


def _card_of(file: Path) -> Path:
    card = file.with_suffix(".md")
    if card != file and card.is_file() and is_card(card):
        others = read_text(card)  # of this very file again, it is replaced
        return card if f"`{file.name}`" in others else file.with_name(f"{file.name}.md")
    return card


@dataclass(frozen=True)
class _How:
    """What is asked of a graph's file."""

    form: str  # "onnx" or "torch"
    smaller: str  # "int8", "fp16" or ""
    batch: int | None  # images it takes; None: any number


def _export_graph(
    run: RunDirectory, exported: Exported, how: _How, advance: Callable[[int], Any]
) -> tuple[bytes, Exported]:
    """The file's bytes, and what they were compared on."""
    # Whatever it was tuned at: a file that runs anywhere is fp32.
    settings = run.read_settings().model_copy(update={"precision": "fp32"})
    backbone = backbone_of(settings, device="cpu", revision=run.revision())
    classifier = load_classifier(run, backbone=backbone)
    pixels, images = _views_to_compare(run, classifier)
    views = backbone.normalize(pixels)
    with torch.inference_mode():
        expected = classifier.probabilities(classifier(views))
    advance(1)
    facts = _facts(run, classifier, how)
    example = views[:1].repeat(how.batch or 2, 1, 1, 1)
    free = None if how.batch else {"images": {0: torch.export.Dim("batch")}}
    with quietly():
        model = ImageClassifier(classifier)
        program = torch.export.export(model, (example,), dynamic_shapes=free)
    if how.form == "torch":
        content, compute = _torch_file(program, facts)
    else:
        graph = _graph(program, example, free is not None)
        content, compute = _onnx_file(graph, facts)
        if how.smaller:
            _compare("the graph at fp32", _of_any(compute, how.batch), views, expected)
            smaller = _quantised(graph) if how.smaller == "int8" else _halved(graph)
            content, compute = _onnx_file(smaller, facts)
    advance(1)
    limit, compute = float("inf") if how.smaller else TOLERANCE, _of_any(compute, how.batch)
    difference, agreement = _compare(str(exported.file), compute, views, expected, limit)
    advance(1)
    return content, replace(exported, difference=difference, agreement=agreement, images=images)


def _of_any(compute: Compute, batch: int | None) -> Compute:
    """The same of any number of images, for a file that takes so many at a time."""

    def padded(images: Tensor) -> Tensor:
        more = images[-1:].expand(-len(images) % (batch or 1), -1, -1, -1)
        parts = torch.cat([images, more]).split(batch or len(images))
        return torch.cat([compute(part) for part in parts])[: len(images)]

    return padded


def _compare(
    what: str, compute: Compute, views: Tensor, expected: Tensor, limit: float = TOLERANCE
) -> tuple[float, float]:
    """Largest difference of a probability, and how often the most probable class is the same."""
    with torch.inference_mode():  # batches of one and of many: their size is to be no constant
        found = torch.cat([compute(views[:1]), compute(views[1:])])
    difference = float((found - expected).abs().max())
    if not isfinite(difference) or difference > limit:
        why = f"its probabilities differ from the classifier's by up to {difference:.2g}"
        hint = "try the format torch, or other versions of torch and onnxruntime"
        raise UserError(f"{what} is not written: {why}; {hint}")
    return difference, float((found.argmax(-1) == expected.argmax(-1)).float().mean())


def _views_to_compare(run: RunDirectory, classifier: Classifier) -> tuple[Tensor, str]:
    """(B, 3, S, S) uint8 views: images spread over the run's dataset, or noise."""
    settings, size = run.read_settings(), classifier.backbone.preprocessing.size
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (4, 3, size, size), generator=generator, dtype=torch.uint8)
    try:
        task = replace(task_of(settings), grey=classifier.grey)
        seen, kind = (task.test, "test images") if task.test else (task.train, "images")
        items = seen[:: max(1, len(seen) // _COMPARED)][:_COMPARED]
        store = Shared(classifier.backbone).store(task, items, settings)
        views = store.test_views(range(len(items)))
    except UserError as error:  # the images are elsewhere, or one is damaged
        return noise, f"{len(noise)} images of noise, as the run's are not to be had: {error}"
    return torch.cat([views, noise]), f"{len(views)} {kind} and {len(noise)} of noise"


def _facts(run: RunDirectory, classifier: Classifier, how: _How) -> dict[str, str]:
    """What the file says of itself, each a JSON text; no date, so the same run gives its bytes."""
    settings, task, backbone = run.read_settings(), run.read_task(), classifier.backbone
    made = {
        "dapt": __version__, "run": run.path.resolve().name, "method": settings.method,
        "dataset": task.dataset, "backbone": backbone_name(settings),
        "backbone_sha256": backbone.weights_sha256,
        "int8": how.smaller == "int8", "fp16": how.smaller == "fp16",
    }  # fmt: skip
    seen = asdict(backbone.preprocessing)
    if classifier.grey is not None:  # of images of more than 8 bits, what is black and white
        seen["grey_range"] = classifier.grey
    values = {"labels": task.class_names, "preprocessing": seen, "provenance": made}
    if (thresholds := classifier.thresholds) is not None:  # of several labels an image
        values["thresholds"] = thresholds.tolist()
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


@quietly()
def _torch_file(program: ExportedProgram, facts: dict[str, str]) -> tuple[bytes, Compute]:
    # The trace's example images are somebody's; the file keeps none.
    file, program.example_inputs = io.BytesIO(), None
    torch.export.save(program, file, extra_files={f"{k}.json": v for k, v in facts.items()})
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()


@quietly()
def _graph(program: ExportedProgram, example: Tensor, free: bool) -> Any:
    """An ONNX model, without what tells of the exporting machine and no computation needs."""
    size = sum(t.nbytes for t in program.state_dict.values())
    if size >= _MAX_ONNX:
        what = f"the image tower's {size / 2**30:.1f} GiB do not fit one ONNX file"
        raise UserError(f"{what}; use the format torch")
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probabilities"]}
    names |= {"opset_version": _OPSET, "dynamo": True, "verbose": False}
    made: Any = torch.onnx.export(program, (example,), **names)
    graph = made.model_proto  # made anew each time it is asked for
    body = graph.graph
    for part in (graph, body, *body.node, *body.input, *body.output, *body.initializer):
        del part.metadata_props[:]
    del body.value_info[:]
    for value in (*body.input, *body.output) if free else ():
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return graph


@quietly()
def _quantised(graph: Any) -> Any:
    """The graph with the constant matrices of its products at 8 bits (dynamic quantisation)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    how = {"op_types_to_quantize": ["MatMul", "Gemm"], "weight_type": QuantType.QInt8}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "int8.onnx"
        quantize_dynamic(graph, file, per_channel=True, **how)
        return onnx.load(file)


@quietly()
def _halved(graph: Any) -> Any:
    """The graph at 16 bits, but for what goes in and comes out."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(graph, keep_io_types=True)


def _onnx_file(graph: Any, facts: dict[str, str]) -> tuple[bytes, Compute]:
    """An ONNX file's bytes, and what computes with them in onnxruntime."""
    import onnx
    import onnxruntime

    # Of file formats the oldest that these operators go with, for runtimes that are not new.
    graph.ir_version = onnx.helper.find_min_ir_version_for(graph.opset_import, True)
    onnx.helper.set_model_props(graph, facts)
    content = graph.SerializeToString(deterministic=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
