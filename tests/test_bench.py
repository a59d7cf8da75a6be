"""The benchmark command on a tiny backbone: its figures hang together."""

import json
import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from threading import Thread

import pytest
import torch
from miniatures import new_parts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import dapt
from benchmarks import bench, worker
from benchmarks.bench import run_bench
from benchmarks.command import read_class_names
from benchmarks.meters import count_operations
from benchmarks.plain import PlainClassifier
from conftest import REPOSITORY
from dapt.cli import app
from dapt.clip.sources import load_backbone, load_model
from dapt.engine.classifier import Classifier
from dapt.engine.step import Tuner
from dapt.errors import UserError
from dapt.grid import read_suite
from dapt.settings import make_settings

WORDS = ["cat", "dog", "hot_air_balloon", "sea lion", "a very long name of a rare flower"]


def run(**changes):
    """`run_bench` on two lists of names, with some of its arguments changed."""
    arguments = {
        "backbones": {"some": None},
        "class_names": {"one": ["cat"], "two": ["cat", "dog"]},
        "batch_sizes": [1],
        "eval_batch_size": 1,
        "eval_images": 10,
        "variants": ["plain", "fp32"],
        "rounds": 1,
        "device": "cpu",
    }
    return run_bench(**{**arguments, **changes})


@pytest.fixture
def pretended(monkeypatch):
    """No processes: figures out of the air. Tells how many cases were alive, each time."""
    alive, counts = [], []
    figures = {
        "train": {"forward": 1.0, "backward": 1.0, "step": 2.0, "loss": 3.0},
        "eval": {"eval_class_features": 5.0, "eval_batch": 2.0},
        "memory": {"peak_bytes": None},
        "count": {"flops": 1.0},
    }

    def start(case):
        alive.append(case)
        counts.append(len(alive))

    monkeypatch.setattr(bench, "matmul_rate", lambda *_: 1.0)
    monkeypatch.setattr(bench.Case, "start", start)
    monkeypatch.setattr(bench.Case, "stop", lambda case: case in alive and alive.remove(case))
    monkeypatch.setattr(bench.Case, "answer", lambda case, task: dict(figures[task]))
    yield counts
    assert not alive


