"""Prompts: learned vectors in front of a tower's first layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dapt.clip.inside import Pass
from dapt.errors import UserError
from dapt.methods import published
from dapt.methods.contract import HasSettings, PartSettings, TowerPart

if TYPE_CHECKING:  # it brings open_clip along, which the table of methods should not
    from dapt.clip.backbone import Backbone


def usual(dataset: str, shots: int) -> dict[str, Any]:
    """CoOp's own rate (configs/trainers/CoOp of the code) on benchmarks; the rest is everyone's."""
    return {"lr": 0.002} if dataset in published.PUBLISHED else {}


class ContextSettings(PartSettings):
    """Of a text prompt."""

    text_vectors: int = Field(16, ge=1, le=2**16, description="M, vectors in the text prompt")
    text_init: str | None = Field(None, description="words that the text prompt starts from")


class PlacedSettings(ContextSettings):
    """Of a text prompt that may be anywhere about the class name."""

    text_position: Literal["end", "middle", "front"] = Field(
        "end", description="position of the class name in the text prompt"
    )
    class_contexts: bool = Field(False, description="a separate text prompt for each class")


class VisualSettings(PartSettings):
    """Of a visual prompt."""

    visual_vectors: int = Field(16, ge=1, le=2**16, description="N, vectors in the visual prompt")
    visual_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the visual prompt")


class Prompt(TowerPart):
    """Vectors of one tower: ``<kind>_prompt`` in a run's files, or ``<kind>_prompt.<layer>``.

    They start as the (N, W) values given, (C, N, W) of a prompt for each class; of a deep prompt
    these are a list, by layer.
    """

    kind: ClassVar[str]  # "text" or "visual"

    def __init__(self, vectors: Tensor | Sequence[Tensor]) -> None:
        super().__init__()
        layers = [vectors] if isinstance(vectors, Tensor) else vectors
        own = [nn.Parameter(v.float().clone()) for v in layers]
        deep = layers is vectors
        setattr(self, f"{self.kind}_prompt", nn.ParameterList(own) if deep else own[0])

    @property
    def layers(self) -> list[nn.Parameter]:
        """The prompt of each layer that has one."""
        return list(self.parameters())

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """Such as "2 learned text prompt vectors in each of up to 9 layers"."""
        own = settings.of(cls.Settings).model_dump()
        words = f"{own[f'{cls.kind}_vectors']} learned {cls.kind} prompt vectors"
        depth = own.get(f"{cls.kind}_depth")
        return f"{words} in each of up to {depth} layers" if depth else words

    @classmethod
    def settings_of(cls, tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Any]:
        """Numbers of vectors and, of a deep prompt, of layers."""
        own = [t for name, t in tensors.items() if name.split(".")[0] == f"{cls.kind}_prompt"]
        depths = dict.fromkeys((f"{cls.kind}_depth", "prompt_depth"), len(own))
        found = {f"{cls.kind}_vectors": own[0].shape[-2], **depths}
        return {name: n for name, n in found.items() if name in cls.Settings.model_fields}

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(N, W), or (C, N, W), in front of the first layer."""
        return self.layers[0]


