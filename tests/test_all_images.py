"""Tuning on every image, and what is said of how many there are and how well that does."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dapt.cli import app
from dapt.engine.data import found_in, most_images, open_data
from dapt.errors import UserError
from dapt.report import write_report
from dapt.run.directory import RunDirectory
from dapt.run.train import train
from dapt.settings import make_settings
from dapt.share.card import model_card


def unsplit(folder, counts):
    """A folder of classes with so many images each, of a colour of their own."""
    generator = np.random.default_rng(1)
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(generator.normal(60 + 70 * place, 40, (24, 24, 3)), 0, 255)
            Image.fromarray(pixels.astype("uint8")).save(folder / name / f"{i}.png")
    return folder


def test_all_images_are_tuned_on_and_the_forecast_is_the_figure(tiny_weights, tmp_path):
    photos, run = unsplit(tmp_path / "photos", {"grey": 5, "white": 3}), tmp_path / "run"
    command = ["train", str(photos), "--all", "-b", str(tiny_weights), "-o", str(run)]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    assert made.output.startswith("2 classes; all 3 to 5 images each to tune on, none to test")
    assert "there is no test accuracy" in made.output
    assert "expected on new photos like these" in made.output
    metrics = RunDirectory(run).read_metrics()
    assert (metrics.test, metrics.shots, metrics.support_images) == (None, 5, 8)
    assert metrics.forecast.images == 8
    refused = CliRunner().invoke(app, ["eval", str(run)])
    assert refused.exit_code == 2
    assert "no image of 'photos' was held out" in refused.stderr
    elsewhere = CliRunner().invoke(app, ["eval", str(run), "--dataset", str(photos), "--json"])
    assert json.loads(elsewhere.stdout)["images"] == 8
    assert "are test images of 'photos' too" in elsewhere.stderr
    again = CliRunner().invoke(app, ["train", "-o", str(run), "--resume", "--all"])
    assert again.exit_code == 0, again.output


def test_a_method_that_holds_nothing_out_says_that_nothing_is_known(tiny_weights, tmp_path):
    photos = unsplit(tmp_path / "photos", {"grey": 3, "white": 3})
    command = ["train", str(photos), "--all", "-m", "zero-shot", "-b", str(tiny_weights)]
    made = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "run")])
    assert made.exit_code == 0, made.output
    assert "how well it does is not known" in made.output
    clash = CliRunner().invoke(app, [*command, "--shots", "2", "-o", str(tmp_path / "other")])
    assert clash.exit_code == 2
    assert "--all tunes on every image, and shots asks for fewer" in clash.stderr


def test_of_split_data_all_train_and_val_images_are_tuned_on(photo_folder, tmp_path):
    root = shutil.copytree(photo_folder, tmp_path / "photos")
    rows = [
        (path.relative_to(root), path.parent.name, path.parent.parent.name)
        for path in sorted(root.rglob("*.png"))
    ]
    lines = [f"{p},{c},{'val' if p.name == '5.png' else part}" for p, c, part in rows]
    table = root / "split.csv"
    table.write_text("path,label,split\n" + "\n".join(lines))
    settings = make_settings({"dataset": str(table), "test_fraction": 0})
    assert most_images(settings) == 6
    data = open_data(settings)
    assert (len(data.support.train), len(data.support.val), len(data.task.test)) == (18, 0, 12)
    told = found_in(data, settings)
    assert told.startswith("3 classes; 6 of 10 images each to tune on, 12 to test (")
    fewer = make_settings({"dataset": str(table), "shots": 2})
    told = found_in(open_data(fewer), fewer)
    assert "2 of 10 images each to tune on, 3 for validation, 12 to test, the rest unused" in told
    assert "test_fraction" not in told


def test_the_share_to_test_on_is_a_setting(tmp_path):
    photos = unsplit(tmp_path / "photos", {"grey": 10, "white": 10})
    settings = make_settings({"dataset": str(photos), "test_fraction": 0.2})
    assert len(open_data(settings).task.test) == 4
    assert "--set test_fraction" in found_in(open_data(settings), settings)
    with pytest.raises(UserError, match="test_fraction=1"):
        make_settings({"dataset": str(photos), "test_fraction": 1})


def test_the_forecast_is_shown_wherever_a_run_is(tiny_weights, tmp_path):
    photos, run = unsplit(tmp_path / "photos", {"grey": 5, "white": 3}), tmp_path / "run"
    given = {"dataset": str(photos), "backbone": str(tiny_weights), "method": "auto"}
    train(make_settings({**given, "shots": 5, "test_fraction": 0}), run)
    told = RunDirectory(run).read_metrics().forecast
    between = f"{100 * told.low:.0f} to {100 * told.high:.0f} %"
    card = model_card(RunDirectory(run))
    assert "No image was held out to test on." in card
    assert f"{100 * told.accuracy:.0f} % right, most likely {between}" in card
    page = tmp_path / "report.html"
    made = write_report([run], page)
    assert made.warnings == ()
    text = page.read_text()
    assert f"({100 * told.low:.1f}–{100 * told.high:.1f})" in text
    assert told.advice in text
    assert "it is no test accuracy" in text
    overview = (made.folder / "overview.csv").read_text().splitlines()
    row = dict(zip(overview[0].split(","), overview[1].split(","), strict=True))
    assert float(row["expected (%)"]) == pytest.approx(100 * told.accuracy)
    assert "accuracy (%)" not in row
    # With test images, the two stand side by side.
    train(make_settings({**given, "shots": 2}), tmp_path / "half")
    write_report([run, tmp_path / "half"], page)
    assert "it is no test accuracy" in page.read_text()
    files = write_report([tmp_path / "half"], page).folder
    head = (files / "overview.csv").read_text().splitlines()[0]
    assert head.startswith("method,accuracy (%),expected (%),from (%),to (%)")


def test_settings_for_few_images_go_by_how_many_there_are(tiny_weights, tmp_path):
    photos, runs = unsplit(tmp_path / "photos", {"grey": 4, "white": 2}), tmp_path / "runs"
    command = ["train", str(photos), "-b", str(tiny_weights), "-m", "coop", "--epochs", "1"]
    for name, options in {
        "asked": ["--shots", "2"],
        "unasked": [],
        "more": ["--shots", "9"],
    }.items():
        made = CliRunner().invoke(app, [*command, *options, "-o", str(runs / name)])
        assert made.exit_code == 0, made.output
    asked, unasked, more = (RunDirectory(runs / n) for n in ("asked", "unasked", "more"))
    assert asked.read_settings() == unasked.read_settings() == more.read_settings()
    assert asked.read_settings().shots == 2
    assert asked.read_metrics().test == unasked.read_metrics().test
    again = CliRunner().invoke(app, [*command, "--shots", "9", "-o", str(more.path), "--resume"])
    assert again.exit_code == 0, again.output
