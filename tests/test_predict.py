"""'dapt predict': where images come from, how predictions go out, and what is skipped."""

import csv
import io
import itertools
import json
import os
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from dapt.cli import app
from dapt.errors import UserError
from dapt.predict import Prediction, Unreadable, find_images, named_in, predict_each
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.settings import make_settings

runner = CliRunner()


@pytest.fixture(scope="module")
def run(tiny_weights, photo_folder, tmp_path_factory):
    given = {
        "dataset": str(photo_folder),
        "backbone": str(tiny_weights),
        "shots": 2,
        "epochs": 2,
        "batch_size": 4,
    }
    return train(make_settings(given), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def classifier(run):
    return load_classifier(run)


@pytest.fixture(scope="module")
def pictures(photo_folder):
    return sorted((photo_folder / "test").rglob("*.png"))


@pytest.fixture
def mixed(tmp_path, pictures):
    """A folder of four images, of which the second and the last cannot be read."""
    for name, source in zip(("a.png", "c.png"), pictures, strict=False):
        shutil.copy(source, tmp_path / name)
    (tmp_path / "b.png").write_bytes(pictures[0].read_bytes()[:200])
    (tmp_path / "d.png").write_bytes(b"")
    return tmp_path


def dapt(*arguments, given=None):
    return runner.invoke(app, [str(a) for a in arguments], input=given)


def test_folders_patterns_and_hidden_files(tmp_path):
    for name in ("b.png", "a.JPG", "deep/er/c.png", ".hidden/d.png", ".e.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def names(*arguments):
        return [str(p.relative_to(tmp_path)) for p in find_images(arguments)]

    assert names(tmp_path) == ["a.JPG", "b.png", "deep/er/c.png"]
    assert names(f"{tmp_path}/*.png") == ["b.png"]
    assert names(f"{tmp_path}/**/*.png") == ["b.png", "deep/er/c.png"]
    assert names(tmp_path / "notes.txt", tmp_path / "deep") == ["notes.txt", "deep/er/c.png"]
    (tmp_path / "[1].png").write_bytes(b"x")
    assert names(tmp_path / "[1].png") == ["[1].png"], "a file of that very name goes first"
    for argument, sentence in (
        (f"{tmp_path}/*.gif", "no image matches"),
        (tmp_path / "no.png", "does not exist"),
        (tmp_path / ".hidden" / "none", "does not exist"),
    ):
        with pytest.raises(UserError, match=sentence):
            find_images([argument])


def test_a_pattern_ends_where_folders_have_links_to_themselves(tmp_path, monkeypatch):
    for name in ("all/a.png", "all/in/b.png", "all/.hidden/c.png", "else/where/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for place in ("all", "all/in"):
        for number in range(10):
            (tmp_path / place / f"loop{number}").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "out").symlink_to(tmp_path / "else")
    images = ["all/a.png", "all/in/b.png", "all/out/where/d.png"]
    monkeypatch.chdir(tmp_path)
    for pattern, found in (
        ("all/**/*.png", images),
        ("all/**", images),
        ("al?/**/where/**/*.png", images[2:]),
        (f"{tmp_path}/all/**/*.png", [str(tmp_path / name) for name in images]),
        ("all/loop1/in/loop2/*.png", ["all/loop1/in/loop2/a.png"]),
    ):
        assert [str(path) for path in find_images([pattern])] == found
    monkeypatch.chdir(tmp_path / "all")
    assert [str(path) for path in find_images(["**/b.png"])] == ["in/b.png"]


@pytest.mark.parametrize(
    ("content", "end", "names"),
    [
        (b"a.png\nb c.png\r\n\nd.png", b"\n", ["a.png", "b c.png", "d.png"]),
        (b"a\nb.png\0c.png\r\0", b"\0", ["a\nb.png", "c.png\r"]),
        (b"", b"\n", []),
        (b"caf\xe9.png\n", b"\n", [os.fsdecode(b"caf\xe9.png")]),
    ],
)
def test_lists_of_names(content, end, names):
    class Slow(io.BytesIO):
        def read1(self, size=-1):
            return self.read(3)  # names come in pieces

    for kind in (io.BytesIO, Slow):
        assert [str(path) for path in named_in(kind(content), end)] == names


def test_standard_input(run, pictures):
    expected = dapt("predict", run.path, *pictures, "--json").stdout
    names = "\n".join(map(str, pictures))
    assert dapt("predict", run.path, "-", "--json", given=names).stdout == expected
    nul = "\0".join(map(str, pictures)) + "\0"
    for arguments in (["-0"], ["-", "-0"]):
        assert dapt("predict", run.path, *arguments, "--json", given=nul).stdout == expected
    for arguments, given, sentence in (
        (["-", pictures[0]], "", "name no others beside it"),
        ([pictures[0], "-0"], "", "-0 is about names on standard input"),
        (["-"], "\n", "standard input names no images"),
        ([], None, "no images given"),
    ):
        result = dapt("predict", run.path, *arguments, given=given)
        assert result.exit_code == 2
        assert sentence in " ".join(result.stderr.split())


def test_bad_images_are_told_and_skipped(run, mixed):
    result = dapt("predict", run.path, mixed, "--json")
    assert result.exit_code == 1
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["path"] for row in rows] == [str(mixed / "a.png"), str(mixed / "c.png")]
    said = " ".join(result.stderr.split())
    assert f"skipped: image {mixed / 'b.png'} cannot be read" in said
    assert f"skipped: image {mixed / 'd.png'} cannot be read: the file is empty" in said
    assert "2 of 4 images could not be read" in said
    assert "Traceback" not in said
    alone = [json.loads(dapt("predict", run.path, row["path"], "--json").stdout) for row in rows]
    for row, other in zip(rows, alone, strict=True):
        assert row["classes"][0]["class"] == other["classes"][0]["class"]
        found = row["classes"][0]["probability"]
        assert found == pytest.approx(other["classes"][0]["probability"], abs=1e-5)
    missing = dapt("predict", run.path, "-", given=f"{mixed}/a.png\n{mixed}/none.png\n")
    assert missing.exit_code == 1
    assert "none.png does not exist" in " ".join(missing.stderr.split())


def test_csv(run, pictures, tmp_path):
    odd = tmp_path / 'a, "b".png'
    shutil.copy(pictures[0], odd)
    result = dapt("predict", run.path, odd, pictures[1], "--top", 2, "-f", "csv")
    rows = list(csv.reader(io.StringIO(result.stdout)))
    assert rows[0] == ["path", "class", "probability", "class_2", "probability_2"]
    assert [row[0] for row in rows[1:]] == [str(odd), str(pictures[1])]
    assert all(1 >= float(row[2]) >= float(row[4]) >= 0 for row in rows[1:])


def test_table_and_lines(run, pictures):
    lines = dapt("predict", run.path, *pictures[:3]).stdout.splitlines()
    best = [line.rpartition(": ")[2] for line in lines]
    table = " ".join(dapt("predict", run.path, *pictures[:3], "-f", "table").stdout.split())
    for text in best:
        assert text.rpartition(" ")[2] in table
    assert len(lines) == 3


def test_unknown(run, pictures):
    rows = dapt("predict", run.path, *pictures, "--json").stdout.splitlines()
    best = sorted(json.loads(row)["classes"][0]["probability"] for row in rows)
    limit = (best[5] + best[6]) / 2
    result = dapt("predict", run.path, *pictures, "--json", "--unknown", limit)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert sum(row["unknown"] for row in rows) == 6
    assert all(row["unknown"] == (row["classes"][0]["probability"] < limit) for row in rows)
    text = dapt("predict", run.path, *pictures, "--unknown", limit).stdout
    assert text.count(": unknown (") == 6
    rows = dapt("predict", run.path, *pictures, "--unknown", limit, "-f", "csv").stdout
    found = list(csv.DictReader(io.StringIO(rows)))
    assert sum(row["unknown"] == "true" for row in found) == 6
    assert dapt("predict", run.path, pictures[0], "--unknown", "2").exit_code == 2


def test_a_list_without_end_is_read_a_few_batches_ahead(classifier, pictures):
    named = 0

    def endless():
        nonlocal named
        for path in itertools.cycle(pictures):
            named += 1
            yield path

    found = list(itertools.islice(predict_each(classifier, endless(), batch_size=2), 40))
    assert [one.path for one in found] == [pictures[i % len(pictures)] for i in range(40)]
    assert named <= 40 + 4 * 2, "read far ahead of what is asked for"


def test_batches_do_not_matter(classifier, pictures):
    whole = list(predict_each(classifier, pictures, top=3))
    for size in (1, 5):
        parts = list(predict_each(classifier, pictures, top=3, batch_size=size))
        for one, other in zip(parts, whole, strict=True):
            assert isinstance(one, Prediction)
            assert one.path == other.path
            assert dict(one.classes) == pytest.approx(dict(other.classes), abs=1e-5)


def test_in_python_a_bad_image_is_told(classifier, pictures, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"x")
    found = list(predict_each(classifier, [pictures[0], bad, pictures[1]]))
    assert [type(one) for one in found] == [Prediction, Unreadable, Prediction]
    assert "bad.png cannot be read" in found[1].reason
    assert list(predict_each(classifier, [])) == []


@pytest.mark.skipif(os.name != "posix", reason="FIFOs")
@pytest.mark.parametrize("form", ["folder", "pattern"])
def test_what_has_only_the_name_of_an_image_is_told(run, pictures, tmp_path, form):
    shutil.copy(pictures[0], tmp_path / "good.png")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    odd = ["fifo.png", "link.png"]
    if form == "folder":
        (tmp_path / "folder.jpg").mkdir()
        odd.append("folder.jpg")
    given = tmp_path if form == "folder" else f"{tmp_path}/*"
    result = dapt("predict", run.path, given, "--json")
    assert result.exit_code == 1
    assert [json.loads(line)["path"] for line in result.stdout.splitlines()] == [
        str(tmp_path / "good.png")
    ]
    said = " ".join(result.stderr.split())
    assert all(f"skipped: image {tmp_path / name} " in said for name in odd)


@pytest.mark.skipif(os.name != "posix", reason="names of any bytes")
def test_names_cannot_steer_a_terminal(run, pictures, tmp_path):
    odd = tmp_path / "a\x1b[2J\nb\rc.png"
    shutil.copy(pictures[0], odd)
    lines = dapt("predict", run.path, odd).stdout
    assert lines.startswith(f"{tmp_path}/a\\x1b[2J\\nb\\rc.png: ")
    assert len(lines.splitlines()) == 1
    assert "\x1b[2J" not in dapt("predict", run.path, odd, "-f", "table").stdout
    assert json.loads(dapt("predict", run.path, odd, "--json").stdout)["path"] == str(odd)
    (row,) = csv.DictReader(
        io.StringIO(dapt("predict", run.path, odd, "-f", "csv").stdout, newline="")
    )
    assert row["path"] == str(odd)


def test_names_that_are_no_text(run, tmp_path, pictures):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    try:
        Image.open(pictures[0]).save(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for form in ("lines", "json", "csv", "table"):
        result = dapt("predict", run.path, tmp_path, "-f", form)
        assert result.exit_code == 0, result.output
        assert form == "table" or "caf" in result.stdout  # a table folds long paths
