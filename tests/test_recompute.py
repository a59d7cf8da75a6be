"""Layers computed anew for gradients: the same bits, less memory, and only where it is short."""

import pytest
import torch

from dapt.clip import inside
from dapt.clip.backbone import Backbone
from dapt.clip.inside import Pass
from dapt.clip.sources import load_backbone
from dapt.engine import step
from dapt.engine.classifier import new_classifier, tuning_head
from dapt.engine.processes import free_memory
from dapt.engine.step import Tuner
from dapt.methods import get_method
from dapt.settings import make_settings

NAMES = ("cat", "dog", "hot air balloon")


def tuner_of(backbone: Backbone, method: str, **given) -> Tuner:
    """That of a new classifier."""
    settings = make_settings({"dataset": "bundled", "method": method, "batch_size": 4, **given})
    row = get_method(method)
    classifier = new_classifier(backbone, NAMES, "a photo of a {}.", row, settings)
    features, classifier.head = classifier.text_features(), tuning_head(backbone, settings)
    return Tuner(classifier, settings, torch.zeros_like(features))


def batch(backbone: Backbone):
    size, draw = backbone.preprocessing.size, torch.Generator().manual_seed(1)
    views = torch.randint(256, (4, 3, size, size), generator=draw, dtype=torch.uint8)
    return views, torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["dapt", "maple", "promptsrc", "mmrl", "clip-lora", "2sfs"])
def test_what_is_learned_is_the_same_to_the_bit(tiny_weights, method, precision):
    backbone = load_backbone(str(tiny_weights), precision=precision)
    found = []
    for recompute in (False, True):
        tuner = tuner_of(backbone, method, recompute=recompute)
        for number in range(3):
            result = tuner.step(*batch(backbone), 0.1, torch.Generator().manual_seed(number))
        found.append((torch.tensor(result.total), *tuner.named.values()))
    for ours, others in zip(*found, strict=True):
        assert torch.equal(ours, others)


@pytest.mark.parametrize("method", ["maple", "clip-lora"])
def test_less_is_kept_of_both_towers(tiny_weights, method):
    backbone, kept = load_backbone(str(tiny_weights)), []
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}

    classifier, (views, _) = tuner_of(backbone, method).classifier, batch(backbone)

    def bytes_of(encode, *given, **how):
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            encode(*given, **how)
        return sum(storage.nbytes() for storage in storages.values())

    for recompute in (False, True):
        now = Pass(torch.Generator().manual_seed(0), 4, recompute=recompute)
        image = bytes_of(classifier.image_features, views, now)
        kept.append((image, bytes_of(classifier.text_features, now=now)))
    for all_of_it, some in zip(*kept, strict=True):
        assert some < 0.75 * all_of_it  # the last of three layers is kept


@pytest.mark.parametrize("method", ["dapt", "coop", "cocoop", "clip-lora"])
def test_memory_that_is_short_asks_for_it(tiny_weights, monkeypatch, method):
    backbone = load_backbone(str(tiny_weights))
    needed = tuner_of(backbone, method).classifier.kept_bytes(4)
    assert needed > 0
    free = {"plenty": 2 * needed, "short": needed, "unknown": None}
    for state, expected in (("plenty", False), ("short", True), ("unknown", False)):
        monkeypatch.setattr(step, "free_memory", lambda device, state=state: free[state])
        assert tuner_of(backbone, method).recompute is expected
        assert tuner_of(backbone, method, recompute=not expected).recompute is not expected


def test_more_images_and_layers_that_learn_keep_more(tiny_weights):
    backbone = load_backbone(str(tiny_weights))
    one, two = (tuner_of(backbone, method).classifier for method in ("coop", "dapt"))
    assert one.kept_bytes(4) == one.kept_bytes(8)  # class names alone
    assert one.kept_bytes(4) < two.kept_bytes(4) < two.kept_bytes(8)


def test_what_is_not_learned_is_never_computed_anew(tiny_weights, monkeypatch):
    backbone = load_backbone(str(tiny_weights))
    tuner, count = tuner_of(backbone, "clip-lora", recompute=True), []
    monkeypatch.setattr(inside, "checkpoint", lambda layer, *x, **how: count.append(1) or layer(*x))
    views, labels = batch(backbone)
    with torch.inference_mode():
        tuner.classifier(views)
    assert not count
    tuner.losses(views, labels)
    assert count


def test_what_files_take_of_a_containers_memory_is_free(tmp_path, monkeypatch):
    for name, text in (("max", "3000"), ("current", "2900"), ("stat", "a 1\ninactive_file 1500\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr("dapt.engine.processes._GROUP", tmp_path)
    assert free_memory(torch.device("cpu")) in (1600, None)


def test_what_is_free_is_some_of_what_there_is():
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
