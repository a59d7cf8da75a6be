"""Images and labels in the forms that Python programs hold them in."""

import io
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from dapt.data.given import as_labels, as_sequence, labels_of
from dapt.data.images import read_picture
from dapt.errors import UserError
from dapt.estimator import PromptClassifier

NAMES = ["bird", "cat", "dog"]
CODES = [0, 1, 2, 1, 0, 2]
WORDS = [NAMES[code] for code in CODES]
PICTURES = [Image.new("RGB", (8, 6), (40 * place, 10, 200)) for place in range(6)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for place, picture in enumerate(PICTURES):
        picture.save(folder / f"{place}.png")
    return [str(folder / f"{place}.png") for place in range(6)]


def seen(given):
    """What is read of it: pixels of each image."""
    images = as_sequence(given)
    return [np.asarray(read_picture(images[i])).tolist() for i in range(len(images))]


EXPECTED = [np.asarray(picture).tolist() for picture in PICTURES]


@pytest.fixture(scope="module")
def table():
    """A Hugging Face dataset with an image and a class of three in each row."""
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    rows = {"image": PICTURES, "label": CODES}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


HUGGING_FACE = {
    "torch": lambda data: data.with_format("torch"),
    "numpy": lambda data: data.with_format("numpy"),
    "pandas": lambda data: data.with_format("pandas"),
    "arrow": lambda data: data.with_format("arrow"),
    "one column formatted": lambda data: data.with_format("torch", columns=["label"]),
    "streamed": lambda data: data.to_iterable_dataset(),
    "streamed torch": lambda data: data.to_iterable_dataset().with_format("torch"),
    "undecoded": lambda data: data.cast_column("image", type(data.features["image"])(decode=False)),
    "own names of columns": lambda data: data.rename_columns({"image": "photo", "label": "kind"}),
    "own names, streamed": lambda data: data.rename_columns(
        {"image": "photo", "label": "kind"}
    ).to_iterable_dataset(),
    "parts, of which there is one": lambda data: type("Parts", (dict,), {})(train=data),
    "a streamed part": lambda data: {"train": data.to_iterable_dataset()},
    "a transform of the user's": lambda data: data.with_transform(dict),
    "part of a part": lambda data: Subset(Subset(data.with_format("numpy"), range(6)), range(6)),
}


@pytest.mark.parametrize("form", HUGGING_FACE)
def test_names_and_images_of_any_hugging_face_dataset(table, form):
    given = as_sequence(HUGGING_FACE[form](table))
    assert labels_of(given) == WORDS
    assert seen(given) == EXPECTED


def test_a_dictionary_of_parts_is_not_chosen_from(table):
    with pytest.raises(ValueError, match="pick one of 'train', 'test'"):
        as_sequence({"train": table, "test": table})


def test_columns_bring_their_names_and_keep_their_numbers(table, tiny_weights):
    def fitted(*given):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return PromptClassifier(str(tiny_weights), method="zero-shot").fit(*given)

    by_number, by_name = fitted(table["image"], table["label"]), fitted(table.with_format("torch"))
    assert by_number.classes_.tolist() == [0, 1, 2]
    assert by_name.classes_.tolist() == NAMES
    assert by_number.class_names_ == by_name.class_names_ == tuple(NAMES)
    truth = (by_name.predict(PICTURES) == WORDS).mean()
    for one in (by_number, by_name):
        assert one.score(table) == one.score(table["image"], table["label"]) == truth
    streamed = fitted(table.to_iterable_dataset())
    assert np.array_equal(streamed.predict_proba(PICTURES), by_name.predict_proba(PICTURES))


def test_arrays_in_a_column_are_images():
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Array3D((6, 8, 3), "uint8"), "label": datasets.ClassLabel(3)}
    rows = {"image": EXPECTED, "label": CODES}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    assert seen(data) == seen(data.with_format("torch")) == EXPECTED


class Pairs(Dataset):
    """As torchvision's datasets are, with whatever attributes those have."""

    def __init__(self, labels=CODES, **has):
        self.labels_ = labels
        vars(self).update(has)

    def __len__(self):
        return len(self.labels_)

    def __getitem__(self, place):
        return PICTURES[place], self.labels_[place]


class Stream(IterableDataset):
    classes = NAMES

    def __iter__(self):
        return zip(PICTURES, CODES, strict=True)


class CountedStream(Stream):
    def __len__(self):
        return 6


