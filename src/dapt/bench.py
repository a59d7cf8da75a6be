"""`dapt bench`: a training step and an evaluation, the plain way and ours, in one run.

Every case, a variant on a list of class names, lives in a process of its own, so that its peak
memory is its own, and the cases take turns at one step each, so that a shared machine's drift
meets all of them alike. Beside them stands the machine's rate of matrix products, measured in the
same turns, and the share of it that a step reaches, from counted floating-point operations.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dapt.allocator import keep_freed_memory
from dapt.backbone import PRECISIONS, choose_device, load_backbone, load_model
from dapt.classifier import PromptedClassifier
from dapt.errors import UserError
from dapt.files import parse_json, read_text
from dapt.methods import METHODS
from dapt.plain import PlainClassifier
from dapt.prompts import new_prompts
from dapt.tuning import Tuner

PLAIN = "plain"
VARIANTS = (PLAIN, *PRECISIONS)
MATMUL_SIDE = 2048
EVAL_BATCHES = 2


def run_bench(
    *,
    backbone: str,
    pretrained: str | None,
    class_names: Sequence[Sequence[str]],
    batch_size: int,
    eval_batch_size: int,
    variants: Sequence[str],
    rounds: int,
    tasks: Sequence[str] = ("train", "eval"),
    device: str = "auto",
    advance: Callable[..., None] = lambda count, note="": None,
) -> dict[str, Any]:
    """Time the training step and evaluation of each variant on each list of names, in turns.

    Args:
        backbone, pretrained: as `load_backbone`; ``pretrained="random"`` needs no download.
        class_names: lists of names.
        batch_size: images a training step; ``eval_batch_size``: images a batch in evaluation.
        variants: of "plain", "fp32", "bf16", "fp16".
        rounds: turns each case takes, after one that is not counted.
        tasks: which of "train" and "eval" to time.
        device: of all variants.
        advance: is told of each finished turn.

    Returns:
        Plain values: the settings, and as ``cases`` for each variant on each list the medians
        over the rounds in seconds, images a second, peak memory in bytes, counted operations,
        their rate, and what share it is of the matrix products' in the same turns.

    Raises:
        UserError: an unknown variant, or a worker that failed; its last words are passed on.
    """
    if unknown := [v for v in variants if v not in VARIANTS]:
        raise UserError(f"unknown variant '{unknown[0]}'; use some of {', '.join(VARIANTS)}")
    job = {
        "backbone": backbone,
        "pretrained": pretrained,
        "batch_size": batch_size,
        "eval_batch_size": eval_batch_size,
        "device": device,
    }
    workers = [
        _Worker({**job, "variant": variant, "class_names": list(names)})
        for names in class_names
        for variant in variants
    ]
    turns: list[list[dict[str, float]]] = [[] for _ in workers]
    try:
        for turn in range(rounds + 1):
            for worker, results in zip(workers, turns, strict=True):
                rate = matmul_rate(PRECISIONS[_precision(worker.variant)], device)
                result = {"matmul_flops_per_second": rate}
                for task in tasks:
                    result |= worker.ask(task)
                if turn:  # the first warms up
                    results.append(result)
                advance(1, worker.variant)
        ends = [worker.ask("finish") for worker in workers]
        if "train" in tasks:
            ends = [end | worker.ask("count") for end, worker in zip(ends, workers, strict=True)]
    finally:
        for worker in workers:
            worker.stop()
    return {
        **job,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cases": [
            {"variant": worker.variant, "classes": worker.classes, **_summary(results, end)}
            for worker, results, end in zip(workers, turns, ends, strict=True)
        ],
    }


def _summary(turns: list[dict[str, float]], end: dict[str, float]) -> dict[str, Any]:
    """Medians over a case's turns; its rate is set against that of the same turn."""
    row: dict[str, Any] = {k: statistics.median(t[k] for t in turns) for k in turns[0]}
    row |= end
    if "step" not in row:
        return row
    row["steps"] = [t["step"] for t in turns]
    row["flops_per_second"] = row["flops"] / row["step"]
    row["share_of_matmul_rate"] = statistics.median(
        row["flops"] / t["step"] / t["matmul_flops_per_second"] for t in turns
    )
    return row


def _precision(variant: str) -> str:
    return "fp32" if variant == PLAIN else variant


