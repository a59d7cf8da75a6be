"""Models as transformers' `save_pretrained` leaves them, told in open_clip's words.

A folder of theirs has `config.json`, weights, `preprocessor_config.json` and a vocabulary. Each is
translated, so that the same towers hold the weights as those of every other source. transformers
itself is asked for tokenizers that are not CLIP's and for BERT; nothing in a folder is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn

from dapt.errors import UserError, lacking, refusing, shown
from dapt.safe.files import parse_json, read_text
from dapt.safe.weights import StateDict

CONFIG = "config.json"
_PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
_VOCABULARIES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
                 "vocab.txt")  # fmt: skip
# transformers' numbers of Pillow's filters, those that views of images can be made with.
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic")
LARGEST_IMAGE = 2048  # px, far beyond any CLIP
_ORDINARY = 49408  # tokens of the vocabulary that CLIPs share, which open_clip brings

Configuration = dict[str, Any]

# What a configuration of theirs leaves out is as in transformers' own, class by class.
_VIT: Configuration = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "num_channels": 3,
}  # fmt: skip
_CLIP_TEXT = _VIT | {
    "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
    "vocab_size": _ORDINARY, "max_position_embeddings": 77, "eos_token_id": _ORDINARY - 1,
}  # fmt: skip
_SIGLIP_VIT = _VIT | {
    "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "num_patches": 256, "vision_use_head": True,
}  # fmt: skip
_SIGLIP_TEXT = _SIGLIP_VIT | {
    "vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None,
}  # fmt: skip
_BERT: Configuration = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "vocab_size": 30522,
    "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 0,
}  # fmt: skip

# Names of theirs and ours: of a module, with a dot or underscore at the end, or of a tensor. # is a
# layer's number, and "qkv" stands for three tensors that are one here.
_OPEN_CLIP_LAYER = {
    "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.", "self_attn.qkv.": "attn.in_proj_",
    "self_attn.out_proj.": "attn.out_proj.",
}  # fmt: skip
_TIMM_LAYER = {
    "layer_norm1.": "norm1.", "layer_norm2.": "norm2.", "mlp.": "mlp.",
    "self_attn.qkv.": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
}  # fmt: skip


def in_layers(theirs: str, ours: str, table: Mapping[str, str]) -> dict[str, str]:
    """A table of names inside a layer, of all layers."""
    return {f"{theirs}#.{k}": f"{ours}#.{v}" for k, v in table.items()}


_VIT_NAMES = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
    **in_layers("vision_model.encoder.layers.", "visual.transformer.resblocks.", _OPEN_CLIP_LAYER),
}
_TEXT_NAMES = {
    "text_model.embeddings.token_embedding.": "text.token_embedding.",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm.": "text.ln_final.",
    **in_layers("text_model.encoder.layers.", "text.transformer.resblocks.", _OPEN_CLIP_LAYER),
}
_CLIP_NAMES = {**_VIT_NAMES, **_TEXT_NAMES, "text_projection.weight": "text.text_projection"}
_CHINESE_NAMES = {
    **_VIT_NAMES, "text_model.": "text.transformer.", "text_projection.weight": "text.proj.weight",
}  # fmt: skip
_SIGLIP_NAMES = {
    **_TEXT_NAMES,
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
    "text_model.head.": "text.text_projection.",
    "vision_model.embeddings.patch_embedding.": "visual.trunk.patch_embed.proj.",
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "vision_model.post_layernorm.": "visual.trunk.norm.",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "vision_model.head.attention.q.": "visual.trunk.attn_pool.q.",
    "vision_model.head.attention.kv.": "visual.trunk.attn_pool.kv.",
    "vision_model.head.attention.out_proj.": "visual.trunk.attn_pool.proj.",
    "vision_model.head.layernorm.": "visual.trunk.attn_pool.norm.",
    "vision_model.head.mlp.": "visual.trunk.attn_pool.mlp.",
    **in_layers("vision_model.encoder.layers.", "visual.trunk.blocks.", _TIMM_LAYER),
}


def _conv(weight: Tensor) -> Tensor:
    """(W, 3, P, P) of patches' (W, P P 3), which is how SigLIP 2 for any aspect has it."""
    if weight.ndim != 2:
        return weight
    side = isqrt(weight.shape[1] // 3)
    return weight.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).contiguous()


