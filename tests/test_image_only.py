"""Backbones that read no text: timm's models, heads and image prompts on them, and refusals."""

import json
import re

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from dapt.cli import app
from dapt.clip import hub
from dapt.clip.backbone import Backbone
from dapt.clip.image import image_features
from dapt.clip.image_only import ImageOnly
from dapt.clip.sources import load_backbone
from dapt.engine.data import open_data
from dapt.engine.evaluate import dispersion, evaluate_task
from dapt.engine.features import Shared
from dapt.engine.fit import fit
from dapt.engine.photos import look_at_photos
from dapt.engine.step import Tuner
from dapt.engine.suggest import suggest
from dapt.errors import UserError
from dapt.estimator import PromptClassifier
from dapt.methods import get_method
from dapt.predict import predict_each
from dapt.run.load import load_classifier
from dapt.run.train import Target, evaluate_run, train
from dapt.serve.served import load_served
from dapt.settings import make_settings
from dapt.share.card import model_card
from dapt.share.export import export

VIT, RESNET = "timm:test_vit", "timm:test_resnet"
HEADS = ["auto", "linear-probe", "kernel-ridge", "gda", "tip-adapter", "tip-adapter-f"]
WORDY = ["zero-shot", "coop", "maple", "mmrl", "2sfs", "text-prototype", "clap", "lp++",
         "ss-text", "prolip", "dapt", "vpt+clap"]  # fmt: skip
TUNED = ["vpt", "vpt-deep", "dapt-visual", "clip-lora", "clip-svd"]
runner = CliRunner()


def dapt(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def given(photo_folder):
    return {"dataset": str(photo_folder), "backbone": VIT, "pretrained": "random", "device": "cpu",
            "shots": 4, "batch_size": 6, "epochs": 2, "lr": 0.01, "tip_epochs": 1,
            "gda_views": 2, "tip_views": 2, "looks": 2}  # fmt: skip


def settings_of(given, method, **more):
    known = get_method(method).settings
    own = {n: v for n, v in given.items() if n.split("_")[0] not in ("tip", "gda", "auto")}
    own |= {n: v for n, v in given.items() if n in known}
    return make_settings({**own, "method": method, **more})


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(VIT, "random", device="cpu")


@pytest.fixture(scope="module")
def shared(backbone):
    return Shared(backbone)


@pytest.fixture(scope="module", params=["auto", "vpt", "vpt-deep", "vpt+auto", "clip-lora"])
def run(request, given, shared, tmp_path_factory):
    settings = settings_of(given, request.param)
    return train(settings, tmp_path_factory.mktemp("runs") / "run", shared=shared)


def photos_of(folder):
    return sorted((folder / "test").rglob("*.png"))


# ------------------------------------------------------------------------------------ where from


def test_a_model_of_timms_gives_what_timm_gives(backbone):
    views = torch.randint(256, (2, 3, 160, 160), dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = timm.create_model("test_vit", num_classes=0).eval()
    with torch.inference_mode():
        expected = trunk((views / 255 - 0.5) / 0.5)
        found = image_features(backbone, views, normalized=False)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not backbone.reads_text
    assert backbone.text is None


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet",
                                  "mobilenetv3_small_050"])  # fmt: skip
def test_the_dimension_is_that_of_features(name):
    found = load_backbone(f"timm:{name}", "random", device="cpu")
    side = found.preprocessing.size
    with torch.inference_mode():
        made = image_features(found, torch.zeros(1, 3, side, side, dtype=torch.uint8))
    assert made.shape == (1, found.image_dimension)


def test_weights_of_a_file_are_read_without_its_classifier(tmp_path):
    torch.manual_seed(3)
    whole = timm.create_model("test_vit").eval()
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    found = load_backbone(VIT, str(tmp_path / "vit.safetensors"), device="cpu")
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        expected = whole.forward_head(whole.forward_features(images), pre_logits=True)
        assert torch.allclose(image_features(found, images, normalized=False), expected, atol=1e-5)


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    del state["blocks.1.norm1.weight"]
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"'blocks\.1\.norm1\.weight' is not among them"):
        load_backbone(VIT, str(tmp_path / "vit.safetensors"), device="cpu")


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"head.weight": Harm()}, tmp_path / "vit.pth")
    with pytest.raises(UserError):
        load_backbone(VIT, str(tmp_path / "vit.pth"), device="cpu")
    assert not (tmp_path / "harm").exists()


def test_timms_own_weights_are_fetched_as_safetensors_and_told(tmp_path, monkeypatch, capsys):
    asked, state = [], timm.create_model("test_vit").state_dict()
    save_file(state, tmp_path / "model.safetensors")

    def fetched(repo, file):
        asked.append((repo, file))
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", fetched)
    load_backbone(f"{VIT}.r160_in1k", device="cpu")
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    assert "fetching weights of 'timm:test_vit.r160_in1k'" in capsys.readouterr().err


