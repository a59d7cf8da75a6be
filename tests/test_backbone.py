"""Backbones from every source, and the refusal of what is none."""

import contextlib
import json
import shutil
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miniatures import tiny_config
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file

from conftest import frugal, fuzzed
from dapt.clip import shapes
from dapt.clip.backbone import usable_precision
from dapt.clip.sources import load_backbone
from dapt.errors import UserError
from dapt.safe.weights import read_state_dict


@pytest.fixture(scope="module")
def state(tiny_weights):
    return load_file(tiny_weights)


def same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_architecture_is_read_from_the_shapes(state):
    config, expected = shapes.configuration(state), tiny_config()
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


def prefixed(state, prefix):
    return {f"{prefix}{k}": v for k, v in state.items()}


LEFT_BY_TRAINING = {
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "distributed and compiled": lambda s: {"state_dict": prefixed(s, "module._orig_mod.")},
    "compiled and distributed": lambda s: {"model": prefixed(s, "_orig_mod.module.")},
    "an attribute": lambda s: {"state_dict": prefixed(s, "model.module.")},
    "another's attribute": lambda s: {"state_dict": prefixed(s, "clip_model._orig_mod.")},
    "towers wrapped alone": lambda s: {
        k.replace("visual.", "visual._fsdp_wrapped_module.").replace("mlp.", "mlp.module."): v
        for k, v in s.items()
    },
    "averaged": lambda s: {"ema": {**prefixed(s, "module."), "n_averaged": torch.tensor(3)}},
    "wrapped twice": lambda s: {"model": {"state_dict": s, "step": 3}, "epoch": 1},
    "with an optimiser": lambda s: {
        "model_state_dict": s, "epoch": 3, "loss": 0.5, "args": _Anything(),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1.0}]},
    },
    "under another name": lambda s: {"weights": s, "epoch": 3, "opt": {"state": {}, "a": [1]}},
    "net": lambda s: {"net": s, "acc": 91.2},
    "half": lambda s: {"net": {k: v.half() for k, v in s.items()}},
    "bf16": lambda s: {"ema": {k: v.bfloat16() for k, v in s.items()}},
    "open_clip's text tower": lambda s: {
        k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in s.items()
    },
}  # fmt: skip


class _Anything:
    """An object of training code's own, of which nothing is made."""


@pytest.mark.parametrize("how", LEFT_BY_TRAINING)
def test_checkpoints_as_training_code_leaves_them(state, tmp_path, how, tiny_weights):
    file = tmp_path / "epoch_3.ckpt"
    torch.save(LEFT_BY_TRAINING[how](state), file)
    found = load_backbone(str(file))
    if how not in ("half", "bf16"):
        assert found.fingerprint == load_backbone(str(tiny_weights)).fingerprint
    assert found.text.token_embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {**s, "head.weight": torch.ones(2)}, "no place for 'head.weight'"),
        (lambda s: prefixed(s, "module.") | {"loss.scale": torch.ones(1)}, "for 'loss.scale'"),
        (lambda s: {k: v for k, v in s.items() if k != "visual.ln_post.bias"},
         "'visual.ln_post.bias' is not among them"),
        (lambda s: {**s, "visual.proj": torch.ones(64, 31)},
         r"'visual.proj' has shape \(64, 31\), where \(64, 32\) is needed"),
        (lambda s: {k: v for k, v in s.items() if k != "ln_final.bias"},
         "'ln_final.bias' is not among them"),
        (lambda s: prefixed(s, "model.") | {"visual.proj": s["visual.proj"]},
         "holds both 'model.visual.proj' and 'visual.proj'"),
        (lambda s: {"model": _Anything(), "epoch": 3}, "holds no state dict"),
        (lambda s: {"student": s, "teacher": s}, "'student', which is no tensor"),
        (lambda s: {"encoder.weight": torch.ones(2)}, "names them, but 'encoder.weight'"),
    ],
)  # fmt: skip
def test_the_odd_tensor_is_named(state, tmp_path, change, said):
    file = tmp_path / "a.pt"
    torch.save(change(state), file)
    with pytest.raises(UserError, match=said):
        load_backbone(str(file))


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


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"PK\3\4"],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_weights(tmp_path, content, suffix):
    file = tmp_path / f"clip{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"clip{suffix} could not be read as weights: .{{10,}}"):
        read_state_dict(file)


def test_state_dicts_of_anything_else(tmp_path):
    file = tmp_path / "a.pt"
    for value in ({1: torch.zeros(1)}, {}, [torch.zeros(1)], {"a": 3}):
        torch.save(value, file)
        with pytest.raises(UserError, match=r"a\.pt holds"):
            read_state_dict(file)


