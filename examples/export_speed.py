"""Size and images/s of a run's ONNX files beside torch, and of 'dapt predict': figures of the docs.

    python examples/export_speed.py runs/photos --rounds 5 --threads 1

Each takes the run's test images in batches of 100, turn by turn, so that a machine that is busy for
a while slows all of them; the best round counts. 'predict' reads and decodes the files as well.
"""

import argparse
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch

from dapt.engine.data import task_of
from dapt.engine.features import Shared, backbone_of
from dapt.predict import predict_each
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.share.export import export

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", type=RunDirectory)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--threads", type=int, default=1)
given = parser.parse_args()
torch.set_num_threads(given.threads)
settings = given.run.read_settings().model_copy(update={"precision": "fp32"})
classifier = load_classifier(given.run, backbone=backbone_of(settings, device="cpu"))
task = task_of(settings)
store = Shared(classifier.backbone).store(task, task.test, settings)
images = classifier.backbone.normalize(store.test_views(range(len(store))))  # (n, 3, S, S)
batches = images.split(100)


@torch.inference_mode()
def with_torch():
    """(n, C) probabilities, class features made before."""
    return torch.cat([classifier(batch).softmax(-1) for batch in batches])


def with_onnx(file):
    """A function that gives the same with onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given.threads
    graph = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda: torch.cat(
        [torch.from_numpy(graph.run(None, {"images": batch.numpy()})[0]) for batch in batches]
    )


ways = {"torch": with_torch}
sizes = {}
with tempfile.TemporaryDirectory() as folder:
    for name, int8 in (("onnx", False), ("onnx int8", True)):
        file = Path(folder) / f"{name.replace(' ', '-')}.onnx"
        export(given.run, file, "onnx", int8=int8)
        ways[name], sizes[name] = with_onnx(file), file.stat().st_size
paths = [task.image_path(item) for item in task.test]
ways["predict"] = lambda: list(predict_each(classifier, paths))
seconds, expected = {name: [] for name in ways}, with_torch()
for _ in range(given.rounds):
    for name, way in ways.items():
        start = time.perf_counter()
        way()
        seconds[name].append(time.perf_counter() - start)
for name, way in ways.items():
    line = f"{name:9} {len(images) / min(seconds[name]):7,.0f} images/s"
    if name in sizes:
        found = way()
        difference = (found - expected).abs().max()
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        line += f", {sizes[name] / 1e6:.1f} MB, same class for {same:.1%}, off by {difference:.1e}"
    print(line)
