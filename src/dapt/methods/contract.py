"""What a method is put together of: tower parts, loss terms, a head and a finish.

A part knows everything about itself: its settings with their bounds and help, how it starts, how it
is read from a file, what a model card says of it. Nothing outside this folder knows a part or a
method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dapt.clip.inside import Pass
from dapt.errors import UserError
from dapt.methods.held_out import HeldOut
from dapt.methods.layouts import Layout

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone

# Of numbers that tensors are multiplied by: far from any use, and well within fp32.
LARGEST = 1e30

Tensors = dict[str, Tensor]


class PartSettings(BaseModel):
    """Settings of a part. Names are shared by all methods: a name means one thing everywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class HasSettings(Protocol):
    """Validated settings of a run, of which a part takes its own."""

    seed: int
    templates: list[str] | None

    def of(self, kind: type[Any]) -> Any:
        """Those of one part, as its own model."""


class TowerPart(nn.Module):
    """Something learned inside a frozen tower; this base class changes nothing there.

    Its parameters are what is learned. They are in fp32 and have the same names in a run's files.

    Attributes:
        towers: the towers it changes: "text", "image" or both. Features of the others are cached.
        reads_images: whether its tokens in the text tower depend on the image. Class features are
            then computed for each image, whose own features are `Pass.image_features`.
        after: words between its tokens and the class name, in the text tower.
        ahead: how many of its tokens stand before the class name, if not all of them; the
            others stand after it, before the full stop.
        reads: how many of the tokens it put among the patches are read at the image tower's end.
        optional: whether its row does without it on a backbone that reads no text.
    """

    optional: ClassVar[bool] = False
    towers: ClassVar[frozenset[str]] = frozenset()
    reads_images: ClassVar[bool] = False
    Settings: ClassVar[type[PartSettings]] = PartSettings
    after: str = ""
    ahead: int | None = None
    reads: int = 0

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> TowerPart:
        """Initial values, drawn by ``settings.seed``; a `UserError` if the backbone takes none."""
        raise NotImplementedError

    @classmethod
    def create_for(cls, backbone: Backbone, settings: HasSettings, classes: int) -> TowerPart:
        """As `create`, for so many classes: of a part that has something for each of them."""
        return cls.create(backbone, settings)

    @classmethod
    def closed(cls, settings: HasSettings) -> str:
        """Why it knows the classes it was tuned on alone, where it does."""
        return ""

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What is learned, in words for a model card."""
        return cls.__name__

    @classmethod
    def settings_of(cls, tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Any]:
        """Settings that follow from the shapes of what somebody else has learned."""
        return {}

    def tokens(self, tower: str, now: Pass) -> Tensor | None:
        """(N, W), or one row each of images (B, N, W) or classes (C, N, W).

        They are put after the start token, or among the patches.
        """
        return None

    def before_layer(self, tower: str, layer: int, x: Tensor, at: slice) -> Tensor:
        """Tokens x (..., T, W) as layer ``layer`` is to see them.

        ``at`` is where this part's own tokens stand, if the class name is not among them. In the
        text tower x is the prefix that all classes share, or classes in full (C, T, W); in the
        image tower images (B, T, W).
        """
        return x

    def weight(self, tower: str, layer: int, names: tuple[str, ...], weight: Tensor) -> Tensor:
        """The weight (out, in) that a linear map of a layer has: ``weight`` if it stays frozen.

        ``names`` are of "q", "k", "v" (one below the other where computed at once), "o", "fc" and
        "proj".
        """
        return weight

    def linear(
        self, tower: str, layer: int, names: tuple[str, ...], x: Tensor, out: Tensor, now: Pass
    ) -> Tensor:
        """What a linear map of a layer gives: ``out`` of ``x`` if nothing is added.

        ``names`` as for `weight`; of several, ``out`` has theirs end to end. ``now.dropout`` drops
        some of ``x`` in training.
        """
        return out

    def norm(
        self, tower: str, layer: int, name: str, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias that a layer norm, "ln_1" or "ln_2", has: those given if frozen."""
        return weight, bias

    def features(self, tower: str, x: Tensor, tokens: Tensor | None) -> Tensor:
        """What becomes of features (..., D): of classes, normalised; of images (B, D), not yet.

        With images come the ``tokens`` read (B, reads, W), after the tower's last layer norm; none
        come with features of the frozen tower that are to be compared with others.
        """
        return x

    def begin(self, prototypes: Tensor) -> None:
        """Tuning begins, of class prototypes (C, D) as the frozen tower gives them."""

    def for_others(self) -> None:
        """Other classes than those tuned on follow."""

    def load(self, tensors: Mapping[str, Tensor], backbone: Backbone, where: str) -> None:
        """Take what `named_parameters` had; a `UserError` of ``where`` if it has other shapes."""
        for name, own in self.named_parameters():
            given, needed = tuple(tensors[name].shape), tuple(own.shape)
            what = f"'{name}' in {where} has shape {given}"
            if len(given) != len(needed) or 0 in given:
                raise UserError(f"{what}; {needed} is needed")
            if given[-1:] != needed[-1:]:
                what = f"the {name.replace('_', ' ')} in {where} is {given[-1]} wide"
                needs = f"'{backbone.name}' needs {needed[-1]}; give the backbone it was tuned on"
                raise UserError(f"{what}, but {needs}")
            if given != needed:
                raise UserError(f"{what}, and the settings say {needed}; one of them was changed")
            own.data.copy_(tensors[name])


