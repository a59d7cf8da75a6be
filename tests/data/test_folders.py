"""Folders as people have them: parts of any spelling, what lies beside, and what is left out."""

import json
from collections import Counter

import pytest
from PIL import Image
from typer.testing import CliRunner

from dapt.cli import app
from dapt.data import open_task
from dapt.data.check import check_dataset
from dapt.data.spellings import part_of
from dapt.errors import UserError
from dapt.predict import find_images

NAMES = ("cat", "dog")


def draw(path):
    """A small image file at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path, "PNG")


def put(root, *paths):
    """Images at these places below the root."""
    for path in paths:
        draw(root / path)
    return root


def classes(root, *places, names=NAMES, count=3):
    """Class folders at the places below the root."""
    for place in places or (".",):
        put(root, *(f"{place}/{name}/{i}.png" for name in names for i in range(count)))
    return root


def counts(task):
    """Images of train, val and test."""
    return len(task.train), len(task.val), len(task.test)


def refusal(place):
    with pytest.raises(UserError) as caught:
        open_task(str(place))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((n, "train") for n in ("train", "Training", "TR", "trains", "train_set", "TrainImages")),
        *((n, "train") for n in ("trainset", "training-data", "train2017", "01_train", "trainval")),
        *((n, "val") for n in ("val", "valid", "Validation", "dev", "vals", "valid_images")),
        *((n, "test") for n in ("Test", "TESTING", "tests", "te", "eval", "evaluation", "testset")),
        *((n, "test") for n in ("holdout", "hold-out", "Held Out", "hold_out_set")),
    ],
)
def test_every_usual_spelling_is_a_part(name, part):
    assert part_of(name) == (part, ())


@pytest.mark.parametrize("name", ["cat", "trailer", "valley", "testa", "device", "attest", "7", ""])
def test_other_words_are_none(name):
    assert part_of(name) is None


def test_what_else_a_name_says_is_kept_apart():
    assert part_of("seg_train") == ("train", ("seg",))
    assert part_of("bullet train") == ("train", ("bullet",))
    assert part_of("train_test") is None


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("train", "valid", "test"), (6, 6, 6)),
        (("Training", "Testing"), (6, 0, 6)),
        (("tr", "val", "te"), (6, 6, 6)),
        (("TRAIN", "DEV", "HOLDOUT"), (6, 6, 6)),
        (("seg_train", "seg_test"), (6, 0, 6)),
        (("training_set", "test_set"), (6, 0, 6)),
    ],
)
def test_parts_of_other_names_are_read(tmp_path, folders, found):
    classes(tmp_path, *folders)
    task = open_task(str(tmp_path))
    assert task.class_names == NAMES
    assert counts(task) == found
    assert task.notes == ()
    assert {i.path.split("/")[0] for i in task.train} == {folders[0]}


def test_without_a_test_part_the_validation_images_are_tested_on(tmp_path):
    task = open_task(str(classes(tmp_path, "train", "valid")))
    assert counts(task) == (6, 0, 6)
    assert "the images of valid/ are tested on" in task.notes[0]


def test_an_unlabelled_part_is_left_out_and_told(tmp_path):
    classes(tmp_path, "train", "val")
    put(tmp_path, "test/a.png", "test/b.png", "train/loose.png")
    task = open_task(str(tmp_path))
    assert counts(task) == (6, 0, 6)
    assert task.left_out == (("in no class folder", 3),)
    assert "has no class folders in test/" in task.notes[0]


def test_parts_that_are_called_alike(tmp_path):
    """The exact name is meant; of several others, nobody knows."""
    classes(tmp_path / "a", "train", "test", "testing")
    task = open_task(str(tmp_path / "a"))
    assert {i.path.split("/")[0] for i in task.test} == {"test"}
    assert task.left_out == (("beside the parts", 6),)
    classes(tmp_path / "b", "train", "Test", "holdout")
    assert "holds Test/ and holdout/, which all are called like 'test'" in refusal(tmp_path / "b")


def test_a_part_may_lie_a_level_deeper(tmp_path):
    classes(tmp_path, "train/train", "test/images/all")
    task = open_task(str(tmp_path))
    assert task.class_names == NAMES
    assert task.train[0].path == "train/train/cat/0.png"
    assert task.test[0].path == "test/images/all/cat/0.png"


def test_what_lies_beside_the_parts_is_counted(tmp_path):
    classes(tmp_path, ".", "train", "test")
    put(tmp_path, "loose.png")
    task = open_task(str(tmp_path))
    assert counts(task) == (6, 0, 6)
    assert task.left_out == (("in no class folder", 1), ("beside the parts", 6))


def test_parts_within_class_folders_keep_images_apart(tmp_path):
    for name in NAMES:
        put(tmp_path, f"{name}/train/0.png", f"{name}/train/1.png", f"{name}/Test/0.png")
    task = open_task(str(tmp_path))
    assert [i.path for i in task.test] == ["cat/Test/0.png", "dog/Test/0.png"]
    assert Counter(i.class_name for i in task.train) == {"cat": 2, "dog": 2}
    put(tmp_path, "cow/0.png", "cow/1.png")
    assert "hold train/ and others, but cow/ does not" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("a", "a holds cat/, and one class"),
        ("b", "did you mean {}/b/PetImages?"),
        ("c", "did you mean {}/c/data/PetImages?"),
        ("d", "did you mean {}/d/export?"),
        ("e", "one class, 'cat'"),
        ("f", "has train/ but no test/; add one, or give {}/f/train, whose images"),
        ("g", "no class folders in test/; add one, or give {}/g/train, whose images"),
        ("h", "holds birds/, which has parts of its own; did you mean {}/h/birds?"),
        ("i", "holds test/ beside class folders"),
        ("j", "holds val/ beside class folders"),
        ("k", "test/, train/, valid/, which are parts, not classes, and their images are in no"),
        ("l", "class folder {}/l/l holds all the others' folders again"),
        ("m", "test/, valid/, which are parts, not classes, and none is to tune on"),
        ("n", "did you mean {}/n/labels.csv?"),
        ("o", "holds no class folders (did you mean {}/o/mine.csv?)"),
        ("p", "did you mean {}/p/train.csv?"),
    ],
)
def test_what_is_no_set_of_classes_is_refused_with_the_way_out(tmp_path, place, sentence):
    put(tmp_path, "a/cat/0.png", "a/cat/1.png", "a/0.png")
    classes(tmp_path, "b/PetImages", "c/data/PetImages", "d/export/train", "d/export/test")
    put(tmp_path, "b/__MACOSX/PetImages/cat/._0.png")
    classes(tmp_path, "e/train", "e/test", names=["cat"])
    classes(tmp_path, "f/train", "g/train", "h/pets/train", "h/pets/test", "h/birds/train")
    classes(tmp_path, "h/birds/test", "i", "i/test", "j", "m/valid", "m/test")
    classes(tmp_path, "l", "l/l", names=["cat", "dog", "cow"])
    put(tmp_path, "g/test/0.png", "j/val/0.png", "o/0.png", "o/1.png")
    put(tmp_path, *(f"{k}/{p}/{i}.png" for k in "kp" for p in ("train", "test") for i in range(3)))
    put(tmp_path, "k/valid/0.png", *(f"n/images/{i}.png" for i in range(3)))
    (tmp_path / "n" / "labels.csv").write_text("image,label\nimages/0.png,a\nimages/1.png,b\n")
    (tmp_path / "o" / "mine.csv").write_text("image,label\n0.png,a\n1.png,b\n")
    (tmp_path / "p" / "train.csv").write_text("id,label\n0.png,a\n1.png,b\n")
    (tmp_path / "p" / "test.csv").write_text("id\n0.png\n1.png\n")
    said = refusal(tmp_path / place)
    expected = sentence.format(tmp_path)
    if place == "a":
        expected = "holds one class folder, cat/, and one class leaves nothing to tell apart"
    assert expected in said


def test_words_that_are_classes_too_stay_classes(tmp_path):
    for names in (("invalid", "valid"), ("bus", "train"), ("hi", "ta", "te", "tr")):
        place = classes(tmp_path / names[0], names=names)
        task = open_task(str(place))
        assert task.class_names == names
        assert "is called like a part, and is taken for a class" in task.notes[0]


# -- parts that lie flat, with tables ---------------------------------------------------------


def one_hot(rows):
    lines = (f"{file}, {int(c == 'cat')}, {int(c == 'dog')}\n" for file, c in rows)
    return "_classes.csv", "filename, cat, dog\n" + "".join(lines)


def metadata(rows):
    return "metadata.csv", "file_name,label\n" + "".join(f"{file},{c}\n" for file, c in rows)


def metadata_lines(rows):
    lines = (json.dumps({"file_name": file, "label": c}) + "\n" for file, c in rows)
    return "metadata.jsonl", "".join(lines)


def boxes(rows):
    """As of a detector: a line a box."""
    lines = (f"{file},64,64,{c},1,1,9,9\n" * 2 for file, c in rows)
    return "_annotations.csv", "filename,width,height,class,xmin,ymin,xmax,ymax\n" + "".join(lines)


def coco(rows):
    ids = {"cat": 1, "dog": 2}
    return "_annotations.coco.json", json.dumps({
        "images": [{"id": i, "file_name": file} for i, (file, _) in enumerate(rows)],
        "categories": [{"id": 0, "name": "pets"}, *({"id": k, "name": n} for n, k in ids.items())],
        "annotations": [{"image_id": i, "category_id": ids[c], "bbox": [0, 0, 1, 1]}
                        for i, (_, c) in enumerate(rows) for _ in range(2)],
    })  # fmt: skip


@pytest.mark.parametrize("export", [one_hot, metadata, metadata_lines, boxes, coco])
def test_flat_parts_are_read_by_their_tables(tmp_path, export):
    rows = [(f"{name}{i}.png", name) for name in NAMES for i in range(3)]
    for part in ("train", "valid", "test"):
        put(tmp_path / part, *(file for file, _ in rows), "unlisted.png")
        file, text = export(rows)
        (tmp_path / part / file).write_text(text)
    task = open_task(str(tmp_path))
    assert (task.name, task.class_names) == (tmp_path.name, NAMES)
    assert counts(task) == (6, 6, 6)
    assert [i.path for i in task.val if i.class_name == "dog"] == [
        f"valid/dog{i}.png" for i in range(3)
    ]
    assert task.left_out == (("no label", 3),)
    assert all(task.image_path(item).is_file() for item in task.train)


def test_tables_of_parts_beside_one_folder_of_images(tmp_path):
    put(tmp_path, *(f"images/{name}{i}.png" for name in NAMES for i in range(2)))
    for i, part in enumerate(("train", "test")):
        (tmp_path / f"{part}.csv").write_text(f"image,class\ncat{i}.png,cat\ndog{i}.png,dog\n")
    task = open_task(str(tmp_path))
    assert [i.path for i in task.train] == ["images/cat0.png", "images/dog0.png"]
    assert [i.path for i in task.test] == ["images/cat1.png", "images/dog1.png"]


# -- what is left out ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "service", ["@eaDir", "#recycle", "__MACOSX", ".ipynb_checkpoints", "thumbnails",
                ".thumbnails", "$RECYCLE.BIN", ".@__thumb", "System Volume Information"]
)  # fmt: skip
def test_service_folders_are_left_out_and_told(tmp_path, service):
    clean = open_task(str(classes(tmp_path)))
    put(
        tmp_path,
        f"cat/{service}/0.png/THUMB_M.png",
        f"{service}/cat/1.png",
        f"dog/a/{service}/2.png",
    )
    task = open_task(str(tmp_path))
    assert (task.train, task.test, task.class_names) == (clean.train, clean.test, NAMES)
    assert task.left_out == (("service folder", 3),)
    assert task.notes[0].startswith("left out: 3 images below")
    assert len(find_images([tmp_path])) == 6


def test_hidden_images_are_told(tmp_path):
    classes(tmp_path)
    put(tmp_path, "cat/._0.png", "dog/.old/3.png")
    (tmp_path / "cat" / ".DS_Store").touch()
    task = open_task(str(tmp_path))
    assert (counts(task), task.left_out) == ((2, 0, 4), (("hidden", 2),))


def test_links_to_folders_are_safe(tmp_path):
    classes(tmp_path / "a")
    put(tmp_path, "more/7.png", "more/8.png")
    (tmp_path / "a" / "cat" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "a" / "cow").symlink_to(tmp_path / "more")
    task = open_task(str(tmp_path / "a"))
    assert [i.class_name for i in (*task.train, *task.test)].count("cow") == 2
    assert task.left_out == (("link to a folder", 1),)
    (tmp_path / "a" / "ox").symlink_to(tmp_path / "more")
    assert "ox are the same folder" in refusal(tmp_path / "a")
    (tmp_path / "a" / "ox").unlink()
    (tmp_path / "a" / "all").symlink_to(tmp_path)
    assert "all is a link back to" in refusal(tmp_path / "a")
    classes(tmp_path / "b", "train")
    (tmp_path / "b" / "test").symlink_to(tmp_path / "b" / "train")
    assert "are the same folder" in refusal(tmp_path / "b")


def test_folders_of_no_class_yet_are_told(tmp_path):
    task = open_task(str(classes(tmp_path, names=("cat", "dog", "unlabelled"))))
    assert "folder 'unlabelled' is taken for a class" in task.notes[0]


def test_what_is_left_out_is_counted_by_the_check(tmp_path):
    classes(tmp_path)
    put(tmp_path, "cat/@eaDir/0.png", "loose.png")
    (tmp_path / "dog" / "a.heic").touch()
    check = check_dataset(str(tmp_path))
    assert check.left_out == {"no image's name": 1, "service folder": 1, "in no class folder": 1}
    assert not check.problems
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 0
    assert all(note in result.output.replace("\n", " ") for note in check.notes)


def test_what_is_left_out_is_in_the_run(tmp_path, tiny_weights):
    classes(tmp_path / "photos")
    put(tmp_path, "photos/cat/@eaDir/0.png")
    command = ["train", str(tmp_path / "photos"), "-b", str(tiny_weights), "-m", "zero-shot",
               "-o", str(tmp_path / "run")]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "1 image below" in result.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["left_out"] == {"service folder": 1}
