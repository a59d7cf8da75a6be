"""Exported classifiers: the same probabilities, in a file that needs neither dapt nor torch."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from patience import LONG
from typer.testing import CliRunner

from conftest import REPOSITORY
from dapt.cli import app
from dapt.engine.data import task_of
from dapt.engine.evaluate import classify
from dapt.engine.features import Shared
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.settings import make_settings
from dapt.share.card import model_card
from dapt.share.exchange import read_published

runner = CliRunner()


def dapt(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


def fails(sentence, *arguments):
    result = dapt(*arguments)
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert sentence in said, said


METHODS = ["dapt", "coop", "linear-probe"]
# For what does not depend on the method.
once = pytest.mark.parametrize("run", ["dapt"], indirect=True)


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory, tiny_weights, photo_folder):
    given = {
        "dataset": str(photo_folder),
        "backbone": str(tiny_weights),
        "method": request.param,
        "shots": 2,
        "epochs": 2,
        "batch_size": 4,
        "text_vectors": 2,
        "visual_vectors": 3,
    }
    return train(make_settings(given), tmp_path_factory.mktemp("runs") / request.param)


@pytest.fixture(scope="module")
def views(run):
    """Test images of the run, normalised: (12, 3, 32, 32), and what torch says of them."""
    classifier, settings = load_classifier(run), run.read_settings()
    task = task_of(settings)
    store = Shared(classifier.backbone).store(task, task.test, settings)
    expected = classify(classifier, store).softmax(-1)
    return classifier.backbone.normalize(store.test_views(range(len(store)))), expected


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """An ONNX file, of which the card lies beside, and what the command said."""
    file = tmp_path_factory.mktemp("exports") / "photos.onnx"
    result = dapt("export", run.path, "-o", file)
    assert result.exit_code == 0, result.output
    return file, " ".join(result.stdout.split())


def session(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def test_onnx_gives_the_same_probabilities_for_any_batch(exported, views):
    images, expected = views
    graph = session(exported[0])
    for size in (1, 3, 12):
        found = np.concatenate(
            [graph.run(None, {"images": part.numpy()})[0] for part in images.split(size)]
        )
        assert found.shape == expected.shape
        assert np.abs(found - expected.numpy()).max() < 1e-4
    assert expected.argmax(-1).unique().numel() > 1, "one class for all would prove little"


def test_export_says_how_far_it_is_off(exported):
    assert "largest difference of a probability" in exported[1]
    assert "same class for 100%, on 12 test images and 4 of noise" in exported[1]


def test_metadata_is_all_that_is_needed_to_use_the_file(run, exported):
    facts = session(exported[0]).get_modelmeta().custom_metadata_map
    facts = {name: json.loads(text) for name, text in facts.items()}
    names = run.read_task().class_names
    environment = json.loads(run.environment_file.read_text())
    assert facts["labels"] == list(names)
    assert facts["preprocessing"]["size"] == 32
    assert facts["provenance"]["method"] == run.read_settings().method
    assert facts["provenance"]["backbone_sha256"] == environment["backbone_sha256"]
    assert facts["provenance"]["int8"] is False


@once
def test_a_file_tells_nothing_of_the_machine_and_is_the_same_each_time(
    run, exported, tiny_weights, photo_folder, tmp_path
):
    again = tmp_path / "photos.onnx"
    assert dapt("export", run.path, "-o", again).exit_code == 0
    content = again.read_bytes()
    assert content == exported[0].read_bytes()
    card = again.with_suffix(".md").read_bytes()
    assert run.read_settings().backbone == str(tiny_weights)
    for file in (content, card):
        assert tiny_weights.name.encode() in file
        for place in (REPOSITORY, run.path.parent, tiny_weights.parent, photo_folder):
            assert str(place).encode() not in file


def test_all_bundled_test_images(tmp_path):
    """What is said of exports is said of these, with the bundled backbone."""
    quick = {"dataset": "bundled", "method": "zero-shot", "shots": 1}
    run = train(make_settings(quick), tmp_path / "run")
    assert dapt("export", run.path, "-o", tmp_path / "a.onnx").exit_code == 0
    classifier, settings = load_classifier(run), run.read_settings()
    task = task_of(settings)
    store = Shared(classifier.backbone).store(task, task.test, settings)
    expected = classify(classifier, store).softmax(-1).numpy()
    images = classifier.backbone.normalize(store.test_views(range(len(store))))
    graph = session(tmp_path / "a.onnx")
    found = [graph.run(None, {"images": part.numpy()})[0] for part in images.split(100)]
    assert len(expected) == 355
    assert np.abs(np.concatenate(found) - expected).max() < 1e-4
    assert "license: mit" in (tmp_path / "a.md").read_text()


@once
def test_names_in_a_card_are_text(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    odd = RunDirectory(tmp_path / "run")
    task = json.loads(odd.task_file.read_text())
    names = ["a|b", "<img src=x>", "*c* `d`"]
    odd.task_file.write_text(json.dumps({**task, "dataset": "<b>|x", "class_names": names}))
    settings = json.loads(odd.settings_file.read_text())
    odd.settings_file.write_text(json.dumps({**settings, "template": "a | {} <i>"}))
    card = model_card(odd)
    assert not re.search(r"<(b|i|img)\b", card)
    assert r"a\|b, &lt;img src=x&gt;, \*c\* \`d\`" in card
    cells = [re.split(r"(?<!\\)\|", line) for line in card.splitlines() if line[:2] == "| "]
    assert "template" in {line[1].strip() for line in cells}
    assert {len(line) for line in cells} == {4}


@once
def test_compared_on_noise_where_an_image_is_missing(run, photo_folder, tmp_path):
    settings = json.loads(run.settings_file.read_text())
    shutil.copytree(photo_folder, tmp_path / "photos")
    shutil.copytree(run.path, tmp_path / "run")
    given = {**settings, "dataset": str(tmp_path / "photos")}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(given))
    damaged = sorted((tmp_path / "photos" / "test").rglob("*.png"))[0]
    damaged.write_bytes(b"x")
    result = dapt("export", tmp_path / "run", "-o", tmp_path / "a.pt2", "-f", "torch")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "on 4 images of noise" in said
    assert damaged.name in said


@once
def test_int8(run, exported, views, tmp_path):
    images, expected = views
    file = tmp_path / "small.onnx"
    result = dapt("export", run.path, "-o", file, "--int8")
    assert result.exit_code == 0, result.output
    assert file.stat().st_size < 0.6 * exported[0].stat().st_size
    kinds = {t.data_type for t in onnx.load(file).graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    found = session(file).run(None, {"images": images.numpy()})[0]
    assert np.abs(found - expected.numpy()).max() < 0.1
    facts = session(file).get_modelmeta().custom_metadata_map
    assert json.loads(facts["provenance"])["int8"] is True
    assert "8 bits" in file.with_suffix(".md").read_text()


def test_files_are_of_the_oldest_formats_that_hold_the_graph(exported):
    """Which runtimes of three years back read: 1.17 of onnxruntime takes IR 9 and opset 20."""
    model = onnx.load(exported[0])
    assert [(part.domain, part.version) for part in model.opset_import] == [("", 18)]
    assert model.ir_version == 8
    onnx.checker.check_model(model, full_check=True)


@once
def test_half_precision_and_fixed_shapes(run, exported, views, tmp_path):
    images, expected = views
    file = tmp_path / "half.onnx"
    result = dapt("export", run.path, "-o", file, "--fp16", "--batch", 5)
    assert result.exit_code == 0, result.output
    assert file.stat().st_size < 0.6 * exported[0].stat().st_size
    graph = onnx.load(file).graph
    kinds = {t.data_type for t in graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.FLOAT not in kinds
    sizes = [d for v in (*graph.input, *graph.output) for d in v.type.tensor_type.shape.dim]
    assert [size.dim_value for size in sizes] == [5, 3, 32, 32, 5, 3]
    assert "Shape" not in {node.op_type for node in graph.node}, "a shape that is yet to be known"
    found = session(file).run(None, {"images": images[:5].numpy()})[0]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected[:5].numpy()).max() < 0.02
    facts = session(file).get_modelmeta().custom_metadata_map
    assert json.loads(facts["provenance"])["fp16"] is True
    card = file.with_suffix(".md").read_text()
    assert "5 at a time, computed at 16 bits" in card


@once
def test_fixed_shapes_of_a_torch_program(run, views, tmp_path):
    file = tmp_path / "one.pt2"
    result = dapt("export", run.path, "-o", file, "-f", "torch", "--batch", 1)
    assert result.exit_code == 0, result.output
    found = torch.export.load(file).module()(views[0][:1])
    assert float((found - views[1][:1]).abs().max()) < 1e-4


def test_torch_program(run, views, tmp_path):
    images, expected = views
    file = tmp_path / "photos.pt2"
    result = dapt("export", run.path, "-o", file, "--format", "torch")
    assert result.exit_code == 0, result.output
    facts = {"labels.json": "", "provenance.json": ""}
    program = torch.export.load(file, extra_files=facts).module()
    with torch.inference_mode():
        found = torch.cat([program(part) for part in images.split(5)])
    assert float((found - expected).abs().max()) < 1e-4
    assert json.loads(facts["labels.json"]) == list(run.read_task().class_names)


def test_coop_round_trip(run, tmp_path):
    file = tmp_path / "prompt_learner" / "model.pth.tar-2"
    if run.read_settings().method == "linear-probe":
        fails(
            "has no place in a CoOp checkpoint", "export", run.path, "-o", file, "--format", "coop"
        )
        return
    assert dapt("export", run.path, "-o", file, "--format", "coop").exit_code == 0
    tensors, _ = run.read_tensors(run.prompts_file)
    back = read_published(file)
    assert torch.equal(back.tensors["text_prompt"], tensors["text_prompt"])
    if "visual_prompt" in tensors:
        assert torch.equal(back.tensors["visual_prompt"], tensors["visual_prompt"])
    else:
        assert "visual_prompt" not in back.tensors


def test_card_says_what_the_model_is(run, exported):
    card = exported[0].with_suffix(".md").read_text()
    metrics = json.loads(run.metrics_file.read_text())
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "license" in front
    assert "photos.onnx" in body
    for name in run.read_task().class_names:
        assert name in body
    assert f"{100 * metrics['test']['accuracy']:.1f}" in body


@once
def test_a_file_that_is_no_card_is_kept(run, tmp_path):
    (tmp_path / "photos.md").write_text("my notes")
    fails("is something else", "export", run.path, "-o", tmp_path / "photos.onnx")
    assert (tmp_path / "photos.md").read_text() == "my notes"
    assert not (tmp_path / "photos.onnx").exists()


@once
def test_what_cannot_be_exported(run, tmp_path):
    fails("unknown format 'tflite'", "export", run.path, "-o", tmp_path / "a", "-f", "tflite")
    fails("--int8 goes with", "export", run.path, "-o", tmp_path / "a", "-f", "torch", "--int8")
    fails("--fp16 goes with", "export", run.path, "-o", tmp_path / "a", "-f", "coop", "--fp16")
    fails("exclude each other", "export", run.path, "-o", tmp_path / "a", "--int8", "--fp16")
    fails("--batch 2 is", "export", run.path, "-o", tmp_path / "a", "-f", "coop", "--batch", 2)
    fails("must name a file", "export", run.path, "-o", tmp_path)
    before = run.metrics_file.read_bytes()
    fails("a run's own files", "export", run.path, "-o", run.metrics_file, "-f", "coop")
    assert run.metrics_file.read_bytes() == before
    fails("is no run directory", "export", tmp_path, "-o", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_example_needs_neither_torch_nor_dapt(run, exported, photo_folder, tmp_path):
    """It runs where importing either fails, and says what 'dapt predict' says."""
    for name in ("torch", "dapt", "torchvision", "open_clip"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    pictures = sorted((photo_folder / "test").rglob("*.png"))
    made = subprocess.run(
        [sys.executable, REPOSITORY / "examples" / "onnx_predict.py", exported[0], *pictures],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert made.returncode == 0, made.stderr
    lines = dict(line.rsplit(": ", 1) for line in made.stdout.splitlines())
    result = dapt("predict", run.path, *pictures, "--json")
    for line in result.stdout.splitlines():
        found = json.loads(line)
        best = found["classes"][0]
        name, _, percent = lines[found["path"]].rpartition(" ")
        assert name == best["class"]
        assert abs(float(percent[:-1]) - 100 * best["probability"]) < 0.06


def example_in_javascript(folder, *arguments):
    """What it prints, beside the packages in ``folder``."""
    if not (node := shutil.which("node")):
        pytest.skip("Node is not here")
    shutil.copy(REPOSITORY / "examples" / "onnx_predict.mjs", folder)
    command = [node, folder / "onnx_predict.mjs", *arguments]
    made = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert made.returncode == 0, made.stderr
    return dict(line.rsplit(": ", 1) for line in made.stdout.splitlines())


@once
def test_the_example_in_javascript_says_what_predict_says(run, exported, photo_folder, tmp_path):
    """With the packages that it needs, where DAPT_NODE_MODULES has them."""
    if not (modules := os.environ.get("DAPT_NODE_MODULES")):
        pytest.skip("DAPT_NODE_MODULES names no folder of onnxruntime-web and sharp")
    (tmp_path / "node_modules").symlink_to(modules)
    pictures = sorted((photo_folder / "test").rglob("*.png"))
    lines = example_in_javascript(tmp_path, exported[0], *pictures)
    result = dapt("predict", run.path, *pictures, "--json", "--top", 3)
    for line in result.stdout.splitlines():
        found = json.loads(line)
        name, _, percent = lines[found["path"]].rpartition(" ")
        expected = {one["class"]: 100 * one["probability"] for one in found["classes"]}
        assert abs(float(percent[:-1]) - expected[name]) < 1


STUBS = {
    "onnxruntime-web": """
