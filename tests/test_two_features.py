"""A method whose image tower makes two features (MMRL), with all that follows a method."""

import pytest
import torch
import torch.nn.functional as F

from dapt.engine.data import open_data
from dapt.engine.evaluate import dispersion
from dapt.engine.fit import fit
from dapt.errors import UserError
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.settings import make_settings
from dapt.share.export import export


@pytest.fixture(scope="module")
def given(photo_folder, tiny_weights):
    return {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
            "method": "mmrl", "shots": 4, "batch_size": 6, "epochs": 2, "rep_width": 8,
            "rep_from": 1, "lr": 0.1}  # fmt: skip


@pytest.fixture(scope="module")
def run(given, tmp_path_factory):
    return train(make_settings(given), tmp_path_factory.mktemp("two") / "run")


def test_features_are_of_length_one_and_their_product_is_blended(run):
    classifier = load_classifier(RunDirectory(run.path))
    views = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        images, text = classifier.image_features(views), classifier.text_features()
        other = classifier.image_features(views, normalized=False)
    assert torch.allclose(images.norm(dim=-1), torch.ones(3))
    assert torch.allclose(text.norm(dim=-1), torch.ones(3))
    assert torch.equal(F.normalize(other, dim=-1), images)
    shares = images[:, : images.shape[1] // 2].square().sum(-1)
    assert torch.allclose(shares, torch.full((3,), 0.7))


def test_other_classes_are_told_by_the_usual_feature_alone(run):
    task = run.read_task()
    views = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    own = load_classifier(run)
    others = load_classifier(run, task.model_copy(update={"class_names": ["fox", "owl"]}))
    with torch.inference_mode():
        usual = F.normalize(own.image_features(views).chunk(2, -1)[0], dim=-1)
        found, second = others.image_features(views).chunk(2, -1)
    assert torch.allclose(found, usual, atol=1e-6)
    assert not second.any()


@pytest.mark.parametrize("head", ["kernel-ridge", "tip-adapter", "auto"])
def test_any_head_follows(given, head):
    settings = make_settings({**given, "method": f"mmrl+{head}", "epochs": 1})
    found = fit(open_data(settings), settings).classifier
    assert found(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 3)


def test_a_head_before_the_projection_is_refused(given):
    settings = make_settings({**given, "method": "mmrl+prolip"})
    with pytest.raises(UserError, match="puts a head before the image tower's projection"):
        fit(open_data(settings), settings)


def test_intra_dispersion_compares_with_both_features_of_prototypes(given):
    settings = make_settings({**given, "epochs": 1, "loss_weights": {"intra": 1.0}})
    tuned = fit(open_data(settings), settings)
    prototypes = tuned.support.prototypes
    distance = (tuned.support.features - prototypes[tuned.support.labels]).norm(dim=-1).mean()
    assert dispersion(tuned)["intra"]["before"] == pytest.approx(float(distance), rel=1e-5)


def by_hand(classifier):
    """Class features by the tower's own modules, whole sequences, and a mask of their length."""
    (part,), backbone = classifier.parts, classifier.backbone
    text, found, names = backbone.text, [], [n.replace("_", " ") for n in classifier.class_names]
    for ids in backbone.tokenize([f"a photo of a {name}." for name in names]):
        x = text.token_embedding(torch.tensor(ids)) + text.positional_embedding[: len(ids)]
        for number, block in enumerate(text.transformer.resblocks):
            if number >= part.first:
                own = part.rep_to_text[number - part.first](part.rep_tokens)
                rest = x[1 + len(own) :] if number > part.first else x[1:]
                x = torch.cat([x[:1], own, rest])
            mask = torch.full((len(x), len(x)), float("-inf")).triu(1)
            x = block(x[None], attn_mask=mask)[0]
        found.append(text.ln_final(x[-1]) @ text.text_projection)
    return F.normalize(torch.stack(found), dim=-1)


@pytest.mark.parametrize("first", [1, 2])
def test_tokens_of_texts_are_those_put_in_by_hand(given, first):
    settings = make_settings({**given, "rep_from": first, "template": "a photo of a {}."})
    classifier = fit(open_data(settings), settings).classifier
    with torch.no_grad():
        found = classifier.text_features().chunk(2, -1)[0] / 0.7**0.5
        torch.testing.assert_close(found, by_hand(classifier), rtol=0, atol=2e-6)


def test_it_is_exported_as_it_is(run, tmp_path):
    pytest.importorskip("onnxruntime")
    assert export(run, tmp_path / "two.onnx", "onnx").difference < 1e-5


def test_a_tower_of_other_layers_is_refused(given, monkeypatch):
    monkeypatch.setattr("dapt.clip.image.unrolls", lambda visual: False)
    settings = make_settings(given)
    with pytest.raises(UserError, match="MMRL puts tokens between layers as CLIP's"):
        fit(open_data(settings), settings)
