"""Tables as people and tools write them: headers, delimiters, encodings, paths, exports."""

import json
from collections import Counter

import pytest
from PIL import Image

from dapt.data import open_task
from dapt.errors import UserError

ROWS = [(f"photos/{name}/{i}.png", name) for name in ("cat", "dog") for i in range(3)]


@pytest.fixture
def place(tmp_path):
    """A folder in which the images of ROWS lie."""
    for path, _ in ROWS:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(tmp_path / path)
    return tmp_path


def written(place, text, name="t.csv", encoding="utf-8"):
    file = place / name
    file.write_bytes(text.encode(encoding))
    return file


def csv(sep=",", head="path,label", rows=ROWS):
    return head.replace(",", sep) + "\n" + "".join(f"{p}{sep}{c}\n" for p, c in rows)


def plain(place):
    """The task of the plainest table."""
    return open_task(str(written(place, csv())))


def same(task, other):
    return (task.class_names, task.train, task.val, task.test) == (
        (other.class_names, other.train, other.val, other.test)
    )


def refusal(file):
    with pytest.raises(UserError) as caught:
        open_task(str(file))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- CSV ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    ["filename,class", "image,category", "file,label_name", "filepath,class", "Image Path,Label",
     "file_name,labels", "FILENAME,Class Name", "img,target", "filepaths,species"],
)  # fmt: skip
def test_usual_headers_are_known(place, head):
    expected = plain(place)
    assert same(open_task(str(written(place, csv(head=head)))), expected)


@pytest.mark.parametrize(
    ("text", "name", "encoding"),
    [
        (csv(";"), "t.csv", "utf-8"),
        (csv("\t"), "t.csv", "utf-8"),
        (csv("\t"), "t.tsv", "utf-8"),
        ("sep=;\r\n" + csv(";").replace("\n", "\r\n"), "t.csv", "utf-8"),
        (csv(), "t.csv", "utf-8-sig"),
        (csv("\t"), "t.tsv", "utf-16"),
        (csv(), "t.csv", "utf-16-le"),
        (csv(), "t.csv", "utf-16-be"),
        (csv(), "t.csv", "utf-32"),
        (csv().replace("/", "\\"), "t.csv", "utf-8"),
        (csv().replace(",dog", ",dog,,") + ",\n,\n", "t.csv", "utf-8"),
        (json.dumps([{"image": p, "class": c} for p, c in ROWS]), "t.json", "utf-8"),
        ("\n".join(json.dumps({"file": p, "category": c}) for p, c in ROWS), "t.jsonl", "utf-16"),
    ],
)
def test_however_a_table_is_written_it_is_the_same(place, text, name, encoding):
    expected = plain(place)
    task = open_task(str(written(place, text, name, encoding)))
    assert same(task, expected)
    assert task.notes == ()


def test_windows_1252_is_read_and_told(place):
    task = open_task(str(written(place, csv(";").replace(";cat", ";Kätzchen"), encoding="cp1252")))
    assert task.class_names == ("Kätzchen", "dog")
    assert "is read as Windows-1252 (cp1252)" in task.notes[0]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (",cat\n", ",tench, Tinca tinca\n", "line 2: 3 fields, where the header names 2 (' Tinca"),
        ("photos/dog/0", "photos,dog/0", "line 5: 3 fields, where the header names 2"),
        (",dog\n", "\n", "line 5: needs a path and a label"),
    ],
)
def test_ragged_rows_are_refused(place, old, new, sentence):
    assert sentence in refusal(written(place, csv().replace(old, new)))
    wide = csv(";").replace(old.replace(",", ";"), new.replace(",", ";"))
    assert sentence.replace("' ", "'")[:40] in refusal(written(place, wide)).replace("' ", "'")


def test_a_comma_in_quotes_is_of_the_name(place):
    task = open_task(str(written(place, csv().replace(",cat", ',"cat, tabby"'))))
    assert task.class_names == ("cat, tabby", "dog")


# -- paths -------------------------------------------------------------------------------------


def test_a_name_with_a_real_backslash_is_kept(place):
    for name in ("a\\b.png", "c\\d.png"):
        Image.new("RGB", (4, 4)).save(place / name)
    text = csv() + "a\\b.png,cat\nc\\d.png,dog\n"
    task = open_task(str(written(place, text)))
    assert {i.path for i in (*task.train, *task.test)} >= {"a\\b.png", "c\\d.png"}


