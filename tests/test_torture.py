"""A dozen kills of `make torture`, which has hundreds, and pairs of trainings at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import LONG

TORTURE = Path(__file__).with_name("torture.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_nothing_is_lost(tmp_path):
    summary = tmp_path / "summary.json"
    kinds = "^(train dapt|import|report|export coop)$"
    command = [sys.executable, TORTURE, "--kills", "12", "--seed", "5", "--only", kinds,
               "--disks", "0", "--pairs", "0", "--grid-kills", "0", "--json", summary]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(summary.read_text())
    assert found["lost"] == 0
    # A dozen, but where commands ended before their moment, as other programs did.
    assert sum(attack["hit"] for attack in found["attacks"].values()) >= 4
