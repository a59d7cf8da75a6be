"""The command as a user types it: results, help, one-sentence errors with exit code 2."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import LONG
from PIL import Image
from typer.testing import CliRunner

from conftest import REPOSITORY
from dapt.cli import app
from dapt.cli.usage import as_options
from dapt.data import open_task
from dapt.settings import all_fields

runner = CliRunner()


def dapt(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def options(photo_folder, tiny_weights):
    return [
        photo_folder, "--backbone", tiny_weights, "--device", "cpu", "--method", "dapt",
        "--shots", 4, "--epochs", 2, "--lr", 0.1, "--set", "text_vectors=4",
        "--set", "visual-vectors=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "run"
    result = dapt("train", *options, "--output", path)
    assert result.exit_code == 0, result.output
    assert "top-1" in result.output
    assert "inter-dispersion" in result.output
    return path


def fails(sentence, *arguments):
    result = dapt(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    said = " ".join(result.stderr.split())
    assert sentence in said, said
    return said


def test_train_says_whether_it_was_worth_it(options, tmp_path, monkeypatch):
    zero = dapt("train", *options, "--method", "zero-shot", "-o", tmp_path / "zero", "--lr", "3")
    assert "learns nothing" not in zero.output
    assert "zero-shot does not use epochs, lr, " in zero.stderr
    value = json.loads((tmp_path / "zero" / "metrics.json").read_text())["test"]["accuracy"]
    tuned = dapt("train", *options, "-o", tmp_path / "tuned")
    assert f"zero-shot, which learns nothing: {100 * value:.1f} % on the same" in tuned.output
    monkeypatch.setattr("dapt.engine.evaluate.evaluate_zero_shot", lambda *_: {"accuracy": 1.1})
    far = dapt("train", *options, "-o", tmp_path / "far")
    assert "dapt is " in far.output
    assert "points below zero-shot with 4 images a class; use --method auto" in far.output
    monkeypatch.setattr("dapt.cli.train.FAR_BELOW", 200)
    worse = dapt("train", *options, "-o", tmp_path / "worse")
    assert "tuning made it worse; take more images with --shots" in worse.output
    assert "try --tune-settings or --method auto" in worse.output
    worse = dapt("train", *options, "--shots", 1, "-o", tmp_path / "one")  # none to hold out
    assert "try --method auto" in worse.output
    monkeypatch.setattr("dapt.engine.evaluate.evaluate_zero_shot", lambda *_: {"accuracy": 0.0})
    assert "worse" not in dapt("train", *options, "-o", tmp_path / "better").output


def test_predict(run, photo_folder):
    images = sorted((photo_folder / "test").rglob("*.png"))
    result = dapt("predict", run, photo_folder / "test", "--top", 2, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["path"] for r in rows] == [str(p) for p in images]
    for row in rows:
        assert [set(c) for c in row["classes"]] == [{"class", "probability"}] * 2
        assert row["classes"][0]["probability"] >= row["classes"][1]["probability"]
    text = dapt("predict", run, images[0]).stdout
    assert text.startswith(f"{images[0]}: ")


def test_predictions_add_up_to_the_metrics(run, photo_folder):
    rows = dapt("predict", run, photo_folder / "test", "--json").stdout.splitlines()
    found = [json.loads(r) for r in rows]
    right = [Path(r["path"]).parent.name == r["classes"][0]["class"] for r in found]
    metrics = json.loads((run / "metrics.json").read_text())
    assert sum(right) / len(right) == metrics["test"]["accuracy"]


def test_eval_leaves_out_what_became_a_test_image_when_photos_were_added(photo_folder, tiny_weights,
                                                                         tmp_path):  # fmt: skip
    photos, run = shutil.copytree(photo_folder / "train", tmp_path / "photos"), tmp_path / "run"
    options = ["-b", tiny_weights, "--device", "cpu", "-m", "linear-probe"]
    assert dapt("train", photos, *options, "-o", run).exit_code == 0
    same = dapt("eval", run, "--json")
    assert "left out" not in same.stderr
    for source in (photo_folder / "test").rglob("*.png"):  # the same names, in other order
        shutil.copy(source, photos / source.parent.name / f"0-{source.name}")
    result = dapt("eval", run, "--json")
    assert result.exit_code == 0, result.output
    left_out, of = map(
        int, re.search(r"(\d+) of (\d+) test images are left", result.stderr).groups()
    )
    assert json.loads(result.stdout)["images"] == of - left_out
    seen = {i["path"] for i in json.loads((run / "support_set.json").read_text())["train"]}
    assert seen & {i.path for i in open_task(photos).test}
    assert left_out == len(seen & {i.path for i in open_task(photos).test})
    page = tmp_path / "report.html"
    assert dapt("report", run, "--features", "-o", page).exit_code == 0
    assert f"{left_out} of {of} test images are left out" in page.read_text()


def test_eval(run, tmp_path, photo_folder):
    own = json.loads(dapt("eval", run, "--json").stdout)
    assert own == json.loads((run / "metrics.json").read_text())["test"]
    # Other classes, and nothing to tune on: test images alone are enough.
    sky = "path,label,split\ntest/blue/1.png,sky,test\n"
    (photo_folder / "other.csv").write_text(sky + "test/green thing/1.png,grass,test\n")
    other = dapt("eval", run, "--dataset", photo_folder / "other.csv", "--json")
    assert json.loads(other.stdout)["images"] == 2
    assert json.loads((run / "eval-other.json").read_text())["test"]["images"] == 2
    (photo_folder / "one.csv").write_text(sky)  # whatever is said of it would be right
    fails("has one class, 'sky'", "eval", run, "--dataset", photo_folder / "one.csv")
    whole = dapt("eval", run, "--dataset", photo_folder / "test", "--json")
    assert json.loads(whole.stdout)["images"] == 12  # an unsplit tree is taken whole
    fails("none does not exist", "eval", run, "--dataset", "dtd", "--root", tmp_path / "none")


def test_support_set_round_trip(options, photo_folder, tmp_path):
    file = tmp_path / "set.json"
    printed = dapt("data", "support-set", photo_folder, "--shots", 2, "--save", file, "--json")
    value = json.loads(printed.stdout)
    assert value == json.loads(file.read_text())
    assert len(value["train"]) == 6
    run = tmp_path / "run"
    fails("was drawn with 2 shots", "train", *options, "-o", run, "--support-set", file)
    unsaid = [o for o in options if o not in ("--shots", 4)]
    assert dapt("train", *unsaid, "-o", run, "--support-set", file).exit_code == 0
    assert json.loads((run / "metrics.json").read_text())["shots"] == 2
    assert json.loads((run / "support_set.json").read_text())["train"] == value["train"]


def test_config_file_and_overrides(photo_folder, tiny_weights, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"dataset: {photo_folder}\nbackbone: {tiny_weights}\nmethod: coop\nepochs: 9\nshots: 2\n"
        "text_vectors: 2\n"
    )
    run = tmp_path / "run"
    result = dapt("train", "--config", config, "--epochs", 1, "--set", "lr=0.5", "-o", run)
    assert result.exit_code == 0, result.output
    settings = json.loads((run / "settings.json").read_text())
    assert (settings["method"], settings["epochs"], settings["lr"]) == ("coop", 1, 0.5)


def test_resume_needs_only_the_directory(options, run):
    (run / "metrics.json").rename(run / "kept.json")
    (run / "prompts.safetensors").unlink()
    result = dapt("train", "-o", run, "--resume")
    assert result.exit_code == 0, result.output
    assert (run / "metrics.json").read_bytes() == (run / "kept.json").read_bytes()


def test_tune_settings_searches_on_held_out_support_images(options, tmp_path):
    options = [o for o in options if o not in ("--lr", 0.1)]
    result = dapt("train", *options, "-o", tmp_path / "run", "--tune-settings")
    assert result.exit_code == 0, result.output
    assert "chosen: lr" in result.output
    assert "held-out images" in result.output


def draw(dataset):
    """Train items of the support set."""
    printed = dapt("data", "support-set", dataset, "--json")
    return json.loads(printed.stdout)["train"]


def test_names_are_no_markup_and_steer_no_terminal(photo_folder, tiny_weights, tmp_path):
    """Names of folders, classes and files are printed as they stand, or escaped."""
    photos = tmp_path / "new[" / "photos][old]"
    shutil.copytree(photo_folder, photos)
    next(photos.rglob("*.png")).with_name("a\x1b]0;owned\x07\nb.txt").write_text("no image")
    checked = dapt("data", "check", photos)
    assert "photos][old]" in checked.output
    run = tmp_path / "run[" / "b]"
    options = ["-b", tiny_weights, "--device", "cpu", "-m", "zero-shot", "-o", run]
    trained = dapt("train", photos, *options)
    assert trained.exit_code == 0, trained.output
    assert "left out: " in trained.stderr
    assert "\x1b]0;" not in trained.output
    assert dapt("eval", run).exit_code == 0


def test_class_names_that_the_terminal_has_no_letters_for(photo_folder, tiny_weights, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    for folder in list(photos.glob("*/blue")):
        folder.rename(folder.with_name("blå 猫"))
    run = tmp_path / "run"
    dapt("train", photos, "-b", tiny_weights, "--device", "cpu", "-m", "zero-shot", "-o", run)
    made = subprocess.run(
        [sys.executable, "-m", "dapt.cli", "predict", run, next(photos.rglob("*.png")), "--top=3"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True, timeout=LONG,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "blå \\u732b".encode("latin-1") in made.stdout


def test_what_a_weights_file_does_not_tell_is_told(options, tmp_path):
    told = dapt("train", *options, "--method", "zero-shot", "-o", tmp_path / "run")
    assert "taken for one of OpenAI's models" in " ".join(told.stderr.split())
    asked = ("bundled", "--method", "zero-shot", "--tune-settings", "-o", tmp_path / "bundled")
    told = dapt("train", *asked)
    assert "taken for" not in told.stderr
    assert "zero-shot has no learning rate to search for" in told.stderr


def test_an_unreadable_test_image_costs_no_tuning(options, tmp_path, photo_folder):
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    bad = photos / "test" / "blue" / "2.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:200])
    new = tmp_path / "new"
    said = fails("2.png cannot be read", "train", photos, *options[1:], "-o", new, "--strict")
    assert "--resume" in said
    bad.write_bytes(good)
    assert dapt("train", "-o", new, "--resume").exit_code == 0


def test_wrong_input_is_one_sentence(options, run, tmp_path, photo_folder):
    new = tmp_path / "new"
    fails("add --output", "train", *options)
    fails("no dataset", "train", "-o", new)
    fails("unknown dataset 'bundeld' (did you mean 'bundled'?)", "train", "bundeld", "-o", new)
    fails("needs --root", "train", "caltech101", "-o", new)
    fails("unknown setting 'lrr'", "train", *options, "-o", new,
          "--set", "lrr=1")  # fmt: skip
    fails("unknown backbone 'ViT-B-61'", "train", "bundled", "-b", "ViT-B-61", "-o", new)
    fails("holds a finished run", "train", *options, "-o", run)
    fails("is no run directory", "predict", tmp_path, photo_folder)
    fails("does not exist", "predict", run, tmp_path / "none.jpg")
    fails("is no run directory", "eval", tmp_path)
    fails("is too long for a path", "train", *options, "-o", tmp_path / ("x" * 300))
    fails("is too long for a path", "eval", tmp_path / ("x" * 300))
    assert not new.exists()

    bad = tmp_path / "photos"
    for name in ("a", "b"):
        (bad / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (9, 9)).save(bad / name / f"{i}.png")
    arguments = [bad, *options[1:]]
    kept = [Path(i["path"]) for i in draw(bad)]
    (bad / kept[0]).write_bytes(b"not an image")
    assert "cannot be read" in fails(str(kept[0]), "train", *arguments, "-o", new, "--strict")
    assert not new.exists()
    (bad / kept[0]).unlink()
    (bad / "empty").mkdir()
    fails("holds no images", "train", *arguments, "-o", tmp_path / "newer")
    long = bad / ("x y z " * 40)
    (bad / "empty").rename(long)
    for i in range(3):
        Image.new("RGB", (9, 9)).save(long / f"{i}.png")
    fails("longer than the 77 tokens", "train", *arguments, "-o", tmp_path / "newer")


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_of_any_bytes_are_printed(photo_folder, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    odd = photos / "train" / "blue" / os.fsdecode(b"\xff\t.png")
    (photos / "train" / "blue" / "1.png").rename(odd)
    arguments = ["data", "support-set", photos, "--shots", 50]
    printed = dapt(*arguments, "--json")
    assert printed.exit_code == 0, printed.exception
    assert str(odd.relative_to(photos)) in {i["path"] for i in json.loads(printed.stdout)["train"]}
    printed = dapt(*arguments)
    assert printed.exit_code == 0, printed.exception
    assert "train\t0\tblue\ttrain/blue/\\udcff\\t.png\n" in printed.stdout


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"), "a/b: the disk quota is used up"),
        (OSError(errno.EMFILE, "Too many open files"), "dapt: too many open files"),
        (MemoryError(), "not enough memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "dapt: the GPU has not enough memory",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(monkeypatch, tmp_path, error, told):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("dapt.data.open_task", fail)
    fails(told, "data", "support-set", "bundled")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file size are Linux's here")
@pytest.mark.parametrize(("limit", "begun"), [(100, False), (3000, True)])
def test_no_room_on_disk_is_one_sentence(options, tmp_path, limit, begun):
    """A limit on file size stands in for a full disk: the records fit, or the checkpoint does."""
    code = (
        "import resource, signal, sys\n"
        "import dapt.run.train\n"  # some versions of torch write a file when they are imported
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from dapt.cli import main\n"
        "main()\n"
    )
    run = tmp_path / "run"
    arguments = [str(o) for o in ["train", *options, "-o", run]]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=LONG
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "file size limit" in result.stderr
    left = {p.name for p in run.iterdir()}
    if begun:
        assert not left & {"metrics.json", "prompts.safetensors", "checkpoint.safetensors"}
        assert dapt("train", "-o", run, "--resume").exit_code == 0
    else:
        assert left <= {".lock"}


@pytest.mark.parametrize(
    "command",
    ["train", "eval", "predict", "experiment", "demo", "bench", "methods", "settings", "data"],
)
def test_every_command_has_help(command):
    result = dapt(command, "--help")
    assert result.exit_code == 0
    if command in ("train", "eval", "predict", "experiment", "bench"):
        assert "Examples" in result.output


def test_lists():
    assert "DAPT-visual" in dapt("methods").output
    assert "beta_visual" in dapt("settings", "dtd").output
    assert dapt("--version").stdout.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("dapt: 'dapt train' has no option --learning-rate; write --lr", ["--learning-rate", "1"]),
        ("has no option --num-epochs; write --epochs", ["--num-epochs=3"]),
        ("has no option --output_dir; write --output", ["--output_dir", "x"]),
        ("has no option --batch-size; write --set batch_size=VALUE", ["--batch-size", "3"]),
        ("has no option --data-dir; write it without one: dapt train DATASET", ["--data-dir=x"]),
        ("has no option --metod (did you mean '--method'?)", ["--metod", "x"]),
        ("invalid value for '--shots'", ["--shots", "many"]),
    ],
)
def test_a_wrong_option_is_one_sentence_that_names_ours(said, arguments):
    told = dapt("train", *arguments)
    assert told.exit_code == 2
    assert told.output.count("\n") == 1
    assert said in told.output


def test_an_experiment_says_how_it_takes_lists():
    fails("has no option --method; write --methods", "experiment", "few-shot", "--method", "coop")
    fails("has no option --seed; write --seeds", "experiment", "few-shot", "--seed", "1")
    fails("2: a list has commas and no spaces", "experiment", "few-shot", "--seeds", "1", "2")
    assert "unexpected extra" in dapt("methods", "a").output  # which takes no lists


def test_settings_are_shown_of_a_dataset_that_is_there():
    fails("unknown dataset 'caltech-101' (did you mean 'caltech101'?)", "settings", "caltech-101")
    fails("unknown dataset 'lora_rank'", "settings", "lora_rank")


def test_a_wrong_command_names_ours():
    fails("'dapt' has no command 'evaluate' (did you mean 'eval'?)", "evaluate")
    fails("'dapt data' has no command 'lst' (did you mean 'list'?)", "data", "lst")
    said = fails("missing argument ", "predict")  # earlier typer shows it in capitals
    assert "missing argument 'run'; 'dapt predict --help' shows how" in said.lower()


WRONG_PATHS = [
    ("dataset Fotos/cat does not exist (did you mean 'photos/cat'?)", "train", "./Fotos/cat"),
    ("unknown dataset 'fotos' (did you mean 'photos'?)", "compare", "fotos"),
    ("run directory poto does not exist (did you mean 'photos'?)", "predict", "poto", "x.jpg"),
    ("image photos/cat/2.jpg does not exist (did you mean 'photos/cat/1.jpg'?)", "predict",
     "photos", "photos/cat/2.jpg"),
]  # fmt: skip
WITHOUT_TORCH = """
import json, sys
from typer.testing import CliRunner
from dapt.cli import app
said = [CliRunner().invoke(app, words) for _, *words in json.loads(sys.argv[1])]
assert "torch" not in sys.modules
print(json.dumps([[one.exit_code, one.stderr] for one in said]))
"""


def test_a_wrong_path_names_the_near_one_before_torch_is_imported(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "1.jpg").touch()
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(WRONG_PATHS)]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LONG)
    assert made.returncode == 0, made.stderr
    for (sentence, *_), (code, told) in zip(WRONG_PATHS, json.loads(made.stdout), strict=True):
        assert (code, told.count("\n")) == (2, 1)
        assert sentence in told


def test_help_shows_the_defaults_that_settings_have():
    told, fields = dapt("train", "-h").output.split("Options ─")[1], all_fields()
    defaults = {n: fields[n].default for n in ("shots", "seed", "precision", "device")}
    for name, default in {**defaults, "backbone": "by dataset"}.items():
        shown = told.split(f"--{name} ")[1].split("--")[0]
        assert f"[default: ({default})]" in shown


def test_new_shows_and_makes_a_folder_that_train_takes(tmp_path):
    shown = dapt("new", tmp_path / "shown")
    assert "cat/" in shown.output
    assert not (tmp_path / "shown").exists()
    made = dapt("new", tmp_path / "photos", "cat", "red fox")
    assert f"dapt train {tmp_path / 'photos'} -o" in made.output.replace("\n", "")
    assert {p.name for p in (tmp_path / "photos").iterdir()} == {"cat", "red fox"}
    fails("is no name of a folder", "new", tmp_path / "other", "a/b", "c")
    fails("is one class", "new", tmp_path / "other", "cat")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_it_goes_on(options, tmp_path, monkeypatch, number):
    run = tmp_path / "my run"
    # After tuning, where no step is looked after; of this thread, so that it is not late.
    monkeypatch.setattr("dapt.run.train.dispersion", lambda *_: signal.raise_signal(number))
    # What a shell starts in its background ignores Ctrl-C, and so would the tests.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopped = dapt("train", *options, "-o", run)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.exit_code == 130, stopped.output
    way = f"dapt train --output '{run}' --resume"
    assert f"should it be stopped, this goes on: {way}" in stopped.output
    assert f"stopped; go on with: {way}" in stopped.stderr


def test_advice_is_not_what_was_just_done(options, tmp_path, monkeypatch):
    monkeypatch.setattr("dapt.engine.evaluate.evaluate_zero_shot", lambda *_: {"accuracy": 1.1})
    monkeypatch.setattr("dapt.cli.train.FAR_BELOW", 200)
    options = [o for o in options if o not in ("--lr", 0.1)]
    said = dapt("train", *options, "--shots", 2, "--tune-settings", "-o", tmp_path / "two").output
    assert "take more images with --shots (it had 2 a class), try --method auto" in said
    said = dapt("train", *options, "--shots", 16, "-o", tmp_path / "all").output
    assert "give more images a class (it had 6 a class), try --tune-settings" in said


def test_a_name_with_underscores_is_shown_with_spaces_and_kept_in_data(photo_folder, tiny_weights,
                                                                       tmp_path):  # fmt: skip
    photos, run = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photo_folder, photos)
    for folder in list(photos.glob("*/green thing")):
        folder.rename(folder.with_name("green_thing"))
    dapt("train", photos, "-b", tiny_weights, "--device", "cpu", "-m", "zero-shot", "-o", run)
    image = next(photos.rglob("blue/*.png"))
    for form, shown in (("lines", True), ("table", True), ("csv", False), ("json", False)):
        said = dapt("predict", run, image, "--top", 3, "--format", form).stdout
        assert ("green thing" in said, "green_thing" in said) == (shown, not shown)


@pytest.mark.parametrize("room", ["clip", "data", "grid", "report", "run", "share"])
def test_sentences_that_programs_read_name_arguments_and_no_options(room):
    for file in (REPOSITORY / "src" / "dapt" / room).rglob("*.py"):
        lines = [line.partition("  # ")[0] for line in file.read_text().splitlines()]
        options = [line for line in lines if re.search(r"(?<![\w`-])--[a-z]", line)]
        assert not [line for line in options if "dapt " not in line], file  # a command to type


def test_arguments_that_a_sentence_names_are_options_on_the_command_line():
    said = as_options("give `class_names` or `root`, not `x`")
    assert said == "give --class-names or --root, not `x`"
