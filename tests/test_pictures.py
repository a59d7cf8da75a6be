"""Pictures as people have them, and files whose decoding would be out of proportion to them."""

import io
import json
import struct
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from typer.testing import CliRunner

from conftest import jpeg_of_scans
from dapt.cli import app
from dapt.data import ImageStore, Item, Task, decode_image, has_image_name, open_image, open_task
from dapt.data.grey import Extent, scale_for
from dapt.data.images import read_picture, sampled_grey
from dapt.engine.data import grey_of, task_of
from dapt.errors import PictureWarning, UserError
from dapt.estimator import PromptClassifier
from dapt.predict import predict_each
from dapt.run.load import load_classifier
from dapt.run.train import Target, evaluate_run, train
from dapt.settings import make_settings

GREY = np.asarray(Image.effect_noise((48, 40), 200).convert("L"))
MANY = 20_000_000  # bytes of files that are to cost no more than others


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def deep(bits=8, kind="PNG", dtype=np.uint16, grey=GREY):
    """Grey of so many bits that it has 256 values, in a file of more."""
    return encoded(Image.fromarray(grey.astype(dtype) * dtype(2 ** (bits - 8))), kind)


def read(data, **how):
    return decode_image(io.BytesIO(data), "a", **how)


def first(image):
    return np.asarray(image)[..., 0].astype(int)


# -- grey of more than 8 bits ------------------------------------------------------------------


def test_sixteen_bits_are_seen_as_ever():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = (every.astype(np.uint32) + 128) // 257
    for how in ({}, {"grey": (0, 65535)}):
        for kind in ("PNG", "TIFF"):
            assert np.array_equal(
                first(read(encoded(Image.fromarray(every), kind), **how)), expected
            )


