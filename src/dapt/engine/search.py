"""Settings for a user's own data: a small search on a held-out part of the support set."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from itertools import product

from dapt.data import SupportSet
from dapt.data.items import grouped
from dapt.engine.data import Data, open_data
from dapt.engine.evaluate import evaluate_task
from dapt.engine.features import Shared, backbone_of
from dapt.engine.fit import Diverged, fit
from dapt.errors import UserError
from dapt.methods import get_method
from dapt.progress import Reporter
from dapt.settings import Settings, loss_terms, weights_of, with_epochs, with_weights

# Multiples of the value the search starts from; loss terms have their own.
LEARNING_RATES = (1.0, 0.1, 10.0)
EPOCHS = 20


def folds(support: SupportSet, count: int, seed: int) -> list[SupportSet]:
    """Support sets whose train images are short of a fold of each class's, which is their val.

    ``count`` of them, or as many as the largest class has images. An image is held out once, unless
    it is the only one of its class. The support set's own val images stay out of it: they are not
    drawn for this. Empty where no class has two images.
    """
    generator, fold = random.Random(seed), dict[int, int]()
    for places in grouped(range(len(support.train)), lambda i: support.train[i].label).values():
        if len(places) > 1:
            order = generator.sample(places, len(places))
            fold |= {place: number % count for number, place in enumerate(order)}
    train = support.train
    return [
        replace(
            support,
            train=tuple(item for i, item in enumerate(train) if fold.get(i) != number),
            val=tuple(item for i, item in enumerate(train) if fold.get(i) == number),
        )
        for number in sorted(set(fold.values()))
    ]


def hold_out(support: SupportSet, seed: int) -> SupportSet:
    """Move a quarter of each class's train images (at least one of two or more) to val.

    A `UserError` where no class has two images.
    """
    if not (found := folds(support, 4, seed)):
        way = "use more shots, or do not search"
        raise UserError(f"a search for settings needs two support images in some class; {way}")
    return found[0]


def search_settings(settings: Settings, reporter: Reporter) -> Settings:
    """Choose learning rate and loss weights by accuracy on held-out support images.

    Short runs over a small grid: the learning rate at the given weights, then the weights of the
    method at the best rate. Of equals, the first tried. Test images are never looked at.
    """
    method = get_method(settings.method)
    if not method.learns:
        reporter.warn(f"{settings.method} has no learning rate to search for")
        return settings
    data, shared = open_data(settings), Shared(backbone_of(settings))
    held = hold_out(shared.support(data, settings, reporter).drawn, settings.seed)
    data = Data(replace(data.task, test=held.val), held)
    weights = {t.weight: t.search for t in loss_terms(settings) if t.search}
    scored: dict[str, float] = {}

    def told(candidate: Settings) -> str:
        known = weights_of(candidate)
        return ", ".join(f"{name} {known[name]:g}" for name in ("lr", *weights))

    def score(candidate: Settings) -> float:
        if (key := told(candidate)) not in scored:
            short = with_epochs(candidate, min(EPOCHS, settings.epochs))
            scored[key] = 0.0
            with suppress(Diverged):
                tuned = fit(data, short, shared=shared)
                found = evaluate_task(tuned.classifier, data.task, short, shared=shared)
                scored[key] = found["accuracy"]
            reporter.say(f"{key}: {scored[key]:.1%} of {len(held.val)} held-out images")
        return scored[key]

    rates = [settings.model_copy(update={"lr": settings.lr * m}) for m in LEARNING_RATES]
    best = max(rates, key=score)
    grids = [[(name, weights_of(best)[name] * m) for m in steps] for name, steps in weights.items()]
    options = [with_weights(best, dict(choice)) for choice in product(*grids)]
    best = max([best, *options], key=score)
    reporter.say(f"chosen: {told(best)}")
    return best
