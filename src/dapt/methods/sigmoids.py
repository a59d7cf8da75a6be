"""Several labels an image: from logits to a probability for each class, and what is named.

Letters in shape comments: n images, r of them held out, C classes. Labels (n, C) are 0 or 1, and
weights say how much each of them counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dapt.errors import UserError

# Images of a class that its own threshold needs to count as much as that of all together.
PATIENCE = 10.0


class Sigmoids(nn.Module):
    """``z = factor l + bias`` of logits l (B, C), whose sigmoids are probabilities.

    Labels whose probabilities reach their class's threshold are named. Until it is fitted, z is l,
    and thresholds are a half.
    """

    factor: Tensor
    bias: Tensor
    thresholds: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(1.0))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("thresholds", torch.full((classes,), 0.5))

    def forward(self, logits: Tensor) -> Tensor:
        """(B, C)."""
        return self.factor * logits + self.bias

    def fit(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """To logits (r, C) of images that were not fitted on."""
        factor, self.bias, _ = calibrated(logits, labels, weights)
        self.factor = torch.tensor(factor)
        self.thresholds = best_thresholds(self(logits).sigmoid(), labels, weights)

    def load(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Take what `state_dict` gave; a `UserError` of ``where`` if it is not that."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != {name: own.shape for name, own in self.state_dict().items()}:
            what = f"what {len(self.bias)} classes of several labels an image need"
            raise UserError(f"{where} does not hold {what}; train again")
        self.load_state_dict(dict(tensors))


def as_everywhere(labels: Tensor, everywhere: Tensor) -> Tensor:
    """(r, C) weights that make labels (r, C) as frequent, class by class, as everywhere (n, C).

    A class that is missing, or with every image, in either of the two keeps its frequency.
    """
    here, there = labels.mean(0), everywhere.mean(0)
    usual = (here * there <= 0) | (here >= 1) | (there >= 1)
    there = torch.where(usual, here, there)
    found = torch.where(labels > 0, there / here, (1 - there) / (1 - here))
    return torch.where(usual, 1.0, found)


def calibrated(
    logits: Tensor, labels: Tensor, weights: Tensor, start: float = 0.0
) -> tuple[float, Tensor, Tensor]:
    """The factor and biases (C,) that make labels most probable, and the cross-entropy they leave.

    ``z = factor l + bias`` of logits (r, C), with one factor, not below zero. Labels are smoothed
    as by Platt (1999), so that a class is not told apart beyond what its few images can say.
    Cross-entropy is (r, C). By Newton's steps from ``start``, halved where they overshoot.
    """
    x, w = logits.double(), weights.double()
    scale = max(float(x.square().mean().sqrt()), 1e-9)
    x, true = x / scale, (w * labels).sum(0)
    false = w.sum(0) - true
    target = torch.where(labels > 0, (true + 1) / (true + 2), 1 / (false + 2))  # (r, C)
    share = ((w * target).sum(0) + 1e-6) / (w.sum(0) + 2e-6)
    factor, bias = start * scale, share.logit() - start * scale * x.mean(0)

    def left(factor: float, bias: Tensor) -> Tensor:
        z = factor * x + bias
        return w * F.binary_cross_entropy_with_logits(z, target, reduction="none")

    now = left(factor, bias)
    for _ in range(30):
        p = (factor * x + bias).sigmoid()
        g, h = w * (p - target), w * p * (1 - p) + 1e-9
        own, mixed = h.sum(0), (h * x).sum(0)  # of biases alone, and with the factor
        slope = float((g * x).sum() - (mixed * g.sum(0) / own).sum())
        curve = float((h * x * x).sum() - (mixed.square() / own).sum())
        step = min(slope / max(curve, 1e-9), factor)
        shift, part = (g.sum(0) - mixed * step) / own, 1.0
        after = left(factor - step, bias - shift)
        while after.sum() > now.sum() and part > 1e-3:
            part /= 2
            after = left(factor - part * step, bias - part * shift)
        gain = float(now.sum() - after.sum())
        if gain <= 0:
            break
        factor, bias, now = factor - part * step, bias - part * shift, after
        if gain < 1e-6 * len(x):
            break
    return factor / scale, bias.float(), now.float()


def best_thresholds(probabilities: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """(C,) thresholds of the highest F1, each drawn to the one of all classes together.

    Of a class with n images its own counts n / (n + `PATIENCE`), in logits.
    """
    classes = zip(probabilities.T, labels.T, weights.T, strict=True)
    own = torch.stack([_threshold(*parts) for parts in classes])
    common = _threshold(probabilities.flatten(), labels.flatten(), weights.flatten())
    count = (weights * labels > 0).sum(0)
    trust = count / (count + PATIENCE)
    return (trust * own.logit() + (1 - trust) * common.logit()).sigmoid()


def _threshold(probabilities: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Midway between those two of (n,) probabilities where F1 is highest."""
    p, order = probabilities.sort(descending=True)
    true, named = (weights * labels)[order].cumsum(0), weights[order].cumsum(0)
    place = int((2 * true / (named + true[-1]).clamp_min(1e-9)).argmax())
    return p[place : place + 2].mean().clamp(1e-4, 1 - 1e-4)


def folds(labels: Tensor, parts: int, most: int) -> list[Tensor]:
    """Images (n, C) in up to ``parts`` lots, each class spread evenly over them; ``most`` in all.

    The rarest classes choose first (Sechidis et al., 2011).
    """
    lots, counts = [list[int]() for _ in range(parts)], torch.zeros(parts, labels.shape[1])
    left = torch.ones(len(labels), dtype=torch.bool)
    for label in labels.sum(0).argsort(stable=True).tolist():
        for image in (left & (labels[:, label] > 0)).nonzero()[:, 0].tolist():
            fewest = min(range(parts), key=lambda k: (float(counts[k, label]), len(lots[k])))
            lots[fewest].append(image)
            counts[fewest] += labels[image]
            left[image] = False
    room = -(-most // parts)
    return [torch.tensor(sorted(lot[:room])) for lot in lots if lot]
