"""Models of images alone as transformers' `save_pretrained` leaves them, told in timm's words.

Each becomes the transformer of timm's that the same model is there. A classifier, a pooler and what
only stands in for patches in training are left out: an image's feature is its class token's after
the last layer norm. Nothing in a folder is executed, and transformers is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from dapt.clip import hub_format
from dapt.clip.hub_format import CONFIG, Configuration, in_layers, renamed
from dapt.clip.image_only import LOGIT_SCALE, ImageOnly, ImageTower
from dapt.errors import UserError, shown
from dapt.safe.weights import StateDict

# What a configuration leaves out is as in transformers' own, class by class.
_SIZES: Configuration = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu",
    "image_size": 224, "patch_size": 16, "num_channels": 3,
}  # fmt: skip
_VIT = _SIZES | {"intermediate_size": 3072, "layer_norm_eps": 1e-12, "qkv_bias": True}
_REGISTERS = _SIZES | {
    "mlp_ratio": 4, "layer_norm_eps": 1e-6, "qkv_bias": True, "use_swiglu_ffn": False,
    "num_register_tokens": 4,
}  # fmt: skip
_DINO_2 = _REGISTERS | {"patch_size": 14, "num_register_tokens": 0}
_DINO_3 = _SIZES | {
    "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6,
    "layer_norm_eps": 1e-5, "rope_theta": 100.0, "query_bias": True, "key_bias": False,
    "value_bias": True, "proj_bias": True, "mlp_bias": True, "use_gated_mlp": False,
    "num_register_tokens": 0,
}  # fmt: skip

# Names of theirs, without what stands before all of them, and ours; as in `hub_format`.
_TRUNK = "visual.trunk."
_POSITIONS, _CLASS_TOKEN = f"{_TRUNK}pos_embed", f"{_TRUNK}cls_token"
_TOKENS = {
    "embeddings.cls_token": _CLASS_TOKEN, "embeddings.register_tokens": f"{_TRUNK}reg_token",
    "embeddings.position_embeddings": _POSITIONS,
}  # fmt: skip
_OF_VIT = {
    **_TOKENS, "embeddings.patch_embeddings.projection.": f"{_TRUNK}patch_embed.proj.",
    "layernorm.": f"{_TRUNK}norm.",
}  # fmt: skip
_OF_DINO_3 = {
    **_TOKENS, "embeddings.patch_embeddings.": f"{_TRUNK}patch_embed.proj.",
    "norm.": f"{_TRUNK}norm.",
}  # fmt: skip
_ATTENTION = {"attention.attention.qkv.": "attn.qkv.", "attention.output.dense.": "attn.proj."}
_VIT_LAYER = _ATTENTION | {
    "layernorm_before.": "norm1.", "layernorm_after.": "norm2.",
    "intermediate.dense.": "mlp.fc1.", "output.dense.": "mlp.fc2.",
}  # fmt: skip
_DINO_2_LAYER = _ATTENTION | {
    "norm1.": "norm1.", "norm2.": "norm2.", "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}  # fmt: skip
_DINO_3_LAYER = {
    "norm1.": "norm1.", "norm2.": "norm2.", "layer_scale1.lambda1": "gamma_1",
    "layer_scale2.lambda1": "gamma_2", "mlp.down_proj.": "mlp.fc2.", "attention.o_proj.":
    "attn.proj.", **{f"attention.{part}_proj.": f"attn.{part}_proj." for part in "qkv"},
}  # fmt: skip
_QKV = ("query", "key", "value")
_BEFORE_ALL = re.compile(r"^(vit|dinov2|dinov2_with_registers|dinov3_vit|model)\.")
_LEFT_OUT = ("classifier.", "pooler.", "decoder.", "embeddings.mask_token")


class Trunk(NamedTuple):
    """A trunk of timm's: its class, what that is made with, names of tensors, theirs to ours."""

    kind: Callable[..., nn.Module]
    numbers: Configuration
    names: Mapping[str, str]


class Family(NamedTuple):
    """What models of one ``model_type`` have in common."""

    usual: Configuration
    trunk: Callable[[Configuration], Trunk]
    preprocessing: Configuration  # where the folder does not tell
    squash: bool = True  # whether one number as their size squashes images to a square
    antialias: bool = False  # whether positions are fitted to other sizes of images with it

    @staticmethod
    def make(vision_cfg: Configuration, text_cfg: Configuration) -> ImageOnly:
        """The model, as it is drawn."""
        side, how = vision_cfg["image_size"], {"num_classes": 0, "global_pool": "token"}
        trunk: Trunk = vision_cfg["trunk"]
        return ImageOnly(ImageTower(trunk.kind(img_size=side, **how, **trunk.numbers), side))


