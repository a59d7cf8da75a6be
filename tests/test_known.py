"""Models known by name, the one for photographs, and what stands in where it cannot be had."""

import json

import open_clip
import pytest
from miniatures import make_photos
from typer.testing import CliRunner

from dapt import PromptClassifier, estimator
from dapt.cli import app
from dapt.clip import hub, known, sources
from dapt.run.directory import RunDirectory
from dapt.serve.served import load_served
from dapt.settings import make_settings
from dapt.share.card import model_card

runner = CliRunner()
STANDS_IN = "stands in for one that could not be had"


def call(*arguments, fails=0):
    result = runner.invoke(app, [*map(str, arguments)])
    assert result.exit_code == fails, result.output + str(result.exception)
    return result


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    make_photos(folder := tmp_path_factory.mktemp("known") / "photos")
    return folder


def test_all_known_models_are_open_clips_and_can_be_fetched():
    for model in known.known_models():
        assert model.pretrained in open_clip.list_pretrained_tags_by_model(model.name)
        assert open_clip.get_pretrained_cfg(model.name, model.pretrained)["hf_hub"]


@pytest.mark.parametrize(
    ("memory", "gflops", "name"),
    [(64, 20, "ViT-B-32-256"), (64, 9, "ViT-B-32"), (64, 200, "ViT-L-14"), (2.7, 200, "ViT-B-16")],
)
def test_the_best_that_fits_is_recommended(memory, gflops, name):
    assert known.best_for(memory, gflops).name == name


def test_where_nothing_fits_nothing_is_recommended():
    assert known.best_for(1, 200) is None
    assert "none of these fits" in call("backbones", "--memory", 1, fails=2).output


def test_own_photos_get_the_model_for_photographs_and_named_tasks_the_bundled_one(photos):
    assert make_settings({"dataset": str(photos)}).backbone == "auto"
    assert make_settings({"dataset": str(photos), "backbone": "bundled"}).backbone == "bundled"
    assert make_settings({"dataset": "bundled"}).backbone == "bundled"
    assert make_settings({"dataset": "caltech101"}).backbone == "bundled"


def test_a_stand_in_is_told_first_and_last_and_wherever_the_run_is_shown(photos, tmp_path):
    found = call("train", photos, "-o", tmp_path / "run", "--shots", 2)
    warned = [line for line in found.stderr.splitlines() if "warning" in line]
    assert "the hub does not answer" in warned[0]
    assert STANDS_IN in warned[0]
    assert STANDS_IN in found.output.splitlines()[-1]
    run = RunDirectory(tmp_path / "run")
    assert run.read_settings().backbone == "bundled"
    assert run.stands_in()
    assert STANDS_IN in model_card(run)
    assert STANDS_IN in load_served(run).warning
    call("train", photos, "-o", run.path, "--shots", 2, "--resume")  # finds it done


def test_who_asks_for_the_bundled_model_hears_nothing(photos, tmp_path):
    found = call("train", photos, "-o", tmp_path / "run", "--shots", 2, "-b", "bundled")
    assert "warning" not in found.output
    run = RunDirectory(tmp_path / "run")
    assert not run.stands_in()
    assert STANDS_IN not in model_card(run)
    assert load_served(run).warning == ""


def test_python_takes_the_same_way(photos, tmp_path):
    files = sorted((photos / "train").rglob("*.png"))
    labels = [file.parent.name for file in files]
    for _ in range(2):  # though it is loaded but once
        with pytest.warns(UserWarning, match=STANDS_IN):
            model = PromptClassifier().fit([*map(str, files)], labels)
    model.save(tmp_path / "saved")
    assert RunDirectory(tmp_path / "saved").stands_in()
    assert PromptClassifier.load(tmp_path / "saved").backbone == "bundled"


def test_the_model_for_photographs_is_told_with_size_and_licence_and_recorded(
    monkeypatch, photos, tmp_path, capsys
):
    chosen = known.Known("ViT-S-32-alt", "some-tag", "MIT", 224, 43.2, 3.6, 0, 0)
    loaded = sources.load_model

    def load_model(name, pretrained):
        assert (name, pretrained) == ("ViT-S-32-alt", "some-tag")
        return loaded(name, "random")

    monkeypatch.setattr(known, "recommended", lambda kind, memory: chosen)
    monkeypatch.setattr(hub, "has_weights", lambda name, tag: False)
    monkeypatch.setattr(hub, "reach", lambda name, tag: None)
    monkeypatch.setattr(sources, "load_model", load_model)
    estimator._load_backbone.cache_clear()
    files = sorted((photos / "train").rglob("*.png"))
    model = PromptClassifier(shots=2).fit([*map(str, files)], [file.parent.name for file in files])
    assert "ViT-S-32-alt/some-tag (173 MB, licence MIT)" in capsys.readouterr().err
    estimator._load_backbone.cache_clear()
    values = json.loads(model.files_["settings.json"])
    assert (values["backbone"], values["pretrained"]) == ("ViT-S-32-alt", "some-tag")


def test_what_a_model_can_do_is_told_by_method(tiny_weights):
    told = call("backbones", tiny_weights).output
    assert "texts of up to" in told
    assert told.count(" yes ") > 20
    refused = call("backbones", "RN50").output
    assert "ModifiedResNet" in refused
    assert "(auto)" in refused
    alone = call("backbones", "timm:resnet18", "--pretrained", "random").output
    assert "it reads no text" in alone
    assert "Zero-shot CLIP (zero-shot)        │ no" in alone
    assert "Automatic (auto)                  │ yes" in alone
