"""A frozen backbone, what is learned inside it, and class names: images in, logits out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dapt.clip.backbone import Backbone
from dapt.clip.image import image_features, kept_bytes
from dapt.clip.inside import EVALUATION, NOTHING, Inside, Pass
from dapt.clip.joined import Joined, JoinedTexts
from dapt.clip.looks import looks
from dapt.clip.text import TEXT_MEMORY, ClassTokens, TextEncoder
from dapt.data.grey import Scale
from dapt.data.items import DEFAULT_TEMPLATE
from dapt.errors import UserError
from dapt.methods import Head, Method, TowerPart
from dapt.methods.class_vectors import ClassVectors
from dapt.methods.sigmoids import Sigmoids
from dapt.settings import Settings, text_memory

# Before the names of `Sigmoids`' tensors in a run's files.
SIGMOIDS = "sigmoids."


class Classifier(nn.Module):
    """A backbone with tower parts and a head, over one list of classes.

    Without parts and with the plain head it is zero-shot CLIP:
    ``logits = exp(logit_scale) * f(x) @ g(classes).T``, plus the model's bias if it has one, with
    both features L2-normalised.

    Args:
        class_names: C names in label order; a `UserError` says that one does not fit the tower.
        template: a sentence for the names where no part gives a context.
        templates: several, in its place: features are averaged over them, each of length one.
        text_memory: bytes of the text tower's activations to keep for the backward pass; more
            classes than fit are encoded in chunks.
        multilabel: whether an image may be of several classes: logits pass through `Sigmoids`, and
            each class has a probability by itself.
        looks: at an image that is classified; see `dapt.clip.looks`.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        parts: Iterable[TowerPart] = (),
        head: Head | None = None,
        *,
        template: str = DEFAULT_TEMPLATE,
        templates: Sequence[str] = (),
        text_memory: int = TEXT_MEMORY,
        multilabel: bool = False,
        looks: int = 1,
    ) -> None:
        super().__init__()
        self.backbone, self.class_names, self.template = backbone, tuple(class_names), template
        self.looks = looks
        self.grey: Scale | None = None  # of grey images of more than 8 bits; as `Task.grey`
        self.parts = nn.ModuleList(parts).to(backbone.device)
        self.head = (head or Head(backbone.logit_scale)).to(backbone.device)
        self.head.offset = backbone.logit_bias
        place, classes = backbone.device, len(self.class_names)
        self.sigmoids = Sigmoids(classes).to(place) if multilabel else None
        self.reads_images = any(part.reads_images for part in parts_of(self.parts, "text"))
        # Features of one look that are not the frozen tower's own.
        self.changes_images = bool(parts_of(self.parts, "image")) or self.head.projects
        self.text_encoders = nn.ModuleList()
        if backbone.reads_text and (self.head.reads_text or parts_of(self.parts, "text")):
            self.text_encoders.extend(self._encoders(templates or (template,), text_memory))
        self._fixed_text: tuple[Tensor, Tensor] | None = None

    def _encoders(self, templates: Sequence[str], memory: int) -> Iterator[nn.Module]:
        backbone, context = self.backbone, inside_of(self.parts, "text").tokens
        if isinstance(backbone, Joined):  # which take no context
            yield from (JoinedTexts(backbone, self.class_names, t, memory) for t in templates)
            return
        own = {"class_contexts": context is not None and context.dim() == 3}
        for tokens in self._tokens(context, templates):
            yield TextEncoder(backbone, tokens, memory, **own)

    def _tokens(self, context: Tensor | None, templates: Sequence[str]) -> list[ClassTokens]:
        backbone, names = self.backbone, self.class_names
        if context is None:
            return [ClassTokens.for_template(backbone, names, template) for template in templates]
        parts = parts_of(self.parts, "text")
        after = " ".join(part.after for part in parts if part.after)
        ahead = next((part.ahead for part in parts if part.ahead is not None), None)
        return [ClassTokens.for_context(backbone, names, context.shape[-2], after, ahead)]

    def of_views(self) -> dict[str, Any]:
        """What decides how an image is seen, by the names that `ImageStore` gives it."""
        return {**self.backbone.preprocessing.of_views(), "grey": self.grey}

    def learned(self) -> dict[str, nn.Parameter]:
        """What gradient descent changes, by the names it has in a run's files."""
        return {name: p for part in self.parts for name, p in part.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """All that was learned or fitted, by the names it has in a run's files."""
        found = {n: p.detach() for n, p in self.learned().items()} | self.head.state_dict()
        if self.sigmoids is not None:
            found |= {SIGMOIDS + name: t for name, t in self.sigmoids.state_dict().items()}
        return found

    def end_tuning(self, head: Head) -> None:
        """Keep the parts as they are, so that what follows from them is made once, under a head.

        One that is fitted gets no class vectors: they have seen the images that it is fitted on.
        """
        self.head = head
        kept = [p for p in self.parts if not (head.fitted and isinstance(p, ClassVectors))]
        self.parts = nn.ModuleList(kept).requires_grad_(False)

    def closed(self, settings: Settings) -> str:
        """Why it knows the classes it was tuned on alone; empty where it knows others too."""
        reasons = (self.head.closed, *(cast(TowerPart, p).closed(settings) for p in self.parts))
        return next(filter(None, reasons), "")

    @property
    def learned_parameters(self) -> int:
        """How many numbers were learned or fitted."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def text_features(self, image_features: Tensor | None = None, now: Pass = EVALUATION) -> Tensor:
        """(C, D) normalised class features in fp32, (C, 0) where the head reads none.

        Of a backbone that reads no text they are what a part learned in their place, else zeros.

        Where a part reads images, they are (B, C, D), for each of normalised image features (B, D)
        that are given. Computed once, unless for images, or gradients may reach what is learned in
        the text tower.
        """
        if image_features is None or not self.reads_images:
            return self._text(now)[0]
        own = Pass(now.generator, recompute=now.recompute)
        passes = (replace(own, image_features=one) for one in image_features)
        found = [self._encoded(inside_of(self.parts, "text", each))[0] for each in passes]
        return torch.stack(found)

    def text_lengths(self) -> Tensor:
        """(C, 1) lengths of class features before they were normalised; of several, their mean."""
        return self._text()[1]

    def _text(self, now: Pass = EVALUATION) -> tuple[Tensor, Tensor]:
        parts, own = parts_of(self.parts, "text"), Pass(now.generator, recompute=now.recompute)
        if any(p.requires_grad for part in parts for p in part.parameters()):
            return self._encoded(inside_of(parts, "text", own))
        if self._fixed_text is None:
            # Ordinary tensors even if asked for in inference mode: a later step may use them.
            with torch.inference_mode(False), torch.no_grad():
                self._fixed_text = self._encoded(inside_of(parts, "text"))
        return self._fixed_text

    def _encoded(self, inside: Inside) -> tuple[Tensor, Tensor]:
        if not len(self.text_encoders):
            backbone = self.backbone
            size = len(self.class_names), 0 if backbone.reads_text else backbone.image_dimension
            empty = torch.zeros(size, device=backbone.device)
            return inside.features(empty, None), empty.norm(dim=-1, keepdim=True)
        found = [_unit_and_length(encoder(inside)) for encoder in self.text_encoders]
        features, lengths = found[0]
        if len(found) > 1:
            features, lengths = (torch.stack(each).mean(0) for each in zip(*found, strict=True))
            features = F.normalize(features, dim=-1)
        return inside.features(features, None), lengths

    def kept_bytes(self, images: int) -> int:
        """What the layers of both towers keep of a step for its backward pass, about.

        Towers in which nothing is learned keep nothing.
        """
        text = sum(encoder.kept_bytes for encoder in cast(Any, self.text_encoders))
        text *= images if self.reads_images else 1
        own = {"text": text, "image": kept_bytes(self.backbone, images)}
        return sum(size for tower, size in own.items() if parts_of(self.parts, tower))

    def as_own(self, features: Tensor) -> Tensor:
        """The frozen image tower's features (..., D) among those that this classifier makes."""
        return inside_of(self.parts, "image").features(features, None)

    def image_features(
        self, views: Tensor, now: Pass = EVALUATION, *, normalized: bool = True
    ) -> Tensor:
        """(B, D) image features in fp32 of one look, of length one unless told otherwise.

        Views (B, 3, S, S) are uint8 pixels, or floating point that is normalised already.
        """
        inside = inside_of(self.parts, "image", now)
        how = {"normalized": normalized, "projected": not self.head.projects}
        return image_features(self.backbone, views, inside, **how)

    def encode(self, views: Tensor) -> Tensor:
        """(B, D) features, normalised, that an image is classified by: means over all looks.

        Views are as in `image_features`.
        """
        if self.looks == 1:
            return self.image_features(views)
        if views.dtype == torch.uint8:
            views = self.backbone.normalize(views)
        found = torch.stack([self.image_features(seen) for seen in looks(views, self.looks)])
        return F.normalize(found.mean(0), dim=-1)

    def forward(self, views: Tensor) -> Tensor:
        """(B, C) logits of (B, 3, S, S) views."""
        return self.logits(self.encode(views))

    def logits(self, image_features: Tensor, text_features: Tensor | None = None) -> Tensor:
        """(B, C) logits of normalised features (B, D) and (C, D), or each image's (B, C, D).

        Without the latter, they are the classifier's own, those of one image at a time.
        """
        if text_features is None and self.reads_images:
            return torch.cat(
                [self.logits(x, self.text_features(x)) for x in image_features.split(1)]
            )
        text = self.text_features() if text_features is None else text_features
        found = self.head(image_features, text)
        return found if self.sigmoids is None else self.sigmoids(found)

    @property
    def thresholds(self) -> Tensor | None:
        """(C,) probabilities from which a label is named, on the CPU; None of one label each."""
        return None if self.sigmoids is None else self.sigmoids.thresholds.cpu()

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, C): of the classes of an image together, or of each by itself."""
        return logits.softmax(-1) if self.sigmoids is None else logits.sigmoid()


def _unit_and_length(features: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(features, dim=-1), features.norm(dim=-1, keepdim=True)


def parts_of(parts: Iterable[Any], tower: str) -> list[TowerPart]:
    """Those that change a tower."""
    return [part for part in parts if tower in part.towers]


def inside_of(parts: Iterable[Any], tower: str, now: Pass = EVALUATION) -> Inside:
    """What parts put into a tower in one pass."""
    own = parts_of(parts, tower)
    return Together(own, tower, now) if own else NOTHING


class Together(Inside):
    """Parts of a method in one tower, in one pass; their tokens stand one behind the other."""

    def __init__(self, parts: Sequence[TowerPart], tower: str, now: Pass) -> None:
        self.parts, self.tower, self.now = parts, tower, now
        found = [part.tokens(tower, now) for part in parts]
        self.sizes = [0 if tokens is None else tokens.shape[-2] for tokens in found]
        tokens = [t for t in found if t is not None]
        if len(tokens) > 1:
            longest = max((t.shape[:-2] for t in tokens), key=len)
            tokens = [torch.cat([t.expand(*longest, -1, -1) for t in tokens], -2)]
        super().__init__(tokens[0] if tokens else None)
        self.layers, weights, linears, self.norms = (
            any(getattr(type(part), hook) is not getattr(TowerPart, hook) for part in parts)
            for hook in ("before_layer", "weight", "linear", "norm")
        )
        self.linears = weights or linears
        self.reads = sum(part.reads for part in parts)
        self.recompute = now.recompute

    def before_layer(self, layer: int, x: Tensor, start: int) -> Tensor:
        """Each part in turn, which is told where its own tokens stand."""
        for part, size in zip(self.parts, self.sizes, strict=True):
            x = part.before_layer(self.tower, layer, x, slice(start, start + size))
            start += size
        return x

    def weight(self, layer: int, names: tuple[str, ...], weight: Tensor) -> Tensor:
        """Each part changes the frozen weight, or what those before it made of it."""
        for part in self.parts:
            weight = part.weight(self.tower, layer, names, weight)
        return weight

    def linear(self, layer: int, names: tuple[str, ...], x: Tensor, out: Tensor) -> Tensor:
        """Each part adds to what the map and those before it gave."""
        for part in self.parts:
            out = part.linear(self.tower, layer, names, x, out, self.now)
        return out

    def norm(self, layer: int, name: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Each part in turn."""
        for part in self.parts:
            weight, bias = part.norm(self.tower, layer, name, weight, bias)
        return weight, bias

    def features(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """Each part in turn."""
        for part in self.parts:
            x = part.features(self.tower, x, tokens)
        return x


def tuning_head(backbone: Backbone, settings: Settings) -> Head:
    """The head that gradient descent sees: cosines at the settings' scale."""
    return Head(settings.logit_scale or backbone.logit_scale)


def new_classifier(
    backbone: Backbone,
    names: Sequence[str],
    template: str,
    method: Method,
    settings: Settings,
    *,
    multilabel: bool = False,
    tuned: bool = False,
) -> Classifier:
    """A classifier as a method's row says, with initial values drawn by the settings' seed.

    Where the backbone reads no text, `ClassVectors` stand beside the row's parts: to be tuned with
    them and, if no head is fitted afterwards, in what is ``tuned`` too.
    """
    if method.learns:
        backbone.require_towers()
    rows = method.parts_on(backbone.reads_text)
    if method.learns and not backbone.reads_text and not (tuned and method.head.fitted):
        rows = (*rows, ClassVectors)
    parts = [part.create_for(backbone, settings, len(names)) for part in rows]
    learned = [name for part in parts for name, _ in part.named_parameters()]
    for name in learned:
        if learned.count(name) > 1:
            raise UserError(f"'{name}' is the name of two tensors of {method.title}; rename one")
    by_cosines = method.learns and not method.head.fitted
    head = tuning_head(backbone, settings) if by_cosines else method.head.create(backbone)
    if method.head.projects and any(part.reads for part in parts):
        what = f"{method.title} puts a head before the image tower's projection"
        raise UserError(f"{what}, and reads what it has after it; use another head")
    return Classifier(
        backbone,
        names,
        parts,
        head,
        template=settings.template or template,
        templates=settings.templates or (),
        text_memory=text_memory(settings) // (settings.batch_size if method.reads_images else 1),
        multilabel=multilabel,
        looks=settings.looks,
    )
