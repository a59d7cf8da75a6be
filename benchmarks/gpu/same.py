"""Whether a GPU finds what the CPU finds: features, gradients, heads, accuracy.

Only what needs no package but torch is imported here; checks import the rest themselves.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.checks import Check, Figures, Place

NEAR = 1e-4  # relative, of fp32
POINT = 0.01  # of test accuracy
_TUNED = ("dapt", "maple", "clip-lora", "auto")


def method_names(*, learns: bool) -> list[str]:
    """Rows of the table that learn in the towers, or those whose head is fitted to the frozen one.

    Without the packages that the table needs, one stands for all.
    """
    try:
        from dapt.methods import METHODS
    except ModuleNotFoundError:
        return ["dapt" if learns else "auto"]
    return [n for n, row in METHODS.items() if row.learns == learns and (learns or not row.still)]


def features() -> list[Check]:
    """Of images and class names."""
    return [Check("features", size, partial(_features, size)) for size in ("bundled", "large")]


def gradients(size: str) -> list[Check]:
    """Of one step of each method that learns."""
    names = method_names(learns=True)
    return [Check("gradients", f"{size} {name}", partial(_gradients, size, name)) for name in names]


def heads() -> list[Check]:
    """Logits of each head that is fitted."""
    names = method_names(learns=False)
    return [Check("heads", name, partial(_head, name)) for name in names]


def accuracy() -> list[Check]:
    """After some steps on the bundled task, in each precision."""
    return [Check("accuracy", name, partial(_accuracy, name)) for name in _TUNED]


def _weights(size: str, place: Place) -> tuple[str, str | None]:
    return place.large if size == "large" else ("bundled", None)


@torch.no_grad()
def _features(size: str, place: Place) -> tuple[Figures, str]:
    from benchmarks.gpu import models
    from dapt.engine.step import noise

    def of(device: str, precision: str) -> list[torch.Tensor]:
        own = models.backbone(*_weights(size, place), device, precision)
        classifier = models.plain_classifier(own)
        found = classifier.image_features(noise(own, 8)), classifier.text_features()
        return [tensor.cpu() for tensor in found]

    expected, figures = of("cpu", "fp32"), dict[str, Any]()
    for precision in ("fp32", "bf16", "fp16"):
        pairs = zip(("image", "text"), of(place.device, precision), expected, strict=True)
        for tower, found, wanted in pairs:
            figures[f"{tower} {precision}"] = models.apart(found, wanted)
    wrong = [n for n, far in figures.items() if far > (NEAR if n.endswith("fp32") else 0.1)]
    return figures, f"too far from the CPU's: {_told(figures, wrong)}" if wrong else ""


def _told(figures: Figures, names: list[str]) -> str:
    return ", ".join(f"{name} {figures[name]:.2g}" for name in names)


def _gradients(size: str, method: str, place: Place) -> tuple[Figures, str]:
    from benchmarks.gpu import models
    from dapt.clip.inside import Pass
    from dapt.engine.step import noise

    def of(device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        own = models.backbone(*_weights(size, place), device)
        tuner = models.new_tuner(own, method)
        labels = torch.tensor([0, 3, 1, 4])
        total = tuner.losses(noise(own, 4), labels, Pass(images=4))[0]
        total.backward()
        return total.detach(), {n: p.grad for n, p in tuner.named.items() if p.grad is not None}

    (wanted, expected), (loss, found) = of("cpu"), of(place.device)
    # Of what hardly moves, a share of the largest gradient is compared, not of its own.
    least = 1e-3 * models.furthest(float(g.norm()) for g in expected.values())
    each = {n: models.apart(found[n], g, least) for n, g in expected.items() if n in found}
    figures = {"loss": models.apart(loss, wanted), "gradient": models.furthest(each.values())}
    if found.keys() != expected.keys() or not expected:
        return figures, "gradients reach other tensors than on the CPU"
    wrong = [name for name, far in figures.items() if far > NEAR]
    return figures, f"too far from the CPU's: {_told(figures, wrong)}" if wrong else ""


def _head(method: str, place: Place) -> tuple[Figures, str]:
    """Fitted to what each device makes of noise, four images of each class."""
    from benchmarks.gpu import models
    from dapt.engine.classifier import new_classifier
    from dapt.engine.step import noise
    from dapt.methods import Evidence, get_method
    from dapt.methods.contract import Examples

    def of(device: str) -> torch.Tensor:
        own, few = models.backbone("bundled", None, device), {"looks": 2, "prolip_views": 1}
        settings, row = models.settings_of(method, **few, prolip_steps=2), get_method(method)
        made = new_classifier(own, models.NAMES, models.TEMPLATE, row, settings)
        with torch.no_grad():
            raw = made.image_features(noise(own, 4 * len(models.NAMES)), normalized=False).cpu()
            text, lengths = made.text_features().cpu(), made.text_lengths().cpu()
        support = Examples(F.normalize(raw, dim=-1), torch.arange(len(raw)) % len(models.NAMES))
        views = lambda count: raw.expand(count, -1, -1)  # noqa: E731
        evidence = Evidence(support, None, text, own.logit_scale, views, lengths)
        made.head.fit(evidence, settings)
        made.head.to(own.device)
        with torch.no_grad():
            return made(noise(own, 8)).softmax(-1).cpu()

    far = float((of(place.device) - of("cpu")).abs().max())
    # Heads of many steps, or that choose among candidates, make more of a last bit.
    return {"probability": far}, f"a probability is {far:.2g} off" if not far <= 1e-2 else ""


def _accuracy(method: str, place: Place) -> tuple[Figures, str]:
    from benchmarks.gpu import models
    from dapt.engine.data import open_data
    from dapt.engine.evaluate import classify
    from dapt.engine.features import Shared
    from dapt.engine.fit import fit

    few = {"shots": 1, "steps": 2, "looks": 2} if place.quick else {"shots": 4, "steps": 20}
    data = open_data(models.settings_of(method, **few))
    if place.quick:
        data = replace(data, task=replace(data.task, test=data.task.test[:40]))
    truth = torch.tensor([item.label for item in data.task.test])

    def of(device: str, precision: str) -> float:
        settings = models.settings_of(method, device=device, precision=precision, **few)
        shared = Shared(models.backbone("bundled", None, device, precision))
        classifier = fit(data, settings, shared=shared).classifier
        store = shared.store(data.task, data.task.test, settings)
        return float((classify(classifier, store).argmax(-1) == truth).double().mean())

    figures = {"cpu": of("cpu", "fp32")}
    figures |= {precision: of(place.device, precision) for precision in ("fp32", "bf16", "fp16")}
    most = max(POINT, 2.5 / len(truth) if place.quick else 0.0)
    wrong = [name for name, found in figures.items() if abs(found - figures["cpu"]) > most]
    return figures, f"more than a point from the CPU's: {', '.join(wrong)}" if wrong else ""
