"""Backbones from every source, and the refusal of what is none."""

import json
import shutil
import zipfile

import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file

from conftest import tiny_config
from dapt.backbone import config_from_shapes, load_backbone
from dapt.errors import UserError
from dapt.weights import read_state_dict


@pytest.fixture(scope="module")
def state(tiny_weights):
    return load_file(tiny_weights)


def same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_architecture_is_read_from_the_shapes(state):
    config, expected = config_from_shapes(state), tiny_config()
    for part in ("vision_cfg", "text_cfg"):
        assert expected[part].items() <= config[part].items()
    assert config["embed_dim"] == 32
    assert config["quick_gelu"]


@pytest.mark.parametrize("wrap", [False, True])
def test_torch_files_are_loaded_weights_only(state, tmp_path, wrap):
    file = tmp_path / "clip.pt"
    content = {"state_dict": {f"module.{k}": v for k, v in state.items()}} if wrap else state
    torch.save(content, file)
    same_weights(read_state_dict(file), state)
    assert load_backbone(str(file)).vision_width == 64


def test_torchscript_archive(state, tmp_path, tiny_weights):
    model = CLIP(**tiny_config()).eval()
    model.load_state_dict(state)
    # As in OpenAI's archives: weights at half precision beside three describing numbers.
    model.half()
    for i, name in enumerate(("input_resolution", "context_length", "vocab_size")):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(i))
    file = tmp_path / "ViT-tiny.pt"
    torch.jit.trace_module(model.float(), {"encode_image": torch.zeros(1, 3, 32, 32)}).save(file)
    found = read_state_dict(file)
    assert found.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-3)
    first, second = load_backbone(str(file)), load_backbone(str(tiny_weights))
    assert first.fingerprint != second.fingerprint  # halved once
    assert first.preprocessing == second.preprocessing


class _Bomb:
    def __reduce__(self):
        return (print, ("this must never be printed",))


@pytest.mark.parametrize("kind", ["pickle", "torchscript"])
def test_nothing_in_a_file_is_run(tmp_path, capsys, kind):
    file = tmp_path / "bad.pt"
    torch.save({"weights": _Bomb()}, file)
    if kind == "torchscript":
        with zipfile.ZipFile(file) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            pickled = archive.read(name)
        file.unlink()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("bad/data.pkl", pickled)
            archive.writestr("bad/constants.pkl", b"")
    with pytest.raises(UserError, match=r"bad\.pt could not be read as weights"):
        read_state_dict(file)
    assert "never" not in capsys.readouterr().out


def test_directory_with_config(state, tmp_path):
    save_file(state, tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": tiny_config(quick_gelu=False),
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"},
    }
    with pytest.raises(UserError, match="has no open_clip_config.json"):
        load_backbone(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    backbone = load_backbone(str(tmp_path))
    assert backbone.preprocessing.mean == (0.5, 0.5, 0.5)
    assert backbone.preprocessing.resize_mode == "squash"
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())
    white = backbone.normalize(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    torch.testing.assert_close(white, torch.full_like(white, 2.0))

    shutil.copy(tmp_path / "open_clip_config.json", tmp_path / "other")
    config["model_cfg"]["embed_dim"] = 48
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="do not fit their model"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ViT-B-61",), r"unknown backbone 'ViT-B-61' \(did you mean 'ViT-B-16'\?\)"),
        (("ViT-B-16", "opnai"), r"unknown weights 'opnai'.*did you mean 'openai'"),
        (("ViT-H-14",), "needs pretrained weights: one of laion2b"),
        (("nowhere/clip.pt",), r"nowhere/clip\.pt does not exist"),
    ],
)
def test_unknown_backbones_are_named(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        load_backbone(*arguments)


def test_unknown_device_and_precision_are_named(tiny_weights):
    with pytest.raises(UserError, match="unknown precision 'fp8'"):
        load_backbone(str(tiny_weights), precision="fp8")
    with pytest.raises(UserError, match="device 'gpu' is not available"):
        load_backbone(str(tiny_weights), device="gpu")


def test_weights_without_clip_in_them(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no weights named as OpenAI's CLIP names them"):
        load_backbone(str(tmp_path / "a.safetensors"))
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="could not be read as weights"):
        load_backbone(str(tmp_path / "b.safetensors"))


def test_activation_follows_the_weights_not_the_name(monkeypatch):
    """ViT-B-32's config says GELU, OpenAI's weights were trained with QuickGELU."""
    import open_clip

    asked = {}

    def create(name, **arguments):
        asked.update(arguments, name=name)
        raise RuntimeError("no network in a test")

    monkeypatch.setattr(open_clip, "create_model", create)
    for name, tag, quick in (
        ("ViT-B-32", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-16-quickgelu", "metaclip_400m", True),
    ):
        with pytest.raises(UserError, match=f"weights '{tag}' of '{name}' could not be fetched"):
            load_backbone(name, tag)
        assert asked["quick_gelu"] is quick


def test_random_weights_are_always_the_same():
    first = load_backbone("ViT-B-32", "random").fingerprint
    assert load_backbone("ViT-B-32", "random").fingerprint == first
