"""Prompts, towers and class names put together: images in, logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dapt.clip.backbone import Backbone
from dapt.clip.towers import TEXT_MEMORY, ClassTokens, TextEncoder, encode_image
from dapt.methods.prompts import Prompts


class PromptedClassifier(nn.Module):
    """A frozen backbone with prompts, over one list of classes.

    ``logits = exp(logit_scale) * f(x) @ g(classes).T`` with both features L2-normalised.

    Args:
        backbone: the frozen model.
        class_names: C names in label order; underscores stand for spaces.
        prompts: the learned vectors; without a text prompt the names stand in ``template``.
        template: such as "a photo of a {}.".
        text_memory: bytes of the text tower's activations to keep for the backward pass; more
            classes than fit are encoded in chunks.

    Raises:
        UserError: a class name or prompt that does not fit the text tower.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        prompts: Prompts,
        template: str,
        *,
        text_memory: int = TEXT_MEMORY,
    ) -> None:
        super().__init__()
        self.backbone, self.prompts = backbone, prompts
        self.class_names = tuple(class_names)
        if prompts.text is None:
            tokens = ClassTokens.for_template(backbone, class_names, template)
        else:
            tokens = ClassTokens.for_context(backbone, class_names, len(prompts.text))
        self.text_encoder = TextEncoder(backbone, tokens, text_memory)
        self._fixed_text_features: Tensor | None = None

    @property
    def prompts_images(self) -> bool:
        """Whether image features are other than the backbone's own."""
        return self.prompts.visual is not None

    @property
    def learned_parameters(self) -> int:
        """How many numbers tuning may change."""
        return self.prompts.count

    def text_features(self) -> Tensor:
        """(C, D) normalised class features in fp32; computed once unless a context is learned."""
        context = self.prompts.text
        if context is not None and context.requires_grad:
            return F.normalize(self.text_encoder(context), dim=-1)
        if self._fixed_text_features is None:
            # Ordinary tensors even if asked for in inference mode: a later step may use them.
            with torch.inference_mode(False), torch.no_grad():
                self._fixed_text_features = F.normalize(self.text_encoder(context), dim=-1)
        return self._fixed_text_features

    def image_features(
        self,
        views: Tensor,
        *,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        among: tuple[int, slice] | None = None,
    ) -> Tensor:
        """(B, D) normalised image features in fp32.

        Args:
            views: (B, 3, S, S), uint8 pixels, or already normalised floating point.
            dropout: probability of zeroing an element of the visual prompt, drawn from
                ``generator`` anew for each image.
            generator: a CPU generator, so that the draw is the same on every device.
            among: size of the batch that the views are a part of, and which part.
        """
        prompt: Tensor | None = self.prompts.visual
        if prompt is not None and dropout > 0:
            size, part = among or (len(views), slice(None))
            keep = torch.rand(size, *prompt.shape, generator=generator)[part] >= dropout
            prompt = prompt * keep.to(prompt.device) / (1 - dropout)  # (B, N, W)
        return image_features(self.backbone, views, prompt)

    def forward(self, views: Tensor) -> Tensor:
        """(B, C) logits of (B, 3, S, S) views."""
        return self.logits(self.image_features(views), self.text_features())

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D) and (C, D)."""
        return self.backbone.logit_scale * image_features @ text_features.T


class LinearProbe(nn.Module):
    """Logistic regression on frozen, normalised image features, in the classifier's shape.

    Args:
        backbone: the frozen model.
        class_names: C names in label order.
        weight: (C, D); ``bias``: (C,).
    """

    def __init__(
        self, backbone: Backbone, class_names: Sequence[str], weight: Tensor, bias: Tensor
    ) -> None:
        super().__init__()
        self.backbone, self.class_names = backbone, tuple(class_names)
        self.weight, self.bias = weight.float(), bias.float()
        self.prompts_images = False

    @property
    def learned_parameters(self) -> int:
        """How many numbers were fitted."""
        return self.weight.numel() + self.bias.numel()

    def image_features(self, views: Tensor) -> Tensor:
        """(B, D) normalised, un-prompted image features in fp32."""
        return image_features(self.backbone, views, None)

    def text_features(self) -> Tensor:
        """(C, D), the regression's weights: what image features are compared with."""
        return self.weight

    def forward(self, views: Tensor) -> Tensor:
        """(B, C) logits of (B, 3, S, S) views."""
        return self.logits(self.image_features(views), self.weight)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(B, C) logits of normalised features (B, D) and the weights (C, D)."""
        return image_features @ text_features.T + self.bias


Classifier = PromptedClassifier | LinearProbe


def image_features(backbone: Backbone, views: Tensor, prompt: Tensor | None = None) -> Tensor:
    """(B, D) normalised features of uint8 or normalised views, prompted or not, in fp32."""
    if views.dtype == torch.uint8:
        views = backbone.normalize(views)
    views = views.to(backbone.device, backbone.dtype)
    return F.normalize(encode_image(backbone, views, prompt), dim=-1)
