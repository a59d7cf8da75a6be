"""What the contract promises whoever writes a part, beyond what the table's own rows use."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from test_towers import siglip
from torch import nn

from dapt.data import ImageStore
from dapt.engine.data import open_data
from dapt.engine.evaluate import classify
from dapt.engine.fit import Diverged, Interrupted, Journal, fit
from dapt.engine.search import search_settings
from dapt.errors import UserError
from dapt.methods import METHODS, Finish, Head, LossTerm, Method, TowerPart
from dapt.methods.cocoop import NETWORK
from dapt.methods.prompts import Context
from dapt.predict import predict_each
from dapt.progress import Reporter
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.serve.served import load_served
from dapt.settings import idle_settings, make_settings
from dapt.share.export import export


@pytest.fixture
def given(photo_folder, tiny_weights):
    before = dict(METHODS)
    yield {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
           "shots": 2, "batch_size": 3, "epochs": 2, "lr": 0.1, "text_vectors": 2}  # fmt: skip
    METHODS.clear()
    METHODS.update(before)


def tune(given, row, journal=None, **settings):
    METHODS["mine"] = row
    settings = make_settings({**given, "method": "mine", **settings})
    return fit(open_data(settings), settings, journal=journal)


class Mean(Finish):
    """The mean of what was learned after each epoch."""

    def __init__(self, settings, epochs):
        super().__init__(settings, epochs)
        self.sums = {}

    def after_epoch(self, epoch, tensors):
        for name, tensor in tensors.items():
            self.sums[name] = self.sums.get(name, 0) + tensor.detach() / self.epochs

    def end(self, tensors):
        return self.sums

    def state(self):
        return dict(self.sums)

    def load_state(self, state):
        assert set(state) == {"text_prompt"}
        self.sums = dict(state)


class Stopping(Journal):
    """Keeps the first checkpoint and stops the process there; the second time, goes on from it."""

    kept = None

    def checkpoint(self):
        return self.kept and (dict(self.kept[0]), *self.kept[1:])

    def save(self, state, step, seconds):
        if self.kept is None:
            self.kept = {name: tensor.clone() for name, tensor in state.items()}, step, seconds
            raise Interrupted


def test_a_finish_goes_on_where_it_was(given):
    row, journal = Method("Mean", (Context,), finish=Mean), Stopping()
    whole = tune(given, row, checkpoint_every=1).classifier.tensors()["text_prompt"]
    with pytest.raises(Interrupted):
        tune(given, row, journal, checkpoint_every=1)
    resumed = tune(given, row, journal, checkpoint_every=1).classifier.tensors()["text_prompt"]
    assert torch.equal(whole, resumed)
    last = tune(given, Method("Last", (Context,))).classifier.tensors()["text_prompt"]
    assert not torch.equal(whole, last)


class Watching(TowerPart):
    """Sees every layer, and changes the first."""

    towers = frozenset({"image"})
    seen: ClassVar = set()

    def __init__(self, width):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    @classmethod
    def create(cls, backbone, settings):
        return cls(backbone.vision_width)

    def before_layer(self, tower, layer, x, at):
        self.seen.add(layer)
        return x + self.shift.to(x.dtype) if layer == 0 else x


def test_a_part_sees_the_first_layer_too(given):
    found = tune(given, Method("Watching", (Watching,)))
    assert Watching.seen == {0, 1}
    assert found.classifier.tensors()["shift"].abs().max() > 0


class OwnContext(TowerPart):
    """A context for each of three classes."""

    towers = frozenset({"text"})

    def __init__(self, width):
        super().__init__()
        draw = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(1))
        self.own = nn.Parameter(0.02 * draw)

    @classmethod
    def create(cls, backbone, settings):
        return cls(backbone.text_width)

    def tokens(self, tower, now):
        return self.own


def test_classes_may_have_contexts_of_their_own(given):
    start = OwnContext(64).own
    learned = tune(given, Method("Own", (OwnContext,))).classifier.tensors()["own"]
    assert bool((learned != start).flatten(1).any(1).all())


class Twin(Watching):
    """Learns under a name that another part has."""


def test_two_parts_of_one_name_are_told(given):
    with pytest.raises(UserError, match="'shift' is the name of two tensors"):
        tune(given, Method("Twins", (Watching, Twin)))


class Linear(TowerPart):
    """Changes linear maps."""

    towers = frozenset({"image", "text"})

    def linear(self, tower, layer, names, x, out, now):
        return 2 * out


def test_linear_maps_that_cannot_be_changed_are_told():
    from dapt.engine.classifier import Classifier

    class Odd(ResidualAttentionBlock):
        """Not quite open_clip's."""

    backbone = siglip()
    backbone.text.transformer.resblocks[0].__class__ = Odd
    with pytest.raises(UserError, match="the backbone has others; choose another backbone"):
        Classifier(backbone, ["cat", "dog"], [Linear()]).text_features()


class Scaled(Head):
    """Learns one factor on class features, by gradient descent."""

    fitted = True

    def __init__(self, scale):
        super().__init__(scale)
        self.factor = nn.Parameter(torch.ones(()))

    def fit(self, evidence, settings):
        loss = (evidence.support.features @ (evidence.text * self.factor).T).mean()
        loss.backward()
        self.factor.data -= self.factor.grad


