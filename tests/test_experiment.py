"""Grids of runs: what is done once, what survives a kill, that who does a run does not matter."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest
import yaml
from miniatures import WNIDS, make_benchmark
from patience import LONG, until
from typer.testing import CliRunner

from dapt.cli import app
from dapt.data import bundled_domains
from dapt.errors import UserError
from dapt.grid import SUITES, Grid, make_plan, read_suite, suite_file
from dapt.grid.grid import Estimator
from dapt.grid.plan import DONE
from dapt.grid.work import Session, Worker, cluster
from dapt.methods import METHODS, plugins
from dapt.progress import Reporter
from dapt.settings import all_fields, make_settings

SETTINGS = {
    "device": "cpu", "batch_size": 5, "epochs": 3, "text_vectors": 4, "visual_vectors": 2,
    "lr": 0.02, "checkpoint_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def grid(photo_folder, tiny_weights, tmp_path_factory):
    """Write a suite of 2 methods x 2 shots, changed as told, and return its file."""
    folder = tmp_path_factory.mktemp("suites")

    def write(stem="mine", settings=None, **changes):
        values = {
            "datasets": [str(photo_folder)],
            "methods": ["coop", "dapt"],
            "shots": [1, 2],
            "seeds": [1],
            "settings": {**SETTINGS, "backbone": str(tiny_weights), **(settings or {})},
            **changes,
        }
        file = folder / f"{stem}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    return write


def plan_of(file, output):
    return make_plan(read_suite(file), output)


def results(folder):
    """What must be the same to the bit between two grids: file -> bytes."""
    names = ("prompts.safetensors", "metrics.json", "log.csv", "eval-*.json")
    files = [file for name in names for file in folder.rglob(name)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


@pytest.fixture(scope="module")
def undisturbed(grid, tmp_path_factory):
    """Results of the plain grid, done in this process."""
    output = tmp_path_factory.mktemp("undisturbed")
    result = Grid(plan_of(grid(), output), threads=1).run()
    assert (result.done, result.failed) == (4, {})
    return output / "mine"


def dapt(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def command(*arguments):
    return [sys.executable, "-c", "from dapt.cli import main; main()", *map(str, arguments)]


# ------------------------------------------------------------------------------- the plan


def test_runs_lie_by_dataset_column_shots_and_seed(undisturbed, photo_folder):
    data = photo_folder.name
    runs = {str(file.parent.relative_to(undisturbed)) for file in undisturbed.rglob("metrics.json")}
    assert runs == {f"{data}/{m}/{k}shots-seed1" for m in ("coop", "dapt") for k in (1, 2)}
    metrics = json.loads((undisturbed / data / "coop" / "2shots-seed1/metrics.json").read_text())
    assert (metrics["method"], metrics["shots"], metrics["support_images"]) == ("coop", 2, 6)


def test_variants_and_sweeps_are_columns(grid, tmp_path):
    file = grid(
        variants={"no-inter": {"beta_text": 0}},
        sweeps={"beta_visual": [0.5, 10], "shots": [4]},
        seeds=[1, 2],
    )
    plan = plan_of(file, tmp_path)
    columns = {run.path.parent.name for run in plan.runs}
    # beta_visual=10 is what 'dapt' has anyway.
    assert columns == {"coop", "dapt", "no-inter", "beta_visual=0.5", "shots=4"}
    assert plan.same == 4
    assert len({run.settings.model_dump_json() for run in plan.runs}) == len(plan.runs)
    four = [run.path.name for run in plan.runs if run.path.parent.name == "shots=4"]
    assert four == ["4shots-seed1", "4shots-seed2"]


def test_zero_shot_is_run_once(grid, tmp_path):
    plan = plan_of(grid(methods=["zero-shot", "dapt"], seeds=[1, 2]), tmp_path)
    assert [r.settings.method for r in plan.runs].count("zero-shot") == 1
    assert [r.settings.method for r in plan.runs].count("dapt") == 4


def test_a_run_of_another_suite_serves_too(grid, undisturbed, tmp_path):
    """Same tuning, other evaluations: taken over to the bit, and said."""
    shutil.copytree(undisturbed, tmp_path / "mine")
    plan = plan_of(grid("other", evaluations=[{"classes": "base"}], seeds=[1, 2]), tmp_path)
    result = Grid(plan, threads=1).run()
    assert (result.done, result.failed) == (8, {})
    for run in plan.runs:
        twin = tmp_path / "mine" / run.path.relative_to(tmp_path / "other")
        record = json.loads(run.directory.environment_file.read_text())
        assert record.get("copied_from") == (str(twin) if run.settings.seed == 1 else None)
        assert list(run.path.glob("eval-*.json"))
        if run.settings.seed == 1:
            for name in ("prompts.safetensors", "metrics.json", "log.csv", "support_set.json"):
                assert (run.path / name).read_bytes() == (twin / name).read_bytes()


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("part", ["", "bundled", "quick"])
def test_suites_that_ship_are_sound(name, part, tmp_path):
    suite = read_suite(suite_file(name))
    if part:
        suite = suite.changed(getattr(suite, part), part)
    plan = make_plan(suite, tmp_path)
    assert plan.runs
    assert suite.about


def test_published_settings_are_the_default(tmp_path):
    suite = read_suite(suite_file("few-shot"))
    plan = make_plan(suite, tmp_path)
    by_place = {run.title: run.settings for run in plan.runs}
    eurosat = by_place["eurosat/dapt/16shots-seed3"]
    assert (eurosat.lr, eurosat.beta_visual, eurosat.beta_text) == (20, 100, 10)
    assert (eurosat.epochs, eurosat.backbone, eurosat.pretrained) == (200, "ViT-B-16", "openai")
    assert len(plan.runs) == 11 * (5 * 3 * 5 + 1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shotss": [1]}, "unknown key 'shotss' (did you mean 'shots'?)"),
        ({"quick": {"seed": [1]}}, "quick: unknown key 'seed' (did you mean 'seeds'?)"),
        ({"methods": ["dpat"]}, "unknown method 'dpat' (did you mean 'dapt'?)"),
        ({"settings": {"epoch": 3}}, "unknown setting 'epoch' (did you mean 'epochs'?)"),
        ({"settings": {"seed": 3}}, "'seed' is no fixed setting here; list it under seeds"),
        ({"settings": {"method": "vpt"}}, "'method' is no fixed setting here; list it under met"),
        ({"variants": {"a/b": {"lr": 1}}}, "variant 'a/b' must be named by letters"),
        ({"variants": {"coop": {"lr": 1}}}, "variant 'coop' has the name of a method"),
        ({"sweeps": {"betatext": [1]}}, "(did you mean 'beta_text'?)"),
        ({"evaluations": [{"domian": "x"}]}, "'domian' in evaluations.0 (did you mean 'domain'?)"),
        ({"shots": [0]}, "shots.0: 0: input should be greater than or equal to 1"),
        ({"shots": 4}, "shots: 4: input should be a valid list"),
        ({"seeds": []}, "seeds is empty"),
        ({"datasets": []}, "datasets is empty"),
        ({"methods": []}, "no methods and no variants"),
        ({"name": "../up"}, "name '../up' must be letters"),
    ],
)
def test_what_is_wrong_in_a_suite_is_one_sentence(grid, changes, sentence):
    with pytest.raises(UserError) as error:
        read_suite(grid("wrong", **changes))
    assert sentence in str(error.value)


def test_other_wrong_input_is_one_sentence(grid, tmp_path, undisturbed):
    def fails(sentence, *arguments):
        result = dapt("experiment", *arguments, "-o", tmp_path)
        assert result.exit_code == 2, result.output
        assert sentence in " ".join(result.stderr.split()), result.stderr

    fails("unknown suite 'few-shots' (did you mean 'few-shot'?)", "few-shots")
    fails("does not exist", "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    fails("is not readable YAML", bad)
    bad.write_text("- a")
    fails("must map keys", bad)
    fails("setting lr=-1.0", grid(), "--set", "lr=-1.0")
    fails("'dapy' is no method and no variant", grid(), "--methods", "dapy")
    fails("--shots x: give numbers", grid(), "--shots", "x")
    fails("benchmark 'dtd' needs --root", "few-shot", "--datasets", "dtd")
    fails("does not exist", "few-shot", "--root", tmp_path / "none")
    assert {p.name for p in tmp_path.iterdir()} == {"bad.yaml"}
    shutil.copytree(undisturbed, tmp_path / "mine")
    fails("with lr=0.5: it was started with lr=0.02", grid(), "--set", "lr=0.5")


# -------------------------------------------------------------------------------- doing it


def test_what_is_done_is_skipped(grid, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "mine")
    plan = plan_of(grid(), tmp_path)
    lost = plan.runs[1]
    shutil.rmtree(lost.path)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("metrics.json")}
    assert Grid(plan, threads=1).run().done == 4
    after = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("metrics.json")}
    assert set(after) - set(before) == {lost.path / "metrics.json"}
    assert {f: after[f] for f in before} == before
    assert results(tmp_path / "mine") == results(undisturbed)


def test_a_failure_is_recorded_and_others_go_on(grid, tmp_path, undisturbed):
    """A rate that diverges fails; it is not tried again unless asked for."""
    file = grid("failing", variants={"wild": {"lr": 1.0e30}})
    result = dapt("experiment", file, "-o", tmp_path, "--threads", 1)
    assert result.exit_code == 1, result.output
    assert "4 of 6 runs are done" in result.output
    assert "wild/1shots-seed1" in result.stderr
    (first, *_) = sorted(tmp_path.rglob("failure.json"))
    record = json.loads(first.read_text())
    assert "smaller lr" in record["error"]
    assert record["traceback"] is None
    stamp = first.stat().st_mtime_ns
    again = dapt("experiment", file, "-o", tmp_path, "--threads", 1)
    assert again.exit_code == 1
    assert "2 failed before; --retry tries them again" in again.output
    assert first.stat().st_mtime_ns == stamp
    retried = dapt("experiment", file, "-o", tmp_path, "--threads", 1, "--retry")
    assert retried.exit_code == 1
    assert first.stat().st_mtime_ns > stamp
    done = {k: v for k, v in results(tmp_path / "failing").items() if "wild" not in k}
    assert done == results(undisturbed)


def test_a_bug_in_one_run_keeps_its_traceback(grid, tmp_path, monkeypatch):
    from dapt.grid import work

    train = work.train

    def broken(settings, *arguments, **options):
        if settings.method == "coop":
            raise ZeroDivisionError("by a bug")
        return train(settings, *arguments, **options)

    monkeypatch.setattr(work, "train", broken)
    plan = plan_of(grid(shots=[1]), tmp_path)
    result = Grid(plan, threads=1).run()
    assert result.done == 1
    assert list(result.failed.values()) == ["ZeroDivisionError: by a bug"]
    (file,) = tmp_path.rglob("failure.json")
    assert "in broken" in json.loads(file.read_text())["traceback"]
    monkeypatch.undo()
    # What is mended, by a retry or by 'dapt train --resume', is no failure any more.
    assert dapt("experiment", grid(shots=[1]), "-o", tmp_path, "--retry").exit_code == 0
    assert not file.exists()


def test_a_missing_dataset_stops_only_its_runs(grid, tmp_path, photo_folder):
    file = grid(datasets=[str(photo_folder), str(tmp_path / "none.csv")], shots=[1])
    result = dapt("experiment", file, "-o", tmp_path / "out", "--threads", 1)
    assert result.exit_code == 1, result.output
    assert "warning: dataset" in result.output
    assert "2 of 4 runs are done" in result.output
    assert "none/coop/1shots-seed1 and 1 more" in " ".join(result.stderr.split())


def test_evaluations_follow_a_run(grid, tmp_path, photo_folder):
    other = tmp_path / "other.csv"
    shutil.copytree(photo_folder / "test", tmp_path / "test")
    rows = "test/blue/0.png,sky\ntest/blue/1.png,sky\ntest/green thing/0.png,grass\n"
    other.write_text("path,label\n" + rows)
    evaluations = [{"dataset": str(other)}, {"dataset": str(photo_folder)}]
    file = grid("elsewhere", shots=[1], evaluations=evaluations)
    plan = plan_of(file, tmp_path)
    assert [len(run.targets) for run in plan.runs] == [1, 1]  # not on its own images again
    assert Grid(plan, threads=1).run().done == 2
    record = json.loads((plan.runs[0].path / "eval-other.json").read_text())
    assert record["dataset"] == "other"
    assert record["test"]["images"] == 3
    assert record["settings"]["dataset"] == str(other)
    # A run without its evaluation is not done.
    (plan.runs[0].path / "eval-other.json").unlink()
    assert plan.runs[0].state() != DONE
    assert Grid(plan, threads=1).run().done == 2
    assert json.loads((plan.runs[0].path / "eval-other.json").read_text()) == record


def test_base_and_new_classes(grid, tmp_path, photo_folder):
    photos = shutil.copytree(photo_folder, tmp_path / "four")
    for part in ("train", "test"):
        shutil.copytree(photos / part / "blue", photos / part / "yellow")
    changes = {"shots": [1], "settings": {"classes": "base"}, "datasets": [str(photos)]}
    file = grid("b2n", evaluations=[{"classes": "new"}], **changes)
    plan = plan_of(file, tmp_path)
    assert Grid(plan, threads=1).run().done == 2
    metrics = json.loads((plan.runs[0].path / "metrics.json").read_text())
    assert [row["class"] for row in metrics["test"]["per_class"]] == ["blue", "green thing"]
    (file,) = plan.runs[0].path.glob("eval-*-new.json")
    record = json.loads(file.read_text())
    assert record["classes"] == "new"
    assert record["dataset"] == metrics["dataset"]
    assert [row["class"] for row in record["test"]["per_class"]] == [
        "red_thing", "yellow"]  # fmt: skip
    probe = grid("probe", methods=["linear-probe"], evaluations=[{"classes": "new"}], **changes)
    with pytest.raises(UserError, match="'linear-probe' knows only the classes"):
        plan_of(probe, tmp_path)


def test_domain_generalization_on_the_benchmarks(tiny_weights, tmp_path):
    """The suite that ships, on ImageNet and its four shifts in miniature; then its table."""
    names = ("imagenet", "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
    for name in names:
        make_benchmark(tmp_path / "data", name)
    tiny = [f"--set={k}={v}" for k, v in {**SETTINGS, "epochs": 1}.items()]
    result = dapt(
        "experiment", "domain-generalization", "--root", tmp_path / "data", "-o", tmp_path / "out",
        "-b", tiny_weights, "--methods", "zero-shot,dapt", "--seeds", "1,2",
        "--threads", 1, *tiny,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    runs = sorted((tmp_path / "out/domain-generalization/imagenet/dapt").iterdir())
    assert [run.name for run in runs] == ["16shots-seed1", "16shots-seed2"]
    for run in runs:
        images = {}
        for file in run.glob("eval-*.json"):
            value = json.loads(file.read_text())
            images[value["dataset"]] = value["test"]["images"]
        # Three images a class; two of the shifts lack a class.
        every, fewer = 3 * len(WNIDS), 3 * (len(WNIDS) - 1)
        assert images == {
            "imagenetv2": every, "imagenet_sketch": every, "imagenet_a": fewer, "imagenet_r": fewer
        }  # fmt: skip
    page = tmp_path / "report.html"
    assert dapt("report", tmp_path / "out", "--out", page).exit_code == 0
    assert "From imagenet" in page.read_text()


def test_two_evaluations_of_one_name_are_kept_apart(undisturbed, tmp_path, photo_folder):
    run = tmp_path / "run"
    shutil.copytree(next(undisturbed.rglob("coop/1shots-seed1")), run)
    for folder, count in (("a", 1), ("b", 2)):
        shutil.copytree(photo_folder / "test", tmp_path / folder)
        names = [f"{name}/{i}.png,{name}\n" for name in ("blue", "red_thing") for i in range(count)]
        (tmp_path / folder / "other.csv").write_text("path,label\n" + "".join(names))
    for folder in "aba":
        assert dapt("eval", run, "--dataset", tmp_path / folder / "other.csv").exit_code == 0
    found = {f.name: json.loads(f.read_text())["test"]["images"] for f in run.glob("eval-*")}
    assert found == {"eval-other.json": 2, "eval-other-2.json": 4}


def test_a_probe_goes_where_the_classes_are_its_own(tiny_weights, tmp_path):
    result = dapt(
        "experiment", "domain-generalization", "-o", tmp_path, "-b", tiny_weights, "--methods",
        "linear-probe", "--shots", 1, "--seeds", 1, "--threads", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    records = [json.loads(file.read_text()) for file in tmp_path.rglob("eval-*.json")]
    assert sorted(record["domain"] for record in records) == sorted(bundled_domains()[1:])
    assert all(len(record["test"]["per_class"]) == 34 for record in records)
    assert "linear-probe" in read_suite(suite_file("domain-generalization")).bundled["methods"]


def test_an_estimate_counts_the_images_of_targets(grid, tmp_path, undisturbed, photo_folder):
    """Eight images elsewhere take eight times as long as one; what cannot be opened, no time."""
    estimator = Estimator(Session())
    estimator.observe(plan_of(grid(), undisturbed.parent).runs[0])
    image = photo_folder / "test" / "blue" / "0.png"
    expected = {}
    for count in (0, 1, 8):
        folder = tmp_path / f"{count}"
        for name in ("x", "y"):
            (folder / name).mkdir(parents=True)
            for number in range(count):
                shutil.copy(image, folder / name / f"{number}.png")
        (run, *_) = plan_of(grid(evaluations=[{"dataset": str(folder)}]), folder).runs
        expected[count] = estimator.seconds(run)
    assert expected[1] > expected[0] > 0
    assert expected[8] - expected[0] == pytest.approx(8 * (expected[1] - expected[0]))


def test_a_step_is_timed_several_times(grid, tmp_path, monkeypatch):
    """The median of three, after one that pays for memory and kernels."""
    clock, each = [0.0], iter([90.0, 1.0, 50.0, 2.0])

    class Tuner:
        def __init__(self, *_):
            pass

        def step(self, *_):
            clock[0] += next(each)

    monkeypatch.setattr("dapt.engine.step.Tuner", Tuner)
    monkeypatch.setattr("dapt.engine.step.time.perf_counter", lambda: clock[0])
    (run,) = plan_of(grid(methods=["dapt"], shots=[2]), tmp_path).runs
    estimator = Estimator(Session())
    estimator.prepare([run], [run])
    assert estimator.seconds(run) == 2.0 * 3  # a step an epoch


def test_a_dry_run_writes_nothing(grid, tmp_path):
    result = dapt("experiment", grid(), "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "4 runs to do, about" in result.output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_what_is_done(grid, tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "mine")
    lost = plan_of(grid(), tmp_path).runs[0].path
    shutil.rmtree(lost)
    result = dapt("experiment", grid(), "-o", tmp_path, "--dry-run")
    assert "1 run to do" in result.output
    assert not lost.exists()


def test_a_run_held_by_another_process_is_revisited(grid, tmp_path, undisturbed):
    plan = plan_of(grid(), tmp_path)
    held = plan.runs[0].directory
    hold = (
        "import sys, time\nfrom dapt.run.directory import RunDirectory\n"
        "with RunDirectory(sys.argv[1]).locked():\n"
        "    print('held', flush=True)\n    time.sleep(10_000)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(held.path)], stdout=subprocess.PIPE)
    told = []

    class Told(Reporter):
        def say(self, line):
            told.append(line)
            if "other processes hold" in line:
                holder.kill()

    try:
        assert holder.stdout.readline() == b"held\n"
        assert Grid(plan, threads=1, reporter=Told()).run().done == 4
    finally:
        holder.kill()
        holder.wait()
    assert [line.split()[0] for line in told] == ["[1/4]", "[2/4]", "[3/4]", "waiting", "[4/4]"]
    assert results(tmp_path / "mine") == results(undisturbed)


# ------------------------------------------------------------------- kills, and who does it


def wait_for(process, condition):
    until(lambda: process.poll() is not None or condition())


def test_a_killed_grid_goes_on_to_the_same_bits(grid, tmp_path, undisturbed):
    """Killed when one, two and three runs are begun, each a random moment later."""
    moments = random.Random(3)
    arguments = command("experiment", grid(), "-o", tmp_path, "--threads", 1)
    for begun in (1, 2, 3):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(process, lambda n=begun: len(list(tmp_path.rglob("settings.json"))) >= n)
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.wait(LONG)
    assert Grid(plan_of(grid(), tmp_path), threads=1).run().done == 4
    assert results(tmp_path / "mine") == results(undisturbed)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_all_to_be_resumed(grid, tmp_path, workers):
    file = grid("long", settings={"epochs": 4000, "checkpoint_every": 4000})
    arguments = command("experiment", file, "-o", tmp_path, "--threads", 1, "--workers", workers)
    process = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )

    def tuning():
        logs = list(tmp_path.rglob("log.csv"))
        return len(logs) >= workers and all(log.stat().st_size > 1000 for log in logs)

    wait_for(process, tuning)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=LONG)
    assert process.returncode == 130, said
    assert said.decode().strip().endswith("stopped with 0 of 4 runs done; the same command goes on")
    assert b"Traceback" not in said
    begun = [run.directory for run in plan_of(file, tmp_path).runs if run.directory.exists]
    assert len(begun) == workers
    assert not list(tmp_path.rglob("failure.json"))
    assert all(run.read_checkpoint()[1] > 0 for run in begun)


def test_two_workers_find_the_same_bits(grid, tmp_path, undisturbed):
    result = Grid(plan_of(grid(), tmp_path), workers=2, threads=1).run()
    assert (result.done, result.failed) == (4, {})
    assert results(tmp_path / "mine") == results(undisturbed)
    environment = json.loads(next(tmp_path.rglob("environment.json")).read_text())
    assert environment["threads"] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_odd_about_a_dataset_is_told_once(grid, tmp_path, photo_folder, workers):
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    next(photos.rglob("*.png")).with_name("notes.txt").write_text("no image")
    file = grid(datasets=[str(photos)], methods=["zero-shot", "coop"], shots=[1])
    asked = ("-o", tmp_path / "out", "--threads", 1, "--workers", workers)
    result = dapt("experiment", file, *asked)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("notes.txt") == 1


HELD = """
import os
import time
from itertools import count
from pathlib import Path
from dapt.methods import METHODS, LossTerm, Method
from dapt.methods.prompts import Context
steps, held = count(), Path({held!r})

