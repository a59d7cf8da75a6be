"""Classes that are added to a classifier whose head is fitted again for them."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from dapt import PromptClassifier
from dapt.errors import UserError
from dapt.run.train import train
from dapt.settings import make_settings

METHOD = "ss-text"  # sums: the order of images decides nothing


@pytest.fixture(scope="module")
def images(photo_folder):
    """Paths and class names: of blue and green things, of red ones, and of others to look at."""
    paths = sorted((photo_folder / "train").rglob("*.png"))
    red = [path for path in paths if path.parent.name == "red_thing"]
    known = [path for path in paths if path not in red]
    others = sorted((photo_folder / "test").rglob("*.png"))
    return known, [path.parent.name for path in known], red, others


@pytest.fixture
def made(images, tiny_weights):
    known, labels, _, _ = images
    return PromptClassifier(str(tiny_weights), method=METHOD, shots=None).fit(known, labels)


@pytest.fixture(scope="module")
def expected(images, tiny_weights):
    known, labels, red, others = images
    whole = PromptClassifier(str(tiny_weights), method=METHOD, shots=None)
    return whole.fit([*known, *red], [*labels, *["red_thing"] * len(red)]).predict_proba(others)


def test_with_images_they_are_those_of_one_fit(made, images, expected):
    _, _, red, others = images
    made.add_classes(["red_thing"], red, ["red_thing"] * len(red))
    assert np.allclose(made.predict_proba(others), expected, atol=1e-5)
    assert len(json.loads(made.files_["support_set.json"])["train"]) == 18


def test_a_run_reads_its_images_again_from_where_they_are(made, images, expected, tmp_path):
    _, _, red, others = images
    for again in (PromptClassifier.load(made.save(tmp_path / "run")),
                  pickle.loads(pickle.dumps(made))):  # fmt: skip
        again.add_classes(["red_thing"], red, ["red_thing"] * len(red))
        assert np.allclose(again.predict_proba(others), expected, atol=1e-5)
    saved = PromptClassifier.load(again.save(tmp_path / "more"))
    assert np.array_equal(saved.predict_proba(others), again.predict_proba(others))


def test_a_run_of_a_dataset_takes_classes_too(photo_folder, tiny_weights, images, tmp_path):
    given = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "method": "auto"}
    run = train(make_settings({**given, "shots": 3}), tmp_path / "run")
    made = PromptClassifier.load(run.path).add_classes(["red panda"])  # by its name alone
    assert made.classes_.tolist() == ["blue", "green thing", "red panda", "red_thing"]
    assert made.predict_proba(images[3]).shape == (12, 4)
    told = json.loads(made.files_["metrics.json"])  # anew, of all classes
    assert "test" not in told
    assert told["support_images"] == 9


def test_images_in_memory_are_known_until_the_process_ends(images, tiny_weights):
    known, labels, red, _ = images
    pictures = [np.asarray(Image.open(path)) for path in (*known, *red)]
    made = PromptClassifier(str(tiny_weights), method=METHOD).fit(pictures[: len(known)], labels)
    elsewhere = pickle.loads(pickle.dumps(made))
    made.add_classes({"red": "red thing"}, pictures[len(known) :], ["red"] * len(red))
    assert made.classes_.tolist() == ["blue", "green thing", "red"]
    with pytest.raises(UserError, match="the images it was fitted on are not here any more"):
        elsewhere.add_classes(["red"])


def test_a_run_fitted_on_a_table_of_paths_takes_classes_too(images, tiny_weights, tmp_path):
    known, labels, _, _ = images
    table = [{"path": path, "label": label} for path, label in zip(known, labels, strict=True)]
    made = PromptClassifier(str(tiny_weights), method=METHOD).fit(table)
    again = PromptClassifier.load(made.save(tmp_path / "run")).add_classes(["red"])
    assert again.classes_.tolist() == ["blue", "green thing", "red"]


def test_images_of_other_classes_are_refused(made, images):
    before = made.files_
    for labels in (["blue"], ["red", "red"], ["fox"]):
        with pytest.raises(ValueError, match="a label for each image, one of the added classes"):
            made.add_classes(["red"], images[2][:1], labels)
    assert made.files_ is before
