"""Checkpoints of the methods' own code, as it names its tensors: what they say comes in and out."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_field import near, recording
from typer.testing import CliRunner

from dapt.cli import app
from dapt.errors import UserError
from dapt.methods import METHODS
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.settings import make_settings
from dapt.share.exchange import import_checkpoint, read_published


@dataclass(frozen=True)
class Code:
    """How a recorded run's final tensors are called in a checkpoint of its code."""

    method: str
    names: dict[str, str]  # beginnings: of the record's names, of the code's
    frozen: tuple[str, ...] = ()  # what it saves beside them
    given: tuple[tuple[str, object], ...] = ()

    def state(self, record):
        found = {name: torch.randn(3, 4) for name in self.frozen}
        final = {n.removeprefix("final."): t for n, t in record.items() if n.startswith("final.")}
        for name, tensor in final.items():
            ours = next((begin for begin in self.names if name.startswith(begin)), None)
            if ours is not None:
                theirs, place = self.names[ours], name.removeprefix(ours)
                found[theirs.replace("N", place) if "N" in theirs else theirs + place] = tensor
        return found


def singular(state):
    """Values of a map lie in its module, in a row."""
    found = {}
    for name, tensor in state.items():
        before, _, last = name.rpartition(".")
        own = {f"{before}.{MAPS[last]}.vector_S": tensor[None]} if last in MAPS else {name: tensor}
        found |= own
    return found


MAPS = {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.proj",
        "fc": "mlp.c_fc", "proj": "mlp.c_proj"}  # fmt: skip
BLOCKS = "transformer.resblocks."
WHOLE = ("prompt_learner.token_prefix", "prompt_learner.token_suffix", "logit_scale",
         "image_encoder.conv1.weight", f"text_encoder.{BLOCKS}0.ln_1.weight")  # fmt: skip
CLIP = "clip_model."
DEEP = {"text.0": "prompt_learner.ctx", "text.": f"text_encoder.{BLOCKS}N.VPT_shallow",
        "visual.0": "image_encoder.VPT",
        "visual.": f"image_encoder.{BLOCKS}N.VPT_shallow"}  # fmt: skip
CODES = {
    "cocoop": Code("cocoop", {"ctx": "ctx", "meta_net": "meta_net"}, ("token_prefix",)),
    "kgcoop": Code("kgcoop", {"ctx": "ctx"}, ("token_suffix", "bias_vectors",
                                              "meta_net.linear1.weight")),
    "vpt": Code("vpt-deep", DEEP, WHOLE, (("template", "a photo of a {}."),)),
    "ivlp": Code("ivlp", DEEP, WHOLE),
    "promptsrc": Code("promptsrc", DEEP, (*WHOLE, "prompt_learner.ZS_image_encoder.proj")),
    "clip_svd": Code("clip-svd", {"visual.": f"visual.{BLOCKS}", "text.": BLOCKS},
                     (f"visual.{BLOCKS}0.ln_1.weight", f"{BLOCKS}0.mlp.c_fc.linear_U.weight",
                      "token_embedding.weight")),
    "two_stage": Code("2sfs", {"visual.": f"{CLIP}visual.", "transformer.": f"{CLIP}transformer.",
                               "classifier": "classifier"},
                      (f"backbone.{BLOCKS}0.ln_1.weight", f"{CLIP}ln_final.weight")),
}  # fmt: skip


def maple(record, said):
    """Deeper layers are counted from 0 there."""
    state = {"prompt_learner.ctx": record["final.text.0"]}
    for layer in range(said["depth"]):
        place = "proj" if not layer else f"compound_prompt_projections.{layer - 1}"
        for of in ("weight", "bias"):
            state[f"prompt_learner.{place}.{of}"] = record[f"final.proj.{layer}.{of}"]
        if layer:
            key = f"prompt_learner.compound_prompts_text.{layer - 1}"
            state[key] = record[f"final.text.{layer}"]
    return {"state_dict": state | {name: torch.randn(3, 4) for name in WHOLE}, "epoch": 3}


