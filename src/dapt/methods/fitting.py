"""What heads share that are fitted by gradient descent, or choose on held-out images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import cos, pi
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Value = TypeVar("Value")

WARMUP_LR = 1e-5
# Where the cosine of `scheduled` ends (the code of CLIP-LoRA, CLIP-SVD and 2SFS).
LEAST_LR = 1e-6


def descend(
    optimizer: torch.optim.Optimizer, rates: Iterable[float], loss: Callable[[int], Tensor]
) -> Iterator[tuple[float, float]]:
    """Take a step at each learning rate; yields the step's loss and rate.

    ``loss`` is asked for that of the step of a number. Gradients of what the optimizer does not
    hold are left to add up.
    """
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()
        optimizer.step()
        yield value.item(), rate


def entropy_of_views(
    head: Callable[[Tensor, Tensor], Tensor],
    views: Tensor,
    labels: Tensor,
    text: Tensor,
    batches: Sequence[tuple[int, Tensor]],
) -> Callable[[int], Tensor]:
    """For `descend`: cross-entropy of what a head says of the batch of a step.

    Views are (V, n, D), not normalised, labels (n,), text (C, D); a batch is a view's number and
    places among its n.
    """

    def loss(step: int) -> Tensor:
        view, part = batches[step]
        images = F.normalize(views[view][part], dim=-1)
        return F.cross_entropy(head(images, text), labels[part])

    return loss


def cosine(lr: float, steps: int, least: float = 0.0) -> list[float]:
    """A learning rate for each step: half a cosine, from ``lr`` to ``least`` after the last."""
    return [cosine_at(step, lr, steps, least) for step in range(steps)]


def cosine_at(step: int, lr: float, steps: int, least: float = 0.0) -> float:
    """That of one step, counted from 0."""
    return least + (lr - least) * (1 + cos(pi * step / steps)) / 2


def learning_rate(epoch: int, epochs: int, lr: float) -> float:
    """CoOp's schedule: epoch 0 at a constant 1e-5, then half a cosine, stepped once an epoch.

    It starts at ``lr`` in epoch 1; with ``epochs`` as its period it ends a little above zero.
    """
    return lr * (1 + cos(pi * (epoch - 1) / epochs)) / 2 if epoch else WARMUP_LR


def scheduled(schedule: str, step: int, lr: float, steps: int, per_epoch: int) -> float:
    """The learning rate of a step, counted from 0, of so many.

    ``warm-cosine`` is CoOp's `learning_rate`, by epochs; ``cosine`` goes from ``lr`` to 1e-6, step
    by step.
    """
    if schedule == "cosine":
        return cosine_at(step, lr, steps, LEAST_LR)
    return learning_rate(step // per_epoch, -(-steps // per_epoch), lr)


def most_accurate(candidates: Iterable[tuple[Value, Tensor]], labels: Tensor) -> Value:
    """The first of (value, (n, C) logits) that is right most often of n labels."""
    right = ((value, int(logits.argmax(-1).eq(labels).sum())) for value, logits in candidates)
    return max(right, key=lambda pair: pair[1])[0]
