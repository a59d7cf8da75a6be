"""What the documentation says runs: its blocks of Python, in order, and what they promise."""

import ast
import re

import pytest
import torch

from conftest import REPOSITORY
from dapt.data import open_task
from dapt.engine.data import open_data
from dapt.engine.evaluate import evaluate_task
from dapt.engine.features import Shared
from dapt.engine.fit import fit
from dapt.methods import METHODS
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.settings import all_fields, make_settings

PAGE = REPOSITORY / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def blocks():
    """What the page's blocks define, run as one program; the table of methods is put back after."""
    before, names = dict(METHODS), {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
    yield names
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def given(photo_folder, tiny_weights):
    return {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
            "shots": 4, "batch_size": 6, "epochs": 3, "lr": 0.1}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "tensors"),
    [("low-rank", {"down", "up"}), ("stay", {"text_prompt"}), ("centres", {"centres"})],
)
def test_a_method_of_the_page_trains_and_loads(blocks, given, tmp_path, method, tensors):
    run = train(make_settings({**given, "method": method}), tmp_path / "run")
    classifier, views = load_classifier(run), torch.randint(256, (2, 3, 32, 32)).to(torch.uint8)
    assert set(classifier.tensors()) == tensors
    assert run.read_metrics().learned_parameters == classifier.learned_parameters > 0
    with torch.inference_mode():
        assert classifier(views).shape == (2, 3)
    if method == "low-rank":
        assert "rank" in all_fields()
        assert classifier.tensors()["up"].abs().max() > 0


def test_a_loss_term_of_the_page_counts(blocks, given):
    data = open_data(make_settings(given))
    far, near = (
        fit(data, make_settings({**given, "method": "stay", "stay": weight, "epochs": 20}))
        for weight in (0.0, 100.0)
    )
    plain = fit(data, make_settings({**given, "method": "zero-shot"})).classifier.text_features()
    with torch.no_grad():
        cosines = [(t.classifier.text_features() * plain).sum(-1).mean() for t in (far, near)]
    assert cosines[1] > cosines[0]


def test_a_dataset_of_the_page_is_tuned_on(blocks, given, photo_folder):
    task = open_task(str(photo_folder))
    pairs = [(item.path, item.label) for item in task.train]
    data = blocks["open_mine"](photo_folder, pairs, task.class_names, shots=2, seed=1)
    settings = make_settings({**given, "method": "linear-probe"})
    tuned = fit(data, settings)
    assert evaluate_task(tuned.classifier, data.task, settings)["images"] == len(data.task.test)


def test_a_backbone_of_the_page_is_one(blocks, given, tiny_weights):
    from dapt.clip.sources import load_model

    model, tokenizer, seen = load_model(str(tiny_weights), None)
    backbone = blocks["backbone_of_model"](model.eval(), tokenizer, seen.size)
    data = open_data(make_settings(given))
    fit(data, make_settings({**given, "method": "zero-shot"}), shared=Shared(backbone))


def test_the_page_names_rooms_that_are_there():
    rooms = set(re.findall(r"`(\w+/)`", PAGE.read_text())) - {"benchmarks/", "gpu/"}
    assert rooms == {f"{p.name}/" for p in (REPOSITORY / "src" / "dapt").iterdir()
                     if (p / "__init__.py").is_file()}  # fmt: skip


# The rooms of the page, from the ground up; those of one floor do not know each other.
FLOORS = [
    {"errors"}, {"progress"}, {"safe"}, {"data", "clip"}, {"methods"}, {"settings"}, {"engine"},
    {"run"}, {"predict", "notebook", "labels"}, {"share", "grid", "report", "estimator", "compare"},
    {"serve"}, {"cli"},
]  # fmt: skip


def test_imports_go_down():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    source = REPOSITORY / "src" / "dapt"
    up = []
    for file in source.rglob("*.py"):
        own = file.relative_to(source).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            room = module.removeprefix("dapt.").partition(".")[0]
            ours = module.startswith("dapt.") and own not in ("__init__", room)
            if ours and floor[room] >= floor[own]:
                up.append(f"{file.relative_to(source)}: {module}")
    assert not up
