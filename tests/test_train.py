"""Runs from the outside: what they leave, that they repeat and resume to the bit."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from patience import LONG, until
from safetensors.torch import load_file, save_file

from dapt.data import draw_support_set
from dapt.engine.data import task_of
from dapt.engine.fit import epoch_order, steps_per_epoch
from dapt.errors import UserError
from dapt.methods import METHODS, LossTerm, Method, cocoop
from dapt.methods.fitting import scheduled
from dapt.methods.losses import INTER
from dapt.methods.prompts import Context
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.safe.files import write_atomic
from dapt.settings import make_settings


@pytest.fixture
def given(photo_folder, tiny_weights):
    return {
        "dataset": str(photo_folder),
        "backbone": str(tiny_weights),
        "device": "cpu",
        "shots": 4,
        "batch_size": 5,
        "epochs": 4,
        "text_vectors": 4,
        "visual_vectors": 2,
        "lr": 0.02,
        "checkpoint_every": 1,
    }


def results(run):
    """What must be the same to the bit between two runs."""
    return [
        (run.path / name).read_bytes()
        for name in ("prompts.safetensors", "metrics.json", "log.csv", "support_set.json")
    ]


# Of methods that learn something else than one prompt a tower.
DEEP = {f"{kind}_prompt.{layer}" for kind in ("text", "visual") for layer in range(2)}
TENSORS = {
    "ivlp": DEEP,
    "promptsrc": DEEP,
    "mmrl": {"rep_tokens", "rep_projection"}
    | {f"rep_to_{tower}.0.{kind}" for tower in ("text", "visual") for kind in ("weight", "bias")},
    "maple": {
        f"{name}.{layer}{kind}"
        for layer in range(2)
        for name, kind in (("text_prompt", ""), ("visual_map", ".weight"), ("visual_map", ".bias"))
    },
    "clip-lora": {
        f"{kind}_lora.{layer}.{name}.{factor}" for kind in ("text", "visual") for layer in range(2)
        for name in "qkv" for factor in "AB"
    },
    "clip-svd": {
        f"{kind}_svd.{layer}.{name}" for kind in ("text", "visual") for layer in range(2)
        for name in ("q", "k", "v", "o", "fc", "proj")
    },
    "2sfs": {"weight"} | {
        f"{kind}_norms.{layer}.{name}.{own}" for kind in ("text", "visual") for layer in range(2)
        for name in ("ln_1", "ln_2") for own in ("weight", "bias")
    },
    "cocoop": {"text_prompt", *cocoop.NETWORK},
    "vpt-deep": {f"visual_prompt.{layer}" for layer in range(2)},
}  # fmt: skip


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_leaves_a_readable_run(given, tmp_path, method):
    run = train(make_settings({**given, "method": method}), tmp_path / "run")
    metrics = json.loads(run.metrics_file.read_text())
    assert metrics["test"]["images"] == 12
    assert 0 <= metrics["test"]["accuracy"] <= 1
    row, tensors = METHODS[method], load_file(run.prompts_file)
    learned = {"text": "text_prompt", "image": "visual_prompt"}
    expected = {name for tower, name in learned.items() if row.changes(tower)}
    expected |= row.head.shapes.keys()
    assert set(tensors) == TENSORS.get(method, expected)
    assert metrics["learned_parameters"] == sum(t.numel() for t in tensors.values())
    if row.learns:
        with run.log_file.open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 4 * (12 // 5)
        assert {"cross_entropy", "lr", "accuracy", *(t.name for t in row.losses)} <= set(rows[0])
        schedule = make_settings({**given, "method": method}).schedule
        rates = [scheduled(schedule, step, 0.02, 8, 2) for step in range(8)]
        assert [float(r["lr"]) for r in rows] == rates
        assert {"before", "after"} == set(metrics["dispersion"]["inter"])
    environment = json.loads(run.environment_file.read_text())
    assert environment["seed"] == 1
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert load_classifier(run)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 3)


def test_tuning_learns(given, tmp_path):
    """Even an untrained tower tells colours apart once its prompts are tuned."""
    given = {**given, "shots": 6, "batch_size": 9, "text_vectors": 8}
    tuned = {**given, "epochs": 40, "lr": 0.1, "method": "vlpt"}
    run = train(make_settings(tuned), tmp_path / "run")
    with run.log_file.open() as file:
        losses = [float(r["cross_entropy"]) for r in csv.DictReader(file)]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    before = train(make_settings({**given, "method": "zero-shot"}), tmp_path / "before")
    accuracy = [json.loads(r.metrics_file.read_text())["test"]["accuracy"] for r in (before, run)]
    assert accuracy[1] > max(accuracy[0], 0.5)


def test_same_settings_same_bits(given, tmp_path):
    settings = make_settings({**given, "visual_dropout": 0.3})
    first, second = (train(settings, tmp_path / name) for name in "ab")
    assert results(first) == results(second)
    other = train(settings.model_copy(update={"seed": 2}), tmp_path / "c")
    assert results(first)[0] != results(other)[0]


def test_the_number_of_threads_changes_last_bits_at_most(given, tmp_path):
    """The documented exception: sums are split, and added up, otherwise."""
    settings = make_settings({**given, "epochs": 3, "method": "dapt"})
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(train(settings, tmp_path / str(threads)))
            again = train(settings, tmp_path / f"{threads} again")
            assert results(again) == results(found[-1])
    finally:
        torch.set_num_threads(before)
    one, two = (load_file(run.prompts_file) for run in found)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    one, two = (run.read_metrics().test for run in found)
    assert abs(one.accuracy - two.accuracy) <= 1 / one.images


@pytest.mark.parametrize(
    ("entry", "value", "told"),
    [
        ("threads", 1000, "threads was 1000, is"),
        ("cpu", "an abacus (DEFAULT)", "cpu was an abacus"),
        ("versions", {"torch": "0.1"}, "torch was 0.1, is"),
        ("commit", "another", None),
    ],
)
def test_a_resume_elsewhere_is_told(given, tmp_path, entry, value, told, capsys):
    from dapt.progress import RichReporter

    run = unfinished({**given, "method": "zero-shot"}, tmp_path / "run")
    environment = json.loads(run.environment_file.read_text())
    assert entry in environment
    run.environment_file.write_text(json.dumps({**environment, entry: value}))
    settings = run.read_settings()
    train(settings, run.path, resume=True, reporter=RichReporter())
    said = capsys.readouterr().err
    assert told in said if told else "last bits" not in said


# With a checkpoint it rests after each step, so that a signal comes before its end.
SCRIPT = """
import json, sys, time
from dapt.engine.step import Tuner
from dapt.run.directory import RunDirectory
from dapt.run.train import train
from dapt.settings import make_settings
step, run = Tuner.step, RunDirectory(sys.argv[2])

