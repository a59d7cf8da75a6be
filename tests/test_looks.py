"""Several looks at an image: what is seen, and that whoever reads a run sees the same."""

import json

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import InterpolationMode, resized_crop
from typer.testing import CliRunner

from dapt.cli import app
from dapt.clip.looks import LOOKS, looks
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import Classifier
from dapt.engine.data import open_data
from dapt.engine.features import Shared
from dapt.engine.fit import fit
from dapt.methods.held_out import careful, frequencies, sharpness, worth
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.settings import make_settings

NAMES = ["cat", "dog", "bird"]


def pictures(count=3, size=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def seen_by_torchvision(images, look):
    size = images.shape[-1]
    top, left, height, width = (round(size * share) for share in look[:4])
    found = resized_crop(
        images, top, left, height, width, [size, size], InterpolationMode.BILINEAR, antialias=False
    )
    return found.flip(-1) if look.mirrored else found


@pytest.mark.parametrize("size", [40, 48, 224])
def test_looks_are_crops_of_the_image_and_of_its_mirror_image(size):
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    found = list(looks(images, len(LOOKS)))
    assert torch.equal(found[0], images)
    assert torch.equal(found[1], images.flip(-1))
    for own, look in zip(found, LOOKS, strict=True):
        torch.testing.assert_close(own, seen_by_torchvision(images, look), rtol=0, atol=1e-5)
        for place, length in ((look.top, look.height), (look.left, look.width)):
            assert place + length <= 1 + 1e-9
    half = list(looks(images.bfloat16(), 3))
    assert {own.dtype for own in half} == {torch.bfloat16}


@pytest.mark.parametrize("count", [1, 2, 5, len(LOOKS)])
def test_features_are_means_over_looks(tiny_weights, count):
    backbone = load_backbone(str(tiny_weights), device="cpu")
    classifier = Classifier(backbone, NAMES, looks=count)
    views = pictures(size=backbone.preprocessing.size)
    images = backbone.normalize(views)
    with torch.inference_mode():
        each = [
            classifier.image_features(seen_by_torchvision(images, look)) for look in LOOKS[:count]
        ]
        expected = F.normalize(sum(each), dim=-1)
        found = classifier.encode(views)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(classifier.encode(images), found)
        assert torch.equal(classifier(views), classifier.logits(found))
        if count == 2:  # of an image and its mirror image they are the same
            torch.testing.assert_close(classifier.encode(views.flip(-1)), found)


def test_looks_change_what_is_predicted_and_nothing_that_is_tuned(photo_folder, tiny_weights):
    given = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
             "shots": 2, "epochs": 2, "method": "vpt"}  # fmt: skip
    one, several = (fit(open_data(s), s).classifier for s in
                    (make_settings({**given, "looks": count}) for count in (1, 4)))  # fmt: skip
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, several.tensors()[name])
    views = pictures(size=one.backbone.preprocessing.size)
    with torch.inference_mode():
        assert not torch.allclose(one(views), several(views))


def test_a_head_is_fitted_on_what_it_will_see(photo_folder, tiny_weights):
    given = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
             "shots": 2, "method": "tip-adapter", "tip_views": 1}  # fmt: skip
    settings = make_settings({**given, "looks": 3})
    data = open_data(settings)
    tuned = fit(data, settings)
    support = tuned.support.store.test_views(range(len(data.support.train)))
    with torch.inference_mode():
        seen = tuned.classifier.encode(support)
    found = tuned.support.features_of(tuned.classifier, settings)
    torch.testing.assert_close(found, seen, rtol=0, atol=1e-6)


def test_features_of_looks_are_kept_beside_plain_ones(photo_folder, tiny_weights):
    settings = make_settings({"dataset": str(photo_folder), "backbone": str(tiny_weights),
                              "device": "cpu", "shots": 2, "method": "zero-shot"})  # fmt: skip
    data, shared = open_data(settings), Shared(load_backbone(str(tiny_weights), device="cpu"))
    names, items = data.task.class_names, data.task.test
    made = {count: Classifier(shared.backbone, names, looks=count) for count in (1, 2, 4)}

    def features(own):
        return shared.encode(data.task, items, settings, own).features

    first = {count: features(own) for count, own in made.items()}
    assert not torch.equal(first[1], first[2])
    assert not torch.equal(first[2], first[4])
    for count, own in made.items():
        assert features(own) is first[count]
    assert shared.encode(data.task, items, settings).features is first[1]


def test_whoever_reads_a_run_sees_the_same(photo_folder, tiny_weights, tmp_path):
    runner, run = CliRunner(), tmp_path / "run"
    command = ["train", str(photo_folder), "-b", str(tiny_weights), "--device", "cpu"]
    made = runner.invoke(app, [*command, "-m", "auto", "-o", str(run)])
    assert made.exit_code == 0, made.output
    directory = RunDirectory(run)
    assert directory.read_settings().looks == len(LOOKS)
    assert load_classifier(directory).looks == len(LOOKS)
    again = runner.invoke(app, ["eval", str(run)])
    assert again.exit_code == 0, again.output
    plain = runner.invoke(app, [*command, "-m", "zero-shot", "-o", str(tmp_path / "plain")])
    zero = RunDirectory(tmp_path / "plain").read_metrics().test.accuracy
    assert f"zero-shot, which learns nothing: {100 * zero:.1f} %" in made.output, plain.output
    # A run of before there were looks saw one, whatever the default is now.
    kept = json.loads(directory.settings_file.read_text())
    del kept["looks"]
    directory.settings_file.write_text(json.dumps({**kept, "auto_views": 8}))
    assert directory.read_settings().looks == 1
    for count in ("0", str(len(LOOKS) + 1), "many"):
        refused = runner.invoke(
            app, [*command, "-s", f"looks={count}", "-o", str(tmp_path / "other")]
        )
        assert refused.exit_code == 2
        assert "looks" in refused.output


def test_probabilities_are_those_of_classes_as_often_as_they_are_met():
    # The first class is told well, the second is not.
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
    labels = torch.tensor([0, 0, 0, 1]).repeat(50)
    wrong = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(100, 1)
    logits, labels = torch.cat([logits, wrong]), torch.cat([labels, torch.ones(200).long()])
    alike = frequencies(labels, labels, 2)
    assert worth(alike) == pytest.approx(len(labels))
    assert careful(logits, labels, alike) == pytest.approx(careful(logits, labels), rel=1e-3)
    often = frequencies(labels, torch.tensor([0] * 99 + [1]), 2)
    assert worth(often) < len(labels)
    surer = careful(logits, labels, often)
    assert surer > 1.5 * careful(logits, labels)
    drawn = torch.multinomial(often, 20_000, replacement=True,
                              generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert surer == pytest.approx(sharpness(logits[drawn], labels[drawn])[0], rel=0.05)
