"""The best that a few photos can give: closed forms, their choice, and what they promise."""

import json
import re
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dapt import PromptClassifier
from dapt.cli import app
from dapt.clip.sources import load_backbone
from dapt.data import open_task
from dapt.engine.data import Data, open_data
from dapt.engine.evaluate import evaluate_task, evaluate_zero_shot
from dapt.engine.features import Shared
from dapt.engine.fit import fit
from dapt.engine.forecast import forecast, wilson
from dapt.errors import UserError
from dapt.methods import METHODS, Evidence, auto, get_method
from dapt.methods.contract import Examples
from dapt.methods.held_out import frequencies, rounds, sharpness
from dapt.methods.kernel_ridge import Ridge, expanded, similarity, summed
from dapt.methods.prototypes import Prototypes
from dapt.progress import Reporter
from dapt.settings import make_settings


@lru_cache
def shared():
    return Shared(load_backbone("bundled", device="cpu"))


def bundled(method="auto", **given):
    return make_settings({"dataset": "bundled", "method": method, "device": "cpu", **given})


def accuracy(data, settings):
    tuned = fit(data, settings, shared=shared())
    return tuned, evaluate_task(tuned.classifier, data.task, settings, shared=shared())["accuracy"]


def features(labels, classes, spread=0.4, seed=0):
    """Features (n, 16) around centres (C, 16), all of length one."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(classes, 16, generator=generator), dim=-1)
    noise = spread * torch.randn(len(labels), 16, generator=generator)
    return F.normalize(centres[labels] + noise, dim=-1), centres


@pytest.mark.parametrize("shots", [1, 4])
def test_auto_is_better_than_no_tuning(shots):
    chosen = bundled(shots=shots)
    data = open_data(chosen)
    tuned, found = accuracy(data, chosen)
    zero = evaluate_zero_shot(data.task, chosen, Reporter(), shared())["accuracy"]
    assert found > zero + 0.03
    told = forecast(tuned)
    assert told["low"] <= told["accuracy"] <= told["high"]
    assert told["advice"].endswith(".")


def test_class_names_that_mean_nothing_get_no_say():
    chosen = bundled(shots=4)
    data = open_data(chosen)
    names = tuple(f"c{i:02d}" for i in range(len(data.task.class_names)))

    def renamed(items):
        return tuple(replace(item, class_name=names[item.label]) for item in items)

    task = replace(data.task, class_names=names, test=renamed(data.task.test))
    support = replace(
        data.support, train=renamed(data.support.train), val=renamed(data.support.val)
    )
    coded = Data(task, support)
    _, found = accuracy(coded, chosen)
    _, probe = accuracy(coded, chosen.model_copy(update={"method": "linear-probe"}))
    assert found >= probe - 0.02


def test_of_very_many_images_some_tell_whether_names_mean_anything(monkeypatch):
    labels = torch.arange(40).repeat_interleave(4)
    x, text = features(labels, 40)

    def fitted():
        head = METHODS["auto"].head(20.0)
        head.fit(Evidence(Examples(x, labels), None, text, 20.0, lambda v: x[None]), bundled())
        return head(x, text)

    whole = fitted()
    monkeypatch.setattr(auto, "MOST_LOGITS", 1000)  # of 6400
    torch.testing.assert_close(fitted(), whole)


def test_what_is_held_out_is_what_a_fit_without_it_says():
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 2])
    x, text = features(labels, 3)
    left_out = rounds(labels, 3, seed=0)
    assert sorted(torch.cat(left_out).tolist()) == list(range(8))
    found = torch.cat([Ridge(x, labels, text, 1.0, 0).held_out(0.1, a, left_out) for a in (0, 1)])
    means = Prototypes(x, labels, text)
    expected, plain = [], []
    for a in (0.0, 1.0):
        for images in left_out:
            kept = torch.tensor([i for i in range(8) if i not in images.tolist()])
            kernel = (-torch.cdist(x, x).square()).exp().double()
            target = F.one_hot(labels, 3).double() - a * (x @ text.T).double()
            solved = torch.linalg.solve(
                kernel[kept][:, kept] + 0.1 * torch.eye(len(kept)), target[kept]
            )
            expected.append(a * (x[images] @ text.T) + (kernel[images][:, kept] @ solved).float())
            if a:
                less = Prototypes(x[kept], labels[kept], text)
                plain.append(x[images] @ less.weight(2.0).T)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(means.held_out(2.0, left_out), torch.cat(plain), rtol=0, atol=1e-6)


def scattered(classes=10, images=16):
    """Features (n, 16) whose classes scatter far more in four directions than in the others."""
    labels = torch.arange(classes).repeat_interleave(images)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(labels), 16, generator=generator) * 0.1
    noise[:, :4] *= 12
    centres = torch.randn(classes, 16, generator=generator)
    return F.normalize(centres[labels] * 0.15 + noise, dim=-1), labels, F.normalize(centres, dim=-1)


def evidence(x, labels, text):
    return Evidence(Examples(x, labels), None, text, 20.0, lambda v: x[None])


def test_even_coordinates_are_judged_by_images_that_they_do_not_know():
    x, labels, text = scattered()
    pieces = auto.Pieces(x, labels, text, seed=0)
    even = next(kernel for kernel in pieces.tried if kernel.even)
    found = pieces["ridge", even, 0.1, 1.0].held_out
    expected = []
    for half in pieces.halves:
        unseen = torch.cat(half).tolist()
        others = torch.tensor([i for i in range(len(x)) if i not in unseen])
        turn = auto.evened(x[others], labels[others], len(text))
        seen = F.normalize(x @ turn, dim=-1)
        kernel = (-even.width * torch.cdist(seen, seen).square()).exp().double()
        target = F.one_hot(labels, len(text)).double() - (x @ text.T).double()
        for images in half:
            kept = torch.tensor([i for i in range(len(x)) if i not in images.tolist()])
            solved = torch.linalg.solve(
                kernel[kept][:, kept] + 0.1 * torch.eye(len(kept)), target[kept]
            )
            expected.append(x[images] @ text.T + (kernel[images][:, kept] @ solved).float())
    assert sorted(torch.cat(pieces.rows).tolist()) == list(range(len(x)))
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-4)


def test_scatter_is_evened_out_where_that_helps_and_comes_back(monkeypatch):
    x, labels, text = scattered()
    own, new = torch.arange(len(x)) % 16 < 8, torch.arange(len(x)) % 16 >= 8

    def fitted():
        head = METHODS["auto"].head(20.0)
        head.fit(evidence(x[own], labels[own], text), bundled())
        return head

    even = fitted()
    again = METHODS["auto"].head(20.0)
    again.load(even.state_dict(), len(text), 16, "file")
    assert torch.equal(again(x, text), even(x, text))
    with pytest.raises(UserError, match="does not hold"):
        again.load(even.state_dict() | {"turn": torch.eye(15)}, len(text), 16, "file")
    others = {kernel: own for kernel, own in auto.PENALTIES.items() if not kernel.even}
    monkeypatch.setattr(auto, "PENALTIES", others)
    plain = fitted()
    assert plain.turn is None
    assert "turn" not in plain.state_dict()
    again.load(plain.state_dict(), len(text), 16, "file")
    assert torch.equal(again(x, text), plain(x, text))

    def loss(head):
        return float(F.cross_entropy(head(x[new], text), labels[new]))

    assert loss(even) < loss(plain)


@pytest.mark.parametrize("kernel", auto.PENALTIES)
def test_a_kernels_large_values_do_not_cost_precision(kernel):
    """So an exported file, whose runtime adds in another order, says the same."""
    labels = torch.arange(60).repeat_interleave(16)
    x, text = features(labels, 60)
    penalty = min(auto.PENALTIES[kernel])
    values = 20 * Ridge(x, labels, text, kernel.width, 0).values(penalty, 1.0)
    bias, slope, rest = expanded(x, values, kernel.width)
    seen = features(labels, 60, seed=1)[0]
    found = summed(seen, x, kernel.width, bias, slope, rest)
    true = similarity(seen.double(), x.double(), kernel.width) @ values
    error = float((found - true).abs().max())
    plainly = similarity(seen, x, kernel.width) @ values.float()
    assert error < 3e-4  # of logits up to 20
    assert error < float((plainly - true).abs().max()) / 2


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_a_round_takes_one_image_of_a_class_and_never_its_only_one(labels, seed):
    labels = torch.tensor(labels)
    counts = torch.bincount(labels, minlength=5)
    seen = []
    for images in rounds(labels, 5, seed):
        own = labels[images].tolist()
        assert len(set(own)) == len(own)
        assert all(counts[c] > 1 for c in own)
        seen += images.tolist()
    assert len(set(seen)) == len(seen)


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_sharpness_is_the_best_factor(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 5, generator=generator)
    labels = torch.where(
        torch.rand(40, generator=generator) < 0.6, logits.argmax(-1),
        torch.randint(5, (40,), generator=generator),
    )  # fmt: skip
    factor, losses = sharpness(logits, labels)
    for other in (0.9 * factor, 1.1 * factor):
        assert losses.mean() <= F.cross_entropy(other * logits, labels) + 1e-6


@pytest.mark.parametrize("method", ["auto", "kernel-ridge", "text-prototype"])
@pytest.mark.parametrize(
    ("labels", "classes"),
    [([0], 1), ([0, 0, 0], 1), ([0, 1], 2), ([0], 2), ([0] * 300 + [1], 2), ([0, 1, 1, 3], 4)],
)
def test_any_numbers_of_images_give_finite_logits(method, labels, classes):
    x, text = features(torch.tensor(labels), classes)
    for own in (x, x[:1].expand(len(x), -1)):  # and all images equal
        head = METHODS[method].head(20.0)
        evidence = Evidence(
            Examples(own, torch.tensor(labels)), None, text, 20.0, lambda v, o=own: o[None]
        )
        head.fit(evidence, bundled(method))
        logits = head(x, text)
        assert logits.shape == (len(x), classes)
        assert logits.isfinite().all()


def test_a_class_without_images_is_told_by_its_name():
    labels = torch.arange(3).repeat_interleave(4)
    x, text = features(labels, 4, spread=0.2)
    head = METHODS["auto"].head(20.0)
    head.fit(Evidence(Examples(x, labels), None, text, 20.0, lambda v: x[None]), bundled())
    assert int(head(text[3:], text).argmax()) == 3


def test_data_of_ones_own_gets_auto_and_named_tasks_the_papers_method(
    photo_folder, tiny_weights, tmp_path
):
    run = tmp_path / "run"
    command = ["train", str(photo_folder), "-b", str(tiny_weights), "--device", "cpu"]
    made = CliRunner().invoke(app, [*command, "-o", str(run)])
    assert made.exit_code == 0, made.output
    assert json.loads((run / "settings.json").read_text())["method"] == "auto"
    assert make_settings({"dataset": "bundled"}).method == "dapt"
    assert make_settings({"dataset": "caltech101"}).method == "dapt"
    assert PromptClassifier().method == "auto"


def test_a_head_goes_on_any_methods_features(photo_folder, tiny_weights):
    row = get_method("coop+lp++")
    assert row.head is METHODS["lp++"].head
    assert row.parts == METHODS["coop"].parts
    given = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
             "shots": 2, "epochs": 1, "text_vectors": 2}  # fmt: skip
    chosen = make_settings({**given, "method": "coop+kernel-ridge"})
    tuned = fit(open_data(chosen), chosen)
    plain = fit(open_data(chosen), make_settings({**given, "method": "coop"}))
    kept = tuned.classifier.tensors()
    assert {"keys", "values"} < kept.keys()
    assert torch.equal(kept["text_prompt"], plain.classifier.tensors()["text_prompt"])
    for name, sentence in (("coop+vpt", "fits no head"), ("coop+gd", "did you mean 'gda'")):
        with pytest.raises(UserError, match=sentence):
            get_method(name)


def test_the_head_goes_on_the_method_of_a_settings_file(photo_folder, tiny_weights, tmp_path):
    config, run = tmp_path / "mine.yaml", tmp_path / "run"
    config.write_text("method: coop\nepochs: 1\ntext_vectors: 2\nshots: 2\n")
    command = ["train", str(photo_folder), "-b", str(tiny_weights), "--device", "cpu"]
    more = ["-c", str(config), "--head", "text-prototype", "-o", str(run)]
    made = CliRunner().invoke(app, [*command, *more])
    assert made.exit_code == 0, made.output
    assert json.loads((run / "settings.json").read_text())["method"] == "coop+text-prototype"
    again = CliRunner().invoke(app, ["train", "-o", str(run), "--resume"])
    assert again.exit_code == 0, again.output


def test_classes_weigh_as_often_as_they_are_everywhere():
    weights = frequencies(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1, 1]), 2)
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[2]) == pytest.approx(0.75)
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # a table's


def test_thresholds_and_sets_keep_their_word(tmp_path):
    runner, run = CliRunner(), str(tmp_path / "run")
    made = runner.invoke(app, ["train", "bundled", "-m", "auto", "--shots", "8", "-o", run])
    assert made.exit_code == 0, made.output
    assert "expected on new photos like these" in made.output
    task = open_task("bundled")
    images = [str(task.image_path(item)) for item in task.test]
    labels = [item.class_name for item in task.test]

    def predicted(*options):
        said = runner.invoke(app, ["predict", run, *images, "--json", *options])
        assert said.exit_code == 0, said.output
        return [json.loads(line) for line in said.stdout.splitlines()], said.stderr

    rows, told = predicted("--unknown", "auto", "--known-share", "0.9")
    assert 0.82 < np.mean([not row["unknown"] for row in rows]) < 0.97
    limit, share = map(float, re.search(r"below ([\d.]+) %; ([\d.]+) % of", told).groups())
    best = [100 * row["classes"][0]["probability"] for row in rows]
    assert max(p for p, row in zip(best, rows, strict=True) if row["unknown"]) < limit + 0.05
    assert min(p for p, row in zip(best, rows, strict=True) if not row["unknown"]) > limit - 0.05
    assert share == 90
    rows, _ = predicted("--set-coverage", "0.9")
    inside = [
        y in [c["class"] for c in row["classes"]] for y, row in zip(labels, rows, strict=True)
    ]
    assert 0.83 < np.mean(inside) < 0.97
    refused = runner.invoke(app, ["predict", run, images[0], "--set-coverage", "0.9", "-f", "csv"])
    assert refused.exit_code == 2
    assert "no room" in refused.stderr
    zero = str(tmp_path / "zero")
    runner.invoke(app, ["train", "bundled", "-m", "zero-shot", "-o", zero])
    refused = runner.invoke(app, ["predict", zero, images[0], "--unknown", "auto"])
    assert refused.exit_code == 2
    assert "--method auto" in refused.stderr


def test_the_estimators_default_fits_and_comes_back(photo_folder, tiny_weights, tmp_path):
    paths = sorted((photo_folder / "train").rglob("*.png"))
    labels = [path.parent.name for path in paths]
    made = PromptClassifier(str(tiny_weights)).fit(paths, labels)
    again = PromptClassifier.load(made.save(tmp_path / "run"))
    assert np.array_equal(made.predict_proba(paths), again.predict_proba(paths))
    assert "red panda" in made.add_classes(["red panda"]).classes_
