"""The files of a run as models, for all who write or read them; what other versions add is kept."""

from __future__ import annotations

import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from dapt import __version__
from dapt.clip.backbone import Backbone
from dapt.data import SupportSet, Task
from dapt.data.grey import Scale
from dapt.data.items import check_class_names
from dapt.engine.effort import Search
from dapt.errors import UserError
from dapt.methods.plugins import plugin_of
from dapt.safe.files import read_json, to_json
from dapt.settings import Settings, kept_values, make_settings

Share = Annotated[float, Field(ge=0, le=1)]
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]

_PACKAGES = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "scikit-learn")


class Record(BaseModel):
    """A file of a run."""

    model_config = ConfigDict(strict=True, extra="allow")


class ClassScore(Record):
    """A class's test images and the share classified correctly; None without images."""

    name: str = Field(alias="class")
    images: Count
    accuracy: Share | None
    ap: Share | None = None  # average precision, of several labels an image


class Confusion(Record):
    """The non-zero entries of a confusion matrix: labels, and numbers of images."""

    true: list[Count]
    predicted: list[Count]
    images: list[Count]


class Test(Record):
    """Figures of an evaluation; all except ``images`` are fractions.

    If images have several labels, accuracy is the share of images for which exactly the true labels
    were predicted, and ``map`` (mean average precision) and ``micro_f1`` are present.
    """

    images: Count
    accuracy: Share
    map: Share | None = None
    micro_f1: Share | None = None
    top5: Share | None = None
    macro_f1: Share | None = None
    ece: Share | None = None
    per_class: list[ClassScore] = []
    confusion: Confusion | None = None
    skipped: list[dict[str, str]] = []


class Change(Record):
    """A figure before and after tuning."""

    before: FiniteFloat
    after: FiniteFloat


class Rise(Record):
    """Mean cross-entropy of the first and the last epoch; present only if it grew in tuning."""

    first: FiniteFloat
    last: FiniteFloat


class Confused(Record):
    """Two classes that are confused with each other, and for how many held-out images."""

    classes: list[str] = Field(min_length=2, max_length=2)
    images: Count


class ForecastRecord(Record):
    """What to expect on new photos, from `dapt.engine.forecast.forecast`."""

    images: Count
    accuracy: Share
    low: Share
    high: Share
    ece: Change
    confused: list[Confused] = []
    advice: str = ""
    true: list[Share] = Field(min_length=2)
    best: list[Share] = Field(min_length=2)

    def probability_of_known(self, share: float) -> float:
        """What that share of known images reach with their best class."""
        return float(np.interp(1 - share, np.linspace(0, 1, len(self.best)), self.best))

    def probability_of_sets(self, coverage: float) -> float:
        """What classes must reach, for the true one to be among them so often (Vovk, 2005)."""
        place = max(0.0, 1 - coverage * (1 + 1 / self.images))  # for so few images, a little lower
        return float(np.interp(place, np.linspace(0, 1, len(self.true)), self.true))


class MapForecast(Record):
    """The same for several labels per image: mean average precision, from `forecast_map`."""

    images: Count
    map: Share
    low: Share
    high: Share
    advice: str = ""


class TriedRecord(Record):
    """A method on held-out images, and by how much it lowers cross-entropy; see `Trial`."""

    method: str
    epochs: Count
    accuracy: Share
    cross_entropy: FiniteFloat
    gain: FiniteFloat
    error: FiniteFloat


class EffortRecord(Record):
    """What was tried beside the automatic head, from `dapt.engine.effort.summary`."""

    asked: str
    folds: Count
    images: Count
    tried: list[TriedRecord]
    left_out: dict[str, str]
    chosen: str
    told: str


class SearchRecord(Record):
    """effort.json: a search for a method, and the images and backbone it uses."""

    settings: dict[str, Any]
    support_sha256: str | None
    backbone_sha256: str
    search: Search

    def chosen(self) -> Settings:
        """Settings of the run that it ends with."""
        settings, best = make_settings(self.settings), self.search.best
        return best.settings(settings) if best else settings


class Metrics(Record):
    """metrics.json: how well a finished run does."""

    method: str
    dataset: str
    shots: Count = 0
    seed: Count = 0
    learned_parameters: Count
    support_images: Count = 0
    support_sha256: str | None = None
    skipped: list[dict[str, str]] = []
    left_out: dict[str, Count] = {}
    also_tested: list[dict[str, str]] | None = []
    rose: Rise | None = None
    dispersion: dict[str, Change]
    forecast: ForecastRecord | None = None
    map_forecast: MapForecast | None = None
    effort: EffortRecord | None = None
    test: Test | None = None  # None where no image was held out to test on

    @property
    def multilabel(self) -> bool:
        """Whether figures are of images with several labels."""
        tested = self.test is not None and self.test.map is not None
        return tested or self.map_forecast is not None


class EvaluationRecord(Record):
    """eval-<name>.json: the run on another dataset, domain or set of classes."""

    dataset: str
    domain: str | None = None
    classes: str | None = "all"
    settings: dict[str, Any] = {}
    also_tested: list[dict[str, str]] | None = []
    test: Test


