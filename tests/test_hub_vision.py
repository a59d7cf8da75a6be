"""Models of images alone in transformers' form: their equations, their files, what is refused."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import Eva, VisionTransformer

from dapt.clip.image import encode_image
from dapt.clip.sources import load_backbone, taken_for_granted
from dapt.engine.data import open_data
from dapt.engine.evaluate import evaluate_task
from dapt.engine.features import Shared
from dapt.engine.fit import fit
from dapt.errors import UserError
from dapt.settings import make_settings

WIDTH, HEADS, LAYERS, PATCH, SIDE = 24, 2, 2, 8, 32
SIZES = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
         "patch_size": PATCH, "image_size": SIDE, "layer_norm_eps": 1e-3}  # fmt: skip
# Of each kind: its type, what stands before its names, and what else it says.
KINDS = {
    "vit": ("vit", "", {"intermediate_size": 50}),
    "a vit that classifies": ("vit", "vit.", {"intermediate_size": 50, "hidden_act": "gelu_new"}),
    "dinov2": ("dinov2", "", {}),
    "dinov2 giant": ("dinov2", "dinov2.", {"use_swiglu_ffn": True}),
    "registers": ("dinov2_with_registers", "", {"num_register_tokens": 3}),
    "dinov3": ("dinov3_vit", "", {"num_register_tokens": 4, "intermediate_size": 50}),
    "dinov3 plus": ("dinov3_vit", "model.", {"num_register_tokens": 4, "intermediate_size": 50,
                                             "use_gated_mlp": True, "hidden_act": "silu"}),
}  # fmt: skip


def names_of(kind):
    """Of a layer: where it is, its norms, attention's maps and the way out of attention."""
    attention = "attention.attention"
    if kind == "dinov3_vit":
        maps = [f"attention.{part}_proj" for part in "qkv"]
        return "layer.", ("norm1", "norm2"), maps, "attention.o_proj"
    norms = ("layernorm_before", "layernorm_after") if kind == "vit" else ("norm1", "norm2")
    maps = [f"{attention}.{part}" for part in ("query", "key", "value")]
    return "encoder.layer.", norms, maps, "attention.output.dense"


