"""A longer search for a method: what is chosen and why; that it resumes to the bit."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from patience import LONG, until
from PIL import Image
from test_cli import dapt, fails

from dapt import PromptClassifier
from dapt.data import Item
from dapt.engine import effort
from dapt.engine.data import open_data
from dapt.engine.effort import Fold, Search, Trial, choose, new_search, time_of
from dapt.engine.features import Shared, backbone_of
from dapt.engine.search import folds
from dapt.errors import UserError
from dapt.methods import METHODS, Head, Method
from dapt.run.directory import RunDirectory
from dapt.settings import make_settings, with_method


class Cosines(Head):
    """No head at all, but fitted: what is tuned in the towers is all there is to gain."""

    fitted = True


def with_a_plain_head():
    """The table with a weak automatic head, and one method to try beside it."""
    return {
        name: Method("Plain", head=Cosines) if name == "auto" else replace(row, tried=name == "vpt")
        for name, row in METHODS.items()
    }


def make_plain(patch):
    """With so few images nothing is better by more than an error."""
    patch.setattr(effort, "MARGIN", 0.0)
    for name, row in with_a_plain_head().items():
        patch.setitem(METHODS, name, row)


@pytest.fixture
def plain(monkeypatch):
    make_plain(monkeypatch)


@pytest.fixture
def only_ivlp(monkeypatch):
    for name, row in METHODS.items():
        monkeypatch.setitem(METHODS, name, replace(row, tried=name == "ivlp"))


@pytest.fixture
def given(photo_folder, tiny_weights):
    return {
        "dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu", "shots": 4,
        "method": "auto", "batch_size": 9, "epochs": 40, "lr": 5.0, "visual_vectors": 4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def options(photo_folder, tiny_weights):
    return [
        photo_folder, "-b", tiny_weights, "--device", "cpu", "--shots", 4, "--epochs", 40,
        "--lr", 5, "--set", "batch_size=9", "--set", "visual_vectors=4",
    ]  # fmt: skip


def search(given, wanted="hours", **how):
    settings = make_settings(given)
    found, data = new_search(wanted), open_data(settings)
    chosen = choose(found, settings, data, shared=Shared(backbone_of(settings)), **how)
    return found, chosen


def test_folds_hold_each_image_out_once(given):
    support = open_data(make_settings({**given, "shots": 6})).support
    alone = replace(support, train=(*support.train, Item("one.png", 9, "alone")))
    parts = folds(alone, 4, seed=1)
    held = [item for part in parts for item in part.val]
    assert Counter(held) == Counter(support.train)
    for part in parts:
        assert Counter(part.train) + Counter(part.val) == Counter(alone.train)
        sizes = Counter(item.label for item in part.val)
        assert set(sizes) == {0, 1, 2}
        assert len(set(sizes.values())) == 1
    assert folds(alone, 4, seed=1) == parts != folds(alone, 4, seed=2)
    assert len(folds(replace(support, train=support.train[:2]), 4, seed=1)) == 2
    assert folds(replace(support, train=support.train[:1]), 4, seed=1) == []


def trial(method, losses):
    n = len(losses)
    fold = Fold(truth=[0] * n, predicted=[0] * n, best=[0.5] * n, losses=losses, seconds=1.0)
    return Trial(method=method, epochs=1, folds=[fold])


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([0.8, 1.1, 0.7, 1.0], "other"),
        ([0.4, 1.5, 0.5, 1.5], None),  # a little lower, and no more than by chance
        ([1.2, 1.2, 1.2, 1.3], None),
        ([0.999, 1.199, 0.899, 1.099], None),  # surely lower, by nothing to speak of
    ],
)
def test_another_is_taken_where_it_is_clearly_better(losses, best):
    base = trial("auto", [1.0, 1.2, 0.9, 1.1])
    found = Search(effort="minutes", folds=4, trials=[base, trial("other", losses)])
    assert (found.best and found.best.method) == best
    assert effort.told(found).startswith("chosen: other" if best else "auto is kept")


def test_what_tuning_gains_is_found_on_the_folds(given, plain):
    found, chosen = search(given)
    base, other = found.trials
    assert other.method == chosen.method == "vpt+auto"
    assert other.accuracy > base.accuracy + 0.1
    assert len(base.all("truth")) == len(other.all("truth")) == 12
    assert (chosen.epochs, chosen.lr, chosen.visual_vectors) == (40, 5.0, 4)


def test_the_head_alone_is_kept_where_tuning_gains_nothing(given, only_ivlp):
    given = {**given, "epochs": 3}
    found, chosen = search(given)
    assert [t.method for t in found.tried] == ["ivlp+auto"]
    assert chosen == make_settings(given)
    assert "nothing is clearly better" in effort.told(found)


def test_a_search_never_looks_at_test_images(given, plain):
    settings, found = make_settings(given), new_search("hours")
    data = open_data(settings)
    gone = replace(data, task=replace(data.task, test=(Item("gone.png", 0, "blue"),)))
    shared = Shared(backbone_of(settings))
    assert choose(found, settings, gone, shared=shared).method == "vpt+auto"


def test_each_method_starts_from_settings_of_its_own(given):
    settings = make_settings({**given, "epochs": None, "lr": None, "seed": 7})
    own = with_method(settings, "ivlp+auto")
    assert (own.epochs, own.lr, own.seed, own.visual_vectors) == (5, 0.0035, 7, 4)
    assert with_method(own, "auto") == settings


def test_what_does_not_fit_is_left_out_or_gets_fewer_epochs(given, plain, monkeypatch):
    # Six an epoch, in 5 tunings; the head's own folds, which are timed, are nothing beside them.
    monkeypatch.setattr(effort, "step_seconds", lambda *_: 10.0)
    found, chosen = search({**given, "shots": 6, "epochs": 80}, "300s")
    assert "min" in found.trials[1].left_out
    assert (chosen.method, found.trials[1].folds) == ("auto", [])
    assert "could be tried in 300s" in effort.told(found)
    monkeypatch.setattr(effort, "step_seconds", lambda *_: 6.0)
    found, _ = search({**given, "shots": 6, "epochs": 80}, "1000s")
    assert found.trials[1].epochs == 20
    assert len(found.trials[1].folds) == 4


def test_a_cheap_method_is_not_left_out_for_dear_ones(given, monkeypatch):
    monkeypatch.setattr(effort, "step_seconds", lambda *_: 1.0)
    settings = make_settings({**given, "epochs": None, "lr": None})
    data, found = open_data(settings), new_search("10m")
    fold = Fold(truth=[0], predicted=[0], best=[0.5], losses=[1.0], seconds=1.0)
    found.trials = [Trial(method="auto", folds=[fold] * 4)]
    parts, shared = folds(data.support, 4, 1), Shared(backbone_of(settings))
    planned = effort._Work(
        found, settings, data, parts, shared, lambda: None, effort.Reporter()
    )._plan(600.0)
    assert [t.method for t in planned] == ["dapt+auto", "ivlp+auto", "clip-lora+auto"]
    assert [t.epochs for t in planned] == [50, 5, 50]
    assert not any(t.left_out for t in planned)


def test_a_method_of_so_many_steps_is_planned_for_them(given, monkeypatch):
    """100 steps a shot: of 16 images a class they are fewer than everyone's passes."""
    monkeypatch.setattr(effort, "step_seconds", lambda *_: 1.0)
    for name, row in METHODS.items():
        monkeypatch.setitem(METHODS, name, replace(row, tried=name == "clip-lora"))
    settings = make_settings({**given, "epochs": None, "lr": None, "shots": 6, "batch_size": 6})
    data, found = open_data(settings), new_search("10h")
    fold = Fold(truth=[0], predicted=[0], best=[0.5], losses=[1.0], seconds=1.0)
    found.trials = [Trial(method="auto", folds=[fold] * 4)]
    parts, shared = folds(data.support, 4, 1), Shared(backbone_of(settings))
    (trial,) = effort._Work(
        found, settings, data, parts, shared, lambda: None, effort.Reporter()
    )._plan(36_000.0)
    assert with_method(settings, trial.method).steps == 600
    assert trial.epochs == 600 // (len(data.support.train) // 6)


