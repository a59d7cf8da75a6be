"""What a backbone's features say of photos: copies, doubtful labels, outliers, classes alike.

Whatever compares images with images goes tile by tile: nothing here is as large as their square.

Letters in shape comments: n images, D embedding dimension, C classes, r images of a tile, m
landmarks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.clip.image import image_features
from dapt.data import ImageStore, Task
from dapt.data.items import PARTS, content_groups
from dapt.engine.classifier import Classifier
from dapt.engine.features import encode_store
from dapt.errors import UserError
from dapt.progress import Advance, Reporter, nothing

_TILE = 1024
_THUMBNAIL = 16  # px
# Two images are copies if the model sees the same and small colour thumbnails, with values in
# 0 .. 1, differ by a mean square of 3 % squared. Of the 924 drawings of the bundled task, saved as
# JPEG (quality 75), at half and twice the size, or mirrored, all are found so.
_COPY_COSINE, _COPY_PIXELS = 0.9, 0.001
# Of the ridge regression behind `label_doubts`; chosen on the bundled task with swapped labels.
_SHARPNESS, _RIDGE, _TEXT_HEAT, _COLD = 4.0, 0.3, 2.0, 4.0
_LANDMARKS = 2000
_DOUBT = 2.0  # times as likely as the label another class must be for an image to be told of
_NEIGHBOURS, _FAR = 10, 2.5  # of outliers; in robust standard deviations below the median
SAME_TEXT = 0.98  # cosine of class features from which their names mean the same to the model
_SAME_IMAGES = 0.3  # of two classes, share of images nearer to the other from which they are alike
_RIVALS = 20  # classes nearer to an image than its own that are counted


@dataclass(frozen=True)
class Photo:
    """Which image is meant."""

    part: str  # train, val or test
    path: str
    class_name: str


@dataclass(frozen=True)
class Copy:
    """Two images that are one: the "same file", a "near copy", or "mirrored"."""

    kind: str
    cosine: float
    first: Photo
    second: Photo

    @property
    def parts(self) -> tuple[str, str]:
        """Where the two are."""
        return self.first.part, self.second.part

    @property
    def leaks(self) -> bool:
        """Whether one of the two is a test image, and the other is not."""
        return self.parts.count("test") == 1

    @property
    def labels_differ(self) -> bool:
        """Whether one of the two labels is wrong."""
        return self.first.class_name != self.second.class_name


@dataclass(frozen=True)
class Doubt:
    """An image whose label looks wrong: ``score`` is -log of the label's held-out probability."""

    photo: Photo
    guess: str
    score: float


@dataclass(frozen=True)
class Outlier:
    """An image unlike all others: its mean cosine with the nearest ones."""

    photo: Photo
    cosine: float


@dataclass(frozen=True)
class Alike:
    """Two classes that the model hardly tells apart.

    By the cosine of their names' text features, and the share of both classes' images that are
    nearer to the other class's centre than to that of their own class without them (chance: 0.5).
    """

    classes: tuple[str, str]
    text_cosine: float | None  # None where the backbone reads no text
    confused: float


@dataclass
class Findings:
    """All of it, the worst of a kind first; ``notes`` say what could not be looked at."""

    backbone: str
    images: int
    copies: list[Copy] = field(default_factory=list)
    labels: list[Doubt] = field(default_factory=list)
    outliers: list[Outlier] = field(default_factory=list)
    classes: list[Alike] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    to_json = asdict


