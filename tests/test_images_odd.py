"""Odd and broken images among good ones: each is used rightly, or named, left out and counted."""

import errno
import io
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from patience import LONG
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from dapt.cli import app
from dapt.data import open_image, open_task
from dapt.errors import UserError, printable
from dapt.run.directory import RunDirectory
from dapt.run.train import Target, evaluate_run, train
from dapt.settings import make_settings

RED = (200, 60, 60)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="FIFOs and names of any bytes")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width=40, height=30, mode="RGB"):
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def bomb(side):
    """A PNG whose header promises a large square, of which nothing follows."""
    import struct
    import zlib

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
    return start + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (20, 40), RED), "JPEG", exif=exif)


def frames(kind):
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), "blue")
    return encoded(first, kind, save_all=True, append_images=[second], duration=100, loop=0)


def palette_with_alpha():
    image = Image.new("P", (16, 16))
    image.putpalette([*RED, 0, 0, 0])
    return encoded(image, "PNG", transparency=bytes([128, 255]))


# name -> bytes of a file that is an image, and the size that it has when read
GOOD = {
    "wrong.jpg": (encoded(noise(), "PNG"), (40, 30)),
    "deep.png": (encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"), (9, 9)),
    "cmyk.jpg": (encoded(noise(mode="CMYK"), "JPEG"), (40, 30)),
    "palette.png": (palette_with_alpha(), (16, 16)),
    "moving.gif": (frames("GIF"), (16, 16)),
    "moving.webp": (frames("WEBP"), (16, 16)),
    "rotated.jpg": (rotated(), (40, 20)),
    "dot.png": (encoded(Image.new("RGB", (1, 1), RED), "PNG"), (1, 1)),
    "thin.png": (encoded(Image.new("RGB", (1, 500), RED), "PNG"), (1, 500)),
    "flat.png": (encoded(Image.new("RGB", (900, 1), RED), "PNG"), (900, 1)),
    "new\nline.png": (encoded(noise(), "PNG"), (40, 30)),
    "\x1b[31mred.png": (encoded(noise(), "PNG"), (40, 30)),
    os.fsdecode(b"no-utf8-\xff\xfe.png"): (encoded(noise(), "PNG"), (40, 30)),
}

NAN = np.array([[0.5, np.nan], [1.0, 2.0]], np.float32)
# name -> bytes of a file that is none
BAD = {
    "cut.jpg": encoded(noise(), "JPEG")[:300],
    "cut.png": encoded(noise(), "PNG")[:200],
    "empty.png": b"",
    "text.jpg": b"<html>404 not found</html>",
    "bomb.png": bomb(20_000),  # PIL's own limit
    "large.png": bomb(11_700),  # ours
    "nan.tif": encoded(Image.fromarray(NAN), "TIFF"),
    os.fsdecode(b"cut\n\xff.png"): encoded(noise(), "PNG")[:100],
}
# made of something else than bytes
NO_FILES = ("folder.jpg", "dangling.png", "fifo.png")


def put(folder, name):
    """An odd image of this name in the folder."""
    path = folder / name
    if name == "folder.jpg":
        path.mkdir()
    elif name == "dangling.png":
        path.symlink_to(folder / "nothing.png")
    elif name == "fifo.png":
        os.mkfifo(path)
    else:
        path.write_bytes(GOOD[name][0] if name in GOOD else BAD[name])
    return path


def in_time(work):
    """What ``work()`` gives or raises, or a failure where it hangs; a FIFO may not hang pytest."""
    told = []

    def call():
        try:
            told.append((work(), None))
        except BaseException as error:
            told.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(LONG)
    assert told, "it hangs"
    value, error = told[0]
    if error is not None:
        raise error
    return value


@pytest.mark.parametrize("name", GOOD)
def test_odd_images_are_read(tmp_path, name):
    image = open_image(put(tmp_path, name))
    assert (image.mode, image.size) == ("RGB", GOOD[name][1])
    colour = np.asarray(image)[0, 0].astype(int)
    if name in ("moving.gif", "moving.webp", "rotated.jpg", "dot.png", "thin.png", "flat.png"):
        assert abs(colour - RED).max() < 8
    if name == "palette.png":  # half of it on white
        assert abs(colour - (np.array(RED) + 255) / 2).max() < 3
    if name == "deep.png":
        assert abs(colour - 40_000 / 257).max() <= 1


@pytest.mark.parametrize("name", [*BAD, *NO_FILES])
def test_what_is_no_image_is_named_in_one_line(tmp_path, name):
    path = put(tmp_path, name)
    with pytest.raises(UserError) as caught:
        in_time(lambda: open_image(path))
    said = str(caught.value)
    assert printable(str(path)) in said
    assert said.isprintable()


@pytest.fixture
def given(photo_folder, tiny_weights, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    return photos, {
        "dataset": str(photos),
        "backbone": str(tiny_weights),
        "device": "cpu",
        "shots": 50,
        "epochs": 1,
        "text_vectors": 2,
        "visual_vectors": 1,
    }


def read(run):
    return json.loads(run.metrics_file.read_text())


@pytest.mark.parametrize("where", ["open_regular", "upright_rgb"])
@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "too many"), MemoryError()])
def test_the_machine_is_not_taken_for_a_damaged_image(given, tmp_path, monkeypatch, where, error):
    """No image is left out because there were too few file handles, or too little memory."""
    _, settings = given

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"dapt.data.pictures.{where}", fail)
    with pytest.raises(type(error)):
        train(make_settings(settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("dapt.data.pictures._LARGE", 100)
    place, inside, most = tmp_path / "a.png", [0], [0]
    noise().save(place)

    def slow(image, _grey):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1
        return image.copy()

    monkeypatch.setattr("dapt.data.pictures.upright_rgb", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_image, [place] * 4))
    assert most[0] == 1


def names_of(record):
    return {os.path.basename(entry["image"]) for entry in record}


@pytest.mark.parametrize("method", ["dapt", "linear-probe", "zero-shot"])
def test_a_run_among_odd_images(given, tmp_path, method):
    """What cannot be read is counted; the figures are those of the same folder without it."""
    photos, settings = given
    settings = make_settings({**settings, "method": method})
    for part in ("train", "test"):
        for name in GOOD:
            put(photos / part / "blue", name)
    clean = train(settings, tmp_path / "clean")
    assert read(clean)["support_images"] == 3 * 6 + len(GOOD)
    assert read(clean)["test"]["images"] == 3 * 4 + len(GOOD)
    assert read(clean)["skipped"] == read(clean)["test"]["skipped"] == []

    for part in ("train", "test"):
        for name in (*BAD, *NO_FILES):
            put(photos / part / "green thing", name)
    run = in_time(lambda: train(settings, tmp_path / "run"))
    metrics = read(run)
    assert names_of(metrics["skipped"]) == {*BAD, *NO_FILES}
    assert names_of(metrics["test"]["skipped"]) == {*BAD, *NO_FILES}
    assert all(entry["reason"] for entry in metrics["test"]["skipped"])
    for metric in (metrics, expected := read(clean)):
        metric.pop("skipped")
        metric["test"].pop("skipped")
    assert metrics["support_images"] == expected["support_images"]
    assert metrics["test"]["confusion"] == expected["test"]["confusion"]
    assert run.support_file.read_bytes() == clean.support_file.read_bytes()
    # Images stand elsewhere in their batches, where some CPUs round otherwise.
    learned, expected = (load_file(r.prompts_file) for r in (run, clean))
    assert learned.keys() == expected.keys()
    for name, tensor in learned.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3)

    with pytest.raises(UserError, match="cannot be"):
        in_time(lambda: train(settings.model_copy(update={"strict": True}), tmp_path / "strict"))
    _, found = in_time(lambda: evaluate_run(run, Target()))
    assert names_of(found["skipped"]) == {*BAD, *NO_FILES}
    with pytest.raises(UserError, match="cannot be"):
        in_time(lambda: evaluate_run(run, Target(), strict=True))