def test_a_budget_too_small_for_the_head_itself_ends_at_once(given):
    found, chosen = search(given, "0.001s")
    assert chosen.method == "auto"
    assert len(found.trials[0].folds) == 1
    assert re.search(r"its folds alone take about \d+ s, not 0\.001s", effort.told(found))


def test_a_method_that_leaves_the_numbers_is_left_out(given, plain):
    found, chosen = search({**given, "lr": 1e30})
    assert chosen.method == "auto"
    assert "no longer finite" in found.trials[1].left_out


def test_one_image_a_class_leaves_nothing_to_judge_by(options, tmp_path):
    options = [1 if o == 4 else o for o in options]
    made = dapt("train", *options, "-o", tmp_path / "run", "--effort", "minutes")
    assert made.exit_code == 0, made.output
    assert "with one image a class there is nothing to judge another method by" in made.output
    assert RunDirectory(tmp_path / "run").read_settings().method == "auto"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("seconds", 0), ("minutes", 600), ("90s", 90), ("20m", 1200), ("1.5h", 5400)],
)
def test_times(text, seconds):
    assert time_of(text) == seconds


@pytest.mark.parametrize("text", ["20", "m", "-1m", "1e3s", "fast", "1 h", "٣m"])
def test_what_is_no_time_is_told(text):
    with pytest.raises(UserError, match="is no time; give seconds, minutes, hours"):
        time_of(text)


