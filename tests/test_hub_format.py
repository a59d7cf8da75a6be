"""Models in transformers' form give what transformers makes of the same folder."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from safetensors.torch import load_file, save_file

from dapt.clip import hub_format
from dapt.clip.image import encode_image
from dapt.clip.sources import load_backbone, taken_for_granted
from dapt.clip.text import ClassTokens, TextEncoder
from dapt.errors import UserError

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
}  # fmt: skip
GELUS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Plain:
    """The equations of transformers' CLIP and SigLIP, over their names of weights."""

    def __init__(self, state, config):
        self.state, self.siglip = state, config["model_type"] != "clip"
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
        return self.linear(x[torch.arange(len(x)), ids.argmax(-1)], "text_projection")


def draw_state(config):
    """Random weights under transformers' names, every one of which counts."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    siglip, state = config["model_type"] != "clip", {"logit_scale": torch.tensor(1.5)}
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
    """Stands in for a vocabulary that transformers would read: a token a letter."""

    context_length = 20

    def __init__(self, *_, **given):
        type(self).given = given

    def __call__(self, texts, context_length=20):
        ids = torch.ones(len(texts), context_length, dtype=torch.long)
        for i, text in enumerate(texts):
            row = [2 + ord(c) % 80 for c in text][: context_length - 1]
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return ids


@pytest.fixture
def letters(monkeypatch):
    monkeypatch.setattr(hub_format, "HFTokenizer", LetterTokenizer)
    return LetterTokenizer


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


@pytest.mark.parametrize("kind", KINDS)
def test_towers_follow_the_equations(tmp_path, kind, letters):
    config, state = make_folder(tmp_path, kind)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    if kind.startswith("clip"):
        (tmp_path / "tokenizer.json").unlink()
    backbone = load_backbone(str(tmp_path))
    pixels, ids, image, text = features(backbone)
    plain = Plain(state, config)
    alike(image, plain.image(pixels))
    alike(text, plain.words(ids))
    assert backbone.logit_scale == pytest.approx(torch.tensor(1.5).exp().item())
    assert (backbone.vision_width, backbone.text_width, backbone.patch_size) == (39, 32, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_towers_give_what_transformers_gives(tmp_path, kind, letters):
    transformers = pytest.importorskip("transformers")
    make_folder(tmp_path, kind)
    if not kind.startswith("clip"):
        (tmp_path / "tokenizer.json").write_text("{}")
    pixels, ids, image, text = features(load_backbone(str(tmp_path)))
    model = transformers.AutoModel.from_pretrained(str(tmp_path)).eval()
    given = {"pixel_values": pixels}
    if kind == "siglip2":
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
        given = {"pixel_values": patches.flatten(3).flatten(1, 2),
                 "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
                 "spatial_shapes": torch.tensor([[4, 4]] * 3)}  # fmt: skip
    with torch.no_grad():
        theirs = model(input_ids=ids, **given)
    alike(image, theirs.image_embeds)
    alike(text, theirs.text_embeds)


def test_chinese_clip_gives_what_transformers_gives(tmp_path, letters):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64, "vocab_size": 90, "pad_token_id": 1}  # fmt: skip
    config = transformers.ChineseCLIPConfig(
        text_config=small, vision_config=VISION, projection_dim=24
    )
    model = transformers.ChineseCLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    pixels, ids, image, text = features(load_backbone(str(tmp_path)))
    with torch.no_grad():
        mask = (ids != 1).long()
        theirs = model(input_ids=ids, pixel_values=pixels, attention_mask=mask)
    alike(image, theirs.image_embeds)
    alike(text, theirs.text_embeds)


# ------------------------------------------------------------------------------- configurations


def test_early_configurations_count_as_they_do_there(tmp_path):
    """Towers said twice: the second counts, with its defaults, as in transformers."""
    _, state = make_folder(tmp_path / "a")
    changed = {"text_config": {**TEXT, "hidden_size": 1}, "text_config_dict": TEXT,
               "vision_config_dict": None}  # fmt: skip
    config = {"model_type": "clip", **KINDS["clip"], **changed}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "b" / "model.safetensors")
    first, second = (load_backbone(str(tmp_path / name)) for name in "ab")
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "blip"}, "transformers model of type 'blip'; those of type clip, siglip"),
        ({"model_type": ["clip"]}, "those of type clip, siglip"),
        ({"text_config": TEXT | {"hidden_act": "relu"}}, "asks for the activation 'relu'"),
        ({"text_config": TEXT | {"hidden_act": "gelu"}}, "two activations, quick_gelu and gelu"),
        ({"text_config": 3}, "is no transformers model that can be read"),
        ({"vision_config": VISION | {"num_attention_heads": 0}}, "that can be read"),
        ({"vision_config": VISION | {"num_attention_heads": 5}}, "its width 39 is not 5 heads'"),
        ({"vision_config": VISION | {"num_hidden_layers": 10**9}}, "do not make 1,000,000,003 lay"),
        ({"vision_config": VISION | {"image_size": 2**20}}, "larger than 2048 px"),
        ({"text_config": TEXT | {"max_position_embeddings": 10**9}}, "longer than 1024 tokens"),
        ({"vision_config": VISION | {"intermediate_size": 94}}, "mlp.fc1.weight' has shape"),
        ({"text_config": TEXT | {"num_hidden_layers": 4}},
         "'text_model.encoder.layers.3.layer_norm1.weight' is not among them"),
        ({"text_config": TEXT | {"num_hidden_layers": 2}},
         "no place for 'text_model.encoder.layers.2"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(tmp_path, changes, said):
    make_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=said):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("vision_model.encoder.layers.1.self_attn.k_proj.bias", None),
        ("vision_model.encoder.layers.1.self_attn.q_proj.bias", "layers.1.self_attn"),
        ("text_model.final_layer_norm.weight", None),
        ("visual_projection.weight", None),
    ],
)
def test_an_absent_tensor_is_called_as_in_the_file(tmp_path, gone, said):
    _, state = make_folder(tmp_path)
    del state[gone]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"'.*{said or gone}.*'"):
        load_backbone(str(tmp_path))


def test_a_half_of_clip_is_refused(tmp_path):
    _, state = make_folder(tmp_path)
    half = {k: v for k, v in state.items() if not k.startswith("vision")}
    save_file(half, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="'vision_model.embeddings.class_embedding' is not among"):
        load_backbone(str(tmp_path))


def test_what_a_trainer_leaves_beside_the_weights(tmp_path):
    """Half precision, shards with an index, an optimiser's state."""
    _, state = make_folder(tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "config.json").write_text((tmp_path / "whole/config.json").read_text())
    torch.save({"state": {}}, tmp_path / "parts" / "optimizer.pt")
    torch.save([1], tmp_path / "parts" / "training_args.bin")
    listed = {}
    for number in (1, 2):
        name = f"model-{number:05}-of-00002.safetensors"
        part = {k: v for i, (k, v) in enumerate(state.items()) if i % 2 + 1 == number}
        save_file(part, tmp_path / "parts" / name)
        listed |= dict.fromkeys(part, name)
    index = tmp_path / "parts" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    whole, parts = (load_backbone(str(tmp_path / name)) for name in ("whole", "parts"))
    assert whole.fingerprint == parts.fingerprint
    (tmp_path / "parts" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="lists model-00002-of-00002.safetensors, which is not"):
        load_backbone(str(tmp_path / "parts"))
    index.write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    with pytest.raises(UserError, match="lists no files beside it"):
        load_backbone(str(tmp_path / "parts"))
    half = {k: v.bfloat16() for k, v in state.items()}
    save_file(half, tmp_path / "whole" / "model.safetensors")
    assert load_backbone(str(tmp_path / "whole")).visual.proj.dtype == torch.float32


