"""What a run is made of: validated settings, their defaults, and where a default comes from."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from dapt.clip.known import SUITED, as_one, each_of, names_of
from dapt.clip.looks import LOOKS
from dapt.errors import UserError, nearest, refusing, shown
from dapt.methods import BUILT_IN, METHODS, PartSettings, find_method, get_method
from dapt.methods.contract import LARGEST, LossTerm, Method
from dapt.methods.losses import ADDABLE
from dapt.methods.published import usual_settings
from dapt.safe.files import parse_yaml, read_text, read_yaml, user_path

# Datasets of runs that have none to be opened again, and where their prompts come from.
IMPORTED, FITTED = "imported", "fitted"
WITHOUT_DATASET = {IMPORTED: "imported without a dataset",
                   FITTED: "tuned on images given in Python"}  # fmt: skip

# Of the settings below, those that only gradient descent reads.
TUNING = frozenset({"epochs", "steps", "lr", "schedule", "optimizer", "momentum", "weight_decay",
                    "batch_size", "crop_min", "logit_scale"})  # fmt: skip
VIEWS = frozenset({"crop_min"})  # and of those, what some heads read too

Part = TypeVar("Part", bound=PartSettings)


class Settings(BaseModel):
    """Everything that decides a run's result. Field descriptions are the user's reference."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dataset: str = Field(description="'bundled', benchmark, folder, .csv, .jsonl or packed dataset")
    root: str | None = Field(None, description="folder with the benchmarks")
    domain: str | None = Field(None, description="style of the bundled task")
    class_names: str | None = Field(None, description="JSON file from folder names to class names")
    classes: Literal["all", "base", "new"] = Field("all", description="base: first half; new: rest")
    multi_label: bool | None = Field(None, description="whether images have several labels")
    test_fraction: float = Field(
        0.5, ge=0, lt=1, description="share of your own images to test on if not split; 0: none"
    )
    support_set: str | None = Field(None, description="saved support set to use instead of a draw")
    method: str = Field("dapt", description="method, or two combined: dapt+kernel-ridge")
    backbone: str | tuple[str, ...] = Field(
        "bundled",
        description="'bundled', 'auto' (best here), open_clip name, timm:NAME, hub id or file; "
        "a list joins them",
    )
    pretrained: str | tuple[str | None, ...] | None = Field(
        None, description="open_clip tag, weights file, or 'random'; a list for several backbones"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the frozen model; bf16 becomes fp16 on a GPU without bf16"
    )
    shots: int = Field(16, ge=1, description="support images per class")
    seed: int = Field(1, ge=0, lt=2**32, description="seed of support set, prompts and views")
    template: str | None = Field(None, description="sentence with {}, if no prompt is learned")
    looks: int = Field(
        1, ge=1, le=len(LOOKS), description="looks averaged for each image: whole, mirrored, crops"
    )
    templates: list[str] | None = Field(
        None, min_length=1, description="several templates to average: a list or a file of lines"
    )
    epochs: int = Field(ge=1, description="passes over the support set")
    steps: int | None = Field(None, ge=1, description="steps of tuning, instead of epochs")
    crop_min: float = Field(0.08, gt=0, le=1, description="smallest share of an image in a view")
    batch_size: int = Field(32, ge=1, description="images per step")
    lr: float = Field(gt=0, le=LARGEST, description="highest learning rate")
    schedule: Literal["warm-cosine", "cosine"] = Field(
        "warm-cosine", description="of lr: by epochs, the first at 1e-5; or by steps, to 1e-6"
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="optimiser of the towers' parts")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(5e-4, ge=0, le=LARGEST, description="weight decay of SGD and AdamW")
    logit_scale: float | None = Field(
        None, gt=0, le=LARGEST, description="scale of cosines in tuning; default: the backbone's"
    )
    loss_weights: dict[str, Annotated[float, Field(ge=-LARGEST, le=LARGEST)]] = Field(
        {}, description="weights of added losses: 'inter', 'intra', or a method's own"
    )
    checkpoint_every: int = Field(10, ge=1, description="epochs between checkpoints")
    eval_batch_size: int = Field(100, ge=1, description="images per batch in evaluation")
    text_memory: float = Field(4.0, gt=0, le=2**20, description="GiB of text activations in a step")
    recompute: bool | None = Field(
        None, description="compute layers anew for gradients; by default if memory is short"
    )
    grey_range: tuple[float, float] | None = Field(
        None, description="grey values over 8 bits for black and white; default: by the images"
    )
    strict: bool = Field(False, description="stop at an unreadable image, do not skip it")
    memory_budget: float = Field(2.0, gt=0, le=2**20, description="GiB of decoded images in memory")

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's yes and true would be 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind not in (bool, bool | None):
            raise PydanticCustomError("truth", "input should not be true or false")
        return value

    @pydantic.field_validator("backbone", "pretrained")
    @classmethod
    def _one_is_no_list(cls, value: Any) -> Any:
        """A single backbone is kept as ever."""
        return as_one(each_of(value, value)) if isinstance(value, tuple) and value else value

    @pydantic.field_validator("grey_range", mode="before")
    @classmethod
    def _two_numbers(cls, value: Any) -> Any:
        """Of the command line, "0,4095" is as good as "[0, 4095]"."""
        return value.split(",") if isinstance(value, str) else value

    @pydantic.field_validator("grey_range")
    @classmethod
    def _black_below_white(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise PydanticCustomError("range", "the first number must be below the second")
        return value

    def of(self, kind: type[Part]) -> Part:
        """The settings of one part, as its own model."""
        return kind(**{name: getattr(self, name) for name in kind.model_fields})

    def __reduce__(self) -> Any:
        """Settings travel between processes as their values: their class is made when asked for."""
        return _with_values, (self.model_dump(),)


def _with_values(values: dict[str, Any]) -> Settings:
    return settings_class()(**values)


def settings_class() -> type[Settings]:
    """`Settings` with those of all parts that the table of methods names now."""
    return _settings_class(tuple(kind for row in METHODS.values() for kind in row.kinds()))


@lru_cache(maxsize=8)
def _settings_class(kinds: tuple[type[PartSettings], ...]) -> type[Settings]:
    known = dict[str, FieldInfo]()
    for kind in kinds:
        for name, field in kind.model_fields.items():
            same = repr(known.setdefault(name, field)) == repr(field)
            if name in Settings.model_fields or not same:
                what = f"setting '{name}' of {kind.__name__} has a name that means something else"
                raise UserError(f"{what} already; give it another")
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in known.items()}
    return pydantic.create_model("Settings", __base__=Settings, __module__=__name__, **fields)


