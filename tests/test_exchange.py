"""Published checkpoints: the prompts come out to the bit, and nothing else comes out at all."""

import contextlib
import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import frugal, fuzzed
from dapt.cli import app
from dapt.errors import UserError
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.safe.weights import Checkpoint, read_checkpoint
from dapt.share.exchange import import_checkpoint, read_published

runner = CliRunner()


def dapt(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


def fails(sentence, *arguments):
    result = dapt(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    said = " ".join(result.stderr.split())
    assert sentence in said, said


def save(value, file, form):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, file, _use_new_zipfile_serialization=form == "zip")


def training_state(**prompts):
    """What the published code saves: prompts and name embeddings, optimiser, scheduler."""
    module = torch.nn.Module()
    for name, prompt in prompts.items():
        module.register_parameter(name, torch.nn.Parameter(prompt))
    embeddings = torch.randn(3, 77, 64)
    module.register_buffer("token_prefix", embeddings[:, :1])
    module.register_buffer("token_suffix", embeddings[:, 5:])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    sum(p.sum() for p in module.parameters()).backward()
    optimizer.step()
    after = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    return {
        "state_dict": module.state_dict(),
        "epoch": 7,
        "optimizer": optimizer.state_dict(),
        # Of a scheduler with a warm-up the state dict holds the next scheduler as an object.
        "scheduler": {"successor": after, "last_epoch": 7},
        "val_result": torch.tensor(81.5).numpy()[()],
        "milestones": {1, 2},
    }


def draw(*shape):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    file = tmp_path_factory.mktemp("names") / "names.json"
    file.write_text(json.dumps(["red_thing", "green thing", "blue"]))
    return file


# ------------------------------------------------------------------------------- prompts in


def test_recorded_logits_come_back(recorded, tmp_path):
    """The recorded run's prompts, in the published form, classify as they were recorded to."""
    folder, weights = recorded
    record = load_file(folder / "record.safetensors")
    published = folder / "published_checkpoint"
    expected = "final_logits"
    if not published.is_dir():  # cut small: the prompts it began with
        published, expected = tmp_path / "out", "first_logits"
        state = training_state(txt_ctx=record["txt_ctx"], vis_ctx=record["vis_ctx"])
        state["state_dict"].update(txt_ctx=record["txt_ctx"], vis_ctx=record["vis_ctx"])
        save(state, published / "prompt_learner" / "model.pth.tar-7", "zip")
    names = tmp_path / "names.json"
    names.write_text(json.dumps(json.loads((folder / "record.json").read_text())["class_names"]))
    run = tmp_path / "run"
    result = dapt("import", published, "-o", run, "-b", weights, "--class-names", names)
    assert result.exit_code == 0, result.output
    classifier = load_classifier(RunDirectory(run))
    with torch.inference_mode():
        logits = classifier(record["images"][0])
    torch.testing.assert_close(logits, record[expected], atol=1e-3, rtol=0)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(
    ("shapes", "method"),
    [
        ({"ctx": (4, 64)}, "coop"),
        ({"vis_ctx": (1, 2, 64)}, "vpt"),
        ({"txt_ctx": (4, 64), "vis_ctx": (2, 64)}, "dapt"),
    ],
)
def test_prompts_come_out_to_the_bit(tmp_path, tiny_weights, names, form, shapes, method):
    file = tmp_path / "model.pth.tar-7"
    state = training_state(**{name: draw(*shape) for name, shape in shapes.items()})
    save(state, file, form)
    run = import_checkpoint(
        file, tmp_path / "run", {"backbone": str(tiny_weights), "class_names": str(names)}
    )
    kept = run.read_settings()
    assert (kept.method, kept.epochs) == (method, 7)
    found = load_file(run.prompts_file)
    for name, prompt in state["state_dict"].items():
        if name in shapes:
            kind = "visual_prompt" if name == "vis_ctx" else "text_prompt"
            assert torch.equal(found.pop(kind), prompt.reshape(-1, 64))
    assert not found


@pytest.fixture
def imported(tmp_path, tiny_weights, names):
    """A run without a dataset, its checkpoint, and the options it was imported with."""
    file, run = tmp_path / "out" / "model.pth.tar-7", tmp_path / "run"
    save(training_state(txt_ctx=draw(4, 64), vis_ctx=draw(1, 2, 64)), file, "zip")
    options = ["-b", tiny_weights, "--class-names", names, "--device", "cpu"]
    assert dapt("import", file, "-o", run, *options).exit_code == 0
    return run, file, options


def test_a_run_without_a_dataset(imported, photo_folder, names):
    run, file, options = imported
    files = {p.name for p in run.iterdir()} - {".lock"}
    assert files == {"settings.json", "environment.json", "task.json", "support_set.json",
                     "prompts.safetensors"}  # fmt: skip
    environment = json.loads((run / "environment.json").read_text())
    assert environment["imported_from"] == file.name
    support = json.loads((run / "support_set.json").read_text())
    assert support["train"] == support["val"] == []

    image = photo_folder / "test" / "blue" / "0.png"
    row = json.loads(dapt("predict", run, image, "--json", "--top", 3).stdout)
    assert {c["class"] for c in row["classes"]} == set(json.loads(names.read_text()))
    fails("imported without a dataset", "eval", run)
    fails("imported without a dataset", "train", "-o", run, "--resume")
    result = dapt("eval", run, "--dataset", photo_folder, "--json")
    assert json.loads(result.stdout)["images"] == 12
    fails("holds a run; add --overwrite", "import", file, "-o", run, *options)
    assert dapt("import", file, "-o", run, *options, "--overwrite").exit_code == 0


def test_a_run_with_a_dataset_is_evaluated(imported, tmp_path, photo_folder, tiny_weights):
    run = tmp_path / "evaluated"
    result = dapt("import", imported[1], "-o", run, "-b", tiny_weights, "--dataset", photo_folder,
                  "--shots", 4, "--seed", 3, "--epochs", 9, "-m", "vlpt")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "top-1" in result.output
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["imported"] is True
    assert (metrics["method"], metrics["shots"], metrics["seed"]) == ("vlpt", 4, 3)
    assert json.loads(dapt("eval", run, "--json").stdout) == metrics["test"]
    assert dapt("train", "-o", run, "--resume").exit_code == 0  # finished: nothing to do
    assert json.loads((run / "settings.json").read_text())["epochs"] == 9


@pytest.mark.parametrize("method", ["coop", "vpt", "dapt"])
def test_out_and_in_again_is_the_same_bits(method, imported, tmp_path, tiny_weights, names):
    shapes = {"coop": {"ctx": (4, 64)}, "vpt": {"vis_ctx": (1, 2, 64)},
              "dapt": {"txt_ctx": (4, 64), "vis_ctx": (1, 2, 64)}}[method]  # fmt: skip
    source = tmp_path / "source.pth"
    save({"state_dict": {k: draw(*s) for k, s in shapes.items()}, "epoch": 5}, source, "zip")
    given = {"backbone": str(tiny_weights), "class_names": str(names)}
    first = import_checkpoint(source, tmp_path / "first", given)
    out = tmp_path / "again" / "model.pth.tar-5"
    result = dapt("export", first.path, "--format", "coop", "-o", out)
    assert result.exit_code == 0, result.output
    # Plain tensors, as the published code reads them.
    plain = torch.load(out, weights_only=True)
    assert {k: tuple(v.shape) for k, v in plain["state_dict"].items()} == shapes
    assert plain["epoch"] == 5
    second = import_checkpoint(out.parent, tmp_path / "second", given)
    assert second.prompts_file.read_bytes() == first.prompts_file.read_bytes()
    assert second.settings_file.read_bytes() == first.settings_file.read_bytes()


def test_which_checkpoint_of_a_directory(tmp_path):
    fails("holds no model-best.pth.tar and no model.pth.tar-N", "import", tmp_path, "-o",
          tmp_path / "run", "--class-names", "x")  # fmt: skip
    folder = tmp_path / "prompt_learner"
    for name, epoch in (("model.pth.tar-9", 9), ("model.pth.tar-10", 10)):
        save({"state_dict": {"ctx": draw(4, 64)}, "epoch": epoch}, folder / name, "zip")
    (folder / "checkpoint").write_text("model.pth.tar-9\n")
    assert read_published(tmp_path).epoch == 10
    assert read_published(folder).epoch == 10
    save({"state_dict": {"ctx": draw(4, 64)}, "epoch": 4}, folder / "model-best.pth.tar", "zip")
    assert read_published(tmp_path).epoch == 4


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"ctx": draw(3, 4, 64)}, r"is class-specific, \(3, 4, 64\)"),
        ({"ctx": draw(4, 64), "meta_net.linear1.weight": draw(2, 2)}, "'meta_net.linear1.weight'"),
        ({"ctx": draw(4, 64), "compound_prompts_text.0": draw(2, 2)}, "'compound_prompts_text.0'"),
        ({"ctx": draw(4, 64), "txt_ctx": draw(4, 64)}, "'ctx' and 'txt_ctx', which no"),
        ({"ctx": draw(4, 64), "prompt_learner.ctx": draw(4, 64)}, "both ctx and prompt_learner"),
        ({"ctx": draw(4, 64), "head.weight": draw(4, 64)}, "holds 'head.weight'"),
        ({"head.weight": draw(4, 64)}, "'head.weight', which no method's code saves"),
        ({"meta_net.linear2.bias": draw(4)}, "linear2.bias', and not all that a method learns"),
        ({"vis_ctx": draw(12, 2, 64)}, r"visual prompt in .* has shape \(12, 2, 64\)"),
        ({"vis_ctx": torch.full((1, 2, 64), float("nan"))}, "not finite"),
        ({"ctx": torch.ones(4, 64, dtype=torch.int64)}, "torch.int64"),
        ({"ctx": draw(0, 64)}, r"\(0, 64\)"),
        ({"token_prefix": draw(1, 1, 64)}, "holds no prompts"),
        ({"ctx": "words"}, "'ctx', which is no tensor"),
        ({}, "holds no prompts"),
        ([draw(4, 64)], "holds no state dict"),
        ({3: draw(4, 64)}, "holds no state dict"),
    ],
)
def test_other_prompts_are_refused(tmp_path, state, sentence):
    file = tmp_path / "model.pth.tar-1"
    save({"state_dict": state, "epoch": 1}, file, "zip")
    with pytest.raises(UserError, match=sentence):
        read_published(file)


