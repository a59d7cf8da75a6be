"""The linear probe: logistic regression on frozen image features, by scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from dapt.errors import UserError
from dapt.methods.contract import Evidence, HasSettings, Head, Tensors

# Inverse regularisation strengths tried on held-out images. Features have length one, so useful
# values lie higher than for CLIP's raw ones.
STRENGTHS = tuple(float(10**e) for e in np.arange(-1, 4.5, 0.5))


class LinearProbe(Head):
    """Logistic regression on frozen image features, which needs no class names."""

    fitted = True
    reads_text = False
    closed = "a linear probe, which knows only the classes it was fitted on"
    weight: Tensor
    bias: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__(scale)
        self.register_buffer("weight", torch.zeros(0, 0))
        self.register_buffer("bias", torch.zeros(0))

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """What a model card says of it."""
        return "a linear classifier fitted on its image features"

    def fit(self, evidence: Evidence, settings: HasSettings) -> None:
        """`fit_probe` on the support images in the plain view."""
        support, val = evidence.support, evidence.val
        held = None if val is None else (val.features, val.labels)
        self.weight, self.bias = fit_probe(
            support.features, support.labels, held, evidence.classes, settings.seed
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D)."""
        return image @ self.weight.T + self.bias

    def load(self, tensors: Tensors, classes: int, dimension: int, where: str) -> None:
        """A weight (C, D) and a bias (C,)."""
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != (len(weight),):
            raise UserError(f"{where} is no probe of {classes} classes; train again")
        if len(weight) != classes:
            raise UserError(f"{where} is no probe of {classes} classes; train again")
        if weight.shape[1] != dimension:
            raise UserError(f"{where} does not fit the backbone's features; train again")
        self.weight, self.bias = weight.float(), bias.float()


def fit_probe(
    features: Tensor,
    labels: Tensor,
    val: tuple[Tensor, Tensor] | None,
    classes: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Fit a multinomial logistic regression; its strength is chosen on held-out images.

    Held out are the support set's val images, else folds of the train images, else (too few
    images a class) a middle strength is taken.

    Args:
        features: (n, D) normalised; ``labels``: (n,).
        val: the same of held-out images, (m, D) and (m,), or None.
        classes: C; a class without images gets a bias that never wins.
        seed: of the folds.

    Returns:
        weight (C, D) and bias (C,).
    """
    x, y = features.double().numpy(), labels.numpy()
    weight = torch.zeros(classes, x.shape[1])
    bias = torch.full((classes,), -1e4)
    present = np.unique(y)
    if len(present) == 1:
        bias[present[0]] = 0
        return weight, bias

    if val is not None:
        vx, vy = val[0].double().numpy(), val[1].numpy()
        scores = [(_fit(x, y, c).score(vx, vy), -c) for c in STRENGTHS]
        strength = -max(scores)[1]
    elif (folds := min(3, int(np.bincount(y)[present].min()))) >= 2:
        split = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y))
        scores = [
            (float(np.mean([_fit(x[a], y[a], c).score(x[b], y[b]) for a, b in split])), -c)
            for c in STRENGTHS
        ]
        strength = -max(scores)[1]
    else:
        strength = 100.0
    # To the optimum: where the solver's usual tolerance stops, the last bit of a feature decides a
    # weight's second digit. The search above compares accuracies, which hardly move.
    model = _fit(x, y, strength, tolerance=1e-8)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(present) == 2:  # scikit-learn keeps one row for two classes
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight[present] = torch.from_numpy(coefficients).float()
    bias[present] = torch.from_numpy(intercepts).float()
    return weight, bias


def _fit(
    x: np.ndarray, y: np.ndarray, strength: float, tolerance: float = 1e-4
) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        # One shot a class is what is meant, not a mistaken regression.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        return LogisticRegression(C=strength, max_iter=1000, tol=tolerance).fit(x, y)