def all_fields() -> dict[str, FieldInfo]:
    """Every setting there is, by name: its default, bounds and description."""
    return dict(settings_class().model_fields)


def kept_values(settings: Settings) -> dict[str, Any]:
    """All values, but for settings of parts that are neither dapt's own nor of the method.

    So whoever has not these parts can read them.
    """
    method = get_method(settings.method)
    others = [row for name, row in METHODS.items() if name not in BUILT_IN]
    known = frozenset(Settings.model_fields).union(*(METHODS[n].settings for n in BUILT_IN))
    left = frozenset().union(*(row.settings for row in others)) - known - method.settings
    return {name: value for name, value in settings.model_dump().items() if name not in left}


def idle_settings(method: str, added: Collection[str] = ()) -> frozenset[str]:
    """Settings that cannot change what a method finds, with loss terms that are ``added`` to it.

    None of a method that is not known here.
    """
    if (row := find_method(method)) is None:
        return frozenset()
    parts = frozenset().union(*(other.settings for other in METHODS.values()))
    used = {n for term in ADDABLE if term in added for n in ADDABLE[term].Settings.model_fields}
    idle = frozenset() if row.learns else TUNING | {"loss_weights"}
    return (parts - row.settings - used) | (idle - VIEWS if row.head.reads_views else idle)


