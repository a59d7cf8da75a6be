"""Several labels an image: how they are read and drawn, fitted, judged, predicted and served."""

import csv
import io
import json
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from typer.testing import CliRunner

from conftest import REPOSITORY
from dapt import PromptClassifier
from dapt.cli import app
from dapt.data import draw_support_set, load_support_set, open_task
from dapt.data.items import make_task
from dapt.engine.data import Data
from dapt.engine.evaluate import metrics_of_several
from dapt.engine.features import labels_of
from dapt.engine.fit import fit
from dapt.engine.forecast import average_precision
from dapt.errors import UserError
from dapt.methods import METHODS, Evidence
from dapt.methods.contract import Examples
from dapt.methods.held_out import rounds
from dapt.methods.kernel_ridge import Ridge
from dapt.methods.prototypes import Prototypes
from dapt.methods.sigmoids import Sigmoids, as_everywhere, best_thresholds, calibrated
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.serve.served import load_served
from dapt.settings import make_settings

runner = CliRunner()
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 70), "grey": (128, 128, 128),
           "red": (200, 50, 40)}  # fmt: skip


def dapt(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Images of one to three colours, in stripes, and the table that lists them."""
    root, generator = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    sets = [names for count in (1, 2, 3) for names in combinations(COLOURS, count)]
    rows = []
    for part, times in (("train", 3), ("test", 2)):
        for number, names in enumerate(sets * times):
            pixels = generator.normal(0, 15, (32, 30, 3))
            for stripe, name in enumerate(names):
                width = 30 // len(names)
                pixels[:, stripe * width : (stripe + 1) * width] += COLOURS[name]
            path = f"{part}{number}.png"
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(root / path)
            rows.append((path, " | ".join(names), part))
    with (root / "stripes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return root / "stripes.csv"


@pytest.fixture(scope="module")
def run(table, tiny_weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stripes"
    made = dapt("train", table, "-b", tiny_weights, "--device", "cpu", "--shots", 8, "-o", folder)
    assert made.exit_code == 0, made.output
    assert "mAP" in made.output
    assert "expected on new photos" in made.output
    return RunDirectory(folder)


def test_validation_images_are_judged_once(table, tiny_weights):
    task = open_task(str(table))
    parts = replace(task, train=task.train[::2], val=task.train[1::2])
    chosen = make_settings({"dataset": str(table), "backbone": str(tiny_weights), "device": "cpu",
                            "method": "auto", "shots": 4})  # fmt: skip
    support = draw_support_set(parts, 4, 1)
    assert support.val
    held = fit(Data(parts, support), chosen).held_out
    assert len(held.labels) == len(support.train) + len(support.val)


def listed(root, text, name="list.csv"):
    (root / name).write_text(text)
    return root / name


def labels_by_path(task):
    return {
        item.path: {task.class_names[k] for k in item.labels}
        for part in (task.train, task.test)
        for item in part
    }


def test_a_cell_with_bars_and_a_list_are_several_labels(tmp_path):
    rows = [
        ("a.png", "cat|dog", "train"),
        ("b.png", "dog", "train"),
        ("c.png", "cat | dog", "test"),
    ]
    text = "\n".join(",".join(row) for row in [("path", "label", "split"), *rows])
    lines = "\n".join(
        json.dumps({"path": p, "label": [n.strip() for n in k.split("|")], "split": s})
        for p, k, s in rows
    )
    for file in (listed(tmp_path, text), listed(tmp_path, lines, "list.jsonl")):
        task = open_task(str(file))
        assert task.multilabel
        assert task.class_names == ("cat", "dog")
        assert labels_by_path(task) == {
            "a.png": {"cat", "dog"}, "b.png": {"dog"}, "c.png": {"cat", "dog"}
        }  # fmt: skip


def test_a_bar_may_be_part_of_a_name_if_told(tmp_path):
    text = "path,label,split\na.png,x|y,train\nb.png,x|y,test\nc.png,z,train\n"
    plain = open_task(str(listed(tmp_path, text)), multi_label=False)
    assert not plain.multilabel
    assert plain.class_names == ("x|y", "z")


def test_one_label_each_stays_one_unless_told(tmp_path):
    file = listed(tmp_path, "path,label\na.png,x\nb.png,x\nc.png,y\nd.png,y\n")
    assert not open_task(str(file)).multilabel
    assert open_task(str(file), multi_label=True).multilabel


@pytest.mark.parametrize(
    ("name", "line"),
    [("a.csv", "b.png,"), ("a.csv", "b.png,cat|"), ("a.csv", "b.png,|"),
     ("a.csv", "b.png,cat||dog"), ("a.jsonl", '{"path": "b.png", "label": []}'),
     ("a.jsonl", '{"path": "b.png", "label": [1.5]}'),
     ("a.jsonl", '{"path": "b.png", "label": ["cat", ""]}'),
     ("a.jsonl", '{"path": "b.png", "label": [["cat"]]}'), ("a.jsonl", '{"path": "b.png"}')],
)  # fmt: skip
def test_a_blank_label_is_told_by_its_line(tmp_path, name, line):
    first = "path,label\na.png,cat|dog\n" if name.endswith("csv") else \
        '\n{"path": "a.png", "label": ["cat", "dog"]}\n'  # fmt: skip
    made = dapt("train", listed(tmp_path, f"{first}{line}\n", name), "-o", tmp_path / "run")
    assert made.exit_code == 2
    assert f"{name}, line 3: needs a path and a label" in made.stderr
    assert not (tmp_path / "run").exists()


def test_equal_files_of_class_folders_are_one_image_if_asked(tmp_path):
    for folder, shades in (("cat", (10, 20, 30)), ("dog", (20, 40, 50))):
        (tmp_path / folder).mkdir()
        for shade in shades:
            Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / folder / f"{shade}.png")
    assert len(labels_by_path(open_task(str(tmp_path)))) == 6
    found = labels_by_path(open_task(str(tmp_path), multi_label=True))
    assert len(found) == 5
    assert found["cat/20.png"] == {"cat", "dog"}


one_set = st.sets(st.integers(0, 5), min_size=1, max_size=4)
label_sets = st.lists(one_set, min_size=12, max_size=40).filter(lambda s: len(set().union(*s)) > 1)


@given(label_sets, st.integers(0, 99))
def test_a_split_leaves_every_class_something_to_tune_on(sets, seed):
    rows = [("", f"{i}.png", tuple(map(str, own))) for i, own in enumerate(sets)]
    task = make_task("made-up", None, rows, "rows", split=(0.5, seed), multilabel=True)
    assert {k for i in task.train for k in i.labels} == set(range(len(task.class_names)))
    assert len(task.train) + len(task.test) == len(sets)
    again = make_task("made-up", None, rows[::-1], "rows", split=(0.5, seed), multilabel=True)
    assert set(again.test) == set(task.test)


@given(label_sets, st.integers(1, 6), st.integers(0, 99))
def test_a_draw_has_the_shots_of_every_class_and_wastes_no_image(sets, shots, seed):
    rows = [("train", f"{i}.png", tuple(map(str, own))) for i, own in enumerate(sets)]
    task = make_task(
        "made-up", None, [*rows, ("test", "t.png", rows[0][2])], "rows", multilabel=True
    )
    drawn = draw_support_set(task, shots, seed)
    assert drawn == draw_support_set(task, shots, seed)
    assert len(set(drawn.train)) == len(drawn.train) <= shots * len(task.class_names)
    counts, there = (
        labels_of(items, len(task.class_names)).sum(0) for items in (drawn.train, task.train)
    )
    assert bool((counts >= there.clamp(max=shots)).all())


def test_a_saved_draw_comes_back_with_all_labels(table, tmp_path):
    task, file = open_task(str(table)), tmp_path / "drawn.json"
    drawn = draw_support_set(task, 2, 1)
    drawn.save(file)
    assert load_support_set(file, task) == drawn
    values = json.loads(file.read_text())
    place = next(i for i, item in enumerate(values["train"]) if "others" in item)
    for bad in ([99], [-1], "1", [True], [values["train"][place]["label"]]):
        values["train"][place]["others"] = bad
        file.write_text(json.dumps(values))
        with pytest.raises(UserError, match=f"train entry {place}: 'others'"):
            load_support_set(file, task)


def several(images=40, classes=4, seed=0, spread=0.3):
    """Features (n, 16) of length one, labels (n, C) and class features (C, 16)."""
    same, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(classes, 16, generator=same), dim=-1)
    labels = (torch.rand(images, classes, generator=generator) < 0.4).float()
    labels[torch.arange(images), torch.arange(images) % classes] = 1
    noise = spread * torch.randn(images, 16, generator=generator)
    return F.normalize(labels @ centres + noise, dim=-1), labels, centres


def test_what_is_held_out_is_what_a_fit_without_it_says():
    x, labels, text = several(12, 3)
    lots = rounds(labels, 3, seed=0)
    assert sorted(torch.cat(lots).tolist()) == list(range(12))
    ridge, means = Ridge(x, labels, text, 1.0, 0), Prototypes(x, labels, text)
    expected, plain = [], []
    for lot in lots:
        kept = torch.tensor([i for i in range(12) if i not in lot.tolist()])
        less = Ridge(x[kept], labels[kept], text, 1.0, 0)
        near = (-torch.cdist(x[lot], x[kept]).square()).exp()
        expected.append(x[lot] @ text.T + near @ less.values(0.1, 1.0).float())
        plain.append(x[lot] @ Prototypes(x[kept], labels[kept], text).weight(2.0).T)
    torch.testing.assert_close(
        ridge.held_out(0.1, 1.0, lots), torch.cat(expected), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(means.held_out(2.0, lots), torch.cat(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_finds_the_best_factor_and_biases(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = several(60, 4, seed)[1]
    logits = 3 * labels + 2 * torch.randn(60, 4, generator=generator) + torch.arange(4)
    weights = 0.5 + torch.rand(60, 4, generator=generator)
    factor, bias, losses = calibrated(logits, labels, weights)
    true, false = (weights * labels).sum(0), (weights * (1 - labels)).sum(0)
    target = torch.where(labels > 0, (true + 1) / (true + 2), 1 / (false + 2))

    def left(factor, bias):
        found = F.binary_cross_entropy_with_logits(factor * logits + bias, target, reduction="none")
        return float((weights * found).sum())

    assert float(losses.sum()) == pytest.approx(left(factor, bias), rel=1e-5)
    for change in (0.97, 1.03):
        assert left(change * factor, bias) >= left(factor, bias) - 1e-4
    for c in range(4):
        for change in (-0.05, 0.05):
            other = bias.clone()
            other[c] += change
            assert left(factor, other) >= left(factor, bias) - 1e-4
    # What says the contrary of the labels says nothing: a factor below zero is not taken.
    assert calibrated(-logits, labels, weights)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("labels", [torch.zeros(6, 3), torch.ones(6, 3), torch.eye(6)[:, :3]])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_any_labels_and_logits_give_finite_probabilities(labels, scale):
    sigmoids = Sigmoids(3)
    sigmoids.fit(scale * torch.randn(6, 3), labels, torch.ones(6, 3))
    assert all(bool(tensor.isfinite().all()) for tensor in sigmoids.state_dict().values())
    assert bool(((sigmoids.thresholds > 0) & (sigmoids.thresholds < 1)).all())


def test_thresholds_of_many_images_have_the_highest_f1():
    labels = (torch.rand(4000, 2) < torch.tensor([0.1, 0.5])).float()
    chances = (1.5 * labels + torch.randn(4000, 2) - 1).sigmoid()
    thresholds = best_thresholds(chances, labels, torch.ones(4000, 2))
    for c in range(2):
        every = [f1_score(labels[:, c], chances[:, c] >= t) for t in np.linspace(0.01, 0.99, 99)]
        assert f1_score(labels[:, c], chances[:, c] >= thresholds[c]) > max(every) - 0.01
    few = best_thresholds(chances[:30], labels[:30], torch.ones(30, 2))
    assert abs(few.logit().diff()) < abs(thresholds.logit().diff()) + 2


def test_weights_make_labels_as_frequent_as_everywhere():
    here, there = several(40)[1], several(400, seed=1)[1]
    there[:, 0] = (torch.arange(400) % 50 == 0).float()
    weights = as_everywhere(here, there)
    frequency = (weights * here).sum(0) / weights.sum(0)
    torch.testing.assert_close(frequency, there.mean(0), rtol=1e-4, atol=1e-5)
    assert bool((as_everywhere(torch.eye(3), torch.zeros(5, 3)) == 1).all())


def test_average_precision_is_scikit_learns_with_ties_and_weights():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 8, 50).astype(float)
    truth, weights = generator.integers(0, 2, 50), generator.integers(0, 3, (4, 50))
    found = average_precision(scores, truth, weights)
    expected = [average_precision_score(truth, scores, sample_weight=w) for w in weights]
    assert found == pytest.approx(expected)


def test_figures_are_those_of_scikit_learn():
    truth = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]]).float()
    logits = torch.tensor([[2.0, -1, 1, -2], [1, 2, -1, -1], [3, -2, -3, -1]])
    found = metrics_of_several(logits, truth, torch.full((4,), 0.5), list("abcd"))
    said = (logits > 0).numpy()
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["map"] == pytest.approx(
        average_precision_score(truth[:, :3].numpy(), logits[:, :3].numpy())
    )
    assert found["micro_f1"] == pytest.approx(f1_score(truth, said, average="micro"))
    assert [row["accuracy"] for row in found["per_class"]] == [1, 0.5, 1, None]
    assert "ap" not in found["per_class"][3]


@pytest.mark.parametrize("method", ["auto", "kernel-ridge"])
def test_a_few_images_tell_labels_apart(method):
    x, labels, _ = several(40, 4)
    new, truth, _ = several(200, 4, seed=1)
    blank = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(9)), dim=-1)
    head = METHODS[method].head(20.0)
    settings = make_settings({"dataset": "bundled", "method": method})
    held = head.fit(
        Evidence(Examples(x, labels), None, blank, 20.0, lambda v: x[None].expand(v, -1, -1)),
        settings,
    )
    assert held.labels.shape == held.logits.shape == labels.shape
    assert average_precision_score(truth, head(new, blank)) > truth.mean() + 0.2


@pytest.mark.parametrize("method", ["auto", "kernel-ridge"])
def test_one_image_a_class_still_gives_finite_logits(method):
    x, text = F.normalize(torch.randn(2, 16), dim=-1), F.normalize(torch.randn(4, 16), dim=-1)
    labels = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0]])
    head = METHODS[method].head(20.0)
    evidence = Evidence(Examples(x, labels), None, text, 20.0, lambda v: x[None].expand(v, -1, -1))
    assert head.fit(evidence, make_settings({"dataset": "bundled", "method": method})) is None
    assert head(x, text).isfinite().all()


def test_a_run_keeps_what_its_figures_say(run, table):
    metrics = run.read_metrics()
    assert metrics.test.map > 0.5
    told = metrics.map_forecast
    assert told.low <= told.map <= told.high
    assert metrics.forecast is None
    assert run.read_task().multilabel
    assert any(item.others for item in run.read_support().train)
    again = dapt("eval", run.path, "--json")
    assert json.loads(again.output[again.output.index("{") :]) == metrics.test.model_dump(
        by_alias=True, exclude_none=True
    ) | {"per_class": [s.model_dump(by_alias=True, exclude_none=True)
                       for s in metrics.test.per_class]}  # fmt: skip


def test_predictions_name_every_label_that_reaches_its_threshold(run, table):
    images = sorted(table.parent.glob("test*.png"))
    classifier = load_classifier(run)
    assert 0 < classifier.thresholds.min() <= classifier.thresholds.max() < 1

    def said(form):
        found = dapt("predict", run.path, *images, "-f", form)
        assert found.exit_code == 0, found.output
        return found.stdout

    rows = [json.loads(line) for line in said("json").splitlines()]
    sizes = {len(row["classes"]) for row in rows}
    assert len(sizes) > 1
    limits = dict(zip(classifier.class_names, classifier.thresholds.tolist(), strict=True))
    for row in rows:
        assert all(c["probability"] >= limits[c["class"]] for c in row["classes"])
    table_of = list(csv.DictReader(io.StringIO(said("csv"))))
    for row, cells in zip(rows, table_of, strict=True):
        assert [c["class"] for c in row["classes"]] == list(filter(None, cells["label"].split("|")))
    assert len(said("lines").splitlines()) == len(images)
    assert "labels" in said("table")
    for option in (("--top", 2), ("--unknown", "auto"), ("--set-coverage", 0.9)):
        refused = dapt("predict", run.path, images[0], *option)
        assert refused.exit_code == 2
        assert option[0] in refused.stderr


def test_zero_shot_gets_thresholds_and_a_forecast_too(table, tiny_weights, tmp_path):
    made = dapt("train", table, "-m", "zero-shot", "-b", tiny_weights, "-o", tmp_path / "run")
    assert made.exit_code == 0, made.output
    found = RunDirectory(tmp_path / "run")
    assert found.read_metrics().map_forecast is not None
    assert bool((load_classifier(found).thresholds != 0.5).any())


@pytest.mark.parametrize("method", ["dapt", "linear-probe", "tip-adapter", "coop+kernel-ridge"])
def test_a_method_of_one_label_each_is_refused_before_anything_is_written(
    table, tiny_weights, tmp_path, method
):
    made = dapt("train", table, "-b", tiny_weights, "-m", method, "-o", tmp_path / "run")
    assert made.exit_code == 2
    assert "use zero-shot, kernel-ridge or auto" in made.stderr
    assert not (tmp_path / "run").exists()


def test_what_only_one_label_an_image_allows_is_refused(run, table, tiny_weights, tmp_path):
    refused = dapt("train", table, "-s", "classes=base", "-o", tmp_path / "a")
    assert refused.exit_code == 2
    assert "use all classes" in refused.stderr
    refused = dapt("suggest", run.path, table.parent)
    assert refused.exit_code == 2
    assert "'dapt suggest' is for one label an image" in refused.stderr
    one = tmp_path / "one"
    text = "path,label,split\n" + "".join(
        f"{part}{i}.png,{name},{part}\n"
        for part in ("train", "test")
        for i, name in enumerate(COLOURS)
    )
    file = listed(table.parent, text, "one.csv")
    made = dapt("train", file, "-m", "zero-shot", "-b", tiny_weights, "-o", one)
    assert made.exit_code == 0, made.output
    refused = dapt("eval", one, "--dataset", table)
    assert refused.exit_code == 2
    assert "have several labels" in refused.stderr


def test_a_damaged_run_is_refused_in_a_sentence(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in run.files():
        (copy / file.name).write_bytes(file.read_bytes())
    task = json.loads((copy / "task.json").read_text())
    (copy / "task.json").write_text(json.dumps({**task, "multilabel": False}))
    refused = dapt("predict", copy, run.path.parent)
    assert refused.exit_code == 2
    zero = {**json.loads((copy / "settings.json").read_text()), "method": "zero-shot"}
    (copy / "settings.json").write_text(json.dumps(zero))
    (copy / "task.json").write_text(json.dumps({**task, "class_names": task["class_names"][:3]}))
    with pytest.raises(UserError, match="several labels an image need"):
        load_classifier(RunDirectory(copy))


def test_the_report_and_the_card_tell_of_map(run, tmp_path):
    from dapt.share.card import model_card

    made = dapt("report", run.path, "--out", tmp_path / "page.html", "--features")
    assert made.exit_code == 0, made.output
    assert "warning" not in made.output.replace("warning: stripes, Automatic", "")
    assert "mAP" in (tmp_path / "page-files" / "overview.md").read_text()
    assert "mean average precision" in model_card(run)


def test_an_export_gives_the_probability_of_each_class(run, tmp_path):
    made = dapt("export", run.path, "-f", "torch", "-o", tmp_path / "a.pt2")
    assert made.exit_code == 0, made.output
    extra = {"thresholds.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=extra).module()
    classifier, views = load_classifier(run), torch.randint(256, (3, 3, 32, 32)).to(torch.uint8)
    assert json.loads(extra["thresholds.json"]) == pytest.approx(classifier.thresholds.tolist())
    with torch.inference_mode():
        expected = classifier.probabilities(classifier(views))
        found = program(classifier.backbone.normalize(views))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert abs(found.sum(1) - 1).max() > 0.01


def test_a_server_answers_with_several_labels(run, table):
    from fastapi.testclient import TestClient
    from prometheus_client import CollectorRegistry

    from dapt.serve.app import Limits, create_app

    served = load_served(run)
    assert any(", " in name for name in served.support.class_names)
    image = sorted(table.parent.glob("test*.png"))[-1]
    with TestClient(create_app(served, Limits(), CollectorRegistry(), lambda: None)) as client:
        answer = client.post("/predict?top=1", files=[("images", image.open("rb"))]).json()
    said = json.loads(dapt("predict", run.path, image, "--json").stdout)
    names = [c["class"] for c in answer["predictions"][0]["classes"]]
    assert names == [c["class"] for c in said["classes"]]


def test_the_estimator_takes_and_gives_lists(table, tiny_weights, tmp_path):
    task = open_task(str(table))
    paths = [task.image_path(item) for item in task.train]
    labels = [[task.class_names[k] for k in reversed(item.labels)] for item in task.train]
    made = PromptClassifier(str(tiny_weights), device="cpu").fit(paths, labels)
    chances, found = made.predict_proba(paths), made.predict(paths)
    assert chances.shape == (len(paths), 4)
    assert abs(chances.sum(1) - 1).max() > 0.01
    assert all(isinstance(own, list) for own in found)
    right = np.mean([set(own) == set(said) for own, said in zip(labels, found, strict=True)])
    assert made.score(paths, labels) == pytest.approx(right)
    again = PromptClassifier.load(made.save(tmp_path / "run"))
    assert np.array_equal(again.predict_proba(paths), chances)
    assert again.predict(paths).tolist() == found.tolist()
    numbered = PromptClassifier(str(tiny_weights), class_names=["blue", "green", "grey", "red"])
    codes = [[list(COLOURS).index(name) for name in own] for own in labels]
    assert numbered.fit(paths, codes).predict(paths)[0][0] in range(4)


@pytest.mark.parametrize("bad", [[], "red", None])
def test_the_estimator_refuses_what_is_no_list(table, tiny_weights, bad):
    task = open_task(str(table))
    paths = [task.image_path(item) for item in task.train[:3]]
    with pytest.raises(ValueError, match="give each image a list"):
        PromptClassifier(str(tiny_weights)).fit(paths, [["red"], bad, ["blue", "red"]])
    with pytest.raises(ValueError, match="3 images, but 2 lists"):
        PromptClassifier(str(tiny_weights)).fit(paths, [["red"], ["blue", "red"]])


def test_the_tables_of_the_documentation_are_read(tmp_path):
    page = (REPOSITORY / "docs" / "multi-label.md").read_text()
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```$", page, re.M | re.S)
    text = next(block for block in blocks if block.startswith("path,label"))
    found = labels_by_path(open_task(str(listed(tmp_path, text))))
    line = next(block for block in blocks if block.startswith("{"))
    first = json.loads(line)
    assert found[first["path"]] == set(first["label"]) == {"daisy", "garden"}
