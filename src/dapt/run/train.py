"""From settings to a finished run: one loop, with checkpoint and resume.

Whatever is random in a step (order, views, dropout) is a function of the seed and the step's
number alone. So a checkpoint needs only the prompts, their momentum and that number, and a run
that was killed continues to the same bits as one that never was.
"""

from __future__ import annotations

import csv
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import tee
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from dapt.clip.backbone import Backbone, taken_for_granted
from dapt.data import (
    ImageStore,
    SupportSet,
    Task,
    draw_support_set,
    images_in_both,
    load_support_set,
    open_task,
    subset_classes,
    support_digest,
)
from dapt.engine.allocator import keep_freed_memory
from dapt.engine.classifier import Classifier, LinearProbe, PromptedClassifier, image_features
from dapt.engine.evaluate import (
    encode_store,
    logits_of,
    mean_prototype_distance,
    mean_text_distance,
    metrics,
)
from dapt.engine.ranks import Ranks, join_ranks
from dapt.engine.shared import Shared, Support, backbone_of, skip_unreadable
from dapt.engine.step import WARMUP_LR, Tuner, learning_rate
from dapt.errors import UserError
from dapt.methods import Method, get_method
from dapt.methods.probe import fit_probe
from dapt.methods.prompts import Prompts, check_prompt, new_prompts
from dapt.progress import Reporter
from dapt.run.directory import RunDirectory, StepLog
from dapt.settings import FITTED, WITHOUT_DATASET, Settings, loss_weights, text_memory

# Settings that decide what a run costs, not what it finds: they may change when it resumes.
FREE_ON_RESUME = frozenset({"memory_budget", "checkpoint_every", "strict"})


class Interrupted(Exception):
    """The run was asked to stop; a checkpoint of where it stood is on disk."""


class Diverged(UserError):
    """The loss, the prompts, or the features that they lead to are no longer finite."""


def train(
    settings: Settings,
    output: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    shared: Shared | None = None,
    task: Task | None = None,
    support: SupportSet | None = None,
) -> RunDirectory:
    """Tune prompts on a support set, evaluate them, and leave a run directory.

    Args:
        settings: from `make_settings`.
        output: the run directory.
        resume: continue a run that was stopped; a finished one is left as it is.
        overwrite: discard the run that is there.
        reporter: is told the progress.
        shared: a loaded backbone, as the settings say, and what earlier runs read with it.
        task, support: already opened or drawn as the settings say.

    Raises:
        UserError: bad input, or a directory that is in use or holds another run.
        Interrupted: the process got SIGINT or SIGTERM; ``resume`` continues.

    Of several processes that ``torchrun`` started, all tune and the first keeps the directory:
    in the others the run may not be finished when this returns.
    """
    reporter, run = reporter or Reporter(), RunDirectory(output)
    keep_freed_memory()
    ranks = join_ranks()
    if ranks.first:
        check_output(run, settings, resume=resume, overwrite=overwrite)
    if ranks.share(run.finished and resume):
        return run
    # Everything that can be wrong with the input is found before anything is written.
    task = task or task_of(settings)
    support = support or support_of(settings, task)
    shared = shared or Shared(backbone_of(settings, device=ranks.device(settings.device)))
    backbone = shared.backbone
    method = get_method(settings.method)
    classifier: Classifier = new_classifier(backbone, task, method, settings)
    encoded = shared.support(task, support, settings, reporter)
    support, skipped = encoded.drawn, encoded.skipped
    tell_notes(task, reporter)
    if (guessed := taken_for_granted(settings.backbone)) is not None:
        reporter.warn(guessed)
    twice = tell_of_overlap(task, support, task, reporter) if ranks.first else []
    if not ranks.first:
        if method.learns_prompts:
            assert isinstance(classifier, PromptedClassifier)
            _tune(run, settings, classifier, method, encoded, Reporter(), ranks)
        return run
    with run.locked():
        check_output(run, settings, resume=resume, overwrite=overwrite)
        if run.finished and resume and ranks.alone:  # by another process, meanwhile
            return run
        if run.exists and resume:
            if (changed := run.resume(task, support, backbone)) is not None:
                reporter.warn(f"{changed}: the last bits of the result may be others for it")
        else:
            run.begin(settings, task, support, backbone)
        started = time.perf_counter()
        spent_before, rose = 0.0, None
        if method.probe:
            classifier, more = _fit_probe(run, settings, task, encoded, shared, reporter)
            skipped = skipped + more
        else:
            assert isinstance(classifier, PromptedClassifier)
            if method.learns_prompts:
                spent_before = _tune(run, settings, classifier, method, encoded, reporter, ranks)
                rose = _tell_of_rise(run, settings, reporter)
            prompts = classifier.prompts.named_parameters()
            run.write_tensors(
                run.prompts_file, {f"{name}_prompt": p.detach() for name, p in prompts}
            )
        tuned = time.perf_counter()
        if settings.dataset == FITTED:  # who gave the images keeps those to test on
            run.add_to_environment(tuning_seconds=round(spent_before + tuned - started, 2))
            return run
        try:
            test = evaluate_task(classifier, task, settings, reporter, shared)
        except UserError as error:
            raise UserError(
                f"{error} (the tuned prompts are kept: dapt train --output {run.path} --resume)"
            ) from error
        dispersion = _dispersion(classifier, task, settings, encoded)
        run.add_to_environment(
            tuning_seconds=round(spent_before + tuned - started, 2),
            evaluation_seconds=round(time.perf_counter() - tuned, 2),
        )
        run.finish(
            {
                "method": settings.method,
                "dataset": task.name,
                "shots": settings.shots,
                "seed": settings.seed,
                "learned_parameters": classifier.learned_parameters,
                "support_images": len(encoded.store),
                "support_sha256": support_digest(task, support),
                "skipped": skipped,
                "also_tested": twice,
                "rose": rose,
                "dispersion": dispersion,
                "test": test,
            }
        )
    return run


