"""Runs of the Hugging Face hub by name: from its cache, and told before they are fetched."""

import json
import os
import shutil

import huggingface_hub
import pytest
from typer.testing import CliRunner

from dapt.cli import app
from dapt.errors import UserError
from dapt.estimator import PromptClassifier
from dapt.run.directory import RunDirectory
from dapt.run.hub import FILES, find_run
from dapt.run.train import train
from dapt.serve.served import load_served
from dapt.settings import make_settings
from dapt.share.card import files_to_push, model_card
from dapt.share.export import export

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def run(photo_folder, tiny_weights, tmp_path_factory):
    given = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "method": "zero-shot",
             "device": "cpu", "shots": 2}  # fmt: skip
    return train(make_settings(given), tmp_path_factory.mktemp("hub") / "run")


@pytest.fixture
def cache(run, tmp_path, monkeypatch):
    """The hub's cache with a pushed run in it, made by hand, and no way to the hub."""
    repo = tmp_path / "cache" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    place = repo / "snapshots" / COMMIT
    place.mkdir(parents=True)
    for number, (name, content) in enumerate(files_to_push(run, "org/name").items()):
        blob = repo / "blobs" / f"{number:040x}"
        blob.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        (place / name).symlink_to(os.path.relpath(blob, place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return place


def dapt(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_predict_eval_and_load_take_a_name(cache, run, photo_folder):
    image = next((photo_folder / "test").rglob("*.png"))
    own = dapt("predict", run.path, image, "--json")
    for name in ("org/name", "hf-hub:org/name", f"org/name@{COMMIT}"):
        found = dapt("predict", name, image, "--json")
        assert (found.exit_code, found.stdout) == (0, own.stdout), found.output
    model = PromptClassifier.load("org/name")
    assert model.predict([image])[0] == json.loads(own.stdout)["classes"][0]["class"]
    before = sorted(cache.iterdir())
    told = dapt("eval", "org/name", "--dataset", photo_folder / "test")
    assert told.exit_code == 0, told.output
    assert sorted(cache.iterdir()) == before, "nothing is written into the hub's cache"
    assert load_served(RunDirectory(find_run("org/name"))).name == "org/name"


def test_it_is_told_before_it_is_fetched_unless_it_cannot_change(cache, photo_folder, capsys):
    find_run("org/name")
    said = capsys.readouterr().err
    assert said.index("is looked for on the Hugging Face hub") < said.index(f"org/name@{COMMIT}")
    find_run(f"org/name@{COMMIT}")
    assert capsys.readouterr().err == ""


def test_only_tensors_and_json_are_fetched(cache, monkeypatch):
    asked = {}

    def fetch(repo, revision=None, allow_patterns=None):
        asked.update(repo=repo, revision=revision, files=allow_patterns)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    find_run("org/name@v1.0")
    assert asked == {"repo": "org/name", "revision": "v1.0", "files": [*FILES]}
    assert {name.rpartition(".")[2] for name in FILES} == {"json", "safetensors", "csv"}


def test_what_is_no_run_is_one_sentence(cache, tmp_path):
    with pytest.raises(UserError, match="'org/none' is no run here and could not be fetched"):
        find_run("org/none")
    (cache / "prompts.safetensors").unlink()
    with pytest.raises(UserError, match="'org/name' holds no run of dapt"):
        find_run("org/name")
    # A path that is nearly right is one, and nothing is asked of the hub.
    (tmp_path / "runs" / "first").mkdir(parents=True)
    for name in ("runs/fist", "rnus/first"):
        with pytest.raises(UserError, match=r"does not exist \(did you mean 'runs/first'\?\)"):
            find_run(name)
    assert find_run("runs/first").is_dir()


def test_a_link_out_of_the_cache_is_refused(cache, tmp_path):
    (cache / "settings.json").unlink()
    (tmp_path / "secret").write_text("{}")
    shutil.copy(tmp_path / "secret", cache.parents[1] / "outside")
    (cache / "settings.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError):
        PromptClassifier.load("org/name")


def test_a_card_says_how_to_use_and_to_cite(run, tmp_path):
    card = files_to_push(run, "org/name")["README.md"].decode()
    assert "dapt predict org/name photos/" in card
    assert 'PromptClassifier.load("org/name")' in card
    assert "@inproceedings{cho2023dapt" in card
    assert f"dapt predict {run.path.name} " in model_card(run)
    export(run, tmp_path / "prompts.pt2", "torch")
    assert 'torch.export.load("prompts.pt2"' in (tmp_path / "prompts.md").read_text()


def test_a_second_export_of_one_stem_keeps_the_first_card(run, tmp_path):
    first = export(run, tmp_path / "photos.pt2", "torch").card
    before = first.read_text()
    other = export(run, tmp_path / "photos.pt", "torch").card
    assert (first.name, other.name) == ("photos.md", "photos.pt.md")
    assert first.read_text() == before
    assert export(run, tmp_path / "photos.pt2", "torch").card == first
