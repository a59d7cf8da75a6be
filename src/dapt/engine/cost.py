"""What a method costs: memory, and the time that a prediction takes."""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from dapt.engine.classifier import Classifier
from dapt.engine.step import noise

_IMAGES = 4  # predicted to take the time of one


def peak_memory(device: torch.device) -> int | None:
    """Bytes of the most memory this process ever held; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Unlike ru_maxrss, this knows nothing of the parent that this process was forked from.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count from here, where the system can; else from the process's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def predict_seconds(classifier: Classifier) -> float:
    """Seconds a decoded image takes, some at a time; class features are made before, once.

    Where a part reads images, those features are made for each, and count.
    """
    views = noise(classifier.backbone, _IMAGES)
    with torch.inference_mode():
        text = None if classifier.reads_images else classifier.text_features()
        classifier.encode(views[:1]).cpu()  # waits for a GPU, which is at work yet
        started = time.perf_counter()
        classifier.logits(classifier.encode(views), text).cpu()
    return (time.perf_counter() - started) / _IMAGES