def make_folder(folder, name="vit", processor=None, **changes):
    """A folder as `save_pretrained` leaves it; its configuration and random state dict."""
    kind, before, more = KINDS[name]
    config = {"model_type": kind, **SIZES, **more, **changes}
    generator, state = torch.Generator().manual_seed(2), {}

    def draw(place, *shape, add=0.0):
        state[before + place] = add + 0.3 * torch.randn(*shape, generator=generator)

    def linear(place, size, inner=WIDTH, bias=True):
        draw(f"{place}.weight", size, inner)
        if bias:
            draw(f"{place}.bias", size)

    def norm(place):
        draw(f"{place}.weight", WIDTH, add=1.0)
        draw(f"{place}.bias", WIDTH)

    three, hidden = kind == "dinov3_vit", config.get("intermediate_size", 4 * WIDTH)
    draw("embeddings.cls_token", 1, 1, WIDTH)
    patches = "embeddings.patch_embeddings" + ("" if three else ".projection")
    draw(f"{patches}.weight", WIDTH, 3, PATCH, PATCH)
    draw(f"{patches}.bias", WIDTH)
    if not three:
        draw("embeddings.position_embeddings", 1, (SIDE // PATCH) ** 2 + 1, WIDTH)
    if kind != "vit":
        draw("embeddings.mask_token", 1, WIDTH)
    if "num_register_tokens" in config:
        draw("embeddings.register_tokens", 1, config["num_register_tokens"], WIDTH)
    where, norms, maps, out = names_of(kind)
    for i in range(LAYERS):
        for one in norms:
            norm(f"{where}{i}.{one}")
        for one in (*maps, out):
            linear(f"{where}{i}.{one}", WIDTH, bias=not (three and "k_proj" in one))
        for one in ("layer_scale1", "layer_scale2") * (kind != "vit"):
            draw(f"{where}{i}.{one}.lambda1", WIDTH)
        if kind == "vit":
            linear(f"{where}{i}.intermediate.dense", hidden)
            linear(f"{where}{i}.output.dense", WIDTH, hidden)
        elif config.get("use_swiglu_ffn"):
            linear(f"{where}{i}.mlp.weights_in", 2 * 64)
            linear(f"{where}{i}.mlp.weights_out", WIDTH, 64)
        elif three:
            for one in ("up_proj", "gate_proj")[: 1 + bool(config.get("use_gated_mlp"))]:
                linear(f"{where}{i}.mlp.{one}", hidden)
            linear(f"{where}{i}.mlp.down_proj", WIDTH, hidden)
        else:
            linear(f"{where}{i}.mlp.fc1", hidden)
            linear(f"{where}{i}.mlp.fc2", WIDTH, hidden)
    norm("norm" if three else "layernorm")
    bare = {name.removeprefix(before): tensor for name, tensor in state.items()}
    state |= {"classifier.weight": torch.ones(5, WIDTH), "classifier.bias": torch.ones(5)}
    if before == "" and kind == "vit":
        state |= {"pooler.dense.weight": torch.ones(WIDTH, WIDTH)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file(state, folder / "model.safetensors")
    return config, bare


def plain(config, state, pixels):
    """The class token's features by transformers' equations, over its names of weights."""
    kind, eps = config["model_type"], config["layer_norm_eps"]
    where, norms, maps, out = names_of(kind)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def turned(x, start):
        """Rotations by where a patch is: halves of a head's numbers, cosines and sines."""
        grid = pixels.shape[-1] // PATCH
        at = (torch.arange(grid) + 0.5) / grid * 2 - 1
        places = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).flatten(0, 1)
        each = WIDTH // HEADS
        speeds = 100.0 ** -(torch.arange(each // 4) * 4 / each)
        angles = (2 * math.pi * places[:, :, None] * speeds).flatten(1).tile(2)
        one, other = x[:, :, start:].chunk(2, -1)
        half = torch.cat([-other, one], -1)
        return torch.cat([x[:, :, :start], x[:, :, start:] * angles.cos() + half * angles.sin()], 2)

    patches = "embeddings.patch_embeddings" + ("" if kind == "dinov3_vit" else ".projection")
    weight, bias = state[f"{patches}.weight"], state[f"{patches}.bias"]
    x = F.conv2d(pixels, weight, bias, stride=PATCH).flatten(2).mT
    x = torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    if "embeddings.position_embeddings" in state:
        x = x + state["embeddings.position_embeddings"]
    registers = state.get("embeddings.register_tokens", torch.zeros(1, 0, WIDTH))
    x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(LAYERS):
        at = f"{where}{i}."
        normed = norm(x, at + norms[0])
        q, k, v = (linear(normed, at + m).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in maps)
        if kind == "dinov3_vit":
            q, k = (turned(t, 1 + registers.shape[1]) for t in (q, k))
        mixed = ((q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        scales = [state.get(f"{at}layer_scale{n}.lambda1", torch.ones(WIDTH)) for n in (1, 2)]
        x = x + scales[0] * linear(mixed, at + out)
        normed = norm(x, at + norms[1])
        approximate = "tanh" if config.get("hidden_act") == "gelu_new" else "none"
        if kind == "vit":
            hidden = F.gelu(linear(normed, f"{at}intermediate.dense"), approximate=approximate)
            made = linear(hidden, f"{at}output.dense")
        elif config.get("use_swiglu_ffn"):
            gate, up = linear(normed, f"{at}mlp.weights_in").chunk(2, -1)
            made = linear(F.silu(gate) * up, f"{at}mlp.weights_out")
        elif config.get("use_gated_mlp"):
            gate = F.silu(linear(normed, f"{at}mlp.gate_proj"))
            made = linear(gate * linear(normed, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")
        else:
            first, second = ("up_proj", "down_proj") if kind == "dinov3_vit" else ("fc1", "fc2")
            made = linear(F.gelu(linear(normed, f"{at}mlp.{first}")), f"{at}mlp.{second}")
        x = x + scales[1] * made
    return norm(x, "norm" if kind == "dinov3_vit" else "layernorm")[:, 0]


@pytest.mark.parametrize("name", KINDS)
def test_features_follow_the_equations(tmp_path, name):
    config, state = make_folder(tmp_path, name)
    backbone = load_backbone(str(tmp_path))
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = encode_image(backbone.visual, pixels)
    torch.testing.assert_close(found, plain(config, state, pixels), atol=1e-5, rtol=1e-5)
    assert type(backbone.visual.trunk) is (Eva if "dinov3" in name else VisionTransformer)
    assert not backbone.reads_text
    assert (backbone.vision_width, backbone.patch_size) == (WIDTH, PATCH)


def test_such_a_folder_is_trained_on(tmp_path, photo_folder):
    make_folder(tmp_path / "vit", "vit")
    given = {"dataset": str(photo_folder), "backbone": str(tmp_path / "vit"), "shots": 4}
    settings = make_settings({**given, "device": "cpu", "method": "auto"})
    data = open_data(settings)
    found = fit(data, settings, shared=Shared(load_backbone(settings.backbone)))
    assert evaluate_task(found.classifier, data.task, settings)["accuracy"] > 0.4  # of 3 colours


# ---------------------------------------------------------------------------- how images are seen

CROPPED = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32},
           "do_center_crop": True, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "processor", "size", "mode", "interpolation"),
    [
        ("vit", {"size": 32}, 32, "squash", "bilinear"),
        ("vit", {"size": {"height": 32, "width": 32}, "resample": 3}, 32, "squash", "bicubic"),
        ("dinov2", CROPPED, 32, "shortest", "bicubic"),
        ("dinov2", {"size": 40, "crop_size": 32}, 32, "shortest", "bicubic"),
        ("dinov3", {"size": {"height": 48, "width": 48}, "crop_size": None, "resample": 2},
         48, "squash", "bilinear"),
        ("dinov3", {}, 32, "squash", "bilinear"),
    ],
)  # fmt: skip
def test_images_are_seen_as_the_folder_says(tmp_path, name, processor, size, mode, interpolation):
    make_folder(tmp_path, name, processor)
    seen = load_backbone(str(tmp_path)).preprocessing
    assert (seen.size, seen.resize_mode, seen.interpolation) == (size, mode, interpolation)
    if "image_mean" in processor:
        assert seen.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(("name", "antialias"), [("dinov2", False), ("registers", True)])
def test_positions_are_fitted_to_the_size_that_images_have(tmp_path, name, antialias):
    processor = {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}}
    config, state = make_folder(tmp_path, name, processor)
    backbone = load_backbone(str(tmp_path))
    places = state["embeddings.position_embeddings"]
    square = places[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    fitted = F.interpolate(square, (3, 3), mode="bicubic", antialias=antialias).flatten(2).mT
    state["embeddings.position_embeddings"] = torch.cat([places[:, :1], fitted], 1)
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = encode_image(backbone.visual, pixels)
    torch.testing.assert_close(found, plain(config, state, pixels), atol=1e-5, rtol=1e-5)


def test_a_folder_without_a_vocabulary_lacks_nothing(tmp_path):
    make_folder(tmp_path / "told", processor={"size": 32})
    make_folder(tmp_path / "untold")
    assert taken_for_granted(str(tmp_path / "told")) is None
    found = taken_for_granted(str(tmp_path / "untold"))
    assert "holds no preprocessor_config.json: what is usual" in found


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("vit", {"model_type": "swin"}, "'swin'; those of type clip, .*vit, dinov2"),
        ("vit", {"hidden_act": "relu"}, "asks for the activation 'relu'"),
        ("vit", {"num_attention_heads": 5}, "its width 24 is not 5 heads'"),
        ("vit", {"num_attention_heads": 0}, "that can be read"),
        ("vit", {"num_hidden_layers": 10**9}, "do not make 1,000,000,000 layers"),
        ("vit", {"image_size": 2**20}, "not of 1 to 2048 px"),
        ("vit", {"image_size": [32, 32]}, r"its image_size is \[32, 32\]"),
        ("vit", {"patch_size": 5}, "32 px are no whole patches of 5 px"),
        ("vit", {"num_channels": 1}, "no colours"),
        ("vit", {"intermediate_size": 51}, "'encoder.layer.0.intermediate.dense.weight' has shape"),
        ("dinov2", {"num_hidden_layers": 3}, "'encoder.layer.2.norm1.weight' is not among"),
        ("dinov2", {"num_hidden_layers": 1}, "no place for 'encoder.layer.1"),
        ("dinov3", {"key_bias": True}, "key_bias True; of such a DINOv3, only those with False"),
        ("dinov3", {"hidden_act": "silu"}, "hidden_act 'silu'; .* only those with 'gelu'"),
        ("dinov3", {"num_register_tokens": 3}, "'embeddings.register_tokens' has shape"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, name, changes, said):
    make_folder(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=said):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("gone", ["query.bias", "key.weight"])
def test_an_absent_tensor_is_called_as_in_the_file(tmp_path, gone):
    _, state = make_folder(tmp_path)
    del state[f"encoder.layer.1.attention.attention.{gone}"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'encoder\.layer\.1\.attention\.attention\."):
        load_backbone(str(tmp_path))


def test_a_processor_that_asks_for_something_else_is_refused(tmp_path):
    make_folder(tmp_path, processor={"size": {"height": 32, "width": 40}})
    with pytest.raises(UserError, match=r"resized or cropped to \[32, 40\]"):
        load_backbone(str(tmp_path))


def test_from_the_hub_nothing_is_fetched_of_what_cannot_be_used(tmp_path, monkeypatch):
    make_folder(tmp_path, "dinov3", key_bias=True)
    asked = []
    monkeypatch.setattr(
        "dapt.clip.sources.snapshot_download", lambda *_, **k: asked.append(k) or str(tmp_path)
    )
    with pytest.raises(UserError, match="key_bias"):
        load_backbone("org/repo")
    assert [k["allow_patterns"][0] for k in asked] == ["*.json"]
    make_folder(tmp_path, "dinov3")
    expected = load_backbone(str(tmp_path)).fingerprint
    assert load_backbone("org/repo").fingerprint == expected