class Endless(Scaled):
    """A fit that went astray."""

    def fit(self, evidence, settings):
        self.factor.data *= float("inf")


def test_a_head_may_use_gradients_and_must_end_in_numbers(given):
    for parts in ((), (Context,)):
        found = tune(given, Method("Scaled", parts, head=Scaled))
        assert found.classifier.tensors()["factor"] != 1
    with pytest.raises(Diverged, match="what Endless fits is no longer finite"):
        tune(given, Method("Endless", head=Endless))


def test_huge_settings_of_a_memory_are_told(given):
    settings = make_settings({**given, "method": "tip-adapter-f", "tip_lr": 1e30})
    with pytest.raises(Diverged, match="give other values of tip_alpha, tip_beta"):
        fit(open_data(settings), settings)


def test_views_count_where_a_head_reads_them():
    assert "crop_min" in idle_settings("linear-probe")
    assert "crop_min" not in idle_settings("tip-adapter-f")
    assert "epochs" in idle_settings("tip-adapter-f")


def test_a_search_finds_weights_of_the_user(given):
    zero = LossTerm("w", "w", lambda step: step.logits.square().mean(), search=(1.0, 0.0))
    METHODS["mine"] = Method("Weighed", (Context,), (zero,))
    settings = make_settings({**given, "method": "mine", "loss_weights": {"w": 1e6}})
    assert search_settings(settings, Reporter()).loss_weights["w"] in (0.0, 1e6)


def test_initial_words_are_not_cut_apart(given):
    words = "xylophonic photo of a"
    settings = make_settings({**given, "method": "ivlp", "text_init": words})
    with pytest.raises(UserError, match="would cut a word"):
        fit(open_data(settings), settings)


@pytest.mark.parametrize("position", ["middle", "front"])
def test_prompts_of_each_class_know_no_other_classes(given, tmp_path, position):
    """As a run on disk: it is read back, and asked for other classes."""
    own = {"text_position": position, "class_contexts": True, "text_init": "a photo"}
    run = train(make_settings({**given, "method": "coop", **own}), tmp_path / "run")
    classifier = load_classifier(run)
    learned = classifier.tensors()["text_prompt"]
    start = Context.create_for(classifier.backbone, run.read_settings(), 3).layers[0]
    assert learned.shape == start.shape == (3, 2, 64)
    assert torch.equal(start[0], start[2])  # of the words
    assert not torch.equal(learned[0], learned[2])
    task = replace(open_data(run.read_settings()).task, class_names=("a", "b", "c"))
    with pytest.raises(UserError, match="prompts of its own classes alone"):
        load_classifier(run, task)


@pytest.fixture(scope="module")
def conditional(photo_folder, tiny_weights, tmp_path_factory):
    """A run whose class features are made for each image, tuned two images at a time."""
    given = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu"}
    settings = make_settings({**given, "method": "cocoop", "shots": 2, "batch_size": 2, "seed": 2})
    return train(settings, tmp_path_factory.mktemp("conditional") / "run")


def test_class_features_of_an_image_are_its_own_whatever_is_beside_it(conditional, photo_folder):
    classifier, task = load_classifier(conditional), open_data(conditional.read_settings()).task
    files = [photo_folder / item.path for item in task.test]
    store = ImageStore(files, **classifier.of_views())
    with torch.inference_mode():
        features = classifier.image_features(store.test_views(range(len(files))))
        text = classifier.text_features(features)
        assert text.shape == (len(files), 3, 32)
        assert (text[0] - text).abs().max() > 1e-4
        expected = classifier.logits(features, text)
        torch.testing.assert_close(classifier.logits(features), expected, atol=1e-4, rtol=0)
    near = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(classify(classifier, store, batch_size=5), expected, **near)
    probabilities = expected.softmax(-1)
    said = predict_each(classifier, files, top=3, batch_size=4)
    best = torch.tensor([p.classes[0][1] for p in said])
    torch.testing.assert_close(best, probabilities.amax(-1), **near)
    served = load_served(conditional)
    views = store.test_views(range(len(files))).permute(0, 2, 3, 1).numpy()
    answers = torch.stack([found for found, _ in served.answers(list(views))])
    torch.testing.assert_close(answers, probabilities, **near)
    right = expected.argmax(-1) == torch.tensor([item.label for item in task.test])
    assert conditional.read_metrics().test.accuracy == pytest.approx(float(right.float().mean()))


def test_what_cannot_be_with_class_features_of_an_image_is_told(conditional, tmp_path):
    for form in ("onnx", "torch"):
        with pytest.raises(UserError, match="made for each image, by the text tower"):
            export(conditional, tmp_path / "file.bin", form)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="which no fitted head takes; use it by itself"):
        make_settings({"dataset": "bundled", "method": "cocoop+kernel-ridge"})
    export(conditional, tmp_path / "prompts.pth.tar", "coop")
    saved = torch.load(tmp_path / "prompts.pth.tar", weights_only=True)["state_dict"]
    assert saved.keys() == {"ctx", *NETWORK}