@pytest.mark.parametrize(
    ("data", "scale"),
    [
        (deep(10), "0 .. 1023"),
        (deep(12), "0 .. 4095"),
        (deep(14), "0 .. 16383"),
        (deep(12, "TIFF"), "0 .. 4095"),
        (deep(8, "TIFF", np.int32), "0 .. 255"),
        (deep(12, "TIFF", np.int32), "0 .. 4095"),
        (encoded(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"), "0 .. 1"),
        (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "0 .. 255"),
        (deep(20, "TIFF", np.int32), None),
        (encoded(Image.fromarray(GREY.astype(np.int32) * 16 - 1024), "TIFF"), None),
        (encoded(Image.fromarray(GREY.astype(np.float32) / 9 + 273), "TIFF"), None),
    ],
)  # fmt: skip
def test_a_lone_grey_picture_is_seen_by_its_own_values_which_is_told(data, scale):
    with pytest.warns(PictureWarning, match=f"seen from {scale or ''}"):
        seen = first(read(data))
    low, high = (GREY.min(), GREY.max()) if scale is None else (0, 255)
    assert np.abs(seen - (GREY - float(low)) * 255 / (high - low)).max() <= 1


def test_a_scale_is_the_fewest_bits_that_hold_what_is_used():
    def scale(low, high, whole=True):
        return scale_for([Extent(0, 0, whole), Extent(low, high, whole)])

    assert scale_for([]) is None
    for high, white in ((255, 255), (256, 1023), (4000, 4095), (16383, 16383), (16384, 65535)):
        assert scale(0, high) == (0, white)
    assert scale(0, 3) == (0, 3), "a drawing of labels"
    assert scale(0, 70_000) == (0, 70_000)
    assert scale(-1024, 3071) == (-1024, 3071)
    assert scale(0, 0.9, False) == (0, 1)
    assert scale(0, 200.5, False) == (0, 255)
    assert scale(0, 1e-3, False) == (0, 1e-3)
    assert scale(0, 0) == (0, 1)


def test_what_is_outside_the_scale_is_black_or_white_and_told():
    with pytest.warns(PictureWarning, match="outside the grey_range 1000 .. 2000"):
        seen = first(read(deep(12), grey=(1000, 2000)))
    expected = ((GREY * 16.0 - 1000) * 255 / 1000).clip(0, 255)
    assert np.abs(seen - expected).max() <= 1


def test_eight_bits_are_never_scaled():
    for kind in ("PNG", "TIFF", "BMP"):
        data = encoded(Image.fromarray(GREY), kind)
        assert np.array_equal(first(read(data, grey=(0, 4095))), GREY)


def grey_folder(place, bits, dark=()):
    """Bright and dark pictures of so many bits; in ``dark`` parts none is bright."""
    generator = np.random.default_rng(1)
    for part in ("train", "test"):
        for k, name in enumerate(("dim", "lit")):
            folder = place / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                top = 60 if part in dark else 120 + 130 * k
                values = generator.integers(top // 2, top, (24, 24)).astype(np.uint16)
                values = values * 2 ** (bits - 8) if bits > 8 else values.astype(np.uint8)
                Image.fromarray(values).save(folder / f"{i}.png")
    return place


def settings_of(folder, weights, **more):
    given = {"dataset": str(folder), "backbone": str(weights), "device": "cpu", "shots": 2,
             "method": "linear-probe"}  # fmt: skip
    return make_settings({**given, **more})


def test_training_test_prediction_and_export_have_one_scale(tiny_weights, tmp_path, capsys):
    """That of train images, though test images use fewer bits; and the figures are of 8 bits."""
    from dapt.progress import RichReporter

    found = {}
    for bits in (8, 12):
        folder = grey_folder(tmp_path / str(bits), bits, dark=("test",))
        run = train(settings_of(folder, tiny_weights), tmp_path / f"run{bits}",
                    reporter=RichReporter())  # fmt: skip
        classifier = load_classifier(run)
        paths = sorted((folder / "test").rglob("*.png"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found[bits] = [one.classes for one in predict_each(classifier, paths, top=2)]
        assert evaluate_run(run, Target())[1] == json.loads(run.metrics_file.read_text())["test"]
        assert json.loads(run.task_file.read_text()).get("grey_range") == (
            [0, 4095] if bits == 12 else None
        )
    assert "seen from 0 .. 4095" in " ".join(capsys.readouterr().err.split())
    for one, other in zip(found[8], found[12], strict=True):
        assert dict(one) == pytest.approx(dict(other), abs=0.02)


def test_a_setting_takes_another_scale(tiny_weights, tmp_path):
    folder = grey_folder(tmp_path / "photos", 12)
    assert task_of(settings_of(folder, tiny_weights)).grey == (0, 4095)
    for given in ("0,8191", [0, 8191]):
        settings = settings_of(folder, tiny_weights, grey_range=given)
        assert task_of(settings).grey == (0, 8191)
    run = train(settings, tmp_path / "run")
    assert load_classifier(run).grey == (0, 8191)
    assert train(settings, run.path, resume=True).finished
    for wrong in ("5,5", "5", [9, 1], [0, float("inf")], True, "a,b"):
        with pytest.raises(UserError, match="grey_range"):
            settings_of(folder, tiny_weights, grey_range=wrong)


def test_a_damaged_record_of_the_scale_is_told(tiny_weights, tmp_path):
    folder = grey_folder(tmp_path / "photos", 12)
    run = train(settings_of(folder, tiny_weights), tmp_path / "run")
    task = json.loads(run.task_file.read_text())
    for wrong in ([9, 1], [0], "0,9", [0, None]):
        run.task_file.write_text(json.dumps({**task, "grey_range": wrong}))
        with pytest.raises(UserError, match=r"task\.json is damaged"):
            load_classifier(run)


def test_the_scale_is_never_chosen_on_test_images(tiny_weights, tmp_path):
    folder = grey_folder(tmp_path / "photos", 10)
    bright = np.full((24, 24), 60_000, np.uint16)
    Image.fromarray(bright).save(folder / "test" / "lit" / "9.png")
    assert task_of(settings_of(folder, tiny_weights)).grey == (0, 1023)


def test_pictures_in_memory_have_one_scale_too(tiny_weights):
    images = [Image.fromarray(np.full((8, 8), v, np.uint16)) for v in (400, 900, 3000, 3900)]
    assert sampled_grey(images) == (0, 4095)
    rows = [{"image": encoded(image, "PNG")} for image in images]
    assert sampled_grey(rows) == sampled_grey([(image, 1) for image in images]) == (0, 4095)
    assert np.asarray(read_picture(rows[0], (0, 4095)))[0, 0, 0] == round(400 * 255 / 4095)
    fitted = PromptClassifier(backbone=str(tiny_weights), method="linear-probe", device="cpu")
    fitted.fit(images, ["dark", "dark", "lit", "lit"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fitted.predict(images).tolist() == ["dark", "dark", "lit", "lit"]


def test_a_sample_opens_few_files(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("dapt.data.images.grey_extent", lambda path: opened.append(path))
    items = tuple(Item(str(i), 0, "a") for i in range(10_000))
    assert grey_of(Task("a", tmp_path, ("a",), items, (), ())) is None
    assert 32 < len(opened) <= 64


# -- what lies beside the pixels ---------------------------------------------------------------

PNG = encoded(Image.fromarray(GREY).convert("RGB"), "PNG")


def chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def with_chunks(*chunks, png=PNG):
    return png[:33] + b"".join(chunks) + png[33:]


LARGE = zlib.compress(b"x" * 2_000_000)


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE)],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * 2_000_000)],
        [chunk(b"zTXt", b"notes\0\0" + LARGE)],
        [chunk(b"tEXt", b"notes\0" + b"x" * 2_000_000)],
        [chunk(b"iCCP", b"icc\0\0" + LARGE)],
        [chunk(b"zTXt", b"notes\0\0" + zlib.compress(b"x" * 999_999))] * 80,
        [chunk(b"zTXt", b"Raw profile type exif\0\0" + LARGE)],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0damaged")],
        [chunk(b"eXIf", b"MM\0*" + b"\xff" * 3_000_000)],
    ],
)
def test_a_png_is_read_whatever_lies_beside_its_pixels(chunks):
    assert np.array_equal(first(read(with_chunks(*chunks))), GREY)
    after = PNG[:-12] + b"".join(c for c in chunks if c[4:8] != b"iCCP") + PNG[-12:]
    assert np.array_equal(first(read(after)), GREY)


def test_what_says_which_side_is_up_is_kept():
    said = b'<x tiff:Orientation="6"/>'
    for text in (said, said + b" " * 2_000_000):
        packed = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(text))
        plain = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text)
        for one in (packed, plain):
            assert read(with_chunks(one)).size == (40, 48)
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = "\nexif\n      26\n" + exif.tobytes().hex()
    assert (
        read(with_chunks(chunk(b"tEXt", b"Raw profile type exif\0" + raw.encode()))).size[0] == 40
    )
    jpeg = encoded(Image.fromarray(GREY), "JPEG", exif=exif)
    much = jpeg[:2] + segment(0xE5, b"x" * 60_000) * 90 + jpeg[2:]
    assert np.array_equal(read(much), read(jpeg))
    assert read(much).size == (40, 48)


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def box(kind, data=b""):
    return struct.pack(">I", 8 + len(data)) + kind + data


