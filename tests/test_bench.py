"""The benchmark command on a tiny backbone: its figures hang together."""

import json

import pytest
from typer.testing import CliRunner

from dapt.bench import read_class_names, run_bench
from dapt.cli import app
from dapt.errors import UserError


def test_bench(tiny_weights, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nhot air balloon\n\n")
    one = tmp_path / "one.json"
    one.write_text('["cat"]')
    file = tmp_path / "bench.json"
    arguments = ["bench", "-b", tiny_weights, "--class-names", names, "--class-names", one]
    arguments += [
        "--batch-size",
        2,
        "--eval-batch-size",
        4,
        "--rounds",
        2,
        "--json",
        file,
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["rounds"] == 2
    variants = ["plain", "fp32", "bf16"]
    assert [(c["classes"], c["variant"]) for c in report["cases"]] == [
        (count, variant) for count in (3, 1) for variant in variants
    ]
    for row in report["cases"]:
        assert row["step"] == pytest.approx(row["forward"] + row["backward"], rel=0.5)
        assert len(row["steps"]) == 2
        assert row["peak_bytes"] > 1e8
        assert row["eval_images_per_second"] > 0
        assert row["share_of_matmul_rate"] > 0
    # 77 tokens a class against about five: far fewer operations, the same in both precisions.
    rows = dict(zip(variants, report["cases"], strict=False))
    assert rows["fp32"]["flops"] < 0.7 * rows["plain"]["flops"]
    assert rows["fp32"]["flops"] == rows["bf16"]["flops"]


def test_one_task_alone(tiny_weights, tmp_path):
    file = tmp_path / "bench.json"
    start = ["bench", "-b", str(tiny_weights), "--variants", "fp32", "--rounds", "1"]
    size = ["--batch-size", "2", "--eval-batch-size", "2", "--device", "cpu", "--json", str(file)]
    for option, there, absent in (
        ("--no-train", "eval_images_per_second", "step"),
        ("--no-eval", "step", "eval_images_per_second"),
    ):
        result = CliRunner().invoke(app, [*start, *size, option])
        assert result.exit_code == 0, result.output
        row = json.loads(file.read_text())["cases"][0]
        assert there in row
        assert absent not in row
    assert CliRunner().invoke(app, [*start, "--no-train", "--no-eval"]).exit_code == 2


def test_what_bench_refuses(tiny_weights, tmp_path):
    with pytest.raises(UserError, match="unknown variant 'fp8'"):
        run_bench(
            backbone=str(tiny_weights),
            pretrained=None,
            class_names=[["a"]],
            batch_size=1,
            eval_batch_size=1,
            variants=["fp8"],
            rounds=1,
        )
    (tmp_path / "names.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="must hold a list of names"):
        read_class_names(tmp_path / "names.json")
    (tmp_path / "names.txt").write_text("\n")
    with pytest.raises(UserError, match="names no class"):
        read_class_names(tmp_path / "names.txt")
