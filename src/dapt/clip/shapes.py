"""What the shapes of OpenAI's tensors tell of a CLIP, and what they do not and is theirs."""

from __future__ import annotations

from typing import Any

import torch

from dapt.errors import UserError
from dapt.safe.weights import StateDict

# OpenAI's CLIPs have heads 64 wide; image towers wider than theirs have wider heads too.
HEAD_WIDTH, _WIDEST = 64, 1024


def configuration(state: StateDict) -> dict[str, Any]:
    """An open_clip model configuration, off the shapes of a state dict of OpenAI's."""

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state:
            raise UserError(f"the weights lack '{name}'; give the whole state dict of a CLIP")
        if len(found := state[name].shape) != dimensions:
            said = f"the weights' '{name}' has shape {tuple(found)}"
            raise UserError(f"{said}, where a CLIP's has {dimensions} dimensions")
        return found

    def layers(prefix: str) -> int:
        return sum(k.startswith(prefix) and k.endswith("in_proj_weight") for k in state)

    width, _, _, patch = shape("visual.conv1.weight", 4)
    side = round((shape("visual.positional_embedding", 2)[0] - 1) ** 0.5)
    text_width = shape("ln_final.weight", 1)[0]
    if width % HEAD_WIDTH or text_width % HEAD_WIDTH or width > _WIDEST:
        what = f"towers of width {width} and {text_width} do not divide into heads {HEAD_WIDTH}"
        hint = "give a directory with open_clip_config.json, which says their number"
        raise UserError(f"{what} wide, as OpenAI's do; {hint}")
    return {
        "embed_dim": shape("text_projection", 2)[1],
        "quick_gelu": True,
        "vision_cfg": {"layers": layers("visual.transformer.resblocks"), "width": width,
                       "head_width": HEAD_WIDTH, "patch_size": patch, "image_size": side * patch},
        "text_cfg": {"context_length": shape("positional_embedding", 2)[0],
                     "vocab_size": shape("token_embedding.weight", 2)[0],
                     "width": text_width, "heads": text_width // HEAD_WIDTH,
                     "layers": layers("transformer.resblocks")},
    }  # fmt: skip
