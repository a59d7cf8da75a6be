"""More time for a better classifier: what tuning the towers gives, beside the head alone.

The automatic head on the bare features is what there is to beat. Methods that learn, with that same
head on what they have tuned, are tuned on the support set short of a fold and name the fold's
images, and so is the head alone. One is taken where it is clearly better. Test images are never
looked at. What depends on time is decided once (`_plan`) and kept in the `Search`, with what each
fold gave: a search that was killed goes on to the same choice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dapt.data import SupportSet
from dapt.engine.classifier import new_classifier
from dapt.engine.data import Data
from dapt.engine.evaluate import logits_of
from dapt.engine.features import Shared
from dapt.engine.fit import Diverged, fit, steps_per_epoch, total_steps
from dapt.engine.forecast import Named
from dapt.engine.search import folds
from dapt.engine.step import step_seconds
from dapt.engine.suited import suited
from dapt.errors import UserError
from dapt.methods import AUTOMATIC, METHODS, get_method
from dapt.progress import Reporter, duration
from dapt.settings import Settings, with_epochs, with_method

# Seconds that a word stands for, and those of a letter behind a number.
WORDS = {"seconds": 0.0, "minutes": 600.0, "hours": 10_800.0}
_UNITS = {"s": 1, "m": 60, "h": 3600}
# Folds, and from an hour on.
_FOLDS, _FOLDS_OF_HOURS = 4, 8
# Of a method's epochs, what is tried where all take too long; but no fewer than so many.
_PARTS, _FEWEST = (1, 2, 4, 8), 20
# Held-out cross-entropy must be lower by so many standard errors, and by so much.
MARGIN, LEAST = 1.0, 0.01


class Fold(BaseModel):
    """A classifier's predictions for n held-out images, and how long it took to fit."""

    model_config = ConfigDict(strict=True)

    truth: list[int]
    predicted: list[int]
    best: list[float]  # probability of the class named
    losses: list[float]  # cross-entropy
    seconds: float = Field(ge=0)

    @model_validator(mode="after")
    def _one_an_image(self) -> Fold:
        lists = (self.truth, self.predicted, self.best, self.losses)
        if not self.truth or len({len(values) for values in lists}) > 1:
            raise ValueError("its lists are not as long as each other")
        return self


class Trial(BaseModel):
    """A method on the folds done so far, or why it is left out."""

    model_config = ConfigDict(strict=True)

    method: str
    epochs: int = Field(default=0, ge=0)  # none of the head alone
    folds: list[Fold] = []
    left_out: str | None = None

    def settings(self, settings: Settings) -> Settings:
        """Those to tune it with."""
        own = with_method(settings, self.method)
        return with_epochs(own, self.epochs) if self.epochs else own

    def all(self, name: str) -> np.ndarray:
        """(n,) numbers of all folds."""
        return np.asarray(list(chain.from_iterable(getattr(fold, name) for fold in self.folds)))

    @property
    def accuracy(self) -> float:
        """Share of the held-out images that it names right."""
        return float((self.all("truth") == self.all("predicted")).mean())

    @property
    def cross_entropy(self) -> float:
        """Mean over the held-out images."""
        return float(self.all("losses").mean())

    def gain(self, other: Trial) -> tuple[float, float]:
        """By how much its cross-entropy is lower than another's, and the standard error of that."""
        lower = other.all("losses") - self.all("losses")
        return float(lower.mean()), float(lower.std() / len(lower) ** 0.5)