def look_at_photos(
    task: Task, backbone: Backbone, reporter: Reporter | None = None, *, batch_size: int = 100
) -> Findings:
    """Encode a task's images and say which photos and labels need a second look.

    Labels, and classes that are alike, are judged by train and val images alone; copies and
    outliers are looked for in all parts. Images that cannot be read are left out and recorded.

    Raises:
        UserError: no image can be read, or a class name does not fit the text tower.
    """
    reporter = reporter or Reporter()
    listed = [(part, item) for part in PARTS for item in getattr(task, part)]
    sources, bad = [task.source(item) for _, item in listed], dict[int, str]()
    store = ImageStore(sources, **backbone.preprocessing.of_views(), grey=task.grey)
    small: list[Tensor] = []
    with reporter.stage(f"{task.name}: encode images", len(store)) as advance:
        how: dict[str, Any] = {"batch_size": batch_size, "advance": advance, "unreadable": bad}
        features = encode_store(partial(_encode, backbone, small), store, **how)
    kept = [i for i in range(len(store)) if i not in bad]
    if not kept:
        raise UserError(f"{bad[0]} (nor can any other image of '{task.name}')")
    features, thumbnails = features[kept], torch.cat(small)[kept]
    names = task.class_names
    photos = [
        Photo(part, item.path, " | ".join(names[k] for k in item.labels)) for part, item in listed
    ]
    found = Findings(backbone.name, len(kept))
    found.skipped = [{"image": photos[i].path, "reason": bad[i]} for i in sorted(bad)]
    seen = [photos[i] for i in kept]
    with reporter.stage(f"{task.name}: compare images", 2 * len(kept)) as advance:
        contents = content_groups([sources[i] for i in kept])
        found.copies = _copies(seen, features, thumbnails, contents, advance)
        found.outliers = _outliers(seen, features, found.notes, advance)
    text = Classifier(backbone, task.class_names, template=task.template).text_features().cpu()
    known = [place for place, photo in enumerate(seen) if photo.part != "test"]
    labels = torch.tensor([listed[kept[place]][1].label for place in known])
    with reporter.stage(f"{task.name}: judge labels", None):
        tuned = [seen[place] for place in known]
        _judge(found, task, tuned, labels, features[known], text, backbone.logit_scale)
    return found


def _encode(backbone: Backbone, small: list[Tensor], views: Tensor) -> Tensor:
    """(B, D) features of (B, 3, S, S) views, whose thumbnails join the ``small`` ones."""
    small.append(F.adaptive_avg_pool2d(views.float(), _THUMBNAIL).round().byte())
    return image_features(backbone, views)


def _copies(
    photos: Sequence[Photo], features: Tensor, small: Tensor, contents: Sequence[int], tell: Advance
) -> list[Copy]:
    """Those that let test images be tuned on first, then by labels that differ and by likeness."""
    found = [
        Copy(kind, round(float(features[i] @ features[j]), 4), photos[j], photos[i])
        for i, j, kind in find_copies(features, small, contents, tell)
    ]
    kinds = ("same file", "near copy", "mirrored")

    def rank(copy: Copy) -> tuple[Any, ...]:
        return (
            not copy.leaks,
            len(set(copy.parts)) == 1,
            not copy.labels_differ,
            kinds.index(copy.kind),
            -copy.cosine,
        )

    return sorted(found, key=rank)


def find_copies(
    features: Tensor, small: Tensor, contents: Sequence[int], advance: Advance = nothing
) -> list[tuple[int, int, str]]:
    """Each image that has an earlier copy, with the earliest of those, and what kind it is.

    So a group of k equal images gives k - 1 pairs, and a test image that is in train is told with
    that one, where test images come last. Features are (n, D), of length one, thumbnails
    (n, 3, S, S) uint8; ``contents`` gives each image the first one of the very same file.
    """
    found = []
    for start in range(0, len(features), _TILE):
        rows = slice(start, min(start + _TILE, len(features)))
        for i, j, flipped in _earliest_alike(features, small, rows):
            kind = "mirrored" if flipped else "near copy"
            found.append((i, j, "same file" if contents[i] == contents[j] else kind))
        advance(rows.stop - rows.start)
    return found


def _earliest_alike(features: Tensor, small: Tensor, rows: slice) -> Iterator[tuple[int, int, int]]:
    """Of ``rows`` each image that has an earlier one alike: both, and whether one is mirrored."""
    own, places = small[rows].flatten(1) / 255, torch.arange(rows.start, rows.stop)[:, None]
    done = torch.zeros(len(own), dtype=torch.bool)
    for start in range(0, rows.stop, _TILE):
        others = slice(start, min(start + _TILE, rows.stop))
        near = features[rows] @ features[others].T >= _COPY_COSINE  # (r, r)
        near &= (torch.arange(others.start, others.stop) < places) & ~done[:, None]
        if not near.any():
            continue
        both = (small[others], small[others].flip(-1))
        apart = torch.stack([torch.cdist(own, t.flatten(1) / 255) for t in both])  # (2, r, r)
        least, flipped = (apart.square() / own.shape[1]).min(0)
        alike, first = (near & (least <= _COPY_PIXELS)).max(1)
        done |= alike
        for row in alike.nonzero()[:, 0].tolist():
            place = int(first[row])
            yield rows.start + row, start + place, int(flipped[row, place])