# --------------------------------------------------------------------------- images and words


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_images_are_made_ready_as_the_folder_says(tmp_path, name):
    make_folder(tmp_path)
    assert "no preprocessor_config.json or tokenizer.json" in taken_for_granted(str(tmp_path))
    said = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "resample": 2,
            "image_std": [0.5] * 3, "do_normalize": True, "rescale_factor": 1 / 255}  # fmt: skip
    nested = {"image_processor": said, "processor_class": "CLIPProcessor"}
    (tmp_path / name).write_text(json.dumps(nested if name.startswith("proc") else said))
    seen = load_backbone(str(tmp_path)).preprocessing
    assert (seen.mean, seen.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert (seen.size, seen.resize_mode, seen.interpolation) == (32, "squash", "bilinear")
    assert "no tokenizer.json:" in taken_for_granted(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": {"shortest_edge": 36}, "crop_size": 32}, r"cropped to \[32, 36\]"),
        ({"do_rescale": False}, "here they are resized to the tower's 32 px, from 0 to 1"),
        ({"rescale_factor": 1 / 127.5}, "from 0 to 1"),
        ({"image_mean": [0.5]}, "says of images what cannot be"),
        ({"resample": 9}, "no transformers model that can be read"),
        ({"size": "large"}, "no transformers model that can be read|asks for images"),
    ],
)
def test_other_preprocessing_is_refused(tmp_path, changes, said):
    make_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changes))
    with pytest.raises(UserError, match=said):
        load_backbone(str(tmp_path))