class Search(BaseModel):
    """The results so far: of the head alone, which comes first, and of the methods tried.

    ``ended`` says why no method is tried, if that is so.
    """

    model_config = ConfigDict(strict=True)

    effort: str
    folds: int = Field(ge=2)
    trials: list[Trial] = []
    planned: bool = False
    ended: str | None = None
    done: bool = False

    @model_validator(mode="after")
    def _same_images(self) -> Search:
        for trial in self.trials:
            for fold, base in zip(trial.folds, self.trials[0].folds, strict=False):
                if fold.truth != base.truth:
                    raise ValueError("its methods were not judged on the same images")
        if self.done and len({len(trial.folds) for trial in (*self.trials[:1], *self.tried)}) > 1:
            raise ValueError("it is done, and folds are missing")
        return self

    @property
    def tried(self) -> list[Trial]:
        """Those beside the head alone that were judged."""
        return [trial for trial in self.trials[1:] if trial.left_out is None]

    @property
    def best(self) -> Trial | None:
        """The one taken instead of the head alone, which is clearly better; None without any."""
        if not self.tried:
            return None
        best = max(self.tried, key=lambda trial: trial.gain(self.trials[0])[0])
        gain, error = best.gain(self.trials[0])
        return best if gain > max(MARGIN * error, LEAST) else None


def new_search(effort: str) -> Search:
    """A search as ``effort`` says, which leaves some time."""
    long = time_of(effort) >= _UNITS["h"]
    return Search(effort=effort, folds=_FOLDS_OF_HOURS if long else _FOLDS)


def time_of(effort: str) -> float:
    """Seconds that ``minutes``, ``hours``, or such as 90s, 20m and 1.5h stand for.

    ``seconds`` are none beyond what the head alone takes. Anything else is a `UserError`.
    """
    if effort in WORDS:
        return WORDS[effort]
    if found := re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)([smh])", effort):
        return float(found[1]) * _UNITS[found[2]]
    words = ", ".join(WORDS)
    raise UserError(f"effort {effort!r} is no time; give {words}, or a time such as 20m or 2h")


def settings_to_begin_with(settings: Settings) -> Settings:
    """Those of the head alone; a `UserError` where another method was asked for."""
    if settings.method != AUTOMATIC:
        what = f"effort chooses the method by itself, and {settings.method} was given"
        raise UserError(f"{what}; leave one of them out")
    return settings


def choose(
    search: Search,
    settings: Settings,
    data: Data,
    *,
    shared: Shared,
    keep: Callable[[], None] = lambda: None,
    reporter: Reporter | None = None,
) -> Settings:
    """Bring a search to its end; returns the settings to tune with on all support images.

    Args:
        search: new, or as it was kept; it changes in place.
        settings: of the head alone.
        keep: called whenever there is more to keep.

    Raises:
        UserError: as `fit` of the head alone.
        Interrupted: the process got SIGINT or SIGTERM.
    """
    reporter = reporter or Reporter()
    if data.task.multilabel:  # methods that tune towers take one label an image
        search.ended = "of several labels an image, it is the method there is"
        search.done = True
        keep()
        return settings
    data = replace(data, support=shared.support(data, settings, reporter).drawn)
    # Test images are not even at hand.
    data = replace(data, task=replace(data.task, test=()))
    parts = folds(data.support, search.folds, settings.seed)
    if parts:
        _Work(search, settings, data, parts, shared, keep, reporter).run()
    else:
        search.ended = "with one image a class there is nothing to judge another method by"
    search.done = True
    keep()
    best = search.best
    reporter.say(f"{best.method} is taken" if best else f"{AUTOMATIC} is kept")
    return best.settings(settings) if best else settings


def told(search: Search) -> str:
    """What came of it, in a sentence."""
    if search.ended is not None:
        return f"{AUTOMATIC} is kept: {search.ended}"
    if not search.tried:
        return f"{AUTOMATIC} is kept: nothing else could be tried in {search.effort}"
    base = search.trials[0]
    nearest = max(search.tried, key=lambda trial: trial.gain(base)[0])
    (gain, error), n = nearest.gain(base), len(base.all("truth"))
    rates = f"names {nearest.accuracy:.1%} of {n:,} held-out images right ({AUTOMATIC} alone "
    rates += f"{base.accuracy:.1%}), with cross-entropy {nearest.cross_entropy:.3f} "
    rates += f"({base.cross_entropy:.3f}; {gain:+.3f} ± {error:.3f} gained)"
    if search.best:
        return f"chosen: {nearest.method}, which {rates}"
    return f"{AUTOMATIC} is kept: nothing is clearly better; {nearest.method} {rates}"


