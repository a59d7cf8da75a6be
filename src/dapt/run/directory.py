"""The run directory: the one place that knows which files a run keeps, and their form.

    settings.json          everything that decides the result
    environment.json       versions, commit, device, backbone fingerprint, seconds
    task.json              dataset, class names in label order, template
    support_set.json       the images it was tuned on
    log.csv                one row a step: epoch, learning rate, losses, accuracy
    tensorboard/           the same, for TensorBoard, where that is installed
    checkpoint.safetensors prompts and momentum, to resume from
    prompts.safetensors    the result: text_prompt, visual_prompt (or a probe's weight, bias)
    metrics.json           how well it does; there once the run is finished
    eval-<name>.json       the same prompts on another dataset, domain or set of classes
    failure.json           why an experiment gave the run up; gone once it is finished

All of it is JSON, CSV or safetensors, readable without this package.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.data import SupportSet, Task
from dapt.data.items import check_class_names
from dapt.errors import UserError
from dapt.safe.files import read_json, read_text, user_path, write_atomic, write_json
from dapt.safe.weights import check_safetensors
from dapt.settings import Settings, make_settings

_PACKAGES = ("dapt", "torch", "torchvision", "open_clip_torch", "numpy", "pillow", "scikit-learn")
# Bytes of any file of a run: a probe of 30,000 classes on the widest towers there are.
_LARGEST = 2**28
# What TensorBoard's files begin with.
_EVENTS = "events.out.tfevents"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Test(_Strict):
    images: int = Field(ge=0, lt=2**53)
    accuracy: float = Field(ge=0, le=1)
    top5: float = Field(0, ge=0, le=1)
    macro_f1: float = Field(0, ge=0, le=1)
    ece: float = Field(0, ge=0, le=1)


class _Dispersion(_Strict):
    before: FiniteFloat
    after: FiniteFloat


class _Metrics(_Strict):
    """What sums a run up, of what metrics.json holds."""

    dataset: str
    method: str
    learned_parameters: int = Field(ge=0, lt=2**53)
    dispersion: dict[str, _Dispersion]
    test: _Test


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
            write_json(self.task_file, _task_record(task))
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
            (self.task_file, _task_record(task), "classes, template or source"),
            (self.support_file, support.to_json(), "support set"),
        ):
            if read_json(file, what) != now:
                raise UserError(
                    f"cannot resume {self.path}: the {what} of '{task.name}' differ from those in "
                    f"{file.name}, which it was started with; restore the data, or start anew "
                    "with --overwrite"
                )
        before = self.read_environment()
        resumed = before.get("resumed", [])
        if not isinstance(resumed, list):
            raise UserError(f"{self.environment_file} is damaged; start anew with --overwrite")
        now = environment(backbone)
        write_json(self.environment_file, {**before, "resumed": [*resumed, now]})
        then, now = _rounding(before), _rounding(now)
        changed = [f"{n} was {then[n]}, is {now[n]}" for n in then if then[n] != now[n]]
        return "; ".join(changed) or None

    def require_backbone(self, backbone: Backbone) -> None:
        """Raise `UserError` unless these are the weights that the run was tuned on."""
        recorded = self.read_environment()
        if recorded.get("backbone_sha256") != backbone.fingerprint:
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

    def read_failure(self) -> str | None:
        """Why the run was given up, or None where it was not."""
        if not self.failure_file.is_file():
            return None
        value = read_json(self.failure_file, "failure record")
        return str(value.get("error")) if isinstance(value, dict) else "unknown"

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
        events = [self.tensorboard] if linked else sorted(self.tensorboard.glob(f"{_EVENTS}.*"))
        return [*files, *sorted(self.path.glob("eval-*.json")), *events]

    def _records(self) -> list[Path]:
        return [self.settings_file, self.task_file, self.support_file, self.environment_file]

    def read_settings(self) -> Settings:
        """Settings the run was started with, validated again."""
        return make_settings(_mapping(self.settings_file, "settings of the run"))

    def read_task(self) -> tuple[str, tuple[str, ...], str]:
        """Dataset name, class names in label order, template."""
        value = read_json(self.task_file, "task of the run")
        try:
            dataset, names, template = (value[k] for k in ("dataset", "class_names", "template"))
            if not isinstance(names, list) or not names:
                raise TypeError("its class names are no list")
            if not all(isinstance(text, str) for text in (dataset, template, *names)):
                raise TypeError("its names are no text")
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self.task_file} is damaged ({error}); run 'dapt train' again"
            ) from error
        check_class_names(names, str(self.task_file), distinct=False)
        if template.count("{}") != 1:
            raise UserError(f"{self.task_file} is damaged: its template must hold {{}} once")
        return dataset, tuple(names), template

    def read_environment(self) -> dict[str, Any]:
        """What is recorded of the environment.

        Raises:
            UserError: the file is missing or damaged.
        """
        return _mapping(self.environment_file, "environment of the run")

    def read_metrics(self) -> dict[str, Any]:
        """Metrics of a finished run; what sums them up is of the kind it should be.

        Raises:
            UserError: the file is missing or damaged.
        """
        value = _mapping(self.metrics_file, "metrics of the run")
        try:
            _Metrics.model_validate(value)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise UserError(
                f"{self.metrics_file} is damaged (its '{where}'); run 'dapt train' again"
            ) from error
        return value

    def add_to_environment(self, **more: Any) -> None:
        """Add entries to what `begin` recorded of the environment."""
        write_json(self.environment_file, {**self.read_environment(), **more})

    # --------------------------------------------------------------------- its progress

    def write_checkpoint(self, state: dict[str, Tensor], step: int, seconds: float) -> None:
        """Record prompts and momentum after ``step`` steps and ``seconds`` of tuning."""
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
            return state, step, seconds
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{self.checkpoint_file} is damaged; delete it to start the run's tuning anew"
            ) from error

    def write_tensors(self, path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
        """Write safetensors atomically, on the CPU, with string metadata."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        # No tensors and an empty mapping together make a header that cannot be read back.
        write_atomic(path, save(tensors, metadata=metadata or None))

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


