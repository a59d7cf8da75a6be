"""Hugging Face datasets on disk and WebDataset shards as tasks."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
from patience import LONG
from typer.testing import CliRunner

from dapt.cli import app
from dapt.data import open_task, packed
from dapt.errors import UserError
from dapt.run.train import train
from dapt.settings import make_settings

runner = CliRunner()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DAPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def photos(folder, part):
    """(path, class name), class by class."""
    return [(p, p.parent.name) for p in sorted((folder / part).rglob("*.png"))]


def hugging_face(path, parts, *, labels="names", **columns):
    """Save a dataset (of parts, or one that is not split) with its images in it."""
    datasets = pytest.importorskip("datasets")
    names = sorted({name for rows in parts.values() for _, name in rows})
    kind = datasets.ClassLabel(names=names) if labels == "names" else datasets.Value("string")
    image, label = columns.get("image", "image"), columns.get("label", "label")

    def table(rows):
        values = {
            image: [{"bytes": p.read_bytes(), "path": None} for p, _ in rows],
            label: [names.index(n) if labels == "names" else n for _, n in rows],
        }
        features = datasets.Features({image: datasets.Image(), label: kind})
        return datasets.Dataset.from_dict(values, features=features)

    made = {part: table(rows) for part, rows in parts.items()}
    (made[""] if "" in made else datasets.DatasetDict(made)).save_to_disk(str(path))
    return path


def shard(file, samples):
    """A tar file of (name, bytes)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def samples(rows, label):
    pytest.importorskip("webdataset")
    for number, (path, name) in enumerate(rows):
        yield f"{number:05d}.png", path.read_bytes()
        yield f"{number:05d}.{label[0]}", label[1](name)


TEXT = ("cls", lambda name: name.encode())
JSON = ("json", lambda name: json.dumps({"label": name, "width": 48}).encode())


def contents(task, part):
    return [(task.image_path(i).read_bytes(), i.class_name) for i in getattr(task, part)]


def same(rows):
    return [(p.read_bytes(), name) for p, name in rows]


@pytest.mark.parametrize(
    ("labels", "train", "test"),
    [("names", "train", "test"), ("text", "train", "test"), ("names", "Training", "eval")],
)
def test_hugging_face_with_parts(photo_folder, tmp_path, labels, train, test):
    train_rows, test_rows = photos(photo_folder, "train"), photos(photo_folder, "test")
    path = hugging_face(tmp_path / "data", {train: train_rows, test: test_rows}, labels=labels)
    task = open_task(str(path))
    assert task.class_names == ("blue", "green thing", "red_thing")
    assert contents(task, "train") == same(train_rows)
    assert contents(task, "test") == same(test_rows)
    assert task.val == ()


@pytest.mark.parametrize("label", [TEXT, JSON], ids=["cls", "json"])
@pytest.mark.parametrize(
    "names",
    [
        ("train-0.tar", "train-1.tar", "test-0.tar"),
        ("train/0.tar", "train/1.tar", "test/0.tar"),
        ("Training/0.tar", "Training/1.tar", "holdout/0.tar"),
    ],
)
def test_shards_with_parts(photo_folder, tmp_path, label, names):
    train_rows, test_rows = photos(photo_folder, "train"), photos(photo_folder, "test")
    for name, rows in zip(names, (train_rows[:10], train_rows[10:], test_rows), strict=True):
        shard(tmp_path / "data" / name, samples(rows, label))
    task = open_task(str(tmp_path / "data"))
    assert contents(task, "train") == same(train_rows)
    assert contents(task, "test") == same(test_rows)


def test_shards_of_numbers_and_their_names(photo_folder, tmp_path):
    rows = photos(photo_folder, "train")
    names = ["red_thing", "blue", "green thing"]
    number = ("cls", lambda name: str(names.index(name)).encode())
    file = shard(tmp_path / "data" / "all.tar", samples(rows, number))
    assert open_task(str(file)).class_names == ("0", "1", "2")
    (file.parent / "classnames.txt").write_text("\n".join(names) + "\n")
    task = open_task(str(file.parent))
    assert set(task.class_names) == set(names)
    assert sorted(contents(task, "train") + contents(task, "test")) == sorted(same(rows))


def test_without_parts_each_class_is_split_as_a_folder_is(photo_folder, tmp_path):
    rows = photos(photo_folder, "train")
    for path in (
        hugging_face(tmp_path / "data", {"": rows}),
        shard(tmp_path / "data.tar", samples(rows, TEXT)),
    ):
        task = open_task(str(path))
        for part in (task.train, task.test):
            counts = [sum(i.label == label for i in part) for label in range(3)]
            assert counts == [3, 3, 3]
        assert open_task(str(path)) == task
        assert len(open_task(str(path), evaluate=True).test) == len(rows)


