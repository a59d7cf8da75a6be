"""Class features averaged over several templates."""

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from dapt.cli import app
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import Classifier
from dapt.errors import UserError
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.settings import make_settings
from dapt.share.card import model_card

NAMES, SENTENCES = ("cat", "red fox"), ["a photo of a {}.", "a {} that sleeps.", "{}."]


@pytest.fixture(scope="module")
def backbone(tiny_weights):
    return load_backbone(str(tiny_weights), device="cpu")


def test_features_of_length_one_are_averaged(backbone):
    alone = [Classifier(backbone, NAMES, template=t) for t in SENTENCES]
    own = Classifier(backbone, NAMES, templates=SENTENCES)
    wanted = F.normalize(sum(one.text_features() for one in alone), dim=-1)
    assert torch.allclose(own.text_features(), wanted, atol=1e-6)
    lengths = torch.stack([one.text_lengths() for one in alone]).mean(0)
    assert torch.allclose(own.text_lengths(), lengths)


def test_one_template_in_a_list_is_that_template_to_the_bit(backbone):
    one = Classifier(backbone, NAMES, templates=SENTENCES[1:2])
    same = Classifier(backbone, NAMES, template=SENTENCES[1])
    assert torch.equal(one.text_features(), same.text_features())


def test_a_run_keeps_its_templates(photo_folder, tiny_weights, tmp_path):
    file, run = tmp_path / "sentences.txt", tmp_path / "run"
    file.write_text("a photo of a {}.\n\n a {} that sleeps. \n")
    command = ["train", str(photo_folder), "-m", "zero-shot", "-b", str(tiny_weights)]
    made = CliRunner().invoke(app, [*command, "-o", str(run), "--set", f"templates={file}"])
    assert made.exit_code == 0, made.output
    file.unlink()
    assert RunDirectory(run).read_settings().templates == SENTENCES[:2]
    assert len(load_classifier(RunDirectory(run)).text_encoders) == 2
    assert "averaged over: a photo of a {}., a {} that sleeps." in model_card(RunDirectory(run))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"templates": ["a {}.", "a photo"]}, "'a photo' must hold {} once"),
        ({"templates": []}, "templates=\\[\\]"),
        ({"templates": "no/such.txt"}, "templates file no/such.txt cannot be read"),
        ({"templates": ["a {}."], "template": "{}"}, "give one of them"),
    ],
)
def test_templates_that_are_none_are_refused(given, sentence):
    with pytest.raises(UserError, match=sentence):
        make_settings({"dataset": "bundled", **given})