def _outliers(
    photos: Sequence[Photo], features: Tensor, notes: list[str], advance: Advance
) -> list[Outlier]:
    if len(photos) <= 2 * _NEIGHBOURS:
        notes.append(f"outliers show among more than {2 * _NEIGHBOURS} images only")
        return []
    near = nearness(features, advance)
    found = [Outlier(photos[i], round(float(near[i]), 4)) for i in outlying(near)]
    return sorted(found, key=lambda outlier: outlier.cosine)


def nearness(features: Tensor, advance: Advance = nothing) -> Tensor:
    """(n,) mean cosines of features (n, D), of length one, with their nearest others."""
    found = []
    for start, rows in enumerate(features.split(_TILE)):
        best = rows.new_full((len(rows), _NEIGHBOURS), -1.0)
        for other, columns in enumerate(features.split(_TILE)):
            cosines = rows @ columns.T  # (r, r)
            if start == other:
                cosines.fill_diagonal_(-1)
            best = torch.cat([best, cosines], 1).topk(_NEIGHBOURS).values
        found.append(best.mean(1))
        advance(len(rows))
    return torch.cat(found)


def outlying(values: Tensor) -> list[int]:
    """Places of values that lie far below the median, in median absolute deviations."""
    middle = values.median()
    spread = 1.4826 * (values - middle).abs().median()  # a normal distribution's deviation
    return (values < middle - _FAR * spread.clamp(min=1e-3)).nonzero()[:, 0].tolist()


def _judge(
    found: Findings,
    task: Task,
    photos: Sequence[Photo],
    labels: Tensor,
    features: Tensor,
    text: Tensor,
    scale: float,
) -> None:
    """Fill in the labels and classes that are in doubt, by features (n, D) with labels (n,)."""
    names = task.class_names
    if len(names) < 2 or not photos or task.multilabel:
        why = "there is one class" if photos else "there are no readable train images"
        why = "images have several labels" if task.multilabel and photos else why
        found.notes.append(f"labels and classes are not judged: {why}")
        return
    doubts, counts = label_doubts(features, labels, text, scale), labels.bincount()
    if alone := int((counts == 1).sum()):
        found.notes.append(f"labels are not judged in {alone:,} classes that have one image")
    order = doubts.score.argsort(descending=True, stable=True)
    found.labels = [
        Doubt(photos[i], names[int(doubts.guess[i])], round(float(doubts.score[i]), 4))
        for i in order.tolist()
        if doubts.doubtful[i] and counts[labels[i]] > 1
    ]
    found.classes = [
        Alike((names[a], names[b]), round(cosine, 4) if text.any() else None, round(share, 4))
        for a, b, cosine, share in classes_alike(features, labels, text)
    ]


@dataclass(frozen=True)
class Doubts:
    """Of each image: -log of its label's probability, the likeliest other class, whether to tell.

    That is where the other class is more than twice as likely as the label.
    """

    score: Tensor  # (n,)
    guess: Tensor  # (n,)
    doubtful: Tensor  # (n,)


def label_doubts(features: Tensor, labels: Tensor, text: Tensor, scale: float) -> Doubts:
    """How improbable each label is by all other images, and by the class names' text.

    Kernel ridge regression of the one-hot labels Y on what the text does not explain, left-out
    values in closed form. With K = exp(-b |x - x'|^2), b in units of the median distance, H =
    K (K + mu)^-1 and the zero-shot probabilities S, an image's residual without itself is
    ``((Y - t S) - H (Y - t S)) / (1 - diag H)``. The text's weight t in 0 .. 1 makes the sum of
    their squares least: of names that mean nothing it is near 0. Of more than 2,000 images, K is
    Nyström's approximation by as many.

    Args:
        features: (n, D), of length one; ``labels`` (n,); ``text`` (C, D), of length one.
        scale: the backbone's logit scale.
    """
    ridge = _Ridge(features, labels, text.double(), scale / _TEXT_HEAT)
    tiles = [slice(i, i + _TILE) for i in range(0, len(labels), _TILE)]
    products = [((y * s).sum(), (s * s).sum()) for y, s in map(ridge.residuals, tiles)]
    crossed, squared = (torch.stack(sums).sum() for sums in zip(*products, strict=True))
    weight = (crossed / squared).clamp(0, 1)
    own, other, guess = list[Tensor](), list[Tensor](), list[Tensor]()
    for rows in tiles:
        y, s = ridge.residuals(rows)
        target, of = ridge.targets(rows)[0], labels[rows, None]
        chances = (_COLD * (target - y + weight * s)).softmax(-1)  # (r, C)
        best = chances.scatter(1, of, -1).max(1)
        own.append(chances.gather(1, of)[:, 0])
        other.append(best.values)
        guess.append(best.indices)
    mine, rival = torch.cat(own), torch.cat(other)
    return Doubts(-mine.log(), torch.cat(guess), rival > _DOUBT * mine)


