"""Support sets: the published ones to the image, and what holds of any."""

import hashlib
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import fuzzed
from dapt.data import (
    Item,
    SupportSet,
    Task,
    draw_support_set,
    load_support_set,
    subset_classes,
    support_digest,
)
from dapt.errors import UserError


def task_of(train, val=(), test=()):
    """A task from lists of labels, one image each."""
    parts = {
        part: tuple(
            Item(f"{part}/{i}.jpg", label, f"class {label}") for i, label in enumerate(labels)
        )
        for part, labels in (("train", train), ("val", val), ("test", test))
    }
    classes = max([*train, *val, *test, 0]) + 1
    return Task("made-up", Path("/images"), tuple(f"class {i}" for i in range(classes)), **parts)


labels = st.lists(st.integers(0, 5), max_size=60)


@given(train=labels, val=labels, shots=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_draw(train, val, shots, seed):
    task = task_of(train, val)
    drawn = draw_support_set(task, shots, seed)
    for items, listed, wanted in ((drawn.train, train, shots), (drawn.val, val, min(shots, 4))):
        available = Counter(listed)
        assert Counter(i.label for i in items) == {
            label: min(wanted, count) for label, count in available.items()
        }
        assert len({i.path for i in items}) == len(items)
        assert list(dict.fromkeys(i.label for i in items)) == list(dict.fromkeys(listed))
    assert set(drawn.train) <= set(task.train)
    assert drawn == draw_support_set(task, shots, seed)
    assert drawn.train == draw_support_set(task_of(train), shots, seed).train


def test_draw_depends_on_the_seed():
    task = task_of([0] * 50 + [1] * 50)
    assert len({draw_support_set(task, 8, seed).train for seed in range(20)}) == 20


def test_saved_and_loaded(tmp_path):
    task = task_of([0, 0, 1, 1], [0, 1], [0, 1])
    drawn = draw_support_set(task, 1, 3)
    drawn.save(tmp_path / "set.json")
    assert load_support_set(tmp_path / "set.json", task) == drawn
    assert json.loads((tmp_path / "set.json").read_text()) == drawn.to_json()
    assert [p.name for p in tmp_path.iterdir()] == ["set.json"]


def test_base_and_new_have_their_images_of_one_draw(tmp_path):
    """Drawn, or read from a file of all classes; a file of the half alone is as good."""
    task = task_of([0, 3, 1, 2] * 9, [2, 0, 3, 1] * 9, [0, 1, 2, 3])
    whole = draw_support_set(task, 2, 1)
    whole.save(tmp_path / "all.json")
    for which, first in (("base", 0), ("new", 2)):
        half = subset_classes(task, which)
        drawn = draw_support_set(half, 2, 1)
        for part in ("train", "val"):
            kept = [i for i in getattr(whole, part) if i.label in (first, first + 1)]
            assert [(i.path, i.label + first) for i in getattr(drawn, part)] == [
                (i.path, i.label) for i in kept
            ]
        drawn.save(tmp_path / "half.json")
        for name in ("all", "half"):
            assert load_support_set(tmp_path / f"{name}.json", half) == drawn


def test_the_digest_is_of_files_and_of_pixels(tmp_path):
    """Whatever holds them, and in whatever order they are asked for; None where one is missing."""
    files = [tmp_path / f"{i}.png" for i in range(3)]
    pictures = [Image.new("RGB", (3, 2), (i, 0, 0)) for i in range(3)]
    for file, picture in zip(files, pictures, strict=True):
        picture.save(file)
    arrays = [np.asarray(picture) for picture in pictures]

    def digest(paths, **facts):
        items = tuple(Item(path, 0, "a") for path in paths)
        task = Task("made", tmp_path, ("a",), items, (), (), **facts)
        return support_digest(task, draw_support_set(task, 9, 1))

    def sha(*parts):
        hashes = [hashlib.sha256(part).digest() for part in parts]
        return hashlib.sha256(b"".join(hashes)).hexdigest()

    content, pixels = [f.read_bytes() for f in files], [p.tobytes() for p in pictures]
    assert digest(["0.png", "2.png"]) == sha(content[0], content[2])
    assert digest("012", pictures=pictures) == digest("012", pictures=arrays) == sha(*pixels)
    assert digest(["2", str(files[0])], pictures=pictures) == sha(pixels[2], content[0])
    assert digest("0", pictures=files) == sha(content[0])
    assert digest(["0", "none.png"], pictures=pictures) is None
    assert digest("0", pictures=["none.png"]) is None
    assert digest("0", pictures=[b"no image"]) is None


GOOD = {"path": "train/0.jpg", "label": 0, "class_name": "class 0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "must hold a JSON object"),
        ({"train": 1}, "needs 'train' as list"),
        ({"shots": "2"}, "needs 'shots' as int"),
        ({"seed": True}, "needs 'seed' as int"),
        ({"train": []}, "names no train images"),
        ({"train": [["train/0.jpg", 0, "class 0"]]}, "train entry 0 must be an object"),
        ({"train": [{**GOOD, "path": 3}]}, "train entry 0 must be an object"),
        ({"train": [{**GOOD, "label": True}]}, "train entry 0 must be an object"),
        ({"train": [{**GOOD, "label": 99}]}, "has label 0 in 'made-up', not 99"),
        ({"train": [GOOD, {**GOOD, "label": 1}]}, "train entry 1: class 'class 0' has label 0"),
        ({"train": [GOOD, GOOD]}, "train/0.jpg is listed twice"),
        ({"val": [{**GOOD, "path": "test/0.jpg"}]}, "test/0.jpg is a test image"),
        ({"train": [{**GOOD, "path": "../x.jpg"}]}, "'../x.jpg' is no safe image path"),
    ],
)
def test_load_refuses(tmp_path, change, message):
    task = task_of([0, 0, 1, 1], test=[0, 1])
    value = {"dataset": "made-up", "shots": 1, "seed": 1, "train": [GOOD], "val": []}
    file = tmp_path / "set.json"
    file.write_text(json.dumps({**value, **change} if isinstance(change, dict) else change))
    with pytest.raises(UserError) as error:
        load_support_set(file, task)
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_load_refuses_what_is_no_json(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_support_set(tmp_path / "none.json", task_of([0]))
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match=r"bad\.json is not readable JSON"):
        load_support_set(tmp_path / "bad.json", task_of([0]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("class 0"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dataset", "shots", "seed", "train", "val", "path", "label"]), inner
        )
    ),
)


@pytest.mark.fuzz
@fuzzed(100)
@given(json_values)
def test_any_json_is_loaded_or_refused(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(value))
    with suppress(UserError):
        assert isinstance(load_support_set(file, task_of([0, 1])), SupportSet)