def filled(start, piece, end, size=MANY):
    return start + piece * (size // len(piece)) + end


JPEG = encoded(Image.fromarray(GREY), "JPEG")
RGB = Image.fromarray(GREY).convert("RGB")


def tiff_of(*entries, tail=b""):
    """A TIFF with these tags too, (tag, type, count, place); ``tail`` begins where it ends."""
    whole = bytearray(encoded(Image.fromarray(GREY), "TIFF"))
    place = struct.unpack("<I", whole[4:8])[0]
    count = struct.unpack("<H", whole[place : place + 2])[0]
    tags = whole[place + 2 : place + 2 + 12 * count]
    whole[4:8] = struct.pack("<I", len(whole))
    end = len(whole) + 6 + len(tags) + 12 * len(entries)
    tags += b"".join(struct.pack("<HHII", *e[:3], end if e[3] is None else e[3]) for e in entries)
    return bytes(whole + struct.pack("<H", count + len(entries)) + tags + bytes(4) + tail)


def out_of_proportion():
    """Files of 20 MB that would keep a decoder at work, by what they are made of."""
    yield "small Exif", filled(JPEG[:2], segment(0xE1, b"Exif\0\0AAAA"), JPEG[2:])
    yield "large Exif", filled(JPEG[:2], segment(0xE1, b"Exif\0\0" + bytes(65_000)), JPEG[2:])
    yield "empty APP", filled(JPEG[:2], segment(0xE7, b""), JPEG[2:])
    yield "comments", filled(JPEG[:2], segment(0xFE, b"a"), JPEG[2:])
    yield "XMP", filled(JPEG[:2], segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0a"), JPEG[2:])
    yield "profiles", filled(JPEG[:2], segment(0xE2, b"ICC_PROFILE\0\1\1a"), JPEG[2:])
    yield (
        "Photoshop",
        filled(
            JPEG[:2], segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000), JPEG[2:]
        ),
    )
    yield "fill bytes", filled(JPEG[:2], b"\xff", JPEG[2:])
    yield "starts", filled(JPEG[:2], b"\xff\xd8", JPEG[2:])
    yield "extensions", filled(JPEG[:2], b"\xff\xf0", JPEG[2:])
    yield "tables", filled(JPEG[:2], segment(0xDB, (b"\0" + b"\1" * 64) * 1000), JPEG[2:])
    yield "comments after", filled(JPEG[:-2], segment(0xFE, b""), JPEG[-2:])
    yield "texts", filled(PNG[:33], chunk(b"tEXt", b"a\0b"), PNG[33:])
    packed = zlib.compress(bytes(1_000_000))
    yield "packed texts", filled(PNG[:33], chunk(b"zTXt", b"a\0\0" + packed), PNG[33:])
    yield (
        "packed XMP",
        filled(PNG[:33], chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed), PNG[33:]),
    )
    yield "packed profiles", filled(PNG[:33], chunk(b"iCCP", b"a\0\0" + packed), PNG[33:])
    yield "empty pixels", filled(PNG[:-12], chunk(b"IDAT", b""), PNG[-12:])
    yield "unknown chunks", filled(PNG[:33], chunk(b"abCd", b""), PNG[33:])
    gif = encoded(RGB.quantize(16), "GIF")
    at = 13 + (6 << (gif[10] & 7))
    yield "GIF comment", filled(gif[:at] + b"!\xfe", b"\1a", b"\0" + gif[at:])
    yield "GIF comments", filled(gif[:at], b"!\xfe\0", gif[at:])
    yield "GIF long comment", filled(gif[:at] + b"!\xfe", b"\xff" + b"a" * 255, b"\0" + gif[at:])
    yield "GIF junk", filled(gif[:at], b"\0", gif[at:])
    webp = encoded(RGB, "WEBP")[12:]
    wide = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\x2f\0\0" + b"\x27\0\0"
    body = filled(b"WEBP" + wide + webp, b"abcd\0\0\0\0", b"")
    yield "WebP", b"RIFF" + struct.pack("<I", len(body)) + body
    yield "TIFF rationals", tiff_of((60_000, 5, MANY // 8, 8), tail=bytes([1, 0, 0, 0]) * 5_000_000)
    deeper = struct.pack("<HHHII", 1, 60_000, 5, MANY // 8, 8) + bytes(4)
    yield "TIFF camera tags", tiff_of((34665, 4, 1, None), tail=deeper + b"\1\0\0\0" * 5_000_000)
    same = [(40_000 + i, 7, MANY, 8) for i in range(3000)]
    yield "TIFF same places", tiff_of(*same, tail=bytes(MANY))
    if "AVIF" in Image.SAVE:
        avif = encoded(RGB, "AVIF")
        meta = avif.index(b"meta") - 4
        length = struct.unpack(">I", avif[meta : meta + 4])[0]
        inside = filled(avif[meta + 8 : meta + length], box(b"abcd"), b"")
        yield "AVIF boxes", avif[:meta] + box(b"meta", inside) + avif[meta + length :]
        yield "AVIF top boxes", filled(avif[:meta], box(b"free"), avif[meta:])
        items = filled(b"\0\0\0\0\xff\xff", box(b"infe", b"\2\0\0\0\0\1\0\0abcd\0"), b"")
        inside = box(b"iinf", items) + avif[meta + 12 : meta + length]
        yield "AVIF items", avif[:meta] + box(b"meta", bytes(4) + inside) + avif[meta + length :]


@pytest.mark.filterwarnings("ignore")
def test_no_file_costs_more_than_its_pixels():
    """Read or refused, each at once: of processor time, for other programs may be at work."""
    for name, data in out_of_proportion():
        started, size, said = time.process_time(), None, ""
        try:
            size = read(data).size
        except UserError as error:
            said = str(error)
        assert time.process_time() - started < 5, name  # 0.2 where nothing else computes
        refused = any(more in said for more in ("has more than", "hold more than", "more boxes"))
        assert size == (48, 40) or refused, (name, said)


def test_scans_count_by_the_pixels_that_each_goes_over():
    assert read(jpeg_of_scans(200)).size == (16, 16)
    start, marker, scan = encoded(
        Image.new("L", (5000, 4000)), "JPEG", progressive=True
    ).rpartition(b"\xff\xda")
    with pytest.raises(UserError, match="scans over 20,000,000 pixels"):
        read(start + (marker + scan[:-2]) * 200 + b"\xff\xd9")


def test_run_lengths_decoded_in_python_are_bounded():
    def bmp(width, height):
        body = (b"\2\7" * (width // 2) + b"\0\0") * height + b"\0\1"
        head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
        colours = b"".join(bytes([i, i, i, 0]) for i in range(256))
        return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + head + colours + body

    assert np.asarray(read(bmp(40, 30)))[0, 0].tolist() == [7] * 3
    with pytest.raises(UserError, match="run-length encoded"):
        read(bmp(4000, 3000))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_ordinary_files_go_to_the_decoder_as_they_are(kind):
    from dapt.safe.pictures import bounded

    file = io.BytesIO(encoded(RGB, kind))
    assert bounded(file).file is file


# -- colours -----------------------------------------------------------------------------------


def profile_of(primaries, gamma=2.2):
    """A small matrix profile of RGB, of these (x, y) of red, green and blue, white of D50."""
    white = np.array([0.9642, 1.0, 0.8249])
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    columns = xyz * np.linalg.solve(xyz, white)

    def numbers(*values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"a\0" + bytes(78)
    tags = {b"desc": text, b"wtpt": numbers(*white), b"rXYZ": numbers(*columns[:, 0]),
            b"gXYZ": numbers(*columns[:, 1]), b"bXYZ": numbers(*columns[:, 2]), b"rTRC": curve,
            b"gTRC": curve, b"bTRC": curve, b"cprt": b"text\0\0\0\0a\0"}  # fmt: skip
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4sI4s4s4s", at + len(body), bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ "
    )
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    head += struct.pack(">3i", *(round(v * 65536) for v in white))
    return head.ljust(128, b"\0") + table + body


WIDE = profile_of([(0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)], 1.8)  # as ProPhoto
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MUTED = Image.merge("RGB", [Image.fromarray(GREY // 4 + k) for k in (60, 90, 120)])


def meant():
    """MUTED's colours by the wide profile, in sRGB."""
    wide = ImageCms.ImageCmsProfile(io.BytesIO(WIDE))
    return ImageCms.profileToProfile(MUTED, wide, ImageCms.createProfile("sRGB"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_colours_are_those_that_the_profile_means(kind):
    how = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    seen = read(encoded(MUTED, kind, icc_profile=WIDE, **how))
    moved = np.abs(np.asarray(seen).astype(int) - np.asarray(meant()))
    assert moved.mean() < 3 if kind == "JPEG" else moved.max() == 0
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(MUTED)).max() > 15


def test_transparent_and_few_colours_have_a_profile_too():
    half = MUTED.copy()
    half.putalpha(128)
    seen = np.asarray(read(encoded(half, "PNG", icc_profile=WIDE))).astype(int)
    assert np.abs(seen - (np.asarray(meant()) * 128.0 + 255 * 127) / 255).max() <= 1
    flat = Image.new("RGB", (8, 8), MUTED.getpixel((0, 0)))
    seen = read(encoded(flat.quantize(4), "PNG", icc_profile=WIDE))
    assert np.abs(np.array(seen.getpixel((0, 0))) - meant().getpixel((0, 0))).max() <= 1


@pytest.mark.parametrize(
    "profile",
    [SRGB, b"none", WIDE[:200], WIDE + b"mpet", b"x" * 300_000],
    ids=["sRGB", "a word", "cut", "of unknown kind", "large"],  # their bytes tell the time
)
def test_srgb_and_what_is_no_profile_change_nothing(profile):
    for kind in ("PNG", "JPEG"):
        plain, with_it = (encoded(MUTED, kind, **k) for k in ({}, {"icc_profile": profile}))
        assert np.array_equal(read(plain), read(with_it))


def test_a_large_profile_of_a_png_is_honoured():
    padded = WIDE + bytes(2_000_000)
    padded = struct.pack(">I", len(padded)) + padded[4:]
    data = with_chunks(chunk(b"iCCP", b"a\0\0" + zlib.compress(padded)), png=encoded(MUTED, "PNG"))
    assert np.array_equal(read(data), meant())


# -- extras ------------------------------------------------------------------------------------


def heic():
    return box(b"ftyp", b"heic\0\0\0\0mif1heic") + box(b"meta", bytes(40))


@pytest.mark.parametrize(
    ("module", "name", "data", "extra"),
    [
        ("pillow_heif", "a.heic", heic(), "pillow-heif: pip install 'dapt-clip[heic]'"),
        (
            "pydicom",
            "a.dcm",
            bytes(128) + b"DICM" + bytes(64),
            "pydicom: pip install 'dapt-clip[dicom]'",
        ),
    ],
)
def test_what_takes_an_extra_names_it(tmp_path, monkeypatch, module, name, data, extra):
    from dapt.data import pictures

    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    for known in (pictures._formats, pictures._dicom_names):
        known.cache_clear()
    monkeypatch.setattr(Image, "ID", [i for i in Image.ID if i != "HEIF"])
    try:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as caught:
            open_image(tmp_path / name)
        assert extra in str(caught.value)
        assert not has_image_name(name)
        for k in range(2):
            (tmp_path / "photos" / str(k)).mkdir(parents=True)
            for i in range(2):
                RGB.save(tmp_path / "photos" / str(k) / f"{i}.png")
            (tmp_path / "photos" / str(k) / name).write_bytes(data)
        (note,) = open_task(str(tmp_path / "photos")).notes
        assert extra in note
        (tmp_path / "only").mkdir()
        (tmp_path / "only" / name).write_bytes(data)
        result = CliRunner().invoke(app, ["predict", str(tmp_path), str(tmp_path / "only")])
        assert result.exit_code == 2
    finally:
        for known in (pictures._formats, pictures._dicom_names):
            known.cache_clear()


def test_heic_is_read_where_its_extra_is_there(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(RGB.resize((96, 80))).save(tmp_path / "a.heic", quality=95)
    assert has_image_name("a.HEIC")
    seen = open_image(tmp_path / "a.heic")
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(RGB.resize((96, 80)))).mean() < 8


@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1", "hounsfield"])
def test_dicom_is_read_where_its_extra_is_there(tmp_path, kind):
    pydicom = pytest.importorskip("pydicom")
    values = GREY.astype(np.uint16) * 16
    about = pydicom.dataset.FileMetaDataset()
    about.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    about.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    about.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file = pydicom.dataset.FileDataset("a", {}, file_meta=about, preamble=bytes(128))
    file.Rows, file.Columns = values.shape
    file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit = 1, 16, 12, 11
    file.PixelRepresentation = 0
    file.PhotometricInterpretation = "MONOCHROME1" if kind == "MONOCHROME1" else "MONOCHROME2"
    if kind == "hounsfield":
        file.RescaleSlope, file.RescaleIntercept = 1, -1024
    file.PixelData = (4095 - values if kind == "MONOCHROME1" else values).tobytes()
    file.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    grey = (-1024, 3071) if kind == "hounsfield" else (0, 4095)
    assert np.abs(first(open_image(tmp_path / "a.dcm", grey)) - GREY * 16.0 * 255 / 4095).max() <= 1
    assert has_image_name("a.dcm")
    store = ImageStore([str(tmp_path / "a.dcm")], size=8, grey=grey)
    assert store.test_views([0]).float().mean().item() == pytest.approx(GREY.mean(), abs=8)
