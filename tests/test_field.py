"""Methods of the field against recorded runs of their published code, number by number."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import REPOSITORY
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import Classifier
from dapt.engine.step import Tuner, learning_rate
from dapt.methods.contract import Examples
from dapt.methods.ivlp import DeepContext, DeepVisual
from dapt.methods.tip_adapter import TipAdapter, TipAdapterF
from dapt.settings import make_settings

FOLDER = REPOSITORY / "tests" / "fixtures" / "methods"


def recording(name):
    folder = FOLDER / name
    return load_file(folder / "record.safetensors"), json.loads(
        (folder / "record.json").read_text()
    )


def near(found, expected, tolerance):
    """Within a share of the largest value."""
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


def layers(record, kind):
    return [record[name] for name in sorted(record) if name.startswith(kind)]


@pytest.fixture(scope="module")
def backbone(recorded_clip):
    return load_backbone(str(recorded_clip))


def test_ivlp(backbone):
    record, said = recording("ivlp")
    text = DeepContext(layers(record, "init.text."))
    text.after = "of a"
    visual = DeepVisual(layers(record, "init.visual."), backbone.norm_before_layers)
    classifier = Classifier(backbone, said["class_names"], [text, visual])
    tokens = classifier.text_encoder.tokens
    for row, own in zip(record["tokenized_prompts"].tolist(), tokens.own, strict=True):
        rest = [*tokens.after, *own]
        assert row[3 : 3 + len(rest)] == rest
    images, labels = record["images"], record["labels"]
    with torch.no_grad():
        near(classifier.image_features(images[0]), record["first.image_features"], 1e-5)
        near(classifier.text_features(), record["first.text_features"], 1e-5)
        near(classifier(images[0]), record["first.logits"], 1e-5)
    given = {name: said[name] for name in ("lr", "momentum", "weight_decay", "epochs")}
    settings = make_settings({"dataset": "bundled", "method": "ivlp", **given})
    tuner = Tuner(classifier, settings, torch.zeros(13, 32))
    tuner.losses(images[0], labels[0])[0].backward()
    for name, parameter in tuner.named.items():
        kind, layer = name.split("_prompt.")
        near(parameter.grad, record[f"grad1.{kind}.{layer}"], 1e-4)
    for step, (lr, loss) in enumerate(zip(record["lrs"], record["losses"], strict=True)):
        rate = learning_rate(step // said["iterations_per_epoch"], said["epochs"], said["lr"])
        assert rate == pytest.approx(lr.item(), rel=1e-12)
        batch = step % len(images)
        result = tuner.step(images[batch], labels[batch], rate)
        assert result.cross_entropy == pytest.approx(loss.item(), rel=1e-3)
    for name, parameter in tuner.named.items():
        kind, layer = name.split("_prompt.")
        near(parameter.detach(), record[f"final.{kind}.{layer}"], 1e-3)
    new = Classifier(backbone, said["new_class_names"], [text, visual])
    with torch.no_grad():
        near(classifier(images[0]), record["final.logits"], 1e-3)
        near(new(images[0]), record["final.logits_new"], 1e-3)


def test_tip_adapter():
    record, said = recording("tip_adapter")
    views, labels, text = (
        record[n] for n in ("support_features", "support_labels", "text_features")
    )
    val = Examples(record["val_features"], record["val_labels"])
    query, scales, steps = record["query_features"], said["search_scale"], said["search_step"]
    head = TipAdapter(said["clip_scale"])
    head.remember(views, labels, said["init_alpha"], said["init_beta"])
    near(head.keys, record["cache_keys"], 1e-5)
    near(head(query, text), record["tip.query_logits_initial"], 1e-5)
    head.choose(val, text, scales, steps)
    near(head(query, text), record["tip.query_logits_searched"], 1e-5)
    found = {"alpha": head.alpha.item(), "beta": head.beta.item()}
    assert found == pytest.approx({"alpha": said["tip_best_alpha"], "beta": said["tip_best_beta"]})

    head = TipAdapterF(said["clip_scale"])
    head.remember(views, labels, said["init_alpha"], said["init_beta"])
    walk = head.tune(views, labels, text, said["epochs"], said["lr"], said["batch"], None)
    for number, (loss, rate) in enumerate(walk):
        assert loss == pytest.approx(record["losses"][number].item(), rel=1e-3)
        assert rate == pytest.approx(record["lrs"][number].item(), rel=1e-9, abs=1e-12)
        if number == 0:
            near(head.keys.grad, record["grad1.keys"], 1e-4)
        if number + 1 == 3:
            best = head.keys.detach().clone()
    assert number + 1 == len(record["losses"])
    near(head.keys, record["final.keys"], 1e-3)
    near(head(query, text), record["tip_f.query_logits_last"], 1e-3)
    # The published search looks at the epoch that the queries liked best: here the first.
    near(best, record["best.keys"], 1e-3)
    head.keys = best
    head.choose(val, text, scales, steps)
    near(head(query, text), record["tip_f.query_logits_searched"], 1e-3)
