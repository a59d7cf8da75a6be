"""Inter-dispersion, intra-dispersion, and the prototypes the latter gathers images around."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def inter_dispersion(text_features: Tensor, t: float = 2.0) -> Tensor:
    """Gaussian potential of class text features: small where classes lie far apart.

    Mean over pairs c < c' of ``exp(-t * |w_c - w_c'|²)`` (the inter-dispersion loss of the
    paper, after Wang and Isola, 2020). Zero for a single class.

    Args:
        text_features: (C, D), L2-normalised.
        t: sharpness of the potential.
    """
    classes = len(text_features)
    if classes < 2:
        return text_features.sum() * 0
    squares = text_features.square().sum(-1)
    distances = squares[:, None] + squares[None] - 2 * text_features @ text_features.T  # (C, C)
    # The diagonal is no pair; everything else counts twice, above and below.
    potential = torch.exp(-t * distances.clamp_min(0))
    potential = potential.masked_fill(
        torch.eye(classes, dtype=torch.bool, device=potential.device), 0
    )
    return potential.sum() / (classes * (classes - 1))


def intra_dispersion(image_features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """Mean squared difference of image features from their class prototype.

    The mean runs over batch and feature dimensions (the intra-dispersion loss of the paper).

    Args:
        image_features: (B, D), L2-normalised.
        labels: (B,) class of each.
        prototypes: (C, D), from `class_prototypes`.
    """
    return F.mse_loss(image_features, prototypes[labels])


def class_prototypes(image_features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of each class's normalised, un-prompted support features; not normalised again.

    Args:
        image_features: (n, D), L2-normalised features of the support set.
        labels: (n,).
        classes: C; a class without images gets a zero row.

    Returns:
        (C, D).
    """
    sums = image_features.new_zeros(classes, image_features.shape[-1])
    sums.index_add_(0, labels, image_features)
    counts = torch.bincount(labels, minlength=classes).clamp_min(1)
    return sums / counts[:, None]
