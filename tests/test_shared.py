"""What runs share saves work and changes no bit."""

import pytest

from dapt.data import ImageStore
from dapt.engine.features import Shared, backbone_of
from dapt.run.train import train
from dapt.settings import make_settings


@pytest.fixture
def given(photo_folder, tiny_weights):
    return {
        "dataset": str(photo_folder),
        "backbone": str(tiny_weights),
        "device": "cpu",
        "shots": 4,
        "epochs": 2,
        "lr": 0.02,
        "eval_batch_size": 5,
    }


@pytest.mark.parametrize("method", ["zero-shot", "linear-probe", "coop", "vpt", "dapt"])
def test_shared_runs_end_in_the_same_bits(given, tmp_path, method):
    settings = make_settings({**given, "method": method})
    shared = Shared(backbone_of(settings))
    train(make_settings({**given, "method": "dapt"}), tmp_path / "before", shared=shared)
    runs = [
        train(settings, tmp_path / "alone"),
        train(settings, tmp_path / "together", shared=shared),
    ]
    for name in ("prompts.safetensors", "metrics.json"):
        alone, together = ((run.path / name).read_bytes() for run in runs)
        assert alone == together


def test_images_are_encoded_once_without_prompts(given, tmp_path, monkeypatch):
    batches, read = ImageStore.batches, []

    def count(store, lists, **more):
        lists = list(lists)
        read.append(sum(map(len, lists)))
        return batches(store, lists, **more)

    monkeypatch.setattr(ImageStore, "batches", count)
    settings = make_settings({**given, "method": "zero-shot"})
    shared = Shared(backbone_of(settings))
    for i, method in enumerate(["zero-shot", "linear-probe", "coop"]):
        train(make_settings({**given, "method": method}), tmp_path / str(i), shared=shared)
    assert read == [12, 12]  # support and test images: once each, whoever asks


def test_the_oldest_images_go_when_memory_is_short(given):
    from dapt.engine.data import Data, support_of, task_of
    from dapt.progress import Reporter

    settings = make_settings({**given, "memory_budget": 100_000 / 2**30})  # 13 of 40 x 48 px
    task, shared = task_of(settings), Shared(backbone_of(settings))
    support = shared.support(Data(task, support_of(settings, task)), settings, Reporter())
    allowance = support.store.allowance
    kept = allowance.used
    assert 50_000 < kept <= 100_000
    tested = shared.store(task, task.test, settings)
    assert allowance.used == 0  # more than half was taken: the older ones went
    tested.test_views(range(len(task.test)))
    assert 50_000 < allowance.used <= 100_000
    again = shared.store(task, support.drawn.train, settings)
    assert again is support.store
    assert allowance.used == 0
    again.test_views(range(len(again)))
    assert allowance.used == kept
