"""What was kept is believed as far as it is still what it was: images, backbones, locks, parts."""

import contextlib
import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from test_backbone import folder_of, tiny_config
from typer.testing import CliRunner

from dapt.cli import app
from dapt.cli.use import FORMS
from dapt.clip.sources import load_backbone
from dapt.data import content_digest
from dapt.engine.data import open_data
from dapt.engine.features import Shared
from dapt.errors import UserError, spreadsheet_cell, spreadsheet_path
from dapt.estimator import PromptClassifier
from dapt.report.tables import TEMPLATES
from dapt.run.directory import InUse, RunDirectory
from dapt.run.load import load_classifier, same_images
from dapt.run.train import train
from dapt.settings import make_settings


@pytest.fixture(scope="module")
def backbone(tiny_weights):
    return load_backbone(str(tiny_weights), device="cpu")


@pytest.fixture(scope="module")
def whole(photo_folder, tiny_weights, backbone, tmp_path_factory):
    """A finished run with its checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(photo_folder, folder / "photos")
    given = {"dataset": str(folder / "photos"), "backbone": str(tiny_weights), "device": "cpu",
             "method": "coop", "shots": 2, "batch_size": 3, "epochs": 3, "text_vectors": 2,
             "lr": 0.02, "checkpoint_every": 1}  # fmt: skip
    return train(make_settings(given), folder / "run", shared=Shared(backbone))


@pytest.fixture
def stopped(whole, tmp_path):
    """The same, stopped before its end, with its own images."""
    shutil.copytree(whole.path.parent / "photos", tmp_path / "photos")
    shutil.copytree(whole.path, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    settings = json.loads(run.settings_file.read_text())
    run.settings_file.write_text(json.dumps({**settings, "dataset": str(tmp_path / "photos")}))
    for file in (run.metrics_file, run.prompts_file):
        file.unlink()
    return run


def go_on(run, backbone):
    return train(run.read_settings(), run.path, resume=True, shared=Shared(backbone))


def images_of(run):
    """Files of its support images."""
    data = open_data(run.read_settings())
    return [data.task.image_path(item) for item in data.support.train]


# -- support images --------------------------------------------------------------------------------


def exchange(files):
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[::-1], strict=True):
        file.write_bytes(content)


def draw(file):
    with Image.open(file) as image:
        size = image.size
    Image.new("RGB", size, "red").save(file)


def lead_elsewhere(files):
    files[0].unlink()
    files[0].symlink_to(files[-1])


@pytest.mark.parametrize(
    "change",
    [
        exchange,
        lambda files: draw(files[0]),
        lambda files: draw(files[-1]),
        lead_elsewhere,
        lambda files: files[1].write_bytes(files[1].read_bytes() + b"\0"),
        lambda files: files[0].write_bytes(files[3].read_bytes()),
    ],
)
def test_a_run_does_not_go_on_with_other_images(stopped, backbone, change):
    before = {p.name: p.read_bytes() for p in stopped.path.iterdir() if p.is_file()}
    change(images_of(stopped))
    with pytest.raises(UserError, match="are not what they were when it began; restore them, or"):
        go_on(stopped, backbone)
    assert before == {p.name: p.read_bytes() for p in stopped.path.iterdir() if p.is_file()}


def test_it_does_with_the_same(stopped, whole, backbone):
    files = images_of(stopped)
    exchange(files)
    exchange(files)
    for file in files:
        os.utime(file, (0, 0))  # when they were written says nothing
    finished = go_on(stopped, backbone)
    assert finished.prompts_file.read_bytes() == whole.prompts_file.read_bytes()


def test_what_was_not_recorded_is_not_compared(stopped, backbone):
    """As of version 0.1."""
    known = json.loads(stopped.environment_file.read_text())
    assert len(known["support_content_sha256"]) == 64
    old = ("support_content_sha256", "backbone_fingerprint")
    kept = {name: value for name, value in known.items() if name not in old}
    stopped.environment_file.write_text(json.dumps(kept))
    (stopped.path / ".lock").write_bytes(b"")
    exchange(images_of(stopped))
    assert go_on(stopped, backbone).finished
    load_classifier(stopped, backbone=backbone)


def test_a_content_that_cannot_be_read_counts(whole, tmp_path):
    data = open_data(whole.read_settings())
    digest = content_digest(data.task, data.support)
    file = data.task.image_path(data.support.train[0])
    file.rename(tmp_path / "away")
    try:
        assert content_digest(data.task, data.support) not in (digest, None)
    finally:
        shutil.move(tmp_path / "away", file)
    assert content_digest(data.task, data.support) == digest


def test_a_finished_run_is_not_taken_over_for_other_images(whole):
    data = open_data(whole.read_settings())
    files = images_of(whole)
    assert same_images(whole, data)
    exchange(files)
    try:
        assert not same_images(whole, data)
    finally:
        exchange(files)


# -- the backbone ----------------------------------------------------------------------------------


@pytest.fixture
def described(tiny_weights, tmp_path):
    """The backbone as a folder, and a run that was tuned on it."""
    return folder_of(tmp_path / "backbone", load_file(tiny_weights))


def rewritten(folder, preprocess=None, **changes):
    config = {"model_cfg": tiny_config(**changes)}
    config |= {"preprocess_cfg": preprocess} if preprocess else {}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return load_backbone(str(folder), device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"preprocess": {"mean": [0.5, 0.5, 0.5]}},
        {"preprocess": {"std": [0.5, 0.5, 0.5]}},
        {"preprocess": {"interpolation": "bilinear"}},
        {"preprocess": {"resize_mode": "squash"}},
        {"quick_gelu": False},
        {"text_cfg__heads": 2},
        {"vision_cfg__head_width": 32},
        {"vision_cfg__norm_kwargs": {"eps": 0.1}},
        {"text_cfg__tokenizer_kwargs": {"clean": "canonicalize"}},
    ],
)
def test_what_sees_images_and_texts_otherwise_is_another_backbone(described, stopped, change):
    plain = rewritten(described)
    other = rewritten(described, **change)
    assert other.weights_sha256 == plain.weights_sha256
    assert other.fingerprint != plain.fingerprint
    assert rewritten(described).fingerprint == plain.fingerprint
    known = json.loads(stopped.environment_file.read_text())
    for fingerprint, right in ((plain.fingerprint, plain), (other.fingerprint, other)):
        made = {**known, "backbone_sha256": plain.weights_sha256}
        made["backbone_fingerprint"] = fingerprint
        stopped.environment_file.write_text(json.dumps(made))
        stopped.require_backbone(right)
        with pytest.raises(UserError, match="preprocessing, vocabulary or layout of backbone"):
            stopped.require_backbone(other if right is plain else plain)


def test_another_vocabulary_is_another_backbone(described, monkeypatch):
    plain = rewritten(described)
    tokenizer = plain.tokenizer

    def with_tokens(**changes):
        import copy

        other = copy.copy(tokenizer)
        for name, value in changes.items():
            setattr(other, name, value)
        monkeypatch.setattr("dapt.clip.sources._tokenizer", lambda *_: other)
        return load_backbone(str(described), device="cpu").fingerprint

    words = dict(tokenizer.encoder)
    words["cat</w>"], words["dog</w>"] = words["dog</w>"], words["cat</w>"]
    merges = dict(list(tokenizer.bpe_ranks.items())[:-1])
    assert with_tokens() == plain.fingerprint
    assert with_tokens(encoder=words) != plain.fingerprint
    assert with_tokens(bpe_ranks=merges) != plain.fingerprint


COMMITS = ["0123456789" * 4, "abcdef0123" * 4]


@pytest.fixture
def hub(described, tmp_path, monkeypatch):
    """A hub with one repository, whose latest commit is ``commits[-1]``; what it was asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    class Hub:
        commits, asked = COMMITS[:1], []

    def snapshot(repo, revision=None, **_):
        sys.stderr.flush()
        Hub.asked.append((repo, revision))
        place = tmp_path / "cache/models--org--repo/snapshots" / (revision or Hub.commits[-1])
        if not place.exists():
            shutil.copytree(described, place)
            if place.name != COMMITS[0]:
                rewritten(place, preprocess={"mean": [0.5, 0.5, 0.5]})
        return str(place)

    def weights(repo, revision=None):
        Hub.asked.append((repo, revision))

    monkeypatch.setattr("dapt.clip.sources.snapshot_download", snapshot)
    monkeypatch.setattr("dapt.clip.sources.download_pretrained_from_hf", weights)
    Hub.asked = []
    return Hub


