"""What a method is put together of: tower parts, loss terms, a head and a finish.

A part knows everything about itself: its settings with their bounds and help, how it starts, how it
is read from a file, what a model card says of it. Nothing outside this folder knows a part or a
method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dapt.clip.backbone import Backbone
from dapt.clip.inside import Pass
from dapt.errors import UserError

# Of numbers that tensors are multiplied by: far from any use, and well within fp32.
LARGEST = 1e30

Tensors = dict[str, Tensor]


class PartSettings(BaseModel):
    """Settings of a part. Names are shared by all methods: a name means one thing everywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class HasSettings(Protocol):
    """Validated settings of a run, of which a part takes its own."""

    seed: int

    def of(self, kind: type[Any]) -> Any:
        """Those of one part, as its own model."""


# ------------------------------------------------------------------------------ tower parts


class TowerPart(nn.Module):
    """Something learned inside a frozen tower; by itself, it changes nothing there.

    Its parameters are what is learned: they are kept in fp32, and their names are those of the
    tensors in a run's files.

    Attributes:
        towers: which towers it changes: "text", "image" or both. Features of the others are cached.
        Settings: its settings.
        after: words that stand between its tokens and the class name, in the text tower.
    """

    towers: ClassVar[frozenset[str]] = frozenset()
    Settings: ClassVar[type[PartSettings]] = PartSettings
    after: str = ""

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> TowerPart:
        """A new one with its initial values, drawn by ``settings.seed``.

        Raises:
            UserError: the backbone takes no such part.
        """
        raise NotImplementedError

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What is learned, in words for a model card."""
        return cls.__name__

    @classmethod
    def settings_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Settings that follow from the shapes of what somebody else has learned."""
        return {}

    def tokens(self, tower: str, now: Pass) -> Tensor | None:
        """(N, W), or (B, N, W) of images: put after the start token, or among the patches."""
        return None

    def before_layer(self, tower: str, layer: int, x: Tensor, at: slice) -> Tensor:
        """Tokens x (..., T, W) as layer ``layer`` is to see them.

        ``at`` is where this part's own tokens stand. In the text tower x is the prefix that all
        classes share, or classes in full (C, T, W); in the image tower images (B, T, W).
        """
        return x

    def linear(
        self, tower: str, layer: int, names: tuple[str, ...], x: Tensor, out: Tensor
    ) -> Tensor:
        """What a linear map of a layer gives: ``out`` of ``x`` if it stays frozen.

        ``names`` are of "q", "k", "v" (end to end where several are computed at once), "o", "fc"
        and "proj".
        """
        return out

    def load(self, tensors: Mapping[str, Tensor], backbone: Backbone, where: str) -> None:
        """Take values that `named_parameters` had, from the file ``where``.

        Raises:
            UserError: one is of another shape than it should be.
        """
        with torch.no_grad():
            for name, own in self.named_parameters():
                check_vectors(backbone, name, tensors[name], own, where)
                own.copy_(tensors[name])


def check_vectors(backbone: Backbone, name: str, given: Tensor, own: Tensor, where: str) -> None:
    """Raise `UserError` unless a tensor from a file has the shape of the one it is for."""
    if given.ndim != own.ndim or not given.numel():
        shape = tuple(given.shape)
        raise UserError(f"'{name}' in {where} has shape {shape}; {tuple(own.shape)} is needed")
    if given.shape[-1] != own.shape[-1]:
        raise UserError(
            f"the {name.replace('_', ' ')} in {where} is {given.shape[-1]} wide, but "
            f"'{backbone.name}' needs {own.shape[-1]}; give the --backbone it was tuned on"
        )
    if given.shape != own.shape:
        raise UserError(
            f"'{name}' in {where} has shape {tuple(given.shape)}, and the settings say "
            f"{tuple(own.shape)}; one of them was changed"
        )


# ------------------------------------------------------------------------------- loss terms


@dataclass(frozen=True)
class Step:
    """What a loss term may look at: one step's features, and what they are compared with.

    Attributes:
        image_features: (B, D), normalised; ``text_features``: (C, D), normalised.
        labels: (B,); ``logits``: (B, C).
        prototypes: (C, D), means of the support images' features without anything learned.
        settings: of the run.
        frozen_image: gives (B, D), the batch's features without anything learned.
        frozen_text: gives (T, C, D), the classes' in T templates, not normalised; without any, in
            that of the task.
    """

    image_features: Tensor
    text_features: Tensor
    labels: Tensor
    logits: Tensor
    prototypes: Tensor
    settings: HasSettings
    frozen_image: Callable[[], Tensor]
    frozen_text: Callable[..., Tensor]


