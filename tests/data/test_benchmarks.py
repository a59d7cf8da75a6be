"""The fifteen benchmarks in miniature, in their real formats, and what checking them finds."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from miniatures import SPLIT_ROWS, WNIDS, WORDS, make_benchmark, put
from typer.testing import CliRunner

from dapt.cli import app
from dapt.data import BENCHMARKS, bundled_domains, draw_support_set, open_task, subset_classes
from dapt.data.check import check_dataset
from dapt.errors import UserError
from dapt.progress import Reporter


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_in_miniature(name, tmp_path):
    row = make_benchmark(tmp_path, name)
    task = open_task(name, root=tmp_path, evaluate=list(row.counts) == ["test"])
    assert {p for p in ("train", "val", "test") if getattr(task, p)} == set(row.counts)
    for part in row.counts:
        for item in getattr(task, part):
            assert task.image_path(item).is_file()
            assert item.class_name == task.class_names[item.label]
    found = check_dataset(name, root=tmp_path)
    # Too few by the published counts, and nothing else wrong.
    assert {p.kind for p in found.problems} <= {"classes", "count", "short"}
    assert any(p.kind == "count" for p in found.problems)


def test_aircraft_names_hold_spaces(tmp_path):
    make_benchmark(tmp_path, "fgvc_aircraft")
    task = open_task("fgvc_aircraft", root=tmp_path)
    assert task.class_names == ("707-320", "DH-82", "Eurofighter Typhoon", "C-130")
    assert (task.test[2].path, task.test[2].class_name) == ("2000002.jpg", "Eurofighter Typhoon")


def test_folders_in_the_order_of_the_names_file(tmp_path):
    make_benchmark(tmp_path, "imagenet")
    task = open_task("imagenet", root=tmp_path)
    assert task.class_names == WORDS
    assert [i.path for i in task.train[:4]] == [
        "train/n01440764/n01440764_1.JPEG",
        "train/n01440764/n01440764_10.JPEG",
        "train/n01440764/n01440764_2.JPEG",
        "train/n01443537/n01443537_1.JPEG",
    ]
    make_benchmark(tmp_path, "imagenetv2")
    (tmp_path / "imagenetv2" / "classnames.txt").unlink()  # ImageNet's serves for its shifts
    target = open_task("imagenetv2", root=tmp_path)
    assert target.class_names == WORDS
    folders = [item.path.split("/")[0] for item in target.test[::3]]
    assert folders == [str(number) for number in range(len(WORDS))]
    assert [item.label for item in target.test[::3]] == list(range(len(WORDS)))
    make_benchmark(tmp_path, "imagenet_a")
    target = open_task("imagenet_a", root=tmp_path)
    assert target.class_names == (WORDS[0], *WORDS[2:])
    assert {i.label for i in target.test} == set(range(len(WORDS) - 1))
    assert (target.root / "README.txt").is_file()  # as its authors' archive has it
    assert {i.path.split("/")[0] for i in target.test} == {WNIDS[0], *WNIDS[2:]}


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    """Directories listed backwards give the same task."""
    for name in ("imagenet", "imagenet_r", "imagenetv2"):
        make_benchmark(tmp_path, name)
    names = ("imagenet", "imagenet_r", "imagenetv2")
    before = [open_task(name, root=tmp_path) for name in names]
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(real(path), reverse=True))
    assert [open_task(name, root=tmp_path) for name in names] == before


@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [
        ("fgvc_aircraft", lambda r: (r / "variants.txt").unlink(), "variants.txt does not exist"),
        (
            "fgvc_aircraft",
            lambda r: (r / "images_variant_val.txt").unlink(),
            "images_variant_val.txt does not exist",
        ),
        (
            "fgvc_aircraft",
            lambda r: put(r / "images_variant_val.txt", "0000001 Concorde\n"),
            "images_variant_val.txt, line 1: 'Concorde' is no variant",
        ),
        (
            "fgvc_aircraft",
            lambda r: put(r / "images_variant_val.txt", "../../etc/x DH-82\n"),
            "is no safe image path",
        ),
        ("imagenet", lambda r: (r / "classnames.txt").unlink(), "classnames.txt does not exist"),
        ("imagenet", lambda r: put(r / "classnames.txt", "\n"), "classnames.txt is empty"),
        ("imagenet", lambda r: put(r / "classnames.txt", "n1\n"), "line 1: 'n1' must be"),
        (
            "imagenet",
            lambda r: put(r / "classnames.txt", "n1 a\nn1 b\n"),
            "line 2: n1 is listed twice",
        ),
        (
            "imagenet",
            lambda r: (r / "classnames.txt").write_bytes(b"n1 \xff\xfe\n"),
            "cannot be read",
        ),
        (
            "imagenet",
            lambda r: (r / "images" / "val" / "backup").mkdir(),
            "is no class that",
        ),
        (
            "imagenet",
            lambda r: (r / "images" / "train" / WNIDS[2]).rename(r / "elsewhere"),
            f"images/train: {WNIDS[2]}; download",
        ),
        (
            "imagenet",
            lambda r: [shutil.rmtree(r / "images" / "val" / wnid) for wnid in WNIDS[1:3]],
            f"images/val: {WNIDS[1]}, {WNIDS[2]}; download",
        ),
        (
            "imagenet",
            lambda r: [image.unlink() for image in (r / "images" / "val" / WNIDS[2]).iterdir()],
            f"images/val hold no images: {WNIDS[2]}; download",
        ),
        (
            "imagenetv2",
            lambda r: shutil.rmtree(r / BENCHMARKS["imagenetv2"].images / "10"),
            "format-val: 10; download",
        ),
        (
            "imagenet_sketch",
            lambda r: shutil.rmtree(r / "images" / WNIDS[2]),
            f"images: {WNIDS[2]}; download",
        ),
        (
            "imagenet",
            lambda r: (r / "images" / "val").rename(r / "elsewhere"),
            "images/val cannot be read",
        ),
    ],
)
def test_broken_layouts(tmp_path, name, break_it, message):
    row = make_benchmark(tmp_path, name)
    break_it(tmp_path / row.folder)
    with pytest.raises(UserError) as caught:
        open_task(name, root=tmp_path)
    assert message in str(caught.value)
    found = check_dataset(name, root=tmp_path)
    assert [p.kind for p in found.problems] == ["layout"]
    assert message in found.problems[0].text


def test_what_a_check_finds(photo_folder, tmp_path):
    table = tmp_path / "photos.csv"
    lines = ["path,label,split"]
    for part in ("train", "test"):
        for image in sorted((photo_folder / part).rglob("*.png")):
            lines.append(f"{image.relative_to(photo_folder)},{image.parent.name},{part}")
    for line in lines[1:]:
        target = tmp_path / line.split(",")[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((photo_folder / line.split(",")[0]).read_bytes())
    table.write_text("\n".join(lines) + "\n")
    assert not check_dataset(str(table)).problems
    (tmp_path / "train" / "blue" / "0.png").unlink()
    whole = (tmp_path / "train" / "blue" / "1.png").read_bytes()
    (tmp_path / "train" / "blue" / "1.png").write_bytes(whole[:-40])
    flipped = bytearray((tmp_path / "test" / "blue" / "1.png").read_bytes())
    flipped[len(flipped) // 2] ^= 255
    (tmp_path / "test" / "blue" / "1.png").write_bytes(flipped)

    def kinds(level):
        problems = check_dataset(str(table), level=level).problems
        return sorted((p.kind, p.where) for p in problems)

    gone, cut = ("missing", "train/blue/0.png"), ("unreadable", "train/blue/1.png")
    short = ("short", "blue")
    assert kinds("listed") == [gone, short]
    assert kinds("whole") == [gone, short, cut]
    assert kinds("decoded") == [gone, short, short, ("unreadable", "test/blue/1.png"), cut]
    result = CliRunner().invoke(app, ["data", "check", str(table)])
    assert result.exit_code == 1
    assert "class 'blue' has 4 of 6 images" in result.output
    result = CliRunner().invoke(app, ["data", "check", str(table), "--decode", "--json"])
    value = json.loads(result.stdout)
    assert len(value[0]["problems"]) == 5
    assert value[0]["parts"]["train"] == [18, 16, None]


def test_a_missing_folder_is_one_problem(tmp_path):
    """The topmost one that is not there, however many images should lie in it."""
    row = make_benchmark(tmp_path, "sun397")
    images = tmp_path / row.folder / row.images

    def problems():
        found = check_dataset("sun397", root=tmp_path, level="listed")
        return [(p.kind, p.where, p.text) for p in found.problems if p.kind != "count"]

    shutil.rmtree(images / "a" / "art_gallery")
    where = "a/art_gallery"
    text = f"folder {images / where} does not exist, and 6 images should be in it"
    folder, *rest = (p for p in problems() if p[0] in ("folder", "missing"))
    assert (folder, rest) == (("folder", where, text), [])
    assert ("short", "art gallery indoor", "val: class 'art gallery indoor' has 0 of 2 images") in (
        problems()
    )
    shutil.rmtree(images)
    assert [p[:2] for p in problems() if p[0] in ("folder", "missing")] == [("folder", "")]
    result = CliRunner().invoke(app, ["data", "check", "sun397", "--root", str(tmp_path)])
    assert f"folder {images} does not exist, and 12 images" in result.output


def test_a_class_that_no_image_is_listed_of_is_short(tmp_path):
    row = make_benchmark(tmp_path, "dtd")
    split = json.loads((tmp_path / row.folder / row.index).read_text())
    split["test"] = [entry for entry in split["test"] if entry[1] == 0]
    put(tmp_path / row.folder / row.index, json.dumps(split))
    found = check_dataset("dtd", root=tmp_path)
    (short,) = (p for p in found.problems if p.kind == "short")
    assert short.text == "test: class 't-rex' has 0 of 1 images"


@pytest.mark.parametrize("level", ["listed", "whole", "decoded"])
def test_a_check_tells_how_far_it_is(tmp_path, level):
    """Image by image: each stage ends at its total, in more than one step."""
    told = {}

    class Told(Reporter):
        @contextmanager
        def stage(self, title, total):
            told[title] = (total, [])
            yield lambda count, note="": told[title][1].append(count)

    make_benchmark(tmp_path, "imagenet_sketch")
    check_dataset("imagenet_sketch", root=tmp_path, level=level, reporter=Told())
    listing, *stages = told.items()
    assert listing == ("imagenet_sketch: read the listing", (None, []))
    assert len(stages) == (1 if level == "listed" else 2)
    for _, (total, steps) in stages:
        assert total == sum(steps) == 3 * len(WNIDS)
    assert len(stages[0][1][1]) == len(WNIDS)  # a folder each


def test_check_of_a_domain_and_with_class_names(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])

    domain = bundled_domains()[1]
    value = json.loads(run("bundled", "--domain", domain, "--quick", "--json").stdout)
    images = len(open_task("bundled", domain=domain).test)
    assert value[0]["parts"] == {"test": [images, images, None]}
    names = tmp_path / "names.json"
    put(names, json.dumps({"no such class": "x"}))
    result = run("bundled", "--class-names", names)
    assert result.exit_code == 1
    assert "has no class 'no such class'" in result.output
    assert "go with one DATASET" in run("--root", tmp_path, "--domain", domain).output


def test_check_command(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])

    for name in ("dtd", "imagenet_sketch"):
        make_benchmark(tmp_path, name)
    result = run("--root", tmp_path, "--quick")
    assert result.exit_code == 1
    assert "train: 4 images are listed, 2,820 are published" in result.output
    assert "imagenet_sketch" in result.output
    assert "not below --root: caltech101" in result.output
    assert run("bundled").exit_code == 0
    for arguments in ((), ("--root", tmp_path / "no"), ("bundled", "--quick", "--decode")):
        assert run(*arguments).exit_code == 2
    (tmp_path / "empty").mkdir()
    assert "holds no benchmark's folder" in run("--root", tmp_path / "empty").output


def test_list_command():
    result = CliRunner().invoke(app, ["data", "list", "--json"])
    rows = json.loads(result.stdout)
    assert [row["name"] for row in rows] == list(BENCHMARKS)
    shown = CliRunner().invoke(app, ["data", "list"]).output
    for row in rows:
        assert row["licence"]
        assert row["url"] in shown
        assert row["folder"] in shown


@pytest.mark.parametrize("name", SPLIT_ROWS)
def test_real_splits(shared, name, tmp_path):
    """Placeholders at every path: drawn sets have the counts, and seed 1 the published images."""
    row = BENCHMARKS[name]
    source = shared / "benchmarks" / "splits" / row.index
    if not source.is_file():
        pytest.skip(f"{row.index} is not here")
    images, made = tmp_path / row.folder / row.images, set()
    for entries in json.loads(source.read_text()).values():
        for path, _, _ in entries:
            place = images / path
            if place.parent not in made:
                place.parent.mkdir(parents=True, exist_ok=True)
                made.add(place.parent)
            place.touch()
    put(tmp_path / row.folder / row.index, source.read_text())
    found = check_dataset(name, root=tmp_path, level="listed")
    assert not found.problems
    assert {p: counts[0] for p, counts in found.parts.items()} == row.counts
    task = open_task(name, root=tmp_path)
    classes = json.loads((shared / "benchmarks" / "class_names" / f"{name}.json").read_text())
    assert [n.replace("_", " ") for n in task.class_names] == [n.replace("_", " ") for n in classes]
    published = json.loads((shared / "benchmarks" / "fewshot_subsets.json").read_text())
    for shots in (1, 2, 4, 8, 16):
        for seed in (1, 2, 3):
            drawn = draw_support_set(task, shots, seed)
            known = published[f"{name}/shots={shots}/seed=1"]
            for part in ("train", "val"):
                items = getattr(drawn, part)
                assert len(items) == known[f"n_{part}"]
                ends = ("/".join(Path(task.image_path(i)).parts[-2:]) for i in items)
                lines = [f"{i.label}\t{end}" for i, end in zip(items, ends, strict=True)]
                digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
                assert (digest == known[part]) == (seed == 1)
    # The published base-to-new runs tune on the base classes' images of that very draw.
    drawn, base = draw_support_set(task, 16, 1), subset_classes(task, "base")
    half = draw_support_set(base, 16, 1)
    for part in ("train", "val"):
        kept = [i for i in getattr(drawn, part) if i.label < len(base.class_names)]
        assert list(getattr(half, part)) == kept