def test_a_run_stays_with_the_commit_it_was_tuned_on(hub, photo_folder, tmp_path, capfd):
    given = {"dataset": str(photo_folder), "backbone": "org/repo", "device": "cpu",
             "method": "coop", "shots": 1, "batch_size": 3, "epochs": 1,
             "text_vectors": 2}  # fmt: skip
    run = train(make_settings(given), tmp_path / "run")
    first, second = COMMITS
    assert json.loads(run.environment_file.read_text())["backbone_revision"] == first
    assert hub.asked == [("org/repo", None), ("org/repo", first)], "all of it is of one commit"
    assert "fetching backbone 'org/repo' from the Hugging Face hub" in capfd.readouterr().err
    hub.commits, hub.asked = [first, second], []
    assert load_classifier(run).backbone.revision == first
    assert PromptClassifier.load(run.path)._classifier.backbone.revision == first
    assert hub.asked == [("org/repo", first)] * 4
    assert "fetching" not in capfd.readouterr().err, "it is here, and cannot have changed"
    # One that is stopped goes on with it; another begins with the latest.
    run.metrics_file.unlink()
    hub.asked = []
    assert train(run.read_settings(), run.path, resume=True).finished
    assert set(hub.asked) == {("org/repo", first)}
    assert load_backbone("org/repo", device="cpu").revision == second
    assert load_backbone(f"org/repo@{first}", device="cpu").revision == first
    # Of version 0.1, which recorded none: the latest, as far as the weights are those.
    known = json.loads(run.environment_file.read_text())
    for name in ("backbone_revision", "backbone_fingerprint"):
        del known[name]
    run.environment_file.write_text(json.dumps(known))
    assert load_classifier(run).backbone.revision == second


