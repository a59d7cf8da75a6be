"""Small things for tests: benchmarks listed as the real ones are, photos, a backbone."""

import json

import numpy as np
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from dapt.data import BENCHMARKS
from dapt.methods import get_method
from dapt.settings import make_settings

SPLIT_ROWS = [name for name, row in BENCHMARKS.items() if row.index.startswith("split_")]
# Of ImageNet's own: names of several words, two classes of one name, and more than ten, so that
# ImageNetV2's folders 0, 1, 2, ... 11 are in another order as text than as numbers.
CLASSES = {
    "n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark",
    "n01531178": "goldfinch", "n02012849": "crane bird", "n02123045": "tabby cat",
    "n02895154": "breastplate", "n03126707": "construction crane", "n03773504": "missile",
    "n04008634": "missile", "n04251144": "snorkel", "n07753592": "banana",
}  # fmt: skip
WNIDS, WORDS = tuple(CLASSES), tuple(CLASSES.values())


def tiny_config(**changes):
    """Configuration of a CLIP that is fast enough to be tuned in a test."""
    config = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"layers": 2, "width": 64, "head_width": 64, "patch_size": 8,
                       "image_size": 32},
        "text_cfg": {"layers": 2, "width": 64, "heads": 1, "context_length": 77,
                     "vocab_size": 49408},
    }  # fmt: skip
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            config[part][name] = value
        else:
            config[part] = value
    return config


def make_weights(file, vocabulary=49408):
    """A safetensors file with OpenAI's key names: an untrained CLIP of 64-wide towers."""
    torch.manual_seed(7)
    model = CLIP(**tiny_config(text_cfg__vocab_size=vocabulary))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)


def make_photos(root):
    """train/ and test/ with three classes of plainly coloured noise: easy, but not trivial."""
    generator = np.random.default_rng(0)
    colours = {"red_thing": (200, 60, 60), "green thing": (60, 200, 60), "blue": (60, 60, 200)}
    for part, count in (("train", 6), ("test", 4)):
        for name, colour in colours.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = generator.normal(0, 40, (40, 48, 3))
                pixels = np.clip(noise + colour, 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{i}.png")


def put_image(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, len(path.name))).save(path, "JPEG")


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_benchmark(root, name):
    """A benchmark of a few images at its place below ``root``, listed as the real one is."""
    row = BENCHMARKS[name]
    home, images = root / row.folder, root / row.folder / row.images
    if name in SPLIT_ROWS:
        # Folders of SUN397 and UCF101 lie deeper and hold spaces, hyphens and underscores.
        classes = [("a/art_gallery/indoor", "art gallery indoor"), ("v_T-Rex (2)", "t-rex")]
        split = {
            part: [
                [f"{folder}/{part} {i}.jpg", label, word]
                for label, (folder, word) in enumerate(classes)
                for i in range(2)
            ]
            for part in ("train", "val", "test")
        }
        for entries in split.values():
            for path, _, _ in entries:
                put_image(images / path)
        put(home / row.index, json.dumps(split))
    elif name == "fgvc_aircraft":
        variants = ["707-320", "DH-82", "Eurofighter Typhoon", "C-130"]
        put(home / "variants.txt", "\n".join(variants) + "\n")
        for p, part in enumerate(("train", "val", "test")):
            lines = [f"{p}{i:06} {word}" for i, word in enumerate(variants * 2)]
            put(home / f"images_variant_{part}.txt", "\n".join(lines) + "\n")
            for line in lines:
                put_image(images / f"{line.split()[0]}.jpg")
    else:
        put(home / row.index, "".join(f"{wnid} {word}\n" for wnid, word in CLASSES.items()))
        places = {"imagenet": ("train", "val")}.get(name, (".",))
        for place in places:
            for number, wnid in enumerate(WNIDS):
                if name in ("imagenet_a", "imagenet_r") and number == 1:
                    continue  # they have 200 of the 1,000 classes
                folder = str(number) if name == "imagenetv2" else wnid
                for i in (2, 10, 1):
                    put_image(images / place / folder / f"{wnid}_{i}.JPEG")
        put(images / "README.txt", "not a class")
        put(images / places[0] / ".hidden", "")
    return row


def new_parts(backbone, method="dapt", **given):
    """Freshly drawn parts of a method, in the order of its row."""
    settings = make_settings({"dataset": "bundled", "method": method, **given})
    return [part.create(backbone, settings) for part in get_method(method).parts]