def test_bench(tiny_weights, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nhot air balloon\n\n")
    file = tmp_path / "bench.json"
    arguments = ["bench", "-b", tiny_weights, "--class-names", names, "--batch-size", 2]
    arguments += ["--eval-batch-size", 4, "--eval-images", 40, "--rounds", 2, "--json", file]
    # No matter how much memory the process holds that starts the others.
    held = torch.ones(400_000_000)
    result = CliRunner().invoke(app, [str(a) for a in [*arguments, "--device", "cpu"]])
    del held
    assert result.exit_code == 0, result.output
    assert "largest relative difference to plain: fp32" in result.output
    report = json.loads(file.read_text())
    assert report["rounds"] == 2
    rows = {row["variant"]: row for row in report["cases"]}
    assert list(rows) == ["plain", "fp32", "bf16"]
    for variant, row in rows.items():
        assert (row["names"], row["classes"], row["batch_size"]) == ("names", 3, 2)
        assert row["step"] == pytest.approx(row["forward"] + row["backward"], rel=0.5)
        assert len(row["steps"]) == 2
        assert 1e8 < row["peak_bytes"] < 1.6e9
        assert row["share_of_matmul_rate"] > 0
        assert row["eval_images_per_second"] > 0
        # Class features: once for an evaluation, or in every batch of it.
        assert (row["eval_class_features"] == 0) == (variant == "plain")
    # The same mathematics in every variant.
    assert rows["fp32"]["loss_difference"] <= 1e-5
    assert rows["bf16"]["loss_difference"] <= 0.05
    # 77 tokens a class against about five: far fewer operations, the same in both precisions.
    assert rows["fp32"]["flops"] < 0.7 * rows["plain"]["flops"]
    assert rows["fp32"]["flops"] == rows["bf16"]["flops"]


def test_the_door_leads_to_the_yardsticks(tmp_path, monkeypatch):
    """The command and the module say the same; where only the wheel is, one sentence is said."""
    module = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    command = CliRunner().invoke(app, ["bench", "--help"])
    assert (module.returncode, command.exit_code) == (0, 0), module.stderr
    for said in (module.stdout, command.output):
        assert "--together" in said
        assert "Examples" in said
    for wrong in (["--rounds", "0"], ["--roundz", "1"], ["more"]):
        assert CliRunner().invoke(app, ["bench", *wrong]).exit_code == 2

    installed = tmp_path / "site-packages" / "dapt" / "__init__.py"
    monkeypatch.setattr(dapt, "__file__", str(installed))
    result = CliRunner().invoke(app, ["bench", "--help"])
    assert result.exit_code == 2
    assert "in the repository and not in the wheel" in result.stderr


def test_lists_of_the_same_length_or_file_name_are_apart(pretended, tmp_path):
    for folder, names in (("a", "cat\ndog\n"), ("b", "sea\nsky\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "names.txt").write_text(names)
    files = [str(tmp_path / folder / "names.txt") for folder in ("a", "b")]
    file = tmp_path / "bench.json"
    arguments = ["bench", "--class-names", files[0], "--class-names", files[1]]
    arguments += ["--batch-size", "2", "--batch-size", "3", "-b", "bundled", "-b", "ViT-B-32"]
    result = CliRunner().invoke(app, [*arguments, "--rounds", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["cases"]
    assert [(r["backbone"], r["names"], r["batch_size"], r["variant"]) for r in rows] == [
        (backbone, names, size, variant)
        for backbone in ("bundled", "ViT-B-32")
        for names in files
        for size in (2, 3)
        for variant in ("plain", "fp32", "bf16")
    ]


def test_processes_live_as_long_as_their_turns(pretended):
    run()
    assert max(pretended) == 2
    pretended.clear()
    run(together=True)
    assert max(pretended) == 4


def test_class_features_count_once_an_evaluation(pretended):
    row = run(eval_images=100, eval_batch_size=10)["cases"][0]
    assert row["eval_images_per_second"] == pytest.approx(100 / (5 + 100 / 10 * 2))


def test_one_task_alone(pretended, tmp_path):
    file = tmp_path / "bench.json"
    start = ["bench", "-b", "bundled", "--variants", "fp32", "--json", str(file)]
    for option, there, absent in (
        ("--no-train", "eval_images_per_second", "step"),
        ("--no-eval", "step", "eval_images_per_second"),
    ):
        result = CliRunner().invoke(app, [*start, option])
        assert result.exit_code == 0, result.output
        row = json.loads(file.read_text())["cases"][0]
        assert there in row
        assert absent not in row
    assert CliRunner().invoke(app, [*start, "--no-train", "--no-eval"]).exit_code == 2


def test_a_case_that_dies_is_a_row_and_the_others_go_on(tiny_weights, monkeypatch, tmp_path):
    start = bench.Case.start

    def starting(case):
        start(case)
        if case.job.variant == "plain":
            os.kill(case.process.pid, signal.SIGKILL)

    monkeypatch.setattr(bench.Case, "start", starting)
    file = tmp_path / "bench.json"
    arguments = ["bench", "-b", str(tiny_weights), "--variants", "plain,fp32", "--no-eval"]
    arguments += ["--batch-size", "1", "--rounds", "1", "--device", "cpu", "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    plain, fp32 = json.loads(file.read_text())["cases"]
    assert plain["error"].startswith("out of memory")
    assert "exit code -9" in plain["error"]
    assert plain["error"] in result.output
    assert fp32["step"] > 0
    result = CliRunner().invoke(app, [*arguments, "--variants", "plain"])
    assert result.exit_code == 2
    assert "exit code -9" in result.output


def test_a_worker_answers_whatever_happens_with_a_sentence(tiny_weights, monkeypatch):
    def answers(names, *tasks):
        job = worker.Job(str(tiny_weights), None, "a", names, 1, 1, "cpu", "fp32")
        here, there = Pipe()
        thread = Thread(target=worker.work, args=(there, job))
        thread.start()
        found = []
        for task in tasks:
            here.send(task)
            found.append(here.recv())
        here.close()
        thread.join()
        return found

    (found,) = answers(["la " * 90], "train")
    assert "longer than the 77 tokens" in found["error"]
    monkeypatch.setattr(worker.Variant, "eval", lambda self: torch.empty(2**60))
    good, enough, unknown = answers(["cat"], "train", "eval", "nonsense")
    assert good["loss"] > 0
    assert enough["error"].startswith("out of memory (")
    assert unknown["error"].startswith("AttributeError: ")


@pytest.mark.parametrize("name", ["tiny", "bundled"])
@pytest.mark.parametrize("words", [WORDS, WORDS[:1]])
def test_a_step_is_the_plain_ways(request, name, words):
    """Loss within 1e-5 and both gradients within 1e-4, relative."""
    if name == "tiny":
        name = str(request.getfixturevalue("tiny_weights"))
    backbone, (model, _, _) = load_backbone(name), load_model(name, None)
    size = backbone.preprocessing.size
    draw = torch.Generator().manual_seed(1)
    views = torch.randint(0, 256, (3, 3, size, size), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, len(words), (3,), generator=draw)
    prototypes = torch.randn(len(words), model.text.text_projection.shape[1], generator=draw)
    found = []
    for kind in ("plain", "ours"):
        parts = new_parts(backbone, text_vectors=16, visual_vectors=16)
        if kind == "plain":
            classifier = PlainClassifier(backbone, model, words, parts)
        else:
            classifier = Classifier(backbone, words, parts)
        weights = {"beta_visual": 10.0, "beta_text": 10.0}
        settings = make_settings({"dataset": "bundled", **weights})
        total, _, _ = Tuner(classifier, settings, prototypes).losses(views, labels)
        total.backward()
        found.append((total.item(), *(p.grad for p in classifier.learned().values())))
    (expected, *gradients), (loss, *others) = found
    assert loss == pytest.approx(expected, rel=1e-5)
    for gradient, other in zip(gradients, others, strict=True):
        assert (other - gradient).norm() <= 1e-4 * gradient.norm()


def test_what_is_computed_twice_counts_once(tiny_weights):
    backbone = load_backbone(str(tiny_weights))
    views = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    ours, all_of_it = [], []
    for budget in (2**40, 1):  # all classes at once, and one at a time, computed anew
        parts = new_parts(backbone, text_vectors=4, visual_vectors=4)
        classifier = Classifier(backbone, WORDS, parts, text_memory=budget)
        ours.append(count_operations(lambda of=classifier: of(views).sum()))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            classifier(views).sum().backward()
        all_of_it.append(counter.get_total_flops())
    assert ours[0] == all_of_it[0]
    assert ours[1] == ours[0]
    assert all_of_it[1] > 1.05 * ours[1]


def test_what_bench_refuses(tmp_path):
    with pytest.raises(UserError, match="unknown variant 'fp8'"):
        run(variants=["fp8"])
    (tmp_path / "names.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="must hold a list of names"):
        read_class_names(tmp_path / "names.json")
    (tmp_path / "names.txt").write_text("\n")
    with pytest.raises(UserError, match="names no class"):
        read_class_names(tmp_path / "names.txt")


def test_precision_example_compares_both():
    columns = read_suite(REPOSITORY / "examples" / "precision.yaml").columns()
    assert [c["precision"] for c in columns.values()] == ["fp32", "bf16"]


def test_every_method_is_measured_once(tiny_weights, tmp_path):
    file = tmp_path / "costs.json"
    arguments = ["bench", "-b", tiny_weights, "--methods", "dapt,gda", "--variants", "fp32",
                 "--batch-size", 2, "--eval-batch-size", 2, "--rounds", 1, "--device", "cpu",
                 "--json", file]  # fmt: skip
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    rows = {(row["method"], row["variant"]): row for row in json.loads(file.read_text())["cases"]}
    assert set(rows) == {("dapt", "fp32"), ("gda", "fp32")}
    assert rows["dapt", "fp32"]["step"] > 0
    assert rows["dapt", "fp32"]["learned"] == 2 * 16 * 64
    assert rows["gda", "fp32"]["fit"] >= 0
    assert "step" not in rows["gda", "fp32"]
    assert all(row["predict"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    again = [str(a) for a in arguments]
    again[again.index("dapt,gda")] = "dapt,gda,gda"
    before = file.read_bytes()
    assert CliRunner().invoke(app, again).exit_code == 0
    assert file.read_bytes() == before  # nothing was left to measure
    again[again.index("--rounds") + 1] = "2"
    other = CliRunner().invoke(app, again)
    assert other.exit_code == 2
    assert "figures of something else" in " ".join(other.output.split())


@pytest.mark.parametrize(
    "method", ["coop", "maple", "promptsrc", "mmrl", "clip-lora", "2sfs", "clip-svd"]
)
def test_the_plain_way_of_any_method_has_its_logits_loss_and_gradients(tiny_weights, method):
    """Of what stands somewhere else than where it starts: low-rank changes are zero there."""
    found = []
    for variant in ("plain", "fp32"):
        job = worker.Job(str(tiny_weights), None, "a", WORDS, 2, 1, "cpu", variant, method)
        made = worker.Variant(job)
        if made.plain:
            encoder = made.classifier.text_encoders[0]
            assert encoder._ids(encoder.chunks[0], encoder.tokens.context)[0].shape == (5, 77)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in made.tuner.named.values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
        total, _, logits = made.tuner.losses(made.views, made.labels)
        total.backward()
        gradient = torch.cat([p.grad.flatten() for p in made.tuner.named.values()])
        found.append((total.detach(), logits.detach(), gradient))
    for ours, plain in zip(found[1], found[0], strict=True):
        assert (ours - plain).norm() <= 1e-4 * plain.norm()