def vocabulary(merges):
    """A CLIP's vocabulary of these merges, as transformers has it."""
    letters = list(SimpleTokenizer().byte_encoder.values())
    words = [*letters, *(f"{c}</w>" for c in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}


@pytest.mark.parametrize("form", ["two files", "one file", "one file of pairs"])
def test_a_vocabulary_of_its_own(tmp_path, form):
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o")]
    words = vocabulary(merges)
    text = {**TEXT, "vocab_size": len(words), "eos_token_id": len(words) - 1}
    make_folder(tmp_path, text_config=text)
    with pytest.raises(UserError, match="holds no vocabulary"):
        load_backbone(str(tmp_path))
    if form == "two files":
        (tmp_path / "vocab.json").write_text(json.dumps(words))
        lines = ["#version: 0.2", *map(" ".join, merges)]
        (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    else:
        pairs = merges if form.endswith("pairs") else [" ".join(m) for m in merges]
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": words, "merges": pairs}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    backbone = load_backbone(str(tmp_path))
    start, end = words["<|startoftext|>"], words["<|endoftext|>"]
    assert backbone.tokenize(["Cat"]) == [[start, words["cat</w>"], end]]
    assert backbone.tokenize(["dog"]) == [[start, words["do"], words["g</w>"], end]]


def test_clips_own_vocabulary_is_the_same_from_files(tmp_path):
    """What open_clip would make of the weights is found again, by its fingerprint."""
    make_folder(tmp_path)
    bare, usual = load_backbone(str(tmp_path)), SimpleTokenizer()
    merges = list(usual.bpe_ranks)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary(merges)))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    words = json.loads((tmp_path / "vocab.json").read_text())
    assert words.items() - usual.encoder.items() == {("<|startoftext|>", 49406),
                                                     ("<|endoftext|>", 49407)}  # fmt: skip
    assert load_backbone(str(tmp_path)).fingerprint == bare.fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": None}, "lacks 'a'"),
        ({"<|endoftext|>": 3}, "texts end with token 3"),
        ({"<|startoftext|>": None}, "cannot be used"),
        ({"a": "x"}, "cannot be used"),
    ],
)
def test_a_vocabulary_that_does_not_fit(tmp_path, change, said):
    words = {k: v for k, v in {**vocabulary([]), **change}.items() if v is not None}
    make_folder(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=said):
        load_backbone(str(tmp_path))