class StepLog:
    """log.csv, one row a step, and TensorBoard where it is installed.

    Args:
        run: whose log it is.
        terms: names of the loss terms, a column each.
        steps: rows to keep of an earlier log when a run resumes; later ones are dropped.
    """

    def __init__(self, run: RunDirectory, terms: list[str], steps: int = 0) -> None:
        header = ["step", "epoch", "lr", "loss", "cross_entropy", *terms, "accuracy"]
        kept = [header]
        if steps and run.log_file.is_file():
            kept = _rows(run.log_file, header, steps)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(kept)
        write_atomic(run.log_file, text.getvalue())
        self._file = run.log_file.open("a", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._header = header
        self._board = _Board.open(run.tensorboard, steps)

    def add(self, row: list[float | int]) -> None:
        """Append one step: step, epoch, lr, loss, cross-entropy, terms, accuracy."""
        self._csv.writerow(row)
        if self._board is not None:
            self._board.add(int(row[0]), dict(zip(self._header[2:], row[2:], strict=True)))

    def flush(self) -> None:
        """Put everything so far on disk, before a checkpoint counts on it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        try:
            self._file.close()
        finally:
            if self._board is not None:
                self._board.close()


class _Board:
    """Scalars in TensorBoard's format.

    TensorBoard's own writers write in a thread, whose death of a full disk nobody is told of.
    """

    def __init__(self, file: BinaryIO, event: type[Any], record: Callable[[bytes], None]) -> None:
        self.file, self._event, self._record = file, event, record

    @classmethod
    def open(cls, folder: Path, steps: int) -> _Board | None:
        """A new file of events after so many steps, or None where TensorBoard is not installed."""
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return None
        if folder.is_symlink():
            raise UserError(f"{folder} is a link, which may lead anywhere; delete it")
        folder.mkdir(exist_ok=True)
        name = f"{_EVENTS}.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        file = (folder / name).open("xb")
        board = cls(file, Event, RecordWriter(file).write)
        board._put(file_version="brain.Event:2")
        # TensorBoard leaves out what an earlier file has from this step on.
        board._put(step=steps, session_log=SessionLog(status=SessionLog.START))
        return board

    def add(self, step: int, values: dict[str, float]) -> None:
        found = [{"tag": f"train/{name}", "simple_value": v} for name, v in values.items()]
        self._put(step=step, summary={"value": found})

    def _put(self, **fields: Any) -> None:
        self._record(self._event(wall_time=time.time(), **fields).SerializeToString())

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _rows(log: Path, header: list[str], steps: int) -> list[list[str]]:
    """A log's header and first rows; what a killed run wrote after them may end anywhere.

    Raises:
        UserError: they are none, or not under this header.
    """
    try:
        rows = list(islice(csv.reader(io.StringIO(read_text(log))), steps + 1))
        if rows[:1] != [header] or any(len(row) != len(header) for row in rows):
            raise ValueError("its columns are not those of this run")
        for row in rows[1:]:
            [float(value) for value in row]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{log} is damaged ({error}); delete it, and the run goes on") from error
    return rows


# Of prompts, their momentum, and a probe.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _mapping(file: Path, what: str) -> dict[str, Any]:
    value = read_json(file, what)
    if not isinstance(value, dict):
        raise UserError(f"{what} {file} must hold a JSON object; it is damaged")
    return value


def _task_record(task: Task) -> dict[str, Any]:
    source = {} if task.source_sha256 is None else {"source_sha256": task.source_sha256}
    return {
        "dataset": task.name,
        "template": task.template,
        "class_names": list(task.class_names),
        **source,
    }


def environment(backbone: Backbone, seed: int | None = None) -> dict[str, Any]:
    """Versions, source commit, machine, device and backbone of this process."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = backbone.device
    return {
        **({} if seed is None else {"seed": seed}),
        "python": sys.version.split()[0],
        "versions": versions,
        "commit": _commit(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "precision": backbone.precision,
        "cpu": _cpu(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "backbone": backbone.name,
        "backbone_sha256": backbone.fingerprint,
        "command": sys.argv,
    }


def _cpu() -> str:
    """Model of the processor, and the instructions that torch uses of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):  # Linux on x86 alone tells it there
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def _rounding(record: dict[str, Any]) -> dict[str, Any]:
    """What of an `environment` decides how sums are rounded, as far as it is recorded."""
    versions = record.get("versions")
    found = {"torch": versions.get("torch") if isinstance(versions, dict) else None}
    found |= {name: record.get(name) for name in ("threads", "cpu", "device")}
    return {name: value for name, value in found.items() if value is not None}


def _commit() -> str | None:
    """Commit of the checkout this package runs from, if it runs from one."""
    here = Path(__file__).resolve().parent
    if not (here.parents[2] / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
