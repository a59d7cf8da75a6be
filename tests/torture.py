"""Attacks on dapt's files: kills at random moments, full and read-only disks, two at once.

    python tests/torture.py --kills 200 --seed 1 --json build/torture.json

Every attack is followed by the same questions: is each file an old or a new whole one, is no
lock left, does the same command (``--resume`` for a run) end in the bits of an undisturbed one,
and is what is told one sentence. A server process imports torch once; each attacked command runs
in a fork of it, so a kill costs about a second. Linux and macOS only.

Prints a table and exits with 1 if anything was lost. ``make torture`` runs it with ``--fuzz``
too: the property tests of files from strangers, with many more examples.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from patience import LONG

# One thread: a fork of a process whose thread pools have run would wait for threads it lacks.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"

SLOW = LONG  # seconds after which a command counts as hanging
TINY = ["--device", "cpu", "--set", "batch_size=16", "--set", "text_vectors=2",
        "--set", "visual_vectors=2", "--set", "checkpoint_every=1", "--set", "lr=0.5"]  # fmt: skip


class Lost(Exception):
    """An attack left something that it should not; the message says what."""


@dataclass
class Tally:
    """What was tried of one kind of attack, and what it found."""

    tried: int = 0
    hit: int = 0  # the attack came before the command's end
    abandoned: int = 0  # temporary files that kills left, which later writes delete
    lost: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------- commands


def preload() -> None:
    """Import what commands need, so that their forks need not."""
    import importlib

    for name in ("dapt.cli", "dapt.run.train", "dapt.share.export", "dapt.share.exchange",
                 "dapt.report.figures", "dapt.grid", "sklearn.linear_model",
                 "onnx", "onnxscript", "onnxruntime", "torch.onnx", "matplotlib.pyplot",
                 "webdataset", "torch.utils.tensorboard", "open_clip"):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


@dataclass
class Child:
    """A dapt command in a fork of this process."""

    pid: int
    output: Path
    code: int | None = None

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                return False
            else:
                time.sleep(0.001)
        return True

    def kill(self, *, alone: bool = False) -> None:
        """End it without warning, and what it started; ``alone``: that has to end by itself."""
        with contextlib.suppress(ProcessLookupError):
            (os.kill if alone else os.killpg)(self.pid, signal.SIGKILL)
        self.wait(SLOW)
        # A worker looks for its parent when it has imported torch, and a busy machine takes long.
        end = time.monotonic() + SLOW
        while True:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return
            if time.monotonic() > end:
                self.kill()
                raise Lost("a process that it started was left behind")
            time.sleep(0.01)

    def said(self) -> str:
        return self.output.read_text(errors="replace")


def start(arguments: list[str | Path], folder: Path) -> Child:
    """Run ``dapt`` with these arguments in a fork; what it says goes to a file."""
    handle, name = tempfile.mkstemp(dir=folder, prefix="said-", suffix=".txt")
    pid = os.fork()
    if pid:
        os.close(handle)
        return Child(pid, Path(name))
    code = 70
    try:
        os.setsid()
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv = ["dapt", *map(str, arguments)]
        from dapt.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def run(arguments: list[str | Path], folder: Path) -> Child:
    """Run ``dapt`` to its end."""
    child = start(arguments, folder)
    if not child.wait(SLOW):
        child.kill()
        raise Lost(f"hung: dapt {' '.join(map(str, arguments))}")
    return child


def succeed(arguments: list[str | Path], folder: Path) -> None:
    child = run(arguments, folder)
    if child.code != 0:
        raise Lost(
            f"dapt {' '.join(map(str, arguments))}: exit {child.code}: {child.said()[-600:]}"
        )


# --------------------------------------------------------------------------------- checks


def check_whole(file: Path) -> None:
    """Raise unless the file is whole, as its own kind's reader sees it."""
    if file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".safetensors":
        from safetensors.torch import load_file

        load_file(file)
    elif file.suffix == ".onnx":
        import onnx

        onnx.checker.check_model(onnx.load(file))
    elif file.suffix in (".pt2", ".pth"):
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                raise ValueError("damaged zip")
    elif file.suffix == ".png":
        from PIL import Image

        with Image.open(file) as image:
            image.load()
    elif file.suffix == ".svg":
        ElementTree.fromstring(file.read_text(encoding="utf-8"))
    elif file.suffix == ".html":
        if not file.read_text(encoding="utf-8").rstrip().endswith("</html>"):
            raise ValueError("no end")
    elif file.suffix in (".csv", ".md", ".tex") and not file.read_text(encoding="utf-8").strip():
        raise ValueError("empty")


