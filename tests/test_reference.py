"""The recorded run of the method is reproduced, number by number."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dapt.clip.image import image_features
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import Classifier
from dapt.engine.step import Tuner, learning_rate
from dapt.methods.losses import class_prototypes
from dapt.methods.prompts import Context, VisualPrompt
from dapt.settings import make_settings


@pytest.fixture
def prepared(recorded):
    folder, weights_file = recorded
    record = load_file(folder / "record.safetensors")
    settings = json.loads((folder / "record.json").read_text())
    backbone = load_backbone(str(weights_file))
    parts = [Context(record["txt_ctx"]), VisualPrompt(record["vis_ctx"][0])]
    classifier = Classifier(backbone, settings["class_names"], parts)
    prototypes = record["prototypes"]
    if "support_images" in record:
        support = image_features(backbone, record["support_images"])
        classes = len(settings["class_names"])
        prototypes = class_prototypes(support, record["support_labels"], classes)
    names = ("beta_visual", "beta_text", "momentum", "weight_decay", "rbf_t")
    given = {"dataset": "bundled", **{name: settings[name] for name in names}}
    tuner = Tuner(classifier, make_settings(given), prototypes)
    return record, settings, classifier, tuner


def test_tokens_are_those_of_the_record(prepared):
    record, settings, classifier, _ = prepared
    tokens = classifier.text_encoders[0].tokens
    for row, own in zip(record["tokenized_prompts"].tolist(), tokens.own, strict=True):
        start = len(tokens.shared) + settings["n_text"]
        assert row[start : start + len(own)] == list(own)
        assert row[: len(tokens.shared)] == list(tokens.shared)
        assert not any(row[start + len(own) :])


def test_recorded_run_is_reproduced(prepared):
    record, settings, classifier, tuner = prepared
    with torch.no_grad():
        text, image = classifier.text_features(), classifier.image_features(record["images"][0])
        logits = classifier.logits(image, text)
    torch.testing.assert_close(text, record["first_text_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(image, record["first_image_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, record["first_logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tuner.prototypes, record["prototypes"], atol=1e-5, rtol=0)

    total, _, _ = tuner.losses(record["images"][0], record["labels"][0])
    total.backward()
    for name, recorded_gradient in (
        ("text_prompt", record["first_grad_txt"]),
        ("visual_prompt", record["first_grad_vis"][0]),
    ):
        gradient = tuner.named[name].grad
        assert (gradient - recorded_gradient).norm() < 1e-4 * recorded_gradient.norm()

    per_epoch = settings["iterations_per_epoch"]
    losses = []
    for step, (views, labels) in enumerate(zip(record["images"], record["labels"], strict=True)):
        lr = learning_rate(step // per_epoch, settings["epochs"], settings["lr"])
        assert lr == record["lrs"][step].item()
        result = tuner.step(views, labels, lr)
        terms = result.terms
        losses.append([result.cross_entropy, terms["intra"], terms["inter"], result.total])
    torch.testing.assert_close(
        torch.tensor(losses, dtype=torch.float64), record["losses"], atol=1e-3, rtol=0
    )
    if "final_logits" not in record:
        return
    torch.testing.assert_close(
        tuner.named["text_prompt"], record["final_txt_ctx"], atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        tuner.named["visual_prompt"], record["final_vis_ctx"][0], atol=1e-3, rtol=0
    )
    with torch.no_grad():
        logits = classifier(record["images"][0])
    torch.testing.assert_close(logits, record["final_logits"], atol=1e-3, rtol=0)
