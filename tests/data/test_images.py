"""Reading images of every kind, and views that depend on nothing but what they should."""

import io
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from patience import until
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from conftest import fuzzed, jpeg_of_scans, tiff_of_a_tile
from dapt.data import (
    Allowance,
    BadImage,
    ImageStore,
    TooManyPixels,
    centre_view,
    decode_image,
    has_image_name,
    open_image,
    pictures,
)
from dapt.data import images as images_module
from dapt.data.images import InputError, read_picture
from dapt.data.views import crop_box, train_view
from dapt.errors import UserError, printable


def noise(width, height, seed=0):
    """A smooth but busy RGB image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images of various shapes."""
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for i in range(12):
        paths.append(folder / f"{i}.png")
        noise(30 + 7 * i, 90 - 5 * i, seed=i).save(paths[-1])
    return paths


# -- one file --------------------------------------------------------------------------------


def is_close(image, colour, tolerance=2):
    """Whether a flat image has ``colour``."""
    return np.abs(np.asarray(image).astype(int) - colour).max() <= tolerance


def saved(image, path, **options):
    image.save(path, **options)
    return open_image(path)


def test_rgb_is_read_as_it_is(tmp_path):
    image = noise(9, 7)
    assert np.array_equal(saved(image, tmp_path / "a.png"), image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste("red", (0, 0, 20, 12))
    upright.paste("blue", (20, 0, 40, 12))
    # How a camera held that way stores it: the inverse of what a viewer does.
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright
    if orientation != 1:
        viewer = pictures._UPRIGHT[orientation]
        stored = upright.transpose(undo.get(orientation, viewer))
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = saved(stored, tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    assert read.size == (40, 24)
    assert is_close(read.crop((2, 2, 18, 10)), (255, 0, 0), 12)
    assert is_close(read.crop((22, 2, 38, 10)), (0, 0, 255), 12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_costs_nothing(tmp_path):
    image = saved(Image.new("RGB", (8, 8), "red"), tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*garbage")
    assert is_close(image, (255, 0, 0), 4)


def test_grey_of_every_depth(tmp_path):
    assert is_close(saved(Image.new("L", (4, 4), 77), tmp_path / "8.png"), (77,) * 3, 0)
    assert is_close(saved(Image.new("1", (4, 4), 1), tmp_path / "1.png"), (255,) * 3, 0)
    for suffix in ("png", "tif"):
        wide = Image.fromarray(np.array([[0, 128, 129, 32768], [65535] * 4], dtype=np.uint16))
        values = np.asarray(saved(wide, tmp_path / f"16.{suffix}"))
        assert values[..., 0].tolist() == [[0, 0, 1, 128], [255] * 4]
    big = Image.fromarray(np.full((4, 4), 51400, dtype=np.int32))
    assert is_close(saved(big, tmp_path / "32.tif"), (200,) * 3, 0)
    # As Pillow before 11 could not write it: big-endian, after a header of text.
    (tmp_path / "16.pgm").write_bytes(b"P5 4 2 65535\n" + np.asarray(wide, dtype=">u2").tobytes())
    assert np.asarray(open_image(tmp_path / "16.pgm"))[1, 0].tolist() == [255] * 3


def test_grey_without_numbers_is_refused(tmp_path):
    for value in (np.nan, np.inf):
        Image.fromarray(np.full((4, 4), value, dtype=np.float32)).save(tmp_path / "f.tif")
        with pytest.raises(
            UserError, match=r"f\.tif cannot be read: it has values that are no num"
        ):
            open_image(tmp_path / "f.tif")


def test_transparency_is_laid_on_white(tmp_path):
    assert is_close(
        saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), tmp_path / "a.png"), (255,) * 3
    )
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert is_close(saved(half, tmp_path / "b.webp", lossless=True), (255, 127, 127))
    assert is_close(saved(Image.new("LA", (4, 4), (0, 128)), tmp_path / "c.png"), (127,) * 3)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 200, 0])
    assert is_close(saved(palette, tmp_path / "d.png"), (0, 200, 0))
    assert is_close(saved(palette, tmp_path / "e.png", transparency=1), (255,) * 3)
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    assert is_close(saved(keyed, tmp_path / "f.png", transparency=(1, 2, 3)), (255,) * 3)