@dataclass(frozen=True)
class Step:
    """What a loss term may look at: one step's features, and what they are compared with.

    The last three give (B, D) features of the batch without anything learned; (T, C, D) of the
    classes in T templates (those given, else the task's), not normalised; and (B, C) logits of
    normalised features of images and classes.
    """

    image_features: Tensor  # (B, D), normalised
    text_features: Tensor  # (C, D), normalised; (B, C, D) where a part reads images
    labels: Tensor  # (B,)
    logits: Tensor  # (B, C)
    prototypes: Tensor  # (C, D), means of the support images' features without anything learned
    settings: HasSettings
    frozen_image: Callable[[], Tensor]
    frozen_text: Callable[..., Tensor]
    logits_of: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossTerm:
    """A loss added to cross-entropy: a mean over the images of a batch, or independent of them."""

    name: str  # its column in log.csv
    weight: str  # the setting that weighs it: one of ``Settings``, or of the user's loss_weights
    compute: Callable[[Step], Tensor]
    Settings: type[PartSettings] = PartSettings
    search: tuple[float, ...] = ()  # multiples of its weight that a search tries
    tower: str = ""  # whose features it moves, where it is of one alone


def cross_entropy(step: Step) -> Tensor:
    """What a method's loss terms are added to, if its row says nothing else."""
    return F.cross_entropy(step.logits, step.labels)


@dataclass(frozen=True)
class Examples:
    """Labelled images as features: (n, D) normalised, and (n,) labels.

    Of several labels an image, they are (n, C), 0 or 1.
    """

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Evidence:
    """What a head is fitted on; nothing of it comes from test images."""

    support: Examples  # the images tuned on, as they are seen when classified
    val: Examples | None  # held-out ones, where there are
    # (C, D) normalised class features, (C, 0) where the head reads none; zeros, which have no say,
    # where the backbone reads no text.
    text: Tensor
    scale: float  # exp(logit_scale) of the backbone
    views: Callable[[int], Tensor]  # V -> (V, n, D) of the support's training views, not normalised
    text_lengths: Tensor | float = 1.0  # (C, 1) of class features before they were normalised
    # Labels of all images that the support set was drawn from: how often classes are to be met.
    everywhere: Tensor | None = None

    @property
    def classes(self) -> int:
        """C."""
        return len(self.text)


class Head(nn.Module):
    """How features become logits: by default, cosines times the scale, plus the model's bias.

    A head's buffers and parameters are what is fitted.

    Attributes:
        shapes: buffers that `fit` sets and `load` reads, each with its dimensions: C for the number
            of classes, D for the length of a feature, other letters for sizes that a file may
            choose, such as ``{"keys": "nD", "labels": "n", "alpha": ""}``.
        optional: the same of buffers that `fit` may leave as None, and files then lack.
    """

    shapes: ClassVar[dict[str, str]] = {}
    optional: ClassVar[dict[str, str]] = {}
    Settings: ClassVar[type[PartSettings]] = PartSettings
    fitted: ClassVar[bool] = False  # whether there is anything to fit
    reads_text: ClassVar[bool] = True  # whether it takes class features at all
    without_text: ClassVar[bool] = False  # whether it does as well where those are zeros
    reads_views: ClassVar[bool] = False  # whether it is fitted on training views, not plain ones
    # Whether it chooses by validation images, where there are any. What `fit` says has them then.
    reads_val: ClassVar[bool] = False
    projects: ClassVar[bool] = False  # whether features come to it before the tower's projection
    multilabel: ClassVar[bool] = False  # whether it can be fitted to several labels an image
    carries: ClassVar[bool] = False  # whether `carry` takes it to classes of other names
    closed: ClassVar[str] = ""  # why it knows the classes it was fitted on alone, where it does

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.offset = 0.0  # of every logit: it moves no class above another, but sigmoids read it
        for name in self.shapes:
            self.register_buffer(name, torch.zeros(0))
        for name in self.optional:
            self.register_buffer(name, None)

    @classmethod
    def create(cls, backbone: Backbone) -> Head:
        """Not fitted yet; a `UserError` if the backbone has not what it needs."""
        if not cls.without_text:
            backbone.require_text()
        return cls(backbone.logit_scale)

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What is fitted, in words for a model card; empty where nothing is."""
        return ""

    def fit(self, evidence: Evidence, settings: HasSettings) -> HeldOut | None:
        """Fit to the support images; what it says of them held out, where it knows that."""
        return None

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D) and (C, D), or each image's (B, C, D)."""
        if text.dim() == 3:
            logits = (text @ (self.scale * image)[..., None])[..., 0]
        else:
            logits = self.scale * image @ text.T
        return logits + self.offset if self.offset else logits

    def carry(self, own: Sequence[str], names: Sequence[str], text: Tensor) -> None:
        """Take classes by these names, of text features (C, D), where it has its ``own`` first."""

    def load(self, tensors: Tensors, classes: int, dimension: int, where: str) -> None:
        """Take what `state_dict` gave, for C classes and features of D numbers.

        What is not of this head, or of other shapes, is a `UserError` of ``where``.
        """
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        sizes = {"C": classes, "D": dimension}
        shapes = self.shapes | {n: own for n, own in self.optional.items() if n in found}
        for name, letters in shapes.items():  # other letters are what they are found to be
            sizes = dict(zip(letters, found.get(name, ()), strict=False)) | sizes
        needed = {n: tuple(sizes.get(x, 0) for x in letters) for n, letters in shapes.items()}
        if found != needed or 0 in sizes.values():
            what = f"for {classes} classes and features of {dimension} numbers"
            raise UserError(f"{where} does not hold what this method fits {what}; train again")
        for name in self.optional:
            setattr(self, name, None)
        for name, tensor in tensors.items():
            setattr(self, name, tensor.float())


