"""Files from strangers: whatever is in them, they are read rightly or refused in one sentence.

Each test takes whole bytes, or a good file with something changed. ``make torture`` runs these
with thousands of examples. Input that once did harm is kept below as an explicit example.
"""

import contextlib
import gzip
import io
import json
import os
import shutil
import struct
import tarfile
from pathlib import Path

import pytest
import yaml
from fuzz import CORPUS, TARGETS, read_or_refused
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from conftest import frugal, fuzzed
from dapt.cli import app
from dapt.errors import UserError
from dapt.grid import make_plan, read_suite
from dapt.report.collect import collect, read_confusion, read_log
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.run.train import train
from dapt.safe.files import LARGEST_YAML, parse_yaml, read_json
from dapt.settings import make_settings, parse_assignment, read_settings_file
from dapt.share.card import model_card

ODD = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 2**63, 10**30, 1e308, -1e-308, "", "~nobody/x", "a\0b", "x" * 5000,
         "/etc/passwd", "../..", [], {}, [[]], {"a": {}}, "nan", "\ud800", "\u202eevil"]
    ),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)  # fmt: skip
VALUES = st.recursive(
    ODD,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(value, path=()):
    """Paths of all values inside a JSON value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    for key, inner in pairs:
        yield from places(inner, (*path, key))


@st.composite
def changed(draw, value):
    """A JSON value with one or two places replaced by something else, or taken out."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                value = json.loads(json.dumps(draw(VALUES)))
            continue
        place = value
        for key in path[:-1]:
            place = place[key]
        if draw(st.booleans()):
            place[path[-1]] = json.loads(json.dumps(draw(VALUES)))  # examples are shared
        else:
            del place[path[-1]]
    return value


@st.composite
def damaged(draw, content):
    """Bytes with some cut, changed, or put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["cut", "change", "insert"]))
        if kind == "cut":
            del content[at : at + draw(st.integers(1, 2000))]
        else:
            new = draw(st.binary(min_size=1, max_size=12))
            content[at : at + (len(new) if kind == "change" else 0)] = new
    return bytes(content)


# -------------------------------------------------------------------------------- the corpus


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.mark.parametrize("kept", sorted(f"{p.parent.name}/{p.name}" for p in CORPUS.glob("*/*")))
def test_kept_input(kept, place):
    """What ``make fuzz`` starts from, and what it found: read or refused, soon, in little room."""
    kind = kept.partition("/")[0]
    if kind == "shard":
        pytest.importorskip("webdataset")
    TARGETS[kind](b"", place)  # what is loaded or made but once is no fault of the input
    with frugal():
        TARGETS[kind]((CORPUS / kept).read_bytes(), place)


# ------------------------------------------------------------------------ settings, suites

SETTINGS = {"dataset": "bundled", "lr": 0.2, "shots": 4, "loss_weights": {"inter": 1}}
SUITE = {
    "datasets": ["bundled"], "methods": ["coop"], "variants": {"mine": {"lr": 2}},
    "sweeps": {"lr": [1, 2]}, "shots": [1], "seeds": [1], "settings": {"epochs": 2},
    "evaluations": [{"domain": "fluent-emoji"}], "quick": {"seeds": [1]}, "bundled": {},
}  # fmt: skip


@pytest.mark.fuzz
@fuzzed(200)
@given(changed(SETTINGS))
@example({"dataset": "~nobody/x"})
@example({"dataset": "bundled", "memory_budget": 1e308})
@example({"dataset": "bundled", "shots": "9" * 5000})
def test_any_settings(tmp_path_factory, values):
    file = tmp_path_factory.getbasetemp() / "settings.yaml"
    file.write_text(json.dumps(values))
    with read_or_refused():
        make_settings(read_settings_file(file))


@pytest.mark.fuzz
@fuzzed(150)
@given(changed(SUITE))
def test_any_suite(tmp_path_factory, values):
    file = tmp_path_factory.getbasetemp() / "suite.yaml"
    file.write_text(json.dumps(values))
    with read_or_refused():
        make_plan(read_suite(file), tmp_path_factory.getbasetemp() / "grids")


@pytest.mark.fuzz
@fuzzed(300)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b"a: !!int x")
@example(b"a: !!timestamp x")
@example(b"a: 2001-99-99")
@example(b"a: 0x" + b"f" * 6000)
@example(b"a: " + b"9" * 6000)
@example(b"a: !!python/object/apply:os.system ['true']")
@example(b"[" * 5000)
@example(b"a: &a [1]\nb: *a")
@example(b"? [a]\n: 1")
def test_any_bytes_as_yaml(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(content)
    with read_or_refused():
        read_settings_file(file)
    with read_or_refused():
        read_suite(file)
    with read_or_refused():
        parse_assignment("lr=" + content.decode(errors="replace"))


def test_yaml_bombs_and_sizes(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)
    )
    with pytest.raises(ValueError, match="alias"):
        parse_yaml(bomb)
    with pytest.raises(ValueError, match="key twice"):
        parse_yaml("lr: 1\nlr: 2")
    file = tmp_path / "large.yaml"
    with file.open("wb") as sparse:
        sparse.truncate(LARGEST_YAML + 1)
    with pytest.raises(UserError, match="are read at most"):
        read_settings_file(file)
    assert parse_yaml(yaml.safe_dump(SUITE)) == SUITE


# ------------------------------------------------------------------------------------ JSON


@pytest.mark.fuzz
@fuzzed(200)
@given(st.binary(max_size=100))
@example(b'{"a": NaN}')
@example(b'{"a": 1, "a": 2}')
@example(b"[" * 100_000)
@example(b"9" * 5000)
@example(b"\xff\xfe")
def test_any_bytes_as_json(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.json"
    file.write_bytes(content)
    with read_or_refused():
        read_json(file, "file")


def test_json_is_refused_before_it_fills_memory(tmp_path):
    file = tmp_path / "large.json"
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(UserError, match="are read at most"):
        read_json(file, "split file")
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(UserError, match="no ordinary file"):
        read_json(tmp_path / "fifo.json", "split file")


@pytest.mark.parametrize("content", ['{"a": NaN}', '{"a": 1, "a": 2}', "[Infinity]", "[-1e999]"])
def test_json_of_two_meanings_is_refused(tmp_path, content):
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(UserError, match="is not readable JSON"):
        read_json(file, "file")


# ------------------------------------------------------------------------- run directories


@pytest.fixture(scope="module")
def good(photo_folder, tiny_weights, tmp_path_factory):
    """Runs of prompts and of a probe, each with a checkpoint where it has one."""
    folder = tmp_path_factory.mktemp("good")
    for method in ("dapt", "linear-probe"):
        settings = make_settings(
            {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
             "method": method, "shots": 2, "epochs": 2, "text_vectors": 2, "visual_vectors": 1,
             "lr": 0.02, "checkpoint_every": 1}
        )  # fmt: skip
        train(settings, folder / method)
    return folder


@pytest.fixture(scope="module")
def backbone(good):
    from dapt.engine.features import backbone_of

    return backbone_of(RunDirectory(good / "dapt").read_settings())


def use(folder, backbone):
    """All that is done with a run directory, short of tuning."""
    run = RunDirectory(folder)
    with read_or_refused():
        load_classifier(run, backbone=backbone).text_features()
    with read_or_refused():
        model_card(run)
    with read_or_refused():
        run.read_checkpoint()
    with read_or_refused():
        run.read_metrics()
    with read_or_refused():
        for found in collect([folder])[0]:
            with contextlib.suppress(UserError):
                read_confusion(found)
            with contextlib.suppress(UserError):
                read_log(found)


def copy_of(good, method, tmp_path_factory):
    place = tmp_path_factory.getbasetemp() / "stranger"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good / method, place / "run", ignore=shutil.ignore_patterns("tensorboard"))
    return place / "run"


def test_no_file_outside_of_a_run_is_touched(good, tmp_path):
    """Its folder of TensorBoard's files may be a link that leads out, or hold what is not ours."""
    settings = RunDirectory(good / "dapt").read_settings()
    (mine := tmp_path / "mine").mkdir()
    ours = ("thesis.txt", "events.out.tfevents.mine")
    for name in ours:
        (mine / name).write_text("years of work")
    run = tmp_path / "run"
    shutil.copytree(good / "dapt", run, ignore=shutil.ignore_patterns("tensorboard"))
    (run / "tensorboard").symlink_to(mine)
    for name in ("metrics.json", "prompts.safetensors"):
        (run / name).unlink()
    with pytest.raises(UserError, match="is a link"):
        train(settings, run, resume=True)
    train(settings, run, overwrite=True)
    assert sorted(file.name for file in mine.iterdir()) == sorted(ours)

    (run / "tensorboard" / "notes").mkdir()
    train(settings, run, overwrite=True)
    assert (run / "tensorboard" / "notes").is_dir()


@pytest.mark.parametrize(
    "changes",
    [
        {"test": {"images": 3, "accuracy": 10**400}},
        {"test": {"images": 3}},
        {"test": {"images": -1, "accuracy": 0.5}},
        {"dispersion": {"inter": {"before": "high"}}},
        {"dataset": ["[/x]"]},
    ],
)
def test_odd_metrics_are_one_sentence(good, tmp_path, changes):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(good / "dapt", run.path)
    assert run.read_metrics()
    run.metrics_file.write_text(json.dumps({**json.loads(run.metrics_file.read_text()), **changes}))
    for command in (["push", run.path, "a/b", "--dry-run"], ["train", "-o", run.path, "--resume"]):
        made = CliRunner().invoke(app, list(map(str, command)))
        assert made.exit_code == 2, made.output
        assert "metrics.json" in made.stderr
        assert "damaged" in made.stderr or "whole number" in made.stderr


def test_large_files_of_a_run_are_not_read(good, tmp_path):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(good / "dapt", run.path)
    with run.prompts_file.open("r+b") as file:
        file.truncate(2**40)  # which takes no room on disk
    with frugal(megabytes=100), pytest.raises(UserError, match="bytes, and .* are read"):
        run.read_tensors(run.prompts_file)
    for file in (run.prompts_file, run.log_file):  # neither are they copied
        with pytest.raises(UserError, match="more than .* bytes"):
            RunDirectory(tmp_path / "twin").copy_from(run)
        with file.open("r+b") as opened:
            opened.truncate(100)
        with run.log_file.open("r+b") as opened:
            opened.truncate(2**30 if file == run.prompts_file else 100)
    run.log_file.write_bytes(b"\n" * 20_000_000)
    with frugal(megabytes=400), pytest.raises(UserError, match="more than 1,000,000 steps"):
        read_log(collect([run.path])[0][0])


RECORDS = ["settings.json", "environment.json", "task.json", "support_set.json", "metrics.json"]


@pytest.mark.fuzz
@fuzzed(40)
@given(st.data())
def test_any_records_of_a_run(good, backbone, tmp_path_factory, data):
    """Changed records: used or refused; resumed to the same bits or refused."""
    run = copy_of(good, "dapt", tmp_path_factory)
    file = run / data.draw(st.sampled_from(RECORDS))
    value = data.draw(changed(json.loads(file.read_text())))
    file.write_text(json.dumps(value))
    use(run, backbone)
    if file.name in RECORDS[1:4]:
        (run / "metrics.json").unlink(missing_ok=True)
        (run / "prompts.safetensors").unlink()
        settings = RunDirectory(good / "dapt").read_settings()
        with read_or_refused():
            train(settings, run, resume=True)
            for name in ("prompts.safetensors", "metrics.json"):
                assert (run / name).read_bytes() == (good / "dapt" / name).read_bytes()


@pytest.mark.fuzz
@fuzzed(40)
@given(st.data())
def test_any_tensors_of_a_run(good, backbone, tmp_path_factory, data):
    """Damaged safetensors: in bytes, in their header, or whole but of other shapes and types."""
    method = data.draw(st.sampled_from(["dapt", "linear-probe"]))
    run = copy_of(good, method, tmp_path_factory)
    names = ["prompts.safetensors", "checkpoint.safetensors"][: 2 if method == "dapt" else 1]
    file = run / data.draw(st.sampled_from(names))
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    kind = data.draw(st.sampled_from(["bytes", "header", "numbers"]))
    if kind == "bytes":
        content = data.draw(damaged(content))
    elif kind == "header":
        header = json.dumps(data.draw(changed(json.loads(content[8 : 8 + length])))).encode()
        content = struct.pack("<Q", len(header)) + header + content[8 + length :]
    else:
        tail = bytearray(content)
        at = data.draw(st.integers(8 + length, len(tail) - 4))
        tail[at : at + 4] = data.draw(st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\x7f"]))
        content = bytes(tail)
    file.write_bytes(content)
    use(run, backbone)
    if file.name == "checkpoint.safetensors":
        (run / "metrics.json").unlink()
        (run / "prompts.safetensors").unlink()
        with read_or_refused():
            train(RunDirectory(good / "dapt").read_settings(), run, resume=True)


@pytest.mark.fuzz
@fuzzed(30)
@given(st.data())
def test_any_log_of_a_run(good, tmp_path_factory, data):
    run = copy_of(good, "dapt", tmp_path_factory)
    (run / "metrics.json").unlink()
    (run / "log.csv").write_bytes(data.draw(damaged((run / "log.csv").read_bytes())))
    with read_or_refused():
        train(RunDirectory(good / "dapt").read_settings(), run, resume=True)


def test_prompts_of_another_kind_are_refused(good, backbone, tmp_path_factory):
    """Of another method, of no finite numbers, or for another tower."""
    import torch
    from safetensors.torch import load_file, save_file

    run = copy_of(good, "dapt", tmp_path_factory)
    file = run / "prompts.safetensors"
    whole = load_file(file)
    for tensors, said in [
        ({"text_prompt": whole["text_prompt"]}, "does not hold what method 'dapt' learns"),
        ({**whole, "text_prompt": whole["text_prompt"] * float("nan")}, "finite numbers"),
        ({**whole, "text_prompt": whole["text_prompt"][:, :5].contiguous()}, "is 5 wide"),
        ({**whole, "visual_prompt": torch.zeros(0, 64)}, "has shape"),
        ({**whole, "visual_prompt": torch.zeros(1, 64, dtype=torch.int8)}, "finite numbers"),
    ]:
        save_file(tensors, file)
        with pytest.raises(UserError, match=said):
            load_classifier(RunDirectory(run), backbone=backbone)


def test_a_link_for_a_lock_is_not_followed(good, tmp_path_factory, tmp_path):
    run, precious = copy_of(good, "dapt", tmp_path_factory), tmp_path / "precious"
    precious.write_text("kept")
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match=r"\.lock cannot be locked"), RunDirectory(run).locked():
        pass
    assert precious.read_text() == "kept"


# ------------------------------------------------------------------------- packed datasets


def tar_of(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture(scope="module")
def shard(photo_folder):
    pytest.importorskip("webdataset")
    files = []
    for i, image in enumerate(sorted(Path(photo_folder).glob("train/*/*.png"))[::3]):
        files += [(f"{i}.png", image.read_bytes()), (f"{i}.cls", str(i % 2).encode())]
    return tar_of(files)


@pytest.mark.fuzz
@fuzzed(60)
@given(st.data())
def test_any_damaged_shard(shard, tmp_path_factory, data):
    from dapt.data import open_task

    place = tmp_path_factory.getbasetemp() / "shards"
    place.mkdir(exist_ok=True)
    os.environ["DAPT_CACHE"] = str(place / "cache")
    try:
        file = place / "a.tar"
        file.write_bytes(data.draw(damaged(shard)))
        with read_or_refused():
            open_task(str(file))
    finally:
        del os.environ["DAPT_CACHE"]
        shutil.rmtree(place / "cache", ignore_errors=True)


def test_a_tar_that_promises_more_than_it_holds(shard, tmp_path, monkeypatch):
    """A header of a terabyte, as GNU tar's sparse files have."""
    from dapt.data import open_task

    monkeypatch.setenv("DAPT_CACHE", str(tmp_path / "cache"))
    member = tarfile.TarInfo("1.png")
    member.size = 2**40
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(UserError, match="1,099,511,627,776 bytes"):
        open_task(str(tmp_path / "a.tar"))


def test_a_tar_is_not_unpacked_as_what_it_looks_like(tmp_path, monkeypatch):
    """Its first name can be the start of a compressed file, of whatever size that becomes."""
    from dapt.data import open_task

    monkeypatch.setenv("DAPT_CACHE", str(tmp_path / "cache"))
    bomb = gzip.compress(tar_of([("1.png", bytes(2**28))]))
    # The compressed file has a field of 600 bytes first, in which the tar's first header ends.
    header = tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)
    start = bytearray(b"\x1f\x8b\x08\x04" + bytes(6) + struct.pack("<H", 600) + header[12:])
    start[148:156] = b" " * 8
    start[124:136] = b"%011o\0" % 2**20
    start[148:156] = b"%06o\0 " % sum(start)
    content = bytes(start) + bytes(612 - 512) + bomb[10:]
    (tmp_path / "a.tar").write_bytes(content + bytes(2**20 + 10240 - len(content) % 512))
    assert gzip.decompress(content)[:5] == b"1.png"
    with frugal(100), pytest.raises(UserError, match="no images"):
        open_task(str(tmp_path / "a.tar"))


def test_links_in_a_tar_lead_nowhere(shard, photo_folder, tmp_path, monkeypatch):
    """They are no files, so what they point at is no image of any sample."""
    from dapt.data import open_task

    monkeypatch.setenv("DAPT_CACHE", str(tmp_path / "cache"))
    secret = photo_folder / "train" / "blue" / "0.png"
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            with tarfile.open(fileobj=io.BytesIO(shard)) as good:
                for member in good:
                    archive.addfile(member, good.extractfile(member))
            link = tarfile.TarInfo("99.png")
            link.type, link.linkname = kind, str(secret)
            archive.addfile(link)
            label = tarfile.TarInfo("99.cls")
            label.size = 1
            archive.addfile(label, io.BytesIO(b"1"))
        with pytest.raises(UserError, match="sample 99 has no image"):
            open_task(str(tmp_path / "a.tar"))


def test_links_in_a_folder_are_followed(photo_folder, tmp_path):
    from dapt.data import open_task

    (tmp_path / "set").mkdir()
    for folder in (photo_folder / "train").iterdir():
        (tmp_path / "set" / folder.name).symlink_to(folder)
    assert len(open_task(str(tmp_path / "set")).class_names) == 3


def test_a_dataset_may_not_name_files_outside_it(photo_folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from dapt.data import open_task

    monkeypatch.setenv("DAPT_CACHE", str(tmp_path / "cache"))
    secret = tmp_path / "secret.png"
    shutil.copy(photo_folder / "train" / "blue" / "0.png", secret)
    # The library puts images into what it saves; a stranger need not.
    monkeypatch.setattr(datasets.Image, "embed_storage", lambda self, storage, *_, **__: storage)
    rows = {"image": [str(secret)] * 4, "label": ["a", "a", "b", "b"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match="not in the dataset's folder"):
        open_task(str(tmp_path / "set"))


# --------------------------------------------------------------------------------- backbones


@pytest.mark.fuzz
@fuzzed(25)
@given(st.data())
def test_any_damaged_weights(tiny_weights, tmp_path_factory, data):
    from dapt.safe.weights import read_state_dict

    file = tmp_path_factory.getbasetemp() / "weights.safetensors"
    content = tiny_weights.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    start = data.draw(damaged(content[: 8 + length]))
    file.write_bytes(start + content[8 + length :])
    with read_or_refused():
        read_state_dict(file)


def test_a_header_that_promises_more_than_it_holds(tmp_path):
    from dapt.safe.weights import read_state_dict

    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    file = tmp_path / "prompts.safetensors"
    for length in (len(header), 2**63, 2**64 - 1):
        file.write_bytes(struct.pack("<Q", length) + header + bytes(64))
        with pytest.raises(UserError, match="could not be read as weights"):
            read_state_dict(file)


def test_a_header_of_a_hundred_thousand_names(tmp_path):
    """Ten megabytes of names of nothing, for each of which there would be an object."""
    from dapt.safe.weights import read_state_dict

    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": nothing for i in range(100_000)}).encode()
    file = tmp_path / "prompts.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with frugal(20):
        with pytest.raises(UserError, match="its list of tensors has"):
            read_state_dict(file)
        with pytest.raises(UserError, match="its list of tensors has"):
            RunDirectory(tmp_path).read_tensors(file)