def test_what_does_not_fit_is_named(imported, tmp_path, tiny_weights, names):
    _, file, options = imported
    new = tmp_path / "new"
    fails("text prompt in", "import", file, "-o", new, "--class-names", names)  # bundled: 128 wide
    fails("give the backbone it was tuned on", "import", file, "-o", new, "--class-names", names)
    fails("--class-names", "import", file, "-o", new, "-b", tiny_weights)
    fails("method 'coop' does not learn what", "import", file, "-o", new, *options, "-m", "coop")
    fails("does not exist", "import", tmp_path / "none", "-o", new, *options)
    bad = tmp_path / "bad.json"
    for content in ('{"a": 1}', "[]", '["a", " "]', "3"):
        bad.write_text(content)
        fails("bad.json", "import", file, "-o", new, "-b", tiny_weights, "--class-names", bad)
    bad.write_bytes(b"junk")
    fails("it is no PyTorch file", "import", bad, "-o", new, *options)
    assert not new.exists()


# ---------------------------------------------------------------------- hostile and damaged


def text(value):
    """Opcodes of a string."""
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def name(module, attribute):
    """Opcodes of a name."""
    return f"c{module}\n{attribute}\n".encode()


def container(body, form, folder="archive", entries=(), protocol=2):
    """A hand-written pickle as a PyTorch file of either form: its bytes."""
    body = b"\x80" + bytes([protocol]) + body + b"."
    file = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{folder}/data.pkl", body)
            for key, content in entries:
                archive.writestr(f"{folder}/data/{key}", content)
        return file.getvalue()
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    for value in (0x1950A86A20F9469CFC6C, 1001, machine):
        pickle.dump(value, file, protocol=2)
    file.write(body)
    pickle.dump([key for key, _ in entries], file, protocol=2)
    for _, content in entries:
        file.write((len(content) // 4).to_bytes(8, "little") + content)
    return file.getvalue()


STORAGE = (
    b"(" + text("storage") + name("torch", "FloatStorage") + text("a") + text("cpu") + b"K\4NtQ"
)


def attacks(canary):
    """What a hostile pickle may ask for, and the name its refusal gives (None: any refusal)."""
    touch = text(f"touch {canary}")
    call = name("posix", "system") + touch + b"\x85R"
    thing = name("scheduler", "Thing") + b")\x81"
    imported = name("builtins", "__import__") + text("os") + b"\x85R"
    method = b"c__builtin__\ngetattr\n" + imported + text("system") + b"\x86R"
    evil = name("subprocess", "Popen") + b"]" + text("touch") + b"a" + text(str(canary)) + b"a"
    short = b"\x8c"  # a string of under 256 bytes
    dotted = short + b"\2os" + short + b"\x0fsystem.__call__\x93" + touch + b"\x85R"
    state = b"}(" + text("__setstate__") + name("posix", "system") + b"u"
    parameter = name("torch._utils", "_rebuild_parameter")
    return {
        "reduce": (call, "posix.system"),
        "in a parameter": (parameter + call + b"\x88}\x87R", "posix.system"),
        "as a key": (b"}" + call + b"K\1s", "posix.system"),
        "state setter": (thing + b"0" + name("os", "system") + touch + b"\x85R", "os.system"),
        "build": (thing + state + b"b" + touch + b"b", None),
        "build on a name": (name("posix", "system") + touch + b"b", None),
        "build on a maker": (name("collections", "OrderedDict") + state + b"b", None),
        "build on a dict": (b"c__builtin__\ndict\n)R" + state + b"b" + touch + b"b", None),
        "build on another": (name("collections", "Counter") + b")R" + state + b"b" + touch + b"b",
                             None),
        "append to a name": (name("posix", "system") + touch + b"a", None),
        "set item of a name": (name("posix", "system") + touch + touch + b"s", None),
        "getattr": (method + touch + b"\x85R", "builtins.__import__"),
        "dotted name": (dotted, "os.system.__call__"),
        "instance": (b"(S'touch " + str(canary).encode() + b"'\niposix\nsystem\n", None),
        "object": (b"(" + name("posix", "system") + touch + b"o", None),
        "partial": (name("functools", "partial") + name("posix", "system") + b"\x85R",
                    "functools.partial"),
        "eval": (name("builtins", "eval") + text(f"open({str(canary)!r}, 'w')") + b"\x85R",
                 "builtins.eval"),
        "new object": (evil + b"\x85\x81", None),
        "new by reconstructor": (name("copy_reg", "_reconstructor") + name("posix", "system")
                                 + touch + b"N\x87R", None),
        "default factory": (name("collections", "defaultdict") + name("posix", "system")
                            + b"\x85R" + touch + touch + b"s", None),
        "extension": (b"\x82\1" + touch + b"\x85R", None),
        "as a persistent name": (call + b"Q", "posix.system"),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("attack", sorted(attacks(Path("x"))))
def test_nothing_in_a_checkpoint_is_run(tmp_path, attack, form):
    canary, file = tmp_path / "canary", tmp_path / "bad.pth.tar"
    body, asked = attacks(canary)[attack]
    good = b"}(" + text("state_dict") + b"}" + text("extra") + body + b"u"
    file.write_bytes(container(good, form, protocol=4))
    if asked is None:  # inert, or refused: either will do
        with contextlib.suppress(UserError):
            assert read_checkpoint(file).state == {}
    else:
        with pytest.raises(UserError, match=rf"asks for {asked} to be run.* nothing in it was"):
            read_checkpoint(file)
    assert not canary.exists()


class _Runs:
    """Pickled by Python itself, with each of the ways an object may ask for a call."""

    def __init__(self, reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def _set(target, state):
    raise AssertionError("a state setter was called")


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_real_pickles_that_run_something(tmp_path, form):
    import os

    canary, file = tmp_path / "canary", tmp_path / "bad.pth.tar"
    for reduced in (
        (os.system, (f"touch {canary}",)),
        (exec, (f"open({str(canary)!r}, 'w')",)),
        (dict, (), {"a": 1}, None, None, _set),
    ):
        save({"state_dict": {"ctx": draw(4, 64)}, "extra": [_Runs(reduced)]}, file, form)
        with pytest.raises(UserError, match="asks for .*(system|exec|dict|_set) to be run"):
            read_checkpoint(file)
    assert not canary.exists()


def described(size, stride):
    return (
        name("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + STORAGE
        + b"K\0"
        + size
        + stride
        + (b"\x89NtR")
    )


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_sizes_that_cannot_be(tmp_path, form):
    floats = torch.arange(4.0).numpy().tobytes()
    file = tmp_path / "bad.pth.tar"

    def read(value, entries=(("a", floats),), protocol=4):
        body = b"}(" + text("state_dict") + b"}" + text("ctx") + value + b"su"
        file.write_bytes(container(body, form, entries=entries, protocol=protocol))
        return read_checkpoint(file).state["ctx"]

    good = described(b"K\2K\2\x86", b"K\2K\1\x86")
    assert read(good).tolist() == [[0, 1], [2, 3]]
    huge = (2**60).to_bytes(8, "little")
    for value in (
        described(b"J\xff\xff\xff\x7f\x85", b"K\0\x85"),  # stride 0 makes much of little
        described(b"\x8a\x08" + (2**61).to_bytes(8, "little") + b"\x85", b"K\1\x85"),
        described(b"J\xff\xff\xff\xff\x85", b"K\1\x85"),
        described(b"K\4\x85", b"K\2\x85"),
        described(b"K\4\x85", b"K\1K\1\x86"),
        good + b"N}" + text("size") + b"\x8a\x08" + huge + b"\x85s\x86b",  # changed when checked
        text("a") + b"r\xff\xff\xff\x1f0h\0",  # a memo of 2^29 slots
        b"\x8d" + huge,  # strings and bytes of 2^60
        b"\x8e" + huge,
        b"\x96" + huge,
        b"\x95" + huge + good,  # a frame
        good.replace(b"K\4NtQ", b"\x8a\x08" + huge + b"NtQ"),  # a storage
        b"(" * 100_000,
    ):
        with pytest.raises(UserError, match="could not be read as a checkpoint"):
            read(value)
    for entries in ((), (("b", floats),), (("a", floats[:8]),)):
        with pytest.raises(UserError, match="could not be read as a checkpoint"):
            read(good, entries)


def test_much_of_one_storage_is_refused(tmp_path):
    """A thousand tensors over the same bytes would be a thousand times the file."""
    floats = torch.zeros(4000).numpy().tobytes()
    body = b"}(" + text("state_dict") + b"}("
    one = described(b"M\xa0\x0f\x85", b"K\1\x85").replace(b"K\4NtQ", b"M\xa0\x0fNtQ")
    for i in range(1000):
        body += text(f"t{i}") + one
    file = tmp_path / "bad.pth.tar"
    file.write_bytes(container(body + b"uu", "zip", entries=[("a", floats)]))
    with pytest.raises(UserError, match="describes more than it holds"):
        read_checkpoint(file)


def exhausting():
    """Small pickles that once crashed the reader, or took hours or gigabytes."""
    count = 40_000
    doubled = b")" + b"q\0" + b"h\0h\0\x86q\0" * 64
    pairs = b"}(" + b"".join(b"M" + i.to_bytes(2, "little") + b"N" for i in range(count)) + b"uq\0"
    pair_list = b"](" + b"K\1K\2\x86" * count + b"eq\0"
    ones = b"(" + b"K\1" * count + b"tq\1](h\1eq\2"
    mapping, counter = name("collections", "OrderedDict"), name("collections", "Counter")
    again = name("torch._utils", "_rebuild_tensor_v2") + b"q\3" + STORAGE + b"q\4"
    number = b"\x8b" + (3_000_000).to_bytes(4, "little") + b"\x7f" * 3_000_000
    word = text("x" * 2_000_000)
    return {
        "deep value": b"}" + text("a") + b"]" * 200_000 + b"a" * 199_999 + b"s",
        "doubled key": b"}" + doubled + b"Ns",
        "doubled set": b"\x8f(" + doubled + b"\x90",
        "doubled frozen set": b"(" + doubled + b"\x91",
        "copied dict": pairs + mapping + b"q\1]" + b"(" + b"h\1h\0\x85R" * 500 + b"e",
        "counted dict": pairs + counter + b"q\1]" + b"(" + b"h\1h\0\x85R" * 500 + b"e",
        "copied pairs": pair_list + mapping + b"q\1]" + b"(" + b"h\1h\0\x85R" * 500 + b"e",
        "long sizes": ones + again + b"]" + b"(" + b"h\3(h\4K\0h\1h\1\x89NtR" * 500 + b"e",
        "many arguments": ones + again + b"]" + b"(" + b"0h\3h\1R" * 100_000 + b"e",
        "many parts": ones + b"](" + b"h\1Q0" * 100_000 + b"e",
        "sizes in lists": ones + again + b"](" + b"h\3(h\4K\0h\2h\2\x89NtR" * 500 + b"e",
        "large sizes": number + b"q\1" + again + b"h\3(h\4K\0(" + b"h\1" * 60 + b"tq\2h\2\x89NtR",
        "names": b"](" + name("a", "b") * 500_000 + b"e",
        "long names": b"](" + word + b"q\0" + b"h\0h\0\x93" * 100_000 + b"e",
        "lists": b"](" + b"]" * 4_000_000 + b"e",
        "sets": b"](" + b"\x8f" * 4_000_000 + b"e",
        "objects": b"](" + name("__torch__", "M") + b"q\0" + b"h\0)\x81" * 800_000 + b"e",
        "large keys": number + b"q\0](" + b"}h\0Ns" * 300_000 + b"e",
        "long keys": word + b"q\0" + word + b"q\1](" + b"}h\0Nsh\1Ns" * 50_000 + b"e",
        "marks": b"(" * 4_000_000,
        "memo": b"N" + b"\x94" * 4_000_000,
        "nulls": b"\0" * 4_000_000,
    }  # fmt: skip


def beside(body, form):
    """A good checkpoint with something beside its state dict."""
    ctx = described(b"K\4\x85", b"K\1\x85")
    good = b"}(" + text("extra") + body + text("state_dict") + b"}" + text("ctx") + ctx + b"su"
    return container(good, form, entries=[("a", bytes(16))], protocol=4)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("attack", sorted(exhausting()))
def test_a_small_file_takes_little_time_and_memory(tmp_path, attack, form):
    file = tmp_path / "bad.pth.tar"
    file.write_bytes(beside(exhausting()[attack], form))
    with frugal(), contextlib.suppress(UserError):
        assert read_checkpoint(file).state["ctx"].tolist() == [0] * 4


def test_a_key_too_deep_for_the_stack(tmp_path):
    """It once ended the process, so it is read in one of its own."""
    file = tmp_path / "bad.pth.tar"
    file.write_bytes(beside(b"}" + b")" + b"\x85" * 400_000 + b"Ns", "zip"))
    code = (
        "import sys; from pathlib import Path; from dapt.safe.weights import read_checkpoint; "
        "print(read_checkpoint(Path(sys.argv[1])).state['ctx'].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[0.0, 0.0, 0.0, 0.0]\n"), done.stderr


def test_one_storage_under_many_names(tmp_path):
    """In an archive of TorchScript, as in a checkpoint."""
    fields = b"".join(text(f"t{i}") + b"h\0" for i in range(300))
    tensor = described(b"K\4\x85", b"K\1\x85") + b"q\0"
    archive = tensor + b"0" + name("__torch__", "M") + b")\x81}(" + fields + b"ub"
    file = tmp_path / "bad.pt"
    file.write_bytes(container(archive, "zip", entries=[("a", bytes(16)), ("b", bytes(4000))]))
    assert len(read_checkpoint(file).state) == 300
    file.write_bytes(container(archive, "zip", entries=[("a", bytes(16))]))
    with pytest.raises(UserError, match="describes more than it holds"):
        read_checkpoint(file)


def test_modules_in_rings_and_of_endless_names(tmp_path):
    module = name("__torch__", "M") + b")\x81q\0}" + text("w")
    tensor = described(b"K\4\x85", b"K\1\x85")
    file, entries = tmp_path / "a.pt", [("a", bytes(16))]
    ring = module + tensor + b"s" + text("me") + b"h\0sb"
    file.write_bytes(container(ring, "zip", entries=entries))
    assert list(read_checkpoint(file).state) == ["w"]
    deep = (name("__torch__", "M") + b")\x81}" + text("w" * 99)) * 900 + tensor + b"sb" * 900
    file.write_bytes(container(deep, "zip", entries=entries))
    with pytest.raises(UserError, match="a name that no module has"):
        read_checkpoint(file)


def test_a_zip_of_a_million_entries_is_not_listed(tmp_path):
    file, count = tmp_path / "a.pth", 200_000
    entries = b"".join(
        b"PK\1\2" + bytes(24) + b"\5" + bytes(17) + b"%05x" % i for i in range(count)
    )
    end = b"PK\5\6" + bytes(8) + struct.pack("<LLH", len(entries), 0, 0)
    file.write_bytes(entries + end)
    with frugal(50), pytest.raises(UserError, match="its list of tensors has 10,200,000 bytes"):
        read_checkpoint(file)


@pytest.mark.parametrize("folder", ["", "/etc", "..", "../../x", "C:"])
def test_zips_are_not_extracted(tmp_path, folder):
    inside = tmp_path / "inside"
    inside.mkdir()
    file = inside / "bad.pth.tar"
    body = (
        b"}("
        + text("state_dict")
        + b"}"
        + text("ctx")
        + described(b"K\4\x85", b"K\1\x85")
        + (b"su")
    )
    file.write_bytes(container(body, "zip", folder, [("a", bytes(16))]))
    with contextlib.suppress(UserError):
        assert read_checkpoint(file).state["ctx"].tolist() == [0] * 4
    assert [p.name for p in tmp_path.rglob("*")] == ["inside", "bad.pth.tar"]


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for form in ("zip", "legacy"):
        save(training_state(ctx=draw(4, 64)), folder / form, form)
    return {form: (folder / form).read_bytes() for form in ("zip", "legacy")}


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_truncated_files_are_refused(good_files, tmp_path, form):
    whole, file = good_files[form], tmp_path / "model.pth.tar-1"
    for length in [*range(0, 6000, 211), *range(6000, len(whole), 3001), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="could not be read as a checkpoint"):
            read_checkpoint(file)


def test_a_zip_of_many_disks_is_refused(good_files, tmp_path):
    content = bytearray(good_files["zip"])
    locator = content.rindex(b"PK\x06\x07") if b"PK\x06\x07" in content else None
    end = content.rindex(b"PK\x05\x06")
    if locator is None:
        record = b"PK\x06\x07" + bytes(12) + (2).to_bytes(4, "little")
        content[end:end] = record
    else:
        content[locator + 16 : locator + 20] = (2).to_bytes(4, "little")
    file = tmp_path / "model.pth.tar-1"
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match="could not be read as a checkpoint"):
        read_checkpoint(file)


@pytest.mark.fuzz
@fuzzed(150)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(good_files, tmp_path, data):
    form = data.draw(st.sampled_from(["zip", "legacy"]))
    content = bytearray(good_files[form])
    # Most of the file is numbers: aim at the pickle in front of them and at what ends the zip.
    places = st.one_of(st.integers(0, 6000), st.integers(len(content) - 2000, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    file = tmp_path / "model.pth.tar-1"
    file.write_bytes(bytes(content))
    with contextlib.suppress(UserError):
        assert isinstance(read_checkpoint(file), Checkpoint)