class Translated(NamedTuple):
    """A folder of theirs: its trunk, and what is made of its files."""

    family: Family
    config: Configuration
    preprocessing: Configuration

    @property
    def names(self) -> Mapping[str, str]:
        """Theirs to ours."""
        trunk: Trunk = self.config["vision_cfg"]["trunk"]
        return trunk.names

    def weights(self, state: StateDict) -> StateDict:
        """Their state dict under our names; what has none keeps its own."""
        found = {"logit_scale": torch.tensor(LOGIT_SCALE).log()}
        bare = {_BEFORE_ALL.sub("", name): tensor for name, tensor in state.items()}
        for name, tensor in _joined(bare).items():
            if not name.startswith(_LEFT_OUT):
                found[renamed(name.replace("layer.", "layers.", 1), self.names)] = tensor
        if {_POSITIONS, _CLASS_TOKEN} <= found.keys():
            first, patches = found[_POSITIONS].float().tensor_split([1], 1)
            found[_CLASS_TOKEN] = found[_CLASS_TOKEN].float() + first
            found[_POSITIONS] = self._fitted(patches)
        return found

    def _fitted(self, places: Tensor) -> Tensor:
        """Positions of patches (1, N, W), of as many as images have here; as transformers does."""
        told = self.config["vision_cfg"]
        side, there = told["image_size"] // told["patch_size"], isqrt(places.shape[1])
        if side == there:
            return places.contiguous()
        square = places.unflatten(1, (there, there)).permute(0, 3, 1, 2)
        how: Any = {"mode": "bicubic", "antialias": self.family.antialias}
        return F.interpolate(square, (side, side), **how).flatten(2).mT.contiguous()

    def name_of(self, ours: str) -> str:
        """What a tensor of ours is called in their file, short of what stands before all names."""
        theirs = renamed(ours, {ours: theirs for theirs, ours in self.names.items()})
        return theirs.replace("layers.", "layer.", 1).replace(".qkv.", ".query.")

    def tokenizer(self) -> None:
        """None: no text is read."""


def _joined(state: StateDict) -> StateDict:
    """Queries, keys and values as one tensor, where timm has them so."""
    found, inner = StateDict(), ".attention.attention."
    for name, tensor in state.items():
        stem, _, last = name.rpartition(inner)
        parts = [f"{stem}{inner}{part}.{last.rpartition('.')[2]}" for part in _QKV]
        if name not in parts or parts[0] not in state:
            found[name] = tensor
        elif name == parts[0]:
            if absent := [part for part in parts if part not in state]:
                raise ValueError(f"'{absent[0]}' is not among them")
            joined = torch.cat([state[part] for part in parts])
            found[name.replace(f"{inner}query.", f"{inner}qkv.")] = joined
    return found


def is_of_images(folder: Path) -> bool:
    """Whether a folder's model is one of these, as far as its configuration tells."""
    try:
        return hub_format.read_object(folder / CONFIG).get("model_type") in FAMILIES
    except (OSError, TypeError, UserError, ValueError):
        return False


def translate(folder: Path) -> Translated | hub_format.Translated:
    """What a folder's files say of a model of images alone, else `hub_format.translate`.

    Errors are as there.
    """
    config = hub_format.read_object(folder / CONFIG)
    if (family := FAMILIES.get(str(config.get("model_type")))) is None:
        return hub_format.translate(folder, FAMILIES)
    own = {name: config[name] for name in family.usual if name in config}
    told = hub_format.whole_part(own, family.usual)
    side, seen = _seen(folder, family, told["image_size"])
    if side % told["patch_size"]:
        raise ValueError(f"images of {side} px are no whole patches of {told['patch_size']} px")
    sizes = {"layers": told["num_hidden_layers"], "patch_size": told["patch_size"]}
    vision = {**sizes, "image_size": side, "trunk": family.trunk(told)}
    made = {"vision_cfg": vision, "text_cfg": Configuration()}
    return Translated(family, made, family.preprocessing | seen)


def _seen(folder: Path, family: Family, usual: int) -> tuple[int, Configuration]:
    """Side of images in pixels, by what is cropped to or else resized to, and how they are seen.

    They are resized to that side: what a larger one and a crop would cut off is kept.
    """
    file, said = hub_format.processor(folder)
    size = said.get("size")
    crop = said.get("crop_size") if said.get("do_center_crop", True) else None
    if isinstance(size, int) and family.squash:
        size = {"height": size, "width": size}
    found = next(filter(None, (crop, size, usual)))
    side = next(filter(None, found.values()), 0) if isinstance(found, dict) else found
    if not isinstance(side, int) or not 0 < side <= hub_format.LARGEST_IMAGE:
        raise ValueError(f"its images are not of 1 to {hub_format.LARGEST_IMAGE} px")
    if crop and size:
        size = {name: side for name, n in size.items() if n} if isinstance(size, dict) else side
    return side, hub_format.seen_by({**said, "size": size}, side, file)


