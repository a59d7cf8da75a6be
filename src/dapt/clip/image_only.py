"""Models of images alone: timm's, as a frozen backbone without a text tower.

Their weights are safetensors, read by `dapt.safe`; timm itself would take pickles too, and leave
what a file lacks as it was drawn.
"""

from __future__ import annotations

import sys
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from dapt.errors import UserError, nearest
from dapt.safe.weights import StateDict

PREFIX = "timm:"
# What cosines of image features with class vectors, which start at their means, are multiplied by.
# Images are more alike than images and texts: at CLIP's 100, VPT on the bundled image tower is far
# too sure and less accurate; of 10, 20 and 30 this was the best calibrated on val images.
LOGIT_SCALE = 20.0


class ImageTower(nn.Module):
    """A trunk of timm's without its classifier: (B, 3, S, S) images -> (B, D) features."""

    def __init__(self, trunk: nn.Module, size: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Identity()
        self.image_size = (size, size)
        own: Any = trunk
        self.output_dim = int(getattr(own, "head_hidden_size", None) or own.num_features)

    def forward(self, images: Tensor) -> Tensor:
        """What its own pooling gives."""
        return self.trunk(images)


class ImageOnly(nn.Module):
    """What `Backbone` takes for a model: an image tower, and a scale of logits."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("logit_scale", torch.tensor(LOGIT_SCALE).log())


def configuration(name: str) -> Any:
    """timm's of a model, ``architecture`` or ``architecture.tag``; a `UserError` if unknown."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        what = f"timm has no model '{architecture}'{nearest(architecture, timm.list_models())}"
        raise UserError(f"{what}; timm.list_models() names all")
    tags = [n.partition(".")[2] for n in timm.models.get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        known = ", ".join(filter(None, tags)) or "none"
        raise UserError(f"timm knows no weights '{tag}' of '{architecture}'; it has {known}")
    return timm.get_pretrained_cfg(name)


def new_trunk(name: str) -> nn.Module:
    """A model of timm's as it is drawn, which gives features in place of classes."""
    return timm.create_model(name.partition(".")[0], pretrained_cfg=configuration(name).to_dict(),
                             num_classes=0)  # fmt: skip


def adapted(state: StateDict, trunk: nn.Module, name: str) -> StateDict:
    """A file's tensors by timm's names, by its own rules for them, without a classifier's."""
    entry = sys.modules[timm.model_entrypoint(name.partition(".")[0]).__module__]
    change = getattr(entry, "checkpoint_filter_fn", None)
    found = StateDict(change(dict(state), trunk) if change else state)
    heads = configuration(name).classifier or ()
    stems = (heads,) if isinstance(heads, str) else heads
    own = trunk.state_dict()
    odd = [n for n in found if n not in own and n.rpartition(".")[0] in stems]
    return StateDict({n: tensor for n, tensor in found.items() if n not in odd})


def preprocessing_of(trunk: nn.Module) -> dict[str, Any]:
    """How timm says that a model sees images, as open_clip's preprocessing; all of the crop."""
    seen = resolve_data_config({}, model=trunk)
    modes = {"squash": "squash", "border": "longest"}
    kind = seen["interpolation"]
    return {
        "size": seen["input_size"][-1], "mean": seen["mean"], "std": seen["std"],
        "interpolation": kind if kind in ("bicubic", "bilinear") else "bicubic",
        "resize_mode": modes.get(seen["crop_mode"], "shortest"),
    }  # fmt: skip
