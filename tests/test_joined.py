"""Several backbones at once: features joined, heads on all, one run; and what is refused."""

import json
import re
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dapt.cli import app
from dapt.clip.image import image_features
from dapt.clip.joined import Joined
from dapt.clip.known import each_of, stands_in
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import Classifier
from dapt.engine.data import open_data
from dapt.engine.features import Shared
from dapt.engine.fit import fit
from dapt.engine.photos import look_at_photos
from dapt.engine.suggest import suggest
from dapt.errors import UserError
from dapt.estimator import PromptClassifier
from dapt.predict import predict_each
from dapt.progress import Reporter
from dapt.run.load import load_classifier
from dapt.run.records import Environment, read_record
from dapt.run.train import Target, evaluate_run, train
from dapt.settings import backbone_name, make_settings, parse_assignment
from dapt.share.card import model_card
from dapt.share.export import export

VIT, NAMES = "timm:test_vit", ("cat", "fire truck", "small dog")
runner = CliRunner()


def dapt(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory, tiny_weights):
    """Another CLIP of the same layout, whose logits are half as large."""
    file = tmp_path_factory.mktemp("other") / "other.safetensors"
    generator = torch.Generator().manual_seed(1)
    state = {n: t + 0.01 * torch.randn(t.shape, generator=generator)
             for n, t in load_file(tiny_weights).items()}  # fmt: skip
    state["logit_scale"] = load_file(tiny_weights)["logit_scale"] - np.log(2)
    save_file(state, file)
    return file


@pytest.fixture(scope="module")
def clip(tiny_weights):
    return load_backbone(str(tiny_weights), device="cpu")


@pytest.fixture(scope="module")
def other(other_weights):
    return load_backbone(str(other_weights), device="cpu")


@pytest.fixture(scope="module")
def vit():
    return load_backbone(VIT, "random", device="cpu")


@pytest.fixture(scope="module")
def mixed(clip, vit):
    """A CLIP of 32 px and a model of images alone of 160."""
    return Joined([clip, vit])


@pytest.fixture(scope="module")
def given(photo_folder, tiny_weights):
    return {"dataset": str(photo_folder), "backbone": [str(tiny_weights), VIT], "shots": 4,
            "pretrained": [None, "random"], "device": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def shared(mixed):
    return Shared(mixed)


@pytest.fixture(scope="module")
def run(given, tmp_path_factory):
    own = {**given, "method": "auto", "looks": 2}
    return train(make_settings(own), tmp_path_factory.mktemp("runs") / "run")


def views_of(side, count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def photos_of(folder):
    return sorted((folder / "test").rglob("*.png"))


# -------------------------------------------------------------------------------------- features


def test_features_stand_side_by_side(mixed, clip, vit):
    views = views_of(160)
    small = F.interpolate(views / 255, (32, 32), mode="bicubic", antialias=True)
    with torch.inference_mode():
        found = image_features(mixed, views)
        own = image_features(clip, (small - clip.mean) / clip.std), image_features(vit, views)
    assert torch.allclose(found, torch.cat(own, -1) / 2**0.5, atol=1e-5)
    assert mixed.image_dimension == found.shape[1]
    assert torch.allclose(found.norm(dim=-1), torch.ones(3), atol=1e-5)


def test_models_of_one_side_see_the_view_as_it_is(clip, other):
    views = views_of(32)
    with torch.inference_mode():
        found = image_features(Joined([other, clip]), views)
        own = image_features(other, views), image_features(clip, views)
    assert torch.equal(found, F.normalize(torch.cat(own, -1) / 2**0.5, dim=-1))


def test_the_largest_images_decide_the_view_wherever_they_stand(clip, vit):
    for members in ([clip, vit], [vit, clip]):
        assert Joined(members).preprocessing == vit.preprocessing


def test_zero_shot_beside_a_model_of_images_alone_is_clips_own(clip, vit):
    joined, views = Joined([vit, clip]), views_of(160)
    small = F.interpolate(views / 255, (32, 32), mode="bicubic", antialias=True)
    with torch.inference_mode():
        found = Classifier(joined, NAMES)(views)
        expected = Classifier(clip, NAMES)((small - clip.mean) / clip.std)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("templates", [(), ("{}.", "a {}, drawn.")])
def test_zero_shot_of_two_that_read_is_the_mean_of_their_logits(clip, other, templates):
    views = views_of(32)
    with torch.inference_mode():
        found, *own = (Classifier(b, NAMES, templates=templates)(views)
                       for b in (Joined([clip, other]), clip, other))  # fmt: skip
    # Of several templates features are averaged, and the two models' lengths after it differ.
    assert torch.allclose(found, (own[0] + own[1]) / 2, atol=0.5 if templates else 1e-4)
    assert clip.logit_scale == pytest.approx(2 * other.logit_scale)


def test_biases_of_sigmoid_models_are_averaged_over_those_that_read(clip, other, vit, monkeypatch):
    monkeypatch.setattr(other, "logit_bias", -16.0)
    assert Joined([clip, other, vit]).logit_bias == -8.0


def test_a_fingerprint_is_of_all_in_their_order(clip, other):
    prints = {Joined(m).fingerprint for m in ([clip, other], [other, clip], [clip, clip])}
    assert len(prints) == 3


def test_half_precision_is_of_the_towers_alone(tiny_weights, mixed):
    half = load_backbone([str(tiny_weights), VIT], [None, "random"], device="cpu", precision="bf16")
    views = views_of(160)
    with torch.inference_mode():
        found = image_features(half, views)
        assert found.dtype == torch.float32
        assert (found * image_features(mixed, views)).sum(-1).min() > 0.99
    assert half.precision == "bf16"


# --------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", ["auto", "zero-shot", "linear-probe", "kernel-ridge", "gda",
                                    "tip-adapter", "tip-adapter-f", "text-prototype", "clap",
                                    "lp++", "ss-text"])  # fmt: skip
