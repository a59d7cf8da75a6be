"""Photos that need a second look, and those to label next."""

import csv
import io
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from dapt.cli import app
from dapt.clip.image import image_features
from dapt.clip.sources import load_backbone
from dapt.data import ImageStore, Item, Task, draw_support_set, open_task
from dapt.engine import photos
from dapt.engine.classifier import Classifier
from dapt.engine.features import encode_store
from dapt.engine.photos import classes_alike, find_copies, label_doubts, look_at_photos, nearness
from dapt.engine.suggest import unlike
from dapt.run.train import train
from dapt.settings import make_settings

runner = CliRunner()


def dapt(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("bundled")


@pytest.fixture(scope="module")
def drawings(backbone):
    """The bundled task, features and labels of its train images, and text features."""
    task = open_task("bundled")
    sources = [task.source(item) for item in task.train]
    store = ImageStore(sources, **backbone.preprocessing.of_views())
    features = encode_store(lambda views: image_features(backbone, views), store)
    text = Classifier(backbone, task.class_names, template=task.template).text_features()
    return task, features, torch.tensor([item.label for item in task.train]), text


def swapped(drawings, shots, seed):
    """Features and labels of a support set, a tenth of them wrong; and which those are."""
    task, features, labels, _ = drawings
    place = {item.path: i for i, item in enumerate(task.train)}
    drawn = [place[item.path] for item in draw_support_set(task, shots, seed).train]
    generator, given = torch.Generator().manual_seed(seed), labels[drawn]
    wrong = torch.randperm(len(drawn), generator=generator)[: round(0.1 * len(drawn))]
    other = torch.randint(1, len(task.class_names), (len(wrong),), generator=generator)
    given[wrong] = (given[wrong] + other) % len(task.class_names)
    return features[drawn], given, wrong


@pytest.mark.parametrize("shots", [16, 8])
@pytest.mark.parametrize("names", ["meaningful", "shuffled"])
def test_swapped_labels_come_first(drawings, backbone, shots, names):
    """A tenth of labels is wrong; the bar is lower for names that say nothing of the photos."""
    text, told, false, count, least = drawings[3], 0, 0, 0, 0.7
    if names == "shuffled":
        text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
        least = 0.6
    for seed in range(1, 6):
        features, labels, wrong = swapped(drawings, shots, seed)
        found = label_doubts(features, labels, text, backbone.logit_scale)
        first = found.score.argsort(descending=True)[: round(0.15 * len(labels))]
        assert torch.isin(wrong, first).double().mean() >= least, f"seed {seed}"
        told += int(found.doubtful[wrong].sum())
        false += int(found.doubtful.sum()) - int(found.doubtful[wrong].sum())
        count += len(wrong)
    if names == "meaningful":
        assert told > 0.7 * count
        assert false < count, "a tenth of all"


def test_left_out_in_closed_form_is_left_out(drawings, backbone, monkeypatch):
    """Against a fit for each image without it; and with few landmarks, nearly the same."""
    features, labels, _ = swapped(drawings, 2, 1)
    x, text, scale = features.double(), drawings[3].double(), backbone.logit_scale
    apart = torch.cdist(x, x).square()
    kernel = (-photos._SHARPNESS / apart.median() * apart).exp()
    one_hot = F.one_hot(labels, 34).double()
    zero_shot = (scale / photos._TEXT_HEAT * x @ text.T).softmax(-1)
    left = {}
    for name, target in (("label", one_hot), ("text", zero_shot)):
        rows = []
        for i in range(len(x)):
            others = [j for j in range(len(x)) if j != i]
            inner = kernel[others][:, others] + photos._RIDGE * torch.eye(len(others))
            rows.append(target[i] - kernel[i, others] @ torch.linalg.solve(inner, target[others]))
        left[name] = torch.stack(rows)
    weight = ((left["label"] * left["text"]).sum() / left["text"].square().sum()).clamp(0, 1)
    made = one_hot - left["label"] + weight * left["text"]
    expected = (photos._COLD * made).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    found = label_doubts(features, labels, drawings[3], scale)
    torch.testing.assert_close(found.score, -expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(photos, "_LANDMARKS", 40)
    few = label_doubts(features, labels, drawings[3], scale)
    assert torch.corrcoef(torch.stack([few.score, found.score]))[0, 1] > 0.7


WAYS = {
    "copied.png": lambda image: image,
    "again.jpg": lambda image: image,
    "small.png": lambda image: image.resize((image.width // 2, image.height // 2)),
    "large.png": lambda image: image.resize((image.width * 2, image.height * 2)),
    "mirrored.png": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "mirrored.jpg": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder of drawings, of which some are in test once more, changed; and which those are."""
    root, task, pairs = tmp_path_factory.mktemp("planted"), open_task("bundled"), {}
    for number, item in enumerate(task.train[::5]):
        source = task.image_path(item)
        folder = root / "train" / item.class_name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / source.name)
        way, change = list(WAYS.items())[number % len(WAYS)]
        copy = root / "test" / item.class_name / f"{source.stem}-{way}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        if way == "copied.png":
            shutil.copy(source, copy)
        else:
            change(Image.open(source).convert("RGB")).save(copy, quality=80)
        pairs[copy.relative_to(root).as_posix()] = (folder / source.name).relative_to(root)
    return root, pairs


def test_planted_copies_are_found(planted, backbone):
    root, pairs = planted
    found = look_at_photos(open_task(str(root)), backbone)
    copies = {copy.second.path: copy for copy in found.copies}
    for second, first in pairs.items():
        copy = copies.pop(second)
        assert copy.leaks
        assert copy.first.path == first.as_posix()
        if copy.kind == "same file":
            assert "copied" in second
        else:
            # What is like its own mirror image may be called either.
            assert "copied" not in second
            assert copy.kind == "near copy" or "mirrored" in second
    assert len(copies) <= 3, "false alarms"
    assert {copy.kind for copy in found.copies} == {"same file", "near copy", "mirrored"}


def test_false_alarms_are_few(backbone):
    """Drawings of the bundled task are alike (arrows to the left and right), but not by class."""
    found = look_at_photos(open_task("bundled"), backbone)
    assert len(found.copies) < 40
    assert not any(copy.labels_differ for copy in found.copies)
    assert len(found.labels) < 0.1 * found.images
    assert ("fruit", "vegetable") in [pair.classes for pair in found.classes]
    assert found.skipped == []


def test_tiles_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(60, 8, generator=generator) + 1, dim=-1)
    labels = torch.arange(60) % 4
    small = torch.randint(256, (60, 3, 16, 16), generator=generator).byte()
    features[40], small[40] = features[3], small[3].flip(-1)
    features[50], small[50] = features[3], small[3]
    contents, text = list(range(60)), features[:4]

    def all_of_it():
        copies = find_copies(features, small, contents)
        alike = classes_alike(features, labels, text)
        doubts = label_doubts(features, labels, text, 5.0)
        return copies, nearness(features), doubts.score, [row[:2] for row in alike]

    whole = all_of_it()
    assert whole[0] == [(40, 3, "mirrored"), (50, 3, "near copy")]
    monkeypatch.setattr(photos, "_TILE", 7)
    tiled = all_of_it()
    assert tiled[0] == whole[0]
    assert tiled[3] == whole[3]
    for one, other in zip(whole[1:3], tiled[1:3], strict=True):
        torch.testing.assert_close(one, other)


def test_a_photo_unlike_all_others_is_an_outlier():
    generator = torch.Generator().manual_seed(0)
    around = torch.zeros(32)
    around[0] = 1
    features = F.normalize(around + 0.1 * torch.randn(40, 32, generator=generator), dim=-1)
    features[17] = F.normalize(torch.ones(32) - around, dim=-1)
    assert photos.outlying(nearness(features)) == [17]


def test_classes_of_one_name_or_one_look_are_told():
    """Labels 0 and 1 look the same, 2 and 3 have the same name; 4 is like no other."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(8)[[0, 0, 1, 2, 3]]
    labels = torch.arange(5).repeat_interleave(8)
    features = centres[labels] + 0.1 * torch.randn(40, 8, generator=generator)
    text = torch.eye(8)[[0, 1, 2, 2, 3]]
    found = classes_alike(F.normalize(features, dim=-1), labels, text)
    assert [row[:2] for row in found] == [(0, 1), (2, 3)]
    assert found[0][3] >= 0.25 > found[1][3]


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.sources = set(), "", []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_a_sheet_escapes_names_and_needs_nothing_else(planted, tmp_path):
    root, _ = planted
    folder = tmp_path / "mine"
    for part in ("train", "test"):
        for old, name in (("clock", "<script>alert(1)<"), ("hand", '"><img src=x onerror=y>')):
            shutil.copytree(root / part / old, folder / part / name)
    evil = next((folder / "test" / "<script>alert(1)<").iterdir())
    evil.rename(evil.with_name(f"<script>&{evil.name}"))
    (folder / "train" / "<script>alert(1)<" / "<b>bad.png").write_bytes(b"x")
    page = tmp_path / "sheet.html"
    result = dapt("data", "check", folder, "-b", "bundled", "--report", page)
    assert result.exit_code == 1, "a file cannot be read"
    assert f"contact sheet: {page}" in result.stdout
    text, parsed = page.read_text(), Page()
    parsed.feed(text)
    assert not parsed.tags & {"script", "b-ad", "iframe", "link", "object"}
    assert "<script" not in text
    assert "onerror=y>" not in text
    assert "<b>bad" not in text
    assert "<script>alert(1)<" in parsed.text
    assert "bad.png cannot be read" in parsed.text
    assert all(source.startswith(("data:image/", "#")) for source in parsed.sources)
    assert any(source.startswith("data:image/") for source in parsed.sources)
    assert dapt("data", "check", folder, "-b", "bundled", "--report", page).exit_code == 1, "again"
    other = tmp_path / "other.html"
    other.write_text("mine")
    result = dapt("data", "check", folder, "-b", "bundled", "--report", other)
    assert (result.exit_code, other.read_text()) == (2, "mine")
    assert "is there and not a report" in " ".join(result.stderr.split())


def test_a_sheet_is_bounded(tmp_path):
    from dapt.report.sheet import write_sheet

    task = open_task("bundled")
    found = photos.Findings("bundled", 924)
    for item in task.test * 10:
        photo = photos.Photo("test", item.path, item.class_name)
        found.outliers.append(photos.Outlier(photo, 0.1))
        found.labels.append(photos.Doubt(photo, "x", 1.0))
        found.copies.append(photos.Copy("near copy", 1.0, photo, photo))
    write_sheet(tmp_path / "sheet.html", task, found)
    assert (tmp_path / "sheet.html").stat().st_size < 2**21
    assert "The first 60 of 3,550" in (tmp_path / "sheet.html").read_text()


def put(file, colour, seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-20, 20, (32, 32, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(file)


def photos_of(folder, *options):
    result = dapt("data", "check", folder, "-b", "bundled", "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)[0]["photos"]


def test_small_and_strange_folders(tmp_path):
    for number in range(4):
        put(tmp_path / "one" / "only" / f"{number}.png", (200, 60, 60), number)
        put(tmp_path / "equal" / f"class {number % 2}" / f"{number}.png", (0, 60, 60))
    for name, place in (("train", "alone/train/a"), ("test", "alone/test/a")):
        put(tmp_path / place / f"{name}.png", (9, 9, 200) if name == "test" else (200, 9, 9))
    one = dapt("data", "check", tmp_path / "one", "-b", "bundled", "--json")
    assert one.exit_code == 1
    assert "one class folder, only/" in json.loads(one.stdout)[0]["problems"][0]["text"]
    put(tmp_path / "alone" / "train" / "b" / "other.png", (9, 200, 9))
    alone = photos_of(tmp_path / "alone")
    assert alone["images"] == 3
    assert alone["copies"] == []
    equal = photos_of(tmp_path / "equal")
    assert [copy["kind"] for copy in equal["copies"]] == ["same file"] * 3
    assert {copy["first"]["path"] for copy in equal["copies"]} == {
        equal["copies"][0]["first"]["path"]
    }
    assert equal["outliers"] == []
    assert dapt("data", "check", tmp_path / "equal", "-b", "bundled").exit_code == 0
    test_only = dapt("data", "check", "bundled", "--domain", "streamline-emojis", "-b", "bundled")
    assert test_only.exit_code == 0
    assert "no readable train images" in test_only.stdout


def test_labels_of_one_class_are_not_judged(tmp_path, backbone):
    """Such a task can only be made in Python."""
    for number in range(4):
        put(tmp_path / f"{number}.png", (200, 60, 60), number)
    items = tuple(Item(f"{number}.png", 0, "only") for number in range(4))
    found = look_at_photos(Task("one", tmp_path, ("only",), items, (), ()), backbone)
    assert (found.labels, found.classes) == ([], [])
    assert any("there is one class" in note for note in found.notes)


def test_options_of_check_go_together(tmp_path):
    for options, sentence in (
        (["bundled", "--report", tmp_path / "x.html"], "go with --backbone"),
        (["bundled", "--device", "cpu"], "go with --backbone"),
        (["--root", tmp_path, "-b", "bundled", "--report", tmp_path / "x.html"], "one DATASET"),
        (["bundled", "-b", "bundled", "--report", tmp_path / "x.txt"], "ends in .html"),
        (["bundled", "-b", "no such model"], "no such model"),
    ):
        result = dapt("data", "check", *options)
        assert result.exit_code == 2, result.output
        assert sentence in " ".join(result.stderr.split())
    for part in ("train", "test"):
        (tmp_path / "bad" / part / "a").mkdir(parents=True)
        (tmp_path / "bad" / part / "a" / "1.png").write_bytes(b"x")
    for folder in ("none", "bad"):
        gone = dapt("data", "check", tmp_path / folder, "-b", "bundled", "--json")
        assert gone.exit_code == 1
        assert json.loads(gone.stdout)[0]["problems"]
        assert "photos" not in json.loads(gone.stdout)[0]


@pytest.fixture(scope="module", params=["zero-shot", "linear-probe", "tip-adapter-f", "dapt"])
def run(request, tiny_weights, photo_folder, tmp_path_factory):
    given = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "method": request.param,
             "shots": 2, "epochs": 1, "batch_size": 6}  # fmt: skip
    return train(make_settings(given), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def unlabelled(photo_folder, tmp_path_factory):
    """Three photos of a kind each, twenty copies of one of them, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("unlabelled")
    kinds = [sorted(place.glob("*.png"))[0] for place in sorted((photo_folder / "test").iterdir())]
    for number, source in enumerate(kinds):
        shutil.copy(source, folder / f"kind {number}.png")
    first = kinds[0]
    for number in range(20):
        shutil.copy(first, folder / f"copy {number:02}.png")
    (folder / "bad.png").write_bytes(b"x")
    return folder


def test_suggested_photos_are_unlike_and_told_with_a_reason(run, unlabelled):
    result = dapt("suggest", run.path, unlabelled, "-n", 30, "--format", "json")
    assert result.exit_code == 1, "one cannot be read"
    assert "bad.png cannot be read" in " ".join(result.stderr.split())
    assert "1 of" in result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    files = [(unlabelled / row["path"]).read_bytes() for row in rows]
    assert len(set(files)) == len(files) == 3, "of each kind one"
    for row in rows:
        assert row["class"] in ("blue", "green thing", "red_thing")
        assert 1 / 3 <= row["probability"] <= 1
        assert row["reason"]
    assert dapt("suggest", run.path, unlabelled, "-n", 30, "-f", "json").stdout == result.stdout
    batched = dapt("suggest", run.path, unlabelled, "-n", 30, "-f", "json", "--batch-size", 5)
    again = [json.loads(line)["path"] for line in batched.stdout.splitlines()]
    assert [(unlabelled / path).read_bytes() for path in again] == files
    lines = dapt("suggest", run.path, unlabelled, "-n", 2).stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(rows[0]["path"])
    text = dapt("suggest", run.path, unlabelled, "-n", 2, "-f", "csv").stdout
    assert [row["path"] for row in csv.DictReader(io.StringIO(text))] == [
        row["path"] for row in rows[:2]
    ]


def test_what_suggest_refuses(run, unlabelled, tmp_path):
    for arguments, code, sentence in (
        ([tmp_path], 2, "holds no images"),
        ([unlabelled, "-f", "jsno"], 2, "did you mean 'json'?"),
        ([unlabelled / "bad.png"], 1, "cannot be read"),
    ):
        result = dapt("suggest", run.path, *arguments)
        assert result.exit_code == code
        assert sentence in " ".join(result.stderr.split())
        assert result.stdout == ""


def test_the_most_uncertain_comes_first_and_then_what_is_new():
    features = F.normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 1]]), dim=-1)
    assert unlike(features, torch.tensor([0.5, 0.9, 0.3, 0.8]), 3) == [1, 2, 3]
    assert unlike(features, torch.zeros(4), 4) == [0, 2, 3]