class Finish:
    """What happens to the learned tensors at the end; by itself, the last step's stay."""

    Settings: ClassVar[type[PartSettings]] = PartSettings

    def __init__(self, settings: HasSettings, epochs: int) -> None:
        self.settings, self.epochs = settings, epochs

    def after_epoch(self, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        """Look at the learned tensors after an epoch, counted from 0."""

    def end(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The result, given the tensors after the last step."""
        return tensors

    def state(self) -> Tensors:
        """What must be kept to resume."""
        return {}

    def load_state(self, state: Tensors) -> None:
        """Continue from what `state` gave."""


@dataclass(frozen=True)
class Method:
    """A row of the table of methods: the parts that make up a method."""

    title: str  # how tables call it
    parts: tuple[type[TowerPart], ...] = ()
    losses: tuple[LossTerm, ...] = ()
    loss: Callable[[Step], Tensor] = cross_entropy  # what these are added to
    head: type[Head] = Head
    finish: type[Finish] = Finish
    # Of a dataset and number of shots: settings of its own, where others' would not do.
    defaults: Callable[[str, int], dict[str, Any]] = lambda dataset, shots: {}
    checkpoint: tuple[Layout, ...] = ()  # how published code saves it, its own way first
    colour: tuple[str, str] | None = None  # for light and for dark paper; others share a few
    marker: str = "o"  # in curves
    shown: bool = False  # whether the demo compares it
    field: bool = False  # whether others published it, and it is checked against their runs
    tried: bool = False  # whether `dapt.engine.effort` tries it, with a head on what it tunes
    # Rows in place of it, where nobody asked for it and a tower does not take its parts.
    instead: tuple[str, ...] = ()

    @property
    def learns(self) -> bool:
        """Whether there is anything for gradient descent to do."""
        return bool(self.parts)

    @property
    def still(self) -> bool:
        """Whether nothing at all depends on the support images."""
        return not (self.learns or self.head.fitted)

    @property
    def kind(self) -> str:
        """What is tuned: "prompts" (tokens), "weights", "heads", or "nothing".

        A row with a head behind learned parts goes by these.
        """
        if not self.learns:
            return "heads" if self.head.fitted else "nothing"
        tokens = any(
            part.tokens is not TowerPart.tokens or part.before_layer is not TowerPart.before_layer
            for part in self.parts
        )
        return "prompts" if tokens else "weights"

    def changes(self, tower: str) -> bool:
        """Whether features of the "text" or "image" tower are other than the backbone's own."""
        return any(tower in part.towers for part in self.parts)

    @property
    def reads_images(self) -> bool:
        """Whether class features are made anew for each image."""
        return any(part.reads_images for part in self.parts)

    @cached_property
    def settings(self) -> frozenset[str]:
        """Names of the settings of its parts."""
        return frozenset(name for kind in self.kinds() for name in kind.model_fields)

    def closed(self, settings: HasSettings) -> str:
        """Why it knows the classes it was tuned on alone; empty where it knows others too."""
        reasons = (self.head.closed, *(part.closed(settings) for part in self.parts))
        return next(filter(None, reasons), "")

    def kinds(self) -> list[type[PartSettings]]:
        """Settings of its parts."""
        parts: list[Any] = [*self.parts, *self.losses, self.head, self.finish]
        return [part.Settings for part in parts]

    def parts_on(self, reads_text: bool) -> tuple[type[TowerPart], ...]:
        """Its parts on a backbone that reads text, or none."""
        return tuple(part for part in self.parts if reads_text or not part.optional)

    def describe(self, settings: HasSettings, reads_text: bool = True) -> str:
        """What is learned, in words for a model card."""
        words = [part.describe(settings) for part in self.parts_on(reads_text)]
        return " and ".join(filter(None, [*words, self.head.describe(settings)]))
