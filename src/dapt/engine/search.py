"""Settings for a user's own data: a small search on a held-out part of the support set."""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

from dapt.data import Item, SupportSet
from dapt.engine.shared import Shared, backbone_of
from dapt.errors import UserError
from dapt.methods import get_method
from dapt.progress import Reporter
from dapt.run.train import Diverged, support_of, task_of
from dapt.run.train import train as run_training
from dapt.safe.files import read_json
from dapt.settings import Settings

# Multiples of the values the search starts from.
LEARNING_RATES = (1.0, 0.1, 10.0)
BETAS = {"beta_visual": (1.0, 0.1, 10.0), "beta_text": (1.0, 10.0)}
EPOCHS = 20


def hold_out(support: SupportSet, seed: int) -> SupportSet:
    """Move a quarter of each class's train images (at least one of two or more) to val.

    The support set's own val images stay out of it: they are not drawn for this.

    Raises:
        UserError: no class has two images, so nothing can be held out.
    """
    generator = random.Random(seed)
    by_class: dict[int, list[Item]] = {}
    for item in support.train:
        by_class.setdefault(item.label, []).append(item)
    train: list[Item] = []
    val: list[Item] = []
    for items in by_class.values():
        count = max(1, len(items) // 4) if len(items) > 1 else 0
        held = set(generator.sample(range(len(items)), count))
        for i, item in enumerate(items):
            (val if i in held else train).append(item)
    if not val:
        raise UserError(
            "--tune-settings needs two support images in some class; use more --shots, or leave "
            "it out"
        )
    return SupportSet(support.dataset, support.shots, support.seed, tuple(train), tuple(val))


def search_settings(settings: Settings, reporter: Reporter) -> Settings:
    """Choose learning rate and loss weights by accuracy on held-out support images.

    Short runs (20 epochs) over a small grid; only the weights the method uses are varied. First
    the learning rate at the given weights, then the weights at the best rate. Test images are
    never looked at.

    Returns:
        The settings with the best values found; the first of equals, in the order tried.
    """
    method = get_method(settings.method)
    if not method.learns_prompts:
        reporter.warn(f"--tune-settings: {settings.method} has no learning rate to search for")
        return settings
    task = task_of(settings)
    shared = Shared(backbone_of(settings))
    drawn = shared.support(task, support_of(settings, task), settings, reporter).drawn
    held = hold_out(drawn, settings.seed)
    scored: dict[tuple, float] = {}

    def score(candidate: Settings) -> float:
        key = (candidate.lr, candidate.beta_visual, candidate.beta_text)
        if key not in scored:
            short = candidate.model_copy(update={"epochs": min(EPOCHS, settings.epochs)})
            with tempfile.TemporaryDirectory() as folder:
                try:
                    run = run_training(
                        short,
                        Path(folder) / "run",
                        shared=shared,
                        task=replace(task, test=held.val),
                        support=held,
                    )
                except Diverged:
                    scored[key] = 0.0
                else:
                    scored[key] = read_json(run.metrics_file, "metrics")["test"]["accuracy"]
            reporter.say(
                f"lr {candidate.lr:g}, beta_visual {candidate.beta_visual:g}, beta_text "
                f"{candidate.beta_text:g}: {scored[key]:.1%} of {len(held.val)} held-out images"
            )
        return scored[key]

    rates = [settings.model_copy(update={"lr": settings.lr * m}) for m in LEARNING_RATES]
    best = max(rates, key=score)
    weights = [w for w in method.terms.values() if w in BETAS]
    grids = [[(str(w), getattr(best, str(w)) * m) for m in BETAS[str(w)]] for w in weights]
    options = [best.model_copy(update=dict(choice)) for choice in product(*grids)]
    best = max([best, *options], key=score)
    reporter.say(
        f"chosen: lr {best.lr:g}, beta_visual {best.beta_visual:g}, beta_text {best.beta_text:g}"
    )
    return best