def test_an_end_that_is_not_the_greatest_token(tmp_path):
    """A fine-tuned model with tokens added after the end: the end is still what is read."""
    text = {**TEXT, "vocab_size": 49410, "eos_token_id": 49407}
    config, state = make_folder(tmp_path, text_config=text)
    words = vocabulary(list(SimpleTokenizer().bpe_ranks)) | {"<new>": 49408, "<newer>": 49409}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    lines = ["#version: 0.2", *map(" ".join, SimpleTokenizer().bpe_ranks)]
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    backbone = load_backbone(str(tmp_path))
    assert backbone.text.pool_type == "eos"
    _, ids, _, text_features = features(backbone)
    alike(text_features, Plain(state, config).words(ids))


def test_nothing_beside_a_vocabulary_is_run(tmp_path, letters):
    make_folder(tmp_path, "siglip")
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    load_backbone(str(tmp_path))
    assert letters.given["trust_remote_code"] is False
    assert letters.given["local_files_only"] is True


# ----------------------------------------------------------------- packages and the hub


@pytest.fixture
def without_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)


PIP = r"needs the package transformers, which is not installed: pip install 'dapt-clip\[siglip\]'"


def test_a_missing_package_is_named(tmp_path, without_transformers):
    make_folder(tmp_path, "siglip")
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match=f"the tokenizer in .* {PIP}"):
        load_backbone(str(tmp_path))
    config = {"model_type": "chinese_clip", "vision_config": VISION}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"BERT.* {PIP}"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    "given",
    [("ViT-B-16-SigLIP", "webli"), ("xlm-roberta-base-ViT-B-32", "laion5b_s13b_b90k"),
     ("xlm-roberta-base-ViT-B-32", "random")],
)  # fmt: skip
def test_a_missing_package_is_no_fault_of_the_network(given, without_transformers, monkeypatch):
    monkeypatch.setattr("open_clip.create_model", lambda *_, **__: 1 / 0)  # nothing is fetched
    with pytest.raises(UserError, match=PIP):
        load_backbone(*given)


def test_a_package_that_the_hubs_client_lacks(monkeypatch):
    def fetch(*_, **__):
        raise ValueError("Fast download needs 'hf_transfer'. Try `pip install hf_transfer`.")

    monkeypatch.setattr("dapt.clip.sources.snapshot_download", fetch)
    with pytest.raises(UserError, match="hf_transfer, which is not installed: pip install 'hf_tr"):
        load_backbone("org/repo")


def test_from_the_hub_comes_what_a_folder_holds(tmp_path, monkeypatch):
    """Of one commit: first what is small, then safetensors, else PyTorch's file."""
    commit = "a" * 40
    folder = tmp_path / "snapshots" / commit
    _, state = make_folder(folder)
    expected = load_backbone(str(folder)).fingerprint
    weights = folder / "model.safetensors"
    for there in ("safetensors", "bin"):
        weights.unlink(missing_ok=True)
        asked = []

        def fetch(repo, revision=None, allow_patterns=(), there=there, asked=asked):
            asked.append((revision, allow_patterns[0]))
            if there == "bin" and "pytorch_model*.bin" in allow_patterns:
                torch.save(state, folder / "pytorch_model.bin")
            elif there == "safetensors" and "model.safetensors" in allow_patterns:
                save_file(state, weights)
            return str(folder)

        monkeypatch.setattr("dapt.clip.sources.snapshot_download", fetch)
        monkeypatch.setattr("dapt.clip.sources.download_pretrained_from_hf", lambda *_: 1 / 0)
        backbone = load_backbone(f"org/repo@{commit}")
        assert (backbone.fingerprint, backbone.revision) == (expected, commit)
        assert asked[0] == (commit, "*.json")
        assert asked[1] == (commit, "model.safetensors")
        assert len(asked) == (2 if there == "safetensors" else 3)


def test_a_file_of_their_weights_alone_says_what_it_lacks(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(UserError, match="but 'logit_scale'.*config.json of transformers"):
        load_backbone(str(tmp_path / "model.safetensors"))
    assert len(load_file(tmp_path / "model.safetensors")) > 80
