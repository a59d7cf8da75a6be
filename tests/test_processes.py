"""One run over two processes: the same prompts as one process finds, but for rounding."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from patience import LONG, until
from safetensors.torch import load_file

from dapt.engine.processes import Processes
from dapt.run.train import train
from dapt.settings import make_settings

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


@pytest.fixture
def options(photo_folder, tiny_weights):
    """Batches of 5, which two processes cannot divide evenly, and dropout."""
    return {
        "dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
        "method": "dapt", "shots": 4, "batch_size": 5, "epochs": 6, "text_vectors": 4,
        "visual_vectors": 2, "lr": 0.02, "visual_dropout": 0.2, "beta_text": 1.0,
    }  # fmt: skip


# With a checkpoint they rest after each step, so that a signal comes before their end.
SLOWLY = """
import sys, time
from pathlib import Path
from dapt.cli import main
from dapt.engine.step import Tuner
step, checkpoint = Tuner.step, Path(sys.argv[sys.argv.index("-o") + 1], "checkpoint.safetensors")

def slowly(*given):
    time.sleep(3 if checkpoint.is_file() else 0)
    return step(*given)

Tuner.step = slowly
main()
"""


def torchrun(output, options, program=("-m", "dapt.cli")):
    given = [f"{name}={value}" for name, value in options.items() if name != "dataset"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
        *program, "train", options["dataset"], "-o", output,
        *(word for assignment in given for word in ("--set", assignment)),
    ]  # fmt: skip
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_processes_find_what_one_does(options, tmp_path):
    process = torchrun(tmp_path / "two", options)
    said, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0, said
    assert said.count("learned parameters") == 1
    one = train(make_settings(options), tmp_path / "one")
    for name, tensor in load_file(one.prompts_file).items():
        other = load_file(tmp_path / "two" / one.prompts_file.name)[name]
        torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5)
    rows = []
    for run in ("one", "two"):
        with (tmp_path / run / "log.csv").open() as file:
            rows.append([[float(x) for x in row.values()] for row in csv.DictReader(file)])
    torch.testing.assert_close(torch.tensor(rows[1]), torch.tensor(rows[0]), rtol=1e-4, atol=1e-5)
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (
        metrics["test"]["accuracy"] == json.loads(one.metrics_file.read_text())["test"]["accuracy"]
    )


def test_a_stopped_run_goes_on_with_any_number_of_processes(options, tmp_path):
    options = {**options, "epochs": 40, "checkpoint_every": 1}
    (tmp_path / "slowly.py").write_text(SLOWLY)
    process = torchrun(tmp_path / "run", options, [tmp_path / "slowly.py"])
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    until(lambda: checkpoint.exists() or process.poll() is not None)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=LONG)
    assert process.returncode != 0, said
    assert not (tmp_path / "run" / "metrics.json").exists()
    resumed = train(make_settings(options), tmp_path / "run", resume=True)
    one = train(make_settings(options), tmp_path / "one")
    for name, tensor in load_file(one.prompts_file).items():
        other = load_file(resumed.prompts_file)[name]
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-4)


def test_a_batch_is_divided_whole():
    for size in (4, 5, 32):
        for count in (1, 2, 3, 4):
            parts = [list(range(size))[Processes(r, count).part(range(size))] for r in range(count)]
            assert [i for part in parts for i in part] == list(range(size))
            assert min(map(len, parts)) >= 1
    with pytest.raises(Exception, match="a batch of 2 images cannot be divided among 3"):
        Processes(0, 3).part(range(2))
