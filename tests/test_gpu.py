"""What is asked of a GPU, asked of the CPU; and that no step of any method mixes devices."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from benchmarks.gpu import __main__ as door
from benchmarks.gpu import command
from benchmarks.gpu.checks import Check, NotHere, Place, Report, ask_all, asked
from conftest import REPOSITORY
from dapt.clip import inside
from dapt.clip.inside import Pass
from dapt.clip.sources import load_backbone
from dapt.engine import step
from dapt.engine.classifier import Classifier, new_classifier, tuning_head
from dapt.engine.processes import Processes
from dapt.engine.step import Tuner, noise
from dapt.methods import METHODS, Evidence
from dapt.methods.contract import Examples
from dapt.settings import make_settings

NAMES = ["cat", "sea lion", "hot air balloon"]
CPU = Place("cpu", quick=True)


def run(*words):
    return command.main(["--device", "cpu", "--quick", *map(str, words)])


# Checks, by themselves.


def of(what, answer):
    def ask(place):
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Check("part", what, ask)


def test_no_check_stops_the_others_and_each_is_kept_at_once(tmp_path, capsys):
    file = tmp_path / "build" / "gpu.json"
    checks = [
        of("good", ({"far": 0.5, "worse": float("inf")}, "")),
        of("wrong", ({"far": 2.0}, "too far")),
        of("raises", RuntimeError("CUDA error:\n device-side assert")),
        of("absent", NotHere("one GPU only")),
        of("lacks", ModuleNotFoundError("No module named 'x'", name="x")),
        of("ours", ModuleNotFoundError("No module named 'dapt.x'", name="dapt.x")),
    ]
    found = ask_all(checks, CPU, Report(file, CPU), 60)
    verdicts = {
        name.removeprefix("part "): (one.verdict, one.reason) for name, one in found.items()
    }
    assert verdicts == {
        "good": ("passed", ""),
        "wrong": ("FAILED", "too far"),
        "raises": ("FAILED", "RuntimeError: CUDA error: device-side assert"),
        "absent": ("not possible here", "one GPU only"),
        "lacks": ("not possible here", "needs the package x"),
        "ours": ("FAILED", "needs the package dapt.x"),
    }
    kept = json.loads(file.read_text())["checks"]
    assert list(kept) == list(found)
    assert kept["part good"]["figures"] == {"far": 0.5, "worse": "inf"}
    assert "part raises: FAILED: RuntimeError" in capsys.readouterr().out


def test_what_is_not_reached_is_asked_by_the_next_call(tmp_path):
    file, count = tmp_path / "gpu.json", []

    def ask(place):
        count.append(place)
        return {}, ""

    checks = [Check("a", "", ask), Check("b", "", ask)]
    assert ask_all(checks, CPU, Report(file, CPU), 0)["a"].verdict == "not reached"
    assert not count
    ask_all(checks[:1], CPU, Report(file, CPU), 60)
    found = ask_all(checks, CPU, Report(file, CPU), 60)
    assert [one.verdict for one in found.values()] == ["passed", "passed"]
    assert len(count) == 2
    with pytest.raises(ValueError, match="delete it"):
        Report(file, Place("cpu", quick=False))


def test_the_command_asks_tells_and_goes_on(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    for only in ("gradients bundled dapt", "steps dapt 4x100", "heads gda", "attention", "copies"):
        assert run("--only", only, "--json", file) == 0, capsys.readouterr().out
    kept = json.loads(file.read_text())["checks"]
    assert kept["gradients bundled dapt"]["figures"] == {"loss": 0.0, "gradient": 0.0}
    step = kept["steps dapt 4x100"]["figures"]
    assert step["loss"] < 1e-4
    assert min(step["plain ms"], step["fp32 ms"], step["bf16 images/s"]) > 0
    assert kept["copies"]["verdict"] == "not possible here"
    capsys.readouterr()
    assert run("--only", "attention", "--json", file) == 0
    said = capsys.readouterr().out
    assert "3 checks are known" in said
    assert "3 passed" in said
    assert run("--only", "nonsense") == 2
    assert "use one of accuracy, attention" in capsys.readouterr().out


def test_a_gradient_that_is_off_fails_with_exit_code_1(monkeypatch, capsys):
    from benchmarks.gpu import models

    apart = models.apart
    monkeypatch.setattr(models, "apart", lambda *given: apart(*given) + 2e-4)
    assert run("--only", "gradients bundled vpt") == 1
    assert "too far from the CPU's: loss 0.0002, gradient 0.0002" in capsys.readouterr().out


def test_a_resumed_run_is_asked_to_the_bit():
    (check,) = [c for c in command.all_checks(CPU) if c.name == "resume"]
    found = asked(check, CPU)
    assert (found.verdict, found.reason) == ("passed", "")
    assert 0 < found.figures["from step"] < 8


def test_every_method_and_every_part_is_asked():
    names = [check.name for check in command.all_checks(Place())]
    assert len(set(names)) == len(names)
    for name, row in METHODS.items():
        if row.learns:
            wanted = [f"gradients large {name}", f"steps {name} 32x100", f"steps {name} 4x100"]
            assert set(wanted) <= set(names)
        elif not row.still:
            assert f"heads {name}" in names
    assert "steps dapt 32x1000" in names


def test_where_packages_are_missing_the_rest_is_asked(monkeypatch, capsys):
    absent = "import sys; sys.modules.update(dict.fromkeys(['open_clip', 'pydantic', 'rich']))"
    words = ["--device", "cpu", "--quick", "--minutes", "60", "--only"]
    said = {}
    for only in ("attention", "features"):
        start = f"{absent}; from benchmarks.gpu.command import main; sys.exit(main(sys.argv[1:]))"
        process = subprocess.run(
            [sys.executable, "-c", start, *words, only],
            cwd=REPOSITORY, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        said[only] = process.stdout
    assert "3 passed" in said["attention"]
    assert "2 not possible here" in said["features"]
    assert "needs the package" in said["features"]

    there = door._there
    monkeypatch.setattr(door, "_there", lambda name: name != "torch" and there(name))
    assert door.main() == 2
    assert "missing: torch\n" in capsys.readouterr().out


# Devices, by torch's fake tensors: none holds a number, and none may meet one of another device.


def to_fake_gpu(mode, module):
    """Put fake CUDA tensors in place of a module's own."""
    for one in module.modules():
        for tensors in (one._parameters, one._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    with unset_fake_temporarily():
                        plain = tensor.detach()
                    there = mode.from_tensor(plain).to("cuda")
                    if tensors is one._parameters:
                        there = nn.Parameter(there, requires_grad=tensor.requires_grad)
                    tensors[name] = there


class OutsideOfIt:
    """A tokenizer, whose numbers are real."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *given, **more):
        with unset_fake_temporarily():
            return self.tokenizer(*given, **more)


def fit_head(classifier, settings):
    with torch.no_grad():
        raw = classifier.image_features(noise(classifier.backbone, 6), normalized=False)
        text = classifier.text_features()
    support = Examples(F.normalize(raw, dim=-1), torch.arange(6) % 3)
    classifier.head.fit(
        Evidence(support, None, text, classifier.backbone.logit_scale,
                 lambda count: raw.expand(count, -1, -1)),
        settings,
    )  # fmt: skip


@pytest.mark.skipif(
    torch.__version__ < (2, 14), reason="fake CUDA tensors of earlier torch want a driver"
)
@pytest.mark.parametrize("name", METHODS)
def test_no_step_mixes_devices(name, tiny_weights, monkeypatch):
    row, backbone = METHODS[name], load_backbone(str(tiny_weights), device="cpu")
    quick = {"prolip_steps": 1, "prolip_views": 1, "visual_dropout": 0.2}
    quick = {setting: value for setting, value in quick.items() if setting in row.settings}
    settings = make_settings({"dataset": "bundled", "method": name, **quick})
    real = new_classifier(backbone, NAMES, "a photo of a {}.", row, settings)
    if row.head.fitted and not row.learns:
        fit_head(real, settings)
    backbone.tokenizer, generator = OutsideOfIt(backbone.tokenizer), torch.Generator
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)  # all is there already
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(step, "free_memory", lambda device: None)  # there is no driver to ask
    inside._later.cache_clear()
    with FakeTensorMode() as mode:
        to_fake_gpu(mode, real)
        for part in real.parts:  # what CLIP-SVD found in weights that were there already
            for key, tensors in getattr(part, "_found", {}).items():
                part._found[key] = tuple(torch.empty(t.shape, device="cuda") for t in tensors)
        if row.learns:
            own = Classifier(backbone, NAMES, real.parts, tuning_head(backbone, settings))
            tuner = Tuner(own, settings, torch.zeros(3, backbone.image_dimension))
            for part in own.parts:
                part.begin(own.as_own(tuner.prototypes))
            views, labels = noise(backbone, 4), torch.zeros(4, dtype=torch.long)
            total, _, _ = tuner.losses(views, labels, Pass(generator().manual_seed(0), 4))
            assert total.device.type == "cuda"
            assert total.requires_grad
            for parameter in tuner.named.values():
                parameter.grad = torch.zeros_like(parameter)
            tuner.optimizer.step()
            assert {t.device.type for t in tuner.state().values()} == {"cpu"}
        real.requires_grad_(False)
        head = tuning_head(backbone, settings) if row.learns else real.head
        with torch.no_grad():
            logits = Classifier(backbone, NAMES, real.parts, head)(noise(backbone, 4))
        assert (logits.device.type, tuple(logits.shape)) == ("cuda", (4, 3))
    inside._later.cache_clear()


def test_more_processes_than_gpus_share_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    places = [Processes(n, 4, n).device("auto") for n in range(4)]
    assert places == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert Processes(1, 4, 1).device("cuda:0") is None
