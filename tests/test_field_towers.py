"""Methods that tune both towers against recorded runs of their published code, number by number."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_field import follow, layers, near, recording
from torch import nn

from dapt.clip.sources import load_backbone
from dapt.engine.classifier import Classifier, tuning_head
from dapt.engine.step import Tuner
from dapt.methods.ivlp import DeepContext, DeepVisual
from dapt.methods.maple import CoupledPrompt
from dapt.methods.mmrl import Representation
from dapt.methods.promptsrc import GaussianAverage, teacher
from dapt.settings import make_settings


@pytest.fixture(scope="module")
def backbone(recorded_clip):
    return load_backbone(str(recorded_clip))


def compare_start(classifier, record):
    """Features and logits before training."""
    images = record["images"][0]
    with torch.no_grad():
        near(classifier.image_features(images), record["first.image_features"], 1e-5)
        near(classifier.text_features(), record["first.text_features"], 1e-5)
        near(classifier(images), record["first.logits"], 1e-5)


def tuner_of(classifier, said, method, **given):
    given |= {name: said[name] for name in ("lr", "weight_decay", "epochs")}
    settings = make_settings({"dataset": "caltech101", "method": method, **given})
    features = classifier.text_features()
    return Tuner(classifier, settings, torch.zeros_like(features))


def follow_towers(tuner, record, said, called):
    """As `follow`, of a record of images; all that it began with is learned."""
    assert {called(name) for name in tuner.named} == {
        name.removeprefix("init.") for name in record if name.startswith("init.")
    }
    yield from follow(tuner, record["images"], record["labels"].long(), record, said, called)


def compare_result(classifier, record, said, called):
    """What is learned, and logits of classes trained on and others."""
    for name, tensor in classifier.learned().items():
        near(tensor.detach(), record[f"final.{called(name)}"], 1e-3)
    new = Classifier(classifier.backbone, said["new_class_names"], classifier.parts)
    with torch.no_grad():
        near(classifier(record["images"][0]), record["final.logits"], 1e-3)
        near(new(record["images"][0]), record["final.logits_new"], 1e-3)


def linear(weight, bias):
    found = nn.Linear(*weight.shape[::-1])
    found.load_state_dict({"weight": weight, "bias": bias})
    return found


def test_maple(backbone):
    record, said = recording("maple")
    maps = [
        linear(record[f"init.proj.{i}.weight"], record[f"init.proj.{i}.bias"])
        for i in range(said["depth"])
    ]
    part = CoupledPrompt(layers(record, "init.text."), maps, backbone.norm_before_layers)
    part.after = "of a"
    classifier = Classifier(backbone, said["class_names"], [part])

    def called(name):
        return name.replace("text_prompt", "text").replace("visual_map", "proj")

    compare_start(classifier, record)
    for found, losses in follow_towers(tuner_of(classifier, said, "maple"), record, said, called):
        assert found[:1] == pytest.approx(losses, rel=1e-3)
    compare_result(classifier, record, said, called)


def test_maple_starts_its_deeper_maps_as_one(backbone):
    settings = make_settings({"dataset": "bundled", "method": "maple"})
    first, *others = CoupledPrompt.create(backbone, settings).visual_map
    assert len(others) == 2  # of three layers
    assert torch.equal(others[0].weight, others[1].weight)
    assert not torch.equal(first.weight, others[0].weight)
    assert 0.9 < first.weight.abs().max() * backbone.text_width**0.5 <= 1


def test_promptsrc(backbone):
    record, said = recording("promptsrc")
    text = DeepContext(layers(record, "init.text."))
    visual = DeepVisual(layers(record, "init.visual."), backbone.norm_before_layers)
    classifier = Classifier(backbone, said["class_names"], [text, visual])
    given = {
        "templates": said["teacher_templates"],
        "average_mean": said["gpa_mean"],
        "average_std": said["gpa_std"],
        "epochs": said["epochs"],
    }
    settings = make_settings({"dataset": "bundled", "method": "promptsrc", **given})
    finish = GaussianAverage(settings, said["epochs"])
    assert finish.weights == pytest.approx(record["gpa_weights"].tolist(), rel=1e-9)
    frozen = Tuner(classifier, settings, torch.zeros(13, 32)).frozen_text(*settings.templates)
    near(frozen.mean(0), record["teacher_text_mean"], 1e-5)
    scale, teacher = backbone.logit_scale, record["teacher_text_features"]
    near(F.normalize(frozen.mean(0), dim=-1), teacher, 1e-5)
    bare = Classifier(backbone, said["class_names"])
    with torch.no_grad():
        images = bare.image_features(record["images"][0])
    near(images, record["teacher_image_features"], 1e-5)
    near(scale * images @ teacher.T, record["first.teacher_logits"], 1e-5)

    def called(name):
        return name.replace("_prompt", "")

    compare_start(classifier, record)
    tuner, each = tuner_of(classifier, said, "promptsrc", **given), said["iterations_per_epoch"]
    for step, (found, losses) in enumerate(follow_towers(tuner, record, said, called)):
        assert found == pytest.approx(losses, rel=1e-3)
        if (step + 1) % each == 0:
            kept = {name: tensor.clone() for name, tensor in finish.state().items()}
            finish = GaussianAverage(settings, said["epochs"])  # as one that goes on
            finish.load_state(kept)
            finish.after_epoch(step // each, tuner.named)
    with torch.no_grad():
        for name, tensor in finish.end(tuner.named).items():
            tuner.named[name].copy_(tensor)
    compare_result(classifier, record, said, called)


def test_promptsrc_reads_the_settings_templates_or_sixty_of_clip():
    asked = []

    def frozen(*templates):
        asked.append(templates)
        return torch.ones(len(templates), 2, 3)

    for own in (None, ["a {}.", "the {}."]):
        step = SimpleNamespace(frozen_text=frozen, settings=SimpleNamespace(templates=own))
        assert torch.allclose(teacher(step), torch.full((2, 3), 3**-0.5))
    first, second = asked
    assert len(set(first)) == 60
    assert "a photo of a {}." in first
    assert all(template.count("{}") == 1 for template in first)
    assert second == ("a {}.", "the {}.")


def representation(record, said):
    blocks = said["blocks"]
    maps = [
        [linear(record[f"init.to_{t}.{b}.weight"], record[f"init.to_{t}.{b}.bias"]) for b in blocks]
        for t in ("visual", "text")
    ]
    how = {"first": blocks[0] - 1, "alpha": said["alpha"]}
    return Representation(record["init.tokens"], *maps, record["init.proj_rep"], **how)


def test_mmrl(backbone):
    record, said = recording("mmrl")
    part, alpha, images = representation(record, said), said["alpha"], record["images"]
    published = make_settings({"dataset": "caltech101", "method": "mmrl"})
    head = tuning_head(backbone, published)
    classifier = Classifier(backbone, said["class_names"], [part], head)
    with torch.no_grad():
        one, other = classifier.image_features(images[0]).chunk(2, -1)
        first, second = classifier.text_features().chunk(2, -1)
        near(classifier(images[0]), record["first.logits_fusion"], 1e-5)
    one, text = one / alpha**0.5, first / alpha**0.5
    near(one, record["first.image_features"], 1e-5)
    near(text, record["first.text_features"], 1e-5)
    near(second / (1 - alpha) ** 0.5, text, 1e-5)
    near(100 * one @ text.T, record["first.logits"], 1e-5)
    near(100 * other @ text.T / (1 - alpha) ** 0.5, record["first.logits_rep"], 1e-5)

    given = {"rep_alpha": alpha, "near_frozen": said["reg_weight"]}
    tuner = tuner_of(classifier, said, "mmrl", **given)
    assert published.weight_decay == said["weight_decay"]

    def called(name):
        kind, *rest = name.removeprefix("rep_").replace("projection", "proj_rep").split(".")
        return ".".join([kind, *(str(said["blocks"][int(i)]) for i in rest[:1]), *rest[1:]])

    for found, (usual, rep, image, text, total) in follow_towers(tuner, record, said, called):
        both = alpha * usual + (1 - alpha) * rep
        assert found == pytest.approx([both, image, text, total], rel=1e-3)
    for name, tensor in classifier.learned().items():
        near(tensor.detach(), record[f"final.{called(name)}"], 1e-3)
    with torch.no_grad():
        near(classifier(images[0]), record["final.logits_fusion"], 1e-3)
        part.for_others()
        for names, kind in (("class_names", ""), ("new_class_names", "_new")):
            alone = Classifier(backbone, said[names], [part], head)
            near(alone(images[0]), record[f"final.logits{kind}"], 1e-3)