@pytest.mark.parametrize("form", ["hugging_face", "webdataset"])
def test_a_run_is_that_of_the_same_images_in_folders(form, photo_folder, tmp_path, tiny_weights):
    """To the bit; and it records what it was made from, and notices where that has changed."""
    parts = {part: photos(photo_folder, part) for part in ("train", "test")}
    if form == "hugging_face":
        path = hugging_face(tmp_path / "data", parts)
    else:
        path = tmp_path / "data"
        for part, rows in parts.items():
            shard(path / f"{part}-0.tar", samples(rows, TEXT))
    quick = {"backbone": str(tiny_weights), "shots": 2, "epochs": 2, "batch_size": 4}
    runs = [
        train(make_settings({"dataset": str(d), **quick}), tmp_path / f"run{i}")
        for i, d in enumerate((photo_folder, path))
    ]
    assert runs[0].prompts_file.read_bytes() == runs[1].prompts_file.read_bytes()
    found = [json.loads(run.metrics_file.read_text())["test"] for run in runs]
    assert found[0] == found[1]
    recorded = json.loads(runs[1].task_file.read_text())["source_sha256"]
    assert recorded == open_task(str(path)).source_sha256
    assert "source_sha256" not in json.loads(runs[0].task_file.read_text())
    result = runner.invoke(app, ["eval", str(runs[1].path)])
    assert result.exit_code == 0, result.output
    if form == "webdataset":
        runs[1].metrics_file.unlink()
        shard(path / "test-0.tar", samples(parts["test"][1:], TEXT))
        result = runner.invoke(app, ["train", "-o", str(runs[1].path), "--resume"])
        assert result.exit_code == 2
        assert "classes, template or source" in " ".join(result.stderr.split())


def test_unpacked_once_and_by_content(photo_folder, tmp_path, cache):
    rows = photos(photo_folder, "train")
    file = shard(tmp_path / "data.tar", samples(rows, TEXT))
    first = open_task(str(file))
    stamp = first.image_path(first.train[0]).stat().st_mtime_ns
    assert open_task(str(file)).image_path(first.train[0]).stat().st_mtime_ns == stamp
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [first.source_sha256[:32]]
    shard(file, samples(rows[1:], TEXT))
    second = open_task(str(file))
    assert second.source_sha256 != first.source_sha256
    assert len(second.train + second.test) == len(rows) - 1


def test_unpacked_by_several_at_once(photo_folder, tmp_path, cache):
    file = shard(tmp_path / "data.tar", samples(photos(photo_folder, "train"), TEXT))
    code = "import sys; from dapt.data import open_task; print(open_task(sys.argv[1]))"
    started = [
        subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate(timeout=LONG)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0]
    task = open_task(str(file))
    assert said == {f"{task}\n"}
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [task.source_sha256[:32]]


def test_no_name_in_a_shard_becomes_a_path(photo_folder, tmp_path, cache):
    pytest.importorskip("webdataset")
    rows = photos(photo_folder, "train")
    entries = []
    for number, (path, name) in enumerate(rows):
        key = f"../../out/{number}"
        entries += [(f"{key}.png", path.read_bytes()), (f"{key}.cls", name.encode())]
    file = shard(tmp_path / "inside" / "data.tar", entries)
    open_task(str(file))
    assert not (tmp_path / "out").exists()
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p != file]
    assert all(cache in p.parents for p in written)


def test_an_archive_beside_class_folders_changes_nothing(photo_folder, tmp_path):
    for form in ("parts", "classes"):
        source = photo_folder if form == "parts" else photo_folder / "train"
        folder = tmp_path / form
        shutil.copytree(source, folder)
        before = open_task(str(folder))
        place = folder / "train" if form == "parts" else folder
        shard(place / "backup.tar", [("a.txt", b"x")])
        assert open_task(str(folder)) == before


