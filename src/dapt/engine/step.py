"""One tuning step: cross-entropy plus the method's loss terms, gradients, SGD or AdamW."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import median

import torch
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.clip.image import image_features
from dapt.clip.inside import Pass
from dapt.clip.text import ClassTokens, TextEncoder
from dapt.engine.classifier import Classifier
from dapt.engine.processes import free_memory, join_processes
from dapt.methods import Head, Step, get_method
from dapt.methods.fitting import WARMUP_LR as WARMUP_LR
from dapt.methods.fitting import learning_rate as learning_rate
from dapt.settings import Settings, loss_terms, loss_weights


@dataclass(frozen=True)
class StepResult:
    """Losses of one step, as plain numbers: the total, its parts, and the batch accuracy."""

    total: float
    cross_entropy: float
    terms: dict[str, float]
    accuracy: float


class Tuner:
    """What a classifier learns, in place, by gradient descent; ``prototypes`` are (C, D).

    Where ``torchrun`` started several processes, each takes its part of every batch.
    """

    def __init__(self, classifier: Classifier, settings: Settings, prototypes: Tensor) -> None:
        self.classifier, self.settings = classifier, settings
        self.method = get_method(settings.method)
        self.terms, self.weights = loss_terms(settings), loss_weights(settings)
        self.prototypes = prototypes.to(classifier.backbone.device)
        self.processes = join_processes()
        self.named = classifier.learned()
        self._frozen: dict[str, Tensor] = {}
        self._kept = _KEPT[settings.optimizer]
        self.optimizer = new_optimizer(self.named.values(), settings)
        images = -(-settings.batch_size // self.processes.count)
        wanted, free = classifier.kept_bytes(images), free_memory(self.prototypes.device)
        # To the same bits: what is free now may decide.
        short = free is not None and wanted > _SHARE_OF_FREE * free
        self.recompute = short if settings.recompute is None else settings.recompute

    def frozen_text(self, *templates: str) -> Tensor:
        """(T, C, D) of the classes in templates, not normalised; made when first asked for."""
        own = self.classifier
        for template in (templates := templates or (own.template,)):
            if template not in self._frozen:
                tokens = ClassTokens.for_template(own.backbone, own.class_names, template)
                with torch.no_grad():
                    self._frozen[template] = TextEncoder(own.backbone, tokens)()
        return torch.stack([self._frozen[template] for template in templates])

    def losses(
        self, views: Tensor, labels: Tensor, now: Pass | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Total loss, its parts by name, and the logits (B, C) of one batch, or a part of it."""
        classifier, labels = self.classifier, labels.to(self.prototypes.device)
        now = replace(now or Pass(images=len(views)), recompute=self.recompute)
        image = classifier.image_features(views, now)
        text = classifier.text_features(image, now)
        logits = classifier.logits(image, text)
        step = Step(
            image, text, labels, logits, self.prototypes, self.settings,
            frozen_image=cache(partial(image_features, classifier.backbone, views)),
            frozen_text=self.frozen_text, logits_of=classifier.logits,
        )  # fmt: skip
        parts = {"cross_entropy": (total := self.method.loss(step))}
        for term in self.terms:
            parts[term.name] = term.compute(step)
            total = total + self.weights[term.name] * parts[term.name]
        return total, parts, logits

    def step(
        self,
        views: Tensor,
        labels: Tensor,
        lr: float,
        generator: torch.Generator | None = None,
        images: int | None = None,
    ) -> StepResult:
        """Take one step at learning rate ``lr`` on views (B, 3, S, S) with labels (B,).

        Where processes share a batch, ``images`` is its size and these views are this one's part.
        Each loss is a mean over images, or the same in all: weighed by the share of images, their
        gradients sum to that of the whole batch.
        """
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        alone, whole = self.processes.alone, images or len(views)
        part = slice(None) if alone else self.processes.part(range(whole))
        total, parts, logits = self.losses(views, labels, Pass(generator, whole, part))
        share = len(labels) / whole
        (total if alone else total * share).backward()
        for parameter in self.named.values():
            if parameter.grad is not None:
                self.processes.sum(parameter.grad)
        self.optimizer.step()
        accuracy = (logits.argmax(-1) == labels.to(logits.device)).float().mean()
        # One transfer for all numbers, not one each.
        found = torch.stack([total, accuracy, *parts.values()]).detach()
        values = (found if alone else self.processes.sum(found * share)).tolist()
        named = dict(zip(parts, values[2:], strict=True))
        return StepResult(values[0], named.pop("cross_entropy"), named, values[1])

    def state(self) -> dict[str, Tensor]:
        """What is learned, and its momentum: all that a later step depends on."""
        tensors = {name: p.detach() for name, p in self.named.items()}
        for name, parameter in self.named.items():
            for key, kept in self._kept.items():
                if (value := self.optimizer.state[parameter].get(key)) is not None:
                    tensors[f"{kept}.{name}"] = value
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Whether this is a state of what this very classifier learns."""
        known = {name: tuple(p.shape) for name, p in self.named.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        form, kept = known.copy(), self._kept.values()
        for name, shape in known.items():  # of each parameter all that is kept, or nothing yet
            own = {f"{kind}.{name}": () if kind == "step" else shape for kind in kept}
            form |= own if own.keys() & found else {}
        return form == found and all(tensor.dtype == torch.float32 for tensor in state.values())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state[name])
                for key, kept in self._kept.items():
                    if (value := state.get(f"{kept}.{name}")) is not None:
                        place = "cpu" if key == "step" else parameter.device  # as torch has it
                        self.optimizer.state[parameter][key] = value.to(place, copy=True)


# Of what is free, what layers may keep: a step needs more than they.
_SHARE_OF_FREE = 0.7

# What optimisers know of a parameter, by torch's names and by those in a checkpoint.
_KEPT = {
    "sgd": {"momentum_buffer": "momentum"},
    "adamw": {"exp_avg": "momentum", "exp_avg_sq": "squares", "step": "step"},
}


def new_optimizer(parameters: Iterable[Tensor], settings: Settings) -> torch.optim.Optimizer:
    """As settings say; the rate is given with each step."""
    decay = settings.weight_decay
    if settings.optimizer == "adamw":  # beta 0.9 and 0.999, eps 1e-8
        return torch.optim.AdamW(parameters, 0.0, weight_decay=decay)
    return torch.optim.SGD(parameters, 0.0, settings.momentum, weight_decay=decay)


_TIMED = 3  # steps, after one that pays for memory and kernels


def step_seconds(classifier: Classifier, settings: Settings, images: int) -> float:
    """Seconds that a step on so many images takes, by a few on noise that teach nothing.

    The classifier is of no use after it: it has the head that steps are taken with.
    """
    classifier.head = Head(classifier.backbone.logit_scale)
    prototypes = torch.zeros(len(classifier.class_names), classifier.text_features().shape[1])
    tuner, seconds = Tuner(classifier, settings, prototypes), list[float]()
    views, labels = noise(classifier.backbone, images), torch.zeros(images, dtype=torch.long)
    for _ in range(1 + _TIMED):
        started = time.perf_counter()
        tuner.step(views, labels, 0.0, torch.Generator().manual_seed(0))
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


def noise(backbone: Backbone, images: int) -> Tensor:
    """Views (B, 3, S, S) of nothing."""
    shape, drawn = [backbone.preprocessing.size] * 2, torch.Generator().manual_seed(0)
    return torch.randint(256, (images, 3, *shape), dtype=torch.uint8, generator=drawn)