class Context(Prompt):
    """CoOp's context (Zhou et al., 2022), as in DAPT: ``[SOS] u_1 .. u_M <name> . [EOT]``.

    With ``text_position`` "middle", the name stands after the first M // 2 vectors; with "front",
    before all of them. The full stop always comes last. Each class may have its own context. (In
    the published code, initial words turn this off; here, each class's context starts from them.)
    """

    kind, towers = "text", frozenset({"text"})
    Settings = PlacedSettings

    def __init__(self, vectors: Tensor, position: str = "end") -> None:
        super().__init__(vectors)
        self.ahead = {"middle": vectors.shape[-2] // 2, "front": 0}.get(position)

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> Context:
        """One context, as of `first_context`, for all classes."""
        own: PlacedSettings = settings.of(PlacedSettings)
        return cls(first_context(backbone, settings), own.text_position)

    @classmethod
    def create_for(cls, backbone: Backbone, settings: HasSettings, classes: int) -> Context:
        """As `create`, or one for each class."""
        own: PlacedSettings = settings.of(PlacedSettings)
        if not own.class_contexts:
            return cls.create(backbone, settings)
        return cls(first_context(backbone, settings, classes), own.text_position)

    @classmethod
    def closed(cls, settings: HasSettings) -> str:
        """Of a context for each class."""
        own: PlacedSettings = settings.of(PlacedSettings)
        return (
            "text prompts of its own classes alone (class_contexts)" if own.class_contexts else ""
        )

    @classmethod
    def describe(cls, settings: HasSettings) -> str:
        """Such as "16 learned text prompt vectors for each class"."""
        own: PlacedSettings = settings.of(PlacedSettings)
        return super().describe(settings) + (" for each class" if own.class_contexts else "")


class VisualPrompt(Prompt):
    """Shallow VPT (Jia et al., 2022), DAPT's visual prompt: ``[CLS] v_1 .. v_N patches``.

    The vectors enter after ``ln_pre`` and have no positional embedding. ``dropout`` is the
    probability of setting an element to zero, drawn anew for each image in a step.
    """

    kind, towers = "visual", frozenset({"image"})
    Settings = VisualSettings

    def __init__(self, vectors: Tensor, dropout: float = 0.0) -> None:
        super().__init__(vectors)
        self.dropout = dropout

    @classmethod
    def create(cls, backbone: Backbone, settings: HasSettings) -> VisualPrompt:
        """Vectors uniform in ±sqrt(6 / (3·patch² + width)); a `UserError` if the tower has none."""
        own: VisualSettings = settings.of(VisualSettings)
        generator = torch.Generator().manual_seed(2 * settings.seed + 1)
        width = backbone.vision_width
        bound = sqrt(6 / (3 * backbone.patch_size**2 + width))
        vectors = bound * (2 * torch.rand(own.visual_vectors, width, generator=generator) - 1)
        return cls(vectors, own.visual_dropout)

    def tokens(self, tower: str, now: Pass) -> Tensor:
        """(N, W); with dropout, in a training step, (B, N, W)."""
        prompt: Tensor = self.layers[0]
        if not self.dropout or now.generator is None:
            return prompt
        # Of the whole batch, so that each process of several draws the same.
        drawn = torch.rand(now.images, *prompt.shape, generator=now.generator)[now.part]
        return prompt * (drawn >= self.dropout).to(prompt.device) / (1 - self.dropout)


def first_context(backbone: Backbone, settings: HasSettings, classes: int | None = None) -> Tensor:
    """(M, W), or one for each class (C, M, W), from N(0, 0.02); words are the last, if any.

    That they outnumber the vectors, or the tower takes no context, is a `UserError`.
    """
    own: ContextSettings = settings.of(ContextSettings)
    shape, count = (own.text_vectors, backbone.text_width), own.text_vectors
    vectors = torch.stack(normal_vectors(classes or 1, *shape, 2 * settings.seed))
    if own.text_init:
        words = backbone.embed_words(own.text_init)
        if len(words) > count:
            what = f"the words '{own.text_init}' take {len(words)} vectors"
            hint = f"has {count}; use fewer words or more vectors"
            raise UserError(f"{what} but the text prompt {hint}")
        vectors[:, count - len(words) :] = words
    return vectors[0] if classes is None else vectors


def normal_vectors(layers: int, count: int, width: int, seed: int) -> list[Tensor]:
    """(N, W) from N(0, 0.02) for each of some layers."""
    generator = torch.Generator().manual_seed(seed)
    return [0.02 * torch.randn(count, width, generator=generator) for _ in range(layers)]


def linear_map(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear map with a bias, drawn as torch draws one by default."""
    made = nn.utils.skip_init(nn.Linear, inputs, outputs)
    for parameter in made.parameters():
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return made
