"""A training step and an evaluation, the plain way and ours, in one run.

Every case, a variant in one setting, lives in a process of its own, so that its peak memory is
its own, and the cases of a setting take turns at one step each, so that a shared machine's drift
meets all of them alike. Beside them stands the machine's rate of matrix products, measured in the
same turns, and the share of it that a step reaches, from counted floating-point operations. All
variants start from the same prompts, images, labels and prototypes, and say their loss.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch

from benchmarks.meters import matmul_rate
from benchmarks.worker import OUT_OF_MEMORY, PLAIN, Job, work
from dapt.clip.backbone import PRECISIONS, choose_device
from dapt.errors import UserError

VARIANTS = (PLAIN, *PRECISIONS)
SETTING = ("backbone", "names", "batch_size", "method")


def run_bench(
    *,
    backbones: Mapping[str, str | None],
    class_names: Mapping[str, Sequence[str]],
    batch_sizes: Sequence[int],
    eval_batch_size: int,
    eval_images: int,
    variants: Sequence[str],
    rounds: int,
    tasks: Sequence[str] = ("train", "eval"),
    together: bool = False,
    device: str = "auto",
    methods: Sequence[str] = ("dapt",),
    advance: Callable[..., None] = lambda count, note="": None,
) -> dict[str, Any]:
    """Time the training step and evaluation of each variant in each setting, in turns.

    A setting is a backbone, a list of names and a batch size.

    Args:
        backbones: name -> ``pretrained``, as `load_backbone`; "random" needs no download.
        class_names: what to call a list -> its names.
        batch_sizes: images a training step.
        eval_batch_size: images a batch in evaluation.
        eval_images: images that ``eval_images_per_second`` is for.
        variants: of "plain", "fp32", "bf16", "fp16".
        rounds: turns each case takes, after one that is not counted.
        tasks: which of "train" and "eval" to time.
        together: let the cases of all settings take turns, and not those of one setting after
            those of another: settings, too, compare in the same minutes, but all processes stay
            in memory.
        device: of all cases.
        methods: whose steps; heads have none, and are fitted to features of nothing.
        advance: is told of each finished turn.

    Returns:
        Plain values: what was asked for, and as ``cases`` for each variant in each setting the
        medians over the rounds: seconds of a step and its halves, its loss and how far (as a
        share) that is from plain's; ``eval_class_features``, the seconds that class features take
        once for an evaluation, ``eval_batch``, those of a batch of it, and
        ``eval_images_per_second``, which is ``eval_images / (eval_class_features +
        eval_images / eval_batch_size * eval_batch)``; peak memory in bytes; operations of a
        step, without those that recomputation repeats; their rate, and what share it is of the
        matrix products' in the same turns. A case that failed has an ``error`` instead.

    Raises:
        UserError: an unknown variant, or no case came to its end; the first one's error is told.
    """
    if unknown := [v for v in variants if v not in VARIANTS]:
        raise UserError(f"unknown variant '{unknown[0]}'; use some of {', '.join(VARIANTS)}")
    settings = [
        [
            Case(
                Job(
                    backbone=backbone,
                    pretrained=backbones[backbone],
                    names=names,
                    class_names=list(class_names[names]),
                    batch_size=batch_size,
                    eval_batch_size=eval_batch_size,
                    device=device,
                    variant=variant,
                    method=method,
                )
            )
            for variant in variants
        ]
        for backbone, names, batch_size, method in product(
            backbones, class_names, batch_sizes, methods
        )
    ]
    cases = [case for setting in settings for case in setting]
    for group in [cases] if together else settings:
        _take_turns(group, rounds, tasks, advance)
    if all(case.error for case in cases):
        raise UserError(cases[0].error)
    return {
        "device": device,
        "eval_batch_size": eval_batch_size,
        "eval_images": eval_images,
        "rounds": rounds,
        "together": together,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cases": [row for setting in settings for row in _rows(setting, eval_images)],
    }


def _take_turns(
    cases: Sequence[Case], rounds: int, tasks: Sequence[str], advance: Callable[..., None]
) -> None:
    """Run all turns of some cases, whose processes live no longer than this."""
    try:
        for case in cases:
            case.start()
        for turn in range(rounds + 1):
            for case in cases:
                case.take_turn(tasks, counted=turn > 0)  # the first warms up
                advance(1, case.job.variant)
        for task in ("memory", "count") if "train" in tasks else ("memory",):
            for case in cases:
                case.figures |= case.answer(task)
    finally:
        for case in cases:
            case.stop()


def _rows(setting: Sequence[Case], eval_images: int) -> list[dict[str, Any]]:
    """A setting's rows; beside each loss, how far (as a share) it is from the plain way's."""
    rows = [case.row(eval_images) for case in setting]
    plain = next((row.get("loss") for row in rows if row["variant"] == PLAIN), None)
    for row in rows:
        if plain and "loss" in row:
            row["loss_difference"] = abs(row["loss"] - plain) / abs(plain)
    return rows


class Case:
    """One variant in one setting: its process, and what came of it."""

    def __init__(self, job: Job) -> None:
        self.job, self.error = job, ""
        self.turns: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}
        self.process: Any = None

    def start(self) -> None:
        """Start the process; the model is loaded on the first task."""
        fresh = multiprocessing.get_context("spawn")  # with none of this one's memory
        self.pipe, there = fresh.Pipe()
        self.process = fresh.Process(target=work, args=(there, self.job), daemon=True)
        self.process.start()
        there.close()

    def take_turn(self, tasks: Sequence[str], *, counted: bool) -> None:
        """Run each task once, beside the rate of matrix products measured just before."""
        if self.error:
            return
        place = choose_device(self.job.device)
        turn = {"matmul_flops_per_second": matmul_rate(PRECISIONS[self.job.precision], place)}
        for task in tasks:
            turn |= self.answer(task)
        if counted and not self.error:
            self.turns.append(turn)

    def answer(self, task: str) -> dict[str, Any]:
        """Figures of a task; none once an error is known."""
        if self.error:
            return {}
        try:
            self.pipe.send(task)
            figures: dict[str, Any] = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            figures = {"error": _last_words(self.process.exitcode)}
        self.error = figures.pop("error", "")
        if self.error:
            self.stop()  # what it holds is the others' to use
        return figures

    def row(self, eval_images: int) -> dict[str, Any]:
        """The setting with its figures, or with the error."""
        row: dict[str, Any] = {k: getattr(self.job, k) for k in (*SETTING, "pretrained", "variant")}
        row["classes"] = len(self.job.class_names)
        if self.error:
            return {**row, "error": self.error}
        row |= {k: median(turn[k] for turn in self.turns) for k in self.turns[0]}
        row |= self.figures
        if "eval_batch" in row:
            batches = eval_images / self.job.eval_batch_size
            seconds = row["eval_class_features"] + batches * row["eval_batch"]
            row["eval_images_per_second"] = eval_images / seconds
            row["predict"] = row["eval_batch"] / self.job.eval_batch_size
        if "step" in row:
            row["steps"] = [turn["step"] for turn in self.turns]
            row["flops_per_second"] = row["flops"] / row["step"]
            # Against the rate of the same turn.
            row["share_of_matmul_rate"] = median(
                row["flops"] / turn["step"] / turn["matmul_flops_per_second"] for turn in self.turns
            )
        return row

    def stop(self) -> None:
        """End the process."""
        if self.process:
            self.process.kill()
            self.process.join()
            self.pipe.close()


def _last_words(exit_code: int) -> str:
    """What to say of a process that ended without a word."""
    if exit_code == -9:  # the system's way with who takes too much
        return f"{OUT_OF_MEMORY}, or killed by somebody (exit code -9)"
    return f"its process ended (exit code {exit_code})"