@dataclass(frozen=True)
class LossTerm:
    """A term that is added to cross-entropy.

    Attributes:
        name: its column in log.csv.
        weight: the setting that weighs it; one of ``Settings``, or of the user's loss_weights.
        compute: a mean over the batch's images, or the same for every part of a batch.
        Settings: its settings.
        search: multiples of its weight that a search tries.
    """

    name: str
    weight: str
    compute: Callable[[Step], Tensor]
    Settings: type[PartSettings] = PartSettings
    search: tuple[float, ...] = ()


# ------------------------------------------------------------------------------------ heads


@dataclass(frozen=True)
class Examples:
    """Labelled images as features: (n, D) normalised, and (n,) labels."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Evidence:
    """What a head is fitted on; nothing of it comes from test images.

    Attributes:
        support: the images tuned on, in the plain view; ``val``: held-out ones, where there are.
        text: (C, D) normalised class features, (C, 0) where the head reads none.
        scale: exp(logit_scale) of the backbone.
        views: V -> (V, n, D) features of training views of the support images, not normalised.
    """

    support: Examples
    val: Examples | None
    text: Tensor
    scale: float
    views: Callable[[int], Tensor]

    @property
    def classes(self) -> int:
        """C."""
        return len(self.text)


class Head(nn.Module):
    """How image features and class features become logits; by itself, cosines times the scale.

    Its buffers and parameters are what is fitted.

    Attributes:
        Settings: its settings.
        fitted: whether there is anything to fit.
        reads_text: whether it needs class features at all.
        closed: why it knows the classes it was fitted on alone, where it does.
    """

    Settings: ClassVar[type[PartSettings]] = PartSettings
    fitted: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True
    closed: ClassVar[str] = ""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What is fitted, in words for a model card; empty where nothing is."""
        return ""

    def fit(self, evidence: Evidence, settings: HasSettings) -> None:
        """Fit to the support images."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D) and (C, D)."""
        return self.scale * image @ text.T

    def load(self, tensors: Tensors, classes: int, dimension: int, where: str) -> None:
        """Take what `state_dict` gave, for C classes and features of D numbers.

        Raises:
            UserError: it is not of this head, or of other shapes.
        """
        if tensors:
            raise UserError(f"{where} holds '{min(tensors)}', which this method does not fit")


# ----------------------------------------------------------------------------------- finish


class Finish:
    """What happens to the learned tensors at the end; by itself, the last step's stay.

    Attributes:
        Settings: its settings.
    """

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


# ---------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Published:
    """How the field's published code calls a tensor in its checkpoints.

    Attributes:
        key: its name there; ``tensor``: in a run's files.
        leading: whether it has a first dimension of one there.
    """

    key: str
    tensor: str
    leading: bool = False


@dataclass(frozen=True)
class Method:
    """A row of the table: the parts that a method is put together of.

    Attributes:
        title: how tables call it.
        parts: what is learned in the towers.
        losses: terms added to cross-entropy.
        head: how features become logits.
        finish: what happens to the learned tensors at the end.
        defaults: (dataset, shots) -> settings that are this method's own, where others' would not
            do; published ones for a benchmark.
        checkpoint: how published code saves what is learned, where it does.
        colour: for light and for dark paper; ``marker``: in curves. Others share a few.
    """

    title: str
    parts: tuple[type[TowerPart], ...] = ()
    losses: tuple[LossTerm, ...] = ()
    head: type[Head] = Head
    finish: type[Finish] = Finish
    defaults: Callable[[str, int], dict[str, Any]] = lambda dataset, shots: {}
    checkpoint: tuple[Published, ...] = ()
    colour: tuple[str, str] | None = None
    marker: str = "o"

    @property
    def learns(self) -> bool:
        """Whether there is anything for gradient descent to do."""
        return bool(self.parts)

    @property
    def still(self) -> bool:
        """Whether nothing at all depends on the support images."""
        return not (self.learns or self.head.fitted)

    def changes(self, tower: str) -> bool:
        """Whether features of the "text" or "image" tower are other than the backbone's own."""
        return any(tower in part.towers for part in self.parts)

    @cached_property
    def settings(self) -> frozenset[str]:
        """Names of the settings of its parts."""
        return frozenset(name for kind in self.kinds() for name in kind.model_fields)

    def kinds(self) -> Iterable[type[PartSettings]]:
        """Settings of its parts."""
        of_parts = [part.Settings for part in self.parts]
        return [*of_parts, *(t.Settings for t in self.losses), self.head.Settings,
                self.finish.Settings]  # fmt: skip

    def describe(self, settings: HasSettings) -> str:
        """What is learned, in words for a model card."""
        words = [part.describe(settings) for part in self.parts]
        return " and ".join(filter(None, [*words, self.head.describe(settings)]))