def test_heads_learn_on_both(given, shared, method):
    own = {"tip_epochs": 1, "gda_views": 2, "tip_views": 2, "looks": 2, "clap_views": 2,
           "clap_epochs": 2}  # fmt: skip
    stem = method.split("-")[0]
    settings = make_settings(
        {**given, "method": method, **{n: v for n, v in own.items() if n.split("_")[0] == stem}}
    )
    data = open_data(settings)
    classifier = fit(data, settings, shared=shared).classifier
    with torch.inference_mode():
        logits = classifier.logits(shared.support(data, settings, Reporter()).features)
    right = (logits.argmax(-1) == torch.tensor([i.label for i in data.support.train])).float()
    assert logits.shape == (12, 3)
    assert right.mean() > 0.6 or method == "zero-shot"  # of three colours


@pytest.mark.parametrize("method", ["coop", "vpt", "maple", "clip-lora", "mmrl", "prolip", "2sfs",
                                    "vlpt", "clip-svd", "cocoop", "dapt+kernel-ridge"])  # fmt: skip
def test_what_goes_into_a_tower_is_refused_and_a_way_named(given, shared, method):
    settings = make_settings({**given, "method": method})
    with pytest.raises(UserError, match=r"models joined.*nothing is learned; use a head.*\(auto\)"):
        fit(open_data(settings), settings, shared=shared)


def test_who_asked_for_no_method_gets_auto(given, tmp_path, shared):
    found = train(make_settings(given), tmp_path / "run", shared=shared)
    assert found.read_settings().method == "auto"


def test_models_of_images_alone_do_without_words(vit, given):
    joined = Joined([vit, load_backbone("timm:test_resnet", "random", device="cpu")])
    assert not joined.reads_text
    assert joined.logit_scale == pytest.approx(vit.logit_scale)
    settings = make_settings({**given, "method": "auto", "looks": 2})
    assert fit(open_data(settings), settings, shared=Shared(joined)).classifier
    wordy = make_settings({**given, "method": "zero-shot"})
    with pytest.raises(UserError, match="reads no text.*auto, linear-probe, kernel-ridge"):
        fit(open_data(wordy), wordy, shared=Shared(joined))


# ------------------------------------------------------------------------------ names and records


