"""What is learned: the table of methods, in which a new one is a row, put together of parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from dapt.clip.looks import LOOKS
from dapt.errors import UserError, nearest
from dapt.methods import (
    auto,
    clap,
    clip_lora,
    clip_svd,
    cocoop,
    gda,
    ivlp,
    kernel_ridge,
    kgcoop,
    lora_files,
    lp_plus,
    maple,
    mmrl,
    plugins,
    probe,
    prolip,
    prompts,
    promptsrc,
    prototypes,
    ss_text,
    tip_adapter,
    two_stage,
)
from dapt.methods.contract import (
    Evidence,
    Finish,
    Head,
    LossTerm,
    Method,
    PartSettings,
    Step,
    TowerPart,
)
from dapt.methods.layouts import Layout, Published
from dapt.methods.losses import INTER, INTRA

__all__ = ["AUTOMATIC", "BUILT_IN", "GROUPS", "METHODS", "ZERO_SHOT", "Evidence", "Finish", "Head",
           "LossTerm", "Method", "PartSettings", "Step", "TowerPart", "find_method", "get_method",
           "load_plugins"]  # fmt: skip

ZERO_SHOT, AUTOMATIC = "zero-shot", "auto"

_TEXT, _VISUAL = prompts.Context, prompts.VisualPrompt
# How the code that CoOp and DAPT were published with saves one prompt, and two.
_CTX = (Layout((Published("ctx", "text_prompt"),)),)
_VISUAL_KEY = Published("vis_ctx", "visual_prompt", leading=True)
_VIS = (Layout((_VISUAL_KEY,)),)
_BOTH = (Layout((Published("txt_ctx", "text_prompt"), _VISUAL_KEY)),)

METHODS: dict[str, Method] = {
    ZERO_SHOT: Method("Zero-shot CLIP", colour=("#6b7281", "#9aa3b0"), marker="_", shown=True),
    "linear-probe": Method(
        "Linear probe", head=probe.LinearProbe,
        colour=("#a16208", "#e3b341"), marker="s", shown=True,
    ),
    "coop": Method(
        "CoOp", (_TEXT,), checkpoint=_CTX, defaults=prompts.usual,
        colour=("#2563ec", "#6ea8fe"), marker="^", shown=True, field=True,
    ),
    "vpt": Method(
        "VPT", (_VISUAL,), checkpoint=_VIS,
        colour=("#0d9489", "#3cd5c1"), marker="D", shown=True,
    ),
    "vlpt": Method(
        "VLPT", (_TEXT, _VISUAL), checkpoint=_BOTH,
        colour=("#7c3aee", "#b294fb"), marker="v", shown=True,
    ),
    "dapt-text": Method(
        "DAPT-text", (_TEXT,), (INTER,), checkpoint=_CTX,
        colour=("#db2778", "#f77fb8"), marker="P",
    ),
    "dapt-visual": Method(
        "DAPT-visual", (_VISUAL,), (INTRA,), checkpoint=_VIS,
        colour=("#5f930e", "#a5d94b"), marker="X",
    ),
    "dapt": Method(
        "DAPT", (_TEXT, _VISUAL), (INTRA, INTER), checkpoint=_BOTH,
        colour=("#c2410c", "#fb8b4a"), marker="o", shown=True, tried=True,
        instead=("dapt-text", "dapt-visual", AUTOMATIC),
    ),
    "cocoop": Method(
        "CoCoOp", (cocoop.ConditionalContext,), checkpoint=cocoop.LAYOUTS, defaults=cocoop.usual,
        field=True,
    ),
    "kgcoop": Method(
        "KgCoOp", (_TEXT,), (kgcoop.KNOWLEDGE,), checkpoint=kgcoop.LAYOUTS,
        defaults=kgcoop.usual,
        field=True,
    ),
    "vpt-deep": Method(
        "VPT-deep", (ivlp.DeepVisual,), checkpoint=ivlp.VPT_LAYOUTS, defaults=ivlp.usual_vpt,
        field=True,
    ),
    "ivlp": Method(
        "IVLP", (ivlp.DeepContext, ivlp.DeepVisual), checkpoint=ivlp.LAYOUTS, defaults=ivlp.usual,
        tried=True,
        field=True,
    ),
    "maple": Method(
        "MaPLe", (maple.CoupledPrompt,), checkpoint=maple.LAYOUTS, defaults=maple.usual,
        field=True,
    ),
    "promptsrc": Method(
        "PromptSRC", (ivlp.DeepContext, ivlp.DeepVisual), promptsrc.NEAR_FROZEN,
        finish=promptsrc.GaussianAverage, checkpoint=promptsrc.LAYOUTS, defaults=promptsrc.usual,
        field=True,
    ),
    "mmrl": Method(
        "MMRL", (mmrl.Representation,), mmrl.NEAR_FROZEN, mmrl.both_entropies,
        checkpoint=mmrl.LAYOUTS, defaults=mmrl.usual,
        field=True,
    ),
    "clip-lora": Method(
        "CLIP-LoRA", (clip_lora.TextLowRank, clip_lora.VisualLowRank),
        checkpoint=lora_files.LAYOUTS, defaults=clip_lora.usual,
        tried=True,
        field=True,
    ),
    "2sfs": Method(
        "2SFS", (two_stage.TextNorms, two_stage.VisualNorms), head=two_stage.TwoStage,
        checkpoint=two_stage.LAYOUTS, defaults=two_stage.usual,
        field=True,
    ),
    "clip-svd": Method(
        "CLIP-SVD", (clip_svd.TextSingularValues, clip_svd.VisualSingularValues),
        checkpoint=clip_svd.LAYOUTS, defaults=clip_svd.usual,
        field=True,
    ),
    "text-prototype": Method("Text + prototype", head=prototypes.TextPrototype),
    "kernel-ridge": Method("Kernel ridge", head=kernel_ridge.KernelRidge),
    "tip-adapter": Method("Tip-Adapter", head=tip_adapter.TipAdapter, field=True),
    "tip-adapter-f": Method("Tip-Adapter-F", head=tip_adapter.TipAdapterF, field=True),
    "gda": Method("GDA", head=gda.Gda, field=True),
    "clap": Method("CLAP", head=clap.Clap, field=True),
    "zs-lp": Method("ZS-LP", head=clap.ZeroShotProbe, field=True),
    "lp++": Method("LP++", head=lp_plus.LPPlus, field=True),
    "ss-text": Method("SS-Text", head=ss_text.SSText, field=True),
    "ss-text+": Method("SS-Text+", head=ss_text.SSTextPlus, field=True),
    "prolip": Method("ProLIP", head=prolip.ProLIP, field=True),
    AUTOMATIC: Method(
        "Automatic", head=auto.Auto, defaults=lambda dataset, shots: {"looks": len(LOOKS)},
        colour=("#15803d", "#4ade80"), marker="*", shown=True,
    ),
}  # fmt: skip


# Names that stand for several methods.
GROUPS: dict[str, Callable[[Method], bool]] = {
    "all": lambda row: True,
    "field": lambda row: row.field,
}
# Those that come with dapt; others are of plugins, or of whoever imports it.
BUILT_IN = frozenset(METHODS)


def load_plugins(files: Iterable[Path | str]) -> None:
    """Add the methods of a user's own files, which are executed; a `UserError` says what is wrong.

    To be called with files that the user named themselves, and with nothing that was read.
    """
    plugins.load(files, METHODS)


def get_method(name: str) -> Method:
    """Look a method up by its name in `METHODS`, or put one together: "dapt+kernel-ridge".

    After a plus stands another row, whose head is fitted on what the first one tunes.

    Raises:
        UserError: there is no such row, or the second has no head to fit, or the first takes none.
    """
    if name in METHODS:  # some of its own names hold a plus
        return METHODS[name]
    first, _, other = name.partition("+")
    row, head = _row(first), _row(other)
    if head.learns or not head.head.fitted:
        heads = ", ".join(n for n, r in METHODS.items() if r.head.fitted and not r.learns)
        raise UserError(f"method '{other}' fits no head, as {name} would need; use {heads}")
    if row.reads_images:
        what = f"method '{first}' makes class features for each image, which no fitted head takes"
        raise UserError(f"{what}; use it by itself")
    return _together(row, head)


def find_method(name: str) -> Method | None:
    """As `get_method`, or None where there is none of this name."""
    try:
        return get_method(name)
    except UserError:
        return None


def _row(name: str) -> Method:
    if name not in METHODS:
        known, near = ", ".join(METHODS), nearest(name, list(METHODS))
        raise UserError(f"unknown method '{name}'{near}; use one of {known}")
    return METHODS[name]


@cache
def _together(row: Method, head: Method) -> Method:
    return replace(
        row, title=f"{row.title} + {head.title}", head=head.head, colour=None, shown=False,
        tried=False, instead=(),
        defaults=lambda dataset, shots: (
            head.defaults(dataset, shots) | row.defaults(dataset, shots)
        ),
    )  # fmt: skip


plugins.load_installed(METHODS)
