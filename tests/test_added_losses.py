"""DAPT's losses beside those of any method."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_cli import dapt, fails

from dapt.engine.data import open_data
from dapt.engine.fit import Journal, fit
from dapt.engine.search import search_settings
from dapt.errors import UserError
from dapt.methods.losses import INTER
from dapt.progress import Reporter
from dapt.run.directory import RunDirectory
from dapt.settings import idle_settings, loss_weights, make_settings, with_method
from dapt.share.card import model_card


@pytest.fixture
def given(photo_folder, tiny_weights):
    return {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
            "shots": 2, "batch_size": 3, "epochs": 3, "lr": 0.1, "text_vectors": 2,
            "visual_vectors": 2, "text_init": None}  # fmt: skip


class Told(Reporter):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    warn = say


def tune(given, reporter=None, **more):
    settings, journal = make_settings({**given, **more}), Journal()
    found = fit(open_data(settings), settings, journal=journal, reporter=reporter)
    return found.classifier.tensors(), journal


def test_prompts_of_both_towers_with_both_losses_are_dapt(given):
    weights = {"intra": 5.0, "inter": 0.3}
    own, _ = tune(given, method="dapt", beta_visual=5.0, beta_text=0.3)
    added, journal = tune(given, method="vlpt", loss_weights=weights)
    assert own.keys() == added.keys()
    assert all(torch.equal(own[name], added[name]) for name in own)
    assert {"intra", "inter"} <= set(journal.header)
    plain, _ = tune(given, method="vlpt")
    assert not torch.equal(plain["visual_prompt"], added["visual_prompt"])


def test_a_loss_that_a_method_has_is_the_setting_that_weighs_it(given):
    def made(**more):
        return make_settings({**given, "method": "dapt", **more})

    assert made(loss_weights={"inter": 0.3}) == made(beta_text=0.3)
    near = make_settings({**given, "method": "promptsrc", "loss_weights": {"near_text": 3}})
    assert (near.near_text, near.loss_weights) == (3, {})
    with pytest.raises(UserError, match=r"beta_text=0\.2 and a weight of 0\.3 for 'inter'"):
        made(beta_text=0.2, loss_weights={"inter": 0.3})
    with pytest.raises(UserError, match="setting beta_text=-1: input should be greater"):
        made(loss_weights={"inter": -1})


def test_classes_of_each_image_are_dispersed_by_themselves():
    generator = torch.Generator().manual_seed(1)
    text = F.normalize(torch.randn(4, 5, 8, generator=generator), dim=-1)  # (B, C, D)
    settings = make_settings({"dataset": "bundled", "method": "cocoop"})

    def inter(features):
        return INTER.compute(SimpleNamespace(text_features=features, settings=settings))

    torch.testing.assert_close(inter(text), torch.stack([inter(own) for own in text]).mean())
    pairs = [(text[0, a] - text[0, b]).square().sum() for a in range(5) for b in range(a)]
    torch.testing.assert_close(inter(text[0]), torch.stack(pairs).mul(-2).exp().mean())


def test_losses_that_are_nowhere_are_refused(given):
    with pytest.raises(UserError, match="unknown loss term 'gama'; method 'coop' takes inter, in"):
        make_settings({**given, "method": "coop", "loss_weights": {"gama": 1}})
    with pytest.raises(UserError, match="'kernel-ridge' takes no steps"):
        make_settings({**given, "method": "kernel-ridge", "loss_weights": {"inter": 1}})


def test_a_loss_in_a_tower_that_stays_frozen_is_told(given):
    told = Told()
    tune(given, told, method="coop", loss_weights={"inter": 0.1, "intra": 1})
    (line,) = [line for line in told.lines if line.startswith("loss term")]
    assert "'intra' changes nothing: coop learns nothing in the image tower" in line


def test_what_an_added_loss_reads_is_not_idle():
    assert "rbf_t" in idle_settings("maple")
    assert "rbf_t" not in idle_settings("maple", {"inter": 1})
    assert "loss_weights" in idle_settings("gda")


def test_added_losses_go_along_to_methods_that_learn(given):
    settings = make_settings({**given, "method": "vlpt", "loss_weights": {"inter": 0.3}})
    assert with_method(settings, "ivlp").loss_weights == {"inter": 0.3}
    assert with_method(settings, "dapt").beta_text == 0.3
    assert with_method(settings, "auto").loss_weights == {}


def test_the_search_weighs_added_losses_too(given):
    told = Told()
    given |= {"method": "vlpt", "loss_weights": {"inter": 0.2}, "epochs": 1}
    found = search_settings(make_settings(given), told)
    assert any("inter 2:" in line for line in told.lines)
    assert loss_weights(found)["inter"] in (0.2, 2.0)


def test_the_command_adds_losses(photo_folder, tiny_weights, tmp_path):
    options = [photo_folder, "-b", tiny_weights, "--device", "cpu", "-m", "coop", "--shots", 2,
               "--epochs", 1, "--loss", "inter=0.5"]  # fmt: skip
    run = tmp_path / "run"
    result = dapt("train", *options, "-o", run, "--set", "rbf_t=3")
    assert result.exit_code == 0, result.output
    assert "does not use" not in result.output
    assert json.loads((run / "settings.json").read_text())["loss_weights"] == {"inter": 0.5}
    with (run / "log.csv").open() as file:
        row = next(csv.DictReader(file))
    total = float(row["cross_entropy"]) + 0.5 * float(row["inter"])
    assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
    fails("--loss inter: write it as name=weight", "train", *options, "--loss", "inter", "-o", run)
    assert "| rbf_t | 3" in model_card(RunDirectory(run))
