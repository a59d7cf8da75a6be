"""`dapt bench`: a training step and an evaluation, the plain way and ours, in one run.

Every case, a variant in one setting, lives in a process of its own, so that its peak memory is
its own, and the cases of a setting take turns at one step each, so that a shared machine's drift
meets all of them alike. Beside them stands the machine's rate of matrix products, measured in the
same turns, and the share of it that a step reaches, from counted floating-point operations. All
variants start from the same prompts, images, labels and prototypes, and say their loss.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dapt.clip.backbone import PRECISIONS, choose_device, load_backbone, load_model
from dapt.engine.allocator import keep_freed_memory
from dapt.engine.classifier import PromptedClassifier
from dapt.engine.step import Tuner
from dapt.errors import UserError
from dapt.methods import METHODS
from dapt.methods.prompts import new_prompts
from dapt.plain import PlainClassifier
from dapt.safe.files import parse_json, read_text

PLAIN = "plain"
VARIANTS = (PLAIN, *PRECISIONS)
SETTING = ("backbone", "names", "batch_size")
MATMUL_SIDE = 2048
EVAL_BATCHES = 2
OUT_OF_MEMORY = "out of memory"


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
            _Case(
                {
                    "backbone": backbone,
                    "pretrained": backbones[backbone],
                    "names": names,
                    "class_names": list(class_names[names]),
                    "batch_size": batch_size,
                    "eval_batch_size": eval_batch_size,
                    "device": device,
                    "variant": variant,
                }
            )
            for variant in variants
        ]
        for backbone, names, batch_size in product(backbones, class_names, batch_sizes)
    ]
    cases = [case for setting in settings for case in setting]
    for group in [cases] if together else settings:
        _take_turns(group, rounds, tasks, device, advance)
    if all(case.error for case in cases):
        raise UserError(str(cases[0].error))
    rows = [case.row(eval_images) for case in cases]
    _compare_losses(rows)
    return {
        "device": device,
        "eval_batch_size": eval_batch_size,
        "eval_images": eval_images,
        "rounds": rounds,
        "together": together,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cases": rows,
    }


def _take_turns(
    cases: Sequence[_Case],
    rounds: int,
    tasks: Sequence[str],
    device: str,
    advance: Callable[..., None],
) -> None:
    """Run all turns of some cases, whose processes live no longer than this."""
    try:
        for case in cases:
            case.start()
        for turn in range(rounds + 1):
            for case in cases:
                if not case.error:
                    rate = matmul_rate(PRECISIONS[_precision(case.job["variant"])], device)
                    case.take_turn(tasks, rate, counted=turn > 0)  # the first warms up
                advance(1, case.job["variant"])
        for case in cases:
            case.ask("memory")
        if "train" in tasks:
            for case in cases:
                case.ask("count")
    finally:
        for case in cases:
            case.stop()


def _compare_losses(rows: Sequence[dict[str, Any]]) -> None:
    """Put beside each loss how far, as a share, it is from the plain way's in its setting."""
    setting = {id(row): tuple(row[k] for k in SETTING) for row in rows}
    plain = {setting[id(r)]: r["loss"] for r in rows if r["variant"] == PLAIN and "loss" in r}
    for row in rows:
        expected = plain.get(setting[id(row)])
        if "loss" in row and expected:
            row["loss_difference"] = abs(row["loss"] - expected) / abs(expected)


def _precision(variant: str) -> str:
    return "fp32" if variant == PLAIN else variant


def matmul_rate(dtype: torch.dtype, device: str = "auto") -> float:
    """Floating-point operations a second of square matrix products, the best of some."""
    place = choose_device(device)
    a = torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=place).to(dtype)
    b = torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=place).to(dtype)
    product, best = torch.empty_like(a), 0.0
    for _ in range(5):
        started = _now(place)
        # Into memory already there: clearing new pages is no part of the rate.
        torch.mm(a, b, out=product)
        best = max(best, 2 * MATMUL_SIDE**3 / (_now(place) - started))
    return best