def hold(step):  # where runs are done, and not where a step is timed
    while next(steps) > 2 and held.exists() and os.getpid() != {own}:
        time.sleep(0.01)
    return 0 * step.text_features.sum()

METHODS["held"] = Method("Held", (Context,), (LossTerm("hold", "hold", hold),))
"""


@pytest.fixture
def held(grid, tmp_path, monkeypatch):
    """A suite whose runs stay in their middle while a file is there: the suite, and the file."""
    for known in ("_ROWS", "_FILES"):
        monkeypatch.setattr(plugins, known, {})
    (wait := tmp_path / "wait").touch()
    (tmp_path / "held.py").write_text(HELD.format(held=str(wait), own=os.getpid()))
    parts = {"methods": ["held"], "plugins": [str(tmp_path / "held.py")]}
    yield grid("held", settings={"epochs": 6, "loss_weights": {"hold": 1.0}}, **parts), wait
    METHODS.pop("held", None)


def test_a_killed_worker_is_told_of_and_its_run_goes_on(held, tmp_path):
    plan, wait = plan_of(held[0], tmp_path), held[1]
    told = []

    class Told(Reporter):
        def say(self, line):
            told.append(line)

    def kill():
        try:
            until(plan.runs[0].directory.checkpoint_file.exists)
            for worker in multiprocessing.active_children():
                worker.kill()
        finally:
            wait.unlink()

    killing = threading.Thread(target=kill)
    killing.start()
    result = Grid(plan, workers=2, threads=1, reporter=Told()).run()
    killing.join()
    assert result.done == 2
    assert any("its worker died; the run goes on in another" in line for line in told)


def dying(monkeypatch, *, at_once):
    """Workers that die of every run, or before they are there."""

    def do(run):
        told = Future()
        if run is None and not at_once:
            told.set_result(Session().do(None))
        else:
            told.set_exception(EOFError())
        return told

    monkeypatch.setattr("dapt.grid.work.process", lambda threads: Worker(do))


def test_what_kills_its_worker_three_times_is_given_up(grid, tmp_path, monkeypatch):
    dying(monkeypatch, at_once=False)
    plan = plan_of(grid(shots=[1]), tmp_path)
    told = Grid(plan, workers=2, threads=1).run()
    assert told.done == 0
    note = "its worker died 3 times, perhaps for lack of memory"
    assert told.failed == {run.title: note for run in plan.runs}
    assert all(run.directory.read_failure() == note for run in plan.runs)


def test_workers_that_cannot_start_are_one_sentence(grid, tmp_path, monkeypatch):
    dying(monkeypatch, at_once=True)
    plan = plan_of(grid(shots=[1]), tmp_path)
    with pytest.raises(UserError, match="workers end as soon as they are started"):
        Grid(plan, workers=2, threads=1).run()
    assert not list(tmp_path.rglob("failure.json"))


def test_fewer_methods_of_a_suite(grid, tmp_path):
    file = grid(sweeps={"beta_text": [0.5]})
    result = dapt(
        "experiment", file, "-o", tmp_path, "--methods", "beta_text=0.5,vpt", "--shots", "1",
        "--threads", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    runs = {file.parent.parent.name for file in tmp_path.rglob("metrics.json")}
    assert runs == {"beta_text=0.5", "vpt"}


def test_yaml_of_a_suite_is_a_suite(tmp_path):
    file = tmp_path / "copy.yaml"
    file.write_text(dapt("experiment", "ablation", "--yaml").stdout)
    assert read_suite(file).columns() == read_suite(suite_file("ablation")).columns()


def test_settings_of_a_suite_are_settings():
    for name in SUITES:
        assert set(read_suite(suite_file(name)).settings) <= set(all_fields())


# -------------------------------------------------------------------------------------- Ray


@pytest.fixture
def ray(monkeypatch):
    """Ray, which would otherwise end workers where other programs fill the memory."""
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", str(int(LONG)))
    return pytest.importorskip("ray")


@contextlib.contextmanager
def patience_of_ray():
    """Ray waits 30 s for its own processes, whatever it is told; a machine may need more."""
    try:
        yield
    except Exception as error:
        if "timed out during startup" in str(error):
            pytest.skip(str(error))
        raise


def test_a_cluster_that_does_not_start_is_one_sentence(monkeypatch, ray):
    def init(*_, **__):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match="answers there .*timed out"), cluster("local", 1):
        pass


def test_a_local_cluster_is_one_of_its_own(grid, tmp_path, undisturbed, monkeypatch, ray):
    """Whatever RAY_ADDRESS says; and its actors find the bits that this process does."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    result = dapt("experiment", grid(), "-o", tmp_path, "--ray", "local", "--threads", 1)
    with patience_of_ray():
        assert result.exit_code == 0, " ".join(result.output.split())
    assert "4 runs to do, about" in result.output
    assert "of work" in result.output
    assert results(tmp_path / "mine") == results(undisturbed)


