"""How published code saves what its methods learn: the names of tensors, and what stands beside.

Most of it derives from Dassl, whose checkpoints are ``{"state_dict", "epoch", ...}`` of a prompt
learner, or of the whole model with its frozen weights. A method's row has its `Layout`, and more of
them where there are several in use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

DASSL = (
    "coop"  # the form, as `dapt export --format` calls it, of whatever a method's own code saves
)
# Modules of that code before a learned tensor's name, which say nothing.
_BEFORE = re.compile(r"^(prompt_learner|clip_model)\.")
# How names begin there of what follows from class names, or is frozen.
_FROZEN = ("token_prefix", "token_suffix", "token_midfix", "text_encoder.", "image_encoder.",
           "logit_scale")  # fmt: skip
# The same of a whole CLIP, as OpenAI's code calls it.
CLIP = ("visual.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.",
        "text_projection", "logit_scale")  # fmt: skip
# A layer's number: digits that are not part of a name such as linear1.
_LAYER = re.compile(r"(?<![a-zA-Z])\d+")


@dataclass(frozen=True)
class Published:
    """How the field's published code calls a tensor in its checkpoints.

    Where both names hold ``{}`` it is one for each layer, whose number stands there.
    """

    key: str  # its name there
    tensor: str  # its name in a run's files
    leading: bool = False  # whether it has a first dimension of one there
    dims: int = 2  # that it has in a run
    shift: int = 0  # what is added to a layer's number there


@dataclass(frozen=True)
class Layout:
    """What published code writes of one method, and what of it is passed over."""

    entries: tuple[Published, ...]
    form: str = DASSL
    sign: str = ""  # how the name of something begins that this code alone saves
    aside: tuple[str, ...] = ()  # how names begin of what is not learned, besides `_FROZEN`
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda facts: {}
    facts: Callable[[Any], dict[str, Any]] = lambda settings: {}

    def places(self, state: Mapping[str, Tensor]) -> dict[str, tuple[str, Published]]:
        """Names of tensors in ``state``, each with its name in a run; none unless all are there.

        ``state`` has names as of `bare`.
        """
        found = {key: own for key in state if (own := self._of(bare(key)))}
        here = {entry.key for _, entry in found.values()}
        whole = {entry.key for entry in self.entries if "{}" not in entry.key}
        return found if whole <= here else {}

    def _of(self, key: str) -> tuple[str, Published] | None:
        layer = _LAYER.search(key)
        form = key if layer is None else f"{key[: layer.start()]}{{}}{key[layer.end() :]}"
        number = int(layer[0]) if layer else 0
        for entry in self.entries:
            if bare(entry.key) == key:
                return entry.tensor, entry
        own = [e for e in self.entries if bare(e.key) == form and number >= e.shift]
        if not own:
            return None
        entry = max(own, key=lambda e: e.shift)
        return entry.tensor.format(number - entry.shift), entry

    def keys(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Published]]:
        """By the names of a run's tensors, what they are called in a checkpoint."""
        exact = {entry.tensor: entry for entry in self.entries}
        found = {}
        for name in tensors:
            layer = _LAYER.search(name)
            form = name if layer is None else f"{name[: layer.start()]}{{}}{name[layer.end() :]}"
            if (entry := exact.get(name) or exact.get(form)) is not None:
                number = int(layer[0]) + entry.shift if layer else 0
                found[name] = entry.key.format(number), entry
        return found

    def passes(self, key: str, learned: bool) -> bool:
        """Whether a tensor of this name may be passed over; ``learned`` if others learn such."""
        return bare(key).startswith(self.aside if learned else (*_FROZEN, *self.aside))

    def knows(self, key: str) -> bool:
        """Whether a tensor of this name is learned."""
        return self._of(bare(key)) is not None

    def signed(self, state: Mapping[str, Tensor]) -> bool:
        """Whether something is there that this method's code alone saves."""
        return bool(self.sign) and any(bare(key).startswith(self.sign) for key in state)

    def wrapped(self, state: dict[str, Tensor], facts: dict[str, Any], epoch: int) -> Any:
        """What is saved of tensors, by their names in a checkpoint."""
        return {"state_dict": state, "epoch": epoch}


def bare(key: str) -> str:
    """A tensor's name in a checkpoint without the module that all of them are in."""
    return _BEFORE.sub("", key)
