"""What runs on one backbone have in common, made once: decoded images and un-prompted features."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dapt.clip.backbone import Backbone, load_backbone
from dapt.data import Allowance, ImageStore, Item, SupportSet, Task
from dapt.engine.data import Data, skip_unreadable
from dapt.engine.evaluate import unprompted_features
from dapt.errors import UserError
from dapt.methods.losses import class_prototypes
from dapt.progress import Advance, Reporter, nothing
from dapt.settings import Settings


def backbone_of(settings: Settings, *, device: str | None = None) -> Backbone:
    """Load the backbone that settings name, on another device than theirs if one is given."""
    return load_backbone(
        settings.backbone,
        settings.pretrained,
        device=device or settings.device,
        precision=settings.precision,
    )


@dataclass(frozen=True)
class Support:
    """A support set as its backbone sees it without prompts; the same for every method.

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
    """Images and un-prompted features of one backbone, kept between runs.

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

    def features(
        self,
        task: Task,
        items: tuple[Item, ...],
        settings: Settings,
        advance: Advance = nothing,
        unreadable: dict[int, str] | None = None,
    ) -> Tensor:
        """(n, D) normalised features of ``items`` without any prompt, on the CPU.

        Rows of images that ``unreadable`` comes to name (index -> sentence) mean nothing.

        Raises:
            UserError: an image cannot be read, and there is no ``unreadable``.
        """
        images = self._images(task, items, settings)
        size = settings.eval_batch_size  # another one may round otherwise
        if size in images.features:
            advance(len(items))
        else:
            images.features[size] = unprompted_features(
                self.backbone,
                images.store,
                batch_size=size,
                advance=advance,
                unreadable=images.unreadable if unreadable is not None else None,
            )
        if unreadable is not None:
            unreadable.update(images.unreadable)
        elif images.unreadable:
            raise UserError(images.unreadable[min(images.unreadable)])
        return images.features[size]

    def support(self, data: Data, settings: Settings, reporter: Reporter) -> Support:
        """The support images as the backbone sees them, and class prototypes from that.

        Images that cannot be read are left out, unless settings are strict.

        Raises:
            UserError: an image cannot be read, and settings are strict or its class has no other.
        """
        task, support = data.task, data.support
        unreadable: dict[int, str] | None = None if settings.strict else {}
        with reporter.stage("support set", len(support.train)) as advance:
            features = self.features(task, support.train, settings, advance, unreadable)
        skipped: list[dict[str, str]] = []
        if unreadable:
            kept, skipped = skip_unreadable(support.train, unreadable, "support", reporter)
            items = tuple(support.train[i] for i in kept)
            left = {item.label for item in items}
            for index in sorted(unreadable):
                if (item := support.train[index]).label not in left:
                    raise UserError(
                        f"{unreadable[index]}: no support image of class '{item.class_name}' can "
                        "be read"
                    )
            support, features = replace(support, train=items), features[kept]
        labels = torch.tensor([item.label for item in support.train])
        prototypes = class_prototypes(features, labels, len(task.class_names))
        store = self.store(task, support.train, settings)
        return Support(support, skipped, store, labels, features, prototypes)

    def _images(self, task: Task, items: tuple[Item, ...], settings: Settings) -> _Images:
        sources = tuple(task.image_path(item) for item in items)
        self._allowance.limit = int(settings.memory_budget * 2**30)
        key = (sources, settings.crop_min)
        if key in self._known:
            self._known.move_to_end(key)
        else:
            seen = self.backbone.preprocessing
            self._known[key] = _Images(
                ImageStore(
                    sources,
                    size=seen.size,
                    interpolation=seen.interpolation,
                    resize_mode=seen.resize_mode,
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