def check_output(run: RunDirectory, settings: Settings, *, resume: bool, overwrite: bool) -> None:
    """Refuse a directory that holds another run, unless told to resume or to overwrite it.

    Raises:
        UserError: what is there, and which option says what to do with it.
    """
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite discards it; give one of them")
    if not run.exists:
        if run.path.exists() and not run.path.is_dir():
            raise UserError(f"--output {run.path} is a file; give a directory")
        if not overwrite:
            run.require_own()
        return
    if overwrite:
        return
    if not resume:
        state, way = (
            ("holds a finished run", "--overwrite")
            if run.finished
            else ("holds an unfinished run", "--resume")
        )
        raise UserError(f"{run.path} {state}; add {way}, or choose another --output")
    kept = run.read_settings()
    for name, value in settings.model_dump().items():
        if name not in FREE_ON_RESUME and (old := getattr(kept, name)) != value:
            raise UserError(
                f"cannot resume {run.path} with {name}={value}: it was started with {name}={old}; "
                "leave the setting out, or choose another --output"
            )


def task_of(settings: Settings, *, evaluate: bool = False) -> Task:
    """Open the task that settings name; to evaluate on only, it needs no training images.

    Raises:
        UserError: as `open_task`, or the run's prompts came without a dataset.
    """
    if settings.dataset in WITHOUT_DATASET:
        raise UserError(
            f"these prompts were {WITHOUT_DATASET[settings.dataset]}; 'dapt eval RUN --dataset "
            "...' evaluates them on one"
        )
    task = open_task(
        settings.dataset,
        root=Path(settings.root) if settings.root else None,
        domain=settings.domain,
        class_names=Path(settings.class_names) if settings.class_names else None,
        evaluate=evaluate,
    )
    return subset_classes(task, settings.classes)


def support_of(settings: Settings, task: Task) -> SupportSet:
    """Draw the support set by the protocol, or read the saved one."""
    if settings.support_set:
        support = load_support_set(Path(settings.support_set), task)
    else:
        support = draw_support_set(task, settings.shots, settings.seed)
    if support.shots != settings.shots:
        raise UserError(
            f"support set {settings.support_set} was drawn with {support.shots} shots; give "
            f"--shots {support.shots}, or draw another"
        )
    if not support.train:
        raise UserError(f"dataset '{settings.dataset}' has no images to tune on")
    return support


def known_support(run: RunDirectory, task: Task) -> SupportSet:
    """A run's support set, if its images are still those that it was tuned on.

    To be asked before images are shown: a stranger's run may name any folder of whoever opens it,
    but cannot know what is in the images there.

    Raises:
        UserError: they are not, or the classes are others.
    """
    support = load_support_set(run.support_file, task)
    recorded, found = run.read_metrics().get("support_sha256"), support_digest(task, support)
    if task.class_names != run.read_task()[1] or found is None or recorded != found:
        raise UserError(
            f"the images in {task.root} are not known to be those that {run.path} was tuned on, "
            "so none of them is shown"
        )
    return support


def tell_notes(task: Task, reporter: Reporter) -> None:
    """Warn of what its reader found odd in a task."""
    for note in task.notes:
        reporter.warn(note)