TORCH = {
    "classes": Pairs(classes=NAMES),
    "class_to_idx": Pairs(class_to_idx={name: code for code, name in enumerate(NAMES)}),
    "categories": Pairs(categories=NAMES),
    "synonyms": Pairs(classes=[(name, f"{name} by another name") for name in NAMES]),
    "tensors": Pairs([*torch.tensor(CODES)], classes=NAMES),
    "targets": Pairs([None] * 6, classes=NAMES, targets=torch.tensor(CODES)),
    "stream": Stream(),
    "counted stream": CountedStream(),
    "end to end": ConcatDataset([Subset(Pairs(classes=NAMES), [0, 1]),
                                 Subset(Pairs(classes=NAMES), [2, 3, 4, 5])]),
    "lists": [[picture, word] for picture, word in zip(PICTURES, WORDS, strict=True)],
}  # fmt: skip


@pytest.mark.parametrize("form", TORCH)
def test_names_and_images_of_any_torch_dataset(form):
    given = as_sequence(TORCH[form])
    assert labels_of(given) == WORDS
    assert seen(given) == EXPECTED


def test_labels_that_a_dataset_changes_are_not_given_the_names_of_others():
    data = Pairs(classes=NAMES, targets=CODES, target_transform=lambda code: code // 2)
    assert labels_of(data) == [code // 2 for code in CODES]


def test_a_loader_of_batches_is_no_dataset():
    with pytest.raises(UserError, match=r"give its dataset \(.dataset\)"):
        as_sequence(DataLoader(Pairs(classes=NAMES)))


def test_tables_of_paths_and_labels(files):
    frame = pd.DataFrame({"path": files, "label": WORDS}, index=range(50, 56))
    arrow = pytest.importorskip("pyarrow")
    for given in (
        frame,
        frame.rename(columns=str.title),
        frame.rename(columns={"path": "file_name", "label": "class"}),
        frame.rename(columns={"path": "File Path", "label": "Label-Name"}).assign(id=7),
        frame.rename(columns={"path": "photo", "label": "species"}),
        frame.astype({"label": "category"}),
        frame.assign(image=[*map(Path.read_bytes, map(Path, files))]).drop(columns="path"),
        {"path": files, "label": WORDS},
        arrow.table({"path": files, "label": WORDS}),
        frame.to_dict("records"),
    ):
        images = as_sequence(given)
        assert labels_of(images) == WORDS
        assert seen(images) == EXPECTED
    for given in (frame["path"], frame[["path"]], frame[["path"]].to_numpy(), arrow.array(files)):
        assert seen(given) == EXPECTED
    with pytest.raises(UserError, match="of unlike lengths"):
        as_sequence({"path": files, "label": WORDS[:-1]})


def test_bytes_and_open_files(files):
    contents = [*map(Path.read_bytes, map(Path, files))]
    used = [io.BytesIO(content) for content in contents]
    assert all(file.read() for file in used)  # another reader was there before
    for form in (contents, [*map(bytearray, contents)], [*map(memoryview, contents)], used):
        assert seen(form) == seen(form) == EXPECTED
    with open(files[0], "rb") as file:
        assert seen([file, file]) == EXPECTED[:1] * 2
    with pytest.raises(UserError, match="closed file"):
        read_picture(file)
    with pytest.raises(UserError, match="open it with mode 'rb'"):
        read_picture(io.StringIO("P1 1 1 1"))


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("kind", FLOATS)
def test_tensors_of_every_width_of_floating_point(kind):
    tensor = torch.linspace(0, 1, 3 * 5 * 6).reshape(3, 5, 6).to(kind)
    expected = (tensor.double() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    found = np.asarray(read_picture(tensor.requires_grad_()))
    assert np.abs(found.astype(int) - expected).max() <= 1  # of ties, that round either way
    assert np.array_equal(found, np.asarray(read_picture(tensor.detach().permute(1, 2, 0))))


def test_tensors_of_truth_values_are_black_and_white():
    mask = torch.eye(5, dtype=torch.bool)
    expected = np.asarray(Image.fromarray(mask.numpy()).convert("RGB"))
    for form in (mask, mask.numpy()):
        assert np.array_equal(np.asarray(read_picture(form)), expected)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 5, 4, dtype=torch.int16),
        torch.zeros(3, 5, 4, dtype=torch.int64),
        torch.zeros(3, 5, 4, dtype=torch.uint16),
        torch.zeros(3, 5, 4, dtype=torch.complex64),
        torch.zeros(3, 5, 4).to_sparse(),
        torch.zeros(3, 5, 4, device="meta"),
        torch.zeros(()),
    ],
    ids=str,
)
def test_tensors_without_a_known_scale_are_refused_in_a_sentence(tensor):
    with pytest.raises(UserError, match="uint8|is no image"):
        read_picture(tensor)


NOTHING = {
    "None": None, "nan": float("nan"), "numpy's": np.float32("nan"), "NA": pd.NA, "NaT": pd.NaT,
    "no time": np.datetime64("NaT"), "empty": "", "blank": " \t", "text of nan": "nan",
    "tensor": torch.tensor(torch.nan), "masked": np.ma.masked,
}  # fmt: skip


