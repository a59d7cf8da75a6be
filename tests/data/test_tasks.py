"""Opening tasks of every kind, and the sentence that each kind of bad input earns."""

import dataclasses
import json
import os
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from miniatures import WORDS, make_benchmark
from PIL import Image

from conftest import fuzzed
from dapt.data import (
    BENCHMARKS,
    Item,
    Task,
    bundled_domains,
    open_image,
    open_task,
    read_split,
    subset_classes,
)
from dapt.data import tasks as tasks_module
from dapt.errors import UserError


def draw(path):
    """A small image file at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)


def tree(root, **parts):
    """``train={"cat": 3}`` makes train/cat/0.png ...; a part called "" lies at the root."""
    for part, classes in parts.items():
        for name, count in classes.items():
            for i in range(count):
                draw(root / part.removeprefix("_") / name / f"{i}.png")
    return root


def refused(message, *arguments, **options):
    with pytest.raises(UserError) as error:
        open_task(*map(str, arguments), **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# -- folders ---------------------------------------------------------------------------------


def test_split_folder(tmp_path):
    tree(tmp_path, train={"b_cat": 3, "a dog": 2}, test={"b_cat": 1, "a dog": 2}, val={"b_cat": 1})
    draw(tmp_path / "train" / "b_cat" / "more" / "5.JPEG")
    draw(tmp_path / "train" / "b_cat" / ".hidden.png")
    draw(tmp_path / "train" / "b_cat" / ".thumbs" / "0.png")
    (tmp_path / "train" / "b_cat" / "notes.txt").write_text("no image")
    task = open_task(str(tmp_path))
    assert task.class_names == ("a dog", "b_cat")
    assert task.name == tmp_path.name
    assert task.template == "a photo of a {}."
    assert [(i.path, i.label, i.class_name) for i in task.train] == [
        ("train/a dog/0.png", 0, "a dog"),
        ("train/a dog/1.png", 0, "a dog"),
        ("train/b_cat/0.png", 1, "b_cat"),
        ("train/b_cat/1.png", 1, "b_cat"),
        ("train/b_cat/2.png", 1, "b_cat"),
        ("train/b_cat/more/5.JPEG", 1, "b_cat"),
    ]
    assert len(task.test) == 3
    assert [i.path for i in task.val] == ["val/b_cat/0.png"]
    assert all(task.image_path(item).is_file() for item in task.train + task.val + task.test)


def test_unsplit_folder(tmp_path):
    tree(tmp_path, _={"many": 10, "two": 2, "one": 1})
    task = open_task(str(tmp_path))
    assert task.class_names == ("many", "one", "two")
    assert Counter(i.class_name for i in task.train) == {"many": 5, "two": 1, "one": 1}
    assert Counter(i.class_name for i in task.test) == {"many": 5, "two": 1}
    assert not set(task.train) & set(task.test)
    assert task == open_task(str(tmp_path))
    assert task.test != open_task(str(tmp_path), split_seed=1).test
    counts = Counter(i.class_name for i in open_task(str(tmp_path), test_fraction=0.2).test)
    assert counts == {"many": 2, "two": 1}


def test_a_class_is_split_as_without_the_others(tmp_path):
    one = open_task(str(tree(tmp_path / "one", _={"cat": 9, "dog": 3})))
    two = open_task(str(tree(tmp_path / "two", _={"ape": 4, "cat": 9})))
    assert [i.path for i in one.test if i.class_name == "cat"] == [
        i.path for i in two.test if i.class_name == "cat"
    ]


def test_listing_order_is_not_the_file_systems(tmp_path, monkeypatch):
    tree(tmp_path, _={"a": 4, "b": 4})
    task, listdir, walk = open_task(str(tmp_path)), os.listdir, os.walk
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    monkeypatch.setattr(
        os, "walk", lambda top: ((p, d, sorted(f, reverse=True)) for p, d, f in walk(top))
    )
    assert open_task(str(tmp_path)) == task


def test_files_without_an_images_name_are_told(tmp_path):
    tree(tmp_path, _={"cat": 2, "dog": 2})
    assert open_task(str(tmp_path)).notes == ()
    for name in ("IMG_1.HEIC", "scan", ".hidden"):
        (tmp_path / "dog" / name).write_bytes(b"?")
    task = open_task(str(tmp_path))
    assert len(task.train) + len(task.test) == 4
    (note,) = task.notes
    assert note.startswith("left out: 2 files without an image's name in the class folders")
    assert "such as dog/IMG_1.HEIC" in note
    (tmp_path / "cow").mkdir()
    (tmp_path / "cow" / "1.heic").touch()
    refused(f"class folder {tmp_path / 'cow'} holds no images (by its name, cow/1.heic", tmp_path)


def test_classes_of_one_name_in_a_benchmark_are_told(tmp_path):
    """ImageNet's own names have 'missile' and 'sunglasses' twice."""
    make_benchmark(tmp_path, "imagenet")
    (note,) = open_task("imagenet", root=tmp_path).notes
    assert note.startswith("1 of the 12 classes of 'imagenet' have another's name")
    assert "'missile', label 9, that of label 8" in note
    better = tmp_path / "names.json"
    better.write_text(json.dumps([f"{name} {i}" for i, name in enumerate(WORDS)]))
    assert open_task("imagenet", root=tmp_path, class_names=better).notes == ()


