"""Methods of the field against recorded runs of their published code, number by number."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import REPOSITORY
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import Classifier, new_classifier, tuning_head
from dapt.engine.step import Tuner
from dapt.methods import get_method
from dapt.methods.clap import Clap, ZeroShotProbe
from dapt.methods.contract import Evidence, Examples
from dapt.methods.fitting import cosine, learning_rate, scheduled
from dapt.methods.gda import Gda, precision
from dapt.methods.ivlp import DeepContext, DeepVisual
from dapt.methods.lp_plus import LPPlus
from dapt.methods.prolip import ProLIP
from dapt.methods.ss_text import SSText, SSTextPlus
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


def follow(tuner, views, labels, record, said, called):
    """Take a recorded run's steps, and compare gradients and rates; yields losses of each step.

    ``called`` gives the record's name of a learned tensor.
    """
    tuner.losses(views[0], labels[0])[0].backward()
    for name, parameter in tuner.named.items():
        near(parameter.grad, record[f"grad1.{called(name)}"], 1e-4)
    for step, (lr, losses) in enumerate(zip(record["lrs"], record["losses"], strict=True)):
        rate = learning_rate(step // said["iterations_per_epoch"], said["epochs"], said["lr"])
        assert rate == pytest.approx(lr.item(), rel=1e-12)
        batch = step % len(views)
        result = tuner.step(views[batch], labels[batch], rate)
        yield [result.cross_entropy, *result.terms.values(), result.total], losses.tolist()


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
    tokens = classifier.text_encoders[0].tokens
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

    def called(name):
        return name.replace("_prompt.", ".")

    for (cross_entropy, *_), loss in follow(tuner, images, labels, record, said, called):
        assert [cross_entropy] == pytest.approx(loss, rel=1e-3)
    for name, parameter in tuner.named.items():
        near(parameter.detach(), record[f"final.{called(name)}"], 1e-3)
    new = Classifier(backbone, said["new_class_names"], [text, visual])
    with torch.no_grad():
        near(classifier(images[0]), record["final.logits"], 1e-3)
        near(new(images[0]), record["final.logits_new"], 1e-3)


def tuner_of(backbone, said, method, **given):
    """What tunes a classifier of a method's row, at a record's settings."""
    given |= {"dataset": "caltech101", "method": method, "lr": said["lr"],
              "weight_decay": said["weight_decay"]}  # fmt: skip
    settings = make_settings(given)
    row = (said["class_names"], said["prompt_template"], get_method(method), settings)
    classifier = new_classifier(backbone, *row)
    return Tuner(classifier, settings, torch.zeros(len(said["class_names"]), 32))


def start_as(tuner, record):
    """Take a record's initial values, through the door that files come by; their names there."""
    at = {"text_norms": "transformer.resblocks", "visual_norms": "visual.transformer.resblocks"}
    names = {
        name: ".".join([at.get(first, first.partition("_")[0]), *rest])
        for name in tuner.named
        for first, *rest in [name.split(".")]
    }
    tensors = {name: record[f"init.{own}"] for name, own in names.items()}
    for part in tuner.classifier.parts:
        part.load(tensors, tuner.classifier.backbone, "the record")
    return names


def take_the_steps(tuner, record, names, known=lambda gradient, _own: gradient):
    """Take a record's steps, which have its rates, losses and first gradients.

    Of a gradient is compared what is ``known``, given the record's name of what is learned.
    """
    images, labels, settings = record["images"], record["labels"], tuner.settings
    for step in range(settings.steps):
        lr, loss = record["lrs"][step], record["losses"][step]
        rate = scheduled(settings.schedule, step, settings.lr, settings.steps, 3)
        assert rate == pytest.approx(lr.item(), rel=1e-9)
        batch = int(record["batch_order"][step]) if "batch_order" in record else step % len(images)
        result = tuner.step(images[batch], labels[batch], rate)
        assert result.total == result.cross_entropy == pytest.approx(loss.item(), rel=1e-3)
        for name, own in names.items():
            if (expected := record.get(f"grad{step + 1}.{own}")) is not None:
                share = 1e-4 * float(expected.abs().max())
                found = known(tuner.named[name].grad, own)
                torch.testing.assert_close(found, known(expected, own), rtol=0, atol=share)
    for name, own in names.items():
        near(tuner.named[name].detach(), record[f"final.{own}"], 1e-3)


def ends_as(tuner, record):
    """Its features and logits are the record's, before and after they are merged."""
    classifier = tuner.classifier
    for _ in range(2):
        with torch.no_grad():
            image = classifier.image_features(record["images"][0])
            near(image, record["final.image_features"], 1e-3)
            near(classifier.text_features(), record["final.text_features"], 1e-3)
            near(classifier(record["images"][0]), record["final.logits"], 1e-3)
        classifier.requires_grad_(False)


