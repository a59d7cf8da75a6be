"""What a case's own process does: load one variant, then answer task after task with figures."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.meters import count_operations, now
from benchmarks.plain import PlainClassifier, all_tokens
from dapt.clip.backbone import Backbone
from dapt.clip.sources import load_backbone, load_model
from dapt.engine.classifier import Classifier, tuning_head
from dapt.engine.cost import peak_memory
from dapt.engine.processes import keep_freed_memory
from dapt.engine.step import Tuner
from dapt.errors import UserError
from dapt.methods import Evidence, get_method
from dapt.methods.contract import Examples
from dapt.settings import make_settings

PLAIN = "plain"
EVAL_BATCHES = 2
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Job:
    """A case: one variant in one setting, which is a backbone, a list of names, a batch size."""

    backbone: str
    pretrained: str | None
    names: str
    class_names: list[str]
    batch_size: int
    eval_batch_size: int
    device: str
    variant: str
    method: str = "dapt"

    @property
    def precision(self) -> str:
        """That of the towers."""
        return "fp32" if self.variant == PLAIN else self.variant


def work(pipe: Connection, job: Job) -> None:
    """Answer each task, the name of a method of `Variant`, until the pipe is closed."""
    variant = None
    # Standard output is for the table; EOFError is the pipe's end.
    with redirect_stdout(sys.stderr), suppress(EOFError):
        while True:
            task = pipe.recv()
            try:
                variant = variant or Variant(job)
                answer = getattr(variant, task)()
            except UserError as error:
                answer = {"error": str(error)}
            except Exception as error:  # one case's end is a row, not the end of all
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                short = any(words in said.lower() for words in (OUT_OF_MEMORY, "allocate memory"))
                answer = {"error": f"{OUT_OF_MEMORY} ({said})" if short else said}
            pipe.send(answer)


class Variant:
    """One variant's model, with a training step and an evaluation batch to run."""

    def __init__(self, job: Job, backbone: Backbone | None = None) -> None:
        """The ``backbone`` is loaded, unless it is given."""
        names, own = job.class_names, backbone is None
        backbone = backbone or load_backbone(
            job.backbone, job.pretrained, device=job.device, precision=job.precision
        )
        row = get_method(job.method)
        settings = make_settings({
            "dataset": "bundled", "method": job.method, "beta_visual": 10.0, "beta_text": 0.1,
            # What a teacher says of more of them is made once, before all steps.
            **({"templates": ["a photo of a {}."]} if row.changes("text") else {}),
        })  # fmt: skip
        self.device, self.plain = backbone.device, job.variant == PLAIN
        self.learns, self.head = row.learns, row.head
        parts = [part.create_for(backbone, settings, len(names)) for part in row.parts]
        classifier: Any
        if self.plain and job.method == "dapt":
            # Its own weights, unfolded; those that drew the prompts go before these come.
            if own:
                del backbone.visual, backbone.text
            model, _, _ = load_model(job.backbone, job.pretrained)
            classifier = PlainClassifier(backbone, model.to(backbone.device), names, parts)
        else:
            keep_freed_memory()
            head = tuning_head(backbone, settings) if row.learns else row.head.create(backbone)
            classifier = Classifier(backbone, names, parts, head)
            if self.plain:
                all_tokens(classifier)
        self.classifier, self.settings = classifier, settings

        # Drawn from a generator of their own: the same for all variants.
        draw = torch.Generator().manual_seed(0)
        shape = (3, backbone.preprocessing.size, backbone.preprocessing.size)
        self.views, self.eval_views = (
            torch.randint(0, 256, (count, *shape), generator=draw, dtype=torch.uint8)
            for count in (job.batch_size, job.eval_batch_size)
        )
        self.labels = torch.randint(0, len(names), (len(self.views),), generator=draw)
        with torch.no_grad():
            dimension = classifier.image_features(self.views[:1]).shape[-1]
        prototypes = F.normalize(torch.randn(len(names), dimension, generator=draw), dim=-1)
        if row.learns:
            self.tuner = _Timed(classifier, settings, prototypes)
        elif row.head.fitted:
            self.fit_seconds = self._fit(prototypes.shape[-1], draw)

    def _fit(self, dimension: int, draw: torch.Generator) -> float:
        """Seconds of fitting the head to features (n, D) of nothing, four of each class."""
        own, classes = self.classifier, len(self.classifier.class_names)
        shape = (4 * classes, dimension)
        features = F.normalize(torch.randn(shape, generator=draw), dim=-1)
        support = Examples(features, torch.arange(classes).repeat(4))
        text, lengths = own.text_features().cpu(), own.text_lengths().cpu()
        views = partial(_views, features)
        evidence = Evidence(support, None, text, own.backbone.logit_scale, views, lengths)
        started = now(self.device)
        own.head.fit(evidence, self.settings)
        seconds = now(self.device) - started
        own.head.to(self.device)
        return seconds

    def train(self) -> dict[str, Any]:
        """One training step: seconds of forward, of backward, of all; and its loss.

        Beside them stand the seconds that all of the process's threads worked, which others on the
        machine lengthen least. Of a head that is fitted, the seconds of that.
        """
        if not self.learns:
            return {"fit": self.fit_seconds} if self.head.fitted else {}
        # At a learning rate of zero, every step is the first; what is random in one is drawn.
        drawn = torch.Generator().manual_seed(0)
        worked, started = time.process_time(), now(self.device)
        result = self.tuner.step(self.views, self.labels, 0.0, drawn)
        end, half = now(self.device), self.tuner.forward_ended
        times = {"forward": half - started, "backward": end - half, "step": end - started}
        return {**times, "step_cpu": time.process_time() - worked, "loss": result.total}

    @torch.inference_mode()
    def eval(self) -> dict[str, Any]:
        """Seconds of class features, once an evaluation, and of a batch of it.

        The plain way knows no "once": it makes class features for every batch.
        """
        started = now(self.device)
        own = self.classifier
        each = getattr(own, "reads_images", False)  # class features are made for each image
        text = None if self.plain or each else own.text_features()
        made = now(self.device)
        for _ in range(EVAL_BATCHES):
            image = own.encode(self.eval_views)
            text_of = own.text_features(image) if each or text is None else text
            own.logits(image, text_of)
        batch = (now(self.device) - made) / EVAL_BATCHES
        return {"eval_class_features": 0.0 if self.plain else made - started, "eval_batch": batch}

    def memory(self) -> dict[str, Any]:
        """Peak memory, asked for before anything is counted, as counting needs memory itself."""
        return {"peak_bytes": peak_memory(self.device)}

    def count(self) -> dict[str, Any]:
        """Operations of one training step, forward and backward, and how many numbers it learns."""
        own = self.classifier
        learned = {"learned": sum(p.numel() for p in own.learned().values())}
        if not self.learns:
            return {"learned": own.learned_parameters}
        return learned | {
            "flops": count_operations(lambda: self.tuner.losses(self.views, self.labels)[0])
        }


def _views(features: torch.Tensor, count: int) -> torch.Tensor:
    """(V, n, D), each the same."""
    return features.expand(count, -1, -1)


class _Timed(Tuner):
    """A `Tuner` that notes when a step's forward half was done."""

    forward_ended = 0.0

    def losses(self, *args: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        found = super().losses(*args)
        self.forward_ended = now(self.prototypes.device)
        return found