def test_a_resumed_run_wants_the_images_it_was_tuned_on(given, tmp_path):
    """An image mended since would make another support set of it."""
    photos, settings = given
    bad = put(photos / "train" / "blue", "cut.png")
    run = train(make_settings(settings), tmp_path / "run")
    run.metrics_file.unlink()
    train(make_settings(settings), run.path, resume=True)
    run.metrics_file.unlink()
    noise().save(bad)
    with pytest.raises(UserError, match="the support set of 'photos' differ"):
        train(make_settings(settings), run.path, resume=True)


def test_a_class_needs_an_image_that_can_be_read(given, tmp_path):
    photos, settings = given
    for file in (photos / "train" / "blue").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no support image of class 'blue' can be read"):
        train(make_settings(settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    shutil.rmtree(photos / "train" / "blue")
    shutil.rmtree(photos / "test" / "blue")
    run = train(make_settings(settings), tmp_path / "run")
    for file in photos.glob("test/*/*"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="nor any other of its 8 test images"):
        evaluate_run(run, Target())


def test_the_command_line_warns_and_counts(given, tmp_path):
    photos, settings = given
    put(photos / "test" / "blue", "new\nline.png").write_bytes(b"no image")
    put(photos / "test" / "blue", "fifo.png")
    run = RunDirectory(tmp_path / "run")
    options = [
        x for s in ("text_vectors", "visual_vectors") for x in ("--set", f"{s}={settings[s]}")
    ]
    command = ["train", str(photos), "-b", settings["backbone"], "--epochs", "1", "-o",
               str(run.path), *options]  # fmt: skip
    result = in_time(lambda: CliRunner().invoke(app, [*command, "--strict"]))
    assert result.exit_code == 2, result.output
    result = in_time(lambda: CliRunner().invoke(app, [*command, "--overwrite"]))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert sum("new\\nline.png cannot be read" in line for line in lines) == 1
    assert any("2 of 14 test images cannot be read and are skipped" in line for line in lines)
    assert read(run)["test"]["images"] == 12
    result = in_time(lambda: CliRunner().invoke(app, ["eval", str(run.path), "--strict"]))
    assert result.exit_code == 2, result.output
    assert in_time(lambda: CliRunner().invoke(app, ["eval", str(run.path)])).exit_code == 0


def test_what_is_skipped_does_not_depend_on_threads(given, tmp_path, monkeypatch):
    photos, settings = given
    for name in (*BAD, *NO_FILES):
        put(photos / "train" / "red_thing", name)
        put(photos / "test" / "blue", name)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr("dapt.data.images.cpu_count", lambda threads=threads: threads)
        run = train(make_settings(settings), tmp_path / str(threads))
        found.append(
            [f.read_bytes() for f in (run.prompts_file, run.metrics_file, run.support_file)]
        )
    assert found[0] == found[1] == found[2]


def test_names_of_any_bytes_survive_a_support_set(given, tmp_path):
    """A name that is no UTF-8 is written as JSON can hold it, and read again as it was."""
    from dapt.data import draw_support_set, load_support_set

    photos, _ = given
    for name in GOOD:
        put(photos / "train" / "blue", name)
    task = open_task(str(photos))
    support = draw_support_set(task, 50, 1)
    file = tmp_path / "set.json"
    support.save(file)
    file.read_bytes().decode("utf-8")
    assert load_support_set(file, task) == support
    assert {os.path.basename(item.path) for item in support.train} >= set(GOOD)
