"""Evaluations elsewhere: what they record, and that they never mix with another run's."""

import json
import shutil
import threading

import pytest
from patience import LONG

from dapt.engine.data import task_of
from dapt.errors import UserError
from dapt.grid.plan import PlannedRun
from dapt.grid.work import summary
from dapt.progress import Reporter
from dapt.run.directory import InUse
from dapt.run.train import Target, evaluate_run, train
from dapt.settings import make_settings


class Heard(Reporter):
    def __init__(self):
        self.warned = []

    def warn(self, line):
        self.warned.append(line)


@pytest.fixture
def photos(photo_folder, tmp_path):
    return shutil.copytree(photo_folder, tmp_path / "photos")


@pytest.fixture
def run(photos, tiny_weights, tmp_path):
    settings = {"dataset": str(photos), "backbone": str(tiny_weights), "device": "cpu", "shots": 4,
                "epochs": 1, "text_vectors": 2, "method": "coop"}  # fmt: skip
    return train(make_settings(settings), tmp_path / "run")


def evaluations(run):
    return {file.name: json.loads(file.read_text()) for file in run.path.glob("eval-*.json")}


def test_images_that_it_was_tuned_on_are_told(run, photos):
    heard = Heard()
    evaluate_run(run, Target(dataset=str(photos / "test")), reporter=heard)
    assert heard.warned == []
    evaluate_run(run, Target(dataset=str(photos / "train")), reporter=heard)
    assert "12 of 12 support images are test images of 'train' too" in heard.warned[0]
    found = evaluations(run)
    assert found["eval-test.json"]["also_tested"] == []
    assert len(found["eval-train.json"]["also_tested"]) == 12
    shutil.move(photos / "train", photos.with_name("moved"))  # the support set is not at hand
    evaluate_run(run, Target(dataset=str(photos.with_name("moved"))))
    assert evaluations(run)["eval-moved.json"]["also_tested"] is None


def test_a_grid_tells_what_was_odd(run, photos):
    target = Target(dataset=str(photos / "train"))
    planned = PlannedRun(run.path, "a run", run.read_settings(), (target,))
    assert "odd" not in summary(planned)
    assert "," not in summary(planned)
    (photos / "train" / "blue" / "odd.png").write_bytes(b"no image")
    evaluate_run(run, target)
    metrics = json.loads(run.metrics_file.read_text())
    run.metrics_file.write_text(json.dumps({**metrics, "rose": {"first": 1.0, "last": 2.0}}))
    assert summary(planned).endswith(
        "images skipped: 1, support images tested too: 12, its loss rose"
    )


def test_two_at_once_take_two_names(run, photos):
    places = [photos / part / "other.csv" for part in ("train", "test")]
    for place in places:
        rows = "blue/1.png,sky,test\ngreen thing/1.png,grass,test\n"
        place.write_text(f"path,label,split\n{rows}")
    together = threading.Barrier(2)

    def open_together(settings, *, evaluate):
        together.wait(LONG)
        return task_of(settings, evaluate=evaluate)

    def evaluate(place):
        evaluate_run(run, Target(dataset=str(place)), open_task=open_together)

    threads = [threading.Thread(target=evaluate, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    found = evaluations(run)
    assert set(found) == {"eval-other.json", "eval-other-2.json"}
    assert {e["settings"]["dataset"] for e in found.values()} == {str(p) for p in places}


def test_nothing_is_written_into_another_run(run, photos, monkeypatch):
    target = Target(dataset=str(photos / "test"))

    def replace_run(settings, *, evaluate):
        if evaluate:
            new = settings.model_copy(update={"dataset": str(photos), "seed": 7})
            train(new, run.path, overwrite=True)
        return task_of(settings, evaluate=evaluate)

    with pytest.raises(UserError, match="was replaced meanwhile"):
        evaluate_run(run, target, open_task=replace_run)
    monkeypatch.setattr("dapt.run.train._PATIENCE", 0)
    with run.locked(), pytest.raises(InUse):
        evaluate_run(run, target)
    assert evaluations(run) == {}
    with run.locked():
        evaluate_run(run, target, held=True)
    assert set(evaluations(run)) == {"eval-test.json"}