def test_cmyk(tmp_path):
    read = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=95)
    assert read.mode == "RGB"
    assert is_close(read, (255, 0, 0), 8)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_give_their_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    assert is_close(open_image(path), (255, 0, 0), 8)


def refused(path, message):
    with pytest.raises(UserError) as error:
        open_image(path)
    assert printable(str(path)) in str(error.value)
    assert message in str(error.value)


def test_what_cannot_be_read(tmp_path, monkeypatch):
    refused(tmp_path / "none.png", "does not exist")
    refused(tmp_path, "cannot be opened")
    refused(f"{tmp_path}/a\0b.png", "cannot be opened")
    (tmp_path / "empty.jpg").touch()
    refused(tmp_path / "empty.jpg", "the file is empty")
    (tmp_path / "text.jpg").write_text("no image")
    refused(tmp_path / "text.jpg", "not an image in a known format")
    for suffix in ("png", "jpg", "webp", "tif", "bmp"):
        content = io.BytesIO()
        noise(50, 50).save(content, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
        refused(cut, "cannot be read")
    noise(50, 50).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused(tmp_path / "bomb.png", "decompression bomb")


@pytest.mark.parametrize(("side", "limit"), [(400, {"max_pixels": 100_000}), (19_000, {})])
def test_a_tiffs_tiles_count_as_pixels(side, limit, monkeypatch):
    """100 x 100 pixels in one tile: libtiff would decode all of it."""
    file = io.BytesIO(tiff_of_a_tile(side))
    monkeypatch.setattr(Image.Image, "load", None)  # nothing may be decoded
    with pytest.raises(TooManyPixels, match=f"a tile of {side:,} x {side:,} pixels"):
        decode_image(file, "a.tif", **limit)


def test_a_jpeg_of_scans_without_end_is_refused(tmp_path):
    """Each takes the time of the whole image; what only looks like one costs nothing."""
    (tmp_path / "bomb.jpg").write_bytes(jpeg_of_scans(300))
    refused(tmp_path / "bomb.jpg", "it has more than 256 scans")
    (tmp_path / "film.jpg").write_bytes(jpeg_of_scans(20) + b"\xff\xda\0\2" * 300)
    assert open_image(tmp_path / "film.jpg").size == (16, 16)
    saved(noise(9, 9), tmp_path / "said.jpg", comment=b"\xff\xda\0\2" * 300)


def test_postscript_is_not_run(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    refused(tmp_path / "a.eps", "not an image in a known format")
    assert not has_image_name("a.eps")


@pytest.mark.fuzz
@fuzzed(100)
@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "GIF", "BMP"]), st.integers(0, 200))
def test_damaged_bytes_are_read_or_refused(noise_bytes, kind, place):
    content = io.BytesIO()
    Image.new("RGB", (6, 6), "red").save(content, kind)
    content = content.getvalue()
    damaged = content[:place] + noise_bytes + content[place + len(noise_bytes) :]
    try:
        assert decode_image(io.BytesIO(damaged), "upload").mode == "RGB"
    except UserError as error:
        assert re.match("image upload (cannot be read: |has )", str(error))  # noqa: PT017


def test_names_of_images():
    for name in ("a.jpg", "b.JPEG", "c.png", "d.WebP", "e.tif", "f.gif", "g.bmp"):
        assert has_image_name(name)
    for name in (".a.jpg", "b.txt", "c.pdf", "jpg", "d.h5"):
        assert not has_image_name(name)


