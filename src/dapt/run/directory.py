"""The run directory: the one place that knows which files a run keeps.

    settings.json          everything that decides the result
    environment.json       versions, commit, device, backbone fingerprint, seconds
    task.json              dataset, class names in label order, template
    support_set.json       the images it was tuned on
    log.csv                one row a step: epoch, learning rate, losses, accuracy
    tensorboard/           the same, for TensorBoard, where that is installed
    checkpoint.safetensors what is learned, and its momentum, to resume from
    prompts.safetensors    the result: what was learned or fitted, by name
    metrics.json           how well it does; there once the run is finished
    eval-<name>.json       the same prompts on another dataset, domain or set of classes
    failure.json           why an experiment gave the run up; gone once it is finished

All of it is JSON, CSV or safetensors, readable without this package; `dapt.run.records` has the
form of each.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.data import SupportSet, Task
from dapt.errors import UserError
from dapt.run.environment import environment, rounding
from dapt.run.log import EVENTS
from dapt.run.records import (
    Environment,
    EvaluationRecord,
    FailureRecord,
    Metrics,
    SupportRecord,
    TaskRecord,
    read_record,
)
from dapt.safe.files import read_json, user_path, write_atomic, write_json
from dapt.safe.weights import check_safetensors
from dapt.settings import Settings, make_settings

# Bytes of any file of a run: a probe of 30,000 classes on the widest towers there are.
_LARGEST = 2**28
# Of what is learned, its momentum, and what is fitted.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# How version 0.1 called what a checkpoint holds.
_OLD_NAME = re.compile(r"(prompt|momentum)\.(text|visual)")


class InUse(UserError):
    """Another process holds the run directory."""


class RunDirectory:
    """Files of one run under ``path``.

    Raises:
        UserError: no directory can have this path.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = user_path(path)
        self.settings_file = self.path / "settings.json"
        self.environment_file = self.path / "environment.json"
        self.task_file = self.path / "task.json"
        self.support_file = self.path / "support_set.json"
        self.log_file = self.path / "log.csv"
        self.checkpoint_file = self.path / "checkpoint.safetensors"
        self.prompts_file = self.path / "prompts.safetensors"
        self.metrics_file = self.path / "metrics.json"
        self.failure_file = self.path / "failure.json"
        self.tensorboard = self.path / "tensorboard"
        self._lock = self.path / ".lock"

    @property
    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return self.settings_file.is_file()

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.metrics_file.is_file()

    @contextmanager
    def locked(self, patience: float = 0) -> Iterator[None]:
        """Hold the directory for this process; the lock dies with the process.

        Args:
            patience: seconds to wait for another process to let go.

        Raises:
            InUse: another process holds it.
            UserError: the directory cannot be made, or not locked.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run directory {self.path} cannot be made ({error.strerror}); choose another "
                "with --output"
            ) from error
        lock = FileLock(self._lock)
        try:
            lock.acquire(timeout=patience)
        except Timeout as error:
            raise InUse(
                f"run directory {self.path} is in use by another process; wait for it, or use "
                "another directory"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR):
                raise
            # A link, which is not followed, or a folder.
            raise UserError(
                f"{lock.lock_file} cannot be locked ({error.strerror}); delete it"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def require(self, *, finished: bool = True) -> None:
        """Raise `UserError` unless a (finished) run is here."""
        if not self.exists:
            raise UserError(
                f"{self.path} is no run directory (it has no settings.json); give one that "
                "'dapt train' wrote"
            )
        if finished and not self.prompts_file.is_file():
            raise UserError(
                f"the run in {self.path} is not finished; 'dapt train --output {self.path} "
                "--resume' continues it"
            )

    def check_links(self, files: Iterable[Path]) -> None:
        """Refuse files that are links, before they are copied or sent: in a stranger's run they may
        show what is nobody's business. Those of a snapshot in the hub's cache lead to its blobs.

        Raises:
            UserError: a link leads elsewhere, or a file is larger than a run's are.
        """
        cached = [p.parent / "blobs" for p in self.path.resolve().parents if p.name == "snapshots"]
        for file in files:
            if file.is_symlink() and not any(file.resolve().is_relative_to(p) for p in cached):
                raise UserError(f"{file} is a link; use a run whose files stand in it themselves")
            if file.stat().st_size > _LARGEST:
                raise UserError(f"{file} has more than {_LARGEST:,} bytes, as no run's file has")

    def write_files(self, files: dict[str, bytes]) -> None:
        """Take the files of a run, by name, in place of what was here.

        The settings come last: while they are missing, no run is here.
        """
        self.clear()
        for name in sorted(files, key=lambda name: name == self.settings_file.name):
            write_atomic(self.path / name, files[name])

    # ------------------------------------------------------------------ what decides it

    def begin(
        self,
        settings: Settings,
        task: Task,
        support: SupportSet,
        backbone: Backbone,
        *,
        known: Callable[[], None] | None = None,
    ) -> None:
        """Record what the run is made of, in place of whatever was here.

        The settings go first and come last: while they are missing, no run is here. ``known``
        writes what is known of the run before that, where it is not to be tuned.
        """
        self.clear()
        try:
            write_json(self.task_file, task_record(task))
            write_json(self.support_file, support.to_json())
            write_json(self.environment_file, environment(backbone, settings.seed))
            if known is not None:
                known()
            write_json(self.settings_file, settings.model_dump())
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Delete the run that is here, if there is one: its settings, which make it one, first.

        Raises:
            UserError: a folder is where a run has a file, or the reverse; nothing is deleted then.
        """
        files = [self.settings_file, *self.results(), *self._records()]
        for file in files:
            if file.is_dir() and not file.is_symlink():
                raise UserError(f"{file} is a folder, where a run has a file; move it elsewhere")
        if self.tensorboard.is_file():
            raise UserError(f"{self.tensorboard} is a file, where a run has a folder; move it")
        for file in files:
            file.unlink(missing_ok=True)

    def require_own(self) -> None:
        """Raise `UserError` if files with a run's names are here, but no run was ever begun.

        A run that was killed at any moment has left its lock, which comes first.
        """
        if self.exists or self._lock.exists():
            return
        for file in (*self.results(), *self._records()):
            if file.exists() or file.is_symlink():
                raise UserError(
                    f"{file} is there, and {self.path} holds no run that it could be of; choose "
                    "another --output, or add --overwrite to replace it"
                )

    def resume(self, task: Task, support: SupportSet, backbone: Backbone) -> str | None:
        """Check that what was found again is what the run was begun with, and record this session.

        Returns:
            What else of this process may change the last bits of the result, or None.

        Raises:
            UserError: backbone, classes or support images differ.
        """
        self.require_backbone(backbone)
        for file, now, what in (
            (self.task_file, task_record(task), "classes, template or source"),
            (self.support_file, support.to_json(), "support set"),
        ):
            if read_json(file, what) != now:
                raise UserError(
                    f"cannot resume {self.path}: the {what} of '{task.name}' differ from those in "
                    f"{file.name}, which it was started with; restore the data, or start anew "
                    "with --overwrite"
                )
        before, now = self.read_environment(), environment(backbone)
        self.add_to_environment(resumed=[*before.resumed, now])
        then, now = rounding(before.model_dump()), rounding(now)
        changed = [f"{n} was {then[n]}, is {now[n]}" for n in then if then[n] != now[n]]
        return "; ".join(changed) or None

    def require_backbone(self, backbone: Backbone) -> None:
        """Raise `UserError` unless these are the weights that the run was tuned on."""
        if self.read_environment().backbone_sha256 != backbone.fingerprint:
            raise UserError(
                f"the weights of backbone '{backbone.name}' are not those that {self.path} was "
                "tuned on; its prompts only fit the original ones"
            )

    def copy_from(self, other: RunDirectory) -> None:
        """Take over a finished run of the same settings, without its evaluations elsewhere.

        Like `begin`, what makes it a run comes last, and what makes it a finished one after that.

        Raises:
            InUse: another process holds this directory, or has begun a run in it.
            UserError: a file of the other is a link.
        """
        other.check_links(other.files())
        with self.locked():
            if self.exists:
                raise InUse(f"run directory {self.path} was taken by another process meanwhile")
            self.clear()
            for name in ("task_file", "support_file", "prompts_file", "log_file"):
                source: Path = getattr(other, name)
                if source.is_file():
                    write_atomic(getattr(self, name), source.read_bytes())
            known = read_json(other.environment_file, "environment of the run")
            write_json(self.environment_file, {**known, "copied_from": str(other.path)})
            for name in ("settings_file", "metrics_file"):
                write_atomic(getattr(self, name), getattr(other, name).read_bytes())

    def finish(self, metrics: dict[str, Any]) -> None:
        """Record the metrics, which marks the run finished; everything else is there already."""
        write_json(self.metrics_file, metrics)
        self.failure_file.unlink(missing_ok=True)

    def fail(self, error: str, details: str | None = None) -> None:
        """Record why the run was given up: a sentence, and a traceback where it was a surprise."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.touch()  # says that the folder is ours, where the run was not begun
        write_json(self.failure_file, {"error": error, "traceback": details})

    def files(self) -> list[Path]:
        """Those that tell of the run and its result, without evaluations elsewhere."""
        files = [*self._records(), self.log_file, self.prompts_file, self.metrics_file]
        return [file for file in files if file.is_file()]

    def results(self) -> list[Path]:
        """Files of what came of the run, there or not; another run replaces them all."""
        files = [self.metrics_file, self.prompts_file, self.checkpoint_file, self.log_file]
        files.append(self.failure_file)
        # Of a link, which may lead anywhere, the link itself; no file there is ours to delete.
        linked = self.tensorboard.is_symlink()
        events = [self.tensorboard] if linked else sorted(self.tensorboard.glob(f"{EVENTS}.*"))
        return [*files, *sorted(self.path.glob("eval-*.json")), *events]

    def _records(self) -> list[Path]:
        return [self.settings_file, self.task_file, self.support_file, self.environment_file]

    # ---------------------------------------------------------------------- its records

    def read_settings(self) -> Settings:
        """Settings the run was started with, validated again.

        Raises:
            UserError: as for all records: the file is missing, damaged, or holds what cannot be.
        """
        value = read_json(self.settings_file, "settings of the run")
        if not isinstance(value, dict):
            raise UserError(f"{self.settings_file} must hold a JSON object; it is damaged")
        return make_settings(value)

    def read_task(self) -> TaskRecord:
        """What the run is to tell apart."""
        return read_record(self.task_file, TaskRecord, "task of the run")

    def read_environment(self) -> Environment:
        """What is recorded of the environment."""
        return read_record(self.environment_file, Environment, "environment of the run")

    def read_support(self) -> SupportRecord:
        """The images it was tuned on."""
        return read_record(self.support_file, SupportRecord, "support set of the run")

    def read_metrics(self) -> Metrics:
        """How well a finished run does."""
        return read_record(self.metrics_file, Metrics, "metrics of the run")

    def read_failure(self) -> str | None:
        """Why the run was given up, or None where it was not."""
        if not self.failure_file.is_file():
            return None
        return read_record(self.failure_file, FailureRecord, "failure record").error

    def evaluations(self) -> Iterator[tuple[Path, EvaluationRecord | UserError]]:
        """Evaluations elsewhere, in order of their files' names; an error in a damaged one's place.

        Whoever asks decides whether that matters.
        """
        for file in sorted(self.path.glob("eval-*.json")):
            try:
                yield file, read_record(file, EvaluationRecord, "evaluation")
            except UserError as error:
                yield file, error

    def add_to_environment(self, **more: Any) -> None:
        """Add entries to what `begin` recorded of the environment."""
        known = read_json(self.environment_file, "environment of the run")
        write_json(self.environment_file, {**known, **more})

    # --------------------------------------------------------------------- its progress

    def write_checkpoint(self, state: dict[str, Tensor], step: int, seconds: float) -> None:
        """Record what is learned, and its momentum, after ``step`` steps and ``seconds``."""
        self.write_tensors(self.checkpoint_file, state, step=str(step), seconds=f"{seconds:.3f}")

    def read_checkpoint(self) -> tuple[dict[str, Tensor], int, float] | None:
        """State, steps and seconds so far, or None where there is no checkpoint yet.

        Raises:
            UserError: the file is damaged.
        """
        if not self.checkpoint_file.is_file():
            return None
        state, metadata = self.read_tensors(self.checkpoint_file)
        try:
            step, seconds = int(metadata["step"]), float(metadata["seconds"])
            if step < 0 or not 0 <= seconds < inf:
                raise ValueError("its numbers are out of range")
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{self.checkpoint_file} is damaged; delete it to start the run's tuning anew"
            ) from error
        return {_new_name(name): tensor for name, tensor in state.items()}, step, seconds

    def write_tensors(self, path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
        """Write safetensors atomically, on the CPU, with string metadata."""
        write_atomic(path, tensors_as_bytes(tensors, metadata))

    def read_tensors(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a safetensors file of this run.

        Raises:
            UserError: the file is missing or damaged, or a tensor is none of finite numbers.
        """
        try:
            check_safetensors(path, _LARGEST)
            with safe_open(path, "pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}
                metadata = file.metadata() or {}
            odd = [k for k, t in tensors.items() if t.dtype not in _DTYPES or not _finite(t)]
        except MemoryError:
            raise
        except Exception as error:  # the library's own, and those of types that torch lacks
            raise UserError(f"{path} is missing or damaged ({error}); train again") from error
        if odd:
            raise UserError(f"{path} is damaged: '{odd[0]}' is no tensor of finite numbers")
        return tensors, metadata


def tensors_as_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file, with string metadata."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # No tensors and an empty mapping together make a header that cannot be read back.
    return save(tensors, metadata=metadata or None)


def _new_name(name: str) -> str:
    if not (found := _OLD_NAME.fullmatch(name)):
        return name
    return f"{'momentum.' if found[1] == 'momentum' else ''}{found[2]}_prompt"


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def task_record(task: Task) -> dict[str, Any]:
    """What task.json keeps of a task."""
    source = {} if task.source_sha256 is None else {"source_sha256": task.source_sha256}
    return {
        "dataset": task.name,
        "template": task.template,
        "class_names": list(task.class_names),
        **source,
    }