def check_tree(folder: Path) -> int:
    """Raise `Lost` unless every file is whole and no lock is held; count temporaries."""
    from filelock import FileLock, Timeout

    abandoned = 0
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or "tensorboard" in file.parts:
            continue
        if file.name.endswith(".dapt-part"):
            abandoned += 1
        elif file.name == ".lock":
            try:
                with FileLock(file, timeout=10):
                    pass
            except Timeout:
                raise Lost(f"{file} is held by nobody") from None
        elif file.name == "log.csv":  # grows line by line; only a checkpoint makes lines count
            list(csv.reader(io.StringIO(file.read_text())))
        else:
            try:
                check_whole(file)
            except Exception as error:
                raise Lost(f"{file} is not whole: {error!r}") from error
    return abandoned


# What tells of this very process, its time and its machine.
_OWN = ("environment.json", "checkpoint.safetensors")


def results(folder: Path) -> dict[str, bytes]:
    """What must be the same to the bit: file -> content. Times and machine facts are not in it."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.name.startswith((".", "said-")):
            continue
        if "tensorboard" in file.parts or file.name in _OWN:
            continue
        found[file.relative_to(folder).as_posix()] = file.read_bytes()
    return found


def check_same(found: dict[str, bytes], expected: dict[str, bytes], what: str) -> None:
    differ = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    if differ:
        raise Lost(f"{what}: {', '.join(differ[:5])} differ from the undisturbed ones")


def check_told(child: Child, *words: str) -> None:
    """A refusal: exit code 2, one sentence with these words, no traceback."""
    said = child.said()
    lines = [line for line in said.splitlines() if line.startswith("dapt: ")]
    lines = [line for line in lines if not line.startswith("dapt: warning:")]
    if child.code != 2 or "Traceback" in said or len(lines) != 1:
        raise Lost(f"exit {child.code}, where one sentence was due: {said[-600:]}")
    if not any(word in lines[0].lower() for word in words):
        raise Lost(f"says nothing of {' or '.join(words)}: {lines[0]}")


# --------------------------------------------------------------------------------- attacks


@dataclass
class Attack:
    """A command to be killed, and how to go on after it.

    ``first`` is what is attacked, in the folder ``out``; ``again`` what goes on. ``before`` fills
    the folder, for a command that replaces something.
    """

    name: str
    first: list[str | Path]
    again: list[str | Path]
    before: Path | None = None


def pack(folder: Path) -> None:
    """The bundled images as WebDataset shards."""
    from dapt.data import open_task

    folder.mkdir()
    task = open_task("bundled")
    for part in ("train", "test"):
        with tarfile.open(folder / f"{part}-0.tar", "w") as tar:
            for number, item in enumerate(getattr(task, part)):
                image = task.image_path(item).read_bytes()
                for ending, content in (("png", image), ("cls", item.class_name.encode())):
                    info = tarfile.TarInfo(f"{number:05d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


class Ground:
    """Runs and files that attacks start from, made once, in a folder that attacks use too."""

    def __init__(self, folder: Path, only: str | None = None) -> None:
        self.folder, self.only = folder, only
        self.out = folder / "out"
        self.run = folder / "run"
        tiny = [*TINY, "--shots", "1", "--epochs", "2"]
        succeed(["train", "bundled", "-o", self.run, "-m", "dapt", *tiny], folder)
        self.other = folder / "other"  # a run that --overwrite replaces
        succeed(["train", "bundled", "-o", self.other / "run", "-m", "coop", *tiny], folder)
        self.checkpoint = folder / "published" / "model.pth.tar-2"
        succeed(["export", self.run, "-o", self.checkpoint, "-f", "coop"], folder)
        self.exported = folder / "exported"  # files that an export replaces
        if only is None or "onnx" in only:
            succeed(["export", self.other / "run", "-o", self.exported / "a.onnx"], folder)
        self.exported.mkdir(exist_ok=True)
        self.reported = folder / "reported"
        self.reported.mkdir()
        succeed(["report", self.other, "-o", self.reported / "page.html"], folder)
        self.packed = folder / "packed"
        pack(self.packed)
        self.suite = self.write_suite("small", "coop, linear-probe", "1, 2")

    def write_suite(self, name: str, methods: str, seeds: str) -> Path:
        """A grid of tiny runs, each evaluated in another domain too."""
        file = self.folder / f"{name}.yaml"
        file.write_text(
            f"datasets: [bundled]\nmethods: [{methods}]\nshots: [1]\nseeds: [{seeds}]\n"
            "settings: {device: cpu, batch_size: 16, epochs: 2, text_vectors: 2, "
            "visual_vectors: 2, lr: 0.5, checkpoint_every: 1}\n"
            "evaluations: [{domain: fluent-emoji-high-contrast}]\n"
        )
        return file

    def attacks(self) -> list[Attack]:
        out = self.out
        found = []
        for method, epochs in (("dapt", 4), ("coop", 4), ("linear-probe", 1), ("zero-shot", 1)):
            train = ["train", "bundled", "-o", out / "run", "-m", method, *TINY,
                     "--shots", "1", "--epochs", str(epochs)]  # fmt: skip
            found.append(Attack(f"train {method}", train, [*train, "--resume"]))
        train = ["train", "bundled", "-o", out / "run", "-m", "dapt", *TINY, "--shots", "1",
                 "--epochs", "2", "--overwrite"]  # fmt: skip
        found.append(Attack("train --overwrite", train, train, self.other))
        train = ["train", self.packed, "-o", out / "run", "-m", "zero-shot", *TINY, "--shots", "1"]
        found.append(Attack("train on packed images", train, [*train, "--resume"]))
        grid = ["experiment", self.suite, "-o", out, "--threads", "1"]
        found.append(Attack("experiment", grid, grid))
        found.append(Attack("experiment, 2 workers", [*grid, "--workers", "2"], grid))
        taken = ["import", self.checkpoint, "-o", out / "run", "--dataset", "bundled", "--device",
                 "cpu"]  # fmt: skip
        found.append(Attack("import", taken, [*taken, "--overwrite"]))
        for form, name in (("onnx", "a.onnx"), ("torch", "a.pt2"), ("coop", "a.pth")):
            export = ["export", self.run, "-o", out / name, "-f", form]
            found.append(Attack(f"export {form}", export, export, self.exported))
        page = ["report", self.run, self.other, "-o", out / "page.html"]
        found.append(Attack("report", page, page, self.reported))
        return found

    def prepare(self, attack: Attack) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(os.environ["DAPT_CACHE"], ignore_errors=True)
        if attack.before is None:
            self.out.mkdir()
        else:
            shutil.copytree(attack.before, self.out)


@dataclass
class Undisturbed:
    """An attacked command when nobody attacks it: how long it takes, and what it leaves."""

    seconds: float
    before: dict[str, bytes]
    after: dict[str, bytes]


def undisturbed(ground: Ground, attack: Attack) -> Undisturbed:
    ground.prepare(attack)
    before = results(ground.out)
    started = time.monotonic()
    succeed(attack.first, ground.folder)
    seconds = time.monotonic() - started
    after = results(ground.out)
    check_tree(ground.out)
    if ground.only is not None:
        return Undisturbed(seconds, before, after)
    ground.prepare(attack)
    succeed(attack.first, ground.folder)
    check_same(results(ground.out), after, f"{attack.name}, twice undisturbed")
    return Undisturbed(seconds, before, after)


# Files of a run that are still being made, so that their content may be of any moment.
_GROWING = ("log.csv", ".lock")


def kill_once(
    ground: Ground, attack: Attack, calm: Undisturbed, generator: random.Random, tally: Tally
) -> None:
    """Start an attack's command, kill it (once to three times, going on between), check."""
    ground.prepare(attack)
    moments = [generator.uniform(0, 1.05 * calm.seconds)]
    while generator.random() < 0.25 and len(moments) < 3:
        moments.append(generator.uniform(0, 1.05 * calm.seconds))
    for number, moment in enumerate(moments):
        started = time.monotonic()
        child = start(attack.first if number == 0 else attack.again, ground.folder)
        ended = child.wait(moment)
        if ended and number == 0:  # other programs computed while it was timed
            calm.seconds = min(calm.seconds, time.monotonic() - started)
        tally.tried += 1
        tally.hit += not ended
        try:
            child.kill(alone=generator.random() < 0.5)
            if ended and child.code != 0 and not (number == 0 or _is_refusal(child)):
                raise Lost(f"exit {child.code}: {child.said()[-600:]}")
            tally.abandoned += check_tree(ground.out)
            begun = ground.out / "run" / "settings.json"
            finished = begun.with_name("metrics.json").exists()
            if attack.name == "import" and begun.exists() and not finished:
                raise Lost("half an import is left")
            for name, content in results(ground.out).items():
                base = name.rsplit("/", 1)[-1]
                if base in _GROWING or name == "page-files/contents.json":
                    continue
                if content not in (calm.before.get(name), calm.after.get(name)):
                    raise Lost(f"{name} is neither the old nor the new one")
        except Lost as error:
            raise Lost(
                f"{attack.name}, killed after {moment:.3f} s ({number + 1}.): {error}"
            ) from error
    succeed(attack.again, ground.folder)
    check_same(results(ground.out), calm.after, f"{attack.name}, killed after {moments} and again")
    check_tree(ground.out)