class _Ridge:
    """The regression of `label_doubts`, of labels and of text at once; in fp64."""

    def __init__(self, features: Tensor, labels: Tensor, text: Tensor, scale: float) -> None:
        self.features, self.labels, self.text, self.scale = features, labels, text, scale
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        self.marks = features[order[:_LANDMARKS].sort().values].double()  # (m, D)
        apart = torch.cdist(self.marks, self.marks).square()
        self.sharpness = _SHARPNESS / float(apart.median().clamp(min=1e-6))
        eye = torch.eye(len(self.marks), dtype=torch.double)
        self.root = torch.linalg.cholesky((-self.sharpness * apart).exp() + 1e-6 * eye)
        gram, goals = _RIDGE * eye, list[Tensor]()
        for rows in (slice(i, i + _TILE) for i in range(0, len(labels), _TILE)):
            mapped = self._map(rows)
            gram = gram + mapped.T @ mapped
            sums = [mapped.T @ target for target in self.targets(rows)]  # (m, C) each
            goals = [a + b for a, b in zip(goals, sums, strict=True)] if goals else sums
        self.inverse = torch.linalg.inv(gram)
        self.weights = [self.inverse @ goal for goal in goals]

    def _map(self, rows: slice) -> Tensor:
        """(r, m) vectors whose inner products are the kernel."""
        apart = torch.cdist(self.marks, self.features[rows].double()).square()
        kernel = (-self.sharpness * apart).exp()
        return torch.linalg.solve_triangular(self.root, kernel, upper=False).T

    def targets(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(r, C) one-hot labels and zero-shot probabilities."""
        one_hot = F.one_hot(self.labels[rows], len(self.text)).double()
        zero_shot = (self.scale * self.features[rows].double() @ self.text.T).softmax(-1)
        return one_hot, zero_shot

    def residuals(self, rows: slice) -> Iterator[Tensor]:
        """(r, C) residuals of both targets, each image left out of its own fit."""
        mapped = self._map(rows)
        left = 1 - (mapped @ self.inverse * mapped).sum(1, keepdim=True)  # (r, 1)
        for target, weights in zip(self.targets(rows), self.weights, strict=True):
            yield (target - mapped @ weights) / left


def classes_alike(
    features: Tensor, labels: Tensor, text: Tensor
) -> list[tuple[int, int, float, float]]:
    """Pairs of labels that are hard to tell apart, with the two numbers of `Alike`, worst first.

    Features (n, D) with labels (n,) and text (C, D) are of length one.
    """
    counts = labels.bincount(minlength=len(text))
    sums = torch.zeros(len(text), features.shape[1]).index_add(0, labels, features)
    centres, crossings = F.normalize(sums, dim=-1), Counter[tuple[int, int]]()
    for rows, own in zip(features.split(_TILE), labels.split(_TILE), strict=True):
        left_out = F.normalize(sums[own] - rows, dim=-1)  # (r, D)
        near = rows @ centres.T  # (r, C)
        near[:, counts == 0] = -1
        near.scatter_(1, own[:, None], -1)
        best, rivals = near.topk(min(_RIVALS, len(text)))
        crossed = (best > (rows * left_out).sum(1, keepdim=True)) & (counts[own, None] > 1)
        for row, place in crossed.nonzero().tolist():
            one, two = sorted((int(own[row]), int(rivals[row, place])))
            crossings[one, two] += 1
    shares = {(a, b): crossings[a, b] / int(counts[a] + counts[b]) for a, b in crossings}
    pairs = {pair for pair, share in shares.items() if share >= _SAME_IMAGES}
    for start in range(0, len(text), _TILE):
        close = (text[start : start + _TILE] @ text.T >= SAME_TEXT).triu(1 + start)
        pairs |= {(a + start, b) for a, b in close.nonzero().tolist()}
    found = [(a, b, float(text[a] @ text[b]), shares.get((a, b), 0.0)) for a, b in pairs]
    return sorted(found, key=lambda row: (-row[3], -row[2], row[:2]))
