"""Prompts from and to the checkpoints of the field's published code.

That code (CoOp's and what grew from it) saves a prompt learner as a pickle of
``{"state_dict", "epoch", "optimizer", "scheduler"}``, in which the text prompt is called ``ctx``,
or ``txt_ctx`` beside a visual prompt ``vis_ctx``.
"""

from __future__ import annotations

import io
import re
import time
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
from dapt.methods.contract import Published
from dapt.progress import Reporter
from dapt.run.directory import RunDirectory, tensors_as_bytes
from dapt.run.load import classifier_of
from dapt.run.records import made_of
from dapt.run.train import check_output
from dapt.safe.files import file_digest
from dapt.safe.weights import read_checkpoint
from dapt.settings import IMPORTED, Settings, make_settings

# Embeddings of the class names, which lie there too and follow from the names.
_IGNORED = frozenset({"token_prefix", "token_suffix"})
_NUMBERED = re.compile(r"model\.pth\.tar-(\d+)")


@dataclass(frozen=True)
class PublishedPrompts:
    """What a published checkpoint holds."""

    tensors: dict[str, Tensor]  # by the names they have in a run's files
    epoch: int | None  # after which they were saved, if the file says so
    file: Path  # where they were read from


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file that ``path`` means.

    Of a directory (or the ``prompt_learner`` in it) ``model-best.pth.tar`` is taken if it is
    there, else the ``model.pth.tar-N`` with the highest N, else it is a `UserError`.
    """
    if not path.is_dir():
        return path
    folder = inner if (inner := path / "prompt_learner").is_dir() else path
    if (best := folder / "model-best.pth.tar").is_file():
        return best
    numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := _NUMBERED.fullmatch(p.name))]
    if not numbered:
        what = f"{folder} holds no model-best.pth.tar and no model.pth.tar-N"
        raise UserError(f"{what}; give the checkpoint file")
    return max(numbered)[1]


def read_published(path: Path) -> PublishedPrompts:
    """Read the prompts of a checkpoint (see `find_checkpoint`), running nothing that is inside it.

    A `UserError` if it cannot be read, asks for something to be run, or holds other prompts.
    """
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file, _IGNORED)
    state = {name.removeprefix("prompt_learner."): t for name, t in checkpoint.state.items()}
    found = {name: t for name, t in state.items() if name not in _IGNORED}
    if any(name.startswith("meta_net.") for name in found):
        hint = "only a context that all images share can be imported"
        raise UserError(f"{file} holds CoCoOp's meta-network; {hint}")
    known = {entry.key: entry for row in METHODS.values() for entry in row.checkpoint}
    if odd := sorted(found.keys() - known):
        raise UserError(f"{file} holds '{odd[0]}', which is none of {', '.join(known)}")
    if not found:
        raise UserError(f"{file} holds no prompts ({', '.join(known)})")
    keys: dict[str, str] = {}
    for key in found:
        if (other := keys.setdefault(known[key].tensor, key)) != key:
            raise UserError(f"{file} holds both {other} and {key}; keep the one that counts")
    tensors = {name: _prompt(found[key], known[key], file) for name, key in keys.items()}
    return PublishedPrompts(tensors, checkpoint.epoch, file)


def _prompt(tensor: Tensor, entry: Published, file: Path) -> Tensor:
    """(N, W), as runs have it."""
    what, shape = f"the {entry.tensor.replace('_', ' ')} in {file}", tuple(tensor.shape)
    needed = "(vectors, width) of numbers is needed"
    if tensor.ndim == 3 and not entry.leading:
        raise UserError(f"{what} is class-specific, {shape}; {needed}")
    if tensor.ndim == 3 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 2 or not tensor.numel() or not tensor.is_floating_point():
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
            The method follows from which prompts there are, the epochs from the file.
        overwrite: discard the run that is there.
        backbone: already loaded as the settings say, to share it.

    A `UserError` says that input is bad, or the prompts do not fit the backbone.
    """
    run, published = RunDirectory(output), read_published(checkpoint)
    settings = _settings_of(published, checkpoint, given)
    check_output(run, None, overwrite=overwrite)
    named = settings.dataset == IMPORTED
    task = _named_task(Path(str(settings.class_names))) if named else task_of(settings)
    backbone = backbone or backbone_of(settings)
    classifier = classifier_of(settings, published.tensors, backbone, task, str(published.file))
    started, test = time.perf_counter(), None
    if not named:
        test = evaluate_task(classifier, task, settings, reporter or Reporter())
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


def _settings_of(published: PublishedPrompts, checkpoint: Path, given: dict[str, Any]) -> Settings:
    """What is given, and what the prompts say of themselves."""
    given = {name: value for name, value in given.items() if value is not None}
    if "class_names" not in given and "dataset" not in given:
        hint = f"give {checkpoint} --class-names, a JSON list in label order, or --dataset"
        raise UserError(f"a checkpoint does not say what its classes are called; {hint}")
    # Losses leave no trace in a file: of methods that learn the same, the usual one, or the first.
    usual, held = Settings.model_fields["method"].default, published.tensors.keys()
    method = next(m for m in (usual, *METHODS) if _learns(m) == held)
    decided = {"method": method, "dataset": IMPORTED, "epochs": published.epoch}
    for part in get_method(method).parts:
        given |= part.settings_of(published.tensors)
    settings = make_settings({**decided, **given})
    if _learns(settings.method) != held:
        what = " and a ".join(name.replace("_", " ") for name in held)
        what = f"method '{settings.method}' does not learn what {published.file} holds (a {what})"
        raise UserError(f"{what}; leave --method out, or give one that does")
    return settings


def _learns(method: str) -> set[str]:
    """Names of the tensors that a method's published checkpoints hold."""
    return {entry.tensor for entry in get_method(method).checkpoint}


def _named_task(file: Path) -> Task:
    """A task of class names alone."""
    value = read_class_names(file)
    names = tuple(value.values() if isinstance(value, dict) else value)
    # Published label lists do have two classes of one name.
    check_class_names(names, f"class name file {file}", distinct=False)
    return Task(IMPORTED, Path(), names, (), (), ())


def published_bytes(run: RunDirectory) -> bytes:
    """A run's prompts as the published code saves them: ``{"state_dict": ..., "epoch": N}``.

    A `UserError` if no finished run is here, or it learned no prompts.
    """
    run.require()
    settings = run.read_settings()
    entries = get_method(settings.method).checkpoint
    if not entries:
        what = f"what {settings.method} learned in {run.path} has no place in a CoOp checkpoint"
        raise UserError(f"{what}; use --format onnx or torch")
    if not run.read_environment().reads_text:
        what = f"{run.path} has class vectors beside its prompts, which a CoOp checkpoint has not"
        raise UserError(f"{what}; use --format onnx or torch")
    tensors, _ = run.read_tensors(run.prompts_file)
    state = {e.key: tensors[e.tensor][None] if e.leading else tensors[e.tensor] for e in entries}
    file = io.BytesIO()
    torch.save({"state_dict": state, "epoch": settings.epochs}, file)
    return file.getvalue()