def test_what_a_strangers_run_fetches_is_told_first(hub, whole, photo_folder, tmp_path, capfd):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(whole.path, run.path)
    settings = json.loads(run.settings_file.read_text())

    def predict(**changes):
        run.settings_file.write_text(json.dumps({**settings, **changes}))
        image = next((photo_folder / "test").rglob("*.png"))
        made = CliRunner().invoke(app, ["predict", str(run.path), str(image)])
        return " ".join(made.stderr.split()) + " ".join(capfd.readouterr().err.split())

    said = predict(backbone="org/repo")
    assert "dapt: fetching backbone 'org/repo' from the Hugging Face hub" in said
    with pytest.MonkeyPatch.context() as patch:
        told = []

        def create(name, **given):
            told.append(name)
            raise RuntimeError("no network")

        patch.setattr("open_clip.create_model", create)
        said = predict(backbone="ViT-B-16", pretrained="laion2b_s34b_b88k")
        assert told == ["ViT-B-16"]
        assert "dapt: fetching weights 'laion2b_s34b_b88k' of 'ViT-B-16' from 'laion/" in said
        said = predict(backbone="ViT-B-16-SigLIP", pretrained="webli")
        assert "dapt: fetching tokenizer 'timm/" in said or "tokenizer" in said


@pytest.mark.parametrize("odd", ["../../x", "a/b", "", "-" * 101, "a b", ".."])
def test_a_commit_that_is_none_is_refused(hub, whole, tmp_path, odd):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(whole.path, run.path)
    known = json.loads(run.environment_file.read_text())
    run.environment_file.write_text(json.dumps({**known, "backbone_revision": odd}))
    with pytest.raises(UserError, match="environment.json is damaged"):
        run.revision()
    if odd:
        with pytest.raises(UserError, match="asks for no commit, branch or tag"):
            load_backbone(f"org/repo@{odd}", device="cpu")
    assert hub.asked == []


# -- parts that killed processes left --------------------------------------------------------------


PARTS = (".checkpoint.safetensors.00c0ffee.dapt-part", ".eval-pets.json.00c0ffee.dapt-part",
         ".settings.json.1.dapt-part", ".log.csv.a.dapt-part",
         ".failure.json.1.dapt-part")  # fmt: skip
OTHERS = (".mine.dapt-part", "notes.dapt-part", ".settings.json.swp", "a.txt")


@pytest.mark.parametrize("command", ["resume", "predict", "eval", "report", "train"])
def test_parts_go_with_the_next_command(whole, photo_folder, tmp_path, command):
    run = tmp_path / "run"
    shutil.copytree(whole.path, run)
    for name in (*PARTS, *OTHERS):
        (run / name).write_text("part")
    image = next((photo_folder / "test").rglob("*.png"))
    commands = {
        "resume": ["train", "-o", run, "--resume"],
        "predict": ["predict", run, image],
        "eval": ["eval", run],
        "report": ["report", run, "-o", tmp_path / "page.html"],
        "train": ["train", photo_folder, "-o", run],  # which refuses what is there
    }
    made = CliRunner().invoke(app, list(map(str, commands[command])))
    assert made.exit_code == (2 if command == "train" else 0), made.output
    left = {p.name for p in run.iterdir()}
    assert not left.intersection(PARTS)
    assert left.issuperset(OTHERS)