def computes(process):
    line = Path(f"/proc/{process}/cmdline")
    return line.exists() and bool(line.read_bytes())  # of one that has ended, it is empty


def test_a_lost_node_costs_no_run(held, tmp_path, monkeypatch, ray):
    """Lost while both nodes tune: what it was at goes on elsewhere, to the same bits."""
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(Cluster._wait_for_node, "__defaults__", (LONG,))
    file, wait = held
    with patience_of_ray():
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        with patience_of_ray():
            second = nodes.add_node(num_cpus=1)

        def lose_it():
            begun = partial(tmp_path.rglob, "checkpoint.safetensors")
            try:
                until(lambda: len([*begun()]) == 2 or not wait.exists())
                nodes.remove_node(second, allow_graceful=False)
                # Before the runs go on: a lost worker may live a moment longer than its node.
                workers = {int(file.suffix[1:]) for file in tmp_path.rglob("events.*")}
                until(lambda: not all(map(computes, workers)))
            finally:
                wait.unlink(missing_ok=True)

        loss = threading.Thread(target=lose_it)
        loss.start()
        arguments = ("--ray", nodes.address, "--threads", 1)
        result = dapt("experiment", file, "-o", tmp_path / "a", *arguments)
        wait.unlink(missing_ok=True)
        loss.join()
        assert result.exit_code == 0, result.output
    finally:
        nodes.shutdown()
    assert "its worker died; the run goes on in another" in result.output
    assert Grid(plan_of(file, tmp_path / "b"), threads=1).run().done == 2
    assert results(tmp_path / "a") == results(tmp_path / "b")


def test_a_name_stands_for_the_methods_of_the_field():
    field = [name for name, row in METHODS.items() if row.field]
    assert {"coop", "maple", "gda", "prolip"} <= set(field)
    assert not {"dapt", "vlpt", "zero-shot", "auto"} & set(field)

    def asked(suite, *names, **part):
        return read_suite(suite_file(suite)).changed(part, "here").select([*names], "here").methods

    assert asked("few-shot", "dapt", "field", "coop") == ["dapt", *field]
    assert asked("few-shot", "all") == list(METHODS)
    # What knows only its own classes is left out where there are others.
    opened = [n for n in field if not METHODS[n].closed(make_settings({"dataset": "dtd"}))]
    for suite in ("base-to-new", "cross-dataset", "domain-generalization"):
        assert asked(suite, "field") == opened
    assert asked("domain-generalization", "field", evaluations=[{"domain": "streamline"}]) == field
    assert "gda" not in opened
    with pytest.raises(UserError, match=r"'fields' is no method .*did you mean 'field'"):
        asked("few-shot", "fields")