@pytest.mark.parametrize(("names", "tags", "said"), [
    ([], None, "empty list"),
    (["bundled", VIT], "random", "names 2 models, and pretrained is of 1"),
    (["bundled", VIT], ["random"], "names 2 models, and pretrained is of 1"),
    ("bundled", ["random", "default"], "names 1 models, and pretrained is of 2"),
])  # fmt: skip
def test_each_model_has_its_own_weights_named(names, tags, said):
    for door in (lambda: make_settings({"dataset": "bundled", "backbone": names,
                                        "pretrained": tags}),
                 lambda: load_backbone(names, tags, device="cpu")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            door()


def test_a_single_one_is_recorded_as_ever():
    for name, tag in (("bundled", None), (["bundled"], None), (("bundled",), ["default"])):
        found = make_settings({"dataset": "bundled", "backbone": name, "pretrained": tag})
        assert (found.backbone, found.pretrained) == ("bundled", None)


def test_settings_keep_the_names_in_their_order_and_can_be_keys(given):
    found = make_settings(given)
    assert found.backbone[1] == VIT
    assert found.pretrained == (None, "random")
    assert make_settings(json.loads(found.model_dump_json())) == found
    assert hash((found.backbone, found.pretrained))
    assert backbone_name(found) == f"tiny.safetensors + {VIT}/random"
    assert parse_assignment(f"backbone=[bundled, {VIT}]") == ("backbone", ["bundled", VIT])
    assert parse_assignment("backbone=bundled") == ("backbone", "bundled")
    assert each_of("a", "b") == ("b",)


def test_a_commit_of_each_is_kept(clip, vit, run, tmp_path, monkeypatch):
    commit = "a" * 40
    monkeypatch.setattr(clip, "revision", commit)
    assert Joined([clip, vit]).revision == (commit, None)
    file = tmp_path / "environment.json"
    file.write_text(json.dumps({"backbone_revision": [commit, None]}))
    assert read_record(file, Environment, "environment").backbone_revision == [commit, None]
    file.write_text(json.dumps({"backbone_revision": ["main", None]}))
    with pytest.raises(UserError, match="damaged"):
        read_record(file, Environment, "environment")
    assert run.revision() is None
    with pytest.raises(UserError, match="names 2 models, and the run's revision is of 3"):
        load_backbone(["bundled", VIT], ["default", "random"], revision=(None,) * 3)


def test_a_stand_in_is_known_among_several():
    assert stands_in(("auto", VIT), ("bundled", VIT))
    assert not stands_in(("bundled", VIT), ("bundled", VIT))
    assert stands_in("auto", "bundled")
    assert not stands_in("auto", "ViT-B-16")


def test_a_model_for_photographs_that_cannot_be_had_is_told_of_a_joined_run(photo_folder, tmp_path):
    done = dapt("train", photo_folder, "-b", "auto", "-b", VIT, "--pretrained", "default",
                "--pretrained", "random", "--shots", 2, "--device", "cpu", "-o",
                tmp_path / "run")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "stands in" in done.output.splitlines()[-1]
    kept = json.loads((tmp_path / "run/settings.json").read_text())
    assert (kept["backbone"], kept["pretrained"]) == (["bundled", VIT], [None, "random"])


# -------------------------------------------------------------------------------------- surfaces


def test_predict_eval_and_resume_agree_with_the_run(run, given, photo_folder):
    paths = photos_of(photo_folder)
    found = predict_each(load_classifier(run), paths, top=1)
    right = np.mean([one.classes[0][0] == path.parent.name
                     for one, path in zip(found, paths, strict=True)])  # fmt: skip
    _, result = evaluate_run(run, Target())
    assert result["accuracy"] == pytest.approx(right)
    assert run.read_metrics().test.accuracy == pytest.approx(right)
    again = {**given, "method": "auto", "looks": 2}
    assert train(make_settings(again), run.path, resume=True).finished


def test_the_same_run_gives_the_same_bits(run, given, shared, tmp_path):
    own = make_settings({**given, "method": "auto", "looks": 2})
    assert train(own, tmp_path / "run", shared=shared).prompts_file.read_bytes() == (
        run.prompts_file.read_bytes()
    )


def test_other_models_or_another_order_are_not_what_a_run_was_tuned_on(run, clip, vit, other):
    for members in ([vit, clip], [other, vit]):
        with pytest.raises(UserError, match="weights of backbone .* are not those"):
            load_classifier(run, backbone=Joined(members))


def test_onnx_gives_the_same_probabilities_with_images_made_smaller_inside(run, tmp_path):
    exported = export(run, tmp_path / "a.onnx", "onnx")
    assert exported.difference < 1e-5
    classifier, views = load_classifier(run), views_of(160)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    told = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    images = (views / 255 - torch.tensor(told["mean"]).view(3, 1, 1)) / (
        torch.tensor(told["std"]).view(3, 1, 1)
    )
    with torch.inference_mode():
        expected = classifier.probabilities(classifier(views)).numpy()
    assert np.abs(session.run(None, {"images": images.numpy()})[0] - expected).max() < 1e-5


@pytest.mark.parametrize("form", ["torch", "coop"])
def test_other_forms_are_written_or_refused(run, tmp_path, form):
    done = dapt("export", run.path, "--format", form, "-o", tmp_path / "a.pt2")
    assert done.exit_code == (0 if form == "torch" else 2), done.output
    assert (tmp_path / "a.pt2").exists() == (form == "torch")


def test_a_card_names_both_and_the_licence_of_each(run):
    card = model_card(run)
    assert f"tiny.safetensors + {VIT}/random" in card
    assert card.count("- Backbone: not known to dapt") == 2


def test_a_report_shows_a_joined_run(run, tmp_path):
    done = dapt("report", run.path, "--features", "-o", tmp_path / "r.html")
    assert done.exit_code == 0, done.output


def test_photos_are_looked_at_with_both(given, mixed, photo_folder, tiny_weights):
    found = look_at_photos(open_data(make_settings(given)).task, mixed)
    assert found.images == 30
    assert found.backbone == mixed.name
    done = dapt("data", "check", photo_folder, "-b", tiny_weights, "-b", VIT, "--pretrained",
                "default", "--pretrained", "random", "--device", "cpu")  # fmt: skip
    assert "seen by" in done.output, done.output


def test_photos_to_label_are_suggested(run, mixed):
    classifier = load_classifier(run, backbone=mixed)
    settings = run.read_settings()
    store = Shared(mixed).store(open_data(settings).task, open_data(settings).task.test, settings)
    assert len(suggest(classifier, store, 3)) == 3


def test_classes_are_added_and_a_saved_classifier_loads(given, photo_folder, tmp_path):
    folder, names = photo_folder / "train", ("blue", "green thing", "red_thing")
    pictures = {n: [np.asarray(Image.open(p)) for p in (folder / n).iterdir()] for n in names}
    made = PromptClassifier(given["backbone"], pretrained=[None, "random"], device="cpu",
                            settings={"looks": 2})  # fmt: skip
    made.fit([*pictures["blue"], *pictures["green thing"]], ["blue"] * 6 + ["green thing"] * 6)
    made.add_classes(["red_thing"], pictures["red_thing"], ["red_thing"] * 6)
    images = [p[0] for p in pictures.values()]
    loaded = PromptClassifier.load(made.save(tmp_path / "run"))
    assert np.array_equal(loaded.predict_proba(images), made.predict_proba(images))
    assert loaded.backbone == tuple(given["backbone"])
    file = shutil.copy(given["backbone"][0], tmp_path)
    moved = PromptClassifier.load(tmp_path / "run", backbone=[file, VIT])
    assert moved.score(pictures["red_thing"], ["red_thing"] * 6) > 0.5


def test_methods_are_counted_where_they_are_taken(tiny_weights):
    done = dapt("methods", "-b", tiny_weights, "-b", VIT, "--pretrained", "default",
                "--pretrained", "random")  # fmt: skip
    assert done.exit_code == 0, done.output


def test_too_few_weights_are_one_sentence_and_nothing_is_written(photo_folder, tmp_path):
    done = dapt("train", photo_folder, "-b", "bundled", "-b", VIT, "--pretrained", "random", "-o",
                tmp_path / "run")  # fmt: skip
    assert done.exit_code == 2
    assert re.search("names 2 models, and pretrained is of 1.*'default'", done.output, re.S)
    assert not (tmp_path / "run").exists()