def results(path):
    names = ("settings.json", "metrics.json", "prompts.safetensors", "support_set.json", "log.csv")
    return {name: (path / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def searched(options, tmp_path_factory):
    path = tmp_path_factory.mktemp("effort") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        make_plain(patch)
        made = dapt("train", *options, "-o", path, "--effort", "hours")
    assert made.exit_code == 0, made.output
    assert "chosen: vpt+auto, which names" in made.output
    return path


@pytest.fixture
def undisturbed(searched, tmp_path, plain):
    return Path(shutil.copytree(searched, tmp_path / "undisturbed"))


def test_a_run_that_was_searched_for_is_one_of_its_method(undisturbed, options, tmp_path):
    run = RunDirectory(undisturbed)
    metrics, spent = run.read_metrics(), run.read_environment()
    assert run.read_settings().method == metrics.effort.chosen == "vpt+auto"
    assert [t.method for t in metrics.effort.tried] == ["auto", "vpt+auto"]
    assert metrics.effort.images == metrics.forecast.images == 12
    judged = metrics.effort.tried[1]
    assert judged.gain > judged.error > 0
    assert metrics.forecast.accuracy == pytest.approx(judged.accuracy)
    assert spent.effort_seconds["vpt+auto"] > 0
    made = dapt("train", *options, "-m", "vpt+auto", "-o", tmp_path / "direct")
    assert made.exit_code == 0, made.output
    same, direct = results(undisturbed), results(tmp_path / "direct")
    assert same.pop("metrics.json") != direct.pop("metrics.json")
    assert same == direct
    # Towers tuned on the images that the head holds out: nothing to expect anything by.
    assert RunDirectory(tmp_path / "direct").read_metrics().forecast is None


class Killed(BaseException):
    """As a kill: nothing is written after it."""


# Of a search: begun, 4 folds of the head alone, planned, 4 folds of the other, done.
@pytest.mark.parametrize("writes", [1, 3, 5, 8, 11])
def test_a_search_that_was_stopped_resumes_to_the_same_bits(
    undisturbed, options, tmp_path, monkeypatch, writes
):
    from dapt.run import effort as kept

    left, write = [writes], kept.write_json

    def write_some(path, value):
        if not left[0]:
            raise Killed
        left[0] -= 1
        write(path, value)

    path = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(kept, "write_json", write_some)
        if writes == 11:  # all of it is there, and the run is not begun
            patch.setattr(RunDirectory, "begin", lambda *_, **__: write_some(None, None))
        with pytest.raises(Killed):
            dapt("train", *options, "-o", path, "--effort", "hours")
    assert not RunDirectory(path).exists
    fails("holds an unfinished search", "train", *options, "-o", path)
    fails("it was started with hours", "train", "-o", path, "--resume", "--effort", "minutes")
    fails("its lr was another", "train", "-o", path, "--resume", "--lr", 3)
    made = dapt("train", "-o", path, "--resume")
    assert made.exit_code == 0, made.output
    assert results(path) == results(undisturbed)


# Once it has judged a fold of what is planned, it does nothing more.
SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import test_effort
judge = test_effort.effort._Work._judge

def judge_one(work, trial):
    if work.search.planned and trial.folds:
        time.sleep(10_000)
    judge(work, trial)

test_effort.effort._Work._judge = judge_one
test_effort.make_plain(test_effort.pytest.MonkeyPatch())
test_effort.dapt.__globals__["app"]()
"""


def test_a_killed_process_resumes_to_the_same_bits(undisturbed, options, tmp_path):
    path, tests = tmp_path / "killed", Path(__file__).parent
    words = [tests, "train", *options, "-o", path, "--effort", "hours"]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, words)], stdout=-3, stderr=-3
    )
    file = path / "effort.json"

    def begun():
        trials = json.loads(file.read_text())["search"]["trials"] if file.is_file() else []
        return len(trials) > 1 and trials[1]["folds"]

    until(lambda: begun() or process.poll() is not None)
    process.kill()
    assert process.wait(LONG) != 0
    assert not RunDirectory(path).exists
    assert dapt("train", "-o", path, "--resume").exit_code == 0
    assert results(path) == results(undisturbed)


def test_a_run_that_was_stopped_after_its_search_resumes(undisturbed):
    before = results(undisturbed)
    for name in ("metrics.json", "prompts.safetensors"):
        (undisturbed / name).unlink()
    made = dapt("train", "-o", undisturbed, "--resume", "--effort", "hours")
    assert made.exit_code == 0, made.output
    assert results(undisturbed) == before


def test_overwriting_forgets_the_search(undisturbed, options):
    made = dapt("train", *options, "-o", undisturbed, "-m", "vpt+auto", "--overwrite")
    assert made.exit_code == 0, made.output
    assert not (undisturbed / "effort.json").exists()
    assert RunDirectory(undisturbed).read_metrics().effort is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s["trials"][1]["folds"][0]["truth"].reverse(), "not judged on the same images"),
        (lambda s: s["trials"][0]["folds"][0]["losses"].pop(), "not as long as each other"),
        (lambda s: s["trials"][1]["folds"].pop(), "folds are missing"),
        (lambda s: s.pop("effort"), "'search.effort'"),
    ],
)
def test_a_damaged_search_is_told(undisturbed, change, told):
    file = undisturbed / "effort.json"
    kept = json.loads(file.read_text())
    change(kept["search"])
    file.write_text(json.dumps(kept))
    (undisturbed / "settings.json").unlink()
    (undisturbed / "metrics.json").unlink()
    assert "effort.json is damaged" in fails(told, "train", "-o", undisturbed, "--resume")


def test_effort_chooses_the_method_by_itself(options, tmp_path):
    run = ["train", *options, "-o", tmp_path / "run", "--effort", "minutes"]
    fails("effort chooses the method by itself, and dapt was given", *run, "-m", "dapt")
    fails("are two searches; give one", *run, "--tune-settings")
    fails("'soon' is no time", *run[:-1], "soon")
    assert not (tmp_path / "run" / "settings.json").exists()
    quick = dapt(*run[:-1], "seconds")
    assert quick.exit_code == 0, quick.output
    assert not (tmp_path / "run" / "effort.json").exists()


def test_the_classifier_in_python_takes_an_effort(given, photo_folder, plain, tmp_path):
    files = sorted((photo_folder / "train").rglob("*.png"))
    images, labels = [Image.open(file) for file in files], [file.parent.name for file in files]
    more = {name: given[name] for name in ("epochs", "lr", "batch_size", "visual_vectors")}
    model = PromptClassifier(given["backbone"], shots=4, device="cpu", effort="hours", **more)
    with pytest.raises(UserError, match="chooses the method by itself"):
        PromptClassifier(given["backbone"], method="dapt", effort="hours").fit(images, labels)
    model.fit(images, labels)
    assert model.effort_["chosen"] == "vpt+auto"
    assert np.mean(model.predict(images) == labels) > 0.5
    assert RunDirectory(model.save(tmp_path / "run")).read_settings().method == "vpt+auto"
    assert model.set_params(effort=None).fit(images, labels).effort_ is None