# Tensors that are laid out otherwise here, by our names.
_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "visual.proj": lambda t: t.mT.contiguous(),
    "text.text_projection": lambda t: t.mT.contiguous(),
    "visual.trunk.pos_embed": lambda t: t[None],
    "visual.trunk.patch_embed.proj.weight": _conv,
    "logit_scale": lambda t: t.reshape(()),
    "logit_bias": lambda t: t.reshape(()),
}


class Family(NamedTuple):
    """What models of one ``model_type`` have in common."""

    vision: Configuration  # defaults of its image tower, ``text`` of the other
    text: Configuration
    names: Mapping[str, str]
    configure: Callable[[Configuration, Configuration, Configuration], Configuration]
    make: Callable[..., nn.Module]
    preprocessing: Configuration  # where the folder does not tell
    clean: str | None = None  # open_clip's cleaning of texts; of none, CLIP's own tokenizer


class Translated(NamedTuple):
    """A folder of theirs: what open_clip would call it, and what is made of its files."""

    folder: Path
    family: Family
    config: Configuration
    preprocessing: Configuration

    def weights(self, state: StateDict) -> StateDict:
        """Their state dict under our names; what has none keeps its own."""
        found = StateDict()
        for name, tensor in _joined(state).items():
            ours = renamed(name, self.family.names)
            found[ours] = _CHANGES.get(ours, lambda t: t)(tensor)
        return found

    def name_of(self, ours: str) -> str:
        """What a tensor of ours is called in their file."""
        back = {ours: theirs for theirs, ours in self.family.names.items()}
        theirs = renamed(ours, back)
        return theirs.replace(".attention.kv.", ".attention.in_proj_").replace(".qkv.", ".q_proj.")

    def tokenizer(self) -> Any:
        """open_clip's tokenizer with the folder's vocabulary; a `UserError` if there is none."""
        text = self.config["text_cfg"]
        if self.family.clean is None and (own := _merges(self.folder, text)) is not None:
            return own
        if not any((self.folder / name).is_file() for name in _VOCABULARIES):
            what = f"{self.folder} holds no vocabulary ({', '.join(_VOCABULARIES)})"
            raise UserError(f"{what}; put there what came with the weights")
        with lacking(f"the tokenizer in {self.folder}"):
            return HFTokenizer(
                str(self.folder), context_length=text["context_length"],
                clean=self.family.clean or "lower", padding_side="right",
                trust_remote_code=False, local_files_only=True,
            )  # fmt: skip


def is_transformers(folder: Path) -> bool:
    """Whether a folder looks like one of transformers' models."""
    return (folder / CONFIG).is_file()


def translate(folder: Path, others: Iterable[str] = ()) -> Translated:
    """What a folder's files say of its model, in open_clip's words.

    A `UserError` names a type that is not known here, and settings that no tower of ours has; what
    is no configuration at all ends in errors of Python's own.
    """
    config = read_object(folder / CONFIG)
    if (family := FAMILIES.get(kind := str(config.get("model_type")))) is None:
        what = f"{folder} holds a transformers model of type {shown(kind)}"
        raise UserError(f"{what}; those of type {', '.join((*FAMILIES, *others))} can be used")
    vision, text = (
        whole_part(config.get(f"{tower}_config") or {}, getattr(family, tower),
                   config.get(f"{tower}_config_dict"))
        for tower in ("vision", "text")
    )  # fmt: skip
    told = family.configure(config, vision, text)
    file, said = processor(folder)
    seen = seen_by(said, told["vision_cfg"]["image_size"], file)
    return Translated(folder, family, told, family.preprocessing | seen)


def missing_files(folder: Path, *, words: bool = True) -> list[str]:
    """Which of a folder's files that say how images and texts are read are not there."""
    seen = any((folder / name).is_file() for name in _PREPROCESSING)
    words = words and not any((folder / name).is_file() for name in (*_VOCABULARIES, "vocab.json"))
    return [*[_PREPROCESSING[0]] * (not seen), *["tokenizer.json"] * words]


def read_object(file: Path) -> Configuration:
    """A JSON file, which holds one object."""
    if not isinstance(found := parse_json(read_text(file)), dict):
        raise ValueError(f"{file.name} is no JSON object")
    return found


