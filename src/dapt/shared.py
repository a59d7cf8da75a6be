"""What runs on one backbone have in common, made once: decoded images and un-prompted features."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dapt.backbone import Backbone, load_backbone
from dapt.data import ImageStore, Item, SupportSet, Task
from dapt.evaluate import unprompted_features
from dapt.losses import class_prototypes
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
    """A support set as its backbone sees it without prompts; the same for every method."""

    store: ImageStore
    labels: Tensor  # (n,)
    features: Tensor  # (n, D), normalised, on the CPU
    prototypes: Tensor  # (C, D)


@dataclass
class _Images:
    store: ImageStore
    features: dict[int, Tensor] = field(default_factory=dict)  # by batch size


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

    def store(self, task: Task, items: tuple[Item, ...], settings: Settings) -> ImageStore:
        """The images of ``items``, decoded as the backbone wants them."""
        return self._images(task, items, settings).store

    def features(
        self,
        task: Task,
        items: tuple[Item, ...],
        settings: Settings,
        advance: Advance = nothing,
    ) -> Tensor:
        """(n, D) normalised features of ``items`` without any prompt, on the CPU.

        Raises:
            UserError: an image cannot be read.
        """
        images = self._images(task, items, settings)
        size = settings.eval_batch_size  # another one may round otherwise
        if size in images.features:
            advance(len(items))
        else:
            images.features[size] = unprompted_features(
                self.backbone, images.store, batch_size=size, advance=advance
            )
        return images.features[size]

    def support(
        self, task: Task, support: SupportSet, settings: Settings, reporter: Reporter
    ) -> Support:
        """The support images as the backbone sees them, and class prototypes from that.

        Raises:
            UserError: an image cannot be read.
        """
        labels = torch.tensor([item.label for item in support.train])
        with reporter.stage("support set", len(labels)) as advance:
            features = self.features(task, support.train, settings, advance)
        prototypes = class_prototypes(features, labels, len(task.class_names))
        return Support(self.store(task, support.train, settings), labels, features, prototypes)

    def _images(self, task: Task, items: tuple[Item, ...], settings: Settings) -> _Images:
        paths = tuple(task.image_path(item) for item in items)
        key = (paths, settings.crop_min, settings.memory_budget)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        budget = int(settings.memory_budget * 2**30)
        while sum(known.store.kept_bytes for known in self._known.values()) > budget:
            self._known.popitem(last=False)
        seen = self.backbone.preprocessing
        self._known[key] = _Images(
            ImageStore(
                paths,
                size=seen.size,
                interpolation=seen.interpolation,
                resize_mode=seen.resize_mode,
                crop_min=settings.crop_min,
                memory_budget=budget,
            )
        )
        return self._known[key]
