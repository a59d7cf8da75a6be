"""The run directory: the one place that knows which files a run keeps.

All of them are JSON, CSV or safetensors, readable without this package; `dapt.run.records` has the
form of each.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.clip.known import Each, stands_in
from dapt.data import SupportSet, Task, content_digest
from dapt.errors import UserError, refusing
from dapt.methods import find_method
from dapt.run import records
from dapt.run.records import as_file, read_object, read_record
from dapt.safe.files import (
    TEMPORARY,
    delete_abandoned,
    open_regular,
    read_json,
    user_path,
    write_atomic,
    write_json,
)
from dapt.safe.weights import check_safetensors
from dapt.settings import Settings, make_settings

# What TensorBoard's files begin with.
EVENTS = "events.out.tfevents"
# Bytes of any file of a run: a probe of 30,000 classes on the widest towers there are.
_LARGEST = 2**28
# How version 0.1 called what a checkpoint holds, and how it is called now.
_OLD_NAME = re.compile(r"\A(?:prompt\.|(momentum\.))(text|visual)\Z")
_NEW_NAME = r"\1\2_prompt"
# By this a lock is known for one of ours; other programs have files of that name too. Those of
# version 0.1 are empty.
_OURS = b"dapt\n"
# What the system says of a lock that is something else, or somebody else's.
_NO_LOCK = {errno.ELOOP, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV}


class InUse(UserError):
    """Another process holds the run directory."""


class RunDirectory:
    """Files of one run under ``path``; a `UserError` if no directory can have it."""

    def __init__(self, path: Path | str) -> None:
        self.path = user_path(path)
        # What decides the result; versions, device, weights; classes; the images tuned on.
        self.settings_file = self.path / "settings.json"
        self.environment_file = self.path / "environment.json"
        self.task_file = self.path / "task.json"
        self.support_file = self.path / "support_set.json"
        # A row a step, for people and for TensorBoard; what is learned and its momentum, to resume.
        self.log_file = self.path / "log.csv"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoint_file = self.path / "checkpoint.safetensors"
        # What was learned or fitted; how well it does, once finished; why a run was given up.
        # Beside them eval-<name>.json: the same on another dataset, domain or set of classes.
        self.prompts_file = self.path / "prompts.safetensors"
        self.metrics_file = self.path / "metrics.json"
        self.failure_file = self.path / "failure.json"
        # What a search for the method has found so far; it goes before the run.
        self.search_file = self.path / "effort.json"
        self._lock = self.path / ".lock"

    @property
    def name(self) -> str:
        """As people know it: its folder's, or the repository's of which the hub's cache has it."""
        folder = self.path.resolve()
        whole = folder.parents[1].name.split("--") if self.fetched else []
        return "/".join(whole[1:]) or folder.name

    @property
    def fetched(self) -> bool:
        """Whether it lies in the hub's cache, in which nothing is written."""
        return self.path.resolve().parent.name == "snapshots"

    @property
    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return self.settings_file.is_file()

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.exists and self.metrics_file.is_file()

    @contextmanager
    def locked(self, patience: float = 0) -> Iterator[None]:
        """Hold the directory for this process; `InUse` if another does for ``patience`` seconds.

        Who holds it is the only one to write there, so what killed processes left of writing goes.
        """
        what, hint = f"run directory {self.path} cannot be made", "choose another `output`"
        with refusing(what, hint, OSError):
            self.path.mkdir(parents=True, exist_ok=True)
        before, way = (
            self._lock_content(),
            "use another directory, or delete it if nothing needs it",
        )
        if before not in (None, b"", _OURS):
            raise UserError(f"{self._lock} is not of dapt and may be another program's; {way}")
        try:
            held = FileLock(self._lock).acquire(timeout=patience)
        except Timeout as error:
            hint = "wait for it, or use another directory"
            raise InUse(f"{self.path} is in use by another process; {hint}") from error
        except OSError as error:
            if error.errno not in _NO_LOCK or not os.path.lexists(self._lock):
                raise
            # A link, which is not followed, a folder, or somebody else's file.
            raise UserError(f"{self._lock} cannot be locked ({error.strerror}); {way}") from error
        with held:
            if before != b"":  # an empty one may be anybody's, as long as no run is begun here
                self._mark()
            for file in (*self._records(), *self._results(), Path("eval-")):
                delete_abandoned(self.path, f".{file.name}", seconds=-inf)
            yield

    def tidy(self) -> None:
        """Delete what killed processes left of writing, unless one may be at work here."""
        if any(self.path.glob(f".*{TEMPORARY}")):
            with suppress(UserError, OSError), self.locked():
                pass

    def _lock_content(self) -> bytes | None:
        """The first bytes of the lock; None where there is none, or it is no file of its own."""
        with suppress(OSError):
            if not self._lock.is_symlink():
                with open_regular(self._lock) as file:
                    return file.read(len(_OURS) + 1)
        return None

    def _mark(self) -> None:
        """Say in the lock that this folder is ours."""
        # Not in what is no ordinary file. Where a lock may not be written to, its name has to do.
        if self._lock_content() is not None:
            with suppress(OSError):
                self._lock.write_bytes(_OURS)

    def require(self, *, finished: bool = True) -> None:
        """Raise `UserError` unless a (finished) run is here."""
        if not self.exists:
            hint = "give one that 'dapt train' wrote"
            raise UserError(f"{self.path} is no run directory (it has no settings.json); {hint}")
        if finished and not self.prompts_file.is_file():
            way = f"'dapt train --output {self.path} --resume' continues it"
            raise UserError(f"the run in {self.path} is not finished; {way}")
        self.tidy()

    def check_links(self, files: Iterable[Path]) -> None:
        """Refuse links, and files larger than a run's are, before they are copied or sent.

        In a stranger's run a link may show what is nobody's business.
        """
        # Those of a snapshot in the hub's cache lead to its blobs.
        cached = [p.parent / "blobs" for p in self.path.resolve().parents if p.name == "snapshots"]
        for file in files:
            if file.is_symlink() and not any(file.resolve().is_relative_to(p) for p in cached):
                raise UserError(f"{file} is a link; use a run whose files stand in it themselves")
            if file.stat().st_size > _LARGEST:
                raise UserError(f"{file} has more than {_LARGEST:,} bytes, as no run's file has")

    def begin(self, files: Mapping[str, bytes], *, searched: bool = False) -> None:
        """Take the files of a run, by name, in place of what was here.

        Of a run that was ``searched`` for, the search stays.
        """
        # The settings go first and come last: while they are missing, no run is here. So it is
        # never half there.
        self._mark()
        self.clear(searched=searched)
        try:
            for name in sorted(files, key=lambda name: name == self.settings_file.name):
                write_atomic(self.path / name, files[name])
        except BaseException:
            self.clear(searched=searched)
            raise

    def clear(self, *, searched: bool = False) -> None:
        """Delete the run that is here, if there is one: its settings, which make it one, first."""
        files = [self.settings_file, *self._results(), *self._records()]
        files = [file for file in files if not (searched and file == self.search_file)]
        # Where a folder is in a file's place, or the reverse, nothing is deleted.
        for file in files:
            if file.is_dir() and not file.is_symlink():
                raise UserError(f"{file} is a folder, where a run has a file; move it elsewhere")
        if self.tensorboard.is_file():
            raise UserError(f"{self.tensorboard} is a file, where a run has a folder; move it")
        for file in files:
            file.unlink(missing_ok=True)

    def require_own(self) -> None:
        """Raise `UserError` if files with a run's names are here, but no run was ever begun."""
        # A run that was killed at any moment has left its lock, which comes first. Version 0.1 said
        # nothing in its lock; it may have left why a run was given up before it began.
        if self.exists or self._lock_content() == _OURS:
            return
        ours = []
        if self._lock_content() == b"":
            with suppress(UserError):
                ours = [self.failure_file] if self.read_failure() is not None else []
        for file in (*self._results(), *self._records()):
            if file not in ours and (file.exists() or file.is_symlink()):
                what = f"{file} is there, and {self.path} holds no run that it could be of"
                raise UserError(f"{what}; choose another `output`, or `overwrite` to replace it")

    def resume(self, task: Task, support: SupportSet, backbone: Backbone) -> str | None:
        """Check that what was found again is what the run was begun with, and record this session.

        Returns what else of this process may change the last bits of the result, or None.
        """
        self.require_backbone(backbone)
        for file, now, what in (
            (self.task_file, records.task_record(task), "classes, template or source"),
            (self.support_file, support.to_json(), "support set"),
        ):
            if read_json(file, what) != now:
                raise UserError(
                    f"cannot resume {self.path}: the {what} of '{task.name}' differ from its "
                    f"{file.name}; restore the data, or start anew with `overwrite`"
                )
        before, now = self.read_environment(), records.environment(backbone)
        now |= records.plugin_entry(self.read_settings().method)
        known = before.support_content_sha256
        if known is not None and known != content_digest(task, support):
            raise UserError(
                f"cannot resume {self.path}: support images of '{task.name}' are not what "
                "they were when it began; restore them, or start anew with `overwrite`"
            )
        self.add_to_environment(resumed=[*before.resumed, now])
        then, now = records.rounding(before.model_dump()), records.rounding(now)
        changed = [f"{n} was {then[n]}, is {now.get(n)}" for n in then if then[n] != now.get(n)]
        return "; ".join(changed) or None

    def revision(self) -> Each:
        """The commit of a hub's repository that the run was begun with, if one is recorded."""
        found = self.read_environment().backbone_revision if self.exists else None
        return tuple(found) if isinstance(found, list) else found

    def require_backbone(self, backbone: Backbone) -> None:
        """Raise `UserError` unless these are the weights that the run was tuned on."""
        known, tuned = self.read_environment(), f"those that {self.path} was tuned on"
        if known.backbone_sha256 != backbone.weights_sha256:
            what = f"the weights of backbone '{backbone.name}' are not {tuned}"
            raise UserError(f"{what}; its prompts only fit the original ones")
        # What sees images and texts otherwise is another model; version 0.1 recorded weights alone.
        if known.backbone_fingerprint not in (None, backbone.fingerprint):
            what = f"preprocessing, vocabulary or layout of backbone '{backbone.name}' are not"
            raise UserError(f"{what} {tuned}; restore its configuration and vocabulary")

    def copy_from(self, other: RunDirectory) -> None:
        """Take over a finished run of the same settings, without its evaluations elsewhere."""
        other.check_links(other.files())
        with self.locked():
            if self.exists:
                raise InUse(f"run directory {self.path} was taken by another process meanwhile")
            known = read_object(other.environment_file, "environment of the run")
            made = as_file({**known, "copied_from": str(other.path)})
            files = {file.name: file.read_bytes() for file in other.files()}
            self.begin(files | {self.environment_file.name: made})

    def finish(self, metrics: dict[str, Any]) -> None:
        """Record the metrics, which marks the run finished; everything else is there already."""
        write_json(self.metrics_file, metrics)
        self.failure_file.unlink(missing_ok=True)

    def fail(self, error: str, details: str | None = None) -> None:
        """Record why the run was given up: a sentence, and a traceback where it was a surprise."""
        with ExitStack() as stack:
            with suppress(UserError):
                stack.enter_context(self.locked(patience=1))
                self._mark()  # the folder is ours, where the run was not begun
            write_json(self.failure_file, {"error": error, "traceback": details})

    def files(self) -> list[Path]:
        """Those that tell of the run and its result, without evaluations elsewhere."""
        files = [*self._records(), self.log_file, self.prompts_file, self.metrics_file]
        return [file for file in files if file.is_file()]

    def _results(self) -> list[Path]:
        """What came of the run, there or not; another run replaces them all."""
        # Of a link, which may lead anywhere, the link itself; no file there is ours to delete.
        linked = self.tensorboard.is_symlink()
        events = [self.tensorboard] if linked else self.tensorboard.glob(f"{EVENTS}.*")
        return [self.metrics_file, self.prompts_file, self.checkpoint_file, self.log_file,
                self.search_file, self.failure_file, *self.path.glob("eval-*.json"),
                *events]  # fmt: skip

    def _records(self) -> list[Path]:
        return [self.settings_file, self.task_file, self.support_file, self.environment_file]

    def read_settings(self) -> Settings:
        """Validated again; as of all records, a `UserError` if missing, damaged or impossible."""
        found = read_object(self.settings_file, "settings of the run")
        if found.pop("auto_views", None) is not None:  # made when a run looked at an image once
            found.setdefault("looks", 1)
        method = found.get("method")
        if isinstance(method, str) and find_method(method) is None and (of := self._plugin()):
            raise UserError(
                f"{self.path} is of method '{method}' of {of.name}, which is not loaded; give "
                "`plugin` with a copy of that file that you trust, or install the package"
            )
        return make_settings(found)

    def _plugin(self) -> records.PluginRecord | None:
        """What the run's method is of, if that is recorded."""
        return self.read_environment().plugin if self.environment_file.is_file() else None

    def asked_settings(self) -> Settings:
        """Those that were asked for, where the run's are what `dapt.engine.suited` made of them."""
        kept = self.read_settings()
        return make_settings(kept.model_dump() | (self.read_environment().asked or {}))

    def stands_in(self) -> bool:
        """Whether its backbone is the bundled one for want of that which was meant."""
        return stands_in(self.asked_settings().backbone, self.read_settings().backbone)

    def read_search(self) -> records.SearchRecord:
        """The search for the run's method."""
        return read_record(self.search_file, records.SearchRecord, "search for a method")

    def kept_settings(self) -> dict[str, Any] | None:
        """Settings of what can be resumed here, a run or a search for its method."""
        if self.exists:
            return self.read_settings().model_dump()
        return self.read_search().settings if self.search_file.is_file() else None

    def read_task(self) -> records.TaskRecord:
        """What the run is to tell apart."""
        return read_record(self.task_file, records.TaskRecord, "task of the run")

    def read_environment(self) -> records.Environment:
        """What is recorded of the environment."""
        return read_record(self.environment_file, records.Environment, "environment of the run")

    def read_support(self) -> records.SupportRecord:
        """The images it was tuned on."""
        return read_record(self.support_file, records.SupportRecord, "support set of the run")

    def read_metrics(self) -> records.Metrics:
        """How well a finished run does."""
        return read_record(self.metrics_file, records.Metrics, "metrics of the run")

    def read_failure(self) -> str | None:
        """Why the run was given up, or None where it was not."""
        given_up, kind = self.failure_file.is_file(), records.FailureRecord
        return read_record(self.failure_file, kind, "failure record").error if given_up else None

    def evaluations(self) -> Iterator[tuple[Path, records.EvaluationRecord | UserError]]:
        """Evaluations elsewhere, by their files' names; an error in a damaged one's place."""
        for file in sorted(self.path.glob("eval-*.json")):
            try:
                yield file, read_record(file, records.EvaluationRecord, "evaluation")
            except UserError as error:
                yield file, error

    def add_to_environment(self, **more: Any) -> None:
        """Add entries to what `begin` recorded of the environment."""
        known = read_object(self.environment_file, "environment of the run")
        write_json(self.environment_file, {**known, **more})

    def write_checkpoint(self, state: dict[str, Tensor], step: int, seconds: float) -> None:
        """Record what is learned, and its momentum, after ``step`` steps and ``seconds``."""
        content = tensors_as_bytes(state, step=str(step), seconds=f"{seconds:.3f}")
        write_atomic(self.checkpoint_file, content)

    def read_checkpoint(self) -> tuple[dict[str, Tensor], int, float] | None:
        """State, steps and seconds so far, or None where there is no checkpoint yet."""
        if not self.checkpoint_file.is_file():
            return None
        state, metadata = self.read_tensors(self.checkpoint_file)
        what, hint = f"{self.checkpoint_file} is damaged", "delete it to start the tuning anew"
        with refusing(what, hint, KeyError, ValueError):
            step, seconds = int(metadata["step"]), float(metadata["seconds"])
            if step < 0 or not 0 <= seconds < inf:
                raise ValueError("its numbers are out of range")
        return {_OLD_NAME.sub(_NEW_NAME, name): t for name, t in state.items()}, step, seconds

    def read_tensors(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors, all of finite numbers, and metadata of a safetensors file of this run."""
        # The library raises errors of its own, and torch those of types that it lacks.
        with refusing(f"{path} is missing or damaged", "train again", Exception):
            check_safetensors(path, _LARGEST)
            with safe_open(path, "pt") as file:
                tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
            for name, tensor in tensors.items():
                if not (tensor.is_floating_point() and tensor.isfinite().all()):
                    raise ValueError(f"'{name}' is no tensor of finite numbers")
        return tensors, metadata or {}


def tensors_as_bytes(tensors: dict[str, Tensor], **metadata: str) -> bytes:
    """A safetensors file, with string metadata."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # No tensors and an empty mapping together make a header that cannot be read back.
    return save(tensors, metadata=metadata or None)