def summary(search: Search) -> dict[str, Any]:
    """What a run's metrics keep of it; what took how long is not of the result."""
    base, best = next(iter(search.trials), None), search.best
    judged = [] if base is None or search.ended else [base, *search.tried]
    return {
        "asked": search.effort,
        "folds": len(base.folds) if judged and base else 0,
        "images": len(base.all("truth")) if judged and base else 0,
        "tried": [
            {
                "method": trial.method, "epochs": trial.epochs, "accuracy": trial.accuracy,
                "cross_entropy": trial.cross_entropy, "gain": trial.gain(judged[0])[0],
                "error": trial.gain(judged[0])[1],
            }
            for trial in judged
        ],
        "left_out": {t.method: t.left_out for t in search.trials if t.left_out is not None},
        "chosen": best.method if best else AUTOMATIC,
        "told": told(search),
    }  # fmt: skip


def seconds_of(search: Search) -> dict[str, float]:
    """What the folds of each method took."""
    return {t.method: round(sum(fold.seconds for fold in t.folds), 2) for t in search.trials}


def named(search: Search) -> Named | None:
    """What the method that is taken said of the folds; None where the head alone is kept."""
    if (best := search.best) is None:
        return None
    truth, predicted, sure = (best.all(name) for name in ("truth", "predicted", "best"))
    fair = np.ones(len(truth), dtype=bool)
    return Named(truth, predicted, sure, np.exp(-best.all("losses")), sure, fair)