def _now(device: torch.device) -> float:
    """Seconds on the clock, once all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


class _Case:
    """One variant in one setting: its process, and what came of it."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.error = job, ""
        self.turns: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process; the model is loaded on the first task."""
        command = [sys.executable, "-m", "dapt.bench"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._send(self.job)

    def take_turn(self, tasks: Sequence[str], rate: float, *, counted: bool) -> None:
        """Run each task once, beside a rate of matrix products measured just before."""
        turn = {"matmul_flops_per_second": rate}
        for task in tasks:
            turn |= self._answer(task)
        if counted and not self.error:
            self.turns.append(turn)

    def ask(self, task: str) -> None:
        """Run a task whose figures need no turns."""
        self.figures |= self._answer(task)

    def row(self, eval_images: int) -> dict[str, Any]:
        """The setting with its figures, or with the error."""
        row: dict[str, Any] = {k: self.job[k] for k in (*SETTING, "pretrained", "variant")}
        row["classes"] = len(self.job["class_names"])
        if self.error:
            return {**row, "error": self.error}
        row |= {k: statistics.median(t[k] for t in self.turns) for k in self.turns[0]}
        row |= self.figures
        if "eval_batch" in row:
            batches = eval_images / self.job["eval_batch_size"]
            seconds = row["eval_class_features"] + batches * row["eval_batch"]
            row["eval_images_per_second"] = eval_images / seconds
        if "step" in row:
            row["steps"] = [t["step"] for t in self.turns]
            row["flops_per_second"] = row["flops"] / row["step"]
            # Against the rate of the same turn.
            row["share_of_matmul_rate"] = statistics.median(
                row["flops"] / t["step"] / t["matmul_flops_per_second"] for t in self.turns
            )
        return row

    def stop(self) -> None:
        """End the process."""
        if self.process:
            self.process.kill()
            self.process.communicate()

    def _answer(self, task: str) -> dict[str, Any]:
        """Figures of a task; none once an error is known."""
        if self.error:
            return {}
        assert self.process is not None
        assert self.process.stdout is not None
        self._send(task)
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": _last_words(self.process.wait())}
        self.error = answer.pop("error", "")
        if self.error:
            self.stop()  # what it holds is the others' to use
        return answer

    def _send(self, value: Any) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer's end of file tells why


def _last_words(exit_code: int) -> str:
    """What to say of a process that ended without a word."""
    if exit_code == -9:  # the system's way with who takes too much
        return f"{OUT_OF_MEMORY}, or killed by somebody (exit code -9)"
    return f"its process ended (exit code {exit_code})"


# ------------------------------------------------------------------------------- a worker


class _Variant:
    """One variant's model, with a training step and an evaluation batch to run."""

    def __init__(self, job: dict[str, Any]) -> None:
        name, pretrained, names = job["backbone"], job["pretrained"], job["class_names"]
        backbone = load_backbone(
            name, pretrained, device=job["device"], precision=_precision(job["variant"])
        )
        prompts = new_prompts(backbone, text_vectors=16, visual_vectors=16)
        self.device, self.plain = backbone.device, job["variant"] == PLAIN
        classifier: Any
        if self.plain:
            # Its own weights, unfolded; those that drew the prompts go before these come.
            del backbone.visual, backbone.text
            model, _, _ = load_model(name, pretrained)
            classifier = PlainClassifier(backbone, model.to(backbone.device), names, prompts)
        else:
            keep_freed_memory()
            classifier = PromptedClassifier(backbone, names, prompts, "{}")
        self.classifier = classifier

        # Drawn from a generator of their own: the same for all variants.
        draw = torch.Generator().manual_seed(0)
        shape = (3, backbone.preprocessing.size, backbone.preprocessing.size)
        self.views, self.eval_views = (
            torch.randint(0, 256, (count, *shape), generator=draw, dtype=torch.uint8)
            for count in (job["batch_size"], job["eval_batch_size"])
        )
        self.labels = torch.randint(0, len(names), (len(self.views),), generator=draw)
        with torch.no_grad():
            dimension = classifier.image_features(self.views[:1]).shape[-1]
        prototypes = F.normalize(torch.randn(len(names), dimension, generator=draw), dim=-1)
        self.tuner = _Timed(classifier, prototypes.to(self.device))

    def train(self) -> dict[str, Any]:
        """One training step: seconds of forward, of backward, of all; and its loss."""
        started = _now(self.device)
        # At a learning rate of zero, every step is the first.
        result = self.tuner.step(self.views, self.labels, lr=0.0)
        end, half = _now(self.device), self.tuner.forward_ended
        times = {"forward": half - started, "backward": end - half, "step": end - started}
        return {**times, "loss": result.total}

    @torch.inference_mode()
    def eval(self) -> dict[str, Any]:
        """Seconds of class features, once an evaluation, and of a batch of it.

        The plain way knows no "once": it makes class features for every batch.
        """
        started = _now(self.device)
        text = None if self.plain else self.classifier.text_features()
        made = _now(self.device)
        for _ in range(EVAL_BATCHES):
            image = self.classifier.image_features(self.eval_views)
            self.classifier.logits(image, self.classifier.text_features() if text is None else text)
        batch = (_now(self.device) - made) / EVAL_BATCHES
        return {"eval_class_features": 0.0 if self.plain else made - started, "eval_batch": batch}

    def memory(self) -> dict[str, Any]:
        """Peak memory, asked for before anything is counted, as counting needs memory itself."""
        if self.device.type == "cuda":
            return {"peak_bytes": torch.cuda.max_memory_allocated(self.device)}
        return {"peak_bytes": peak_memory()}

    def count(self) -> dict[str, Any]:
        """Floating-point operations of one training step, forward and backward."""
        return {"flops": count_operations(lambda: self.tuner.losses(self.views, self.labels)[0])}


