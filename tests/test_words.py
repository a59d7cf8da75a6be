"""Words that learned text vectors are nearest to."""

import json

import pytest
import torch
from typer.testing import CliRunner

from dapt.cli import app
from dapt.engine.words import nearest_words
from dapt.errors import UserError
from dapt.report import write_report
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.settings import make_settings


@pytest.fixture(scope="module")
def make(photo_folder, tiny_weights, tmp_path_factory):
    def made(method, **how):
        given = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "shots": 1,
                 "epochs": 1, "lr": 1e-9, "device": "cpu", "method": method}  # fmt: skip
        output = tmp_path_factory.mktemp("words") / "run"
        return train(make_settings(given | how), output)

    return made


@pytest.fixture(scope="module")
def run(make):
    """Hardly tuned, so that its vectors are still the words they started from."""
    return make("coop", text_init="photo of a cat", text_vectors=4)


def test_vectors_that_are_words_are_told_as_those(run):
    classifier = load_classifier(run)
    found = nearest_words(classifier, 3)
    assert [one.nearest[0][0] for one in found] == ["photo", "of", "a", "cat"]
    for one in found:
        distances = [far for _, far in one.nearest]
        assert distances == sorted(distances)
        assert distances[0] < 1e-3 < distances[1]
    # By Euclidean distance, plainly computed.
    table = classifier.backbone.word_embeddings().float()
    prompt = classifier.tensors()["text_prompt"].float()
    by_hand = (table - prompt[2]).norm(dim=-1).sort().values[:3]
    assert torch.allclose(torch.tensor([d for _, d in found[2].nearest]), by_hand, atol=1e-3)


def test_prompts_of_each_class_and_of_layers(make):
    own = nearest_words(load_classifier(make("coop", class_contexts=True, text_vectors=2)))
    classes = ["blue", "green thing", "red thing"]
    assert [(one.class_name, one.vector) for one in own] == [
        (c, v) for c in classes for v in (1, 2)
    ]
    deep = nearest_words(load_classifier(make("ivlp", text_vectors=2, text_depth=2)))
    assert [one.vector for one in deep] == [1, 2]
    with pytest.raises(UserError, match="no text vectors were learned"):
        nearest_words(load_classifier(make("vpt")))


def test_the_command_and_the_report_tell_them(run, make, tmp_path):
    told = CliRunner().invoke(app, ["words", str(run.path), "-n", "2"])
    assert told.exit_code == 0, told.output
    assert "photo 0.00" in told.output
    rows = json.loads(CliRunner().invoke(app, ["words", str(run.path), "--json"]).stdout)
    assert rows[3]["nearest"][0][0] == "cat"
    refused = CliRunner().invoke(app, ["words", str(make("zero-shot").path)])
    assert (refused.exit_code, "no text vectors" in refused.stderr) == (2, True)
    write_report([run.path], tmp_path / "page.html", features=True)
    page = (tmp_path / "page.html").read_text()
    assert "Nearest words of text vectors" in page
    assert "cat (0.00)" in page