def whole_part(
    said: Configuration, defaults: Configuration, twice: Configuration | None = None
) -> Configuration:
    """A tower's configuration, whole; what early versions wrote twice counts as it does there."""
    found = defaults | said
    if twice is not None:
        found |= defaults | twice
    for key, usual in defaults.items():
        kinds = {bool: (bool,), int: (int,), float: (float, int)}.get(type(usual))
        if kinds and (type(found[key]) not in kinds or found[key] < 0):
            raise ValueError(f"its {key} is {shown(found[key])}")
    return found


def renamed(name: str, table: Mapping[str, str]) -> str:
    """A tensor's name by a table, or as it is."""
    number = found[1] if (found := re.search(r"(?:layers|blocks)\.(\d+)\.", name)) else "#"
    general = name.replace(f"s.{number}.", "s.#.", 1)
    for old, new in table.items():
        if general == old or (old[-1] in "._" and general.startswith(old)):
            return (new + general[len(old) :]).replace("s.#.", f"s.{number}.", 1)
    return name


def _joined(state: StateDict) -> StateDict:
    """Three projections of attention as one, and of attention pooling's one two."""
    found = StateDict()
    for name, tensor in state.items():
        if ".self_attn.q_proj." in name:
            parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            if absent := [part for part in parts if part not in state]:
                raise ValueError(f"'{absent[0]}' is not among them")
            found[name.replace(".q_proj.", ".qkv.")] = torch.cat([state[part] for part in parts])
        elif ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            if name.replace(".k_proj.", ".q_proj.").replace(".v_proj.", ".q_proj.") not in state:
                found[name] = tensor
        elif ".head.attention.in_proj_" in name:
            stem, kind = name.rsplit("in_proj_", 1)
            width = len(tensor) // 3
            found[f"{stem}q.{kind}"], found[f"{stem}kv.{kind}"] = tensor[:width], tensor[width:]
        else:
            found[name] = tensor
    return found


# ------------------------------------------------------------------------------ configurations


def activation(part: Configuration) -> str:
    """ "quick" for QuickGELU, "tanh" for GELU's approximation, "none" for GELU itself."""
    known = {"quick_gelu": "quick", "gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh",
             "gelu_pytorch_tanh": "tanh"}  # fmt: skip
    if (found := known.get(part["hidden_act"])) is None:
        what = f"{CONFIG} asks for the activation {shown(part['hidden_act'])}"
        raise UserError(f"{what}, which no tower here has; known are {', '.join(known)}")
    return found


# What timm calls them.
TIMM_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}


def _tower(part: Configuration) -> Configuration:
    """What both towers of open_clip's have."""
    width, heads = part["hidden_size"], part["num_attention_heads"]
    if width % heads or part["num_channels"] != 3:
        raise ValueError(f"its width {width} is not {heads} heads', or its images have no colours")
    act = activation(part)
    return {
        "layers": part["num_hidden_layers"], "width": width,
        # The half keeps the product from being rounded down past the whole number it is.
        "mlp_ratio": (part["intermediate_size"] + 0.5) / width,
        "norm_kwargs": {"eps": part["layer_norm_eps"]},
        "act_kwargs": {"approximate": "tanh"} if act == "tanh" else None,
    }  # fmt: skip


def _vision(part: Configuration) -> Configuration:
    head_width = part["hidden_size"] // part["num_attention_heads"]
    sizes = {key: part[key] for key in ("patch_size", "image_size")}
    return _tower(part) | sizes | {"head_width": head_width}


def _text(part: Configuration) -> Configuration:
    return _tower(part) | {
        "heads": part["num_attention_heads"], "vocab_size": part["vocab_size"],
        "context_length": part["max_position_embeddings"],
    }  # fmt: skip


def _clip(config: Configuration, vision: Configuration, text: Configuration) -> Configuration:
    acts = {activation(vision), activation(text)}
    if "quick" in acts and len(acts) > 1:
        what = f"{CONFIG} asks for two activations, {vision['hidden_act']} and {text['hidden_act']}"
        raise UserError(f"{what}, which open_clip's towers do not have together")
    told, end = _text(text), text["eos_token_id"]
    # Early configurations say 2 of vocabularies that end otherwise, and mean the greatest id.
    greatest = (2, told["vocab_size"] - 1) if config["model_type"] == "clip" else ()
    if end not in greatest:
        told |= {"pool_type": "eos", "eos_id": end}
    return {"embed_dim": config.get("projection_dim", 512), "quick_gelu": acts == {"quick"},
            "vision_cfg": _vision(vision), "text_cfg": told}  # fmt: skip