def mmrl(record, said):
    """Maps are counted from 0 at the first layer that has one."""
    state = {"representation_learner.compound_rep_tokens": record["final.tokens"],
             "image_encoder.proj_rep": record["final.proj_rep"]}  # fmt: skip
    for place, block in enumerate(said["blocks"]):
        for kind, key in (("visual", "r2vproj"), ("text", "r2tproj")):
            for of in ("weight", "bias"):
                name = f"representation_learner.compound_rep_tokens_{key}.{place}.{of}"
                state[name] = record[f"final.to_{kind}.{block}.{of}"]
    return {"state_dict": state | {"image_encoder.proj": torch.randn(3, 4)}, "epoch": 3}


def lora(record, said):
    """Text layers come first, image layers are counted on."""
    weights = {}
    for i in range(6):
        kind, layer = ("text", i) if i < 3 else ("visual", i - 3)
        weights[f"layer_{i}"] = {
            f"{m}_proj": {f"w_lora_{x}": record[f"final.{kind}.{layer}.{m}.{x}"] for x in "AB"}
            for m in said["projections"]
        }
    facts = {"r": said["rank"], "alpha": said["alpha"], "encoder": "both",
             "params": said["projections"], "position": "all"}  # fmt: skip
    return {"weights": weights, "metadata": facts}