def test_what_is_wrong_is_named(photo_folder, tmp_path):
    rows = photos(photo_folder, "train")
    picture = rows[0][0].read_bytes()

    def tar(*entries):
        return shard(tmp_path / "bad.tar", entries)

    pytest.importorskip("webdataset")
    whole = shard(tmp_path / "whole.tar", samples(rows, TEXT)).read_bytes()
    for entries, sentence in (
        ([("a.txt", b"x")], "has no image"),
        ([("a.png", picture)], "has no label"),
        ([("a.png", picture), ("a.json", b"[")], "its label cannot be read"),
        ([("a.png", picture), ("a.json", b"{}")], "its label cannot be read"),
        ([("a.png", picture), ("a.json", b'{"label": null}')], "neither a number nor"),
        ([], "holds no images"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_task(str(tar(*entries)))
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(UserError, match=r"cut\.tar cannot be read"):
        open_task(str(tmp_path / "cut.tar"))
    shard(tmp_path / "mixed" / "train-0.tar", samples(rows, TEXT))
    shard(tmp_path / "mixed" / "other.tar", samples(rows, TEXT))
    with pytest.raises(UserError, match="either every shard"):
        open_task(str(tmp_path / "mixed"))


def test_what_is_wrong_with_a_hugging_face_dataset(photo_folder, tmp_path):
    rows = photos(photo_folder, "train")
    for columns, sentence in (
        ({"image": "photograph"}, "has no column of images"),
        ({"label": "kind"}, "has no column of labels"),
    ):
        path = hugging_face(tmp_path / sentence[-6:], {"": rows}, **columns)
        with pytest.raises(UserError, match=sentence):
            open_task(str(path))
    path = hugging_face(tmp_path / "splits", {"train": rows, "more": rows})
    with pytest.raises(UserError, match="split 'more' is none of"):
        open_task(str(path))
    datasets = pytest.importorskip("datasets")
    values = [{"bytes": rows[0][0].read_bytes(), "path": None}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    pictured = datasets.Dataset.from_dict({"image": values, "label": values}, features=features)
    pictured.save_to_disk(str(tmp_path / "pictured"))
    with pytest.raises(UserError, match="column 'label' is of type Image; make it a ClassLabel"):
        open_task(str(tmp_path / "pictured"))
    path = hugging_face(tmp_path / "damaged", {"": rows})
    for file in path.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded"):
        open_task(str(path))
    left = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert not left, "nothing half unpacked is left"


def test_no_file_of_a_dataset_is_waited_for(photo_folder, tmp_path):
    rows = photos(photo_folder, "train")
    path = hugging_face(tmp_path / "photos", {"train": rows, "test": rows})
    for file in (next(path.rglob("*.arrow")), next(path.rglob("dataset_info.json"))):
        file.rename(kept := tmp_path / file.name)
        os.mkfifo(file)
        with pytest.raises(UserError, match=rf"{file.name} cannot be opened \(it is no ordinary"):
            open_task(str(path))
        file.unlink()
        kept.rename(file)
    assert open_task(str(path)).train


@pytest.mark.parametrize("where", ["file", "split"])
def test_no_record_leads_out_of_the_dataset(photo_folder, tmp_path, where):
    """The library itself would open it."""
    rows = photos(photo_folder, "train")
    hugging_face(tmp_path / "private", {"": rows})
    path = hugging_face(tmp_path / "data", {"train": rows, "test": rows})
    if where == "file":
        record = path / "train" / "state.json"
        state = json.loads(record.read_text())
        (arrow,) = (tmp_path / "private").glob("*.arrow")
        state["_data_files"] = [{"filename": f"../../private/{arrow.name}"}]
        record.write_text(json.dumps(state))
    else:
        (path / "dataset_dict.json").write_text(json.dumps({"splits": ["../private"]}))
    with pytest.raises(UserError, match="no safe image path") as caught:
        open_task(str(path))
    assert "private" in str(caught.value)
    record = path / ("train/state.json" if where == "file" else "dataset_dict.json")
    for damaged in ("[]", "{}", "{", '{"splits": [3], "_data_files": [3]}'):
        record.write_text(damaged)
        with pytest.raises(UserError):
            open_task(str(path))


def test_the_fingerprint_is_made_once(photo_folder, tmp_path, cache, monkeypatch):
    rows = photos(photo_folder, "train")
    file = shard(tmp_path / "data.tar", samples(rows, TEXT))
    first = open_task(str(file))
    with monkeypatch.context() as patch:
        patch.setattr("dapt.data.packed.files.file_digest", None)
        assert open_task(str(file)) == first
    (memory,) = cache.glob("*.sha256")
    memory.write_text("damaged")
    assert open_task(str(file)) == first
    file.write_bytes(file.read_bytes().replace(b"blue", b"grey"))  # the size stays
    os.utime(file, ns=(1, 1))
    assert open_task(str(file)).source_sha256 != first.source_sha256


def test_a_damaged_cache_is_a_sentence(photo_folder, tmp_path, cache):
    file = shard(tmp_path / "data.tar", samples(photos(photo_folder, "train"), TEXT))
    folder = cache / open_task(str(file)).source_sha256[:32]
    (folder / "listing.json").unlink()
    with pytest.raises(UserError, match="delete it, and it is unpacked anew"):
        open_task(str(file))
    shutil.rmtree(folder)
    open_task(str(file))


def test_an_image_too_large_to_be_one_is_not_cut_short(photo_folder, monkeypatch):
    file = photos(photo_folder, "train")[0][0]
    row = {"bytes": None, "path": str(file)}
    assert packed._content(row, "row 0", photo_folder) == file.read_bytes()
    monkeypatch.setattr(packed, "_LARGEST_IMAGE", 100)
    with pytest.raises(UserError, match=r"row 0: its image .* cannot be read \(it is too large"):
        packed._content(row, "row 0", photo_folder)


@pytest.mark.parametrize("library", ["datasets", "webdataset"])
def test_a_missing_library_is_named(photo_folder, tmp_path, monkeypatch, library):
    rows = photos(photo_folder, "train")
    if library == "datasets":
        path = hugging_face(tmp_path / "data", {"": rows})
    else:
        path = shard(tmp_path / "data.tar", samples(rows, TEXT))
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.tariterators", None)
    with pytest.raises(UserError, match=r"pip install 'dapt-clip\[sources\]'"):
        open_task(str(path))


def test_without_a_home_a_sentence_tells_where_the_cache_is_named(monkeypatch):
    monkeypatch.setenv("DAPT_CACHE", "~nobody_such/x")
    with pytest.raises(UserError, match="no path"):
        packed.cache_folder()
    monkeypatch.delenv("DAPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody_such/x")
    with pytest.raises(UserError, match="name one in DAPT_CACHE"):
        packed.cache_folder()
