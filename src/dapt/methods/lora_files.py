"""Files of CLIP-LoRA's changes: the published code's own, and adapters of the library PEFT.

Names of the former are those of its ``save_lora``. Those of the latter are what PEFT makes of a
CLIP of transformers with adapted attention. Both are known from that code: no recorded run shows
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from torch import Tensor

from dapt.errors import UserError
from dapt.methods.clip_lora import LoraSettings
from dapt.methods.contract import HasSettings
from dapt.methods.layouts import Layout, Published


def _pairs(text: str, visual: str, names: Mapping[str, str], matrix: str) -> tuple[Published, ...]:
    """Entries of both matrices of each map in each layer, by what each of them is called."""
    return tuple(
        Published(f"{before}{called}.{matrix.format(of)}", f"{kind}_lora.{{}}.{name}.{of}")
        for kind, before in (("text", text), ("visual", visual))
        for name, called in names.items()
        for of in "AB"
    )


@dataclass(frozen=True)
class OwnFile(Layout):
    """``{"weights": {"layer_0": {"q_proj": {"w_lora_A", "w_lora_B"}}, ...}, "metadata"}``.

    As ``save_lora`` of the code (loralib/utils.py) writes it, of all blocks of both encoders. Its
    layers are counted through: those of the text tower, then those of the image tower. Where the
    latter begin is told by the widths; where all are equal, it is half-way.
    """

    def _at(self, border: int) -> Layout:
        entries = [
            replace(e, shift=border if e.tensor.startswith("visual") else 0) for e in self.entries
        ]
        return Layout(tuple(entries))

    def places(self, state: Mapping[str, Tensor]) -> dict[str, tuple[str, Published]]:
        """As of every layout."""
        numbered = [(re.match(r"layer_(\d+)\.\w+\.w_lora_A$", key), t) for key, t in state.items()]
        widths = {int(found[1]): tensor.shape[-1:] for found, tensor in numbered if found}
        wider = [n for n in widths if n and widths[n] != widths.get(n - 1)]
        return self._at(min(wider, default=len(widths) // 2)).places(state)

    def keys(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Published]]:
        """As of every layout."""
        text = {name.split(".")[1] for name in tensors if name.startswith("text")}
        return self._at(len(text)).keys(tensors)

    def wrapped(self, state: dict[str, Tensor], facts: dict[str, Any], epoch: int) -> Any:
        """As of every layout."""
        weights: dict[str, dict[str, dict[str, Tensor]]] = {}
        for key, tensor in state.items():
            layer, name, matrix = key.split(".")
            weights.setdefault(layer, {}).setdefault(name, {})[matrix] = tensor
        return {"weights": weights, "metadata": facts}


def _from_own(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the metadata of `OwnFile` say."""
    odd = {
        name: facts.get(name, usual) for name, usual in (("encoder", "both"), ("position", "all"))
    }
    if [*odd.values()] != ["both", "all"]:
        said = ", ".join(f"{name} '{value}'" for name, value in odd.items())
        raise UserError(
            f"its metadata say {said}, and only 'both' encoders, 'all' blocks are taken"
        )
    return {"lora_alpha": facts["alpha"]} if "alpha" in facts else {}


def _from_peft(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a PEFT adapter's configuration says.

    Its scale is alpha / r; with ``use_rslora`` it is alpha / sqrt(r), as CLIP-LoRA's.
    """
    rank, alpha = (facts.get(name) for name in ("r", "lora_alpha"))
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
        raise UserError("adapter_config.json, with its r and lora_alpha, is needed beside it")
    beyond = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
    if odd := next((name for name in beyond if facts.get(name)), None):
        raise UserError(f"its adapter_config.json has {odd}, and plain LoRA alone is taken")
    return {"lora_alpha": float(alpha if facts.get("use_rslora") else alpha / sqrt(rank))}


def _settings(settings: HasSettings) -> LoraSettings:
    """Those of a run that has a place in these files."""
    own: LoraSettings = settings.of(LoraSettings)
    if odd := [name for name in own.lora_maps if name not in _OWN]:
        what = f"changes of {odd[0]} have no place in a file of CLIP-LoRA's or PEFT's"
        raise UserError(f"{what}; use --format onnx or torch")
    return own


def _as_own(settings: HasSettings) -> dict[str, Any]:
    own = _settings(settings)
    return {"r": own.lora_rank, "alpha": own.lora_alpha, "encoder": "both",
            "params": list(own.lora_maps), "position": "all"}  # fmt: skip


def _as_peft(settings: HasSettings) -> dict[str, Any]:
    own = _settings(settings)
    return {"peft_type": "LORA", "r": own.lora_rank, "lora_alpha": own.lora_alpha,
            "use_rslora": True, "lora_dropout": own.lora_dropout, "bias": "none",
            "target_modules": [_OF_PEFT[name].split(".")[1] for name in own.lora_maps],
            "inference_mode": True, "task_type": None}  # fmt: skip


# What the maps are called in the code, and in the CLIP of transformers, which PEFT adapts.
_OWN = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
_OF_PEFT = {name: f"self_attn.{name}_proj" for name in "qkv"} | {"o": "self_attn.out_proj"}
_HERE = "base_model.model.{}_model.encoder.layers.{{}}."
_ADAPTERS = _pairs(_HERE.format("text"), _HERE.format("vision"), _OF_PEFT, "lora_{}.weight")
_COUNTED = _pairs("layer_{}.", "layer_{}.", _OWN, "w_lora_{}")
LAYOUTS = (
    OwnFile(_COUNTED, settings=_from_own, facts=_as_own),
    Layout(_ADAPTERS, form="peft", settings=_from_peft, facts=_as_peft),
)
