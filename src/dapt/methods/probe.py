"""The linear probe: logistic regression on frozen image features, with scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dapt.methods.contract import Evidence, HasSettings, Head

# Inverse regularisation strengths tried on held-out images. Features have length one, so useful
# values lie higher than for CLIP's raw ones.
STRENGTHS = tuple(float(10**e) for e in np.arange(-1, 4.5, 0.5))


class LinearProbe(Head):
    """Multinomial logistic regression on frozen image features, which needs no class names.

    Its regularisation is chosen on the support set's val images or, without these, on folds of its
    train images. With too few images per class, a medium value is used. A class without images is
    never predicted.
    """

    fitted, reads_text, without_text, reads_val = True, False, True, True
    closed = "a linear probe, which knows only the classes it was fitted on"
    shapes: ClassVar = {"weight": "CD", "bias": "C"}
    weight: Tensor
    bias: Tensor

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "a linear classifier fitted on its image features"

    def fit(self, evidence: Evidence, settings: HasSettings) -> None:
        """Fit weight (C, D) and bias (C,); ``settings.seed`` is that of the folds."""
        from sklearn.model_selection import StratifiedKFold

        x, y = evidence.support.features.double().numpy(), evidence.support.labels.numpy()
        self.weight = torch.zeros(evidence.classes, x.shape[1])
        self.bias = torch.full((evidence.classes,), -1e4)
        present = np.unique(y)
        if len(present) == 1:
            self.bias[present[0]] = 0
            return
        strength, folds = 100.0, min(3, int(np.bincount(y)[present].min()))
        if (val := evidence.val) is not None:
            vx, vy = val.features.double().numpy(), val.labels.numpy()
            strength = -max((_fit(x, y, c).score(vx, vy), -c) for c in STRENGTHS)[1]
        elif folds >= 2:
            shuffled = StratifiedKFold(folds, shuffle=True, random_state=settings.seed)
            split = list(shuffled.split(x, y))
            strength = -max(
                (float(np.mean([_fit(x[a], y[a], c).score(x[b], y[b]) for a, b in split])), -c)
                for c in STRENGTHS
            )[1]
        # To the optimum: where the solver's usual tolerance stops, the last bit of a feature
        # decides a weight's second digit. The search above compares accuracies, which hardly move.
        model = _fit(x, y, strength, tolerance=1e-8)
        coefficients, intercepts = model.coef_, model.intercept_
        if len(present) == 2:  # scikit-learn keeps one row for two classes
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
            intercepts = np.concatenate([-intercepts, intercepts]) / 2
        self.weight[present] = torch.from_numpy(coefficients).float()
        self.bias[present] = torch.from_numpy(intercepts).float()

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D)."""
        return image @ self.weight.T + self.bias


def _fit(x: np.ndarray, y: np.ndarray, strength: float, tolerance: float = 1e-4) -> Any:
    # Imported here: whoever looks at the table of methods should not wait for it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        # One shot a class is what is meant, not a mistaken regression.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        return LogisticRegression(C=strength, max_iter=1000, tol=tolerance).fit(x, y)
