"""What ships with the package: sizes, licences, zero-shot transfer, and the demo end to end."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dapt
from dapt.cli import app
from dapt.compare import COMPARED
from dapt.data import bundled_domains, open_task

ASSETS = Path(dapt.__file__).parent / "assets"


def size(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_what_ships_is_small_and_licensed():
    assert size(ASSETS / "backbone") < 20e6
    assert size(ASSETS / "task") < 15e6
    licences = (ASSETS / "LICENSES.md").read_text()
    for domain in bundled_domains():
        assert f"`{domain}`" in licences


def test_styles_share_classes_but_no_images():
    source, *targets = (open_task("bundled", domain=d) for d in bundled_domains())
    assert 20 <= len(source.class_names) <= 40
    assert len(targets) >= 2
    paths = [i.path for t in (source, *targets) for i in (*t.train, *t.val, *t.test)]
    assert len(set(paths)) == len(paths)
    for target in targets:
        assert target.class_names == source.class_names
        assert not target.train
        assert len(target.test) > 100


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    result = CliRunner().invoke(app, ["demo", "-o", str(folder), "--epochs", "1"])
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_demo(demo):
    folder, output = demo
    for title in ("Zero-shot CLIP", "Linear probe", "CoOp", "VPT", "VLPT", "DAPT"):
        assert title in output
    assert (folder / "demo.png").stat().st_size > 20_000
    accuracy = {
        m: json.loads((folder / m / "metrics.json").read_text())["test"]["accuracy"]
        for m in COMPARED
    }
    chance = 1 / len(open_task("bundled").class_names)
    assert accuracy["zero-shot"] > 10 * chance
    assert accuracy["linear-probe"] > accuracy["zero-shot"]


def test_demo_keeps_what_is_there(demo):
    folder, _ = demo
    before = (folder / "dapt" / "log.csv").stat().st_mtime_ns
    arguments = ["demo", "-o", str(folder), "--epochs"]
    assert CliRunner().invoke(app, [*arguments, "1"]).exit_code == 0
    assert (folder / "dapt" / "log.csv").stat().st_mtime_ns == before
    other = CliRunner().invoke(app, [*arguments, "2"])
    assert other.exit_code == 2
    assert "it was started with epochs=1" in other.stderr


def test_other_styles_can_be_evaluated(demo):
    folder, _ = demo
    domain = bundled_domains()[1]
    result = CliRunner().invoke(app, ["eval", str(folder / "zero-shot"), "--domain", domain])
    assert result.exit_code == 0, result.output
    saved = json.loads((folder / "zero-shot" / f"eval-bundled-{domain}.json").read_text())
    assert saved["test"]["images"] == len(open_task("bundled", domain=domain).test)