export class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }) } }
export const InferenceSession = { create: async () => ({ run: async ({ images }) => {
  const [, colours, height, width] = images.dims
  const first = [...Array(colours).keys()].map((c) => images.data[c * height * width])
  return { probabilities: { data: Float32Array.from(first) } }
} }) }
""",
    "sharp": """
export default (path) => {
  const made = new Proxy({}, { get: (_, name) => () => {
    if (name !== 'toBuffer') return made
    return { data: Array(90 * 71).fill([9, 200, 31]).flat(), info: { width: 90, height: 71 } }
  } })
  return made
}
""",
}


@once
def test_the_example_in_javascript_reads_labels_and_normalises(run, exported, tmp_path):
    """With stand-ins for both packages: an image of one colour, and its numbers for answers."""
    for name, source in STUBS.items():
        (package := tmp_path / "node_modules" / name).mkdir(parents=True)
        (package / "index.mjs").write_text(source)
        (package / "package.json").write_text('{"type": "module", "exports": "./index.mjs"}')
    seen = json.loads(session(exported[0]).get_modelmeta().custom_metadata_map["preprocessing"])
    green = (200 / 255 - seen["mean"][1]) / seen["std"][1]
    name = run.read_task().class_names[1]
    assert example_in_javascript(tmp_path, exported[0], "a.jpg") == {
        "a.jpg": f"{name} {100 * green:.1f}%"
    }


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as one commit asks for; keeps what it was told."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        host = f"http://127.0.0.1:{self.server.server_port}"
        if self.server.refuses:
            self._answer(403, {"error": "you may not write here"})
        elif self.path.endswith("/api/repos/create"):
            self._answer(200, {"url": f"{host}/me/photos", "name": "me/photos"})
        elif "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": f["path"], **how} for f in json.loads(body)["files"]]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            url = f"{host}/me/photos/commit/0123"
            self._answer(200, {"commitUrl": url, "commitOid": "0123", "success": True})
        else:
            self._answer(200, {})

    def do_GET(self):
        self.server.seen.append((self.path, b"", self.headers.get("Authorization")))
        self._answer(200, {"id": "me/photos", "sha": "0123", "siblings": []})

    def _answer(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.seen, server.refuses = [], False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def push(run, hub, tmp_path):
    """The command in a process of its own: the client reads its endpoint when imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": "hf_only_a_test",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "dapt.cli", "push", str(run.path), "me/photos", "--private"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONG)


