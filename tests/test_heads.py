"""Heads that are fitted on cached features: of any row, through the whole way of a run."""

from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from test_towers import siglip

from dapt.clip.sources import load_backbone
from dapt.data import open_task
from dapt.engine.data import open_data
from dapt.engine.evaluate import evaluate_task
from dapt.engine.features import Shared
from dapt.engine.fit import fit
from dapt.errors import UserError
from dapt.methods import METHODS, Evidence
from dapt.methods.contract import Examples
from dapt.run.load import classifier_of
from dapt.run.train import train
from dapt.settings import make_settings
from dapt.share.export import export

HEADS = [name for name, row in METHODS.items() if row.head.fitted and not row.parts]
each = pytest.mark.parametrize("method", HEADS)


@lru_cache
def shared():
    return Shared(load_backbone("bundled", device="cpu"))


def settings_of(method, **given):
    """Few views and epochs: what is looked at here does not need more."""
    views = {f"{name}_views": 2 for name in ("tip", "gda", "clap", "prolip")}
    known = {name: n for name, n in views.items() if name in METHODS[method].settings}
    return make_settings({"dataset": "bundled", "method": method, "device": "cpu",
                          **known, **given})  # fmt: skip


@each
@pytest.mark.parametrize("shots", [1, 4])
def test_a_head_is_fitted_and_is_the_same_when_loaded(method, shots):
    settings = settings_of(method, shots=shots)
    data = open_data(settings)
    tuned = fit(data, settings, shared=shared())
    found = evaluate_task(tuned.classifier, data.task, settings, shared=shared())
    assert found["accuracy"] > 5 / len(data.task.class_names)
    tensors = load(save({n: t.contiguous() for n, t in tuned.classifier.tensors().items()}))
    again = classifier_of(settings, tensors, shared().backbone, data.task, "here")
    views = shared().store(data.task, data.task.test[:5], settings).test_views(range(5))
    with torch.inference_mode():
        logits = tuned.classifier(views)
        assert logits.isfinite().all()
        assert torch.equal(logits, again(views))
    for name, tensor in tensors.items():
        rest = {n: t for n, t in tensors.items() if n != name}
        for odd in (rest, {**rest, name: tensor[None]}, {**tensors, "other": tensor}):
            with pytest.raises(UserError, match="here does not hold what"):
                classifier_of(settings, odd, shared().backbone, data.task, "here")


def head_of(method, scale=50.0):
    """Not fitted yet, for features of 16 numbers."""
    like = SimpleNamespace(logit_scale=scale, projection=torch.eye(16), require_text=lambda: None)
    return METHODS[method].head.create(like)


def evidence_of(labels, classes, dimension=16, val=False):
    generator = torch.Generator().manual_seed(0)
    centres, noise = (
        F.normalize(torch.randn(n, dimension, generator=generator), dim=-1)
        for n in (classes, 3 * len(labels))
    )
    labels = torch.tensor(labels)
    views = 5 * (centres[labels] + 0.3 * noise.unflatten(0, (3, -1)))
    support = Examples(F.normalize(views[0], dim=-1), labels)
    held_out = Examples(F.normalize(views[1], dim=-1), labels)
    text = F.normalize(centres + 0.2, dim=-1)
    evidence = Evidence(support, held_out if val else None, text, 50.0, lambda n: views[:n])
    return evidence, held_out


@each
@pytest.mark.parametrize("val", [True, False])
@pytest.mark.parametrize(("labels", "classes"), [([0, 1], 2), ([0, 1, 1, 0, 3, 3], 4)])
def test_few_images_and_classes_without_any_are_fitted(method, val, labels, classes):
    evidence, held_out = evidence_of(labels, classes, val=val)
    head = head_of(method)
    head.fit(evidence, settings_of(method))
    logits = head(held_out.features, evidence.text)
    assert logits.shape == (len(labels), classes)
    assert logits.isfinite().all()
    assert not logits.requires_grad
    assert logits.argmax(-1).eq(held_out.labels).float().mean() > 0.8


@pytest.mark.parametrize("method", ["tip-adapter", "tip-adapter-f", "gda", "lp++"])
def test_held_out_images_decide_where_there_are_any(method):
    """Even of images and texts that lie anywhere, more are right."""
    generator, right = torch.Generator().manual_seed(2), []
    anywhere = F.normalize(torch.randn(504, 16, generator=generator), dim=-1)
    val = Examples(anywhere[4:], torch.randint(4, (500,), generator=generator))
    evidence, _ = evidence_of([0, 1, 2, 3] * 4, 4)
    for held_out in (None, val):
        given = replace(evidence, val=held_out, text=anywhere[:4], scale=2.0)
        head = head_of(method, given.scale)
        head.fit(given, settings_of(method))
        right.append(head(val.features, given.text).argmax(-1).eq(val.labels).sum())
    assert right[1] > right[0]


@each
def test_a_head_is_the_same_for_the_same_seed(method):
    evidence, _ = evidence_of([0, 1, 2, 2, 1, 0], 3)
    states = []
    for seed in (1, 1):
        head = head_of(method)
        head.fit(evidence, settings_of(method, seed=seed))
        states.append(head.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])


@each
def test_a_head_is_exported(method, photo_folder, tiny_weights, tmp_path):
    given = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "shots": 2}
    run = train(settings_of(method, **given), tmp_path / "run")
    exported = export(run, tmp_path / "head.onnx", "onnx")
    assert exported.difference < 1e-5
    assert exported.agreement == 1


def test_class_weights_start_at_the_length_of_the_text():
    evidence, _ = evidence_of([0, 1], 2)
    head, given = head_of("zs-lp"), replace(evidence, text_lengths=torch.tensor([[3.0], [7.0]]))
    head.fit(given, settings_of("zs-lp", clap_epochs=0))
    assert head.weight.norm(dim=-1).tolist() == pytest.approx([3, 7])
    settings = settings_of("zs-lp", clap_epochs=1, shots=1)
    head = fit(open_data(settings), settings, shared=shared()).classifier.head
    assert head.weight.norm(dim=-1).min() > 5  # one step at 1e-5 from the encoder's own, not unit


def test_a_tuned_projection_tells_other_classes_apart_and_starts_as_the_backbones(photo_folder):
    settings = settings_of("prolip", shots=2, prolip_steps=0)
    data = open_data(settings)
    found, plain = (
        evaluate_task(fit(data, s, shared=shared()).classifier, data.task, s, shared=shared())
        for s in (settings, settings.model_copy(update={"method": "zero-shot"}))
    )
    assert found["accuracy"] == plain["accuracy"]
    tensors = fit(data, settings_of("prolip", shots=2), shared=shared()).classifier.tensors()
    other = open_task(str(photo_folder))
    own = data.task.class_names
    again = classifier_of(settings, tensors, shared().backbone, other, "here", own)
    narrow = {"projection": tensors["projection"][:, 1:]}
    with pytest.raises(UserError, match="here does not hold what fits the backbone's text"):
        classifier_of(settings, narrow, shared().backbone, data.task, "here")
    size = shared().backbone.preprocessing.size
    assert again(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape == (1, 3)


def test_a_tower_without_a_projection_is_told():
    with pytest.raises(UserError, match="has no projection at its end; use a method"):
        METHODS["prolip"].head.create(siglip())
