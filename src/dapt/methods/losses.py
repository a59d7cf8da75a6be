"""DAPT's losses: inter-dispersion, intra-dispersion, and the prototypes of the latter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dapt.methods.contract import LARGEST, LossTerm, PartSettings, Step

# Classes whose distances to all others are held at once: at 20,000 classes, 80 MB a matrix.
_ROWS = 1000


def inter_dispersion(text_features: Tensor, t: float = 2.0) -> Tensor:
    """Gaussian potential of the classes' text features: small if classes lie far apart.

    Mean over pairs c < c' of ``exp(-t * |w_c - w_c'|²)`` for (C, D) L2-normalised features (the
    inter-dispersion loss of the paper, after Wang and Isola, 2020). Zero for a single class.
    """
    classes = len(text_features)
    if classes < 2:
        return text_features.sum() * 0
    squares = text_features.square().sum(-1)

    def potential(first: int, last: int) -> Tensor:
        """Sum over the pairs of some rows with the classes after each."""
        rows, others = text_features[first:last], text_features[first:]
        distances = squares[first:last, None] + squares[first:] - 2 * rows @ others.T  # (r, C')
        return torch.exp(-t * distances.clamp_min(0)).triu(1).sum()

    pairs = classes * (classes - 1) / 2
    if classes <= _ROWS:
        return potential(0, classes) / pairs
    # Rows in blocks, their (r, C') matrices computed anew in the backward pass.
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    starts = range(0, classes, _ROWS)
    blocks = [checkpoint(potential, i, min(i + _ROWS, classes), **how) for i in starts]
    return torch.stack(blocks).sum() / pairs


def intra_dispersion(image_features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """Mean squared difference between image features and the prototypes of their classes.

    Takes (B, D) L2-normalised features with labels (B,), and (C, D) prototypes from
    `class_prototypes`. The mean runs over images and feature dimensions (the intra-dispersion loss
    of the paper).
    """
    return F.mse_loss(image_features, prototypes[labels])


def class_prototypes(image_features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(C, D) means of each class's normalised support features, without prompts.

    The means are not normalised again.

    Takes (n, D) features with labels (n,). A class without images gets a row of zeros.
    """
    counts = torch.bincount(labels, minlength=classes).clamp_min(1)
    return class_sums(image_features, labels, classes) / counts[:, None]


def class_sums(image_features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(C, D) sums of each class's (n, D) features with labels (n,), or (n, C) of 0 and 1."""
    if labels.dim() == 2:
        return labels.T.to(image_features.dtype) @ image_features
    sums = image_features.new_zeros(classes, image_features.shape[-1])
    return sums.index_add_(0, labels, image_features)


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """(C,) images of each class, by labels (n,), or (n, C) of 0 and 1."""
    return labels.sum(0) if labels.dim() == 2 else torch.bincount(labels, minlength=classes)


class IntraSettings(PartSettings):
    """Of intra-dispersion."""

    beta_visual: float = Field(ge=0, le=LARGEST, description="weight of intra-dispersion")


class PotentialSettings(PartSettings):
    """Of inter-dispersion, whatever weighs it."""

    rbf_t: float = Field(2.0, gt=0, le=LARGEST, description="sharpness t of inter-dispersion")


class InterSettings(PotentialSettings):
    """Of inter-dispersion."""

    beta_text: float = Field(ge=0, le=LARGEST, description="weight of inter-dispersion")


def _intra(step: Step) -> Tensor:
    return intra_dispersion(step.image_features, step.labels, step.prototypes)


def _inter(step: Step) -> Tensor:
    """Mean over pairs of classes of ``exp(-t |w_c - w_c'|²)``, where w are their text features.

    It is small if classes lie far apart (the inter-dispersion loss of the paper).
    """
    t, text = step.settings.of(PotentialSettings).rbf_t, step.text_features
    # Of class features made for each image (B, C, D), a mean over images.
    sets = text.reshape(-1, *text.shape[-2:])
    return torch.stack([inter_dispersion(features, t) for features in sets]).mean()


INTRA = LossTerm("intra", "beta_visual", _intra, IntraSettings, (1.0, 0.1, 10.0), "image")
INTER = LossTerm("inter", "beta_text", _inter, InterSettings, (1.0, 10.0), "text")

# Terms that any method which learns may take too, weighed by their own names in loss_weights.
ADDABLE = {
    "inter": replace(INTER, weight="inter", Settings=PotentialSettings),
    "intra": replace(INTRA, weight="intra", Settings=PartSettings),
}
