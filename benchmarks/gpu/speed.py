"""How fast, and in how much memory: attention's kernels, copies, steps beside the plain way.

Only what needs no package but torch is imported here; checks import the rest themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.checks import Check, Figures, Place, free
from benchmarks.gpu.same import NEAR, method_names

_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
VARIANTS = ("plain", "fp32", "bf16")
_SHORT = (torch.OutOfMemoryError, MemoryError)


def attention() -> list[Check]:
    """Which kernel computes it, and what others would take."""
    return [Check("attention", precision, partial(_attention, precision)) for precision in
            ("bf16", "fp16", "fp32")]  # fmt: skip


def copies() -> list[Check]:
    """From the CPU's memory."""
    return [Check("copies", "", _copies)]


def steps(place: Place, methods: list[str] | None) -> list[Check]:
    """Of each method, or of some, with batches of 32 and 4 and 100 names; DAPT's of 1,000 too."""
    cases = [
        (name, batch, names)
        for batch, names in ((32, 100), (4, 100), (32, 1000))
        for name in methods or [n for n in method_names(learns=True) if n != "dapt"]
        if names == 100 or name == "dapt"
    ]
    return [
        Check("steps", f"{name} {batch}x{names}", partial(_steps, name, batch, names))
        for name, batch, names in cases
    ]


def seconds_of(work: Callable[[], Any], place: Place, rounds: int) -> float:
    """The median time of some rounds, after two that are not counted."""
    times = list[float]()
    for _ in range(2 + rounds):
        times.append(-_now(place))
        work()
        times[-1] += _now(place)
    return median(times[2:])


def _now(place: Place) -> float:
    if place.cuda:
        torch.cuda.synchronize(place.device)
    return time.perf_counter()


def _attention(precision: str, place: Place) -> tuple[Figures, str]:
    """Forward and backward, in the shape of ViT-B/16 with 16 tokens more."""
    from dapt.clip.inside import attend

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    shape = (2, 2, 21, 64) if place.quick else (32, 12, 213, 64)
    q, k, v = (torch.randn(shape, device=place.device).to(dtype).requires_grad_() for _ in "qkv")

    def both() -> None:
        attend(q, k, v).float().sum().backward()

    figures: Figures = {"as it is ms": 1000 * seconds_of(both, place, 5)}
    if chooses := getattr(torch, "_fused_sdp_choice", None):  # torch's own, and not public
        figures["chosen"] = SDPBackend(chooses(q, k, v)).name.lower()
    for name, kernel in _KERNELS.items():
        try:
            with sdpa_kernel(kernel):
                figures[f"{name} ms"] = 1000 * seconds_of(both, place, 5)
        except RuntimeError as error:
            if isinstance(error, _SHORT):
                raise
            figures[f"{name} ms"] = "does not run"
    if place.cuda and precision != "fp32" and isinstance(figures["flash ms"], str):
        return figures, "the flash kernel does not run"
    return figures, ""


@torch.inference_mode()
def _copies(place: Place) -> tuple[Figures, str]:
    """Images a second of feature extraction, from page-locked memory and from ordinary."""
    place.require_gpu("page-locked memory")
    from PIL import Image

    from benchmarks.gpu import models
    from dapt.clip.image import image_features
    from dapt.data import ImageStore
    from dapt.engine.step import noise

    own = models.backbone(*place.large, place.device, "bf16")
    ordinary = [noise(own, 8 if place.quick else 100) for _ in range(2 if place.quick else 20)]
    locked = [views.pin_memory() for views in ordinary]
    count = sum(map(len, ordinary))

    def rate(batches: list[torch.Tensor]) -> float:
        work = lambda: [image_features(own, views) for views in batches]  # noqa: E731
        return count / seconds_of(work, place, 3)

    figures: Figures = {"ordinary images/s": rate(ordinary), "locked images/s": rate(locked)}
    read = lambda index: Image.new("RGB", (32, 32))  # noqa: E731
    batch = next(ImageStore(range(4), size=32, read=read).batches([[0, 1]]))
    return figures, "" if batch.is_pinned() else "batches are not page-locked"


def _steps(method: str, batch: int, count: int, place: Place) -> tuple[Figures, str]:
    from open_clip import IMAGENET_CLASSNAMES

    if place.quick:
        batch, count = 2, 5
    row: Figures
    rows: dict[str, Figures] = {}
    for variant in VARIANTS:
        rows[variant] = row = {}
        try:
            _measure(method, batch, list(IMAGENET_CLASSNAMES[:count]), variant, place, row)
        except _SHORT:
            row["error"] = "out of memory"
        free(place)
    figures: Figures = {f"{v} ms": 1000 * r["step"] for v, r in rows.items() if "step" in r}
    figures |= {f"{v} GB": r["GB"] for v, r in rows.items() if "GB" in r}
    figures |= {f"{v} images/s": r["images/s"] for v, r in rows.items() if "images/s" in r}
    figures["rows"] = rows
    if short := [v for v in VARIANTS[1:] if "error" in rows[v]]:
        return figures, f"out of memory: {', '.join(short)}"
    if "loss" in rows["plain"]:
        wanted, found = rows["plain"]["loss"], rows["fp32"]["loss"]
        figures["loss"] = abs(found - wanted) / max(abs(wanted), 1e-9)
        if not figures["loss"] <= NEAR:
            return figures, f"the loss is {figures['loss']:.2g} from the plain way's"
    return figures, ""


def _measure(
    method: str, batch: int, names: list[str], variant: str, place: Place, row: Figures
) -> None:
    """Seconds of a step, its loss, the most memory, and images a second of an evaluation."""
    from benchmarks.gpu import models
    from benchmarks.worker import Job, Variant

    precision = "fp32" if variant == "plain" else variant
    own = models.backbone(*place.large, place.device, precision)
    eval_batch, rounds = (2, 1) if place.quick else (100, 5)
    # Peak memory is that of a step and its model; the plain way of DAPT has a model of its own.
    shares = not (variant == "plain" and method == "dapt")
    weights = sum(t.nbytes for t in (*own.parameters(), *own.buffers())) if shares else 0
    if place.cuda:
        others = torch.cuda.memory_allocated(place.device) - weights
        torch.cuda.reset_peak_memory_stats(place.device)
    name, pretrained = place.large
    job = Job(name, pretrained, "", names, batch, eval_batch, place.device, variant, method)
    made = Variant(job, own)
    found = [made.train() for _ in range(2 + rounds)][2:]
    if place.cuda:
        row["GB"] = (torch.cuda.max_memory_allocated(place.device) - others) / 1e9
    row |= {"step": median(one["step"] for one in found), "loss": found[-1]["loss"]}
    made.eval()
    row["images/s"] = eval_batch / median(made.eval()["eval_batch"] for _ in range(rounds))
