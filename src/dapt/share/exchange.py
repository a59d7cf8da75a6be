"""What was learned, from and to the checkpoints of the field's published code.

That code (CoOp's and what grew from it) saves pickles of ``{"state_dict", "epoch", "optimizer",
"scheduler"}``, of what is learned alone or of the whole model. What its tensors are called there is
said by the methods' rows (`Layout`), of which the one that names most of a file's tensors counts.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.data import SupportSet, Task
from dapt.data.items import check_class_names
from dapt.data.tasks import read_class_names
from dapt.engine.data import task_of
from dapt.engine.evaluate import evaluate_task
from dapt.engine.features import backbone_of
from dapt.errors import UserError
from dapt.methods import METHODS, get_method
from dapt.methods.layouts import DASSL, Layout, Published
from dapt.progress import Reporter
from dapt.run.directory import RunDirectory, tensors_as_bytes
from dapt.run.load import classifier_of
from dapt.run.records import as_file, made_of, read_object
from dapt.run.train import check_output
from dapt.safe.files import file_digest
from dapt.safe.weights import read_checkpoint
from dapt.settings import IMPORTED, Settings, make_settings

_NUMBERED = re.compile(r"model\.pth\.tar-(\d+)")
# An adapter of PEFT, and what stands beside it.
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class PublishedPrompts:
    """What a published checkpoint holds."""

    tensors: dict[str, Tensor]  # by the names they have in a run's files
    epoch: int | None  # after which they were saved, if the file says so
    file: Path  # where they were read from
    methods: dict[str, Layout]  # those that learn such tensors, the likeliest first
    settings: dict[str, dict[str, Any]]  # by method, what stands beside the tensors
    passed: tuple[str, ...]  # what else is there, which is not learned


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file that ``path`` means.

    Of a directory (or the ``prompt_learner``, or what else a model is called, in it) PEFT's
    ``adapter_model.safetensors`` or ``model-best.pth.tar`` is taken if it is there, else the
    ``model.pth.tar-N`` with the highest N, else it is a `UserError`.
    """
    if not path.is_dir():
        return path
    for folder in (path, *sorted(inner for inner in path.iterdir() if inner.is_dir())):
        for name in (ADAPTER, "model-best.pth.tar"):
            if (file := folder / name).is_file():
                return file
        numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := _NUMBERED.fullmatch(p.name))]
        if numbered:
            return max(numbered)[1]
    what = f"{path} holds no model-best.pth.tar and no model.pth.tar-N"
    raise UserError(f"{what}; give the checkpoint file")


def read_published(path: Path) -> PublishedPrompts:
    """Read what was learned from a checkpoint (see `find_checkpoint`), running nothing inside it.

    A `UserError` if it cannot be read, asks for something to be run, or holds something else.
    """
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file)
    state, facts = checkpoint.state, checkpoint.facts
    if (beside := file.with_name(CONFIG)).is_file() and file.suffix == ".safetensors":
        facts = read_object(beside, "the adapter's configuration")
    rows = [(name, layout) for name, row in METHODS.items() for layout in row.checkpoint]
    known = {key for key in state for _, layout in rows if layout.knows(key)}
    found = [(layout.places(state), layout, name) for name, layout in rows]
    # That which names most of them, of equals one whose sign is there.
    ranks = [(len(places), layout.signed(state)) for places, layout, _ in found]
    if not (most := max(ranks))[0]:
        raise UserError(f"{file} {_lacking(state, known, rows[0][1])}")
    best = [one for one, rank in zip(found, ranks, strict=True) if rank == most]
    places, layout, _ = best[0]
    passed = tuple(key for key in state if key not in places)
    if odd := min((key for key in passed if not layout.passes(key, key in known)), default=""):
        one = min(places)
        what = f"'{one}' and '{odd}', which no one method learns" if odd in known else f"'{odd}'"
        raise UserError(f"{file} holds {what}; save only what is learned there")
    keys: dict[str, str] = {}
    for key, (tensor, _) in places.items():
        if (other := keys.setdefault(tensor, key)) != key:
            raise UserError(f"{file} holds both {other} and {key}; keep the one that counts")
    tensors = {name: _learned(state[key], places[key][1], file) for name, key in keys.items()}
    with _named(file):
        settings = {name: layout.settings(facts) for _, layout, name in best}
    methods = {name: layout for _, layout, name in best}
    return PublishedPrompts(tensors, checkpoint.epoch, file, methods, settings, passed)


