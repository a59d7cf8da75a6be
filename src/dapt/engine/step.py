"""One tuning step: cross-entropy plus the method's loss terms, gradients, SGD on the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor

from dapt.engine.classifier import PromptedClassifier
from dapt.engine.ranks import Ranks
from dapt.methods import LOSS_TERMS, Batch, Method

WARMUP_LR = 1e-5


def learning_rate(epoch: int, epochs: int, lr: float) -> float:
    """Published schedule: epoch 0 at a constant 1e-5, then a cosine over all epochs.

    The cosine starts at ``lr`` in epoch 1 and is stepped once an epoch; with ``epochs`` as its
    period it ends a little above zero.
    """
    if epoch == 0:
        return WARMUP_LR
    return lr * (1 + cos(pi * (epoch - 1) / epochs)) / 2


@dataclass(frozen=True)
class StepResult:
    """Losses of one step, as plain numbers: the total, its parts, and the batch accuracy."""

    total: float
    cross_entropy: float
    terms: dict[str, float]
    accuracy: float


class Tuner:
    """Prompts of a classifier under SGD.

    Args:
        classifier: whose prompts are tuned, in place.
        method: which loss terms are added to cross-entropy.
        weights: loss term -> its weight (beta).
        prototypes: (C, D) class prototypes; only read where a term needs them.
        momentum, weight_decay: of SGD.
        rbf_t: sharpness of inter-dispersion.
        dropout: on the visual prompt.
        ranks: the processes that share each batch.
    """

    def __init__(
        self,
        classifier: PromptedClassifier,
        method: Method,
        weights: dict[str, float],
        prototypes: Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        rbf_t: float = 2.0,
        dropout: float = 0.0,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.classifier, self.method, self.weights = classifier, method, weights
        self.prototypes, self.rbf_t, self.dropout = prototypes, rbf_t, dropout
        self.named = dict(classifier.prompts.named_parameters())
        self.optimizer = torch.optim.SGD(
            self.named.values(), lr=0.0, momentum=momentum, weight_decay=weight_decay
        )

    def losses(
        self,
        views: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        among: tuple[int, slice] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Total loss, its parts by name, and the logits (B, C) of one batch, or a part of it."""
        labels = labels.to(self.prototypes.device)
        image = self.classifier.image_features(
            views, dropout=self.dropout, generator=generator, among=among
        )
        text = self.classifier.text_features()
        logits = self.classifier.logits(image, text)
        batch = Batch(image, text, labels, self.prototypes, self.rbf_t)
        parts = {"cross_entropy": F.cross_entropy(logits, labels)}
        total = parts["cross_entropy"]
        for name in self.method.terms:
            parts[name] = LOSS_TERMS[name](batch)
            total = total + self.weights[name] * parts[name]
        return total, parts, logits

    def step(
        self,
        views: Tensor,
        labels: Tensor,
        lr: float,
        generator: torch.Generator | None = None,
        among: tuple[int, slice] | None = None,
    ) -> StepResult:
        """Take one step at learning rate ``lr`` on views (B, 3, S, S) with labels (B,).

        Where processes share the batch, ``among`` is its size and this one's part. Each loss is a
        mean over images, or the same in all: weighed by the share of images, their gradients sum
        to that of the whole batch.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        total, parts, logits = self.losses(views, labels, generator, among)
        share = len(labels) / among[0] if among else 1.0
        (total * share if among else total).backward()
        self.ranks.sum_gradients(self.named.values())
        self.optimizer.step()
        accuracy = (logits.argmax(-1) == labels.to(logits.device)).float().mean()
        # One transfer for all numbers, not one each.
        found = torch.stack([total, accuracy, *parts.values()]).detach()
        values = (self.ranks.sum(found * share) if among else found).tolist()
        named = dict(zip(parts, values[2:], strict=True))
        return StepResult(values[0], named.pop("cross_entropy"), named, values[1])

    def state(self) -> dict[str, Tensor]:
        """Prompts and their momentum: all that a later step depends on."""
        tensors = {f"prompt.{name}": p.detach() for name, p in self.named.items()}
        for name, parameter in self.named.items():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum.{name}"] = buffer
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Whether this is a state of these very prompts."""
        known = {f"prompt.{name}": p.shape for name, p in self.named.items()}
        momentum = {f"momentum.{name}": p.shape for name, p in self.named.items()}
        found = {name: tensor.shape for name, tensor in state.items()}
        return (
            known.items() <= found.items()
            and found.items() <= {**known, **momentum}.items()
            and all(tensor.dtype == torch.float32 for tensor in state.values())
        )

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state[f"prompt.{name}"])
                if (momentum := state.get(f"momentum.{name}")) is not None:
                    self.optimizer.state[parameter]["momentum_buffer"] = momentum.to(
                        parameter.device
                    ).clone()