def test_numbered_classes_are_in_numeric_order(tmp_path):
    tree(tmp_path, _={"10": 2, "9": 2})
    assert open_task(str(tmp_path)).class_names == ("9", "10")


def test_a_folder_is_named_as_on_disk(tmp_path, monkeypatch):
    tree(tmp_path / "birds.v2", _={"tit": 2, "owl": 2})
    assert open_task(str(tmp_path / "birds.v2")).name == "birds.v2"
    monkeypatch.chdir(tmp_path / "birds.v2")
    assert open_task(".").name == "birds.v2"


def test_a_class_may_be_called_train(tmp_path):
    tree(tmp_path, _={"bus": 2, "train": 2})
    task = open_task(str(tmp_path))
    assert task.class_names == ("bus", "train")
    assert any("train is called like a part, and is taken for a class" in n for n in task.notes)


def test_linked_class_folders_are_followed(tmp_path):
    tree(tmp_path / "elsewhere", _={"cat": 2})
    tree(tmp_path / "data", _={"dog": 2})
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    assert open_task(str(tmp_path / "data")).class_names == ("cat", "dog")


def test_bad_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    refused("holds no class folders", tmp_path / "empty")
    draw(tmp_path / "flat" / "0.png")
    refused("holds no class folders", tmp_path / "flat")
    tree(tmp_path / "hollow", _={"cat": 2})
    (tmp_path / "hollow" / "dog").mkdir()
    refused(f"class folder {tmp_path / 'hollow' / 'dog'} holds no images", tmp_path / "hollow")
    tree(tmp_path / "no_test", train={"cat": 2})
    refused("has train/ but no test/; add one, or give", tmp_path / "no_test")
    tree(tmp_path / "new", train={"cat": 2}, test={"dog": 1})
    refused(f"class folder {tmp_path / 'new' / 'test' / 'dog'} has no", tmp_path / "new")
    tree(tmp_path / "same", _={"my cat": 2, "My_cat": 2})
    refused("classes 'My_cat' and 'my cat' have the same name", tmp_path / "same")
    tree(tmp_path / "single", _={"cat": 1})
    refused("holds one class folder, cat/, and one class leaves nothing", tmp_path / "single")
    tree(tmp_path / "lonely", _={"cat": 1, "dog": 1})
    refused("names no test images", tmp_path / "lonely")
    refused("`domain` x goes with the bundled task only", tmp_path / "same", domain="x")


# -- class names -----------------------------------------------------------------------------


def test_class_name_files(tmp_path):
    tree(tmp_path / "data", _={"n01": 2, "n02": 2})
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"n01": "tench"}))
    task = open_task(str(tmp_path / "data"), class_names=file)
    assert task.class_names == ("tench", "n02")
    assert {(i.label, i.class_name) for i in task.train} == {(0, "tench"), (1, "n02")}
    file.write_text(json.dumps(["tench", "goldfish"]))
    assert open_task(str(tmp_path / "data"), class_names=file).class_names == ("tench", "goldfish")