def _more(tallies: dict[str, Tally], count: int) -> bool:
    hit, tried = (sum(getattr(t, n) for t in tallies.values()) for n in ("hit", "tried"))
    return hit < count and tried < 2 * count


def _is_refusal(child: Child) -> bool:
    return child.code == 2 and "holds a finished run" in child.said()


def kills(ground: Ground, count: int, seed: int, only: str | None, report: Callable) -> None:
    """``count`` kills that come before a command's end, in turn over all attacked commands."""
    generator = random.Random(seed)
    attacks = [a for a in ground.attacks() if only is None or re.search(only, a.name)]
    tallies = {a.name: Tally() for a in attacks}
    calms: dict[str, Undisturbed] = {}
    # Twice as many tries at most: some moments lie behind the end.
    while _more(tallies, count):
        for attack in attacks:
            tally = tallies[attack.name]
            try:
                if attack.name not in calms:
                    calms[attack.name] = undisturbed(ground, attack)
                kill_once(ground, attack, calms[attack.name], generator, tally)
            except Lost as error:
                tally.tried += not tally.tried
                tally.lost.append(str(error))
            if not _more(tallies, count):
                break
    for name, tally in tallies.items():
        report(f"kill -9: {name}", tally)


def one_grid(ground: Ground, count: int, seed: int, report: Callable) -> None:
    """A single grid that is killed ``count`` times, all the way through it, before it may end.

    Once in one process and once in two; compared with one that nobody disturbed. When is said
    in steps and evaluations done, not in seconds: how fast it goes depends on who else computes.
    """
    suite = ground.write_suite("one", "zero-shot, linear-probe, coop, dapt", "1, 2, 3, 4")
    attack = Attack("one grid", ["experiment", suite, "-o", ground.out, "--threads", "1"], [])
    calm = undisturbed(ground, attack).after
    whole = _done(ground.out)
    for workers in (1, 2):
        generator, tally, done = random.Random(seed), Tally(), []
        command = [*attack.first, "--workers", str(workers)]
        ground.prepare(attack)
        try:
            for moment in sorted(generator.uniform(0, 0.95 * whole) for _ in range(count)):
                child = start(command, ground.folder)
                while _done(ground.out) < moment and not child.wait(0.01):
                    pass
                child.wait(generator.uniform(0, 0.5))
                tally.tried += 1
                tally.hit += child.code is None
                child.kill(alone=generator.random() < 0.5)
                if child.code not in (0, -signal.SIGKILL):
                    raise Lost(f"exit {child.code}: {child.said()[-600:]}")
                tally.abandoned += check_tree(ground.out)
                done.append(f"{_done(ground.out) / whole:.0%}")
            succeed(command, ground.folder)
            check_same(results(ground.out), calm, f"killed {count} times")
            check_tree(ground.out)
        except Lost as error:
            tally.lost.append(str(error))
        report(f"kill -9: one grid, {workers} at once", tally)
        print(f"    done when it was killed: {' '.join(done)}")