def make_settings(given: dict[str, Any]) -> Settings:
    """Validate settings; those not given are the published ones, or those for your own data.

    Raises a `UserError` that names an unknown setting (and the nearest known one) or a bad value.
    """
    given, known = {k: v for k, v in given.items() if v is not None}, list(all_fields())
    if odd := next((name for name in given if name not in known), None):
        raise UserError(f"unknown setting '{odd}'{nearest(odd, known)}; 'dapt settings' lists all")
    if isinstance(given.get("templates"), str):
        given["templates"] = _templates_in(user_path(given["templates"]))
    if isinstance(given.get("loss_weights"), dict):
        given |= _own_weights(given, find_method(str(given.get("method", "dapt"))))
    try:
        settings = _with_values({**default_settings(given), **given})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name, value = ".".join(map(str, first["loc"])), shown(first["input"])
        raise UserError(f"setting {name}={value}: {first['msg'].lower()}") from error
    if settings.template is not None and settings.templates is not None:
        raise UserError("template is one sentence and templates are several; give one of them")
    each_of(settings.backbone, settings.pretrained)  # are as many
    for template in settings.templates or filter(None, [settings.template]):
        if template.count("{}") != 1:
            what = f"setting template='{template}' must hold {{}} once"
            raise UserError(f"{what}, where the class name goes")
    _check_weights(settings)
    return settings


def _own_weights(given: dict[str, Any], row: Method | None) -> dict[str, Any]:
    """Where ``loss_weights`` name a loss term that a method has, the setting that weighs it."""
    weights, found = dict(given["loss_weights"]), dict[str, Any]()
    for term in row.losses if row else ():
        if term.name not in weights or term.weight not in all_fields():
            continue
        found[term.weight] = weight = weights.pop(term.name)
        if (other := given.get(term.weight)) not in (None, weight):
            what = f"{term.weight}={shown(other)} and a weight of {shown(weight)} for"
            raise UserError(f"{what} '{term.name}' are of one loss term; give one of them")
    return found | {"loss_weights": weights}


def _check_weights(settings: Settings) -> None:
    """Raise `UserError` where a loss term has no weight, or a weight no loss term."""
    row = get_method(settings.method)
    for term in row.losses:
        if term.weight not in weights_of(settings):
            what = f"loss term '{term.name}' of method '{settings.method}' needs a weight"
            raise UserError(f"{what}; set loss_weights: {{{term.weight}: ...}}")
    known = _weighable(row)
    if odd := next((name for name in settings.loss_weights if name not in known), None):
        if not row.learns:
            what = f"method '{settings.method}' takes no steps, so that no loss can be added"
            raise UserError(f"{what}; leave '{odd}' out of the losses, or use another method")
        what = f"unknown loss term '{odd}'{nearest(odd, known)}"
        raise UserError(f"{what}; method '{settings.method}' takes {', '.join(known)}")


def _weighable(row: Method) -> list[str]:
    """What ``loss_weights`` may name."""
    own = [term.weight for term in row.losses if term.weight not in all_fields()]
    there = {term.name for term in row.losses}
    return [*own, *(name for name in ADDABLE if row.learns and name not in there)]