def test_parts_of_who_is_at_work_stay(whole, tmp_path):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(whole.path, run.path)
    with run.locked():
        (part := run.path / PARTS[0]).write_text("part")
        RunDirectory(run.path).tidy()
        with pytest.raises(InUse), RunDirectory(run.path).locked():
            pass
        assert part.exists()
    RunDirectory(run.path).tidy()
    assert not part.exists()


# -- a lock of somebody else -----------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"4711\n", b"dapt", b"dapt\nmore", b"\0", b"x" * 10_000])
@pytest.mark.parametrize("mine", [False, True])
def test_a_lock_of_another_program_is_left_alone(whole, backbone, tmp_path, content, mine):
    place = tmp_path / "results"
    if mine:  # a run is there
        shutil.copytree(whole.path, place)
        (place / "metrics.json").unlink()
    place.mkdir(exist_ok=True)
    (place / ".lock").write_bytes(content)
    before = {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()}
    with pytest.raises(UserError, match=r"\.lock is not of dapt and may be another program's"):
        train(whole.read_settings(), place, resume=mine, shared=Shared(backbone))
    assert before == {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()}


@pytest.mark.parametrize("name", ["metrics.json", "log.csv", "settings.json.bak", "failure.json"])
def test_an_empty_lock_does_not_make_a_folder_ours(whole, backbone, tmp_path, name):
    """Other programs leave such too, beside files that have the names of ours."""
    (place := tmp_path / "results").mkdir()
    (place / ".lock").touch()
    (place / name).write_text("years of work")
    if name == "settings.json.bak":  # no name of ours
        train(whole.read_settings(), place, shared=Shared(backbone))
    else:
        with pytest.raises(UserError, match="holds no run that it could be of"):
            train(whole.read_settings(), place, shared=Shared(backbone))
    assert (place / name).read_text() == "years of work"


def test_our_own_lock_makes_it_ours(whole, backbone, tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        pass
    assert (run.path / ".lock").read_bytes() == b"dapt\n"
    (run.path / "log.csv").write_text("of a run that was killed as it began")
    assert train(whole.read_settings(), run.path, shared=Shared(backbone)).finished
    # Version 0.1 left an empty one beside the reason for which a run never began.
    old = RunDirectory(tmp_path / "old")
    old.fail("the disk was full")
    (old.path / ".lock").write_bytes(b"")
    assert train(whole.read_settings(), old.path, shared=Shared(backbone)).finished


def test_what_is_no_file_is_no_lock(tmp_path):
    (run := RunDirectory(tmp_path / "run")).path.mkdir()
    (run.path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock cannot be locked"), run.locked():
        pass
    (run.path / ".lock").rmdir()
    os.mkfifo(run.path / ".lock")
    with contextlib.suppress(UserError), run.locked():
        pass
    assert list(run.path.iterdir()) == [run.path / ".lock"]


# -- cells that spreadsheets would compute ---------------------------------------------------------

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1", "\uff0b1"]


@pytest.mark.parametrize("text", FORMULAS)
def test_tables_for_people_hold_no_formula(text):
    assert spreadsheet_cell(text) == f"'{text}"
    assert spreadsheet_cell(f"a{text}") == f"a{text}"
    path = text.replace("/", "")
    assert Path(spreadsheet_path(path)) == Path(path), "it still names the file"
    assert not spreadsheet_path(path).startswith(tuple("=+-@\t\r\n"))
    for absolute in (f"/{path}", f"a/{path}"):
        assert spreadsheet_path(absolute) == absolute
    lines = FORMS["csv"](iter([(path, [(text, 0.5), ("b", 0.25)], False)]), 2, True)
    _, row = csv.reader(io.StringIO("\n".join(lines), newline=""))
    assert row == [f"./{path}", f"'{text}", "0.500000", "b", "0.250000", "false"]
    (cell,) = next(csv.reader(io.StringIO(TEMPLATES.filters["csv"](text), newline="")))
    assert cell == f"'{text}"
    (line,) = FORMS["json"](iter([(path, [(text, 0.5)], False)]), 1, False)
    assert json.loads(line) == {"path": path, "classes": [{"class": text, "probability": 0.5}]}
