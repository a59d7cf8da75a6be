"""Models in transformers' form: their towers by its equations, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from theirs import KINDS, TEXT, VISION, Plain, alike, features, make_folder

from dapt.clip.hub_format import translate
from dapt.clip.sources import load_backbone
from dapt.errors import UserError


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


def test_a_tower_that_is_not_described_is_the_usual_one(tmp_path):
    """``text_config`` may be missing or null; what is not in it is as in transformers' own."""
    config = {"model_type": "clip", "vision_config": {"patch_size": 16}}
    for given in ({}, {"text_config": None}, {"text_config": {}}):
        (tmp_path / "config.json").write_text(json.dumps(config | given))
        told = translate(tmp_path).config
        text, vision = told["text_cfg"], told["vision_cfg"]
        assert (text["width"], text["heads"], text["layers"]) == (512, 8, 12)
        assert (text["vocab_size"], text["context_length"]) == (49408, 77)
        assert (vision["width"], vision["patch_size"], vision["image_size"]) == (768, 16, 224)
        assert (told["embed_dim"], told["quick_gelu"]) == (512, True)


def test_a_folder_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    for config, said in (('{"model_type": "bert"}', "of type 'bert'; those of type clip, siglip"),
                         ("{}", "of type 'None'; those of type clip"),
                         ('{"model_type": ', "is no transformers model that can be read"),
                         ("[]", "config.json is no JSON object")):  # fmt: skip
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError, match=said):
            load_backbone(str(tmp_path))


def test_a_half_of_clip_is_refused(tmp_path):
    _, state = make_folder(tmp_path)
    half = {k: v for k, v in state.items() if not k.startswith("vision")}
    save_file(half, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="'vision_model.embeddings.class_embedding' is not among"):
        load_backbone(str(tmp_path))


def test_what_a_trainer_leaves_beside_the_weights(tmp_path):
    """Half precision, PyTorch's file, shards with an index, an optimiser's state."""
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
    for kind in (torch.bfloat16, torch.float16):
        half = {k: v.to(kind) for k, v in state.items()}
        save_file(half, tmp_path / "whole" / "model.safetensors")
        found = load_backbone(str(tmp_path / "whole"))
        expected = state["visual_projection.weight"].to(kind).float().T
        assert torch.equal(found.visual.proj, expected)
    (tmp_path / "whole" / "model.safetensors").unlink()
    # As early versions saved it, buffers and all.
    places = {"text_model.embeddings.position_ids": torch.arange(20)[None]}
    torch.save({**state, **places}, tmp_path / "whole" / "pytorch_model.bin")
    assert load_backbone(str(tmp_path / "whole")).fingerprint == whole.fingerprint
    # Below an attribute of a model around it.
    torch.save({f"clip.{k}": v for k, v in state.items()}, tmp_path / "whole" / "pytorch_model.bin")
    assert load_backbone(str(tmp_path / "whole")).fingerprint == whole.fingerprint


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
    with pytest.raises(UserError, match=PIP):
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


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": {"model_type": "bert"}}, "of type 'bert'; those of type clip, siglip"),
        ({"config.json": 3}, "is no transformers model that can be read"),
        ({"config.json": {"model_type": "siglip", **KINDS["siglip"]}, "tokenizer.json": {}}, PIP),
        ({"config.json": {"model_type": "siglip", **KINDS["siglip"]}}, "holds no vocabulary"),
        ({"open_clip_config.json": {"model_cfg": 3}}, "is no open_clip configuration"),
        ({"README.json": {}}, "has no open_clip_config.json, and no config.json"),
    ],
)
def test_weights_that_could_not_be_used_are_not_fetched(
    tmp_path, monkeypatch, without_transformers, files, said
):
    asked = []
    for name, text in files.items():
        (tmp_path / name).write_text(json.dumps(text))
    monkeypatch.setattr(
        "dapt.clip.sources.snapshot_download", lambda *_, **k: asked.append(k) or str(tmp_path)
    )
    monkeypatch.setattr("dapt.clip.sources.download_pretrained_from_hf", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=said) as refused:
        load_backbone("org/repo")
    assert "connection" not in str(refused.value)
    assert [k["allow_patterns"][0] for k in asked] == ["*.json"]


def test_a_file_of_their_weights_alone_says_what_it_lacks(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(UserError, match="but 'logit_scale'.*config.json of transformers"):
        load_backbone(str(tmp_path / "model.safetensors"))
    assert len(load_file(tmp_path / "model.safetensors")) > 80