def _lacking(state: Iterable[str], known: Container[str], layout: Layout) -> str:
    """Why a file with these tensors, of which some are ``known``, is of no method."""
    odd = next((key for key in state if not layout.passes(key, key in known)), None)
    if odd is None:
        what = "holds no prompts"
    elif odd in known:
        what = f"holds '{odd}', and not all that a method learns"
    else:
        what = f"holds '{odd}', which no method's code saves"
    return f"{what}; give a checkpoint of CoOp's code or its descendants"


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Say of which file a sentence is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file} is not taken: {error}") from error


def _learned(tensor: Tensor, entry: Published, file: Path) -> Tensor:
    """As runs have it: prompts are (N, W)."""
    what, shape = f"the {entry.tensor.replace('_', ' ')} in {file}", tuple(tensor.shape)
    needed = f"{'(vectors, width)' if entry.dims == 2 else '(numbers)'} of numbers is needed"
    if tensor.ndim == 3 and not entry.leading:
        raise UserError(f"{what} is class-specific, {shape}; {needed}")
    if tensor.ndim == entry.dims + 1 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != entry.dims or not tensor.numel() or not tensor.is_floating_point():
        raise UserError(f"{what} has shape {shape} of {tensor.dtype}; {needed}")
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{what} holds numbers that are not finite")
    return tensor


def import_checkpoint(
    checkpoint: Path,
    output: Path | str,
    given: dict[str, Any],
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    backbone: Backbone | None = None,
) -> RunDirectory:
    """Make a run directory of a published checkpoint.

    With a dataset the prompts are evaluated and the run is finished. Without one it has no metrics;
    it predicts, exports, and is evaluated with another dataset. The images it was tuned on are not
    known: its support set is empty.

    Args:
        checkpoint: as `read_published` takes it.
        given: settings as for `make_settings`; ``class_names`` or ``dataset`` must be among them.
            The method follows from what was learned, the epochs from the file.
        overwrite: discard the run that is there.
        backbone: already loaded as the settings say, to share it.

    A `UserError` says that input is bad, or the prompts do not fit the backbone.
    """
    run, published = RunDirectory(output), read_published(checkpoint)
    reporter = reporter or Reporter()
    settings = _settings_of(published, checkpoint, given)
    check_output(run, None, overwrite=overwrite)
    named = settings.dataset == IMPORTED
    task = _named_task(Path(str(settings.class_names))) if named else task_of(settings)
    backbone = backbone or backbone_of(settings)
    settings = _settings_of(published, checkpoint, given, backbone)
    _tell(published, settings.method, given, reporter)
    classifier = classifier_of(settings, published.tensors, backbone, task, str(published.file))
    started, test = time.perf_counter(), None
    if not named:
        test = evaluate_task(classifier, task, settings, reporter)
    support = SupportSet(task.name, settings.shots, settings.seed, (), ())
    files = made_of(
        settings, task, support, backbone, imported_from=published.file.name,
        imported_sha256=file_digest(published.file).hex(), tuning_seconds=0.0,
        evaluation_seconds=round(time.perf_counter() - started, 2),
    )  # fmt: skip
    with run.locked():
        check_output(run, None, overwrite=overwrite)
        run.begin(files | {run.prompts_file.name: tensors_as_bytes(classifier.tensors())})
        if test is not None:
            run.finish({
                "method": settings.method, "dataset": task.name, "shots": settings.shots,
                "seed": settings.seed, "learned_parameters": classifier.learned_parameters,
                "support_images": 0, "dispersion": {}, "imported": True, "test": test,
            })  # fmt: skip
    return run