@pytest.mark.parametrize("kind", NOTHING)
def test_a_missing_label_is_named_by_its_row(kind):
    with pytest.raises(ValueError, match="row 4 .* has no label; give it one") as told:
        as_labels([*WORDS[:4], NOTHING[kind], "cat"])
    assert isinstance(told.value, UserError)


NUMBERS = [0.0, 1.0, float("nan"), 1.0]


@pytest.mark.parametrize(
    "labels",
    [
        pd.Series(["cat", "dog", None, "dog"], index=[9, 8, 7, 6]),
        pd.Series(["cat", "dog", None, "dog"], dtype="string"),
        pd.Series(["cat", "dog", None, "dog"], dtype="category"),
        pd.Series([0, 1, None, 1], dtype="Int64"),
        pd.DataFrame({"label": ["cat", "dog", None, "dog"]}),
        np.array(["cat", "dog", None, "dog"], object),
        np.array(["cat", "dog", float("nan"), "dog"]),
        np.array(NUMBERS),
        np.ma.array([0, 1, 1, 1], mask=[0, 0, 1, 0]),
        torch.tensor(NUMBERS),
        torch.tensor(NUMBERS).bfloat16(),
    ],
    ids=lambda labels: f"{type(labels).__name__} {getattr(labels, 'dtype', '')}",
)
def test_a_missing_label_in_a_column_is_named_by_its_row(labels):
    with pytest.raises(UserError, match=r"row 2 \(counted from 0\) has no label"):
        as_labels(labels)


def test_missing_labels_of_datasets_are_rows_of_what_was_given():
    gap = Pairs([0, 1, None, 1, 0, 2], classes=NAMES)
    for given, row in (
        (gap, 2),
        (Subset(gap, [0, 1, 4, 2]), 3),
        (ConcatDataset([Pairs(classes=NAMES), gap]), 8),
        (Pairs([0, 1, 2, -1, 0, 3], classes=NAMES), 3),
        ([(PICTURES[0], "cat"), (PICTURES[1], None)], 1),
        (pd.DataFrame({"path": ["a"] * 3, "label": ["cat", "dog", None]}), 2),
    ):
        with pytest.raises(UserError, match=rf"row {row} \(counted from 0\)"):
            labels_of(as_sequence(given))


def test_several_missing_are_counted():
    with pytest.raises(UserError, match=r"row 0 .* has no label \(nor have 2 more\)"):
        as_labels([None, "cat", None, "dog", ""])


def test_a_missing_image_is_named_by_its_row(files):
    frame = pd.DataFrame({"path": [*files[:2], None], "label": WORDS[:3]})
    for given in (
        frame,
        frame["path"],
        [*PICTURES[:2], None],
        [{"image": files[0]}] * 2 + [{"image": None}],
    ):
        with pytest.raises(UserError, match="row 2 .* has no image"):
            as_sequence(given)


def test_labels_keep_their_kind():
    for given, kind in (([3, 1], "i"), (torch.tensor([3, 1], dtype=torch.uint8), "i"),
                        ([torch.tensor(3), np.int8(1)], "i"), ([True, False], "b"),
                        (np.array([3, 1], object), "i"), (np.array([3, 1], np.uint8), "u"),
                        (["a", "b"], "U"), ([b"a", b"b"], "U"), (np.array([b"a"]), "U"),
                        (iter("ab"), "U"), ({1: "a"}.values(), "U")):  # fmt: skip
        assert as_labels(given).dtype.kind == kind


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (["cat", 1, "dog", "cat", "dog", "cat"], "label of row 1 .* make them of one kind"),
        ([object()] * 6, "do not name classes"),
        ([{"a": 1}] * 6, "do not name classes"),
        ([0.5, 1.5, 2.5] * 2, "do not name classes .*continuous"),
        ([0, 1, float("inf")] * 2, "do not name classes .*infinity"),
        ("catdog", "labels are to be a list, one for each image, not str"),
        (5, "labels are to be a list"),
    ],
)
def test_labels_that_are_none(tiny_weights, labels, sentence):
    with pytest.raises(UserError, match=sentence):
        PromptClassifier(str(tiny_weights), method="zero-shot").fit(PICTURES, labels)


def test_a_name_that_is_missing_among_class_names(tiny_weights):
    made = PromptClassifier(
        str(tiny_weights), method="zero-shot", class_names={0: "bird", 1: "cat", 2: None}
    )
    with pytest.raises(UserError, match="no name for label 2"):
        made.fit(PICTURES, CODES)
    made.set_params(class_names=None).fit(PICTURES, WORDS)
    with pytest.raises(UserError, match=r"row 5 .* has no label"):
        made.score(PICTURES, [*WORDS[:-1], None])