def tell_of_overlap(
    task: Task, support: SupportSet, tested: Task, reporter: Reporter
) -> list[dict[str, str]]:
    """Warn of a task's support images that are ``tested`` on, and return a record of them."""
    both = images_in_both(task, support, tested)
    if both:
        first, same = both[0]
        count = len(support.train) + len(support.val)
        reporter.warn(
            f"{len({a.path for a, _ in both}):,} of {count:,} support images are test images of "
            f"'{tested.name}' too (such as {first.path}, the same file as {same.path}); the "
            "accuracy says too much of them: take them out of one part"
        )
    return [{"support": a.path, "test": b.path} for a, b in both]


def new_classifier(
    backbone: Backbone, task: Task, method: Method, settings: Settings
) -> PromptedClassifier:
    """A classifier with freshly drawn prompts, as the method's row says."""
    prompts = new_prompts(
        backbone,
        text_vectors=settings.text_vectors if method.text else 0,
        visual_vectors=settings.visual_vectors if method.visual else 0,
        text_init=settings.text_init,
        seed=settings.seed,
    )
    return PromptedClassifier(
        backbone,
        task.class_names,
        prompts,
        settings.template or task.template,
        text_memory=text_memory(settings),
    )


def _fit_probe(
    run: RunDirectory,
    settings: Settings,
    task: Task,
    support: Support,
    shared: Shared,
    reporter: Reporter,
) -> tuple[LinearProbe, list[dict[str, str]]]:
    """The probe, and a record of the val images that could not be read."""
    items, val, skipped = support.drawn.val, None, list[dict[str, str]]()
    if items:
        unreadable: dict[int, str] | None = None if settings.strict else {}
        features = shared.features(task, items, settings, unreadable=unreadable)
        kept, skipped = skip_unreadable(items, unreadable or {}, "val", reporter)
        val = features[kept], torch.tensor([items[i].label for i in kept])
    classes = len(task.class_names)
    weight, bias = fit_probe(support.features, support.labels, val, classes, settings.seed)
    run.write_tensors(run.prompts_file, {"weight": weight, "bias": bias})
    place = shared.backbone.device
    probe = LinearProbe(shared.backbone, task.class_names, weight.to(place), bias.to(place))
    return probe, skipped


def _tune(
    run: RunDirectory,
    settings: Settings,
    classifier: PromptedClassifier,
    method: Method,
    support: Support,
    reporter: Reporter,
    ranks: Ranks,
) -> float:
    """Tune the classifier's prompts in place, from the last checkpoint if there is one.

    Each of the ranks takes its part of every batch; the first keeps log and checkpoint.

    Returns:
        Seconds that earlier sessions of the run had spent on it.
    """
    store, labels = support.store, support.labels
    tuner = Tuner(
        classifier,
        method,
        loss_weights(settings),
        support.prototypes.to(classifier.backbone.device),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        rbf_t=settings.rbf_t,
        dropout=settings.visual_dropout,
        ranks=ranks,
    )
    per_epoch = steps_per_epoch(len(store), settings.batch_size)
    total, done, spent = per_epoch * settings.epochs, 0, 0.0
    checkpoint = ranks.share(run.read_checkpoint() if ranks.first else None)
    if checkpoint is not None:
        state, done, spent = checkpoint
        if done > total or not tuner.fits(state):
            raise UserError(
                f"{run.checkpoint_file} does not hold the prompts of this run; delete it to start "
                "the run's tuning anew"
            )
        tuner.load_state(state)
    started, lr, saved = time.perf_counter(), 0.0, done
    log = StepLog(run, list(method.terms), done) if ranks.first else None

    def diverged(what: str) -> Diverged:
        kept = f"the checkpoint after {saved} steps is" if saved else "no checkpoint was"
        way = f"and a smaller --lr, such as {settings.lr / 10:g}"
        if lr <= WARMUP_LR:
            weights = ", ".join(f"{k} {v:g}" for k, v in loss_weights(settings).items()) or "none"
            way = (
                f"and --precision fp32 (it is {settings.precision}), smaller loss weights (they "
                f"are {weights}) or weight_decay ({settings.weight_decay:g}), or another backbone "
                f"than '{settings.backbone}', whose weights may be damaged"
            )
        return Diverged(
            f"the {what} at step {done - 1} of log.csv, with learning rate {lr:g} ({kept} kept in "
            f"{run.path}); train again with --overwrite {way}"
        )

    def save() -> None:
        nonlocal saved
        state = tuner.state()
        if not all(bool(t.isfinite().all()) for t in state.values()):
            raise diverged("prompts are no longer finite")
        # The loss was that of the prompts before the last step; finite ones may be huge.
        if not _useful(classifier, store):
            raise diverged("features are no longer finite")
        if log is not None:
            log.flush()
            run.write_checkpoint(state, done, spent + time.perf_counter() - started)
        saved = done

    try:
        with (
            reporter.stage(f"tuning {method.title}", total) as advance,
            _stop_signal() as stop,
        ):
            advance(done)
            ahead, now = tee(_batches(settings, len(store), done))
            views = store.train_batches(
                ((epoch, indices[ranks.part(indices)]) for epoch, indices in ahead),
                seed=settings.seed,
            )
            for (epoch, indices), batch in zip(now, views, strict=True):
                lr, part = learning_rate(epoch, settings.epochs, settings.lr), ranks.part(indices)
                generator = torch.Generator().manual_seed(_mix(settings.seed, done))
                among = None if ranks.alone else (len(indices), part)
                result = tuner.step(batch, labels[indices[part]], lr, generator, among)
                losses = [result.total, result.cross_entropy, *result.terms.values()]
                if log is not None:
                    log.add([done, epoch, lr, *losses, result.accuracy])
                done += 1
                if not isfinite(result.total):
                    raise diverged(f"loss became {result.total}")
                terms = " ".join(f"{k} {v:.4f}" for k, v in result.terms.items())
                advance(1, f"ce {result.cross_entropy:.3f} {terms} acc {result.accuracy:.0%}")
                if ranks.any(stop.is_set()):
                    save()
                    raise Interrupted
                ended = done % per_epoch == 0 and (epoch + 1) % settings.checkpoint_every == 0
                if ended or done == total:
                    save()
            if stop.is_set():  # while the last checkpoint was written
                raise Interrupted
    finally:
        if log is not None:
            log.close()
    return spent