def _chinese(config: Configuration, vision: Configuration, text: Configuration) -> Configuration:
    quick = activation(vision) == "quick"
    # Texts of CLIPs are short; places that BERT has beyond cost time and change nothing.
    length = min(text["max_position_embeddings"], 77)
    bert = {key: text[key] for key in _BERT}
    told = {"layers": text["num_hidden_layers"], "context_length": length, "bert": bert}
    return {"embed_dim": config.get("projection_dim", 512), "quick_gelu": quick,
            "vision_cfg": _vision(vision), "text_cfg": told}  # fmt: skip


def _siglip(config: Configuration, vision: Configuration, text: Configuration) -> Configuration:
    if config["model_type"] == "siglip2":
        # For any aspect; square, its positions are as they were learned.
        if (side := isqrt(vision["num_patches"])) ** 2 != vision["num_patches"]:
            raise ValueError(f"its {vision['num_patches']} patches make no square")
        vision = vision | {"image_size": side * vision["patch_size"]}
    if not vision["vision_use_head"]:
        raise UserError(f"{CONFIG} says vision_use_head false: its image tower gives no features")
    told = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    act = TIMM_ACTIVATIONS[activation(vision)]
    seen = _vision(vision) | {"act_layer": act, "heads": vision["num_attention_heads"]}
    return {"embed_dim": text["projection_size"] or text["hidden_size"], "init_logit_bias": 0.0,
            "quick_gelu": activation(text) == "quick", "vision_cfg": seen,
            "text_cfg": _text(text) | told}  # fmt: skip


# --------------------------------------------------------------------------------------- towers

# In place of the tower that is then put there.
_NO_VISION = {"layers": 1, "width": 1, "head_width": 1, "image_size": 1, "patch_size": 1}
_NO_TEXT = {"layers": 1, "width": 1, "heads": 1, "context_length": 1, "vocab_size": 1}


class _Timm(TimmModel):
    """open_clip's adapter, around a ViT of timm's for whose sizes timm has no name."""

    def __init__(self, told: Configuration) -> None:
        nn.Module.__init__(self)
        self.image_size = (told["image_size"],) * 2
        self.trunk = timm.models.VisionTransformer(
            img_size=told["image_size"], patch_size=told["patch_size"], embed_dim=told["width"],
            depth=told["layers"], num_heads=told["heads"], mlp_ratio=told["mlp_ratio"],
            act_layer=told["act_layer"],
            norm_layer=partial(timm.layers.LayerNorm, **told["norm_kwargs"]),
            class_token=False, global_pool="map", num_classes=0,
        )  # fmt: skip
        self.head = nn.Sequential()


def _make_siglip(vision_cfg: Configuration, **config: Any) -> CustomTextCLIP:
    model = CustomTextCLIP(vision_cfg=_NO_VISION, **config)
    model.visual = _Timm(vision_cfg)
    return model


def _make_chinese(text_cfg: Configuration, **config: Any) -> CustomTextCLIP:
    with lacking("BERT, the text tower of Chinese-CLIP,"):
        from transformers import BertConfig

    model = CustomTextCLIP(text_cfg=_NO_TEXT, **config)
    how = {"pooler_type": "cls_last_hidden_state_pooler", "proj_type": "linear"}
    # Of transformers' own checks come errors of its own.
    with refusing(f"{CONFIG} describes no BERT", "give the one of the weights", Exception):
        bert = BertConfig(**text_cfg["bert"])
    model.text = HFTextEncoder("", config["embed_dim"], config=bert, **how)
    model.text.transformer.pooler = None  # there, and never asked
    model.text.context_length = text_cfg["context_length"]
    return model


# ---------------------------------------------------------------------------- images and words


def processor(folder: Path) -> tuple[Path, Configuration]:
    """The file in which a folder says how images are made ready, and what; where none is, {}."""
    file = next((folder / name for name in _PREPROCESSING if (folder / name).is_file()), None)
    said = {} if file is None else read_object(file)
    return file or folder, said.get("image_processor", said)