class _Timed(Tuner):
    """A `Tuner` that notes when a step's forward half was done."""

    forward_ended = 0.0

    def __init__(self, classifier: Any, prototypes: torch.Tensor) -> None:
        weights = {"intra": 10.0, "inter": 0.1}
        super().__init__(classifier, METHODS["dapt"], weights, prototypes)

    def losses(self, *args: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        found = super().losses(*args)
        self.forward_ended = _now(self.prototypes.device)
        return found


class _Operations(TorchDispatchMode):
    """Sums the formulas of `FlopCounterMode`, but not over what a backward pass computes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.backward = 0, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        # A backward pass itself runs without gradients; what it computes anew runs with them.
        if formula and not (self.backward and torch.is_grad_enabled()):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def count_operations(loss: Callable[[], torch.Tensor]) -> int:
    """Floating-point operations of the matrix products of a loss and its gradients.

    What checkpoints compute a second time counts once: it is no work that the loss asks for.
    """
    # Attention is known by its matrix products, not by its fused kernel.
    with sdpa_kernel(SDPBackend.MATH), _Operations() as counter:
        total = loss()
        counter.backward = True
        total.backward()
    return counter.total


def peak_memory() -> int | None:
    """Bytes of the most memory this process ever held; None where the system does not say."""
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


def _work() -> None:
    """Read a job, then tasks, from standard input; answer each with a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    job, variant = json.loads(sys.stdin.readline()), None
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            variant = variant or _Variant(job)
            answer = getattr(variant, json.loads(line))()
        except UserError as error:
            answer = {"error": str(error)}
        except Exception as error:  # one case's end is a row, not the end of all
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            short = any(words in said.lower() for words in (OUT_OF_MEMORY, "allocate memory"))
            answer = {"error": f"{OUT_OF_MEMORY} ({said})" if short else said}
        print(json.dumps(answer), file=answers, flush=True)


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