def adapter(record, said, folder):
    """As PEFT saves it, of a CLIP of transformers; its scale there is alpha / r."""
    state = {
        f"base_model.model.{'vision' if kind == 'visual' else kind}_model.encoder.layers.{layer}."
        f"self_attn.{m}_proj.lora_{x}.weight": record[f"final.{kind}.{layer}.{m}.{x}"]
        for kind in ("text", "visual") for layer in range(3) for m in "qkv" for x in "AB"
    }  # fmt: skip
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2 * said["scaling_value"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


MADE = {"maple": ("maple", maple), "mmrl": ("mmrl", mmrl), "clip_lora": ("clip-lora", lora)}


@pytest.mark.parametrize("name", [*CODES, *MADE, "adapter"])
def test_what_a_methods_own_code_saved_says_what_it_said_there(name, recorded_clip, tmp_path):
    record, said = recording("clip_lora" if name == "adapter" else name)
    file, given = tmp_path / "model.pth.tar-3", {}
    if name == "adapter":
        adapter(record, said, tmp_path)
        method, file = "clip-lora", tmp_path
    elif name in MADE:
        method, make = MADE[name]
        torch.save(make(record, said), file)
    else:
        code = CODES[name]
        method, given = code.method, dict(code.given)
        state = code.state(record)
        state = singular(state) if name == "clip_svd" else state
        torch.save({"state_dict": state, "epoch": 3}, file)
    names = tmp_path / "names.json"
    names.write_text(json.dumps(said["class_names"]))
    if name in ("mmrl", "clip_lora", "clip_svd", "adapter"):  # whatever the backbone's
        given["logit_scale"] = 100.0
    given |= {"backbone": str(recorded_clip), "class_names": str(names), "device": "cpu"}
    run = import_checkpoint(file, tmp_path / "run", given)
    assert run.read_settings().method == method
    classifier = load_classifier(run)
    with torch.inference_mode():
        expected = record.get("final.logits_fusion", record["final.logits"])
        if "images" in record:
            found = classifier(record["images"][0])
        else:
            found = classifier.logits(record["image_features"][0])
    near(found, expected, 1e-3)


@pytest.fixture
def given(photo_folder, tiny_weights):
    return {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
            "shots": 2, "batch_size": 3, "lr": 0.01}  # fmt: skip


def dapt(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


WAYS = [(m, layout.form) for m, row in METHODS.items() for layout in row.checkpoint]


@pytest.mark.parametrize(("method", "form"), WAYS)
def test_out_and_in_again_is_the_same_bits(method, form, given, tmp_path):
    run = train(make_settings({**given, "method": method, "steps": 1}), tmp_path / "run")
    file = tmp_path / "out" / ("adapter_model.safetensors" if form == "peft" else "model.pth.tar-1")
    dapt("export", run.path, "--format", form, "-o", file)
    said = dapt("import", file.parent, "-o", tmp_path / "back", "--dataset", given["dataset"],
                "-b", given["backbone"], "-m", method)  # fmt: skip
    assert "taken as" not in said
    back = RunDirectory(tmp_path / "back")
    assert back.prompts_file.read_bytes() == run.prompts_file.read_bytes()
    assert back.read_metrics().test.accuracy == run.read_metrics().test.accuracy
    again = tmp_path / "again" / file.name
    dapt("export", back.path, "--format", form, "-o", again)
    if form == "peft":
        assert load_file(again).keys() == load_file(file).keys()
        config = json.loads((again.parent / "adapter_config.json").read_text())
        assert config["use_rslora"] is True
        assert config["target_modules"] == ["q_proj", "k_proj", "v_proj"]
    else:
        assert again.read_bytes() == file.read_bytes()


def test_which_methods_a_file_may_be_of_is_said(given, tmp_path):
    run = train(make_settings({**given, "method": "promptsrc", "steps": 1}), tmp_path / "run")
    file = tmp_path / "model.pth.tar-1"
    dapt("export", run.path, "--format", "coop", "-o", file)
    common = ["-o", tmp_path / "back", "--dataset", given["dataset"], "-b", given["backbone"]]
    said = " ".join(dapt("import", file, *common).split())
    assert "taken as ivlp: the file may as well be of promptsrc, which predict the same" in said
    wrong = CliRunner().invoke(app, [*map(str, ["import", file, *common, "-m", "maple"])])
    assert wrong.exit_code == 2
    assert "give one that does: ivlp, promptsrc" in " ".join(wrong.output.split())


def test_a_whole_models_frozen_weights_are_passed_over_and_counted(given, tmp_path):
    file, state = tmp_path / "model.pth.tar-2", {"image_encoder.VPT": 0.02 * torch.randn(3, 64)}
    torch.save({"state_dict": state | {name: torch.randn(3, 4) for name in WHOLE}}, file)
    out = dapt("import", file, "-o", tmp_path / "run", "--dataset", given["dataset"],
               "-b", given["backbone"])  # fmt: skip
    assert "passed over: 5 tensors that are not learned" in " ".join(out.split())
    kept = RunDirectory(tmp_path / "run").read_settings()
    assert (kept.method, kept.model_dump()["visual_depth"]) == ("vpt-deep", 1)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [({}, "with its r and lora_alpha"), ({"r": 2, "lora_alpha": 1, "use_dora": True}, "use_dora"),
     ({"r": 0, "lora_alpha": 1}, "with its r"), ({"r": 2, "lora_alpha": "x"}, "with its r")],
)  # fmt: skip
def test_adapters_that_are_more_than_lora_are_refused(facts, sentence, tmp_path):
    begin = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_"
    state = {f"{begin}A.weight": torch.ones(2, 64), f"{begin}B.weight": torch.ones(64, 2)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=sentence):
        read_published(tmp_path)


def test_low_rank_changes_of_some_blocks_alone_are_refused(tmp_path):
    pair = {"w_lora_A": torch.ones(2, 64), "w_lora_B": torch.ones(64, 2)}
    facts = {"r": 2, "alpha": 1, "encoder": "vision", "position": "all"}
    value = {"weights": {"layer_0": {"q_proj": pair}}, "metadata": facts}
    torch.save(value, tmp_path / "lora.pt")
    with pytest.raises(UserError, match="encoder 'vision'"):
        read_published(tmp_path / "lora.pt")