def test_clip_lora(backbone):
    record, said = recording("clip_lora")
    own = {"lora_rank": said["rank"], "lora_alpha": said["alpha"], "lora_dropout": said["dropout"]}
    own["steps"] = said["steps"]
    tuner = tuner_of(backbone, said, "clip-lora", lora_maps=said["projections"], **own)
    names = start_as(tuner, record)
    assert len(names) == len(tuner.named) == 2 * 3 * 3 * 2
    with torch.no_grad():
        near(tuner.classifier(record["images"][0]), record["first.logits"], 1e-5)
    take_the_steps(tuner, record, names)
    ends_as(tuner, record)


def test_clip_svd(backbone):
    record, said = recording("clip_svd")
    own = {"svd_maps": said["trained_matrices"], "steps": said["steps"]}
    tuner = tuner_of(backbone, said, "clip-svd", **own)
    drawn = {name: p.detach().clone() for name, p in tuner.named.items()}
    names = start_as(tuner, record)
    assert len(names) == len(tuner.named) == 2 * 3 * 6
    for name, own in names.items():
        near(drawn[name], record[f"init.{own}"], 1e-5)
    with torch.no_grad():
        near(tuner.classifier(record["images"][0]), record["first.logits"], 1e-5)

    def of_groups(gradient, own):
        """Summed over singular values within a thousandth of the largest of each other.

        Their vectors may be turned among each other, and the record's decomposition, in fp32, does.
        A sum, which is the trace of U'GV, stays the same.
        """
        values = record[f"init.{own}"]
        begins = values[:-1] - values[1:] > 1e-3 * values[0]
        groups = F.pad(begins.long().cumsum(0), (1, 0))
        return torch.zeros(int(groups[-1]) + 1).index_add(0, groups, gradient)

    take_the_steps(tuner, record, names, of_groups)
    ends_as(tuner, record)


def test_two_stages(backbone):
    record, said = recording("two_stage")
    tuner = tuner_of(backbone, said, "2sfs", steps=said["stage_1_steps"])
    drawn = {name: p.detach().clone() for name, p in tuner.named.items()}
    names, images = start_as(tuner, record), record["images"]
    assert len(names) == len(tuner.named) == 2 * 3 * 2 * 2
    assert all(torch.equal(drawn[name], record[f"init.{own}"]) for name, own in names.items())
    fitted, tuner.classifier.head = tuner.classifier.head, tuning_head(backbone, tuner.settings)
    with torch.no_grad():
        near(tuner.classifier.text_features(), record["first.text_features"], 1e-5)
        near(tuner.classifier.image_features(images[0]), record["first.image_features"], 1e-5)
        near(tuner.classifier(images[0]), record["first.logits"], 1e-5)
    take_the_steps(tuner, record, names)

    tuner.classifier.parts.requires_grad_(False)
    with torch.no_grad():
        seen = tuner.classifier.image_features(images.flatten(0, 1), normalized=False)
        text = tuner.classifier.text_features()
    near(F.normalize(seen[: said["batch"]], dim=-1), record["final.image_features"], 1e-3)
    near(text, record["init.classifier"], 1e-3)
    first, places = said["stage_1_steps"], torch.arange(len(seen)).split(said["batch"])
    batches = [(0, places[number]) for number in record["batch_order"][first:]]
    rates = cosine(said["lr"], len(batches), 1e-6)
    assert rates == pytest.approx(record["lrs"][first:].tolist(), rel=1e-9)
    found = []
    for loss, _ in fitted.tune(seen[None], record["labels"].flatten(), text, batches, rates):
        if not found:
            near(fitted.weight.grad, record["grad1.classifier"], 1e-4)
        found.append(loss)
    assert found == pytest.approx(record["losses"][first:, 0].tolist(), rel=1e-3)
    near(fitted.weight, record["final.classifier"], 1e-3)
    tuner.classifier.head = fitted
    with torch.no_grad():
        near(tuner.classifier(images[0]), record["final.logits"], 1e-3)


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


def test_gda():
    record, said = recording("gda")
    views = F.normalize(record["support_features"], dim=-1)
    x, labels = views.flatten(0, 1), record["support_labels"].repeat(said["views"])
    near(precision(x - record["class_means"][labels]), record["precision"], 1e-5)
    head = Gda(said["clip_scale"])
    head.estimate(x, labels, said["n_cls"])
    near(head.weight.T, record["W"], 1e-5)
    near(head.bias, record["b"], 1e-5)
    near(head.scores(record["query_features"]), record["query_gda_scores"], 1e-5)
    text = record["text_features"]
    head.choose(Examples(record["val_features"], record["val_labels"]), text)
    assert head.alpha == said["alpha"]
    near(head(record["query_features"], text), record["query_logits"], 1e-5)


