"""Prompt methods of the field against recorded runs of their published code, number by number."""

import pytest
import torch
from test_field import follow, layers, near, recording

from dapt.clip.inside import EVALUATION
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import Classifier
from dapt.engine.step import Tuner
from dapt.methods.cocoop import NETWORK, ConditionalContext
from dapt.methods.ivlp import DeepVisual
from dapt.methods.prompts import Context
from dapt.settings import make_settings


@pytest.fixture(scope="module")
def backbone(recorded_clip):
    return load_backbone(str(recorded_clip))


class OfFeatures(Classifier):
    """A classifier whose views are image features already, as records of text prompts have them."""

    def image_features(self, views, now=EVALUATION, *, normalized=True):
        return views


def require_tokens(classifier, ids, start):
    """Each class's own tokens are those of the published code, which are ``ids`` from ``start``."""
    tokens = classifier.text_encoders[0].tokens
    for row, own in zip(ids.tolist(), tokens.own, strict=True):
        rest = [*tokens.after, *own]
        assert row[start : start + len(rest)] == rest
        assert not any(row[start + len(rest) :])


def replay(classifier, record, said, method, names, **given):
    """Take the recorded steps: first gradients, rates, losses, what is learned, last logits.

    ``names`` are those of the record by those of the tensors.
    """
    views, labels = record.get("images", record.get("image_features")), record["labels"]
    given |= {name: said[name] for name in ("lr", "momentum", "weight_decay", "epochs")}
    settings = make_settings({"dataset": "bundled", "method": method, **given})
    tuner = Tuner(classifier, settings, torch.zeros(len(said["class_names"]), 32))
    assert tuner.named.keys() == names.keys()
    with torch.no_grad():
        near(classifier(views[0]), record["first.logits"], 1e-5)
    for found, losses in follow(tuner, views, labels, record, said, names.get):
        assert found[: len(losses)] == pytest.approx(losses, rel=1e-3)
    for name, parameter in tuner.named.items():
        near(parameter.detach(), record[f"final.{names[name]}"], 1e-3)
    with torch.no_grad():
        near(classifier(views[0]), record["final.logits"], 1e-3)


@pytest.mark.parametrize("name", ["coop", "coop_front"])
def test_coop(backbone, name):
    record, said = recording(name)
    context = Context(record["init.ctx"], said["class_token_position"])
    classifier = OfFeatures(backbone, said["class_names"], [context])
    require_tokens(classifier, record["tokenized_prompts"], 1 + said["n_ctx"])
    with torch.no_grad():
        near(classifier.text_features(), record["first.text_features"], 1e-5)
    replay(classifier, record, said, "coop", {"text_prompt": "ctx"})


def test_kgcoop(backbone):
    record, said = recording("kgcoop")
    classifier = OfFeatures(
        backbone, said["class_names"], [Context(record["init.ctx"])],
        template=said["teacher_template"],
    )  # fmt: skip
    require_tokens(classifier, record["tokenized_prompts"], 1 + said["n_ctx"])
    text = classifier.text_features().detach()
    near(text, record["first.text_features"], 1e-5)
    replay(classifier, record, said, "kgcoop", {"text_prompt": "ctx"}, kg_weight=said["weight"])
    near(classifier.text_features().detach(), record["final.text_features"], 1e-3)
    new = OfFeatures(backbone, said["new_class_names"], classifier.parts)
    with torch.no_grad():
        near(new(record["image_features"][0]), record["final.logits_new"], 1e-3)


def test_vpt_deep(backbone):
    record, said = recording("vpt")
    prompt = DeepVisual(layers(record, "init.visual."), backbone.norm_before_layers)
    names = {"template": said["prompt_template"]}
    classifier = Classifier(backbone, said["class_names"], [prompt], **names)
    require_tokens(classifier, record["tokenized_prompts"], 5)
    with torch.no_grad():
        near(classifier.text_features(), record["text_features"], 1e-5)
        near(classifier.image_features(record["images"][0]), record["first.image_features"], 1e-5)
    known = {f"visual_prompt.{layer}": f"visual.{layer}" for layer in range(said["depth_visual"])}
    replay(classifier, record, said, "vpt-deep", known)
    new = Classifier(backbone, said["new_class_names"], [prompt], **names)
    with torch.no_grad():
        near(new(record["images"][0]), record["final.logits_new"], 1e-3)


def test_cocoop(backbone):
    record, said = recording("cocoop")
    context = ConditionalContext(record["init.ctx"], 32)
    names = {"text_prompt": "ctx"} | {name: name for name in NETWORK}
    with torch.no_grad():
        for name, parameter in context.named_parameters():
            parameter.copy_(record[f"init.{names[name]}"])
    classifier, images = (
        OfFeatures(backbone, said["class_names"], [context]),
        record["image_features"],
    )
    require_tokens(classifier, record["tokenized_prompts"], 1 + said["n_ctx"])
    with torch.no_grad():
        near(context.meta_net(images[0]), record["first.meta_bias"], 1e-5)
        near(classifier.text_features(images[0]), record["first.text_features"], 1e-5)
    replay(classifier, record, said, "cocoop", names)
    new = OfFeatures(backbone, said["new_class_names"], [context])
    with torch.no_grad():
        near(new(images[0]), record["final.logits_new"], 1e-3)