def matmul_rate(dtype: torch.dtype, device: str = "auto") -> float:
    """Floating-point operations a second of square matrix products, the best of some."""
    place = choose_device(device)
    a = torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=place).to(dtype)
    b = torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=place).to(dtype)
    product, best = torch.empty_like(a), 0.0
    for _ in range(5):
        started = time.perf_counter()
        # Into memory already there: clearing new pages is no part of the rate.
        torch.mm(a, b, out=product)
        _wait(place)
        best = max(best, 2 * MATMUL_SIDE**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Worker:
    """A process that holds one variant and runs a step whenever asked."""

    def __init__(self, job: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "dapt.bench"]
        self.variant, self.classes = job["variant"], len(job["class_names"])
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._send(job)

    def ask(self, task: str) -> dict[str, float]:
        """Run ``task`` there and return its figures."""
        self._send(task)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(
                f"the {self.variant} variant stopped (exit code {self.process.wait()}; -9 means "
                "out of memory); leave it out with --variants, or use fewer classes or images"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer's end of file tells why


# ------------------------------------------------------------------------------- a worker


class _Variant:
    """One variant's model, with a training step and an evaluation batch to run."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.manual_seed(0)
        name, pretrained, names = job["backbone"], job["pretrained"], job["class_names"]
        backbone = load_backbone(
            name, pretrained, device=job["device"], precision=_precision(job["variant"])
        )
        prompts = new_prompts(backbone, text_vectors=16, visual_vectors=16)
        size = backbone.preprocessing.size
        self.backbone = backbone
        self.views = torch.randint(0, 256, (job["batch_size"], 3, size, size), dtype=torch.uint8)
        self.eval_views = torch.randint(
            0, 256, (job["eval_batch_size"], 3, size, size), dtype=torch.uint8
        )
        self.labels = torch.randint(0, len(names), (job["batch_size"],))
        self.plain = job["variant"] == PLAIN
        if not self.plain:
            keep_freed_memory()
        classifier: Any
        if self.plain:
            model, _, _ = load_model(name, pretrained)
            classifier = PlainClassifier(backbone, model.to(backbone.device), names, prompts)
            # Its own weights; what was only loaded to draw the prompts goes.
            del backbone.visual, backbone.text
        else:
            classifier = PromptedClassifier(backbone, names, prompts, "{}")
        self.classifier = classifier
        with torch.no_grad():
            prototypes = torch.randn_like(classifier.text_features())
        self.tuner = _Timed(classifier, prototypes)

    def train(self) -> dict[str, float]:
        """One training step: seconds of forward, of backward, of all."""
        return self.tuner.timed_step(self.views, self.labels, self.backbone.device)

    @torch.inference_mode()
    def eval(self) -> dict[str, float]:
        """Evaluation of some batches: images a second, class features included as each does."""
        started = time.perf_counter()
        text = None if self.plain else self.classifier.text_features()
        once = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(EVAL_BATCHES):
            if text is None:
                self.classifier(self.eval_views)
            else:
                image = self.classifier.image_features(self.eval_views)
                self.classifier.logits(image, text)
        _wait(self.backbone.device)
        seconds = time.perf_counter() - started
        count = EVAL_BATCHES * len(self.eval_views)
        return {"eval_images_per_second": count / seconds, "eval_class_features": once}

    def finish(self) -> dict[str, float]:
        """Peak memory, asked for before anything is counted, as counting needs memory itself."""
        if self.backbone.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.backbone.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"peak_bytes": peak}

    def count(self) -> dict[str, float]:
        """Floating-point operations of one training step, forward and backward."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        # The counter knows attention by its matrix products, not by its fused kernel.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.train()
        return {"flops": float(counter.get_total_flops())}


class _Timed(Tuner):
    """A `Tuner` that says how long the halves of a step take."""

    def __init__(self, classifier: Any, prototypes: torch.Tensor) -> None:
        weights = {"intra": 10.0, "inter": 0.1}
        super().__init__(classifier, METHODS["dapt"], weights, prototypes)

    def timed_step(
        self, views: torch.Tensor, labels: torch.Tensor, device: torch.device
    ) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        _wait(device)
        started = time.perf_counter()
        total, _, _ = self.losses(views, labels)
        _wait(device)
        half = time.perf_counter()
        total.backward()
        self.optimizer.step()
        _wait(device)
        end = time.perf_counter()
        return {"forward": half - started, "backward": end - half, "step": end - started}


def _work() -> None:
    """Read a job, then tasks, from standard input; answer each with a line of JSON."""
    job, variant = json.loads(sys.stdin.readline()), None
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            variant = variant or _Variant(job)
            answer = getattr(variant, json.loads(line))()
        except UserError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def read_class_names(path: Path) -> list[str]:
    """Class names from a JSON list, or from a text file, one a line.

    Raises:
        UserError: the file cannot be read or names no class.
    """
    try:
        text = read_text(path)
        value = parse_json(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"class names file {path} cannot be read ({error})") from error
    if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
        raise UserError(f"class names file {path} must hold a list of names")
    names = [n.strip() for n in value if n.strip()]
    if not names:
        raise UserError(f"class names file {path} names no class")
    return names


if __name__ == "__main__":
    _work()
