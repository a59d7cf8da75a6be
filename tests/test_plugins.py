"""Methods of a user's own file: what the page of them says works, and nothing else is executed."""

import json
import re
import sys

import pytest
import torch
import yaml
from test_cli import dapt, fails

from conftest import REPOSITORY
from dapt.errors import UserError
from dapt.grid import Grid, make_plan, read_suite
from dapt.methods import BUILT_IN, METHODS, load_plugins, plugins
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.settings import make_settings

PAGE = (REPOSITORY / "docs" / "how-to" / "plugins.md").read_text()


def block(language):
    return re.search(rf"```{language} [^\n]*\n(.*?)```", PAGE, re.DOTALL)[1]


def forget():
    """As a process that has loaded no plugin."""
    for name in METHODS.keys() - BUILT_IN:
        del METHODS[name]
    plugins._ROWS.clear()
    plugins._FILES.clear()


@pytest.fixture(autouse=True)
def anew():
    yield
    forget()
    for name in [name for name in sys.modules if name.startswith("dapt_plugin")]:
        del sys.modules[name]


@pytest.fixture
def place(tmp_path, photo_folder, monkeypatch):
    """A working directory with what the page's commands name."""
    (tmp_path / "photos").symlink_to(photo_folder)
    (tmp_path / "new").symlink_to(photo_folder / "test" / "blue")
    (tmp_path / "mine.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def given(place, tiny_weights):
    return {"dataset": "photos", "backbone": str(tiny_weights), "device": "cpu", "shots": 2,
            "batch_size": 3, "epochs": 2}  # fmt: skip


@pytest.fixture
def run(place, given):
    """A run of the page's method, in a process that has forgotten it."""
    load_plugins(["mine.py"])
    made = train(make_settings({**given, "method": "nudge", "nudge_start": 0.1}), "runs/nudge")
    plain = train(make_settings({**given, "method": "zero-shot"}), "runs/plain")
    assert "nudge_start" not in json.loads(plain.settings_file.read_text())
    forget()
    return made


def test_the_suite_of_the_page_runs_in_processes_to_the_same_bits(place, tiny_weights):
    settings = {"backbone": str(tiny_weights), "device": "cpu", "batch_size": 3, "epochs": 2}
    suite = yaml.safe_load(block("yaml")) | {"settings": settings}
    (place / "compared.yaml").write_text(yaml.safe_dump(suite))
    found = []
    for workers in (1, 2):
        plan = make_plan(read_suite(place / "compared.yaml"), f"results{workers}")
        grid = Grid(plan, workers=workers, threads=1).run()
        assert (grid.done, grid.failed) == (5, {})
        files = sorted(plan.folder.rglob("prompts.safetensors"))
        found.append([file.read_bytes() for file in files])
    assert len(found[0]) == 5
    assert found[0] == found[1]


def test_a_run_tells_its_plugin_and_does_not_load_it(run, place):
    sentence = "runs/nudge is of method 'nudge' of mine.py, which is not loaded; give --plugin"
    for words in (["predict", "runs/nudge", "new"], ["eval", "runs/nudge"],
                  ["serve", "runs/nudge", "--port", 0], ["suggest", "runs/nudge", "new"],
                  ["export", "runs/nudge", "-o", "nudge.onnx"], ["push", "runs/nudge", "a/b"],
                  ["train", "-o", "runs/nudge", "--resume"]):  # fmt: skip
        fails(sentence, *words)
    assert "nudge" not in METHODS
    assert dapt("report", "runs", "-o", "report.html").exit_code == 0
    assert dapt("eval", "runs/plain").exit_code == 0  # whoever was loaded beside it
    load_plugins(["mine.py"])
    with torch.inference_mode():
        learned = load_classifier(run).tensors()
    assert set(learned) == {"nudge"}


def test_what_is_put_together_with_a_plugin_is_of_it_too(given):
    load_plugins(["mine.py"])
    made = train(make_settings({**given, "method": "nudge+kernel-ridge"}), "runs/both")
    forget()
    with pytest.raises(UserError, match=r"of method 'nudge\+kernel-ridge' of mine\.py"):
        made.read_settings()


def test_a_run_that_goes_on_with_another_version_says_so(run, place):
    run.metrics_file.unlink()
    (place / "mine.py").write_text(block("python") + "\n# otherwise\n")
    again = dapt("train", "-o", "runs/nudge", "--resume", "--plugin", "mine.py")
    assert again.exit_code == 0, again.output
    assert re.search(r"plugin was [0-9a-f]{64}, is [0-9a-f]{64}", " ".join(again.stderr.split()))


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("1 / 0", "line 1: ZeroDivisionError: division by zero"),
        ("def f(:", "line 1: SyntaxError"),
        ("import sys\nsys.exit()", "line 2: SystemExit: it ends the program"),
        ("x = 1", 'it adds no method; write METHODS["name"] = Method(...)'),
        ("from dapt.methods import *\nMETHODS['dapt'] = Method('Mine')",
         "it changes method 'dapt', which was there"),
        ("from dapt.methods import *\nMETHODS['mine'] = Method('Mine')\nnope", "line 3: NameError"),
    ],
)  # fmt: skip
def test_a_plugin_that_is_wrong_changes_nothing(place, code, sentence):
    before = dict(METHODS)
    (place / "wrong.py").write_text(code)
    fails(f"plugin {place}/wrong.py cannot be used: {sentence}", "methods", "--plugin", "wrong.py")
    fails("cannot be read (No such file", "methods", "--plugin", "nowhere.py")
    assert before == METHODS
    assert not plugins.files()


def test_a_setting_keeps_its_meaning(place):
    for name in ("lr", "lora_rank"):
        forget()
        (place / "mine.py").write_text(block("python").replace("nudge_start", name))
        fails(f"setting '{name}' of NudgeSettings has a name", "settings", "--plugin", "mine.py")
        plugins._FILES.clear()


def test_packages_add_methods_by_entry_points(tmp_path, monkeypatch):
    for name, code in (("good", block("python")), ("bad", "1 / 0")):
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[dapt.methods]\n{name} = dapt_plugin_{name}\n")
        (tmp_path / f"dapt_plugin_{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="'dapt_plugin_bad' are left out: ZeroDivisionError"):
        plugins.load_installed(METHODS)
    assert METHODS["nudge"].title == "Nudge"
    assert plugins.plugin_of("nudge").name == "good"
    assert not plugins.files()