@dataclass(frozen=True)
class _Work:
    """A search, what it is done on, and the folds: support sets, their val images held out."""

    search: Search
    settings: Settings
    data: Data
    parts: list[SupportSet]
    shared: Shared
    keep: Callable[[], None]
    reporter: Reporter

    def run(self) -> None:
        """Do what is left to do: the head alone, the plan, and what is planned."""
        search, settings = self.search, self.settings
        if not search.trials:
            search.trials.append(Trial(method=settings.method))
        base, budget = search.trials[0], time_of(search.effort)
        while search.ended is None and len(base.folds) < len(self.parts):
            self._judge(base)
            # It is fitted once more, on everything.
            expected = self._fold_seconds() * (len(self.parts) + 1)
            if expected > budget:
                search.ended = f"its folds alone take {duration(expected)}, not {search.effort}"
            self.keep()
        if search.ended is not None:
            return
        self._tell(base)
        if not search.planned:
            search.trials[1:], search.planned = self._plan(budget), True
            self.keep()
        for trial in search.trials[1:]:
            if trial.left_out is not None:
                self.reporter.say(f"{trial.method} is left out: {trial.left_out}")
        for trial in search.tried:
            while trial.left_out is None and len(trial.folds) < len(self.parts):
                try:
                    self._judge(trial)
                except Diverged:
                    trial.left_out = "what it learns is no longer finite"
                self.keep()
            self._tell(trial)

    def _fold_seconds(self) -> float:
        """Of the head alone."""
        return float(np.mean([fold.seconds for fold in self.search.trials[0].folds]))

    def _tell(self, trial: Trial) -> None:
        if trial.left_out is not None:
            self.reporter.say(f"{trial.method} is left out: {trial.left_out}")
            return
        found = f"{trial.accuracy:.1%} of {len(trial.all('truth')):,} held-out images"
        self.reporter.say(f"{trial.method}: {found}, cross-entropy {trial.cross_entropy:.3f}")

    def _plan(self, budget: float) -> list[Trial]:
        """What to try, with how many epochs, and what to leave out, by a few timed steps."""
        left, trials, steps = budget - sum(seconds_of(self.search).values()), list[Trial](), {}
        names, started = [name for name, row in METHODS.items() if row.tried], time.perf_counter()
        with self.reporter.stage("timing methods", len(names)) as advance:
            for name in names:
                own = with_method(self.settings, f"{name}+{AUTOMATIC}")
                trials.append(trial := Trial(method=own.method, epochs=own.epochs))
                try:
                    steps[own.method] = self._step_seconds(own)
                except UserError as error:  # such as of a tower that takes no prompt
                    trial.left_out = str(error)
                advance(1)
        left -= time.perf_counter() - started
        waiting = {t.method: self._costs(t, steps[t.method]) for t in trials if t.left_out is None}
        # The cheapest first: what it leaves of its share, the others get.
        order = sorted(waiting, key=lambda method: min(waiting[method].values()))
        for number, method in enumerate(order):
            trial, costs = next(t for t in trials if t.method == method), waiting[method]
            share = left / (len(order) - number)
            trial.epochs = next((e for e, cost in costs.items() if cost <= share), min(costs))
            cost = costs[trial.epochs]
            if cost > left:
                trial.left_out = f"it takes {duration(cost)}, and {duration(left)} are left"
                continue
            left -= cost
            self.reporter.say(f"{method}: {trial.epochs} epochs, {duration(cost)} in all")
        return trials

    def _step_seconds(self, settings: Settings) -> float:
        names, template = self.data.task.class_names, self.data.task.template
        method, backbone = get_method(settings.method), self.shared.backbone
        settings = suited(settings, names, backbone)
        classifier = new_classifier(backbone, names, template, method, settings)
        batch = min(settings.batch_size, len(self.parts[0].train))
        return step_seconds(classifier, settings, batch)

    def _costs(self, trial: Trial, step: float) -> dict[int, float]:
        """Seconds to tune on each fold's rest and on all images, by epochs, the most first."""
        settings = with_method(self.settings, trial.method)
        sizes = [*(len(part.train) for part in self.parts), len(self.data.support.train)]
        each = [steps_per_epoch(size, settings.batch_size) for size in sizes]
        # A method that is tuned for a number of steps takes them on all images.
        full, steps = -(-total_steps(settings, sizes[-1]) // each[-1]), sum(each)
        heads = len(sizes) * self._fold_seconds()
        few = [full // part for part in _PARTS if full // part >= min(_FEWEST, full)]
        return {epochs: epochs * steps * step + heads for epochs in few}

    def _judge(self, trial: Trial) -> None:
        """Do its next fold."""
        number, started = len(trial.folds), time.perf_counter()
        part, settings = self.parts[number], trial.settings(self.settings)
        where = _Within(self.reporter, f"{trial.method}, fold {number + 1} of {len(self.parts)}")
        task, data = self.data.task, Data(self.data.task, replace(part, val=()))
        classifier = fit(data, settings, shared=self.shared, reporter=where).classifier
        held: dict[str, Any] = {"what": "held-out", "reporter": where}
        found = self.shared.encode(task, part.val, settings, classifier, **held)
        logits = torch.cat(list(logits_of(classifier, found.features))).double()
        said = Named.of(logits, found.labels)
        losses = F.cross_entropy(logits, found.labels, reduction="none")
        if not bool(losses.isfinite().all()):
            raise Diverged(f"what {trial.method} says of held-out images is no longer finite")
        trial.folds.append(
            Fold(
                truth=said.truth.tolist(), predicted=said.predicted.tolist(),
                best=said.best.tolist(), losses=losses.tolist(),
                seconds=time.perf_counter() - started,
            )
        )  # fmt: skip


class _Within(Reporter):
    """Progress of a fold; what there is to say of a run, its own tells."""

    def __init__(self, outer: Reporter, where: str) -> None:
        self._outer, self._where = outer, where

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Callable[..., None]]:
        """The same, and in which fold."""
        with self._outer.stage(f"{self._where}: {title}", total) as advance:
            yield advance