def test_absolute_paths_below_the_tables_folder(place):
    expected = plain(place)
    task = open_task(str(written(place, csv().replace("photos/", f"{place}/photos/"))))
    assert same(task, expected)
    assert task.notes == ()


@pytest.mark.parametrize("base", ["C:\\Users\\me\\", "/home/me/data/", "\\\\nas\\share\\"])
def test_absolute_paths_of_another_machine_are_found_here_and_told(place, base):
    expected = plain(place)
    text = csv().replace("photos/", f"{base}photos/")
    if "\\" in base:
        text = text.replace("/", "\\")
    task = open_task(str(written(place, text)))
    assert same(task, expected)
    assert "has absolute paths, which are taken from its own folder" in task.notes[0]


@pytest.mark.parametrize(
    "odd", ["/etc/passwd", "C:\\x.png", "/home/me/../../photos/cat/0.png", "/mnt/photos/../b.png"]
)
def test_no_path_leads_out_of_the_tables_folder(place, odd):
    text = csv(rows=[*ROWS, (odd, "cat")])
    assert "is no safe image path" in refusal(written(place, text))
    text = csv(rows=[("/home/me/photos/cat/0.png", "cat"), ("/home/me/../x.png", "dog")])
    assert "is no safe image path" in refusal(written(place, text))


def test_images_in_one_folder_beside_the_table_are_found(place):
    for folder in ("train", "test"):
        (place / folder).mkdir()
        for number in range(4):
            Image.new("RGB", (4, 4)).save(place / folder / f"{folder}{number}.jpg")
    text = "id,breed\n" + "".join(f"train{i},{'cat' if i % 2 else 'dog'}\n" for i in range(4))
    task = open_task(str(written(place, text, "labels.csv")))
    assert {i.path for i in (*task.train, *task.test)} == {f"train/train{i}.jpg" for i in range(4)}
    assert "are taken from" in task.notes[0]


# -- parts -------------------------------------------------------------------------------------


def test_a_split_may_be_spelled_and_called_otherwise(place):
    parts = ["Training", "valid", "TEST"] * 2
    lines = "".join(f"{p};{c};{part}\n" for (p, c), part in zip(ROWS, parts, strict=True))
    for column in ("split", "Data Set", "subset"):
        task = open_task(str(written(place, f"filepaths;labels;{column}\n{lines}")))
        assert [len(part) for part in (task.train, task.val, task.test)] == [2, 2, 2]
        assert any("is taken for the split" in note for note in task.notes) == (column != "split")


def test_a_column_of_something_else_is_no_split(place):
    lines = "".join(f"{p},{c},x{i}\n" for i, (p, c) in enumerate(ROWS))
    assert same(open_task(str(written(place, "path,label,set\n" + lines))), plain(place))


def test_parts_in_paths_alone_are_told(place):
    rows = [(f"{part}/{c}{i}.png", c) for part in ("train", "test") for c in "ab" for i in "12"]
    task = open_task(str(written(place, csv(rows=rows))))
    assert "no column 'split' says so: images are split anew" in task.notes[0]


# -- exports -----------------------------------------------------------------------------------


def check_several(file, where):
    """One image there is of cats and dogs; unless classes are said to exclude each other."""
    task = open_task(str(file))
    assert task.multilabel
    assert "1 of " in task.notes[0]
    assert [i.labels for i in (*task.train, *task.test)].count((0, 1)) == 1
    with pytest.raises(UserError, match=f"{where}: the image has 2 classes, cat, dog"):
        open_task(str(file), multi_label=False)


def test_one_column_a_class(place):
    lines = "".join(f"{i},{p},{int(c == 'cat')}.0,{int(c == 'dog')}.0\n"
                    for i, (p, c) in enumerate(ROWS))  # fmt: skip
    text = ",image,cat,dog\n" + lines
    assert same(open_task(str(written(place, text))), plain(place))
    task = open_task(str(written(place, text + "9,photos/cat/9.png,0,0\n")))
    assert task.left_out == (("no label", 1),)
    several = text + "9,photos/cat/9.png,1,1\n"
    check_several(written(place, several), "line 8")
    assert "'dog' is '0.5', neither 0 nor 1" in refusal(written(place, text + "9,x.png,0,0.5\n"))


