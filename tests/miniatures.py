"""Benchmarks of a few images each, laid out and listed as the real ones are."""

import json

from PIL import Image

from dapt.data import BENCHMARKS

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


def put_image(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, len(path.name))).save(path, "JPEG")


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_benchmark(root, name):
    """A benchmark of a few images at its place below ``root``, listed as the real one is."""
    row = BENCHMARKS[name]
    home, images = root / row.folder, row.image_root(root)
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