def _useful(classifier: PromptedClassifier, store: ImageStore) -> bool:
    """Whether the prompts lead to finite features: of all classes, and of an image."""
    with torch.inference_mode():
        found = [classifier.text_features()]
        if classifier.prompts_images:  # the backbone's own were looked at already
            found.append(classifier.image_features(store.test_views([0])))
        return all(bool(features.isfinite().all()) for features in found)


# Growth of cross-entropy over a run that says it went astray; below, it may be chance.
_ASTRAY = 1.25


def _tell_of_rise(
    run: RunDirectory, settings: Settings, reporter: Reporter
) -> dict[str, float] | None:
    """Warn of cross-entropy that grew as it should not, and return a record of it."""
    if (rose := _rise(run)) is None:
        return None
    reporter.warn(
        f"cross-entropy rose from {rose[0]:.2f} in the first epoch to {rose[1]:.2f} in the "
        f"last: learning rate {settings.lr:g} may be too high; compare with a smaller --lr, "
        f"such as {settings.lr / 10:g}"
    )
    return {"first": rose[0], "last": rose[1]}


def _rise(run: RunDirectory) -> tuple[float, float] | None:
    """Mean cross-entropy of a run's first and last epoch, if it grew as it should not."""
    epochs: dict[str, list[float]] = {}
    with run.log_file.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            epochs.setdefault(row["epoch"], []).append(float(row["cross_entropy"]))
    if not epochs:  # the log was taken away
        return None
    first, *_, last = [sum(e) / len(e) for e in epochs.values()] * 2
    return (first, last) if last > _ASTRAY * first + 0.1 else None


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


def evaluate_task(
    classifier: Classifier,
    task: Task,
    settings: Settings,
    reporter: Reporter,
    shared: Shared | None = None,
) -> dict[str, Any]:
    """`metrics` of a classifier on a task's test images, and ``skipped``, those left out.

    Images that cannot be read are left out, unless settings are strict.

    Raises:
        UserError: the task has no test images; one cannot be read, and settings are strict or
            none can.
    """
    if not task.test:
        raise UserError(f"dataset '{task.name}' has no test images to evaluate on")
    shared = shared or Shared(classifier.backbone)
    unreadable: dict[int, str] | None = None if settings.strict else {}
    with reporter.stage("evaluating", len(task.test)) as advance:
        if classifier.prompts_images:
            features = encode_store(
                classifier.image_features,
                shared.store(task, task.test, settings),
                batch_size=settings.eval_batch_size,
                advance=advance,
                unreadable=unreadable,
            )
        else:
            features = shared.features(task, task.test, settings, advance, unreadable)
    kept, skipped = skip_unreadable(task.test, unreadable or {}, "test", reporter)
    labels = [task.test[i].label for i in kept]
    logits = logits_of(classifier, features[kept] if skipped else features)
    return {**metrics(logits, labels, task.class_names), "skipped": skipped}


