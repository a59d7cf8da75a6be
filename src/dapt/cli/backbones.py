"""Models to choose from: ``dapt backbones``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from dapt.cli import common
from dapt.cli.common import command
from dapt.cli.outline import outlines
from dapt.errors import UserError
from dapt.progress import cell, console, duration, say, table

if TYPE_CHECKING:
    import torch

# What of a processor's best rate a whole model comes to, about.
_SHARE = 0.5


@command("backbones")
def backbones(
    name: Annotated[str | None, Argument(help="Model to describe.")] = None,
    pretrained: common.OnePretrainedOption = None,
    memory: Annotated[float | None, Option(min=0, help="GiB to use; default: all.")] = None,
    seconds: Annotated[
        float | None, Option(min=0, help="Longest time for 1,000 images, as measured here.")
    ] = None,
    every: Annotated[bool, Option("--all", help="List every name and tag of open_clip.")] = False,
    device: common.DeviceOption = None,
) -> None:
    """List models known by name and recommend one; or say what each method can do with a model."""
    if name is not None:
        _tell_methods(name, pretrained)
    elif every:
        _list_all()
    else:
        _list_known()
        _recommend(memory, seconds, device or "auto")


def _list_known() -> None:
    """The table of what is recommended by name; without torch, so at once."""
    figures = ("px", "MB", "GFLOPs", "ImageNet", "mean")
    made = table("model and weights", "licence", figures=figures)
    with outlines():
        from dapt.clip.known import known_models

        for m in known_models():
            size = f"{m.megabytes:,}", f"{m.gflops:.0f}"
            percent = f"{m.imagenet:.1f} %", f"{m.mean:.1f} %"
            named = f"{m.name}\n  {m.pretrained}"
            made.add_row(named, m.licence, str(m.size), *size, *percent)
    console.print(made)
    say(
        "px and GFLOPs of an image; accuracy of zero-shot, on ImageNet and as the mean over 38 "
        "datasets, as open_clip reports it"
    )


def _recommend(memory: float | None, seconds: float | None, device: str) -> None:
    """The best that fits, and what it takes here."""
    from dapt.clip import known
    from dapt.clip.backbone import choose_device
    from dapt.clip.hub import has_weights
    from dapt.clip.sources import memory_of

    place = choose_device(device)
    there = memory_of(place) if memory is None else memory
    if seconds is None:
        chosen = known.recommended(place.type, there)
    else:
        rate = _SHARE * _gflops_a_second(place)
        chosen = known.best_for(there, rate * seconds / 1000)
        say(f"this machine computes about {rate:,.0f} GFLOPs a second of a model")
    if chosen is None:
        raise UserError(
            "none of these fits; allow more with --memory or --seconds, or take -b bundled"
        )
    fetched = "already fetched" if has_weights(chosen.name, chosen.pretrained) else "to be fetched"
    say(f"for photographs here: -b {chosen.name} --pretrained {chosen.pretrained} ({fetched})")
    if seconds is not None:
        say(f"1,000 images take it {duration(1000 * chosen.gflops / rate)}")


def _gflops_a_second(place: torch.device) -> float:
    """How fast a device multiplies matrices in fp32, measured for a moment."""
    import torch

    a = torch.randn(1024, 1024, device=place)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - begun)
    return 2 * 1024**3 / 1e9 / best


def _list_all() -> None:
    """Names and tags of open_clip's, and whether they are in the caches of this machine."""
    import open_clip

    from dapt.clip.hub import has_weights

    made = table("--backbone", "--pretrained", "fetched")
    for name, tag in open_clip.list_pretrained():
        made.add_row(name, tag, "yes" if has_weights(name, tag) else "")
    console.print(made)


def _tell_methods(name: str, pretrained: str | None) -> None:
    """What a model is, and a line a method."""
    import open_clip

    from dapt.clip.sources import load_backbone
    from dapt.engine.suited import usual_classifier
    from dapt.methods import METHODS

    if pretrained is None and name in open_clip.list_models():
        pretrained = "random"  # what can be done does not hang on them, and nothing is fetched
    backbone = load_backbone(name, pretrained, device="cpu")
    count = sum(p.numel() for p in backbone.parameters()) / 1e6
    side = backbone.preprocessing.size
    say(f"{name}: {count:,.1f} million parameters, images of {side} px", to=console)
    if backbone.reads_text:
        say(f"texts of up to {backbone.context_length} tokens")
    else:
        say("it reads no text")
    made = table("method", "works", "why not")
    for method, row in METHODS.items():
        answer = ("yes", "")
        try:
            usual_classifier(method, backbone, ("cat", "dog"))
        except UserError as error:
            answer = ("no", cell(str(error)))
        made.add_row(f"{row.title} ({method})", *answer)
    console.print(made)
