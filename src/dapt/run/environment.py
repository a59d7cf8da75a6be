"""What a run is made with: versions, machine, device, weights."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dapt.clip.backbone import Backbone

_PACKAGES = ("dapt", "torch", "torchvision", "open_clip_torch", "numpy", "pillow", "scikit-learn")


def environment(backbone: Backbone, seed: int | None = None) -> dict[str, Any]:
    """Versions, source commit, machine, device and backbone of this process."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = backbone.device
    return {
        **({} if seed is None else {"seed": seed}),
        "python": sys.version.split()[0],
        "versions": versions,
        "commit": _commit(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "precision": backbone.precision,
        "cpu": _cpu(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "backbone": backbone.name,
        "backbone_sha256": backbone.fingerprint,
        "command": sys.argv,
    }


def _cpu() -> str:
    """Model of the processor, and the instructions that torch uses of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):  # Linux on x86 alone tells it there
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def rounding(record: dict[str, Any]) -> dict[str, Any]:
    """What of an `environment` decides how sums are rounded, as far as it is recorded."""
    versions = record.get("versions")
    found = {"torch": versions.get("torch") if isinstance(versions, dict) else None}
    found |= {name: record.get(name) for name in ("threads", "cpu", "device")}
    return {name: value for name, value in found.items() if value is not None}


def _commit() -> str | None:
    """Commit of the checkout this package runs from, if it runs from one."""
    here = Path(__file__).resolve().parent
    if not (here.parents[2] / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
