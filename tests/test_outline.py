"""Commands that only list need no torch, and say the same without it."""

import json
import subprocess
import sys

import pytest
from patience import LONG

ONES = ("ivlp", "auto", "dapt+kernel-ridge", "nope")
LISTS = [["methods"], ["settings"], ["settings", "caltech101", "--shots", "4"],
         *(["settings", "--method", name] for name in ONES)]  # fmt: skip
PROGRAM = """
import json, sys
from typer.testing import CliRunner
from dapt.cli import app
lists = json.loads(sys.argv[1])

def said():
    return [[r.exit_code, r.output] for r in (CliRunner().invoke(app, words) for words in lists)]

without = said()
assert "torch" not in sys.modules and "dapt.methods" not in sys.modules, "something stays"
import torch
from dapt import methods
from dapt.settings import make_settings
assert issubclass(methods.TowerPart, torch.nn.Module), "the stand-in stays"
print(json.dumps([without, said()]))
"""
HELP = [["--help"], ["--version"], ["data", "--help"], ["train", "--help"]]


@pytest.fixture(scope="module")
def said():
    command = [sys.executable, "-c", PROGRAM, json.dumps([*LISTS, *HELP])]
    made = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


def test_lists_are_the_same_without_torch(said):
    without, with_torch = said
    assert without == with_torch
    assert [code for code, _ in without] == [0] * 6 + [2] + [0] * len(HELP)
    assert "kernel-ridge" in without[0][1]
    assert "unknown method 'nope'" in without[6][1]