# -- views -----------------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 48))
def test_centre_view_is_torchvisions(width, height, size):
    short, long = sorted((width, height))
    if long > 16 * short:
        return  # see test_long_strips
    image = noise(width, height)
    theirs = transforms.Compose(
        [
            transforms.Resize(size, InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
        ]
    )(image)
    assert np.array_equal(centre_view(image, size), theirs)


def test_squash_is_torchvisions():
    image = noise(50, 30)
    theirs = transforms.Resize((24, 24), InterpolationMode.BILINEAR)(image)
    ours = centre_view(image, 24, interpolation="bilinear", resize_mode="squash")
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("size", [(2, 200_000), (200_000, 2)])
def test_long_strips_do_not_fill_the_memory(size):
    image = Image.new("RGB", size, "red")
    image.paste("blue", (0, 0, size[0] // 4, size[1] // 4))
    view = centre_view(image, 224)
    assert view.size == (224, 224)
    assert is_close(view, (255, 0, 0))


@given(st.integers(1, 500), st.integers(1, 500), st.integers())
def test_crops_lie_inside(width, height, seed):
    left, top, right, bottom = crop_box(width, height, random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_are_distributed_as_torchvisions():
    image = Image.new("RGB", (300, 200))
    generator = random.Random(0)
    ours = np.array([crop_box(300, 200, generator) for _ in range(4000)], dtype=float)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get = transforms.RandomResizedCrop.get_params
        theirs = np.array(
            [get(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)], dtype=float
        )
    top, left, height, width = theirs.T
    theirs = np.stack([left, top, left + width, top + height], 1)
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.abs(np.quantile(ours, q, 0) - np.quantile(theirs, q, 0)).max() < 10


def test_views_are_mirrored_half_the_time():
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 16, 32))
    views = [np.asarray(train_view(image, 8, random.Random(i))).astype(int) for i in range(400)]
    darker_right = sum(v[:, 7].mean() < v[:, 0].mean() for v in views)
    darker_left = sum(v[:, 7].mean() > v[:, 0].mean() for v in views)
    assert 0.4 < darker_right / (darker_left + darker_right) < 0.6


# -- stores ----------------------------------------------------------------------------------


def train_views(store, indices, *, seed, epoch):
    return next(store.train_batches([(epoch, indices)], seed=seed))


def test_test_views(photos):
    store = ImageStore(photos, size=24)
    views = store.test_views([3, 0, 3])
    assert views.shape == (3, 3, 24, 24)
    assert views.dtype == torch.uint8
    assert views.is_contiguous()
    expected = np.asarray(centre_view(open_image(photos[0]), 24)).transpose(2, 0, 1)
    assert np.array_equal(views[1], expected)
    assert torch.equal(views[0], views[2])
    assert len(store) == 12


def test_train_views_depend_on_seed_epoch_and_index_alone(photos):
    plain = ImageStore(photos, size=24, threads=1)
    reference = train_views(plain, range(12), seed=1, epoch=2)
    assert torch.equal(reference, train_views(plain, range(12), seed=1, epoch=2))
    for threads, kept in ((4, 2**30), (1, 0), (3, 40_000)):
        store = ImageStore(photos, size=24, threads=threads, allowance=Allowance(kept))
        order = random.Random(0).sample(range(12), 12)
        batches = [order[i : i + 5] for i in range(0, 12, 5)]
        for _ in range(2):
            wanted = [(2, batch) for batch in batches]
            views = torch.cat(list(store.train_batches(wanted, seed=1)))
            assert torch.equal(views, reference[order])
    epochs = list(plain.train_batches([(2, [5]), (3, [5])], seed=1))
    assert torch.equal(epochs[0][0], reference[5])
    assert not torch.equal(epochs[1][0], reference[5])
    for seed, epoch in ((2, 2), (1, 3), (2, 1)):
        other = train_views(plain, range(12), seed=seed, epoch=epoch)
        assert all(not torch.equal(a, b) for a, b in zip(reference, other, strict=True))
    same = train_views(ImageStore([photos[0]] * 2, size=24), [0, 1], seed=1, epoch=2)
    assert not torch.equal(same[0], same[1])


def test_crops_never_change():
    """Across processes, machines and versions: a resumed run must go on with the same views."""
    boxes = [crop_box(300, 200, random.Random(f"1/{epoch}/7")) for epoch in range(3)]
    assert boxes == [(47, 0, 259, 189), (60, 41, 182, 190), (127, 67, 244, 191)]


def test_global_generators_are_left_alone(photos):
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train_views(ImageStore(photos, size=24), range(12), seed=1, epoch=2)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_memory_budget(photos, monkeypatch):
    opened = []
    reader = images_module.open_image
    monkeypatch.setattr(images_module, "open_image", lambda p, _: opened.append(p) or reader(p))
    sizes = [4 * np.prod(Image.open(p).size) for p in photos]
    allowance = Allowance(int(sum(sizes[:4])))
    store = ImageStore(photos, size=8, allowance=allowance, threads=1)
    assert not opened
    for _ in range(3):
        store.test_views(range(12))
    assert len(opened) == 12 + 2 * 8
    assert allowance.used == sum(sizes[:4])
    other = ImageStore(photos, size=8, allowance=allowance, threads=1)
    other.test_views(range(12))
    assert allowance.used == sum(sizes[:4])  # shared by all
    store.forget()
    assert allowance.used == 0
    opened.clear()
    store = ImageStore(photos, size=8, allowance=Allowance(2**30))
    for _ in range(3):
        store.test_views(range(12))
    assert len(opened) == 12


def test_batches_run_ahead(photos, monkeypatch):
    store, made = ImageStore(photos, size=8, threads=1), []
    monkeypatch.setattr(store, "image", lambda i: made.append(i) or open_image(photos[i]))
    batches = store.batches([[i] for i in range(12)], prefetch=3)
    assert not made
    next(batches)
    until(lambda: len(made) >= 4)
    assert made == [0, 1, 2, 3]
    batches.close()
    assert made == [0, 1, 2, 3]
    assert list(store.batches([])) == []
    assert [len(b) for b in store.batches([[0, 1], [2]], prefetch=0)] == [2, 1]


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("dapt-images")]


def test_a_consumer_may_leave(photos):
    store = ImageStore(photos, size=8)
    for _ in store.batches([[i] for i in range(12)]):
        assert threads()
        break
    assert not threads()


def test_bad_images_are_reported_in_order(photos, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    paths = [*photos[:5], tmp_path / "bad.png", tmp_path / "none.png", *photos[5:]]
    batches = ImageStore(paths, size=8).batches([[i] for i in range(14)], prefetch=9)
    assert [len(next(batches)) for _ in range(5)] == [1] * 5
    with pytest.raises(UserError, match=r"bad\.png"):
        next(batches)
    assert not threads()
    with pytest.raises(UserError, match=r"none\.png does not exist"):
        ImageStore(paths, size=8).test_views([0, 6, 5])


def test_sources_are_files_or_pictures(photos):
    """Of one image in every form the views are the same; what is none is named as ever."""
    image = open_image(photos[0])
    forms = [photos[0], str(photos[0]), image, np.asarray(image), torch.tensor(np.asarray(image)),
             photos[0].read_bytes(), {"image": image}, (image, "label")]  # fmt: skip
    for sources in (forms, tuple(forms)):
        store = ImageStore(sources, size=24, allowance=Allowance(2**30))
        views = store.test_views(range(len(forms)))
        assert all(torch.equal(view, views[0]) for view in views)
    stack = np.stack([np.asarray(image)] * 3)
    assert torch.equal(ImageStore(stack, size=24).test_views([2])[0], views[0])
    reasons, bad = {}, [3, "none.png", b"", image]
    (batch,) = ImageStore(bad, size=24).batches([range(4)], unreadable=reasons)
    assert torch.equal(batch[3], views[0])
    assert not batch[:3].any()
    assert sorted(reasons) == [0, 1, 2]
    assert reasons[0].startswith("int is no image; give paths, PIL images")
    assert reasons[1] == "image none.png does not exist; check the path"
    assert reasons[2].startswith("image of 0 bytes cannot be read: the file is empty")
    with pytest.raises(BadImage):
        ImageStore(bad, size=24).image(1)
    with pytest.raises(InputError):
        ImageStore(bad, size=24).image(0)


def test_sources_are_taken_when_they_are_read(photos):
    """A dataset that decodes what is asked for is never asked for all."""
    taken = []

    class Lazy:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            taken.append(index)
            return open_image(photos[index])

    store = ImageStore(Lazy(), size=24, allowance=Allowance(2**30))
    assert len(store) == 12
    assert not taken
    for _ in range(2):
        store.test_views([3, 5])
    assert sorted(taken) == [3, 5]


def test_unknown_ways_of_resizing_are_refused(photos):
    with pytest.raises(UserError, match="interpolation 'random' is none of"):
        ImageStore(photos, size=8, interpolation="random")
    with pytest.raises(UserError, match="resize mode 'longest' is none of"):
        ImageStore(photos, size=8, resize_mode="longest")


def test_a_picture_that_is_not_decoded_yet_is_read_by_many_threads(tmp_path):
    """As batches of several epochs, made ahead, read the same one."""
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "a.png")
    expected = np.asarray(Image.open(tmp_path / "a.png"))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(30):
            opened = Image.open(tmp_path / "a.png")
            for found in pool.map(lambda _, one=opened: read_picture(one), range(16)):
                assert np.array_equal(np.asarray(found), expected)