def seen_by(said: Configuration, side: int, file: Path) -> Configuration:
    """What a processor's file says, as open_clip's preprocessing, for a tower of ``side`` px."""
    size: Any = said.get("size")
    # A crop that is not made may be told of all the same.
    crop = said.get("crop_size") if said.get("do_center_crop", True) else None
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if isinstance(size, list):
        size = dict(zip(("height", "width"), size, strict=True))
    asked = [part if isinstance(part, dict) else {"": part} for part in (size, crop) if part]
    sides = {value for part in asked for value in part.values() if value is not None}
    scale = said.get("rescale_factor") or 1 / 255
    if not said.get("do_resize", True):
        raise UserError(f"{file} asks for images that are not resized; here they are, to {side} px")
    if not sides <= {side} or not said.get("do_rescale", True) or abs(scale * 255 - 1) > 1e-6:
        what = f"{file} asks for images resized or cropped to {sorted(sides)}, times {scale:.3g}"
        raise UserError(f"{what}; here they are resized to the tower's {side} px, from 0 to 1")
    seen = Configuration()
    if size or said.get("use_square_size"):
        shortest = not said.get("use_square_size") and size.get("shortest_edge")
        seen["resize_mode"] = "shortest" if shortest else "squash"
    if (resample := said.get("resample")) is not None:
        if resample not in range(len(_FILTERS)):
            what = f"{file} asks for the resampling {shown(resample)}, which is not known here"
            raise UserError(f"{what}; known are 0 to 3 ({', '.join(_FILTERS)})")
        seen["interpolation"] = _FILTERS[resample]
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    for key, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if (value := (said if said.get("do_normalize", True) else plain).get(theirs)) is not None:
            seen[key] = value
    return seen


def _merges(folder: Path, text: Configuration) -> SimpleTokenizer | None:
    """CLIP's tokenizer with a folder's vocabulary; None where that is of another kind."""
    words, pairs = folder / "vocab.json", folder / "merges.txt"
    found = SimpleTokenizer(context_length=text["context_length"])
    if words.is_file() and pairs.is_file():
        vocabulary = read_object(words)
        lines = read_text(pairs).splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    elif (folder / "tokenizer.json").is_file():
        model = read_object(folder / "tokenizer.json")["model"]
        if model.get("end_of_word_suffix") != "</w>":
            return None
        vocabulary = model["vocab"]
        merges = [tuple(m.split() if isinstance(m, str) else m) for m in model["merges"]]
    elif any((folder / name).is_file() for name in _VOCABULARIES):
        return None
    elif text["vocab_size"] == _ORDINARY:
        return found
    else:
        return None
    # What begins and ends a text has other names in open_clip.
    ends = {"<|startoftext|>": "<start_of_text>", "<|endoftext|>": "<end_of_text>"}
    found.encoder = {ends.get(word, word): int(number) for word, number in vocabulary.items()}
    found.decoder = {number: word for word, number in found.encoder.items()}
    found.bpe_ranks = {pair: rank for rank, pair in enumerate(merges)}
    found.vocab_size = len(found.encoder)
    found.sot_token_id, found.eot_token_id = (found.encoder[word] for word in ends.values())
    found.all_special_ids = [found.sot_token_id, found.eot_token_id]
    letters = [letter + end for letter in found.byte_encoder.values() for end in ("", "</w>")]
    if absent := [w for w in (*letters, *map("".join, merges)) if w not in found.encoder]:
        raise ValueError(f"its vocabulary lacks {shown(absent[0])}")
    end = text.get("eos_id", max(found.encoder.values()))
    if found.eot_token_id != end:
        raise ValueError(
            f"its texts end with token {found.eot_token_id}, and the tower reads {end}"
        )
    return found


_OPENAI = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic"}
_HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
FAMILIES = {
    "clip": Family(_VIT, _CLIP_TEXT, _CLIP_NAMES, _clip, CustomTextCLIP,
                   _OPENAI | {"resize_mode": "shortest"}),
    "siglip": Family(_SIGLIP_VIT, _SIGLIP_TEXT, _SIGLIP_NAMES, _siglip, _make_siglip,
                     _HALF | {"interpolation": "bicubic"}, "lower"),
    "siglip2": Family(_SIGLIP_VIT, _SIGLIP_TEXT, _SIGLIP_NAMES, _siglip, _make_siglip,
                      _HALF | {"interpolation": "bilinear"}, "lower"),
    "metaclip_2": Family(_VIT, _CLIP_TEXT, _CLIP_NAMES, _clip, CustomTextCLIP,
                         _OPENAI | {"resize_mode": "shortest"}, "whitespace"),
    "chinese_clip": Family(_VIT, _BERT, _CHINESE_NAMES, _chinese, _make_chinese,
                           _OPENAI | {"resize_mode": "squash"}, "whitespace"),
}  # fmt: skip