def _templates_in(file: Path) -> list[str]:
    with refusing(f"templates file {file} cannot be read", "give a text file, a sentence a line"):
        lines = read_text(file, encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


def with_method(settings: Settings, method: str) -> Settings:
    """The same of another method, whose defaults stand where its own method's stood."""
    place = {"dataset": settings.dataset, "shots": settings.shots}
    usual = make_settings(place | {"method": settings.method}).model_dump()
    said = {name: value for name, value in settings.model_dump().items() if value != usual[name]}
    row = get_method(method)
    kept = [*_weighable(row), *(term.name for term in row.losses)]
    said["loss_weights"] = {n: v for n, v in settings.loss_weights.items() if n in kept}
    return make_settings(said | place | {"method": method})


def default_settings(given: dict[str, Any]) -> dict[str, Any]:
    """What is published for a dataset and number of shots, by the method if it has its own.

    Who gives the text prompt's start or length gets no other part of it from here.
    """
    from dapt.data import usual_template

    shots, dataset = str(given.get("shots", 16)), str(given.get("dataset", ""))
    asked = (dataset, int(shots) if re.fullmatch(r"[0-9]{1,9}", shots) else 16)
    row = find_method(str(given.get("method", "dapt")))
    defaults = dict(row.defaults(*asked)) if row else {}
    if given.get("epochs") is not None:  # who gives them wants no other number of steps
        defaults.pop("steps", None)
    own = given.get("template")
    usual = usual_settings(*asked, str(own or usual_template(dataset)))
    start = ("text_init", "text_vectors")
    if any(given.get(name) is not None for name in start):
        usual = {name: value for name, value in usual.items() if name not in start}
    elif own:  # its words may be more tokens than there are words
        usual.pop("text_vectors", None)
    usual |= defaults
    if given.get("templates") is not None:  # in place of one
        usual.pop("template", None)
    if is_own(dataset) and given.get("pretrained") is None:
        usual["backbone"] = SUITED  # photographs, which the bundled model does not know
    return usual


def is_own(dataset: str) -> bool:
    """Whether a dataset is the user's own: no benchmark, and not what ships with dapt."""
    from dapt.data import BENCHMARKS

    return dataset not in ("bundled", IMPORTED, *BENCHMARKS)


def with_epochs(settings: Settings, epochs: int) -> Settings:
    """The same, tuned for so many passes over the support set."""
    return settings.model_copy(update={"epochs": epochs, "steps": None})


def absolute_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Paths among the settings made absolute, so that a run is found again from anywhere."""
    from dapt.data import BENCHMARKS

    given, names = dict(given), {"bundled", SUITED, *BENCHMARKS}

    def absolute(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(absolute, value))
        if isinstance(value, str) and value and value not in names and user_path(value).exists():
            return str(user_path(value).resolve())
        return value

    paths = ("dataset", "root", "class_names", "support_set", "backbone", "pretrained")
    return given | {name: absolute(given[name]) for name in paths if name in given}


def backbone_name(settings: Settings) -> str:
    """The backbone as others may be told of it: of a local file, its name alone."""
    names = names_of(settings.backbone)
    each = zip(names, each_of(names, settings.pretrained), strict=True)
    given = ([s for s in one if s is not None] for one in each)
    return " + ".join(
        "/".join(Path(s).name if Path(s).is_absolute() else s for s in one) for one in given
    )


def loss_terms(settings: Settings) -> tuple[LossTerm, ...]:
    """The method's, and those that ``loss_weights`` add."""
    added = [ADDABLE[name] for name in ADDABLE if name in settings.loss_weights]
    return (*get_method(settings.method).losses, *added)


def loss_weights(settings: Settings) -> dict[str, float]:
    """Weight of each loss term."""
    known = weights_of(settings)
    return {term.name: float(known[term.weight]) for term in loss_terms(settings)}


def weights_of(settings: Settings) -> dict[str, Any]:
    """What loss terms may name as their weight: the user's loss_weights, and every setting."""
    return {**settings.loss_weights, **dict(settings)}


def with_weights(settings: Settings, weights: Mapping[str, float]) -> Settings:
    """Settings with other `weights_of` some names, each where it was."""
    own = {name: value for name, value in weights.items() if name in type(settings).model_fields}
    given = settings.loss_weights | {n: value for n, value in weights.items() if n not in own}
    return settings.model_copy(update={**own, "loss_weights": given})


def text_memory(settings: Settings) -> int:
    """Bytes that text activations of a step may take."""
    return int(settings.text_memory * 2**30)


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read settings from YAML (or JSON, which is YAML too); a `UserError` if it holds none."""
    if (values := read_yaml(path, "settings file")) is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UserError(f"settings file {path} must map setting names to values")
    return values


def parse_weight(text: str) -> tuple[str, float]:
    """Split ``name=weight`` of the command line's ``--loss``; a `UserError` says what is wrong."""
    name, _, weight = text.partition("=")
    try:
        return name.strip(), float(weight)
    except ValueError:
        way = "write it as name=weight, such as --loss inter=0.1"
        raise UserError(f"--loss {text}: {way}") from None


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split ``key=value`` of the command line; the value is YAML, or a `UserError` says so."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: write it as name=value, such as --set lr=0.2")
    field = all_fields().get(key := key.strip().replace("-", "_"))
    plain = field is not None and field.annotation in (str, str | None)
    if plain or (key in ("backbone", "pretrained") and not value.startswith("[")):
        return key, value  # text as it stands: "{} texture." is no YAML
    with refusing(f"--set {text}: the value cannot be read", "write it as YAML", ValueError):
        return key, parse_yaml(value)
