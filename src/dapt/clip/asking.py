"""Linear maps in towers of other makes than open_clip's ordinary one: where they are, and copies
of such towers in which they ask what changes, or in which the last one is left out.

A copy shares all else with the tower it is of, which stays as it is for whoever uses it meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import AttentionPool2d
from timm import layers
from timm.models.eva import EvaAttention
from timm.models.fastvit import Attention as FastAttention
from torch import Tensor, nn

from dapt.clip.inside import Inside, attend, split_heads
from dapt.clip.trunks import name_of
from dapt.errors import UserError

# Of a layer, the names of maps (as of `Inside`), and of the module that is all of them.
Places = dict[tuple[str, ...], str]
# timm's layers: what runs its linear maps as modules of these names, and over all of an image at
# once. Others read weights past the modules, or have them in another order.
_HOLDERS = (layers.Attention, layers.AttentionRope, EvaAttention, FastAttention, layers.Mlp,
            layers.GluMlp, layers.SwiGLU, layers.GlobalResponseNormMlp)  # fmt: skip
_OF_TIMM = {
    "qkv": ("q", "k", "v"), "q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",), "proj": ("o",),
    "fc1": ("fc",), "fc1_x": ("fc",), "fc2": ("proj",),
}  # fmt: skip
# transformers' layers of text, by where they are in one: BERT and RoBERTa, T5 (whose MLP has a gate
# and reads a weight), M2M.
_OF_TRANSFORMERS = {
    "q": ("attention.self.query", "layer.0.SelfAttention.q", "self_attn.q_proj"),
    "k": ("attention.self.key", "layer.0.SelfAttention.k", "self_attn.k_proj"),
    "v": ("attention.self.value", "layer.0.SelfAttention.v", "self_attn.v_proj"),
    "o": ("attention.output.dense", "layer.0.SelfAttention.o", "self_attn.out_proj"),
    "fc": ("intermediate.dense", "fc1"),
    "proj": ("output.dense", "fc2"),
}
_POOL = "attnpool"  # of a ResNet
_OF_POOL: Places = {(n,): f"{_POOL}.{m}_proj" for n, m in zip("qkvo", "qkvc", strict=True)}


def maps_of(tower: Any) -> list[Places]:
    """Of each layer that has some, its linear maps; none of a tower of ordinary layers.

    A gate is none of them. Of a ResNet, attention pooling is the one layer; elsewhere what is
    outside of layers is left out.
    """
    if isinstance(tower, HFTextEncoder):
        return _maps_of_text(tower)
    if isinstance(getattr(tower, _POOL, None), _POOLS):
        return [_OF_POOL]
    found: dict[str, Places] = {}
    for path, module in tower.named_modules():
        layer = path.rpartition(".")[0]
        if type(module) in _HOLDERS and layer.rpartition(".")[2].isdigit():
            for called, names in _OF_TIMM.items():
                if isinstance(getattr(module, called, None), nn.Linear):
                    found.setdefault(layer, {})[names] = f"{path}.{called}"
    return list(found.values())


def layers_in(text: HFTextEncoder) -> str:
    """Where a text tower has its layers: in its outermost list."""
    return next(path for path, m in text.named_modules() if isinstance(m, nn.ModuleList))


def _maps_of_text(text: HFTextEncoder) -> list[Places]:
    path, made = layers_in(text), list[Places]()
    for i, layer in enumerate(text.get_submodule(path).children()):
        there = {name for name, module in layer.named_modules() if type(module) is nn.Linear}
        ways = ((n, place) for n, places in _OF_TRANSFORMERS.items() for place in places)
        made.append({(n,): f"{path}.{i}.{place}" for n, place in ways if place in there})
    return [own for own in made if own]


class Asking(nn.Module):
    """A linear map (..., in) -> (..., out) that asks what changes in it in one pass."""

    def __init__(self, own: nn.Linear, layer: int, names: tuple[str, ...], inside: Inside) -> None:
        super().__init__()
        self.own, self.layer, self.names, self.inside = own, layer, names, inside

    @property
    def bias(self) -> Tensor | None:
        """As a linear map's."""
        return self.own.bias

    def forward(self, x: Tensor) -> Tensor:
        """What `Inside` makes of it."""
        weight = self.inside.weight(self.layer, self.names, self.own.weight)
        out = F.linear(x, weight, self.own.bias)
        return self.inside.linear(self.layer, self.names, x, out)


class _Pool(nn.Module):
    """Attention pooling of a ResNet, which runs its linear maps as modules; its own does not."""

    def __init__(self, own: AttentionPool2d) -> None:
        super().__init__()
        self.positional_embedding, self.num_heads = own.positional_embedding, own.num_heads
        self.q_proj, self.k_proj, self.v_proj = own.q_proj, own.k_proj, own.v_proj
        self.c_proj = own.c_proj

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, h, w) -> (B, D): the mean asks all places and itself."""
        x = x.flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1)  # (B, 1 + h * w, W)
        x = x + self.positional_embedding.to(x.dtype)
        found = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        mixed = attend(*(split_heads(t, self.num_heads) for t in found))  # (B, 1, W)
        return cast(Tensor, self.c_proj(mixed))[:, 0]


_POOLS = AttentionPool2d, _Pool


def asking(tower: Any, inside: Inside) -> Any:
    """A tower whose layers' linear maps ask ``inside``, for one pass."""
    places = {
        path: Asking(tower.get_submodule(path), layer, names, inside)
        for layer, own in enumerate(maps_of(tower))
        for names, path in own.items()
    }
    if not places:
        text = isinstance(tower, HFTextEncoder)
        what = f"the {'text' if text else 'image'} tower is a {name_of(tower)}, in whose layers no"
        hint = "use a method of prompts (coop), or of a head (auto)"
        raise UserError(f"{what} weight is changed; {hint}")
    return _with(tower, places)


def last_map(visual: Any) -> str | None:
    """Where the linear map is that an image tower of other makes ends with, if it does."""
    if isinstance(getattr(visual, _POOL, None), _POOLS):
        return f"{_POOL}.c_proj"
    if (trunk := getattr(visual, "trunk", None)) is None:
        return None
    ends = dict(visual.head.named_modules())
    if found := next((path for path in ("proj", "mlp.fc2") if path in ends), None):
        return f"head.{found}"
    last = None if len(ends) > 1 else trunk.get_classifier()
    named = (path for path, module in visual.named_modules() if module is last)
    return next(named) if isinstance(last, nn.Linear) else None


def without(visual: Any, path: str) -> Any:
    """An image tower that gives the input of its `last_map`, and behind it a one for a bias."""
    bare = visual.get_submodule(path).bias is None
    return _with(visual, {path: nn.Identity() if bare else _AndOne()})


class _AndOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(..., W) -> (..., W + 1)."""
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def _with(tower: Any, others: Mapping[str, nn.Module]) -> Any:
    if isinstance(pool := getattr(tower, _POOL, None), AttentionPool2d):
        tower = _copied(tower, {_POOL: _Pool(pool)})
    return _copied(tower, others)


def _copied(module: nn.Module, others: Mapping[str, nn.Module]) -> nn.Module:
    """A module with others in some places of it, copied only on the way to them."""
    made = module.__class__.__new__(module.__class__)
    made.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    below: dict[str, dict[str, nn.Module]] = {}
    for path, other in others.items():
        first, _, rest = path.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = other
        else:
            made._modules[first] = other
    for name, inner in below.items():
        made._modules[name] = _copied(module.get_submodule(name), inner)
    return made