def test_names_that_clash_can_be_mapped_apart(tmp_path):
    tree(tmp_path / "data", _={"a crane": 2, "a_crane": 2})
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"a crane": "bird", "a_crane": "machine"}))
    assert open_task(str(tmp_path / "data"), class_names=file).class_names == ("bird", "machine")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ("3", "must hold a JSON object of folder name"),
        ('{"cat": 3}', "must hold a JSON object of folder name"),
        ('{"cot": "x"}', "the dataset has no class 'cot' (did you mean 'cat'?)"),
        ('["a"]', "lists 1 names, but"),
        ('["a", "A"]', "classes 'a' and 'A' have the same name"),
        ('{"cat": "_ "}', "'_ ' is no class name"),
        ('{"cat": "dog"}', "classes 'dog' and 'dog' have the same name"),
    ],
)
def test_bad_class_name_files(tmp_path, content, message):
    tree(tmp_path / "data", _={"cat": 2, "dog": 2})
    file = tmp_path / "names.json"
    file.write_text(content)
    refused(message, tmp_path / "data", class_names=file)


# -- tables ----------------------------------------------------------------------------------


def test_csv(tmp_path):
    file = tmp_path / "birds.csv"
    file.write_text(
        "\ufefflabel,path,split,note\n"
        'tit,"a, b.png",train,\n'
        "owl,c.png,train,x\n"
        "tit,d.png,test,\n"
        "owl,sub/e.png,val,\n",
        encoding="utf-8",
    )
    task = open_task(str(file))
    assert (task.name, task.root, task.class_names) == ("birds", tmp_path, ("owl", "tit"))
    assert [(i.path, i.label) for i in task.train] == [("a, b.png", 1), ("c.png", 0)]
    assert [i.path for i in task.val] == ["sub/e.png"]
    assert [i.class_name for i in task.test] == ["tit"]