@pytest.mark.parametrize(("name", "kind"), [("clap", Clap), ("zs_lp", ZeroShotProbe)])
def test_clap_and_its_probe(name, kind):
    record, said = recording(name)
    features, labels, query = (
        record[n] for n in ("support_features", "support_labels", "query_features")
    )
    features, text, head = (
        F.normalize(features, dim=-1),
        record["text_features"],
        kind(said["logit_scale"]),
    )
    query = F.normalize(query, dim=-1)
    pull = head.pull(features, labels, text)
    near(pull, record.get("multipliers", torch.zeros(said["n_cls"])), 1e-5)
    epochs, steps = said["epochs"], said["iterations_per_epoch"]
    rates = [learning_rate(i // steps, epochs, said["lr"]) for i in range(epochs * steps)]
    assert rates == pytest.approx(record["lrs"].tolist(), rel=1e-12)
    found = []
    for loss, _ in head.tune(features, labels, text, record["batches"], rates):
        if not found:
            near(head.weight.grad, record["grad1.prototypes"], 1e-4)
        found.append(loss)
    assert found == pytest.approx(record["losses"][:, 2].tolist(), rel=1e-3)
    near(head.weight, record["final.prototypes"], 1e-3)
    near(head(query, text), record["final.query_logits"], 1e-3)
    head.weight = text
    near(head(query, text), record["first.query_logits"], 1e-5)


def test_lp_plus():
    record, said = recording("lp_plus")
    images = F.normalize(record["support_features"], dim=-1)
    support = Examples(images, record["support_labels"])
    text, query = record["text_features"], record["query_features"]
    head = LPPlus(1.0)
    head.start(support, text, torch.Generator().manual_seed(1))
    near(head.weight, record["init.weight"], 1e-5)
    near(head.alpha, record["init.alpha"][0], 1e-5)
    assert 0 < head.bias.abs().max() <= said["dim"] ** -0.5
    head.bias = record["init.bias"]  # which is random
    near(head(images, text), record["first.logits"], 1e-5)
    found = []
    for loss, rate in head.tune(support, text, said["epochs"]):
        if not found:
            assert rate == pytest.approx(said["lr_weight"], rel=1e-5)
            near(head.weight.grad, record["grad1.weight"], 1e-4)
            near(head.bias.grad, record["grad1.bias"], 1e-4)
        found.append(loss)
    assert found == pytest.approx(record["losses"][:, 0].tolist(), rel=1e-3)
    near(head.weight.detach(), record["final.weight"], 1e-3)
    near(head.bias.detach(), record["final.bias"], 1e-3)
    near(head.alpha.detach(), record["final.alpha"][0], 1e-3)
    near(head(query, text).detach(), record["final.query_logits"], 1e-3)


@pytest.mark.parametrize(("name", "kind"), [("sstext", SSText), ("sstext_plus", SSTextPlus)])
def test_ss_text(name, kind):
    record, said = recording("ss_text")
    support = Examples(record["support_features"], record["support_labels"])
    text, scale = record["text_features"], math.exp(said["logit_scale_log"])
    head = kind(scale)
    head.fit(Evidence(support, None, text, scale, lambda count: None), None)
    near(head.weight, record[f"{name}.prototypes"], 1e-5)
    near(head(record["query_features"], text), record[f"{name}.query_logits"], 1e-5)


def test_prolip():
    record, said = recording("prolip")
    views, text, query = (record[f"{n}_features"] for n in ("support", "text", "query"))
    labels, head = record["support_labels"], ProLIP(said["clip_scale"])
    head.projection = record["init.proj"].clone()
    near(head(views[1], text), record["first.logits"], 1e-5)
    # Features of length one, as heads get them, are as good.
    near(head(F.normalize(query, dim=-1), text), record["first.query_logits"], 1e-5)
    rates, found = cosine(said["lr"], said["steps"]), []
    assert rates == pytest.approx(record["lrs"].tolist(), rel=1e-9, abs=1e-12)
    for loss, _ in head.tune(views, labels, text, said["lambda_value"], rates):
        if not found:
            near(head.projection.grad, record["grad1.proj"], 1e-4)
        found.append(loss)
    assert found == pytest.approx(record["losses"][:, 2].tolist(), rel=1e-3)
    near(head.projection, record["final.proj"], 1e-3)
    near(head(query, text), record["final.query_logits"], 1e-3)