@pytest.mark.fuzz
@fuzzed(150)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(tmp_path, data):
    """A few bytes changed anywhere in each kind of file: a state dict or one sentence."""
    kind = data.draw(st.sampled_from(["a.pt", "a.safetensors", "script.pt"]))
    good = tmp_path / f"good-{kind}"
    if not good.exists():
        state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
        if kind == "script.pt":
            torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(good)
        elif kind == "a.pt":
            torch.save(state, good)
        else:
            save_file(state, good)
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    bad = tmp_path / kind
    bad.write_bytes(bytes(content)[: data.draw(st.sampled_from([len(content), 100, 2000]))])
    with contextlib.suppress(UserError):
        assert all(isinstance(v, torch.Tensor) for v in read_state_dict(bad).values())


def hostile(file, body, entries=()):
    """A TorchScript-like archive around a hand-written pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("bad/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("bad/constants.pkl", b"")
        for name, content, how in entries:
            archive.writestr(f"bad/data/{name}", content, compress_type=how)


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0aX\3\0\0\0cpuK\x04tQ"


def tensor(size, stride):
    """Opcodes that rebuild a tensor over four floats."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + b"K\0"
        + size
        + stride
        + b"\x89N"
        + b"tR"
    )


def record(value):
    """Opcodes of a module with one attribute, w."""
    return b"c__torch__\nM\n)\x81}X\1\0\0\0w" + value + b"sb"


def test_hand_written_archives(tmp_path):
    file, floats = tmp_path / "bad.pt", torch.arange(4.0).numpy().tobytes()
    stored = [("a", floats, zipfile.ZIP_STORED)]
    hostile(file, record(tensor(b"K\2K\2\x86", b"K\2K\1\x86")), stored)
    assert read_state_dict(file)["w"].tolist() == [[0, 1], [2, 3]]
    attacks = {
        "stride 0 makes much of little": tensor(b"J\xff\xff\xff\x7f\x85", b"K\0\x85"),
        "beyond its storage": tensor(b"K\4\x85", b"K\2\x85"),
        "negative": tensor(b"J\xff\xff\xff\xff\x85", b"K\1\x85"),
    }
    for value in attacks.values():
        hostile(file, record(value), stored)
        with pytest.raises(UserError, match="could not be read as weights"):
            read_state_dict(file)
    good = record(tensor(b"K\4\x85", b"K\1\x85"))
    for entries in ([], [("a", floats, zipfile.ZIP_DEFLATED)], [("a", b"\0", zipfile.ZIP_STORED)]):
        hostile(file, good, entries)
        with pytest.raises(UserError, match="could not be read as weights"):
            read_state_dict(file)
    # Changing what reads the archive: BUILD on one of our own names.
    hostile(file, b"ctorch._utils\n_rebuild_tensor_v2\n}X\4\0\0\0makeK\1sb", stored)
    with pytest.raises(UserError):
        read_state_dict(file)
    hostile(file, good, stored)
    assert read_state_dict(file)["w"].tolist() == [0, 1, 2, 3]


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
    for device in ("gpu", "meta"):
        with pytest.raises(UserError, match=f"device '{device}' is not available"):
            load_backbone(str(tiny_weights), device=device)


def test_pretrained_goes_with_names_only(tiny_weights):
    with pytest.raises(UserError, match="pretrained openai goes with open_clip model names"):
        load_backbone(str(tiny_weights), "openai")


def test_unfit_weights_are_named(tmp_path, state):
    file = tmp_path / "a.safetensors"
    save_file({k: v for k, v in state.items() if k != "visual.positional_embedding"}, file)
    with pytest.raises(UserError, match="lack 'visual.positional_embedding'"):
        load_backbone(str(file))
    save_file({**state, "ln_final.weight": torch.ones(32)}, file)
    with pytest.raises(UserError, match="do not divide into heads 64 wide"):
        load_backbone(str(file))


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


