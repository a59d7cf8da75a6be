"""`dapt compare`: methods on one support set, side by side."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from dapt.cli import app


def dapt(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def options(photo_folder, tiny_weights):
    return [photo_folder, "-b", tiny_weights, "--device", "cpu", "--shots", 4, "--epochs", 1]


@pytest.fixture(scope="module")
def compared(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "out"
    methods = ["--methods", "zero-shot,linear-probe,coop"]
    result = dapt("compare", *options, "-o", folder, *methods)
    assert result.exit_code == 0, result.output
    return folder, methods, result.output


def accuracy(folder, method):
    return json.loads((folder / method / "metrics.json").read_text())["test"]["accuracy"]


def test_a_table_a_picture_and_a_sentence(compared):
    folder, _, output = compared
    for title, method in (("Zero-shot CLIP", "zero-shot"), ("Linear probe", "linear-probe")):
        (row,) = (line for line in output.splitlines() if f"│ {title}" in line)
        assert f"{accuracy(folder, method):.1%}" in row
    best = max(accuracy(folder, m) for m in ("zero-shot", "linear-probe", "coop"))
    assert f"{best:.1%} accuracy on 12 test images" in output
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_those_of_train(compared, options, tmp_path):
    """Each method with its own defaults, as if it had been trained alone."""
    folder, *_ = compared
    dapt("train", *options, "-m", "coop", "-o", tmp_path / "coop")
    name = "prompts.safetensors"
    assert (folder / "coop" / name).read_bytes() == (tmp_path / "coop" / name).read_bytes()


def test_a_test_image_that_cannot_be_read_is_skipped_in_the_picture_too(photo_folder, tiny_weights,
                                                                        tmp_path):  # fmt: skip
    photos = shutil.copytree(photo_folder, tmp_path / "photos")
    next((photos / "test" / "blue").iterdir()).write_text("no image")
    options = ["-b", tiny_weights, "--device", "cpu", "--methods", "zero-shot,linear-probe"]
    result = dapt("compare", photos, *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "1 of 12 test images cannot be read and are skipped" in result.stderr
    assert (tmp_path / "out" / "comparison.png").is_file()


def test_the_same_command_keeps_what_is_done_and_goes_on(compared, options):
    folder, methods, _ = compared
    log = (folder / "coop" / "log.csv").stat().st_mtime_ns
    (folder / "linear-probe" / "metrics.json").unlink()
    before = accuracy(folder, "coop")
    result = dapt("compare", *options, "-o", folder, *methods)
    assert result.exit_code == 0, result.output
    assert (folder / "coop" / "log.csv").stat().st_mtime_ns == log
    assert (accuracy(folder, "coop"), accuracy(folder, "linear-probe") > 0) == (before, True)
    other = dapt("compare", *options, "--shots", 2, "-o", folder, *methods)
    assert other.exit_code == 2
    assert "it was started with shots=4" in other.stderr


def test_what_the_images_do_not_suit_is_left_out_unless_asked_for(tiny_weights, tmp_path,
                                                                  photo_folder):  # fmt: skip
    table = photo_folder / "several.csv"
    lines = [f"train/blue/{i}.png,blue|sky,train" for i in range(1, 5)]
    lines += [f"train/green thing/{i}.png,grass,train" for i in range(1, 5)]
    lines += ["test/blue/1.png,blue|sky,test", "test/green thing/1.png,grass,test"]
    table.write_text("\n".join(["path,label,split", *lines]))
    options = [table, "-b", tiny_weights, "--device", "cpu", "--shots", 4]
    result = dapt("compare", *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "CoOp is left out: images of" in result.stderr
    assert "Automatic" in result.stdout
    asked = dapt("compare", *options, "-o", tmp_path / "asked", "--methods", "auto,coop")
    assert asked.exit_code == 2
    assert "have several labels" in asked.stderr
    unknown = dapt("compare", *options, "-o", tmp_path / "none", "--methods", "auto,coup")
    assert unknown.exit_code == 2
    assert not (tmp_path / "none").exists()
