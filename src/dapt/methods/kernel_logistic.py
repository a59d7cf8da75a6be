"""Logistic regression with a kernel, on top of a linear classifier that is there already."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dapt.methods.kernel_ridge import Ridge, similarity

STEPS = 8  # of L-BFGS; three times as many change no figure
# A kernel's axes of less strength than that are left out: penalties leave nothing of them.
WEAKEST = 1e-3


class Logistic:
    """Multinomial logistic regressions ``x·weight + k(x) values`` in a ridge's kernel.

    The first is fitted to all images, and one more to those without each of some ``folds``, all at
    once: J in all, with ``weights`` (J, C, D). The values make cross-entropy, summed over images,
    and ``penalty / 2 · tr(valuesᵀ K values)`` smallest.
    """

    def __init__(self, ridge: Ridge, weights: Tensor, folds: list[Tensor]) -> None:
        self.ridge, self.weight, self.folds = ridge, weights[0], folds
        strong = ridge.strengths > WEAKEST
        self.mapped, self.back = ridge.mapped[:, strong].float(), ridge.back[:, strong]  # (n, k)
        self.strengths = ridge.strengths[strong].float()
        self.base = ridge.features @ weights.mT  # (J, n, C)
        self.onehot = F.one_hot(ridge.labels, weights.shape[1]).float()
        self.counted = torch.ones(*self.base.shape[:2], 1)
        for number, left_out in enumerate(folds, 1):
            self.counted[number, left_out] = 0
        self.solved = self.base.new_zeros(len(weights), len(self.strengths), weights.shape[1])

    def fit(self, penalty: float) -> None:
        """By L-BFGS, from what the last penalty gave, in coordinates where no step is too long."""
        from scipy.optimize import minimize  # takes long to load; torch's takes seconds

        # The curvature of cross-entropy is half the kernel's at most (Böhning, 1992).
        scale = (self.strengths / 2 + penalty).rsqrt()[:, None]

        def loss(unknown: np.ndarray) -> tuple[float, np.ndarray]:
            solved = scale * torch.from_numpy(unknown).float().view_as(self.solved)  # (J, k, C)
            logs = (self.base + self.mapped @ solved).log_softmax(-1)
            wrong = self.counted * (logs.exp() - self.onehot)
            slope = scale * (self.mapped.T @ wrong + penalty * solved)
            missed = -(self.counted * self.onehot * logs).sum()
            value = missed + penalty / 2 * solved.square().sum()
            return float(value), slope.flatten().double().numpy()

        start = (self.solved / scale).flatten().double().numpy()
        options = {"maxiter": STEPS, "maxcor": STEPS}
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
        self.solved = scale * torch.from_numpy(found).float().view_as(self.solved)

    @property
    def values(self) -> Tensor:
        """(m, C) of the one that knows all images, in double precision."""
        return self.back @ self.solved[0].double()

    def answers(self, image: Tensor) -> Tensor:
        """(B, C) logits of features (B, D) by the one that knows all images."""
        kernel = similarity(image, self.ridge.keys, self.ridge.width).double()
        return image @ self.weight.T + (kernel @ self.values).float()

    def held_out(self) -> Tensor:
        """(n, C) logits of images, each by the one that does not know it; zero outside folds."""
        logits, found = self.base + self.mapped @ self.solved, torch.zeros_like(self.base[0])
        for number, left_out in enumerate(self.folds, 1):
            found[left_out] = logits[number, left_out]
        return found