def evaluate_zero_shot(
    task: Task, settings: Settings, reporter: Reporter, shared: Shared
) -> dict[str, Any]:
    """`metrics` of the un-prompted backbone, with the template's words, on a task's test images.

    Raises:
        UserError: the task has no test images.
    """
    method = get_method("zero-shot")
    settings = settings.model_copy(update={"method": "zero-shot"})
    classifier = new_classifier(shared.backbone, task, method, settings)
    return evaluate_task(classifier, task, settings, reporter, shared)


def _dispersion(
    classifier: Classifier, task: Task, settings: Settings, support: Support
) -> dict[str, dict[str, float]]:
    """Mean inter- and intra-dispersion before and after tuning; empty where nothing was tuned.

    Inter: mean distance between class text features, in the template before, in the learned
    context after. Intra: mean distance of support images to their class prototype.
    """
    if not isinstance(classifier, PromptedClassifier) or not classifier.learned_parameters:
        return {}
    after = support.features
    if classifier.prompts.visual is not None:
        after = encode_store(
            classifier.image_features, support.store, batch_size=settings.eval_batch_size
        )
    plain = classifier  # where the words are not learned, they are those before
    if classifier.prompts.text is not None:
        template = settings.template or task.template
        plain = PromptedClassifier(
            classifier.backbone,
            task.class_names,
            Prompts(),
            template,
            text_memory=text_memory(settings),
        )
    with torch.inference_mode():
        text = [mean_text_distance(c.text_features().cpu()) for c in (plain, classifier)]
    labels, prototypes = support.labels, support.prototypes
    image = [mean_prototype_distance(z, labels, prototypes) for z in (support.features, after)]
    return {
        "inter": {"before": text[0], "after": text[1]},
        "intra": {"before": image[0], "after": image[1]},
    }


def load_classifier(
    run: RunDirectory,
    class_names: tuple[str, ...] | None = None,
    template: str | None = None,
    *,
    backbone: Backbone | None = None,
    device: str | None = None,
) -> Classifier:
    """The tuned classifier of a finished run.

    Args:
        run: its directory.
        class_names: other classes than it was tuned on, for prompts that carry over.
        template: goes with them, where the text prompt is not learned.
        backbone: already loaded, to share it.
        device: to run on, if not the one it was tuned on.

    Raises:
        UserError: no finished run is here, its backbone differs from the one it was tuned on,
            or it is a probe, whose classes are fixed.
    """
    run.require()
    keep_freed_memory()
    settings = run.read_settings()
    _, own_names, own_template = run.read_task()
    backbone = backbone or backbone_of(settings, device=device)
    run.require_backbone(backbone)
    tensors, _ = run.read_tensors(run.prompts_file)
    names = class_names or own_names
    if "weight" in tensors:
        if names != own_names:
            raise UserError(
                f"the run in {run.path} is a linear probe, which knows only the classes it was "
                "fitted on; use a prompt method for other classes"
            )
        weight, bias = tensors["weight"], tensors.get("bias", torch.zeros(0))
        if weight.ndim != 2 or len(weight) != len(names) or bias.shape != (len(names),):
            raise UserError(f"{run.prompts_file} is no probe of {len(names)} classes; train again")
        with torch.inference_mode():
            size = backbone.preprocessing.size
            seen = image_features(backbone, torch.zeros(1, 3, size, size, dtype=torch.uint8))
        if weight.shape[1] != seen.shape[1]:
            raise UserError(f"{run.prompts_file} does not fit the backbone's features; train again")
        place = backbone.device
        return LinearProbe(backbone, names, weight.float().to(place), bias.float().to(place))
    row = get_method(settings.method)
    learned = {"text_prompt"} if row.text else set[str]()
    learned |= {"visual_prompt"} if row.visual else set()
    if tensors.keys() != learned:
        raise UserError(
            f"{run.prompts_file} does not hold what method '{settings.method}' learns; train again"
        )
    for name, prompt in tensors.items():
        check_prompt(backbone, name.removesuffix("_prompt"), prompt, str(run.prompts_file))
    prompts = Prompts(tensors.get("text_prompt"), tensors.get("visual_prompt"))
    prompts = prompts.to(backbone.device).requires_grad_(False)
    return PromptedClassifier(
        backbone,
        names,
        prompts,
        settings.template or template or own_template,
        text_memory=text_memory(settings),
    )
