"""Tuning in memory: images and settings in, a classifier out.

Whatever is random in a step (order, views, dropout) is a function of the seed and the step's
number alone. So a journal needs to keep only what is learned, its momentum and that number, and a
run that was killed continues to the same bits as one that never was.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import tee
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.clip.sources import taken_for_granted
from dapt.data import ImageStore
from dapt.engine.classifier import Classifier, new_classifier
from dapt.engine.data import Data, tell_notes
from dapt.engine.features import Shared, Support, backbone_of, chunks, encode_store
from dapt.engine.memory import keep_freed_memory
from dapt.engine.processes import join_processes
from dapt.engine.step import WARMUP_LR, StepResult, Tuner, learning_rate
from dapt.errors import UserError
from dapt.methods import Evidence, get_method
from dapt.methods.contract import Examples
from dapt.progress import Reporter
from dapt.settings import Settings, loss_weights


class Interrupted(Exception):
    """Tuning was asked to stop; its journal has kept where it stood."""


class Diverged(UserError):
    """The loss, what is learned, or the features that it leads to are no longer finite."""


class Journal:
    """Where the progress of tuning is kept; by itself, in memory.

    Attributes:
        header: of a step's row: step, epoch, lr, loss, cross_entropy, loss terms, accuracy.
        rows: one for each step so far.
    """

    def __init__(self) -> None:
        self.header: list[str] = []
        self.rows: list[list[float]] = []

    def begin(self, data: Data, backbone: Backbone) -> None:
        """What is tuned on was found in order; nothing has been tuned yet."""

    def checkpoint(self) -> tuple[dict[str, Tensor], int, float] | None:
        """State to go on from, steps and seconds so far; None to begin at the beginning."""
        return None

    def open(self, terms: Sequence[str], steps: int) -> None:
        """Steps follow, after so many that are known already."""
        self.header = ["step", "epoch", "lr", "loss", "cross_entropy", *terms, "accuracy"]

    def add(self, step: int, epoch: int, lr: float, result: StepResult) -> None:
        """One step was taken."""
        losses = [result.total, result.cross_entropy, *result.terms.values()]
        self.rows.append([step, epoch, lr, *losses, result.accuracy])

    def save(self, state: dict[str, Tensor], step: int, seconds: float) -> None:
        """Keep a state to go on from."""

    def close(self) -> None:
        """No more steps follow."""

    def after_divergence(self, steps: int) -> str:
        """Where the last good state of so many steps is, and how to begin anew."""
        return "; tune again"


@dataclass(frozen=True)
class Tuned:
    """What came of `fit`.

    Attributes:
        settings: it was made with.
        data: what was tuned on, without images that could not be read; ``skipped`` records those.
        support: the support set as the backbone sees it.
        classifier: the result.
        seconds: of tuning, earlier sessions' included.
        rose: mean cross-entropy of the first and last epoch, where it grew as it should not.
    """

    settings: Settings
    data: Data
    support: Support
    classifier: Classifier
    seconds: float
    rose: dict[str, float] | None
    skipped: list[dict[str, str]]


def fit(
    data: Data,
    settings: Settings,
    *,
    shared: Shared | None = None,
    journal: Journal | None = None,
    reporter: Reporter | None = None,
) -> Tuned:
    """Tune a classifier on a support set.

    Args:
        data: the task, and the images to tune on.
        settings: from `make_settings`.
        shared: a loaded backbone, as the settings say, and what earlier runs read with it.
        journal: keeps the progress, to resume from.
        reporter: is told the progress.

    Raises:
        UserError: bad input.
        Diverged: the numbers are no longer finite.
        Interrupted: the process got SIGINT or SIGTERM; the same call with its journal continues.

    Of several processes that ``torchrun`` started, all tune and the first keeps the journal.
    """
    reporter, journal = reporter or Reporter(), journal or Journal()
    keep_freed_memory()
    processes = join_processes()
    shared = shared or Shared(backbone_of(settings, device=processes.device(settings.device)))
    method, task = get_method(settings.method), data.task
    classifier = new_classifier(shared.backbone, task.class_names, task.template, method, settings)
    support = shared.support(data, settings, reporter)
    data, skipped = replace(data, support=support.drawn), support.skipped
    tell_notes(task, reporter)
    if (guessed := taken_for_granted(settings.backbone)) is not None:
        reporter.warn(guessed)
    if processes.first:
        journal.begin(data, shared.backbone)
    else:
        reporter, journal = Reporter(), Journal()
    started, spent, rose = time.perf_counter(), 0.0, None
    if method.learns:
        spent = _Loop(classifier, settings, support, journal, reporter).run()
        if (rose := _rise(journal.rows)) is not None:
            reporter.warn(
                f"cross-entropy rose from {rose['first']:.2f} in the first epoch to "
                f"{rose['last']:.2f} in the last: learning rate {settings.lr:g} may be too high; "
                f"compare with a smaller --lr, such as {settings.lr / 10:g}"
            )
    if method.head.fitted:
        evidence, more = _evidence(classifier, data, settings, support, shared, reporter)
        classifier.head.fit(evidence, settings)
        classifier.head.to(shared.backbone.device)
        skipped = skipped + more
    seconds = spent + time.perf_counter() - started
    return Tuned(settings, data, support, classifier, seconds, rose, skipped)


# -------------------------------------------------------------------------------- a head


def _evidence(
    classifier: Classifier,
    data: Data,
    settings: Settings,
    support: Support,
    shared: Shared,
    reporter: Reporter,
) -> tuple[Evidence, list[dict[str, str]]]:
    """What a head is fitted on, and a record of the val images that could not be read."""
    features, val, skipped = support.features, None, list[dict[str, str]]()
    if classifier.changes_images:
        size = settings.eval_batch_size
        features = encode_store(classifier.image_features, support.store, batch_size=size)
    if items := data.support.val:
        found = shared.encode(data.task, items, settings, classifier, what="val", reporter=reporter)
        val, skipped = Examples(found.features, found.labels), found.skipped
    with torch.inference_mode():
        text = classifier.text_features().cpu().clone()
    evidence = Evidence(
        Examples(features, support.labels),
        val,
        text,
        classifier.backbone.logit_scale,
        lambda count: _train_views(classifier, support.store, settings, count),
    )
    return evidence, skipped


def _train_views(
    classifier: Classifier, store: ImageStore, settings: Settings, count: int
) -> Tensor:
    """(count, n, D) features of training views, not normalised, on the CPU."""
    lists = chunks(len(store), settings.eval_batch_size)
    wanted = ((epoch, indices) for epoch in range(count) for indices in lists)
    with torch.inference_mode():
        found = [
            classifier.image_features(views, normalized=False)
            for views in store.train_batches(wanted, seed=settings.seed)
        ]
    return torch.cat(found).cpu().clone().unflatten(0, (count, len(store)))


# --------------------------------------------------------------------------------- the loop


class _Loop:
    """Steps over shuffled batches, from the journal's last checkpoint if it has one."""

    def __init__(
        self,
        classifier: Classifier,
        settings: Settings,
        support: Support,
        journal: Journal,
        reporter: Reporter,
    ) -> None:
        self.classifier, self.settings, self.support = classifier, settings, support
        self.journal, self.reporter = journal, reporter
        self.method = get_method(settings.method)
        self.tuner = Tuner(classifier, settings, support.prototypes)
        self.finish = self.method.finish(settings, settings.epochs)
        self.per_epoch = steps_per_epoch(len(support.store), settings.batch_size)
        self.total = self.per_epoch * settings.epochs
        self.done, self.saved, self.lr, self.spent = 0, 0, 0.0, 0.0
        self.started = time.perf_counter()

    def run(self) -> float:
        """Take all steps that are left.

        Returns:
            Seconds that earlier sessions had spent.
        """
        self._resume()
        self.journal.open([term.name for term in self.method.losses], self.done)
        try:
            with (
                self.reporter.stage(f"tuning {self.method.title}", self.total) as advance,
                _stop_signal() as stop,
            ):
                advance(self.done)
                for epoch, result in self._steps():
                    terms = " ".join(f"{k} {v:.4f}" for k, v in result.terms.items())
                    accuracy = f"acc {result.accuracy:.0%}"
                    advance(1, f"ce {result.cross_entropy:.3f} {terms} {accuracy}")
                    ended = self.done % self.per_epoch == 0
                    if ended:
                        self.finish.after_epoch(epoch, self.tuner.named)
                    if self.tuner.processes.any(stop.is_set()):
                        self._save()
                        raise Interrupted
                    due = ended and (epoch + 1) % self.settings.checkpoint_every == 0
                    if due or self.done == self.total:
                        self._save()
                if stop.is_set():  # while the last checkpoint was written
                    raise Interrupted
        finally:
            self.journal.close()
        with torch.no_grad():
            for name, tensor in self.finish.end(self.tuner.named).items():
                self.tuner.named[name].copy_(tensor)
        return self.spent

    def _steps(self) -> Iterator[tuple[int, StepResult]]:
        """Take the steps one by one; yields each one's epoch and losses."""
        settings, tuner, labels = self.settings, self.tuner, self.support.labels
        ahead, now = tee(_batches(settings, len(self.support.store), self.done))
        views = self.support.store.train_batches(
            ((epoch, indices[tuner.processes.part(indices)]) for epoch, indices in ahead),
            seed=settings.seed,
        )
        for (epoch, indices), batch in zip(now, views, strict=True):
            self.lr = learning_rate(epoch, settings.epochs, settings.lr)
            generator = torch.Generator().manual_seed(_mix(settings.seed, self.done))
            mine = indices[tuner.processes.part(indices)]
            result = tuner.step(batch, labels[mine], self.lr, generator, len(indices))
            self.journal.add(self.done, epoch, self.lr, result)
            self.done += 1
            if not isfinite(result.total):
                raise self._diverged(f"loss became {result.total}")
            yield epoch, result

    def _resume(self) -> None:
        processes = self.tuner.processes
        found = processes.share(self.journal.checkpoint() if processes.first else None)
        if found is None:
            return
        state, self.done, self.spent = found
        averages = {n: state.pop(n) for n in list(state) if n.startswith("finish.")}
        if self.done > self.total or not self.tuner.fits(state):
            raise UserError(
                "the checkpoint of this run does not hold what its method learns; delete it to "
                "start the run's tuning anew"
            )
        self.tuner.load_state(state)
        self.finish.load_state(averages)
        self.saved = self.done

    def _save(self) -> None:
        state = self.tuner.state()
        if not all(bool(t.isfinite().all()) for t in state.values()):
            raise self._diverged("prompts are no longer finite")
        # The loss was that of the prompts before the last step; finite ones may be huge.
        if not _useful(self.classifier, self.support.store):
            raise self._diverged("features are no longer finite")
        kept = {f"finish.{name}": tensor for name, tensor in self.finish.state().items()}
        seconds = self.spent + time.perf_counter() - self.started
        self.journal.save({**state, **kept}, self.done, seconds)
        self.saved = self.done

    def _diverged(self, what: str) -> Diverged:
        settings, way = self.settings, f"and a smaller --lr, such as {self.settings.lr / 10:g}"
        if self.lr <= WARMUP_LR:
            weights = ", ".join(f"{k} {v:g}" for k, v in loss_weights(settings).items()) or "none"
            way = (
                f"and --precision fp32 (it is {settings.precision}), smaller loss weights (they "
                f"are {weights}) or weight_decay ({settings.weight_decay:g}), or another backbone "
                f"than '{settings.backbone}', whose weights may be damaged"
            )
        return Diverged(
            f"the {what} at step {self.done - 1} of log.csv, with learning rate {self.lr:g}"
            f"{self.journal.after_divergence(self.saved)} {way}"
        )


