"""Small random models of each family: those in transformers' form, and how fast prompts are.

A prompt makes an image tower see more tokens, and nothing else of its step should cost time: a
training step of a prompt is timed against the tower's own plain forward and backward pass, whose
input needs gradients as a prompt does, in turns within one run.

Letters in shape comments: B images, S their side, N inserted tokens, W width, L tokens of a text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import timm
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP
from open_clip.timm_model import TimmModel
from timm.models import Eva, NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn

from dapt.clip import hub_format, trunks
from dapt.clip.backbone import Backbone, Preprocessing
from dapt.clip.image import encode_image
from dapt.clip.text import ClassTokens, TextEncoder
from dapt.engine.classifier import inside_of
from dapt.errors import UserError, lacking
from dapt.methods.ivlp import DeepVisual
from dapt.methods.prompts import Context, VisualPrompt

LENGTH = 48  # tokens of a text
END, SIZE, PATCH = 99, 32, 8


class Letters:
    """A token a letter, in place of a vocabulary; with an end where a text tower looks for one."""

    def __init__(self, length: int, pad: int = 1, end: int | None = None) -> None:
        self.context_length, self.pad, self.end = length, pad, end

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        """(n, L) ids."""
        ids = torch.full((len(texts), context_length or self.context_length), self.pad)
        for row, text in zip(ids, texts, strict=True):
            own = [2 + ord(letter) % 90 for letter in text.replace(" ", "")][: len(row) - 1]
            own += [] if self.end is None else [self.end]
            row[: len(own)] = torch.tensor(own, dtype=torch.long)
        return ids


class Small(NamedTuple):
    """A model, the side of its images, and its tokenizer."""

    model: nn.Module
    size: int
    letters: Letters


# ------------------------------------------------------------------- models in transformers' form


def in_their_form(kind: str, width: int = 48, layers: int = 3) -> Small:
    """A random model of a ``model_type``, as its `config.json` would describe it."""
    part = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": 4}  # fmt: skip
    seen = {"image_size": SIZE, "patch_size": PATCH, "num_patches": (SIZE // PATCH) ** 2}
    read = {"vocab_size": END + 1, "max_position_embeddings": LENGTH, "eos_token_id": END}
    config = {"model_type": kind, "projection_dim": 24, "vision_config": part | seen,
              "text_config": part | read}  # fmt: skip
    with TemporaryDirectory() as folder:
        (Path(folder) / hub_format.CONFIG).write_text(json.dumps(config))
        theirs = hub_format.translate(Path(folder))
    ends = "siglip" not in kind and kind != "chinese_clip"
    pad = 0 if kind == "chinese_clip" else 1
    made = theirs.family.make(**theirs.config)
    return Small(made, SIZE, Letters(LENGTH, pad, END if ends else None))


def with_text(kind: str, pooler: str, **config: Any) -> Small:
    """A small CLIP whose text tower is one of transformers', as open_clip's names have it."""
    with lacking(f"the text tower {kind}"):
        from transformers import AutoConfig

    tower = {"layers": 2, "width": 64, "head_width": 32, "patch_size": PATCH, "image_size": SIZE}
    read = {"layers": 1, "width": 8, "heads": 1, "context_length": 8, "vocab_size": 8}
    model: Any = CustomTextCLIP(24, tower, read)
    told = AutoConfig.for_model(kind, vocab_size=END + 1, pad_token_id=1, **config)
    model.text = HFTextEncoder("", 24, config=told, pooler_type=pooler, proj_type="linear")
    inner = model.text.transformer
    model.text.transformer = inner.encoder if told.is_encoder_decoder else inner
    return Small(model, SIZE, Letters(LENGTH))


_BERT: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "intermediate_size": 64}  # fmt: skip
TRANSFORMERS: dict[str, Callable[[], Small]] = {
    **{f"transformers: {kind}": partial(in_their_form, kind) for kind in hub_format.FAMILIES},
    "text tower: RoBERTa": partial(with_text, "roberta", "mean_pooler", **_BERT),
    "text tower: XLM-R": partial(with_text, "xlm-roberta", "mean_pooler", **_BERT),
    "text tower: mT5": partial(with_text, "mt5", "mean_pooler", d_model=48, d_kv=12, d_ff=64,
                               num_layers=2, num_heads=4),
    "text tower: NLLB": partial(
        with_text, "m2m_100", "cls_pooler", d_model=48, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=8),
}  # fmt: skip


# ---------------------------------------------------------------------------------------- speed

SIDE, BATCH, PROMPT, CLASSES = 112, 8, 4, 16
WIDTH, DEPTH = 192, 6


def _trunk(kind: Any, **how: Any) -> nn.Module:
    """open_clip's image tower of a trunk of timm's."""
    tower = TimmModel("vit_tiny_patch16_224", 64, image_size=224, pool="token", proj=None)
    tower.trunk = kind(img_size=SIDE, patch_size=16, embed_dim=WIDTH, depth=DEPTH, num_heads=3,
                       num_classes=64, **how)  # fmt: skip
    return tower


def _naflex(**how: Any) -> nn.Module:
    side = SIDE // 16
    config = NaFlexVitCfg(patch_size=16, embed_dim=WIDTH, depth=DEPTH, num_heads=3,
                          pos_embed_grid_size=(side, side), **how)  # fmt: skip
    tower = _trunk(Eva)
    tower.trunk = NaFlexVit(config, num_classes=64, img_size=SIDE)
    return tower


def _open_clip(**how: Any) -> nn.Module:
    tower = {"layers": DEPTH, "width": WIDTH, "patch_size": 16, "image_size": SIDE, **how}
    read = {"layers": 1, "width": 8, "heads": 1, "context_length": 8, "vocab_size": 8}
    return CustomTextCLIP(64, tower, read).visual


_TURNING = {"use_rot_pos_emb": True, "ref_feat_shape": SIDE // 16}
IMAGE_TOWERS: dict[str, Callable[[], nn.Module]] = {
    "open_clip ViT": _open_clip,
    "open_clip ViT, mean of patches": partial(_open_clip, pool_type="avg"),
    "open_clip ViT, attention pooling (CoCa)": partial(
        _open_clip, attentional_pool=True, attn_pooler_heads=4),
    "timm ViT, attention pooling (SigLIP)": partial(
        _trunk, timm.models.VisionTransformer, global_pool="map", class_token=False),
    "timm ViT, class token": partial(_trunk, timm.models.VisionTransformer),
    "timm Eva (EVA02)": partial(
        _trunk, Eva, **_TURNING, qkv_fused=False, swiglu_mlp=True, scale_mlp=True),
    "timm Eva (PE-Core)": partial(
        _trunk, Eva, **_TURNING, global_pool="map", attn_type="rope",
        use_pre_transformer_norm=True, use_fc_norm=False, rope_grid_offset=1.0,
        rope_grid_indexing="xy"),
    "timm NaFlex (SigLIP 2)": partial(_naflex, global_pool="map"),
    "timm NaFlex, rotations of each layer": partial(
        _naflex, global_pool="avg", rope_type="mixed", attn_type="rope"),
}  # fmt: skip
TEXT_TOWERS: dict[str, Callable[[], Small]] = {
    "open_clip, causal (ViT, ConvNeXt, ResNet)": partial(in_their_form, "clip", WIDTH, DEPTH),
    "open_clip, all tokens see all (SigLIP)": partial(in_their_form, "siglip", WIDTH, DEPTH),
    "transformers' XLM-R": partial(
        with_text, "xlm-roberta", "mean_pooler", hidden_size=WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=4, intermediate_size=4 * WIDTH),
}  # fmt: skip
Step = Callable[[], None]
# A plain step, those with prompts, and how many times as many tokens these have.
Steps = tuple[Step, dict[str, Step], float]


def image_steps(make: Callable[[], nn.Module]) -> Steps:
    """Those of an image tower."""
    visual = make().eval().requires_grad_(False)
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    told: Any = trunks.layers_of(visual)
    vectors = [0.02 * torch.randn(PROMPT, told.width) for _ in told.blocks]
    parts = {"first layer": VisualPrompt(vectors[0]), "every layer": DeepVisual(vectors, told.norm)}

    def plain() -> None:
        _pooled(visual(images.clone().requires_grad_())).sum().backward()

    def prompted(part: Any) -> None:
        encode_image(visual, images, inside_of([part], "image")).sum().backward()

    tokens = (SIDE // told.patch) ** 2 + 1
    steps: dict[str, Step] = {depth: partial(prompted, part) for depth, part in parts.items()}
    return plain, steps, (tokens + PROMPT) / tokens


def text_steps(make: Callable[[], Small]) -> Steps:
    """Those of a text tower, in which a prompt takes places that others would have."""
    model, size, letters = make()
    seen = Preprocessing(size, (0.5,) * 3, (0.5,) * 3)
    how: dict[str, Any] = {"device": torch.device("cpu"), "precision": "fp32"}
    backbone = Backbone(model, letters, seen, name="small", **how)
    names = [f"class number {i}" for i in range(CLASSES)]
    encoder = TextEncoder(backbone, ClassTokens.for_context(backbone, names, PROMPT))
    part = Context(0.02 * torch.randn(PROMPT, backbone.text_width))
    ids = backbone.tokenizer([f"a photo of {name}." for name in names])

    def plain() -> None:
        words = backbone.word_embeddings().requires_grad_()
        _pooled(backbone.text(ids)).sum().backward()
        words.requires_grad_(False).grad = None

    def prompted() -> None:
        encoder(inside_of([part], "text")).sum().backward()

    return plain, {"first layer": prompted}, 1.0


def _pooled(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, the first of which is not counted."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = perf_counter()
            step()
            found[name].append(perf_counter() - start)
    return {name: seconds[1:] for name, seconds in found.items()}


def timed(tell: Callable[[str], Any], rounds: int = 20) -> list[dict[str, Any]]:
    """Of each family and kind of prompt: the ratio of times, its quartiles, and that of tokens."""
    torch.manual_seed(0)
    rows = list[dict[str, Any]]()
    images = [("image", name, partial(image_steps, make)) for name, make in IMAGE_TOWERS.items()]
    texts = [("text", name, partial(text_steps, make)) for name, make in TEXT_TOWERS.items()]
    for tower, name, steps in (*images, *texts):
        try:
            plain, prompted, tokens = steps()
        except UserError as error:  # a package is not installed
            tell(f"{name}: {error}")
            continue
        seconds = in_turns({"plain": plain, **prompted}, rounds)
        for depth in prompted:
            pairs = zip(seconds[depth], seconds["plain"], strict=True)
            ratios = [ours / theirs for ours, theirs in pairs]
            low, _, high = quantiles(ratios, n=4, method="inclusive")
            row = {"tower": tower, "family": name, "layers": depth, "tokens": tokens,
                   "time": median(ratios), "low": low, "high": high, "prompt": PROMPT,
                   "rounds": rounds}  # fmt: skip
            rows.append(row)
            tell(f"{tower}, {name}, {depth}: {row['time']:.2f} ({low:.2f} to {high:.2f}) times "
                 f"the time of {tokens:.2f} times the tokens")  # fmt: skip
    return rows