def _done(folder: Path) -> int:
    """Steps, runs and evaluations of a grid that are done."""
    logs = [file.read_bytes().count(b"\n") for file in folder.rglob("log.csv")]
    ends = [file for name in ("metrics.json", "eval-*.json") for file in folder.rglob(name)]
    return sum(logs) + len(ends)


# ---------------------------------------------------------------------- disks, two at once


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int, *, readonly: bool = False) -> Iterator[Path | None]:
    """A file system of this size, or None where this process may not mount one."""
    place = Path(tempfile.mkdtemp(dir=folder, prefix="disk-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "dapt-torture", place]
    done = subprocess.run(command, capture_output=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        place.rmdir()
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)
        place.rmdir()


def full_disks(ground: Ground, count: int, seed: int, report: Callable) -> None:
    """Trainings, grids and the rest on a disk that fills up at random; then there is room."""
    generator = random.Random(seed)
    attacks = [a for a in ground.attacks() if "workers" not in a.name]
    tally = Tally()
    here = ground.out
    for number in range(count):
        attack = attacks[number % len(attacks)]
        with small_disk(ground.folder, 64 * 1024) as disk:
            if disk is None:
                report("full disk (may not mount: skipped)", tally)
                return
            # The attack's own paths lie below ground.out: the disk takes its place.
            ground.prepare(attack)
            succeed(attack.first, ground.folder)
            expected = results(here)
            size = sum(f.stat().st_size for f in here.rglob("*") if f.is_file())
            ground.prepare(attack)
            content = disk / "out"
            shutil.move(here, content)
            here.symlink_to(content)
            ballast = disk / "ballast"
            room = int(generator.uniform(0, 1.2 * size))
            tally.tried += 1
            try:
                free = shutil.disk_usage(disk).free
                ballast.write_bytes(bytes(max(0, free - room)))
                child = run(attack.first, ground.folder)
                if child.code != 0:
                    tally.hit += 1
                    if attack.name.startswith("experiment") and child.code == 1:
                        raise Lost(f"the grid went on: {child.said()[-600:]}")
                    check_told(child, "disk is full")
                check_tree(content)
                ballast.unlink()
                succeed(attack.again, ground.folder)
                check_same(results(content), expected, "when there was room")
            except Lost as error:
                tally.lost.append(f"{attack.name} with {room:,} bytes of room: {error}")
            finally:
                here.unlink()
    report("full disk", tally)


def read_only(ground: Ground, report: Callable) -> None:
    """Each command where nothing can be written."""
    tally = Tally()
    for attack in ground.attacks():
        with small_disk(ground.folder, 64 * 1024) as disk:
            if disk is None:
                report("read-only directory (may not mount: skipped)", tally)
                return
            ground.prepare(attack)
            content = disk / "out"
            shutil.move(ground.out, content)
            before = results(content)
            ground.out.symlink_to(content)
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            tally.tried += 1
            try:
                child = run(attack.first, ground.folder)
                tally.hit += child.code != 0
                check_told(child, "read-only")
                check_same(results(content), before, "on a read-only disk")
            except Lost as error:
                tally.lost.append(f"{attack.name}: {error}")
            finally:
                ground.out.unlink()
    report("read-only directory", tally)


def two_at_once(ground: Ground, count: int, seed: int, report: Callable) -> None:
    """Two of the same command in one place, a random moment apart."""
    generator = random.Random(seed)
    for wanted in ("train dapt", "train --overwrite", "train on packed images", "experiment",
                   "import", "export onnx", "report"):  # fmt: skip
        attack = next(a for a in ground.attacks() if a.name == wanted)
        calm = undisturbed(ground, attack)
        tally = Tally()
        for _ in range(count):
            ground.prepare(attack)
            first = start(attack.first, ground.folder)
            first.wait(generator.uniform(0, calm.seconds))
            tally.tried += 1
            tally.hit += first.code is None
            second = start(attack.first, ground.folder)
            try:
                for child in (first, second):
                    if not child.wait(SLOW):
                        child.kill()
                        raise Lost("one hung")
                codes = {first.code, second.code}
                if 0 not in codes or not codes <= {0, 2}:
                    raise Lost(f"exit codes {codes}: {first.said()[-300:]}; {second.said()[-300:]}")
                for child in (first, second):
                    if child.code == 2:
                        check_told(child, "in use", "holds")
                check_tree(ground.out)
                check_same(results(ground.out), calm.after, "two at once")
            except Lost as error:
                tally.lost.append(str(error))
        report(f"two at once: {wanted}", tally)


def fuzz(examples: int, report: Callable) -> None:
    """The property tests of files from strangers, each with at least so many examples."""
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "pytest", "-m", "fuzz", "--timeout=0", "-vv", here]
    environment = {**os.environ, "DAPT_FUZZ_EXAMPLES": str(examples)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here.parent)
    found = re.findall(r"^(\S+::\S+) (PASSED|FAILED|ERROR)", done.stdout, re.MULTILINE)
    tally = Tally(tried=len(found), hit=len(found))
    tally.lost = [name for name, outcome in found if outcome != "PASSED"]
    if done.returncode and not tally.lost:
        tally.lost = [done.stdout[-1500:]]
    if tally.lost:
        print(done.stdout[-20_000:])
    report(f"property tests, {examples:,} examples each", tally)


# ------------------------------------------------------------------------------------ main


def main() -> int:
    """Attack, print a table, write a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--grid-kills", type=int, default=20, help="of one and the same grid")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="kill only commands whose name matches this expression")
    parser.add_argument("--disks", type=int, default=24, help="disks that fill up")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of each command at once")
    parser.add_argument("--fuzz", type=int, default=0, help="examples of each property test")
    parser.add_argument("--json", type=Path, help="summary to write")
    given = parser.parse_args()
    preload()
    found: dict[str, Tally] = {}
    started = time.monotonic()

    def report(name: str, tally: Tally) -> None:
        found[name] = tally
        survived = f"{tally.tried - len(tally.lost)} survived"
        print(f"{name:45} {tally.tried:5} tried {tally.hit:5} hit  {survived}", flush=True)
        for sentence in tally.lost:
            print(f"    lost: {sentence}", flush=True)

    with tempfile.TemporaryDirectory(prefix="dapt-torture-") as place:
        os.environ["DAPT_CACHE"] = str(Path(place) / "cache")
        ground = Ground(Path(place).resolve(), given.only)
        if given.kills:
            kills(ground, given.kills, given.seed, given.only, report)
        if given.grid_kills:
            one_grid(ground, given.grid_kills, given.seed, report)
        if given.pairs:
            two_at_once(ground, given.pairs, given.seed, report)
        if given.disks:
            full_disks(ground, given.disks, given.seed, report)
            read_only(ground, report)
    if given.fuzz:
        fuzz(given.fuzz, report)
    tried = sum(tally.tried for tally in found.values())
    lost = sum(len(tally.lost) for tally in found.values())
    print(f"{tried} tried, {lost} lost, {time.monotonic() - started:.0f} s")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        summary = {
            "seed": given.seed,
            "seconds": round(time.monotonic() - started),
            "tried": tried,
            "lost": lost,
            "attacks": {name: asdict(tally) for name, tally in found.items()},
        }
        given.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