def test_bf16_is_fp16_on_gpus_without_it(monkeypatch):
    """The choice alone: no GPU is needed to make it."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    for has_it, found in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda found=has_it, **_: found)
        assert usable_precision("bf16", torch.device("cuda")) == found
        assert usable_precision("bf16", torch.device("cpu")) == "bf16"
        assert usable_precision("fp32", torch.device("cuda")) == "fp32"


# ------------------------------------------------------------------- backbones from strangers


def folder_of(place, state, **changes):
    """A backbone directory; a change is named as in `tiny_config`."""
    place.mkdir(exist_ok=True)
    save_file(state, place / "open_clip_model.safetensors")
    config = tiny_config(**changes)
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return place


HANDED_ON = [
    ("text_cfg__tokenizer_kwargs", {"trust_remote_code": True}, "tokenizer_kwargs.trust_remote_co"),
    ("text_cfg__tokenizer_kwargs", {"bpe_path": "/etc/passwd"}, "tokenizer_kwargs.bpe_path"),
    ("text_cfg__hf_model_name", "somebody/model", "hf_model_name"),
    ("vision_cfg__timm_model_name", "hf-hub:somebody/model", "timm_model_name"),
    ("vision_cfg__timm_model_name", "local-dir:/tmp", "timm_model_name"),
    ("vision_cfg__norm_kwargs", {"device": "cpu"}, "norm_kwargs.device"),
]


@pytest.fixture
def asked(monkeypatch):
    """What open_clip's tokenizer is asked for; nothing else of the hub's may be."""
    import open_clip

    asked, tokenizer = [], open_clip.get_tokenizer

    def get(source, **given):
        asked.append(given)
        return tokenizer("ViT-B-16")

    monkeypatch.setattr(open_clip, "get_tokenizer", get)
    return asked


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize(("place", "value", "named"), HANDED_ON)
def test_a_strangers_configuration_is_not_handed_on(
    state, tmp_path, monkeypatch, asked, place, value, named, hub
):
    folder, name = folder_of(tmp_path / "b", state, **{place: value}), str(tmp_path / "b")
    if hub:
        monkeypatch.setattr("dapt.clip.sources.snapshot_download", lambda *_, **__: str(folder))
        monkeypatch.setattr("dapt.clip.sources.download_pretrained_from_hf", lambda *_: None)
        name = "somebody/backbone"
    with pytest.raises(UserError, match=f"asks for '{named}"):
        load_backbone(name)
    assert not asked


def test_what_lies_beside_a_vocabulary_is_never_run(state, tmp_path, asked):
    changes = {"text_cfg__hf_tokenizer_name": "x", "text_cfg__tokenizer_kwargs": {"clean": "lower"}}
    load_backbone(str(folder_of(tmp_path, state, **changes)))
    assert asked == [{"trust_remote_code": False}]


def test_from_the_hub_comes_what_a_folder_holds(state, tmp_path, monkeypatch, tiny_weights):
    fetched = []
    folder = folder_of(tmp_path, state)
    monkeypatch.setattr(
        "dapt.clip.sources.snapshot_download", lambda *a, **k: fetched.append(a) or str(folder)
    )
    monkeypatch.setattr(
        "dapt.clip.sources.download_pretrained_from_hf", lambda *a: fetched.append(a)
    )
    for name in ("hf-hub:org/repo", "org/repo"):
        assert load_backbone(name).fingerprint == load_backbone(str(folder)).fingerprint
    assert fetched == [("org/repo",)] * 4
    monkeypatch.setattr("dapt.clip.sources.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="'org/repo' is no local file and could not be fetched"):
        load_backbone("org/repo")


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        ("text_cfg__layers", 10**9, "do not make 1,000,000,002 layers"),
        ("vision_cfg__layers", [10**9, 1, 1, 1], "do not make 1,000,000,005 layers"),
        ("text_cfg__context_length", 10**6, "longer than 1024 tokens"),
        ("text_cfg__vocab_size", 10**12, "do not fit"),
        ("vision_cfg__width", 2**20, "do not fit"),
        ("vision_cfg__image_size", 2**20, "larger than 2048 px"),
        ("vision_cfg__pos_embed_type", "sin_cos_2d", "only learned"),
        ("vision_cfg__mlp_ratio", 1e9, "do not fit"),
        ("vision_cfg__timm_model_name", "vit_giant_patch14_224", "do not fit"),
        ("vision_cfg__head_width", 0, "do not fit"),
        ("vision_cfg", 3, "do not fit"),
        ("text_cfg", [], "do not fit"),
    ],
)
def test_no_more_is_built_than_the_weights_hold(state, tmp_path, change, value, said):
    folder = folder_of(tmp_path, state, **{change: value})
    with frugal(100), pytest.raises(UserError, match=said):
        load_backbone(str(folder))


def test_shapes_that_no_clip_has(state, tmp_path):
    file = tmp_path / "a.safetensors"
    for changes, said in [
        ({"token_embedding.weight": torch.zeros(2**20, 0)}, "a tensor without numbers"),
        ({"positional_embedding": torch.zeros(10**5, 1)}, "longer than 1024 tokens"),
        ({"visual.conv1.weight": torch.zeros(64)}, r"'visual.conv1.weight' has shape \(64,\)"),
        ({"text_projection": torch.zeros(64, 33)}, "do not fit their model"),
        ({"ln_final.weight": torch.full((64,), float("nan"))}, "are not finite"),
    ]:
        save_file({**state, **changes}, file)
        with frugal(100), pytest.raises(UserError, match=said):
            load_backbone(str(file))
    save_file({**state, "token_embedding.weight": torch.zeros(100, 64)}, file)
    with pytest.raises(UserError, match="knows 100 tokens, and its tokenizer more"):
        load_backbone(str(file)).tokenize(["a"])


@pytest.mark.parametrize(
    "seen",
    [3, {"mean": 1}, {"mean": [0.5, 0.5]}, {"std": [0, 1, 1]}, {"std": [1e999, 1, 1]},
     {"mean": ["a", "b", "c"]}],
)  # fmt: skip
def test_preprocessing_that_cannot_be(state, tmp_path, seen):
    folder = folder_of(tmp_path, state)
    config = {"model_cfg": tiny_config(), "preprocess_cfg": seen}
    (folder / "open_clip_config.json").write_text(json.dumps(config).replace("Infinity", "1e999"))
    with pytest.raises(UserError, match=r"open_clip_config\.json"):
        load_backbone(str(folder))
