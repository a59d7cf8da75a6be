"""Tuning in memory: images and settings in, a classifier out.

Whatever is random in a step (order, views, dropout) is a function of the seed and the step's
number alone. So a journal needs to keep only what is learned, its momentum and that number, and a
run that was killed continues to the same bits as one that never was.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, tee
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.clip.known import names_of
from dapt.clip.sources import taken_for_granted
from dapt.data import Task
from dapt.engine.classifier import Classifier, new_classifier, parts_of, tuning_head
from dapt.engine.data import Data, tell_notes
from dapt.engine.features import (
    Shared,
    Support,
    backbone_of,
    chunks,
    classes_if_several,
    labels_of,
)
from dapt.engine.processes import join_processes, keep_freed_memory
from dapt.engine.step import WARMUP_LR, StepResult, Tuner
from dapt.engine.suited import nobody, suited
from dapt.errors import UserError
from dapt.methods import METHODS, Evidence, TowerPart, get_method
from dapt.methods.contract import Examples
from dapt.methods.fitting import scheduled
from dapt.methods.held_out import HeldOut
from dapt.methods.sigmoids import as_everywhere
from dapt.progress import Reporter
from dapt.settings import Settings, loss_weights


class Interrupted(Exception):
    """Tuning was asked to stop; its journal has kept where it stood."""


class Diverged(UserError):
    """The loss, what is learned, or the features that it leads to are no longer finite."""


@dataclass(kw_only=True)
class Journal:
    """Where the progress of tuning is kept; by itself, in memory.

    A row for each step: step, epoch, lr, loss, cross_entropy, loss terms, accuracy.
    """

    header: list[str] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)

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

    def after_divergence(self, steps: int) -> str:
        """Where the last good state of so many steps is, and how to begin anew."""
        return "; tune again"


@dataclass(frozen=True)
class Tuned:
    """What came of `fit`."""

    settings: Settings  # as `suited` to the backbone
    data: Data  # without images that could not be read, which ``skipped`` records
    support: Support
    classifier: Classifier
    skipped: list[dict[str, str]]
    seconds: float = 0.0  # of tuning, earlier sessions' included
    rose: dict[str, float] | None = None  # cross-entropy of first and last epoch, if it grew much
    held_out: HeldOut | None = None  # what a head said of support images it was not fitted on
    val: Examples | None = (
        None  # where a head is fitted, the val images as the classifier sees them
    )


def fit(
    data: Data,
    settings: Settings,
    *,
    shared: Shared | None = None,
    journal: Journal | None = None,
    reporter: Reporter | None = None,
) -> Tuned:
    """Tune a classifier on a support set.

    If ``torchrun`` started several processes, all of them tune, and the first writes the journal.

    Args:
        settings: settings from `make_settings`.
        shared: a backbone loaded with the same settings, and what earlier runs cached with it.
        journal: records the progress, so that tuning can be resumed.

    Raises: UserError: bad input, or (`Diverged`) numbers are no longer finite. Interrupted: the
    process got SIGINT or SIGTERM; call again with the same journal to continue.
    """
    reporter, journal = reporter or Reporter(), journal or Journal()
    require_method(data.task, settings.method)
    keep_freed_memory()
    processes = join_processes()
    shared = shared or Shared(backbone_of(settings, device=processes.device(settings.device)))
    tell = reporter.warn if processes.first else nobody
    settings = suited(settings, data.task.class_names, shared.backbone, tell)
    method, task = get_method(settings.method), data.task
    row = (task.class_names, task.template, method, settings)
    classifier = new_classifier(shared.backbone, *row, multilabel=task.multilabel)
    classifier.grey = task.grey
    support = shared.support(data, settings, reporter)
    data = replace(data, support=support.drawn)
    tuned = Tuned(settings, data, support, classifier, support.skipped)
    tell_notes(task, reporter)
    for guessed in filter(None, map(taken_for_granted, names_of(settings.backbone))):
        reporter.warn(guessed)
    if processes.first:
        journal.begin(data, shared.backbone)
    else:
        reporter, journal = Reporter(), Journal()
    started, spent, rose = time.perf_counter(), 0.0, None
    if method.learns:
        # What is tuned in the towers is tuned for cosines; a head that is fitted comes after.
        head, classifier.head = classifier.head, tuning_head(shared.backbone, settings)
        spent = _Loop(tuned, journal, reporter).run()
        classifier.end_tuning(head)
        if rose := _rise(journal.rows):
            reporter.warn(
                f"cross-entropy rose from {rose['first']:.2f} in the first epoch to "
                f"{rose['last']:.2f} in the last: learning rate {settings.lr:g} may be too high; "
                f"compare with a smaller lr, such as {settings.lr / 10:g}"
            )
    if method.head.fitted:
        tuned = _fit_head(tuned, shared, reporter)
    if task.multilabel:
        tuned = _fit_sigmoids(tuned)
    return replace(tuned, seconds=spent + time.perf_counter() - started, rose=rose)


def _fit_head(tuned: Tuned, shared: Shared, reporter: Reporter) -> Tuned:
    """Fit what follows the towers."""
    settings, classifier, support = tuned.settings, tuned.classifier, tuned.support
    store, task, val, skipped = support.store, tuned.data.task, None, list[dict[str, str]]()
    if items := support.drawn.val:
        found = shared.encode(task, items, settings, classifier, what="val", reporter=reporter)
        val, skipped = Examples(found.features, found.labels), found.skipped

    def train_views(count: int) -> Tensor:
        lists = chunks(len(store), settings.eval_batch_size)
        wanted = ((epoch, indices) for epoch in range(count) for indices in lists)
        with torch.inference_mode():
            found = [
                classifier.image_features(views, normalized=False)
                for views in store.train_batches(wanted, seed=settings.seed)
            ]
        return torch.cat(found).cpu().clone().unflatten(0, (count, len(store)))

    with torch.no_grad():  # not in inference mode: a head may need gradients of what it makes of it
        text, lengths = classifier.text_features().cpu().clone(), classifier.text_lengths().cpu()
    own = Examples(support.features_of(classifier, settings), support.labels)
    scale = classifier.backbone.logit_scale
    everywhere = labels_of(task.train, classes_if_several(task))
    evidence = Evidence(own, val, text, scale, train_views, lengths, everywhere)
    held_out = classifier.head.fit(evidence, settings)
    head, device = classifier.head.to(shared.backbone.device), shared.backbone.device
    with torch.inference_mode():
        text = text.to(device)
        # Some rows at a time: of many classes, all logits would not fit into memory.
        logits = (classifier.logits(z.to(device), text) for z in own.features.split(_ROWS))
        finite = _finite(head.state_dict().values()) and _finite(logits)
    if not finite:
        names = ", ".join(head.Settings.model_fields) or "backbone"
        raise Diverged(
            f"what {get_method(settings.method).title} fits is no longer finite; give other values "
            f"of {names} ('dapt settings' says what they mean)"
        )
    return replace(tuned, skipped=[*tuned.skipped, *skipped], held_out=held_out, val=val)


def require_method(task: Task, name: str) -> None:
    """Raise `UserError` where images have several labels, and the method gives them one."""
    method = get_method(name)
    if task.multilabel and not (method.still or (method.head.multilabel and not method.learns)):
        able = [n for n, m in METHODS.items() if m.still or (m.head.multilabel and not m.learns)]
        what = f"images of '{task.name}' have several labels, and method '{name}' gives them one"
        raise UserError(f"{what}; use {', '.join(able[:-1])} or {able[-1]}")


def _fit_sigmoids(tuned: Tuned) -> Tuned:
    """Fit what turns logits into probabilities of each class, on images that were held out.

    A method that learns nothing holds all support images out. Where nothing could be left out,
    those images have to do that were fitted on. Labels are weighed as frequent as they are among
    all the task's images to tune on.
    """
    classifier, support, task = tuned.classifier, tuned.support, tuned.data.task
    held, classes = tuned.held_out, len(task.class_names)

    def said_of(features: Tensor, labels: Tensor) -> HeldOut:
        with torch.inference_mode():
            text = classifier.text_features()
            rows = [classifier.logits(z.to(text.device), text).cpu() for z in features.split(_ROWS)]
        return HeldOut(torch.cat(rows).clone(), labels)

    found = [held] if held is not None else []
    if tuned.val is not None and not classifier.head.reads_val:  # such a head has said it already
        found.append(said_of(tuned.val.features, tuned.val.labels))
    fair = bool(found) or get_method(tuned.settings.method).still
    if not found:
        found.append(said_of(support.features_of(classifier, tuned.settings), support.labels))
    logits, labels = (torch.cat([getattr(h, n) for h in found]) for n in ("logits", "labels"))
    weights = as_everywhere(labels, labels_of(task.train, classes))
    if classifier.sigmoids is not None:
        classifier.sigmoids.cpu().fit(logits, labels, weights)
        classifier.sigmoids.to(classifier.backbone.device)
    return replace(tuned, held_out=HeldOut(logits, labels) if fair else None)


@dataclass
class _Loop:
    """Steps over shuffled batches, from the journal's last checkpoint if it has one."""

    tuned: Tuned
    journal: Journal
    reporter: Reporter

    def __post_init__(self) -> None:
        self.settings, self.support = settings, support = self.tuned.settings, self.tuned.support
        self.method = get_method(settings.method)
        classifier = self.tuned.classifier
        prototypes = classifier.as_own(support.prototypes)
        for part in classifier.parts:
            cast(TowerPart, part).begin(prototypes)
        self.tuner = Tuner(classifier, settings, prototypes)
        self.per_epoch = steps_per_epoch(len(support.store), settings.batch_size)
        self.total = total_steps(settings, len(support.store))
        self.epochs = -(-self.total // self.per_epoch)
        self.finish = self.method.finish(settings, self.epochs)
        for term in self.tuner.terms:
            if term.tower and not parts_of(classifier.parts, term.tower):
                self.reporter.warn(
                    f"loss term '{term.name}' changes nothing: {settings.method} learns nothing "
                    f"in the {term.tower} tower"
                )
        self.done, self.saved, self.lr, self.spent = 0, 0, 0.0, 0.0
        self.started = time.perf_counter()

    def run(self) -> float:
        """Take all steps that are left; returns the seconds that earlier sessions had spent."""
        self._resume()
        self.journal.open([term.name for term in self.tuner.terms], self.done)
        stage = self.reporter.stage(f"tuning {self.method.title}", self.total)
        with stage as advance, _stop_signal() as stop:
            advance(self.done)
            for epoch, result in self._steps():
                terms = " ".join(f"{k} {v:.4f}" for k, v in result.terms.items())
                advance(1, f"ce {result.cross_entropy:.3f} {terms} acc {result.accuracy:.0%}")
                if ended := self.done % self.per_epoch == 0 or self.done == self.total:
                    self.finish.after_epoch(epoch, self.tuner.named)
                if self.tuner.processes.any(stop.is_set()):
                    self._save()
                    raise Interrupted
                due = ended and (epoch + 1) % self.settings.checkpoint_every == 0
                if due or self.done == self.total:
                    self._save()
            if stop.is_set():  # while the last checkpoint was written
                raise Interrupted
        with torch.no_grad():
            for name, tensor in self.finish.end(self.tuner.named).items():
                self.tuner.named[name].copy_(tensor)
        return self.spent

    def _steps(self) -> Iterator[tuple[int, StepResult]]:
        """Take the steps one by one; yields each one's epoch and losses."""
        settings, tuner, store = self.settings, self.tuner, self.support.store
        first, done = divmod(self.done, self.per_epoch)
        steps = (
            (epoch, batch, batch[tuner.processes.part(batch)])
            for epoch in range(first, self.epochs)
            for batch in epoch_order(len(store), settings.batch_size, settings.seed, epoch)
        )
        ahead, now = tee(islice(steps, done, done + self.total - self.done))
        own = ((epoch, indices) for epoch, _, indices in ahead)
        views = store.train_batches(own, seed=settings.seed)
        for (epoch, batch, indices), seen in zip(now, views, strict=True):
            how = (settings.schedule, self.done, settings.lr, self.total, self.per_epoch)
            self.lr = scheduled(*how)
            generator, labels = _generator(settings.seed, self.done), self.support.labels[indices]
            result = tuner.step(seen, labels, self.lr, generator, len(batch))
            self.journal.add(self.done, epoch, self.lr, result)
            self.done += 1
            if not isfinite(result.total):
                raise self._diverged(f"loss became {result.total}")
            yield epoch, result

    def _resume(self) -> None:
        # Of several processes, those that keep no journal have no checkpoint.
        if (found := self.tuner.processes.share(self.journal.checkpoint())) is None:
            return
        state, self.done, self.spent = found
        finish = {n: state.pop(_OF_FINISH + n) for n in _names_of_finish(state)}
        if self.done > self.total or not self.tuner.fits(state):
            raise UserError(
                "the checkpoint of this run does not hold what its method learns; delete it to "
                "start the run's tuning anew"
            )
        self.tuner.load_state(state)
        self.finish.load_state(finish)
        self.saved = self.done

    def _save(self) -> None:
        state, classifier = self.tuner.state(), self.tuned.classifier
        if not _finite(state.values()):
            raise self._diverged("prompts are no longer finite")
        # The loss was that of the prompts before the last step; finite ones may be huge.
        with torch.inference_mode():
            features = [classifier.text_features()]
            if classifier.changes_images:  # the backbone's own were looked at already
                features.append(classifier.image_features(self.support.store.test_views([0])))
        if not _finite(features):
            raise self._diverged("features are no longer finite")
        state |= {_OF_FINISH + name: tensor for name, tensor in self.finish.state().items()}
        self.journal.save(state, self.done, self.spent + time.perf_counter() - self.started)
        self.saved = self.done

    def _diverged(self, what: str) -> Diverged:
        settings = self.settings
        way = f"and a smaller lr, such as {settings.lr / 10:g}"
        if self.lr <= WARMUP_LR:
            weights = ", ".join(f"{k} {v:g}" for k, v in loss_weights(settings).items()) or "none"
            way = (
                f"and precision fp32 (it is {settings.precision}), smaller loss weights (they "
                f"are {weights}) or weight_decay ({settings.weight_decay:g}), or another backbone "
                f"than '{settings.backbone}', whose weights may be damaged"
            )
        return Diverged(
            f"the {what} at step {self.done - 1} of log.csv, with learning rate {self.lr:g}"
            f"{self.journal.after_divergence(self.saved)} {way}"
        )


# Support images whose logits are held at once.
_ROWS = 1000

# Before the names of a finish's tensors in a checkpoint, beside the learned ones.
_OF_FINISH = "finish."


def _names_of_finish(state: Iterable[str]) -> list[str]:
    return [name.removeprefix(_OF_FINISH) for name in state if name.startswith(_OF_FINISH)]


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


# Growth of cross-entropy over a run that says it went astray; below, it may be chance.
_ASTRAY = 1.25


def _rise(rows: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """Mean cross-entropy of a journal's first and last epoch, if it grew as it should not."""
    epochs = [[row[4] for row in rows if row[1] == rows[i][1]] for i in (0, -1) if rows]
    if not epochs:  # the log was taken away
        return None
    first, last = (sum(epoch) / len(epoch) for epoch in epochs)
    return {"first": first, "last": last} if last > _ASTRAY * first + 0.1 else None


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches in the support set; at least one, however small it is."""
    return max(1, images // batch_size)


def total_steps(settings: Settings, images: int) -> int:
    """Steps of tuning on so many support images."""
    return settings.steps or settings.epochs * steps_per_epoch(images, settings.batch_size)


def epoch_order(images: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of one epoch: a shuffle by seed and epoch, its last incomplete batch dropped.

    A support set smaller than one batch is one batch.
    """
    order = torch.randperm(images, generator=_generator(seed, epoch)).tolist()
    size = min(batch_size, images)
    return [order[i * size : (i + 1) * size] for i in range(steps_per_epoch(images, batch_size))]


def _generator(seed: int, number: int) -> torch.Generator:
    """One for each pair; consecutive ones are unrelated."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number * 7_919 + 12_345) % 2**63)


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event set by SIGINT or SIGTERM, so that a run stops between two steps.

    A second signal acts as it would without us. Off the main thread signals are left alone.
    """
    stop, before = threading.Event(), dict[int, Any]()

    def handle(number: int, _frame: Any) -> None:
        stop.set()
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, handle)
    try:
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
