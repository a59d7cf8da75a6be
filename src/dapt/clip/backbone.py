"""A frozen CLIP-like model of open_clip's, and what of it prompts need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from open_clip import transformer
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from dapt.clip import asking, trunks
from dapt.clip.inside import is_plain, linear_maps
from dapt.clip.known import Each
from dapt.errors import UserError, refusing

# Every letter in both cases, digits and signs: what cleans texts shows in it too.
_PROBE = (
    "A Photo of the Quick-Brown FOX, jumping over 12,345 lazy_dogs & 67.890 Vexed Wizards' boxes!"
)
# Methods that need no words, as sentences name them.
WORDLESS, WORDLESS_HEADS = "auto, linear-probe, vpt", "auto, linear-probe, kernel-ridge"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Preprocessing:
    """How the weights expect to see an image: side in pixels, normalisation, resize rule."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def of_views(self) -> dict[str, Any]:
        """What decides the views of an image, by the names that `ImageStore` gives it."""
        return {k: getattr(self, k) for k in ("size", "interpolation", "resize_mode")}


class Backbone(nn.Module):
    """A frozen vision-language model, in eval mode, which is the only one it has.

    A model of images alone is one too: its ``model`` has no ``text``, and it has no tokenizer.

    Attributes:
        visual: image tower, (B, 3, S, S) -> (B, D); ``text``: text tower, (C, L) ids -> (C, D), or
            None; ``reads_text`` says which.
        tokenizer: open_clip's, list of strings -> (C, L) ids; None where no text is read.
        name: what it was loaded as; ``revision`` the commit of its hub repository, if it has one.
        weights_sha256: of its weights; ``fingerprint`` of all that decides what it makes of images
            and texts: weights, layout, preprocessing and vocabulary.
        dtype: precision of weights and of compute.
        logit_scale, logit_bias: a logit is scale times cosine plus bias, which is zero but where
            the model was trained on sigmoids of logits (SigLIP).
        start_tokens: what the tokenizer puts before every text: ``[SOS]`` for CLIP, nothing for
            SigLIP; ``pad_token`` is what it fills a row up with, ``end_token`` may be the same.
    """

    # open_clip's towers are of many types; what is asked of them is checked where it is.
    visual: Any
    text: Any
    mean: Tensor
    std: Tensor
    wordless = WORDLESS

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        preprocessing: Preprocessing,
        *,
        name: str,
        device: torch.device,
        precision: str,
        revision: Each = None,
    ) -> None:
        super().__init__()
        self.name, self.tokenizer, self.preprocessing = name, tokenizer, preprocessing
        self.precision, self.dtype = precision, PRECISIONS[precision]
        self.revision, self.weights_sha256 = revision, _digest(model.state_dict())
        seen = (self.weights_sha256, _layout(model), asdict(preprocessing), _vocabulary(tokenizer))
        self.fingerprint = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
        self.visual, self.text = model.visual, getattr(model, "text", None)
        # A plain number: nothing learns it, and fp32 arithmetic on it is wanted everywhere.
        self.logit_scale = float(cast(Tensor, model.logit_scale).detach().float().exp())
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = 0.0 if bias is None else float(bias.detach())
        for part in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, part)).view(1, 3, 1, 1)
            self.register_buffer(part, values, persistent=False)
        if self.reads_text:
            a, b, empty = tokenizer(["a", "b", ""], context_length=8).tolist()
            self.start_tokens: list[int] = a[:1] if a[0] == b[0] else []
            self.pad_token: int = empty[-1]
            self.end_token = next((t for t in reversed(empty) if t != empty[-1]), empty[-1])
        self.eval().requires_grad_(False)
        if device.type == "cuda" and self.dtype == torch.float32:
            # fp32 is the reference: PyTorch would run convolutions in TF32 (untested on a GPU).
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        for module in model.modules():
            if isinstance(module, transformer.ResidualAttentionBlock):
                _fold_quick_gelu(module.mlp)
            elif isinstance(module, EvaAttention):
                trunks.own_bias(module)
        for tower in filter(None, (self.visual, self.text)):
            _cast(tower, self.dtype)
        self.to(device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode."""
        return super().train(False)

    text_width = property(
        lambda self: self.word_embeddings().shape[1], doc="Of a text prompt vector."
    )
    text_layers = property(lambda self: len(layers_of_text(self)), doc="How many.")
    vision_width = property(lambda self: self._layers().width, doc="Of a visual prompt vector.")
    patch_size = property(lambda self: self._layers().patch, doc="Side of a patch in pixels.")
    vision_layers = property(lambda self: len(self._layers().blocks), doc="How many.")
    norm_before_layers = property(
        lambda self: self._layers().norm, doc="The image tower's layer norm."
    )

    @property
    def members(self) -> tuple[Backbone, ...]:
        """The models it is made of: itself, or those that `dapt.clip.joined` joins."""
        return (self,)

    @property
    def reads_text(self) -> bool:
        """Whether there is a text tower: without one, class names have no features."""
        return self.text is not None

    def require_towers(self) -> None:
        """Raise `UserError` where nothing can be learned in a tower, whatever the method."""

    def require_text(self) -> None:
        """Raise `UserError` where class names have no features."""
        if not self.reads_text:
            what = f"backbone '{self.name}' reads no text, so class names tell it nothing"
            raise UserError(f"{what}; use a method of images alone ({self.wordless})")

    @property
    def context_length(self) -> int:
        """Longest text in tokens, start and end included."""
        self.require_text()
        own = isinstance(self.text, TextTransformer)  # others say what their positions reach to
        return int(self.text.context_length if own else self.tokenizer.context_length)

    def _layers(self) -> trunks.Layers:
        """What of the image tower visual prompts need to know."""
        if (found := trunks.layers_of(self.visual)) is None:
            what = f"the image tower of '{self.name}' is a {trunks.name_of(self.visual)}"
            others = "dapt-text, coop, auto" if self.reads_text else "auto, linear-probe"
            hint = f"use a method without one ({others}), or a ViT such as ViT-B-16"
            raise UserError(f"{what}, which takes no visual prompt; {hint}")
        return found

    @property
    def projection(self) -> Tensor:
        """(W, D), in fp32: what the image tower multiplies its pooled output with at the end.

        If a bias is added to that, it is one row more: the output has a one behind it there.
        """
        visual = self.visual
        if isinstance(visual, VisionTransformer) and visual.proj is not None:
            return visual.proj.detach().float()
        if (path := asking.last_map(visual)) is None:
            what = f"the image tower of '{self.name}' has no projection at its end"
            raise UserError(f"{what}; use a method that tunes none, or a ViT such as ViT-B-16")
        last = visual.get_submodule(path)
        rows = [last.weight.T] if last.bias is None else [last.weight.T, last.bias[None]]
        return torch.cat(rows).detach().float()

    @property
    def image_dimension(self) -> int:
        """D, of image features."""
        return int(self.visual.output_dim)

    @property
    def text_dimension(self) -> int:
        """D, of class features, where a context can be learned."""
        projection = self.text_transformer().text_projection
        if projection is None:
            return self.text_width
        linear = isinstance(projection, nn.Linear)
        return int(projection.out_features if linear else projection.shape[1])

    def text_transformer(self) -> TextTransformer:
        """The text tower, where something can be changed in its layers."""
        self.require_text()
        if not isinstance(self.text, TextTransformer):
            what = f"the text tower of '{self.name}' is a {type(self.text).__name__}"
            hint = "use a method of prompts (coop, dapt, ivlp), or a model such as ViT-B-16"
            raise UserError(f"{what}, in whose layers nothing is changed; {hint}")
        return self.text

    def word_embeddings(self) -> Tensor:
        """(V, W): embeddings of all tokens, where the text tower takes others in their place."""
        self.require_text()
        if isinstance(self.text, TextTransformer):
            return self.text.token_embedding.weight
        if isinstance(self.text, HFTextEncoder):
            return cast(Tensor, cast(Any, self.text.transformer).get_input_embeddings().weight)
        what = f"the text tower of '{self.name}' is a {type(self.text).__name__}"
        hint = "use a method without one (dapt-visual, vpt, auto), or a model such as ViT-B-16"
        raise UserError(f"{what}, which takes no learned context; {hint}")

    def refusal(self, tower: str) -> str | None:
        """Why the "text" or "image" tower takes no prompt; None where it takes one."""
        try:
            _ = self.text_width if tower == "text" else self.vision_width
        except UserError as error:
            return str(error)
        return None

    def blocks(self, tower: str) -> list[Any]:
        """The "text" or "image" tower's layers; a `UserError` if they are not ordinary ones."""
        own = self.text_transformer() if tower == "text" else self.visual
        transformer = getattr(own, "transformer", None)
        if transformer is None or not is_plain(transformer):
            kind = type(own).__name__ if tower == "text" else trunks.name_of(own)
            what = f"this method changes weights of ordinary layers, and the {tower} tower of"
            others = "coop, auto" if self.reads_text else "auto, linear-probe"
            hint = f"use a method of prompts or of a head ({others}), or a ViT such as ViT-B-16"
            raise UserError(f"{what} '{self.name}', a {kind}, has others; {hint}")
        return list(transformer.resblocks)

    def linear_maps(self, tower: str) -> list[dict[str, tuple[Tensor, float]]]:
        """Of each layer of a tower, as `inside.linear_maps`; a `UserError` if none is known."""
        if tower == "text":
            self.require_text()
        own = self.text if tower == "text" else self.visual
        if not (found := asking.maps_of(own)):
            return [linear_maps(block) for block in self.blocks(tower)]
        made = []
        for places in found:
            weights = {n: own.get_submodule(path).weight for n, path in places.items()}
            parts = ((n, weight.chunk(len(n))) for n, weight in weights.items())
            made.append(
                {name: (w, 1.0) for n, rows in parts for name, w in zip(n, rows, strict=True)}
            )
        return made

    def normalize(self, views: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 views as the towers' input, on their device, at their dtype."""
        x = views.to(self.device, non_blocking=True)
        return ((x.float() / 255 - self.mean) / self.std).to(self.dtype)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, from its start to its end token, without padding.

        A text that does not fit is a `UserError`, and nothing is silently cut.
        """
        # One more place than the tower has shows which texts the tokenizer would cut.
        ids = self.tokenizer(list(texts), context_length=self.context_length + 1)
        pad, rows = self.pad_token, []
        for text, row in zip(texts, ids.tolist(), strict=True):
            while len(row) > 1 and row[-1] == pad and row[-2] == pad:
                row.pop()
            # Padding and end may be the same token (SigLIP's tokenizers): the first one is the end.
            if row[-1] == pad and pad != self.end_token:
                row.pop()
            if len(row) > self.context_length:
                what = f"text '{text}' is longer than the {self.context_length} tokens of the text"
                raise UserError(f"{what} tower of '{self.name}'; shorten the class name")
            if 0 < self.text.vocab_size <= max(row):
                what = f"the text tower of '{self.name}' knows {self.text.vocab_size:,} tokens"
                hint = "its weights are not those of a CLIP with this vocabulary"
                raise UserError(f"{what}, and its tokenizer more; {hint}")
            rows.append(row)
        return rows

    def embed_words(self, words: str) -> Tensor:
        """(M, text width), on the CPU: token embeddings of words without start and end."""
        inner = torch.tensor(self.inner_tokens(words), device=self.device, dtype=torch.long)
        self.word_embeddings()  # refuses a tower that takes none
        return embedded(self.text, inner).float().cpu()

    def inner_tokens(self, words: str) -> list[int]:
        """Token ids of words, without start and end; some tokenizers put no end."""
        ids = self.tokenize([words.replace("_", " ")])[0][len(self.start_tokens) :]
        return ids[:-1] if ids[-1:] == [self.end_token] else ids


def layers_of_text(backbone: Backbone) -> Sequence[nn.Module]:
    """The text tower's layers, before which tokens can be put in the place of others."""
    if isinstance(text := backbone.text, HFTextEncoder):
        return cast(Sequence[nn.Module], text.get_submodule(asking.layers_in(text)))
    return cast(Any, backbone.text_transformer().transformer).resblocks


def embedded(text: Any, ids: Tensor) -> Tensor:
    """(..., W): token ids as a text tower's first layer has them, without positions."""
    if isinstance(text, TextTransformer):
        return text.token_embedding(ids)
    return cast(Tensor, text.transformer.get_input_embeddings()(ids))  # some scale them


def usable_precision(precision: str, device: torch.device) -> str:
    """``precision``, or fp16 for bf16 on a GPU before Ampere, which has none (untested there)."""
    if precision == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                return "fp16"
    return precision


def choose_device(device: str) -> torch.device:
    """``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"mps"``; a `UserError` if not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next((kind for kind in there if there[kind]), "cpu")
    hint = "use 'cpu' or leave it 'auto'"
    with refusing(f"device '{device}' is not available here", hint, RuntimeError, AssertionError):
        place = torch.device(device)
        if place.type not in ("cpu", *there):
            raise RuntimeError("nothing is computed there")
        torch.empty(0, device=place)
    return place


def _digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of a state dict, in hexadecimal."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _layout(model: nn.Module) -> list[tuple[Any, ...]]:
    """What weights do not tell of a model: activations, numbers of heads, what is added to norms.

    Names of other modules are left out: they change with the libraries' versions.
    """
    facts = (
        (
            name if "gelu" in (name := type(module).__name__).lower() else "",
            *(getattr(module, key, None) for key in ("num_heads", "eps", "pool_type")),
        )
        for module in model.modules()
    )
    plain = (tuple(v if isinstance(v, int | float | str) else "" for v in f) for f in facts)
    return [found for found in plain if any(found)]


def _vocabulary(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's words with their ids, its merges, and what it makes of a text.

    Empty where there is none.
    """
    if tokenizer is None:
        return ""
    inner: Any = getattr(tokenizer, "tokenizer", None)
    words = inner.get_vocab() if hasattr(inner, "get_vocab") else getattr(tokenizer, "encoder", {})
    merges = [" ".join(pair) for pair in getattr(tokenizer, "bpe_ranks", {})]
    ids = tokenizer([_PROBE], context_length=64).tolist()
    known = json.dumps([sorted(words.items()), merges, ids])
    return hashlib.sha256(known.encode()).hexdigest()


class FoldedQuickGELU(nn.SiLU):
    """SiLU whose neighbours' weights hold what it lacks of QuickGELU: a factor, and its inverse."""

    factor = 1.702


def _fold_quick_gelu(mlp: Any) -> None:
    """Turn ``x * sigmoid(1.702 x)`` into SiLU, one kernel instead of three passes over memory.

    ``quick_gelu(x) = silu(1.702 x) / 1.702``, and both factors go into the linear layers around
    it: the same function, up to the rounding of their weights.
    """
    if isinstance(mlp.gelu, transformer.QuickGELU):
        mlp.gelu = FoldedQuickGELU()
        with torch.no_grad():
            mlp.c_fc.weight *= mlp.gelu.factor
            mlp.c_fc.bias *= mlp.gelu.factor
            mlp.c_proj.weight /= mlp.gelu.factor


def _cast(tower: nn.Module, dtype: torch.dtype) -> None:
    """Put a tower's weights at ``dtype``, but open_clip's layer norms: those stay in fp32."""
    for module in tower.to(dtype).modules():
        if isinstance(module, transformer.LayerNorm) and dtype != torch.float32:
            module.float()
            # Same module, whose forward casts its input up and back, on every device.
            module.__class__ = transformer.LayerNormFp32