def test_jsonl_is_read_and_split_as_csv(tmp_path):
    rows = [(f"{i}.png", str(i % 3)) for i in range(12)]
    (tmp_path / "a.csv").write_text("path,label\n" + "\n".join(map(",".join, rows)))
    lines = [json.dumps({"path": p, "label": int(y)}) for p, y in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    one, two = open_task(str(tmp_path / "a.csv")), open_task(str(tmp_path / "a.jsonl"))
    assert one == two
    assert len(one.train) == len(one.test) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: the header must name the columns path and label"),
        ("a.png,cat\n", "line 1: the header must name the columns path and label"),
        ("path,label\n", "names no images"),
        ("path,label\na.png\n", "line 2: needs a path and a label"),
        ("path,label\na.png,x\n,x\n", "line 3: needs a path and a label"),
        ("path,label\n/a.png,x\n", "line 2: '/a.png' is no safe image path"),
        ("path,label\nC:\\a.png,x\n", "is no safe image path"),
        ("path,label\nx/../../a.png,x\n", "line 2: 'x/../../a.png' is no safe image path"),
        ("path,label\na.png,x\na.png,y\n", "line 3: a.png is on line 2 already"),
        ("path,label,split\na.png,x,old\n", "line 2: split 'old' is none of"),
        ("path,label,split\na.png,x,train\nb.png,x,\n", "line 3: either every line has a split"),
        ("path,label,split\na.png,x,train\nb.png,y,test\n", "class 'y' of test image b.png has no"),
        ("path,label,split\na.png,x,train\n", "names no test images"),
        ('path,label\n"a.png,x\n', "malformed CSV"),
        (
            "path,label\na.png,x\nb.png,x\nc.png,X\nd.png,X\n",
            "classes 'X' and 'x' have the same name",
        ),
        ("path,label\na.png,x\x07\n", "is no class name"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    file = tmp_path / "bad.csv"
    file.write_text(content, newline="")
    refused(message, file)
    refused(str(file) if "same name" not in message else "bad.csv", file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "names no images"),
        ('{"path": "a.png", "label": "x"}\n{"path"\n', "line 2: malformed JSON"),
        ("[]\n", "line 1: must be an object"),
        ('{"path": 1, "label": "x"}', "line 1: needs a path and a label"),
        ('{"path": "a", "label": true}', "line 1: needs a path and a label"),
        ('{"path": "a", "label": "x", "split": 1}', "line 1: split must be"),
        ('{"path": "\\ud800", "label": "x"}', "is no safe image path"),
        ('{"path": "a\\u0000", "label": "x"}', "is no safe image path"),
        ("[" * 100_000, "line 1: malformed JSON"),
        ("[" + "9" * 5000 + "]", "line 1: m"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    refused(message, file)
    refused(str(file), file)


@pytest.mark.parametrize("name", ["bad.csv", "bad.jsonl"])
def test_tables_that_are_no_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"path,label\n\xff\xfe\x00")
    refused(f"{tmp_path / name} cannot be read", tmp_path / name)


# -- benchmarks ------------------------------------------------------------------------------

SPLIT = {
    "train": [["b/1.jpg", 1, "owl"], ["a/1.jpg", 0, "tit"], ["a/2.jpg", 0, "tit"]],
    "val": [["a/3.jpg", 0, "tit"]],
    "test": [["b/2.jpg", 1, "owl"]],
}


def put_split(root, value, name="dtd"):
    row = BENCHMARKS[name]
    file = root / row.folder / row.index
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def test_benchmark(tmp_path):
    put_split(tmp_path, SPLIT)
    task = open_task("dtd", root=tmp_path)
    assert (task.name, task.class_names) == ("dtd", ("tit", "owl"))
    assert task.template == "{} texture."
    assert [(i.path, i.label, i.class_name) for i in task.train] == [
        tuple(e) for e in SPLIT["train"]
    ]
    assert task.image_path(task.train[0]) == tmp_path / "dtd" / "images" / "b" / "1.jpg"
    names = tmp_path / "names.json"
    names.write_text('{"tit": "blue tit"}')
    assert open_task("dtd", root=tmp_path, class_names=names).class_names == ("blue tit", "owl")
    put_split(tmp_path, SPLIT, "stanford_cars")
    task = open_task("stanford_cars", root=tmp_path)
    assert task.image_path(task.test[0]) == tmp_path / "stanford_cars" / "b" / "2.jpg"


def test_every_row_of_the_table():
    assert len(BENCHMARKS) == 15
    for name, row in BENCHMARKS.items():
        assert row.name == name
        assert row.template.count("{}") == 1
    assert len({row.folder for row in BENCHMARKS.values()}) == 15


def test_missing_benchmarks(tmp_path):
    refused("needs `root`, the folder that holds dtd", "dtd")
    refused(f"`root` {tmp_path / 'no'} does not exist", "dtd", root=tmp_path / "no")
    refused(f"{tmp_path / 'dtd'} does not exist", "dtd", root=tmp_path)
    (tmp_path / "dtd").mkdir()
    file = tmp_path / "dtd" / "split_zhou_DescribableTextures.json"
    refused(f"split file {file} does not exist", "dtd", root=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is not readable JSON"),
        ("[]", "must be a JSON object with the lists train, val and test"),
        ({"val": None}, "must be a JSON object with the lists train, val and test"),
        ({"val": [["a.jpg", 0]]}, "val entry 0 must be [relative path, label, class name]"),
        ({"val": [["a.jpg", True, "tit"]]}, "val entry 0 must be"),
        ({"val": [["a.jpg", "0", "tit"]]}, "val entry 0 must be"),
        ({"val": [["../a.jpg", 0, "tit"]]}, "val entry 0: '../a.jpg' is no safe image path"),
        ({"val": [["a.jpg", 0, "owl"]]}, "val entry 0: label 0 is 'owl' here and 'tit' before"),
        ({"val": [["a.jpg", 3, "jay"]]}, "labels must be 0 .. 2 for its 3 classes, but 2 is"),
        ({"val": [["a.jpg", 2, "owl"]]}, "classes 'owl' and 'owl' have the same name"),
        ({"test": [["a.jpg", 2, "jay"]]}, "class 'jay' of test image a.jpg has no train images"),
        ({"train": [], "val": [], "test": []}, "names no images to tune on"),
        ({"test": []}, "names no test images"),
    ],
)
def test_bad_splits(tmp_path, change, message):
    file = put_split(tmp_path, change if isinstance(change, str) else {**SPLIT, **change})
    refused(message, "dtd", root=tmp_path)
    refused(str(file), "dtd", root=tmp_path)


entries = st.lists(
    st.lists(
        st.none() | st.integers(-2, 3) | st.text(max_size=4) | st.floats() | st.just("a/b.jpg"),
        max_size=4,
    )
    | st.tuples(st.text(max_size=6), st.integers(-1, 2), st.sampled_from(["x", "y", "", "X"])),
    max_size=5,
)
split_values = st.dictionaries(st.sampled_from(["train", "val", "test"]), entries | st.text())


@pytest.mark.fuzz
@fuzzed(100)
@given(split_values | entries)
def test_any_split_is_read_or_refused(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "split.json"
    file.write_text(json.dumps(value))
    with suppress(UserError):
        task = read_split(file)
        assert {item.label for item in task.train} == set(range(len(task.class_names)))


@pytest.mark.fuzz
@fuzzed(100)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_as_a_split(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.json"
    file.write_bytes(content)
    with pytest.raises(UserError):
        read_split(file)


# -- the bundled task, and nothing at all ----------------------------------------------------


def test_unknown_datasets(tmp_path):
    refused("unknown dataset 'bundeld' (did you mean 'bundled'?)", "bundeld")
    refused("(did you mean 'oxford_pets'?)", "oxfordpets")
    refused(f"dataset {tmp_path / 'none'} does not exist", tmp_path / "none")
    refused("dataset none.csv does not exist", "none.csv")
    (tmp_path / "a.txt").write_text("")
    refused("must be a .csv, .tsv, .jsonl, .json, .parquet or .tar file", tmp_path / "a.txt")


def test_domains_of_a_bundled_task(tmp_path, monkeypatch):
    value = {
        "name": "drawings",
        "class_names": ["cat", "dog"],
        "template": "a drawing of a {}.",
        "domains": {
            "flat": {"train": [["flat/0.png", 1], ["flat/1.png", 0]], "val": [], "test": []},
            "bold": {"test": [["bold/0.png", 1]]},
        },
    }
    (tmp_path / "task.json").write_text(json.dumps(value))
    monkeypatch.setattr(tasks_module, "BUNDLED_ROOT", tmp_path)
    assert list(bundled_domains()) == ["flat", "bold"]
    source, target = open_task("bundled"), open_task("bundled", domain="bold")
    assert (source.name, target.name) == ("bundled", "bundled:bold")
    assert [(i.path, i.class_name) for i in source.train] == [
        ("flat/0.png", "dog"),
        ("flat/1.png", "cat"),
    ]
    assert not target.train
    assert [i.class_name for i in target.test] == ["dog"]
    assert source.class_names == target.class_names == ("cat", "dog")
    assert source.template == "a drawing of a {}."
    refused("has no domain 'bald'", "bundled", domain="bald")
    refused("(did you mean 'bold'?); use one of flat, bold", "bundled", domain="bald")


@pytest.mark.skipif(
    not (tasks_module.BUNDLED_ROOT / "task.json").is_file(), reason="the task is not bundled yet"
)
def test_bundled_task():
    source = open_task("bundled")
    assert len({n.replace("_", " ").lower() for n in source.class_names}) == len(source.class_names)
    assert source.template.count("{}") == 1
    everything = set(range(len(source.class_names)))
    assert {item.label for item in source.train} == everything
    assert {item.label for item in source.test} == everything
    parts = [{item.path for item in part} for part in (source.train, source.val, source.test)]
    assert len(set().union(*parts)) == sum(map(len, parts))
    for domain in bundled_domains():
        task = open_task("bundled", domain=domain)
        assert task.class_names == source.class_names
        assert task.test
        for item in task.train + task.val + task.test:
            assert open_image(task.image_path(item)).mode == "RGB"


def test_a_task_can_hold_pictures(tmp_path):
    """Images in memory go by their numbers, files beside them by their paths."""
    file = tmp_path / "a.png"
    items = tuple(Item(path, 0, "a") for path in ("1", str(file), "0"))
    pictures = [Image.new("RGB", (2, 2)), {"image": b"..."}]
    task = Task("made", tmp_path, ("a", "b", "c"), items, (), (), pictures=pictures)
    assert [task.source(item) for item in items] == [pictures[1], file, pictures[0]]
    assert subset_classes(task, "base").source(items[0]) is pictures[1]
    on_disk = dataclasses.replace(task, pictures=None)
    assert on_disk == task
    assert hash(on_disk) == hash(task)
    assert "pictures=" not in repr(task)
    assert [on_disk.source(item) for item in items] == [tmp_path / "1", file, tmp_path / "0"]


def test_base_and_new_classes():
    task = open_task("bundled")
    base, new = (subset_classes(task, which) for which in ("base", "new"))
    assert base.class_names + new.class_names == task.class_names
    assert (len(base.class_names), len(new.class_names)) == (17, 17)
    for half in (base, new):
        for item in (*half.train, *half.val, *half.test):
            assert half.class_names[item.label] == item.class_name
    assert [i.path for i in task.test] == sorted(
        (i.path for i in (*base.test, *new.test)), key=[i.path for i in task.test].index
    )
    three = dataclasses.replace(task, class_names=task.class_names[:3])
    assert subset_classes(three, "base").class_names == task.class_names[:2]
    with pytest.raises(UserError, match="has one class"):
        subset_classes(dataclasses.replace(task, class_names=("a",)), "new")