def slowly(*given):
    time.sleep(3 if run.checkpoint_file.is_file() else 0)
    return step(*given)

Tuner.step = slowly
train(make_settings(json.loads(sys.argv[1])), sys.argv[2], resume=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_bits(given, tmp_path, number):
    given = {**given, "epochs": 30, "visual_dropout": 0.2}
    undisturbed = train(make_settings(given), tmp_path / "undisturbed")
    run = RunDirectory(tmp_path / "killed")
    command = [sys.executable, "-c", SCRIPT, json.dumps(given), str(run.path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until(lambda: run.checkpoint_file.is_file() or process.poll() is not None)
    os.kill(process.pid, number)
    assert process.wait(LONG) != 0
    assert run.exists
    assert not run.finished
    _, step, _ = run.read_checkpoint()
    assert 0 < step < 60
    train(make_settings(given), run.path, resume=True)
    assert results(run) == results(undisturbed)


def test_resume_of_a_finished_run_changes_nothing(given, tmp_path):
    run = train(make_settings(given), tmp_path / "run")
    before = results(run)
    train(make_settings(given), run.path, resume=True)
    assert results(run) == before


def test_a_run_is_never_mixed_with_another(given, tmp_path):
    settings = make_settings(given)
    run = train(settings, tmp_path / "run")
    with pytest.raises(UserError, match="holds a finished run; add `overwrite`"):
        train(settings, run.path)
    run.metrics_file.unlink()
    with pytest.raises(UserError, match="holds an unfinished run; add `resume`"):
        train(settings, run.path)
    with pytest.raises(UserError, match=r"cannot resume .* with lr=0.5: .* lr=0.02"):
        train(settings.model_copy(update={"lr": 0.5}), run.path, resume=True)
    train(settings.model_copy(update={"lr": 0.5}), run.path, overwrite=True)
    assert run.read_settings().lr == 0.5


def test_nothing_but_a_run_is_discarded(given, tmp_path):
    """Files of others may have a run's names, and a folder may be where a run has a file."""
    settings = make_settings({**given, "method": "zero-shot"})
    (mine := tmp_path / "project").mkdir()
    for name in ("log.csv", "eval-2024.json"):
        (mine / name).write_text("years of work")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"log\.csv is there, and .* holds no run"):
            train(settings, mine, resume=resume)
    assert sorted(file.name for file in mine.iterdir()) == ["eval-2024.json", "log.csv"]
    (mine / "notes.txt").write_text("mine")
    train(settings, mine, overwrite=True)
    assert (mine / "notes.txt").exists()
    assert not (mine / "log.csv").exists()

    (mine / "eval-old.json").mkdir()
    with pytest.raises(UserError, match=r"eval-old\.json is a folder"):
        train(settings, mine, overwrite=True)
    assert RunDirectory(mine).finished


def test_a_link_gives_no_permissions(tmp_path):
    (tmp_path / "odd").write_text("{}")
    (tmp_path / "odd").chmod(0o777)
    (tmp_path / "metrics.json").symlink_to(tmp_path / "odd")
    write_atomic(tmp_path / "metrics.json", "{}")
    assert not (tmp_path / "metrics.json").is_symlink()
    assert not (tmp_path / "metrics.json").stat().st_mode & 0o022


def test_resume_and_overwrite_exclude_each_other(given, tmp_path):
    with pytest.raises(UserError, match="give one of them"):
        train(make_settings(given), tmp_path / "run", resume=True, overwrite=True)


def unfinished(given, path):
    run = train(make_settings(given), path)
    run.metrics_file.unlink()
    return run


def test_resume_wants_the_same_data(given, tmp_path, photo_folder):
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    given = {**given, "dataset": str(photos)}
    run = unfinished(given, tmp_path / "run")
    (photos / "train" / "blue" / "0.png").rename(photos / "train" / "blue" / "new.png")
    with pytest.raises(UserError, match="the support set of 'photos' differ"):
        train(make_settings(given), run.path, resume=True)
    (photos / "train" / "blue" / "new.png").rename(photos / "train" / "blue" / "0.png")
    names = tmp_path / "names.json"
    names.write_text('{"blue": "sky"}')
    task = run.path / "task.json"
    task.write_text(task.read_text().replace("blue", "sky"))
    with pytest.raises(UserError, match="the classes, template or source of 'photos' differ"):
        train(make_settings(given), run.path, resume=True)


def test_resume_wants_the_same_weights(given, tmp_path, tiny_weights):
    weights = tmp_path / "weights.safetensors"
    state = load_file(tiny_weights)
    save_file(state, weights)
    given = {**given, "backbone": str(weights)}
    run = unfinished(given, tmp_path / "run")
    state["logit_scale"] += 0.1
    save_file(state, weights)
    with pytest.raises(UserError, match="are not those that"):
        train(make_settings(given), run.path, resume=True)


# Begins runs anew, each in a fork that is gone, with no clean-up, when it comes to write a file.
KILLED_AT = """
import json, os, sys
from pathlib import Path
from dapt.run import directory
from dapt.settings import make_settings
from dapt.run.train import train

settings, *files = sys.argv[1:]
write = directory.write_atomic
for file in files:
    directory.write_atomic = lambda p, text: os._exit(9) if str(p) == file else write(p, text)
    if not (child := os.fork()):
        train(make_settings(json.loads(settings)), Path(file).parent, overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, file
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_while_overwriting_leaves_no_mix(given, tmp_path):
    """Stopped at any file, the directory holds either no run or the whole new one."""
    first = train(make_settings(given), tmp_path / "first")
    names = ("task_file", "support_file", "environment_file", "settings_file")
    runs = {name: RunDirectory(shutil.copytree(first.path, tmp_path / name)) for name in names}
    new = {**given, "method": "coop", "lr": 0.7}
    files = [str(getattr(run, name)) for name, run in runs.items()]
    command = [sys.executable, "-c", KILLED_AT, json.dumps(new), *files]
    subprocess.run(command, timeout=LONG, check=True)
    new = make_settings(new)
    for run in runs.values():
        assert not run.exists
        assert not run.finished
        assert not run.prompts_file.exists()
        train(new, run.path)
        assert run.read_settings() == new


def test_a_finished_run_has_everything(given, tmp_path, monkeypatch):
    """The metrics, which say so, come last."""
    run = RunDirectory(tmp_path / "run")
    found = {}

    def finish(self, metrics):
        found.update(json.loads(self.environment_file.read_text()))
        assert self.prompts_file.is_file()

    monkeypatch.setattr(RunDirectory, "finish", finish)
    train(make_settings(given), run.path)
    assert found["tuning_seconds"] > 0
    assert found["evaluation_seconds"] > 0


def test_the_last_step_may_diverge_too(given, tmp_path):
    run = RunDirectory(tmp_path / "run")
    settings = make_settings({**given, "lr": 1e30, "epochs": 2, "batch_size": 12})
    with pytest.raises(UserError, match=r"features are no longer finite at step 1 .*smaller lr"):
        train(settings, run.path)  # the prompts are, and no step after them would tell
    assert not run.prompts_file.exists()
    assert not run.finished
    state, step, _ = run.read_checkpoint()
    assert step == 1
    assert max(t.abs().max() for t in state.values()) < 1e3


@pytest.mark.parametrize("change", [{"beta_text": 1e30}, {"weight_decay": 1e30}])
def test_what_diverges_before_the_learning_rate_is_due_is_not_blamed_on_it(given, tmp_path, change):
    with pytest.raises(UserError, match=r"at step [0-3] .*loss weights .*weight_decay") as caught:
        train(make_settings({**given, **change}), tmp_path / "run")
    assert "smaller lr" not in str(caught.value)
    assert not (tmp_path / "run" / "prompts.safetensors").exists()


def test_no_figure_that_is_none_is_recorded(tmp_path):
    from dapt.safe.files import write_json

    with pytest.raises(UserError, match=r"metrics\.json is not written: a figure in it"):
        write_json(tmp_path / "metrics.json", {"ece": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_saved_support_set_says_its_shots(given, tmp_path):
    task = task_of(make_settings(given))
    file = tmp_path / "set.json"
    draw_support_set(task, 2, seed=3).save(file)
    with pytest.raises(UserError, match="was drawn with 2 shots; give `shots` 2"):
        train(make_settings({**given, "support_set": str(file)}), tmp_path / "run")


def test_a_directory_in_use_is_refused(given, tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.locked(), pytest.raises(UserError, match="in use by another process"):
        train(make_settings(given), run.path)


def test_divergence_names_the_step(given, tmp_path):
    """As log.csv counts them."""
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(UserError, match=r"loss became nan at step (\d+) of log.csv") as caught:
        train(make_settings({**given, "lr": 1e30, "epochs": 20}), run.path)
    with run.log_file.open() as file:
        last = list(csv.DictReader(file))[-1]
    assert last["loss"] == "nan"
    assert f"at step {last['step']} " in str(caught.value)
    assert f"learning rate {float(last['lr']):g} " in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_a_checkpoint(given, tmp_path, monkeypatch, number):
    """The one before it is whole, and the run goes on from it to the same bits."""
    settings = make_settings(given)
    undisturbed = train(settings, tmp_path / "undisturbed")
    run, kept, write = RunDirectory(tmp_path / "run"), [], RunDirectory.write_checkpoint

    def fail(_handle):
        raise OSError(number, os.strerror(number))

    def write_or_fail(self, state, step, seconds):
        with monkeypatch.context() as patch:
            if step == 6:
                kept.append(self.checkpoint_file.read_bytes())
                patch.setattr("dapt.safe.files.os.fsync", fail)
            write(self, state, step, seconds)

    monkeypatch.setattr(RunDirectory, "write_checkpoint", write_or_fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        train(settings, run.path)
    monkeypatch.undo()
    assert [run.checkpoint_file.read_bytes()] == kept
    assert run.read_checkpoint()[1] == 4
    assert not list(run.path.glob("*.dapt-part"))
    assert not list(run.path.glob(".*.dapt-part"))
    train(settings, run.path, resume=True)
    assert results(run) == results(undisturbed)


@pytest.fixture
def read_only():
    """A folder that this process may look at and not write to."""
    if not hasattr(os, "geteuid"):
        pytest.skip("needs POSIX permissions")
    folder, root = Path(tempfile.mkdtemp()), os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written_to(read_only):
    with (
        pytest.raises(UserError, match=r"run cannot be made \(Permission denied\)"),
        RunDirectory(read_only / "run").locked(),
    ):
        pass
    with pytest.raises(PermissionError), RunDirectory(read_only).locked():
        pass
    assert list(read_only.iterdir()) == []


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    from dapt.safe.files import write_json

    for mode in (0o600, 0o664):
        file = tmp_path / f"{mode}.json"
        file.touch()
        file.chmod(mode)
        write_json(file, 1)
        assert (file.read_text(), file.stat().st_mode & 0o777) == ("1\n", mode)
    plain, ours = tmp_path / "plain", tmp_path / "new.json"
    plain.touch()
    write_json(ours, 1)
    assert ours.stat().st_mode == plain.stat().st_mode


def test_prompts_only_fit_their_backbone(given, tmp_path, tiny_weights):
    run = train(make_settings(given), tmp_path / "run")
    environment = json.loads(run.environment_file.read_text())
    environment["backbone_sha256"] = "0" * 64
    run.environment_file.write_text(json.dumps(environment))
    with pytest.raises(UserError, match="are not those that"):
        load_classifier(run)


def test_a_new_method_is_a_row_and_a_function(given, tmp_path, monkeypatch):
    """A researcher's own loss term: prompts pulled towards zero."""
    norm = LossTerm("norm", "gamma", lambda step: step.text_features.std())
    monkeypatch.setitem(METHODS, "mine", Method("Mine", (Context,), (norm, INTER)))
    with pytest.raises(UserError, match="loss term 'norm' .* needs a weight"):
        make_settings({**given, "method": "mine"})
    settings = make_settings({**given, "method": "mine", "loss_weights": {"gamma": 0.5}})
    run = train(settings, tmp_path / "run")
    with run.log_file.open() as file:
        row = next(csv.DictReader(file))
    total = float(row["cross_entropy"]) + 0.5 * float(row["norm"])
    total += settings.beta_text * float(row["inter"])
    assert float(row["loss"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("images", "steps"), [(3, 1), (32, 1), (63, 1), (64, 2)])
def test_the_last_incomplete_batch_is_dropped(images, steps):
    assert steps_per_epoch(images, 32) == steps
    order = epoch_order(images, 32, seed=1, epoch=0)
    assert [len(b) for b in order] == [min(images, 32)] * steps
    flat = [i for b in order for i in b]
    assert len(set(flat)) == len(flat)
    assert order != epoch_order(images, 32, seed=1, epoch=1)


def test_divergence_keeps_the_last_good_checkpoint(given, tmp_path, capsys):
    from dapt.progress import RichReporter

    run = RunDirectory(tmp_path / "run")
    settings = make_settings({**given, "lr": 1e30, "epochs": 30})
    with pytest.raises(
        UserError,
        match=r"at step (\d+) .* \(the checkpoint after 2 steps is kept in .*such as 1e\+29",
    ):
        train(settings, run.path)
    state, step, _ = run.read_checkpoint()
    assert step == 2
    assert all(t.isfinite().all() for t in state.values())
    assert not run.finished
    with pytest.raises(UserError, match="checkpoint after 2 steps"):  # again, to the same end
        train(settings, run.path, resume=True)
    train(settings.model_copy(update={"lr": 0.01}), run.path, overwrite=True)
    assert run.finished
    capsys.readouterr()
    # Finite, but worse and worse.
    high = {**given, "lr": 2000.0, "epochs": 8, "method": "vpt", "shots": 6}
    astray = train(make_settings(high), tmp_path / "astray", reporter=RichReporter())
    assert "cross-entropy rose from" in capsys.readouterr().err.replace("\n", " ")
    rose = astray.read_metrics().rose
    assert rose.last > rose.first > 0
    good = train(make_settings(given), tmp_path / "good", reporter=RichReporter())
    assert "rose" not in capsys.readouterr().err
    assert good.read_metrics().rose is None


def test_support_images_that_are_tested_too_are_told(given, tmp_path, photo_folder, capsys):
    from dapt.progress import RichReporter

    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    given = {**given, "dataset": str(photos), "shots": 50}
    run = train(make_settings(given), tmp_path / "clean", reporter=RichReporter())
    assert json.loads(run.metrics_file.read_text())["also_tested"] == []
    assert "too" not in capsys.readouterr().err
    shutil.copy(photos / "train/blue/1.png", photos / "test/blue/other name.png")
    run = train(make_settings(given), tmp_path / "run", reporter=RichReporter())
    found = json.loads(run.metrics_file.read_text())["also_tested"]
    assert found == [{"support": "train/blue/1.png", "test": "test/blue/other name.png"}]
    assert "1 of 18 support images are test images of 'photos' too" in capsys.readouterr().err


@pytest.mark.parametrize("method", list(METHODS))
def test_few_classes_and_few_images(given, tmp_path, photo_folder, method):
    """One class is refused; classes of one image; a class that is never tested."""
    photos = tmp_path / "one"
    for part in ("train", "test"):
        shutil.copytree(photo_folder / part / "blue", photos / part / "blue")
    settings = make_settings({**given, "dataset": str(photos), "method": method, "epochs": 2})
    with pytest.raises(UserError, match="has one class, 'blue'"):
        train(settings, tmp_path / "a")
    shutil.copytree(photo_folder / "train" / "green thing", photos / "train" / "green thing")
    for name in ("blue", "green thing"):
        for i in range(1, 6):
            (photos / "train" / name / f"{i}.png").unlink()
    metrics = json.loads(train(settings, tmp_path / "b").metrics_file.read_text())
    assert metrics["support_images"] == 2
    assert metrics["test"]["per_class"][1] == {
        "class": "green thing",
        "images": 0,
        "accuracy": None,
    }


def test_two_classes_of_one_name_are_refused(given, tmp_path, photo_folder):
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    for part in ("train", "test"):
        shutil.copytree(photos / part / "red_thing", photos / part / "Red thing")
    with pytest.raises(UserError, match="have the same name to a text prompt"):
        train(make_settings({**given, "dataset": str(photos)}), tmp_path / "run")