@once
def test_push_makes_one_commit_of_run_and_card(run, hub, tmp_path):
    """Against a stub of the hub's interface, not the hub."""
    made = push(run, hub, tmp_path)
    assert made.returncode == 0, made.stderr
    assert f"http://127.0.0.1:{hub.server_port}/me/photos/commit/0123" in made.stdout
    created = next(body for path, body, _ in hub.seen if path.endswith("/repos/create"))
    assert b"private" in created  # newer clients: "visibility": "private"
    commits = [body for path, body, _ in hub.seen if "/commit/" in path]
    assert len(commits) == 1
    entries = [json.loads(line) for line in commits[0].splitlines()]
    files = {e["value"]["path"] for e in entries if e["key"] == "file"}
    assert {"README.md", "settings.json", "prompts.safetensors", "metrics.json"} <= files
    assert "checkpoint.safetensors" not in files
    tokens = [token for path, _, token in hub.seen if "/create" in path or "/commit/" in path]
    assert tokens == ["Bearer hf_only_a_test"] * 2


@once
def test_push_refused_is_one_sentence(run, hub, tmp_path):
    hub.refuses = True
    made = push(run, hub, tmp_path)
    assert made.returncode == 2
    assert "Traceback" not in made.stderr
    assert "could not be pushed to 'me/photos'" in " ".join(made.stderr.split())


@once
def test_push_dry_run_lists_the_files(run):
    listed = dapt("push", run.path, "me/photos", "--dry-run")
    assert listed.exit_code == 0
    assert "prompts.safetensors" in listed.stdout
    assert "checkpoint" not in listed.stdout


@once
def test_push_takes_no_link(run, tmp_path):
    """A run from a stranger may show with one what lies outside of it."""
    (secret := tmp_path / "secret").write_text("keep it here")
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    (copy / "log.csv").unlink()
    (copy / "log.csv").symlink_to(secret)
    listed = dapt("push", copy, "me/photos", "--dry-run")
    assert listed.exit_code == 2
    assert "is a link" in " ".join(listed.stderr.split())
