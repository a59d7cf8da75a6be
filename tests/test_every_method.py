"""Each row of the table on each surface: resume, grids, export, serving, added classes."""

import functools

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dapt import PromptClassifier
from dapt.engine.features import Shared, backbone_of
from dapt.engine.step import Tuner
from dapt.errors import UserError
from dapt.grid import Grid, make_plan, read_suite
from dapt.methods import METHODS
from dapt.predict import predict_each
from dapt.run import train as training
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.serve.served import load_served
from dapt.settings import make_settings
from dapt.share.export import ImageClassifier, export

# A few steps of everything.
FEW = {"batch_size": 3, "epochs": 2, "lr": 0.01, "checkpoint_every": 1, "text_vectors": 2,
       "visual_vectors": 2, "text_init": "a photo", "classifier_steps": 4, "tip_views": 2,
       "tip_epochs": 2, "gda_views": 2, "clap_views": 2, "clap_epochs": 2, "lp_plus_epochs": 12,
       "prolip_steps": 3, "prolip_views": 2, "rep_width": 16, "rep_from": 1}  # fmt: skip
every = pytest.mark.parametrize("method", list(METHODS))


@pytest.fixture(scope="module")
def given(photo_folder, tiny_weights):
    where = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu"}
    return {**FEW, **where, "shots": 2, "seed": 1}


@pytest.fixture(scope="module")
def shared(given):
    torch.set_num_threads(1)
    return Shared(backbone_of(make_settings(given)))


@pytest.fixture(autouse=True)
def one_backbone(shared, monkeypatch):
    """What reads a run takes the backbone that is loaded already."""
    for room in ("run.load", "share.export"):
        monkeypatch.setattr(f"dapt.{room}.backbone_of", lambda *_, **__: shared.backbone)


@pytest.fixture(scope="module")
def run_of(given, shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def make(method):
        return train(make_settings({**given, "method": method}), folder / method, shared=shared)

    return make


@pytest.fixture(scope="module")
def photos(photo_folder):
    return sorted((photo_folder / "test").rglob("*.png"))[::5]


def result(run):
    """What must be the same to the bit."""
    return [file.read_bytes() for file in (run.prompts_file, run.metrics_file)]


class Killed(BaseException):
    """The process ends here."""


@every
def test_a_run_that_was_killed_ends_the_same(run_of, given, shared, tmp_path, monkeypatch, method):
    row, calls = METHODS[method], []
    where, name, at = (Tuner, "step", 3) if row.learns else (row.head, "fit", 1)
    where, name, at = (training, "evaluate_task", 1) if row.still else (where, name, at)
    usual = getattr(where, name)

    def dying(*arguments, **options):
        calls.append(name)
        if len(calls) == at:
            raise Killed
        return usual(*arguments, **options)

    monkeypatch.setattr(where, name, dying)
    settings = make_settings({**given, "method": method})
    with pytest.raises(Killed):
        train(settings, tmp_path / "run", shared=shared)
    again = train(settings, tmp_path / "run", resume=True, shared=shared)
    assert len(calls) > at
    assert result(again) == result(run_of(method))


@pytest.fixture(scope="module")
def grid(given, tmp_path_factory):
    """All methods, done by two processes."""
    folder = tmp_path_factory.mktemp("grid")
    settings = {k: v for k, v in given.items() if k not in ("dataset", "shots", "seed")}
    suite = {"datasets": [given["dataset"]], "methods": list(METHODS), "shots": [2], "seeds": [1]}
    (folder / "every.yaml").write_text(yaml.safe_dump({**suite, "settings": settings}))
    done = Grid(make_plan(read_suite(folder / "every.yaml"), folder), workers=2, threads=1).run()
    assert not done.failed
    return {run.settings.method: run.directory for run in done.plan.runs}


@every
def test_two_processes_of_a_grid_find_the_same(run_of, grid, method):
    assert result(grid[method]) == result(run_of(method))


# One row of each kind of image tower that no other file of tests exports: those of plain towers, of
# heads, of weights and of two features do theirs.
ELSEWHERE = {"mmrl", "clip-lora", "clip-svd"}
TOWERS = {
    tuple(part for part in row.parts if "image" in part.towers): name
    for name, row in METHODS.items()
    if row.changes("image") and not row.head.fitted and name not in ELSEWHERE
}


@pytest.mark.parametrize("method", list(TOWERS.values()))
def test_an_export_says_the_same(run_of, tmp_path, method):
    pytest.importorskip("onnxruntime")
    assert export(run_of(method), tmp_path / "file.onnx", "onnx").difference < 1e-5


@every
def test_what_is_exported_is_the_classifier_or_it_is_said_why_not(run_of, tmp_path, method):
    classifier = load_classifier(run_of(method))
    views = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if METHODS[method].reads_images:
        with pytest.raises(UserError, match="made for each image, by the text tower"):
            export(run_of(method), tmp_path / "file.onnx", "onnx")
    else:
        with torch.inference_mode():
            found, expected = ImageClassifier(classifier)(views), classifier(views)
        torch.testing.assert_close(found, classifier.probabilities(expected), atol=1e-5, rtol=0)


@every
def test_a_server_says_what_predict_says(run_of, photos, method):
    size = (served := load_served(run_of(method))).classifier.backbone.preprocessing.size
    views = [np.asarray(Image.open(photo).convert("RGB").resize((size, size))) for photo in photos]
    alone = load_classifier(run_of(method))
    with torch.inference_mode():
        batch = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
        expected = alone.probabilities(alone(batch))
    found = torch.stack([probabilities for probabilities, _ in served.answers(views)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    named = [dict(one.classes) for one in predict_each(alone, photos, top=3)]
    assert all(sum(classes.values()) == pytest.approx(1, abs=1e-5) for classes in named)


@every
def test_a_class_is_added_or_it_is_said_why_not(run_of, photos, method):
    made, row = PromptClassifier.load(run_of(method).path), METHODS[method]
    known, before = made.classes_.tolist(), made.predict_proba(photos)
    if row.head.reads_text:
        made.add_classes(["zebra"])
        found = made.predict_proba(photos)
        assert made.classes_.tolist() == [*known, "zebra"]
        assert found.shape == (len(photos), 4)
        assert np.allclose(found.sum(1), 1, atol=1e-5)
        assert (found[:, 3] > 0).all()
    else:
        with pytest.raises(UserError, match="zebra"):
            made.add_classes(["zebra"])
        assert np.array_equal(made.predict_proba(photos), before)