def test_what_cannot_be_fetched_is_said(monkeypatch):
    def broken(repo, file):
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "hf_hub_download", broken)
    with pytest.raises(UserError, match="could not be fetched from the hub.*`pretrained` a file"):
        load_backbone(VIT, device="cpu")


@pytest.mark.parametrize(("name", "pretrained", "said"), [
    ("timm:test_vitt", "random", "did you mean 'test_vit'"),
    ("timm:test_vit.nothing", None, "timm knows no weights 'nothing' of 'test_vit'"),
    ("timm:test_vit", "nothing", "timm knows no weights 'nothing'"),
    ("timm:test_vit", "lost.safetensors", "there is no weights file lost.safetensors"),
])  # fmt: skip
def test_unknown_names_are_refused(name, pretrained, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_backbone(name, pretrained, device="cpu")


# --------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", [*HEADS, *TUNED, "vpt+kernel-ridge", "vpt+linear-probe"])
def test_methods_that_need_no_words_learn(given, shared, method):
    data, settings = open_data(settings_of(given, method)), settings_of(given, method)
    found = evaluate_task(fit(data, settings, shared=shared).classifier, data.task, settings)
    assert found["accuracy"] > 0.6  # of three colours


@pytest.mark.parametrize("method", WORDY)
def test_methods_that_need_words_are_refused_with_others_named(given, shared, method):
    settings = settings_of(given, method)
    with pytest.raises(UserError, match="reads no text.*auto, linear-probe, vpt"):
        fit(open_data(settings), settings, shared=shared)


def test_class_names_change_nothing(given, shared, photo_folder, tmp_path):
    names = {"red_thing": "zebra", "green thing": "yak", "blue": "ant"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    found = []
    for more in ({}, {"class_names": str(tmp_path / "names.json")}):
        settings = settings_of(given, "auto", **more)
        found.append(fit(open_data(settings), settings, shared=shared).classifier.tensors())
    plain, other = found
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_who_asked_for_no_method_gets_auto(given, tmp_path):
    settings = {k: v for k, v in given.items() if k in ("dataset", "backbone", "pretrained")}
    run = train(make_settings({**settings, "shots": 2, "device": "cpu"}), tmp_path / "run")
    assert run.read_settings().method == "auto"


def test_class_vectors_start_at_the_support_means_and_are_learned(given, shared):
    settings = settings_of(given, "vpt", lr=20.0, logit_scale=2.0)
    tuned = fit(open_data(settings), settings, shared=shared)
    vectors = tuned.classifier.tensors()["class_vectors"]
    means = torch.nn.functional.normalize(tuned.support.prototypes, dim=-1)
    cosines = (torch.nn.functional.normalize(vectors, dim=-1) * means).sum(-1)
    assert vectors.shape == (3, 64)
    assert (cosines > 0.9).all()
    assert not torch.allclose(vectors, vectors.norm(dim=-1, keepdim=True) * means, atol=1e-5)
    spread = dispersion(tuned)["inter"]
    assert spread["before"] == pytest.approx(float(torch.pdist(means).mean()), rel=1e-4)
    assert spread["after"] != spread["before"]


def test_a_head_that_is_fitted_afterwards_sees_no_class_vectors(given, shared):
    settings = settings_of(given, "vpt+kernel-ridge")
    classifier = fit(open_data(settings), settings, shared=shared).classifier
    assert "class_vectors" not in classifier.tensors()
    assert not classifier.text_features().any()


def test_a_loss_of_class_features_moves_the_class_vectors(given, shared):
    settings = settings_of(given, "vpt", lr=20.0, loss_weights={"inter": 50.0})
    plain = settings_of(given, "vpt", lr=20.0)
    data = open_data(settings)
    one, other = (fit(data, s, shared=shared).classifier.tensors() for s in (settings, plain))
    assert not torch.equal(one["class_vectors"], other["class_vectors"])


def test_convolutions_take_heads_and_refuse_prompts(given):
    found = Shared(load_backbone(RESNET, "random", device="cpu"))
    settings = settings_of(given, "auto", backbone=RESNET)
    data = open_data(settings)
    assert fit(data, settings, shared=found).classifier.learned_parameters
    settings = settings_of(given, "vpt", backbone=RESNET)
    with pytest.raises(UserError, match="takes no visual prompt.*auto"):
        fit(data, settings, shared=found)


def test_a_clips_image_tower_alone_takes_prompts_too(given, tiny_weights):
    clip = load_backbone(str(tiny_weights), device="cpu")
    how = {"name": "half", "device": torch.device("cpu"), "precision": "fp32"}
    half = Backbone(ImageOnly(clip.visual), None, clip.preprocessing, **how)
    settings = settings_of(given, "vpt")
    found = fit(open_data(settings), settings, shared=Shared(half)).classifier
    assert found(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 3)


# -------------------------------------------------------------------------------------- surfaces


def probabilities(run, folder):
    paths = photos_of(folder)
    found = predict_each(load_classifier(run), paths, top=3)
    return np.array([[dict(one.classes)[n] for n in sorted(dict(one.classes))] for one in found])


def test_predict_eval_and_serve_agree_with_the_run(run, photo_folder):
    made = probabilities(run, photo_folder)
    _, result = evaluate_run(run, Target())
    truth = np.array([sorted(run.read_task().class_names).index(p.parent.name)
                      for p in photos_of(photo_folder)])  # fmt: skip
    assert result["accuracy"] == pytest.approx((made.argmax(-1) == truth).mean())
    served = load_served(run)
    assert served.class_names == tuple(run.read_task().class_names)
    assert run.read_metrics().test.accuracy == pytest.approx(result["accuracy"])


def test_onnx_gives_the_same_probabilities(run, tmp_path):
    exported = export(run, tmp_path / "a.onnx", "onnx")
    assert exported.difference < 1e-5
    classifier = load_classifier(run)
    views = torch.randint(256, (3, 3, 160, 160), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    with torch.inference_mode():
        expected = classifier.probabilities(classifier(views)).numpy()
    images = classifier.backbone.normalize(views).numpy()
    assert np.abs(session.run(None, {"images": images})[0] - expected).max() < 1e-5


def test_a_card_says_that_names_had_no_part(run):
    card = model_card(run)
    assert "the names of classes had no part" in card
    assert not [word for word in ("Template", "\n- clip\n", "CLIP-like") if word in card]


def test_a_report_needs_no_zero_shot(run, tmp_path):
    done = dapt("report", run.path, "--features", "-o", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    assert "Zero-shot CLIP" not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_prompts_with_class_vectors_are_no_coop_checkpoint(run, tmp_path):
    done = dapt("export", run.path, "--format", "coop", "-o", tmp_path / "a.pth")
    assert done.exit_code == 2
    assert not (tmp_path / "a.pth").exists()


def test_other_classes_are_refused(run, tmp_path):
    task = run.read_task().model_copy(update={"class_names": ["fox", "owl"]})
    with pytest.raises(UserError, match="classes it was|classes they were"):
        load_classifier(run, task)


def test_suggestions_are_made_of_images_alone(run, photo_folder, backbone):
    classifier = load_classifier(run, backbone=backbone)
    task = open_data(run.read_settings()).task
    store = Shared(backbone).store(task, task.test, run.read_settings())
    assert len(suggest(classifier, store, 3)) == 3


def test_training_compares_with_no_zero_shot(given, tmp_path):
    done = dapt("train", given["dataset"], "-b", VIT, "--pretrained", "random", "--shots", 2,
                "--device", "cpu", "-o", tmp_path / "run")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "zero-shot" not in done.output


def test_photos_are_judged_without_names(given, backbone):
    task = open_data(settings_of(given, "auto")).task
    found = look_at_photos(task, backbone)
    assert found.images == 30
    assert all(one.text_cosine is None for one in found.classes)


@pytest.mark.parametrize("method", ["vpt", "clip-lora"])
def test_a_killed_run_goes_on_to_the_same_bits(given, shared, tmp_path, monkeypatch, method):
    settings = settings_of(given, method, epochs=4, checkpoint_every=1)
    whole = train(settings, tmp_path / "whole", shared=shared)
    step, taken = Tuner.step, []

    def killed(self, *args, **more):
        taken.append(1)
        if len(taken) > 5:
            raise KeyboardInterrupt
        return step(self, *args, **more)

    monkeypatch.setattr(Tuner, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", shared=shared)
    monkeypatch.setattr(Tuner, "step", step)
    again = train(settings, tmp_path / "run", resume=True, shared=shared)
    assert again.prompts_file.read_bytes() == whole.prompts_file.read_bytes()


@pytest.mark.parametrize("method", ["auto", "vpt"])
def test_classes_are_added_by_their_images_alone(method, photo_folder):
    folder, names = photo_folder / "train", ("blue", "green thing", "red_thing")
    pictures = {n: [np.asarray(Image.open(p)) for p in (folder / n).iterdir()] for n in names}
    made = PromptClassifier(VIT, pretrained="random", method=method, epochs=2, lr=0.01)
    images = [*pictures["blue"], *pictures["green thing"]]
    made.fit(images, ["blue"] * 6 + ["green thing"] * 6)
    with pytest.raises(UserError, match="knows classes by images alone"):
        made.add_classes(["red_thing"])
    made.add_classes(["red_thing"], pictures["red_thing"], ["red_thing"] * 6)
    assert made.predict_proba(images[:2]).shape == (2, 3)
    assert made.score(pictures["red_thing"], ["red_thing"] * 6) > 0.5


def test_numbers_as_labels_need_no_names(photo_folder, recwarn):
    images = [np.asarray(Image.open(p)) for p in photos_of(photo_folder)]
    labels = [int(p.parent.name == "blue") for p in photos_of(photo_folder)]
    PromptClassifier(VIT, pretrained="random").fit(images, labels)
    assert not [w for w in recwarn if "prompts call the classes" in str(w.message)]
