"""Features of images, and what runs on one backbone have in common, made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.clip.image import image_features
from dapt.clip.sources import load_backbone
from dapt.data import Allowance, ImageStore, Item, SupportSet, Task
from dapt.engine.classifier import Classifier
from dapt.engine.data import Data
from dapt.errors import UserError
from dapt.methods.losses import class_prototypes
from dapt.progress import Advance, Reporter, nothing
from dapt.settings import Settings

# Images named in warnings; the record of a run has them all.
_NAMED = 5


def backbone_of(settings: Settings, *, device: str | None = None) -> Backbone:
    """Load the backbone that settings name, on another device than theirs if one is given."""
    return load_backbone(
        settings.backbone,
        settings.pretrained,
        device=device or settings.device,
        precision=settings.precision,
    )


def chunks(count: int, size: int) -> list[list[int]]:
    """Indices 0 .. count-1 in order, ``size`` at a time."""
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def encode_store(
    encode: Callable[[Tensor], Tensor],
    store: ImageStore,
    *,
    batch_size: int = 100,
    advance: Advance = nothing,
    unreadable: dict[int, str] | None = None,
) -> Tensor:
    """Run ``encode`` on the test views of every image in ``store``: (n, D) in fp32 on the CPU.

    Decoding runs ahead of the model in other threads. Rows of images that ``unreadable`` comes to
    name (see `ImageStore.batches`) mean nothing.

    Raises:
        UserError: an image cannot be read, and there is no ``unreadable``.
    """
    features = []
    with torch.inference_mode():
        for views in store.batches(chunks(len(store), batch_size), unreadable=unreadable):
            features.append(encode(views))
            advance(len(views))
    # Copied from the device once, not batch by batch, each of which would wait for it. A clone is
    # an ordinary tensor, which later gradient computations may use.
    found = torch.cat(features).cpu().clone()
    require_finite(found, "image features")
    return found


def require_finite(values: Tensor, what: str) -> None:
    """Raise `UserError` where a model gives what is no number: nothing can be told from it."""
    if not bool(values.isfinite().all()):
        raise UserError(
            f"the model's {what} are not finite numbers; its weights are damaged, its --precision "
            "is too low for them, or tuning diverged (train again with a smaller --lr)"
        )


@dataclass(frozen=True)
class Encoded:
    """Images as (n, D) features, without those that could not be read; ``skipped`` records them."""

    items: tuple[Item, ...]
    features: Tensor
    skipped: list[dict[str, str]]

    @property
    def labels(self) -> Tensor:
        """(n,)."""
        return torch.tensor([item.label for item in self.items])


@dataclass(frozen=True)
class Support:
    """A support set as its backbone sees it with nothing learned; the same for every method.

    ``drawn`` is the set without the images that cannot be read, which ``skipped`` records.
    """

    drawn: SupportSet
    skipped: list[dict[str, str]]
    store: ImageStore
    labels: Tensor  # (n,)
    features: Tensor  # (n, D), normalised, on the CPU
    prototypes: Tensor  # (C, D)


@dataclass
class _Images:
    store: ImageStore
    features: dict[int, Tensor] = field(default_factory=dict)  # by batch size
    unreadable: dict[int, str] = field(default_factory=dict)


class Shared:
    """Decoded images and frozen features of one backbone, kept between runs.

    Zero-shot CLIP, the probe and CoOp evaluate on the same image features, and every method starts
    from the same prototypes; a grid of runs hands one of these to all of them. What is kept never
    changes a result, to the bit.

    Args:
        backbone: whose features they are.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._known: OrderedDict[tuple, _Images] = OrderedDict()
        self._allowance = Allowance(0)

    def store(self, task: Task, items: tuple[Item, ...], settings: Settings) -> ImageStore:
        """The images of ``items``, decoded as the backbone wants them."""
        return self._images(task, items, settings).store

    def encode(
        self,
        task: Task,
        items: tuple[Item, ...],
        settings: Settings,
        classifier: Classifier | None = None,
        *,
        what: str = "test",
        reporter: Reporter | None = None,
        advance: Advance = nothing,
    ) -> Encoded:
        """Normalised features of ``items`` as a classifier sees them, or the bare backbone.

        Images that cannot be read are left out, and told, unless settings are strict.

        Args:
            task, items: the images; ``what`` they are, in warnings.
            settings: of the run.
            classifier: whose features they are to be, if it changes images.
            reporter: is told what is left out.
            advance: is told the progress.

        Raises:
            UserError: an image cannot be read, and settings are strict or none can.
        """
        images, size = self._images(task, items, settings), settings.eval_batch_size
        unreadable: dict[int, str] | None = None if settings.strict else images.unreadable
        if classifier is not None and classifier.changes_images:
            features = encode_store(
                classifier.image_features, images.store, batch_size=size, advance=advance,
                unreadable=unreadable,
            )  # fmt: skip
        elif size in images.features:  # with another batch size they may round otherwise
            features = images.features[size]
            advance(len(items))
        else:
            features = images.features[size] = encode_store(
                lambda views: image_features(self.backbone, views), images.store, batch_size=size,
                advance=advance, unreadable=unreadable,
            )  # fmt: skip
        if settings.strict and images.unreadable:
            raise UserError(images.unreadable[min(images.unreadable)])
        if not images.unreadable:
            return Encoded(items, features, [])
        kept, skipped = _without(items, images.unreadable, what, reporter or Reporter())
        return Encoded(tuple(items[i] for i in kept), features[kept], skipped)

    def support(self, data: Data, settings: Settings, reporter: Reporter) -> Support:
        """The support images as the backbone sees them, and class prototypes from that.

        Raises:
            UserError: an image cannot be read, and settings are strict or its class has no other.
        """
        task, support = data.task, data.support
        with reporter.stage("support set", len(support.train)) as advance:
            found = self.encode(
                task, support.train, settings, what="support", reporter=reporter, advance=advance
            )
        left, reasons = {item.label for item in found.items}, [s["reason"] for s in found.skipped]
        gone = [item for item in support.train if item not in set(found.items)]
        for item, reason in zip(gone, reasons, strict=True):
            if item.label not in left:
                raise UserError(
                    f"{reason}: no support image of class '{item.class_name}' can be read"
                )
        return Support(
            replace(support, train=found.items),
            found.skipped,
            self.store(task, found.items, settings),
            found.labels,
            found.features,
            class_prototypes(found.features, found.labels, len(task.class_names)),
        )

    def _images(self, task: Task, items: tuple[Item, ...], settings: Settings) -> _Images:
        sources = tuple(task.source(item) for item in items)
        self._allowance.limit = int(settings.memory_budget * 2**30)
        # Of a picture in memory, that very object is meant, which may not be hashable.
        key = (tuple(s if isinstance(s, Path) else id(s) for s in sources), settings.crop_min)
        if key in self._known:
            self._known.move_to_end(key)
        else:
            self._known[key] = _Images(
                ImageStore(
                    sources,
                    **self.backbone.preprocessing.of_views(),
                    crop_min=settings.crop_min,
                    allowance=self._allowance,
                )
            )
        # Those wanted now get at least half; the oldest go first. Features are small and stay.
        *others, (_, wanted) = self._known.items()
        for _, known in others:
            if self._allowance.used > self._allowance.limit / 2:
                known.store.forget()
        return wanted


def _without(
    items: tuple[Item, ...], unreadable: dict[int, str], what: str, reporter: Reporter
) -> tuple[list[int], list[dict[str, str]]]:
    """Indices of the images that could be read, and a record of the others, which are told.

    Raises:
        UserError: none could.
    """
    skipped = sorted(unreadable)
    if len(skipped) == len(items):
        more = f" (nor any other of its {len(items):,} {what} images)" if len(items) > 1 else ""
        raise UserError(f"{unreadable[0]}{more}")
    for index in skipped[:_NAMED]:
        reporter.warn(f"{unreadable[index]}; skipped")
    reporter.warn(
        f"{len(skipped):,} of {len(items):,} {what} images cannot be read and are skipped; "
        "the metrics name them, and --strict makes them an error"
    )
    record = [{"image": items[i].path, "reason": unreadable[i]} for i in skipped]
    return [i for i in range(len(items)) if i not in unreadable], record
