"""Methods that learn weights inside the towers: their steps, and what is carried or merged."""

import pytest
import torch
from safetensors.torch import save_file
from test_contract import Stopping

from dapt.clip import text
from dapt.clip.inside import Pass
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import new_classifier
from dapt.engine.data import open_data
from dapt.engine.fit import Interrupted, Journal, fit
from dapt.errors import UserError
from dapt.methods import Head, get_method
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.settings import make_settings, with_method

METHODS = ["clip-lora", "clip-svd", "2sfs"]
STEPS = 5  # two and a half epochs


@pytest.fixture
def given(photo_folder, tiny_weights):
    return {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
            "shots": 2, "batch_size": 3, "lr": 0.01, "checkpoint_every": 1}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_to_the_same_bits_in_the_middle_of_its_schedule(given, method):
    settings = make_settings({**given, "method": method, "steps": STEPS})
    data, journal, stopping = open_data(settings), Journal(), Stopping()
    whole = fit(data, settings, journal=journal).classifier.tensors()
    assert [row[1] for row in journal.rows] == [0, 0, 1, 1, 2]
    with pytest.raises(Interrupted):
        fit(data, settings, journal=stopping)
    assert stopping.kept[1] == 2
    resumed = fit(data, settings, journal=stopping).classifier.tensors()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    del stopping.kept[0][next(n for n in stopping.kept[0] if n.startswith("squares."))]
    with pytest.raises(UserError, match="does not hold what its method learns"):
        fit(data, settings, journal=stopping)


@pytest.mark.parametrize("method", METHODS)
def test_an_export_has_what_was_learned(given, method, tmp_path):
    pytest.importorskip("onnxruntime")
    from dapt.run.directory import RunDirectory
    from dapt.share.export import export

    run = train(make_settings({**given, "method": method, "steps": STEPS}), tmp_path / "run")
    zero = make_settings({**given, "method": "zero-shot"})
    plain = load_classifier(train(zero, tmp_path / "zero-shot"))
    views = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        moved = load_classifier(run).image_features(views) - plain.image_features(views)
    assert moved.norm(dim=-1).min() > 1e-3
    found = export(RunDirectory(run.path), tmp_path / "classifier.onnx", "onnx")
    assert found.difference < 1e-5


def test_classes_that_a_second_stage_has_not_seen_are_named_by_their_text(given, tmp_path):
    own = {"method": "2sfs", "steps": STEPS, "classifier_steps": 9, "classifier_lr": 0.1}
    run = train(make_settings({**given, **own}), tmp_path / "run")
    views, first = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), load_classifier(run)
    names = ["zebra", *first.class_names[::-1]]
    other = load_classifier(run, run.read_task().model_copy(update={"class_names": names}))
    with torch.no_grad():
        known, found = first(views), other(views)
        by_text = Head(first.head.scale)(other.image_features(views), other.text_features())
    torch.testing.assert_close(found[:, 1:].flip(-1), known)
    torch.testing.assert_close(found[:, 0], by_text[:, 0])
    assert (found[:, 1:] - by_text[:, 1:]).abs().max() > 0.1
    tensors = {n: t.repeat(2, 1) if n == "weight" else t for n, t in first.tensors().items()}
    save_file(tensors, run.prompts_file)
    with pytest.raises(UserError, match="has weights of more than 3 classes"):
        load_classifier(run)


def test_dropout_is_a_function_of_step_and_place():
    x, generator = torch.ones(4, 50, 8), torch.Generator()
    now = Pass(generator.manual_seed(1), 4)
    first = now.dropout(x, 0.25, "image", 0, "q")
    torch.rand(9, generator=generator)  # whatever else is drawn
    assert torch.equal(first, now.dropout(x, 0.25, "image", 0, "q"))
    assert not torch.equal(first, now.dropout(x, 0.25, "image", 1, "q"))
    assert not torch.equal(first, Pass(torch.Generator().manual_seed(2), 4).dropout(x, 0.25))
    assert first.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (first == 0).float().mean() == pytest.approx(0.25, abs=0.05)
    part = slice(1, 3)  # of several processes each has its own share of the same draw
    assert torch.equal(
        Pass(now.generator, 4, part).dropout(x[part], 0.25, "image", 0, "q"), first[part]
    )
    assert Pass().dropout(x, 0.25) is x


def test_what_is_dropped_stays_so_where_classes_are_computed_anew(tiny_weights, monkeypatch):
    backbone, names = load_backbone(str(tiny_weights)), ["cat", "dog", "hot air balloon"]
    settings = make_settings({"dataset": "bundled", "method": "clip-lora", "text_memory": 1e-6})
    found = []
    for anew in (True, False):
        if not anew:
            monkeypatch.setattr(text, "checkpoint", lambda encode, *args, **how: encode(*args))
        row = (names, "a photo of a {}.", get_method("clip-lora"), settings)
        classifier = new_classifier(backbone, *row)
        assert len(classifier.text_encoders[0].chunks) == 3
        learned = {n: p for n, p in classifier.learned().items() if n.startswith("text")}
        for name, parameter in learned.items():
            if name.endswith("B"):
                parameter.data.fill_(0.1)
        features = classifier.text_features(now=Pass(torch.Generator().manual_seed(5), 4))
        features.cumsum(-1).sum().backward()
        found.append((features.detach(), *(p.grad for p in learned.values())))
        assert not torch.equal(features, classifier.text_features())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_epochs_that_are_given_stand_in_place_of_published_steps(given):
    given["dataset"] = "caltech101"
    usual = make_settings({**given, "method": "clip-lora"})
    assert (usual.steps, usual.optimizer, usual.schedule) == (1000, "adamw", "cosine")
    assert make_settings({**given, "method": "clip-lora", "epochs": 3}).steps is None
    other = with_method(make_settings({**given, "method": "dapt"}), "clip-lora")
    assert (other.steps, other.logit_scale) == (1000, 100.0)


def test_maps_are_given_by_name(given):
    own = {**given, "method": "clip-lora"}
    assert make_settings({**own, "lora_maps": "q,o"}).lora_maps == ("q", "o")
    for wrong in ("", "q,gate"):
        with pytest.raises(UserError, match="setting lora_maps"):
            make_settings({**own, "lora_maps": wrong})
