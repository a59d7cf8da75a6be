"""What tests share: the material beside the repository, where it is, and a tiny backbone."""

import contextlib
import io
import os
import shutil
import struct
import time
import zlib
from pathlib import Path

import pytest
import torch
from browser import Browser
from hypothesis import HealthCheck, settings
from miniatures import make_photos, make_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from theirs import LetterTokenizer

# No test waits for a hub; what is fetched there is put into a cache by hand.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Time limits that examples would break on a busy machine say nothing about the code.
settings.register_profile("dapt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dapt")


def fuzzed(examples):
    """So many examples of open-ended input; as many more as ``make torture`` asks for."""
    asked = int(os.environ.get("DAPT_FUZZ_EXAMPLES", "0"))
    return settings(
        max_examples=max(examples, asked), suppress_health_check=list(HealthCheck), deadline=None
    )


@contextlib.contextmanager
def frugal(megabytes=300):
    """What happens inside takes no more memory than this (where that can be told), and some time.

    It is 2 s of computing here at most, whatever other programs do; a slow machine needs more, and
    what is not bounded more still.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(kind):
        line = next(x for x in status.read_text().splitlines() if x.startswith(kind))
        return int(line.split()[1]) / 1024

    before, started = 0.0, time.process_time()
    if reset.exists():
        reset.write_text("5")  # the highest so far is what there is now
        before = resident("VmRSS")
    yield
    spent = time.process_time() - started
    assert spent < 20, f"{spent:.1f} s"
    if reset.exists():
        grown = resident("VmHWM") - before
        assert grown < megabytes, f"{grown:.0f} MB"


REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared():
    """Folder with the recorded run, real splits and photographs; tests skip where it is not."""
    folder = Path(os.environ.get("DAPT_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("the folder with reference data is not here; set DAPT_SHARED")
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A safetensors file with OpenAI's key names: an untrained CLIP of 64-wide towers."""
    file = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    make_weights(file)
    return file


@pytest.fixture
def letters(monkeypatch):
    """Folders in transformers' form are read with letters for their vocabulary."""
    monkeypatch.setattr("dapt.clip.hub_format.HFTokenizer", LetterTokenizer)
    return LetterTokenizer


RECORDED = REPOSITORY / "tests" / "fixtures" / "recorded"


@pytest.fixture(scope="session")
def recorded_clip(tmp_path_factory):
    """Weights of the CLIP behind all recorded runs, its token embedding's rows put back."""
    state = load_file(RECORDED / "clip.safetensors")
    table = torch.zeros(49408, state["ln_final.weight"].shape[0])
    table[state.pop("token_embedding.ids")] = state.pop("token_embedding.rows")
    weights = tmp_path_factory.mktemp("recorded") / "clip.safetensors"
    save_file({**state, "token_embedding.weight": table}, weights)
    return weights


@pytest.fixture(scope="session", params=["small", "full"])
def recorded(request, recorded_clip):
    """The recorded run: its folder and its weights file.

    Once cut small (in the repository), and once whole, where it is at hand.
    """
    if request.param == "full":
        folder = request.getfixturevalue("shared") / "reference"
        return folder, folder / "clip.safetensors"
    return RECORDED, recorded_clip


def jpeg_of_scans(count):
    """A progressive JPEG whose last scan is there ``count`` times."""
    file = io.BytesIO()
    Image.effect_noise((16, 16), 50).save(file, "JPEG", progressive=True)
    start, marker, scan = file.getvalue().removesuffix(b"\xff\xd9").rpartition(b"\xff\xda")
    return start + (marker + scan) * count + b"\xff\xd9"


def tiff_of_a_tile(side):
    """A TIFF of 100 x 100 grey pixels within one packed tile, which is decoded whole."""
    packer = zlib.compressobj()
    tile = b"".join([*(packer.compress(bytes(side)) for _ in range(side)), packer.flush()])
    size, grey, deflate = 100, 1, 8
    tags = {256: size, 257: size, 258: 8, 259: deflate, 262: grey, 277: 1, 322: side, 323: side,
            324: 8 + 2 + 10 * 12 + 4, 325: len(tile)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + tile


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """train/ and test/ with three classes of plainly coloured noise: easy, but not trivial."""
    root = tmp_path_factory.mktemp("photos")
    make_photos(root)
    return root


@pytest.fixture
def browser(tmp_path):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                   "google-chrome"))), None)  # fmt: skip
    if program is None:
        missing = pytest.fail if os.environ.get("DAPT_BROWSER") == "required" else pytest.skip
        missing("Chromium is not here")
    found = Browser(program, tmp_path / "profile")
    yield found
    found.close()