# --------------------------------------------------------------------------------------- trunks


def _numbers(told: Configuration) -> Configuration:
    """What both kinds of timm's trunks have."""
    width, heads = told["hidden_size"], told["num_attention_heads"]
    if width % heads or told["num_channels"] != 3:
        raise ValueError(f"its width {width} is not {heads} heads', or its images have no colours")
    return {
        "patch_size": told["patch_size"], "embed_dim": width, "num_heads": heads,
        "depth": told["num_hidden_layers"],
        "norm_layer": partial(timm.layers.LayerNorm, eps=told["layer_norm_eps"]),
    }  # fmt: skip


def _ratio(hidden: int, width: int) -> float:
    # The half keeps the product from being rounded down past the whole number it is.
    return (hidden + 0.5) / width


def _vit(told: Configuration) -> Trunk:
    act = hub_format.TIMM_ACTIVATIONS[hub_format.activation(told)]
    own = {
        "qkv_bias": told["qkv_bias"], "no_embed_class": True, "act_layer": act,
        "mlp_ratio": _ratio(told["intermediate_size"], told["hidden_size"]),
    }  # fmt: skip
    names = _OF_VIT | in_layers("encoder.layers.", f"{_TRUNK}blocks.", _VIT_LAYER)
    return Trunk(timm.models.VisionTransformer, _numbers(told) | own, names)


def _dino_2(told: Configuration) -> Trunk:
    gated, hidden = told["use_swiglu_ffn"], told["hidden_size"] * told["mlp_ratio"]
    plain = _vit(told | {"intermediate_size": hidden})
    own = {"init_values": 1.0, "reg_tokens": told["num_register_tokens"]}
    inner = {"mlp.": "mlp."}
    if gated:  # by two thirds of the width, in eights
        each = (hidden * 2 // 3 + 7) // 8 * 8
        own |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": "silu",
                "mlp_ratio": _ratio(2 * each, told["hidden_size"])}  # fmt: skip
        inner = {"mlp.weights_in.": "mlp.fc1.", "mlp.weights_out.": "mlp.fc2."}
    layer = _DINO_2_LAYER | inner
    names = _OF_VIT | in_layers("encoder.layers.", f"{_TRUNK}blocks.", layer)
    return Trunk(plain.kind, plain.numbers | own, names)


def _dino_3(told: Configuration) -> Trunk:
    gated = told["use_gated_mlp"]
    needed = {"key_bias": False, "value_bias": told["query_bias"], "proj_bias": True,
              "mlp_bias": True, "hidden_act": "silu" if gated else "gelu"}  # fmt: skip
    for name, only in needed.items():
        if told[name] != only:
            what = f"{CONFIG} says {name} {shown(told[name])}"
            raise UserError(f"{what}; of such a DINOv3, only those with {shown(only)} can be used")
    own = {
        "mlp_ratio": _ratio(told["intermediate_size"], told["hidden_size"]),
        "swiglu_mlp": gated, "swiglu_align_to": int(gated), "qkv_bias": told["query_bias"],
        "qkv_fused": False, "init_values": 1.0, "num_reg_tokens": told["num_register_tokens"],
        "use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3",
        "rope_temperature": told["rope_theta"], "rope_rotate_half": True, "use_fc_norm": False,
    }  # fmt: skip
    inner = {"mlp.gate_proj.": "mlp.fc1_g.", "mlp.up_proj.": "mlp.fc1_x."}
    layer = _DINO_3_LAYER | (inner if gated else {"mlp.up_proj.": "mlp.fc1."})
    names = _OF_DINO_3 | in_layers("layers.", f"{_TRUNK}blocks.", layer)
    return Trunk(timm.models.Eva, _numbers(told) | own, names)


_HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
_IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
_CROPPED = _IMAGENET | {"resize_mode": "shortest", "interpolation": "bicubic"}
_SQUASHED = _IMAGENET | {"resize_mode": "squash", "interpolation": "bilinear"}
FAMILIES = {
    "vit": Family(_VIT, _vit, _HALF | {"interpolation": "bilinear"}),
    "dinov2": Family(_DINO_2, _dino_2, _CROPPED, squash=False),
    "dinov2_with_registers": Family(_REGISTERS, _dino_2, _CROPPED, squash=False, antialias=True),
    "dinov3_vit": Family(_DINO_3, _dino_3, _SQUASHED),
}  # fmt: skip