def _settings_of(
    published: PublishedPrompts,
    checkpoint: Path,
    given: dict[str, Any],
    backbone: Backbone | None = None,
) -> Settings:
    """What is given, and what the tensors say of themselves; of a backbone, their sizes too."""
    given = {name: value for name, value in given.items() if value is not None}
    if "class_names" not in given and "dataset" not in given:
        hint = f"give {checkpoint} `class_names`, a JSON list in label order, or `dataset`"
        raise UserError(f"a checkpoint does not say what its classes are called; {hint}")
    # Losses leave no trace in a file: of methods that learn the same, the usual one, or the first.
    usual, fit = Settings.model_fields["method"].default, published.methods
    method = given.get("method", usual if usual in fit else next(iter(fit)))
    row = get_method(method)
    if method not in fit:
        held = dict.fromkeys(name.split(".")[0].replace("_", " ") for name in published.tensors)
        what = f"what {published.file} holds (a {' and a '.join(held)})"
        hint = f"leave `method` out, or give one that does: {', '.join(fit)}"
        raise UserError(f"method '{method}' does not learn {what}; {hint}")
    decided = {"method": method, "dataset": IMPORTED, "epochs": published.epoch}
    decided |= published.settings[method]
    if backbone is not None:
        for part in row.parts:
            decided |= part.settings_of(published.tensors, backbone)
    return make_settings({**decided, **given})


def _tell(
    published: PublishedPrompts, method: str, given: dict[str, Any], reporter: Reporter
) -> None:
    """What was not taken from a file, and as what the rest was."""
    if count := len(published.passed):
        some = ", ".join(sorted({key.rpartition(".")[2] for key in published.passed})[:4])
        reporter.say(f"passed over: {count:,} tensors that are not learned ({some}, …)")
    if len(published.methods) > 1 and not given.get("method"):
        others = " or ".join(name for name in published.methods if name != method)
        reporter.say(
            f"taken as {method}: the file may as well be of {others}, which predict the same; "
            "name the method if it is"
        )


def _named_task(file: Path) -> Task:
    """A task of class names alone."""
    value = read_class_names(file)
    names = tuple(value.values() if isinstance(value, dict) else value)
    # Published label lists do have two classes of one name.
    check_class_names(names, f"class name file {file}", distinct=False)
    return Task(IMPORTED, Path(), names, (), (), ())


def published_files(run: RunDirectory, form: str = DASSL) -> dict[str, bytes]:
    """What a run learned as the published code saves it; by name what stands beside, "" itself.

    The ``form`` is that of one of its method's layouts. A `UserError` if no finished run is here,
    or it learned nothing that has a place there.
    """
    run.require()
    settings = run.read_settings()
    layouts = get_method(settings.method).checkpoint
    if (layout := next((one for one in layouts if one.form == form), None)) is None:
        what = f"what {settings.method} learned in {run.path} has no place in a {_FORMS[form]}"
        raise UserError(f"{what}; use the format onnx or torch")
    if not run.read_environment().reads_text:
        what = f"{run.path} has class vectors beside its prompts, which a CoOp checkpoint has not"
        raise UserError(f"{what}; use the format onnx or torch")
    tensors, _ = run.read_tensors(run.prompts_file)
    keys, facts = layout.keys(tensors), layout.facts(settings)
    state = {
        key: tensors[name][None] if entry.leading else tensors[name]
        for name, (key, entry) in keys.items()
    }
    if form != DASSL:
        return {"": tensors_as_bytes(state, format="pt"), CONFIG: as_file(facts)}
    file = io.BytesIO()
    torch.save(layout.wrapped(state, facts, settings.epochs), file)
    return {"": file.getvalue()}


_FORMS = {DASSL: "CoOp checkpoint", "peft": "PEFT adapter"}