class TaskRecord(Record):
    """task.json: the classes that a run tells apart."""

    dataset: str
    template: str
    class_names: list[str] = Field(min_length=1)
    source_sha256: str | None = None
    multilabel: bool = False
    grey_range: list[FiniteFloat] | None = Field(None, min_length=2, max_length=2)

    @property
    def grey(self) -> Scale | None:
        """As of a `Task`."""
        return None if self.grey_range is None else (self.grey_range[0], self.grey_range[1])

    @model_validator(mode="after")
    def _can_be_read(self) -> TaskRecord:
        if self.grey is not None and not self.grey[0] < self.grey[1]:
            raise ValueError("its grey_range must rise")
        if self.template.count("{}") != 1:
            raise ValueError("its template must hold {} once")
        try:
            check_class_names(self.class_names, "its class names", distinct=False)
        except UserError as error:
            raise ValueError(str(error)) from error
        return self


class PluginRecord(Record):
    """The plugin of a method that is not part of dapt; only a record, nothing is loaded by it."""

    name: str = Field(max_length=200)
    sha256: str | None = None


class Environment(Record):
    """environment.json: what a run was made with, and the seconds that its finished stages took."""

    backbone_sha256: str | None = None  # of its weights
    backbone_fingerprint: str | None = None  # of all of it
    # Of the hub's repository; of models that are joined, each one's.
    backbone_revision: Commit | list[Commit | None] | None = None
    reads_text: bool = True  # whether the backbone does
    support_content_sha256: str | None = None
    tuning_seconds: FiniteFloat | None = Field(None, ge=0)
    evaluation_seconds: FiniteFloat | None = Field(None, ge=0)
    step_seconds: FiniteFloat | None = Field(None, ge=0)  # a mean, with decoding and whatever else
    predict_seconds: FiniteFloat | None = Field(None, ge=0)  # of a decoded image
    peak_bytes: Count | None = None  # the most memory that the process held in the run
    asked: dict[str, Any] | None = None  # values of settings that the backbone did not take
    resumed: list[dict[str, Any]] = []
    plugin: PluginRecord | None = None  # that the method is of
    imported_from: str | None = None
    imported_sha256: str | None = None
    copied_from: str | None = None
    labels: list[str | int | float | bool] | None = None


class SupportImage(Record):
    """An image that the run was trained on."""

    path: str
    label: Count
    class_name: str
    others: list[Count] = []


class SupportRecord(Record):
    """support_set.json: the images that the run was trained on."""

    train: list[SupportImage]
    val: list[SupportImage] = []


class FailureRecord(Record):
    """failure.json: why a run of an experiment failed."""

    error: str
    traceback: str | None = None


Kind = TypeVar("Kind", bound=Record)


def read_record(file: Path, kind: type[Kind], what: str) -> Kind:
    """A run's file as its model; a `UserError` where it is missing or holds something else."""
    value = read_object(file, what)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        why = f"its '{where}': " if where else ""
        raise UserError(
            f"{file} is damaged ({why}{first['msg'].lower()}); run 'dapt train' again"
        ) from error


def read_object(file: Path, what: str) -> dict[str, Any]:
    """A run's file as a JSON object; a `UserError` where it is none."""
    value = read_json(file, what)
    if not isinstance(value, dict):
        raise UserError(f"{what} {file} must hold a JSON object; it is damaged")
    return value


def as_file(value: Any) -> bytes:
    """The content of a run's JSON file."""
    return to_json(value, indent=1) + b"\n"


def made_of(
    settings: Settings, task: Task, support: SupportSet, backbone: Backbone, **known: Any
) -> dict[str, bytes]:
    """Files, by name, that say what a run is made of; ``known`` is added to environment.json."""
    made = environment(backbone, settings.seed) | plugin_entry(settings.method) | known
    return {
        "settings.json": as_file(kept_values(settings)),
        "task.json": as_file(task_record(task)),
        "support_set.json": as_file(support.to_json()),
        "environment.json": as_file(made),
    }


def task_record(task: Task) -> dict[str, Any]:
    """What task.json keeps of a task."""
    found = {"dataset": task.name, "template": task.template, "class_names": list(task.class_names)}
    grey = None if task.grey is None else list(task.grey)
    known = {
        "source_sha256": task.source_sha256,
        "grey_range": grey,
        "multilabel": task.multilabel or None,
    }
    return found | {name: value for name, value in known.items() if value is not None}


def environment(backbone: Backbone, seed: int | None = None) -> dict[str, Any]:
    """Versions, source commit, machine, device and backbone of this process."""
    device, versions = backbone.device, {"dapt": __version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
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
        "backbone_sha256": backbone.weights_sha256,
        "backbone_fingerprint": backbone.fingerprint,
        **({} if backbone.revision is None else {"backbone_revision": backbone.revision}),
        **({} if backbone.reads_text else {"reads_text": False}),
        "command": sys.argv,
    }


def plugin_entry(method: str) -> dict[str, Any]:
    """What environment.json keeps of the plugin that a method is of, if it is of one."""
    plugin = plugin_of(method)
    return {} if plugin is None else {"plugin": {"name": plugin.name, "sha256": plugin.sha256}}


def rounding(record: dict[str, Any]) -> dict[str, Any]:
    """What of an `environment` decides how sums are rounded, as far as it is recorded."""
    versions = record.get("versions")
    found = {**record, "torch": versions.get("torch") if isinstance(versions, dict) else None}
    found["plugin"] = (record.get("plugin") or {}).get("sha256")
    names = ("torch", "threads", "cpu", "device", "plugin")
    return {name: found[name] for name in names if found.get(name) is not None}


def _cpu() -> str:
    """Model of the processor, and the instructions that torch uses of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):  # Linux on x86 alone tells it there
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def _commit() -> str | None:
    """Commit of the checkout this package runs from, if it runs from one."""
    here = Path(__file__).resolve().parent
    if not (here.parents[2] / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
