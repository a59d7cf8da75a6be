"""What the automatic head averages, and the images that judge it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from dapt.methods import METHODS, Evidence, auto, kernel_logistic
from dapt.methods.contract import Examples
from dapt.methods.held_out import careful, rounds, series, sharpness
from dapt.methods.kernel_logistic import Logistic
from dapt.methods.kernel_ridge import Ridge
from dapt.methods.prototypes import Prototypes
from dapt.settings import make_settings


def near(labels, classes, spread=0.4, seed=0):
    """Features (n, 16) around centres (C, 16), all of length one."""
    same = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(classes, 16, generator=same), dim=-1)
    noise = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(seed))
    return F.normalize(centres[labels] + spread * noise, dim=-1), centres


def test_a_logistic_regression_is_that_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(kernel_logistic, "STEPS", 500)
    labels = torch.arange(4).repeat_interleave(10)
    x, text = near(labels, 4)
    ridge, new = Ridge(x, labels, text, 1.0, 0), near(labels, 4, seed=1)[0]
    own = Logistic(ridge, torch.zeros(1, 4, 16), [])
    own.fit(0.1)
    # Its penalty on values is theirs on weights of the kernel's own axes.
    mapped = (-torch.cdist(new, x).square()).exp().double() @ ridge.back
    theirs = LogisticRegression(C=10, fit_intercept=False, tol=1e-10, max_iter=10000)
    theirs.fit(ridge.mapped.numpy(), labels.numpy())
    expected = torch.from_numpy(theirs.predict_proba(mapped.numpy())).float()
    torch.testing.assert_close(own.answers(new).softmax(-1), expected, rtol=0, atol=2e-3)


def test_a_logistic_regression_that_leaves_a_fold_out_does_not_know_it(monkeypatch):
    monkeypatch.setattr(kernel_logistic, "STEPS", 500)
    labels = torch.arange(3).repeat_interleave(6)
    x, text = near(labels, 3)
    folds = [torch.arange(0, 18, 6), torch.arange(1, 18, 6)]
    means = Prototypes(x, labels, text)
    weights = 5 * torch.stack([means.weight(1.0, images) for images in (None, *folds)])
    own = Logistic(Ridge(x, labels, text, 1.0, 0), weights, folds)
    own.fit(0.1)
    found = own.held_out()
    for number, images in enumerate(folds, 1):
        kept = torch.tensor([i for i in range(18) if i not in images.tolist()])
        less = Ridge(x[kept], labels[kept], text, 1.0, 0)
        alone = Logistic(less, weights[number][None], [])
        alone.fit(0.1)
        torch.testing.assert_close(found[images], alone.answers(x[images]), rtol=0, atol=0.02)


def test_gaussians_that_leave_a_fold_out_do_not_know_it():
    labels = torch.arange(3).repeat_interleave(6)
    x, text = near(labels, 3)
    pieces = auto.Pieces(x, labels, text, seed=0)
    found, places = pieces["gaussian",].held_out, torch.cat(pieces.rows).tolist()
    for images in pieces.folds:
        kept = torch.tensor([i for i in range(18) if i not in images.tolist()])
        head = METHODS["gda"].head(1.0)
        head.estimate(x[kept], labels[kept], 3)
        own = torch.tensor([places.index(i) for i in images.tolist()])
        expected = head.scores(x[images]).log_softmax(-1)
        torch.testing.assert_close(found[own].log_softmax(-1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("images", "meaning"), [(1, True), (1, False), (2, True), (12, True)])
def test_the_classifier_says_what_its_parts_said_of_validation_images(images, meaning):
    """So what is put together is what was judged, whatever it is of."""
    labels, seen = torch.arange(5).repeat_interleave(images), torch.arange(5).repeat(4)
    x, text = near(labels, 5)
    text = text if meaning else torch.zeros_like(text)
    val = Examples(near(seen, 5, seed=1)[0], seen)
    head = METHODS["auto"].head(20.0)
    own = Evidence(Examples(x, labels), val, text, 20.0, lambda v: x[None])
    held = head.fit(own, make_settings({"dataset": "bundled", "method": "auto"}))
    assert torch.equal(held.labels[-20:], seen)
    assert len(held.labels) == 20 + (len(x) if images > 1 else 0)
    # A class that is left few images says little of how well new ones are known.
    assert int(held.fair.sum()) == 20 + (len(x) if images >= auto.ENOUGH else 0)
    assert held.fair[-20:].all()
    torch.testing.assert_close(head(val.features, text), held.logits[-20:], rtol=1e-4, atol=1e-3)


def test_every_family_is_in_it_where_none_is_clearly_worse(monkeypatch):
    monkeypatch.setattr(auto, "CLEAR", float("inf"))
    labels = torch.arange(5).repeat_interleave(6)
    x, text = near(labels, 5, spread=0.5)
    pieces = auto.Pieces(x, labels, text, seed=0)
    chosen = auto.weigh(pieces, meaning=True)
    kinds = {key[0] for mix, _ in chosen for key, _ in mix}
    assert kinds == {"means", "ridge", "gaussian", "logistic"}
    assert len({auto.kernel_of(mix) for mix, _ in chosen} - {None}) == 1


def test_a_family_that_is_clearly_worse_has_no_share():
    """Here Gaussians that say the opposite."""
    labels = torch.arange(5).repeat_interleave(6)
    x, text = near(labels, 5, spread=0.3)
    pieces = auto.Pieces(x, labels, text, seed=0)
    held = pieces["gaussian",]
    pieces._known["gaussian",] = held._replace(held_out=-held.held_out)
    gaussians, logistic = pieces.more(auto.Kernel(1.0), meaning=True)
    alone = [mix for mix in gaussians if len(mix) == 1]
    pieces.more = lambda *_: iter([alone, logistic])
    kinds = {key[0] for mix, _ in auto.weigh(pieces, meaning=True) for key, _ in mix}
    assert "logistic" in kinds
    assert "gaussian" not in kinds


def test_of_many_images_and_classes_closed_forms_are_left():
    labels = torch.arange(60).repeat_interleave(13)  # 780² · 60 is above the bound
    x, text = near(labels, 60)
    pieces = auto.Pieces(x, labels, text, seed=0)
    assert not list(pieces.more(auto.Kernel(1.0), meaning=True))


def test_images_of_a_series_are_left_out_together():
    labels = torch.arange(3).repeat_interleave(6)
    x, text = near(labels, 3)
    x[1], x[2] = F.normalize(x[0] + 0.01, dim=0), F.normalize(x[0] - 0.01, dim=0)
    x[12:] = x[12].clone()  # a class that is one series
    lots = series(x, labels, 3)
    assert [0, 1, 2] in [lot.tolist() for lot in lots[0]]
    assert [lot.tolist() for lot in lots[2]] == [[i] for i in range(12, 18)]
    together = rounds(labels, 3, 0, lots)
    assert any({0, 1, 2} <= set(images.tolist()) for images in together)
    means = Prototypes(x, labels, text)
    first = next(images for images in together if 0 in images)
    kept = torch.tensor([i for i in range(18) if i not in first.tolist()])
    less = Prototypes(x[kept], labels[kept], text)
    torch.testing.assert_close(means.weight(1.0, first), less.weight(1.0))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_series_have_every_image_once(labels, seed):
    labels = torch.tensor(labels)
    x = near(labels, 5, seed=seed)[0]
    lots = series(x, labels, 5)
    assert len(lots) == 5
    for label, own in enumerate(lots):
        found = torch.cat([*own, torch.tensor([], dtype=torch.long)]).tolist()
        assert sorted(found) == (labels == label).nonzero()[:, 0].tolist()
        assert len(own) > 1 or len(found) < 2  # one can be left out


def test_few_images_prove_no_certainty_and_many_do():
    logits, labels = torch.eye(3), torch.arange(3)
    few, many = (careful(logits.repeat(n, 1), labels.repeat(n)) for n in (1, 1000))
    assert 4 < few < many / 1.5
    assert careful(-logits, labels) > 0.05  # nor do few that are wrong prove that all is chance
    generator = torch.Generator().manual_seed(0)
    noisy = logits.repeat(1000, 1) + torch.randn(3000, 3, generator=generator)
    best = sharpness(noisy, labels.repeat(1000))[0]
    assert careful(noisy, labels.repeat(1000)) == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("images", [2, 3])
def test_very_few_images_give_probabilities_that_one_can_use(classes, images):
    worst = 0.0
    for seed in range(5):
        labels, unseen = torch.arange(classes).repeat(images), torch.arange(classes).repeat(20)
        x, text = near(labels, classes, seed=seed)
        head = METHODS["auto"].head(20.0)
        own = Evidence(Examples(x, labels), None, text, 20.0, lambda v, x=x: x[None])
        head.fit(own, make_settings({"dataset": "bundled", "method": "auto"}))
        loss = F.cross_entropy(head(near(unseen, classes, seed=99)[0], text), unseen)
        worst = max(worst, float(loss) / float(torch.tensor(classes).log()))
    assert worst < 1.05  # of what it would be of knowing nothing
