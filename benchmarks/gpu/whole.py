"""Whole runs on a GPU: names of devices, resuming, several processes, what is said of no memory.

Only what needs no package but torch is imported here; checks import the rest themselves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.checks import Check, Figures, NotHere, Place

_LIMIT = 240  # seconds that a run of another process may take


def devices() -> list[Check]:
    """What ``--device`` may say."""
    return [Check("devices", "", _devices)]


def runs() -> list[Check]:
    """Resuming, several processes, too little memory."""
    return [
        Check("resume", "", _resume),
        Check("processes", "one run", _one_run),
        Check("processes", "workers", _workers),
        Check("memory", "", _memory),
    ]


@torch.no_grad()
def _devices(place: Place) -> tuple[Figures, str]:
    from benchmarks.gpu import models
    from dapt.clip.backbone import choose_device
    from dapt.engine.step import noise
    from dapt.errors import UserError

    kind = torch.device(place.device).type
    names = [place.device, f"{kind}:0", *(["auto"] if place.cuda else [])]
    found = []
    for name in names:
        own = models.backbone("bundled", None, name)
        if own.device.type != kind:
            return {}, f"'{name}' is {own.device}"
        found.append(models.plain_classifier(own)(noise(own, 4)).cpu())
    if not all(torch.equal(one, found[0]) for one in found):
        return {}, f"{', '.join(names)} find other numbers than each other"
    try:
        choose_device("cuda:99")
    except UserError as error:
        return {"devices": ", ".join(names), "cuda:99": str(error)}, ""
    return {}, "'cuda:99' is there"


def _resume(place: Place) -> tuple[Figures, str]:
    """Two runs of the same, and one that was stopped midway: the same bits."""
    from benchmarks.gpu import models
    from dapt.engine.data import open_data
    from dapt.engine.features import Shared
    from dapt.engine.fit import Journal, fit

    class Stopped(Exception):
        pass

    class Stopping(Journal):
        """Keeps the last state; stops after as many steps as are left to it."""

        kept: Any = None
        left = -1

        def checkpoint(self) -> Any:
            return self.kept

        def save(self, state: dict[str, torch.Tensor], step: int, seconds: float) -> None:
            self.kept = state, step, seconds

        def add(self, *row: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise Stopped

    settings = models.settings_of(
        "dapt", shots=1, batch_size=16, epochs=4, checkpoint_every=1, visual_dropout=0.2,
        device=place.device,
    )  # fmt: skip
    data, own = open_data(settings), models.backbone("bundled", None, place.device)
    shared = Shared(own)

    def run(journal: Journal) -> dict[str, torch.Tensor]:
        tuned = fit(data, settings, shared=shared, journal=journal)
        return {name: p.detach().cpu().clone() for name, p in tuned.classifier.learned().items()}

    one, two, journal = run(Journal()), run(Journal()), Stopping()
    journal.left = 5  # of eight, two an epoch
    with suppress(Stopped):
        run(journal)
    stopped = journal.kept[1]
    resumed = run(journal)
    again = models.furthest(models.apart(two[name], one[name]) for name in one)
    after = models.furthest(models.apart(resumed[name], one[name]) for name in one)
    figures: Figures = {"again": again, "resumed": after, "from step": stopped}
    if again:
        return figures, f"the same run twice is {again:.2g} apart"
    return figures, f"a resumed run is {after:.2g} apart" if after else ""


def _command(*words: object, before: str = "pass") -> tuple[int, str]:
    """Exit code of `dapt`, and what it says on standard error; something is executed before."""
    start = f"{before}; from dapt.cli import app; import sys; app(sys.argv[1:])"
    return _run([sys.executable, "-c", start, *words])


def _run(command: Sequence[object]) -> tuple[int, str]:
    """Exit code of a command, and its standard error; one that takes too long is ended."""
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, said = process.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers then, whose sessions are their own
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


def _learned(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the runs in a folder, by file and name."""
    from safetensors.torch import load_file

    files = sorted(folder.rglob("prompts.safetensors"))
    found = [(str(f.relative_to(folder)), load_file(f)) for f in files]
    return {f"{file}: {name}": t for file, own in found for name, t in own.items()}


def _one_run(place: Place) -> tuple[Figures, str]:
    """Two processes of torchrun find what one does, but for rounding."""
    from benchmarks.gpu import models

    if not torch.distributed.is_available():
        raise NotHere("this torch has no torch.distributed")
    device = "cuda" if place.cuda else place.device
    with TemporaryDirectory() as folder:
        two, one = Path(folder, "two"), Path(folder, "one")
        given = ["-m", "dapt", "--device", device, "--shots", 1, "--epochs", 2]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", "2", "-m", "dapt.cli", "train", "bundled", "-o", str(two)]
        alone = _command("train", "bundled", "-o", one, *given)
        for code, said in (alone, _run([*launch, *given])):
            if code:
                return {}, f"exit code {code}: {said[-300:]}"
        found, wanted = _learned(two), _learned(one)
    far = models.furthest(models.apart(found[n], t) for n, t in wanted.items())
    gpus = torch.cuda.device_count() if place.cuda else 0
    how = {0: "gloo, on the CPU", 1: "gloo, both on one GPU"}.get(gpus, "nccl, a GPU each")
    close = found.keys() == wanted.keys() and all(  # within what tests on a CPU ask
        torch.allclose(found[name], t, rtol=1e-3, atol=1e-4) for name, t in wanted.items()
    )
    figures: Figures = {"apart": far, "by": how}
    return figures, "" if close else f"two processes are {far:.2g} from one"


def _workers(place: Place) -> tuple[Figures, str]:
    """Two runs at once find what they find one after the other, to the bit."""
    with TemporaryDirectory() as folder:
        found = []
        for count in (1, 2):
            output = Path(folder, str(count))
            given = ["--methods", "dapt,vpt", "--shots", 1, "--seeds", 1, "--threads", 1]
            words = ["experiment", "few-shot", "--quick", "--device", place.device, *given]
            code, said = _command(*words, "-o", output, "--workers", count)
            if code:
                return {}, f"exit code {code}: {said[-300:]}"
            found.append(_learned(output))
    one, two = found
    if not one or one.keys() != two.keys():
        return {}, "other files than by one worker"
    other = [name for name in one if not torch.equal(one[name], two[name])]
    return {"tensors": len(one)}, f"other numbers in {', '.join(other)}" if other else ""


def _memory(place: Place) -> tuple[Figures, str]:
    """One sentence where a GPU has too little memory, and exit code 2."""
    place.require_gpu("such memory")
    share = "import torch; torch.cuda.set_per_process_memory_fraction(0.002)"
    with TemporaryDirectory() as folder:
        words = ["train", "bundled", "-o", Path(folder, "run"), "-m", "dapt", "--shots", 1]
        words += ["--device", place.device, "-b", "ViT-B-16", "--pretrained", "random"]
        code, said = _command(*words, before=share)
    good = code == 2 and "Traceback" not in said and "the GPU has not enough memory" in said
    return {"exit code": code}, "" if good else f"exit code {code}: {said[-300:]}"
