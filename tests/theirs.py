"""Small models in transformers' form, and the equations by which transformers runs them."""

import json
from functools import partial

import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from safetensors.torch import save_file

from dapt.clip.image import encode_image
from dapt.clip.text import ClassTokens, TextEncoder

VISION = {"hidden_size": 39, "num_hidden_layers": 2, "num_attention_heads": 3,
          "intermediate_size": 95, "patch_size": 8, "image_size": 32}  # fmt: skip
TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 70, "vocab_size": 49408, "max_position_embeddings": 20}  # fmt: skip
KINDS = {
    "clip": {"projection_dim": 24, "vision_config": VISION, "text_config": TEXT},
    # As TinyCLIP's and LAION's: another activation and eps.
    "clip gelu": {"projection_dim": 24, "vision_config": VISION | {"hidden_act": "gelu"},
                  "text_config": TEXT | {"hidden_act": "gelu", "layer_norm_eps": 0.01}},
    "siglip": {"vision_config": VISION, "text_config":
               TEXT | {"vocab_size": 90, "projection_size": 39}},
    "siglip2": {"vision_config": {**VISION, "num_patches": 16}, "text_config":
                TEXT | {"vocab_size": 90, "projection_size": 39}},
    # As CLIP, but 2 is what ends a text there.
    "metaclip_2": {"projection_dim": 24, "vision_config": VISION, "text_config":
                   TEXT | {"vocab_size": 90, "eos_token_id": 2}},
}  # fmt: skip
GELUS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Plain:
    """The equations of transformers' CLIP and SigLIP, over their names of weights."""

    def __init__(self, state, config):
        self.state, self.siglip = state, "siglip" in config["model_type"]
        usual = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
        usual = usual if self.siglip else {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
        self.vision = usual | config["vision_config"]
        self.text = usual | config["text_config"]

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, x, name, part):
        weight, bias = (self.state[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return F.layer_norm(x, weight.shape, weight, bias, part["layer_norm_eps"])

    def attention(self, q, k, v, heads, mask=None):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return (
            ((scores if mask is None else scores + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )

    def mlp(self, x, name, part):
        return self.linear(GELUS[part["hidden_act"]](self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def encoder(self, x, tower, part, mask=None):
        for i in range(part["num_hidden_layers"]):
            name = f"{tower}.encoder.layers.{i}"
            normed = self.norm(x, f"{name}.layer_norm1", part)
            qkv = (self.linear(normed, f"{name}.self_attn.{p}_proj") for p in "qkv")
            mixed = self.attention(*qkv, part["num_attention_heads"], mask)
            x = x + self.linear(mixed, f"{name}.self_attn.out_proj")
            x = x + self.mlp(self.norm(x, f"{name}.layer_norm2", part), f"{name}.mlp", part)
        return x

    def image(self, pixels):
        name, part, side = "vision_model.embeddings", self.vision, self.vision["patch_size"]
        patches = pixels.unfold(2, side, side).unfold(3, side, side)  # (B, 3, h, w, P, P)
        weight = self.state[f"{name}.patch_embedding.weight"]
        # For any aspect, a patch's colours are its last dimension.
        order = (0, 2, 3, 4, 5, 1) if weight.ndim == 2 else (0, 2, 3, 1, 4, 5)
        x = patches.permute(order).flatten(3).flatten(1, 2)
        x = F.linear(x, weight.flatten(1), self.state.get(f"{name}.patch_embedding.bias"))
        if not self.siglip:
            first = self.state[f"{name}.class_embedding"].expand(len(x), 1, -1)
            x = torch.cat([first, x], 1)
        x = x + self.state[f"{name}.position_embedding.weight"]
        if not self.siglip:
            x = self.encoder(self.norm(x, "vision_model.pre_layrnorm", part), "vision_model", part)
            x = self.norm(x[:, 0], "vision_model.post_layernorm", part)
            return self.linear(x, "visual_projection")
        x = self.norm(self.encoder(x, "vision_model", part), "vision_model.post_layernorm", part)
        head = "vision_model.head"
        weights, biases = (self.state[f"{head}.attention.in_proj_{k}"] for k in ("weight", "bias"))
        asked = self.state[f"{head}.probe"].expand(len(x), -1, -1)
        qkv = (F.linear(t, w, b) for t, w, b in
               zip((asked, x, x), weights.chunk(3), biases.chunk(3), strict=True))  # fmt: skip
        x = self.attention(*qkv, part["num_attention_heads"])
        x = self.linear(x, f"{head}.attention.out_proj")
        return (x + self.mlp(self.norm(x, f"{head}.layernorm", part), f"{head}.mlp", part))[:, 0]

    def words(self, ids):
        name, part = "text_model.embeddings", self.text
        x = self.state[f"{name}.token_embedding.weight"][ids]
        x = x + self.state[f"{name}.position_embedding.weight"][: ids.shape[1]]
        causal = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
        x = self.encoder(x, "text_model", part, None if self.siglip else causal)
        x = self.norm(x, "text_model.final_layer_norm", part)
        if self.siglip:
            return self.linear(x[:, -1], "text_model.head")
        end = self.text.get("eos_token_id")
        at = ids.argmax(-1) if end is None else (ids == end).int().argmax(-1)
        return self.linear(x[torch.arange(len(x)), at], "text_projection")


def draw_state(config):
    """Random weights under transformers' names, every one of which counts."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    siglip, state = "siglip" in config["model_type"], {"logit_scale": torch.tensor(1.5)}
    linears, norms = {}, {}
    for tower in ("vision", "text"):
        part, top = config[f"{tower}_config"], f"{tower}_model"
        width, inner = part["hidden_size"], part["intermediate_size"]
        for i in range(part["num_hidden_layers"]):
            name = f"{top}.encoder.layers.{i}"
            for kind in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linears[f"{name}.self_attn.{kind}"] = (width, width)
            linears |= {f"{name}.mlp.fc1": (inner, width), f"{name}.mlp.fc2": (width, inner)}
            norms |= {f"{name}.layer_norm1": width, f"{name}.layer_norm2": width}
    vision, text = config["vision_config"], config["text_config"]
    width, side, grid = vision["hidden_size"], vision["patch_size"], 4
    patch = (
        (width, 3 * side * side) if config["model_type"] == "siglip2" else (width, 3, side, side)
    )
    state["vision_model.embeddings.patch_embedding.weight"] = draw(*patch)
    state["vision_model.embeddings.position_embedding.weight"] = draw(grid**2 + (not siglip), width)
    state["text_model.embeddings.token_embedding.weight"] = draw(text["vocab_size"], 32)
    state["text_model.embeddings.position_embedding.weight"] = draw(20, 32)
    norms |= {"vision_model.post_layernorm": width, "text_model.final_layer_norm": 32}
    if siglip:
        head = "vision_model.head"
        state |= {"logit_bias": torch.tensor([-2.0]), "logit_scale": torch.tensor([1.5]),
                  "vision_model.embeddings.patch_embedding.bias": draw(width),
                  f"{head}.probe": draw(1, 1, width),
                  f"{head}.attention.in_proj_weight": draw(3 * width, width),
                  f"{head}.attention.in_proj_bias": draw(3 * width)}  # fmt: skip
        inner = vision["intermediate_size"]
        linears |= {f"{head}.attention.out_proj": (width, width), f"{head}.mlp.fc1": (inner, width),
                    f"{head}.mlp.fc2": (width, inner), "text_model.head": (39, 32)}  # fmt: skip
        norms |= {f"{head}.layernorm": width}
    else:
        state |= {"vision_model.embeddings.class_embedding": draw(width),
                  "visual_projection.weight": draw(24, width),
                  "text_projection.weight": draw(24, 32)}  # fmt: skip
        norms |= {"vision_model.pre_layrnorm": width}
    for name, shape in linears.items():
        state |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[0])}
    for name, size in norms.items():
        state |= {f"{name}.weight": 1 + draw(size), f"{name}.bias": draw(size)}
    return state


def make_folder(place, kind="clip", **changes):
    """A folder as `save_pretrained` leaves it, but for a vocabulary, with its state dict."""
    place.mkdir(parents=True, exist_ok=True)
    config = {"model_type": kind.split()[0], **KINDS[kind], **changes}
    state = draw_state(config)
    (place / "config.json").write_text(json.dumps(config))
    save_file(state, place / "model.safetensors", {"format": "pt"})
    return config, state


class LetterTokenizer:
    """Stands in for a vocabulary of transformers: a token a letter, 2 at the end, then 1s."""

    context_length = 20

    def __init__(self, *_, **given):
        type(self).given = given

    def __call__(self, texts, context_length=20):
        ids = torch.ones(len(texts), context_length, dtype=torch.long)
        for i, text in enumerate(texts):
            row = [*[3 + ord(c) % 80 for c in text][: context_length - 1], 2]
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return ids


def vocabulary(merges):
    """A CLIP's vocabulary of these merges, as transformers has it."""
    letters = list(SimpleTokenizer().byte_encoder.values())
    words = [*letters, *(f"{c}</w>" for c in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}


def features(backbone):
    """Pixels and ids, and what the backbone's towers make of them."""
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    names = ["cat", "sea lion", "hot air balloon"]
    tokens = ClassTokens.for_template(backbone, names, "a {}.")
    ids = backbone.tokenizer([f"a {n}." for n in names], context_length=20)
    with torch.no_grad():
        return pixels, ids, encode_image(backbone.visual, pixels), TextEncoder(backbone, tokens)()


def alike(found, expected):
    found, expected = (F.normalize(t, dim=-1) for t in (found, expected))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
