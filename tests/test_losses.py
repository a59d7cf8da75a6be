"""Losses and metrics against plain definitions and scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt.engine import evaluate
from dapt.engine.evaluate import calibration_error, mean_text_distance, metrics
from dapt.methods import losses
from dapt.methods.contract import Evidence, Examples
from dapt.methods.losses import class_prototypes, inter_dispersion, intra_dispersion
from dapt.methods.probe import LinearProbe
from dapt.settings import make_settings


@settings(max_examples=30)
@given(classes=st.integers(1, 12), width=st.integers(2, 8), seed=st.integers(0, 99))
def test_inter_dispersion_is_the_mean_over_pairs(classes, width, seed):
    torch.manual_seed(seed)
    w = F.normalize(torch.randn(classes, width, dtype=torch.float64), dim=-1).requires_grad_()
    pairs = [torch.exp(-2 * (w[a] - w[b]).square().sum()) for a in range(classes) for b in range(a)]
    expected = torch.stack(pairs).mean() if pairs else w.sum() * 0
    found = inter_dispersion(w)
    torch.testing.assert_close(found, expected)
    for value in (found, expected):
        assert torch.isfinite(torch.autograd.grad(value, w, retain_graph=True)[0]).all()


def test_inter_dispersion_in_blocks_is_the_same(monkeypatch):
    w = F.normalize(torch.randn(11, 5, dtype=torch.float64), dim=-1).requires_grad_()
    whole = inter_dispersion(w)
    gradient = torch.autograd.grad(whole, w)[0]
    monkeypatch.setattr(losses, "_ROWS", 3)
    torch.testing.assert_close(inter_dispersion(w), whole)
    torch.testing.assert_close(torch.autograd.grad(inter_dispersion(w), w)[0], gradient)


def test_identical_classes_have_the_highest_potential():
    same = F.normalize(torch.ones(3, 4), dim=-1)
    assert inter_dispersion(same).item() == pytest.approx(1)


def test_prototypes_are_plain_means():
    features = torch.randn(7, 3)
    labels = torch.tensor([0, 0, 2, 2, 2, 0, 2])
    found = class_prototypes(features, labels, 4)
    torch.testing.assert_close(found[2], features[labels == 2].mean(0))
    assert not found[1].any()
    spread = intra_dispersion(features, labels, found)
    torch.testing.assert_close(spread, ((features - found[labels]) ** 2).mean())


def test_metrics():
    logits = torch.tensor([[3.0, 0, 0], [0, 3, 0], [3, 0, 0], [0, 3, 0]])
    found = metrics([logits[:3], logits[3:]], [0, 1, 1, 1], ["a", "b", "c"])
    assert found["accuracy"] == 0.75
    assert "top5" not in found
    assert found["per_class"] == [
        {"class": "a", "images": 1, "accuracy": 1.0},
        {"class": "b", "images": 3, "accuracy": pytest.approx(2 / 3)},
        {"class": "c", "images": 0, "accuracy": None},
    ]
    assert found["confusion"] == {"true": [0, 1, 1], "predicted": [0, 0, 1], "images": [1, 1, 2]}
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)
    many = metrics([torch.eye(7).repeat(2, 1)], [*range(7), *[6] * 7], list("abcdefg"))
    assert many["accuracy"] == pytest.approx(8 / 14)
    assert "top5" in many


@settings(max_examples=20)
@given(classes=st.integers(1, 9), images=st.integers(1, 40), seed=st.integers(0, 99))
def test_metrics_are_scikit_learns(classes, images, seed):
    """However the logits come in blocks."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator).tolist()
    found = metrics(logits.split(7), labels, [f"class {i}" for i in range(classes)])
    named, entries = logits.argmax(-1).tolist(), found["confusion"]
    matrix = np.zeros((classes, classes), dtype=int)
    matrix[entries["true"], entries["predicted"]] = entries["images"]
    assert (matrix == sklearn.metrics.confusion_matrix(labels, named, labels=range(classes))).all()
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, named))
    if classes > 5:
        score = sklearn.metrics.top_k_accuracy_score(
            labels, logits.numpy(), k=5, labels=range(classes)
        )
        assert found["top5"] == pytest.approx(score)


def test_metrics_of_more_classes_than_a_matrix_could_hold():
    classes = 100_000
    logits = (torch.eye(3, classes) for _ in range(2))
    found = metrics(logits, [0, 1, 99_999] * 2, [str(i) for i in range(classes)])
    assert found["confusion"] == {
        "true": [0, 1, 99_999], "predicted": [0, 1, 2], "images": [2, 2, 2]
    }  # fmt: skip
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_mean_distances_in_blocks_are_the_same(monkeypatch):
    features = F.normalize(torch.randn(11, 5), dim=-1)
    monkeypatch.setattr(evaluate, "_ROWS", 3)
    assert mean_text_distance(features) == pytest.approx(torch.pdist(features).mean().item())
    assert mean_text_distance(features[:1]) == 0


def test_calibration_error():
    confident = np.full(10, 0.9)
    assert calibration_error(confident, np.arange(10) < 9) == pytest.approx(0, abs=1e-9)
    assert calibration_error(confident, np.zeros(10, dtype=bool)) == pytest.approx(0.9)


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("val", [True, False])
def test_probe_separates_what_is_separable(classes, val):
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(classes, 16), dim=-1)
    labels = torch.arange(classes).repeat(6)
    features = F.normalize(centres[labels] + 0.05 * torch.randn(len(labels), 16), dim=-1)
    support, probe = Examples(features, labels), LinearProbe(1.0)
    # One class more than there are images for: it must never win.
    text = torch.zeros(classes + 1, 0)
    evidence = Evidence(support, support if val else None, text, 1.0, lambda count: None)
    probe.fit(evidence, make_settings({"dataset": "bundled", "seed": 1}))
    assert (probe(features, text).argmax(-1) == labels).all()
