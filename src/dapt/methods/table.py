"""The table of methods: a new one is a row, put together of parts."""

from __future__ import annotations

from dapt.errors import UserError, nearest
from dapt.methods import ivlp
from dapt.methods.context import Context
from dapt.methods.contract import Method, Published
from dapt.methods.ivlp import DeepContext, DeepVisual
from dapt.methods.losses import INTER, INTRA
from dapt.methods.probe import LinearProbe
from dapt.methods.tip_adapter import TipAdapterF
from dapt.methods.visual import VisualPrompt

ZERO_SHOT = "zero-shot"

# How the code that CoOp and DAPT were published with saves one prompt, and two.
_TEXT = (Published("ctx", "text_prompt"),)
_VISUAL = (Published("vis_ctx", "visual_prompt", leading=True),)
_BOTH = (Published("txt_ctx", "text_prompt"), *_VISUAL)

METHODS: dict[str, Method] = {
    ZERO_SHOT: Method("Zero-shot CLIP", colour=("#6b7281", "#9aa3b0"), marker="_"),
    "linear-probe": Method(
        "Linear probe", head=LinearProbe, colour=("#a16208", "#e3b341"), marker="s"
    ),
    "coop": Method(
        "CoOp", (Context,), checkpoint=_TEXT, colour=("#2563ec", "#6ea8fe"), marker="^"
    ),
    "vpt": Method(
        "VPT", (VisualPrompt,), checkpoint=_VISUAL, colour=("#0d9489", "#3cd5c1"), marker="D"
    ),
    "vlpt": Method(
        "VLPT", (Context, VisualPrompt), checkpoint=_BOTH,
        colour=("#7c3aee", "#b294fb"), marker="v",
    ),
    "dapt-text": Method(
        "DAPT-text", (Context,), (INTER,), checkpoint=_TEXT,
        colour=("#db2778", "#f77fb8"), marker="P",
    ),
    "dapt-visual": Method(
        "DAPT-visual", (VisualPrompt,), (INTRA,), checkpoint=_VISUAL,
        colour=("#5f930e", "#a5d94b"), marker="X",
    ),
    "dapt": Method(
        "DAPT", (Context, VisualPrompt), (INTRA, INTER), checkpoint=_BOTH,
        colour=("#c2410c", "#fb8b4a"), marker="o",
    ),
    "ivlp": Method("IVLP", (DeepContext, DeepVisual), defaults=ivlp.published_settings),
    "tip-adapter-f": Method("Tip-Adapter-F", head=TipAdapterF),
}  # fmt: skip


def get_method(name: str) -> Method:
    """Look a method up by its name in `METHODS`.

    Raises:
        UserError: there is no such row.
    """
    if name not in METHODS:
        raise UserError(
            f"unknown method '{name}'{nearest(name, list(METHODS))}; use one of "
            f"{', '.join(METHODS)}"
        )
    return METHODS[name]