def studio(path, *choices, **more):
    result = [{"type": "choices", "value": {"choices": list(choices)}}] if choices else []
    return {"id": 1, "data": {"image": path}, "annotations": [{"result": result, **more}]}


def test_label_studio(place):
    served = "/data/local-files/?d="
    tasks = [studio(served + p.replace("/", "%5C"), c) for p, c in ROWS]
    file = written(place, json.dumps([*tasks, studio("photos/new.png")]), "t.json")
    task = open_task(str(file))
    assert same(task, plain(place))
    assert task.left_out == (("no label", 1),)
    tasks[0] = studio(served + ROWS[0][0], "cat", was_cancelled=True)
    task = open_task(str(written(place, json.dumps(tasks), "t.json")))
    labels = Counter(i.class_name for i in (*task.train, *task.test))
    assert labels == {"cat": 2, "dog": 3}
    tasks[0] = studio(served + ROWS[0][0], "cat", "dog")
    check_several(written(place, json.dumps(tasks), "t.json"), "task 0")


def test_label_studios_table_of_uploads(place):
    lines = "".join(
        f'1,"{{""choices"": [""{c}""]}}",/data/upload/3/0a1b2c3d-{p.rpartition("/")[2]}\n'
        for p, c in ROWS[:2]
    ) + "1,dog,/data/upload/3/0a1b2c3d-5.png\n1,dog,/data/upload/3/0a1b2c3d-6.png\n"  # fmt: skip
    for name in ("0", "1", "5", "6"):
        (place / "media").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(place / "media" / f"0a1b2c3d-{name}.png")
    task = open_task(str(written(place, "id,choice,image\n" + lines)))
    assert {i.path for i in (*task.train, *task.test)} == {
        f"media/0a1b2c3d-{n}.png" for n in "0156"
    }
    assert task.class_names == ("cat", "dog")


def listing(**changes):
    ids = {"cat": 1, "dog": 2}
    return {
        "images": [{"id": i, "file_name": p} for i, (p, _) in enumerate(ROWS)],
        "categories": [{"id": k, "name": n} for n, k in ids.items()],
        "annotations": [{"image_id": i, "category_id": ids[c]} for i, (_, c) in enumerate(ROWS)],
        **changes,
    }


def test_coco(place):
    assert same(open_task(str(written(place, json.dumps(listing()), "a.json"))), plain(place))
    both = [*listing()["annotations"], {"image_id": 0, "category_id": 2}]
    several = written(place, json.dumps(listing(annotations=both)), "a.json")
    check_several(several, "image 0")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (listing(images=[{"id": 0}]), "is no COCO listing"),
        (listing(categories=None), "is no COCO listing"),
        (listing(annotations=[{"image_id": 99, "category_id": 1}]), "is no COCO listing"),
        ([{"data": {}, "annotations": []}], "task 0 is damaged"),
        ([{"data": {"image": "a.png"}, "annotations": [3]}], "task 0 is damaged"),
        ([3], "entry 0: must be an object"),
        ({"a": 1}, "must hold a list of objects"),
        ([], "names no images"),
        ([{"path": "a.png", "label": None}], "entry 0: needs a path and a label"),
    ],
)
def test_damaged_exports(place, value, sentence):
    assert sentence in refusal(written(place, json.dumps(value), "a.json"))


def test_parquet(place):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths, names = zip(*ROWS, strict=True)
    file = place / "t.parquet"
    columns = {"file_name": paths, "label": arrow.array(names).dictionary_encode(), "n": [1.5] * 6}
    parquet.write_table(arrow.table(columns), file)
    assert same(open_task(str(file)), plain(place))
    parquet.write_table(arrow.table({"a": paths}), file)
    assert "the header must name the columns path and label, not 'a'" in refusal(file)
    images = [{"bytes": b"x", "path": None}]
    parquet.write_table(arrow.table({"image": images, "label": [1]}), file)
    assert "column 'image' holds images, not paths" in refusal(file)
    file.write_bytes(b"PAR1....PAR1")
    assert "t.parquet cannot be read" in refusal(file)


def test_one_class_is_refused(place):
    rows = [row for row in ROWS if row[1] == "cat"]
    assert "has one class, 'cat'" in refusal(written(place, csv(rows=rows)))


def test_an_archive_is_to_be_unpacked(place):
    (place / "photos.zip").write_bytes(b"PK")
    assert "is an archive; unpack it" in refusal(place / "photos.zip")