def _useful(classifier: Classifier, store: ImageStore) -> bool:
    """Whether what is learned leads to finite features: of all classes, and of an image."""
    with torch.inference_mode():
        found = [classifier.text_features()]
        if classifier.changes_images:  # the backbone's own were looked at already
            found.append(classifier.image_features(store.test_views([0])))
        return all(bool(features.isfinite().all()) for features in found)


# Growth of cross-entropy over a run that says it went astray; below, it may be chance.
_ASTRAY = 1.25


def _rise(rows: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """Mean cross-entropy of a journal's first and last epoch, if it grew as it should not."""
    epochs: dict[float, list[float]] = {}
    for _, epoch, _, _, cross_entropy, *_ in rows:
        epochs.setdefault(epoch, []).append(cross_entropy)
    if not epochs:  # the log was taken away
        return None
    first, *_, last = [sum(e) / len(e) for e in epochs.values()] * 2
    return {"first": first, "last": last} if last > _ASTRAY * first + 0.1 else None


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches in the support set; at least one, however small it is."""
    return max(1, images // batch_size)


def epoch_order(images: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of one epoch: a shuffle by seed and epoch, its last incomplete batch dropped.

    A support set smaller than one batch is one batch.
    """
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    order = torch.randperm(images, generator=generator).tolist()
    size = min(batch_size, images)
    return [order[i * size : (i + 1) * size] for i in range(steps_per_epoch(images, batch_size))]


def _batches(settings: Settings, images: int, done: int) -> Iterator[tuple[int, list[int]]]:
    """Epoch and image indices of each step after the first ``done`` ones."""
    per_epoch = steps_per_epoch(images, settings.batch_size)
    for epoch in range(done // per_epoch, settings.epochs):
        order = epoch_order(images, settings.batch_size, settings.seed, epoch)
        for indices in order[max(0, done - epoch * per_epoch) :]:
            yield epoch, indices


def _mix(seed: int, number: int) -> int:
    """One generator seed for each pair; consecutive ones are unrelated."""
    return (seed * 1_000_003 + number * 7_919 + 12_345) % 2**63


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event set by SIGINT or SIGTERM, so that a run stops between two steps.

    A second signal acts as it would without us. Off the main thread signals are left alone.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.getsignal(n) or signal.SIG_DFL for n in numbers}

    def handle(number: int, _frame: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, before[number])
