"""Rasterise the drawings: an RGBA array with captions to train on, and the bundled task.

    python build_drawings.py --sets node_modules --out DIR

Writes `drawings.npy` (N, 48, 48, 4) uint8 with straight alpha, `drawings.json` (style and concept
of each, and the concepts), and `task/` (PNG files and `task.json`).
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import resvg_py
from concepts import TASK_CLASSES, TASK_STYLES, TRAIN_STYLES, Concept, load_concepts, slug
from PIL import Image

TRAIN_PX = 48  # near the tower's 40 px, with room for crops
TASK_PX = 64
SEED = 1
TEMPLATE = "a drawing of a {}."
SKIN_TONE = re.compile(r"(skin-tone|-tone\d|-(light|medium|dark|medium-light|medium-dark)$)")
# Named like an emoji of another meaning: the flag of Turkey is not a bird.
WRONG_NAMES = {("streamline-emojis", "turkey")}
# At most this many drawings of a class, so that none fills the test set.
PER_CLASS = 40
PER_TARGET_CLASS = 20


def rasterise(svg: str, px: int) -> np.ndarray:
    """An SVG as (px, px, 4) uint8, straight alpha, centred where it is not square."""
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * px))))
    image = image.convert("RGBa")  # premultiplied: resizing must not mix in hidden colours
    scale = px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BOX if scale == 0.5 else Image.Resampling.BICUBIC)
    canvas = Image.new("RGBa", (px, px))
    canvas.paste(image, ((px - size[0]) // 2, (px - size[1]) // 2))
    return np.asarray(canvas.convert("RGBA"))


def read_style(sets: Path, style: str) -> dict[str, str]:
    """Every icon of a set as a stand-alone SVG, by name."""
    data = json.loads((sets / "@iconify-json" / style / "icons.json").read_text())
    width, height = data.get("width", 16), data.get("height", 16)
    svgs = {}
    for name, icon in data["icons"].items():
        box = (icon.get("left", 0), icon.get("top", 0),
               icon.get("width", width), icon.get("height", height))  # fmt: skip
        svgs[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{box[2]}" height="{box[3]}" viewBox="{" ".join(map(str, box))}">'
            f"{icon['body']}</svg>"
        )
    return svgs


def match_concepts(sets: Path, style: str, concepts: dict[str, Concept]) -> dict[str, str]:
    """Icon name -> concept key; by code point where the set gives them, else by name."""
    folder = sets / "@iconify-json" / style
    icons = json.loads((folder / "icons.json").read_text())["icons"]
    chars = json.loads((folder / "chars.json").read_text())
    by_code = {icon: code.replace("-fe0f", "") for code, icon in chars.items()}
    by_name = {slug(c.name): c.key for c in concepts.values()}
    found = {}
    for icon in icons:
        if SKIN_TONE.search(icon) or icon.startswith("flag-") or (style, icon) in WRONG_NAMES:
            continue
        # "watermelon-2", "pouting-face", "cat-face-..." and the like vary from set to set
        plain = slug(re.sub(r"-\d$", "", icon) if style == "streamline-emojis" else icon)
        key = by_code.get(icon)
        if key not in concepts:
            candidates = (plain, plain + "face", plain.removesuffix("face"),
                          plain.replace("blonde", "blond"), "person" + plain)  # fmt: skip
            key = next((by_name[c] for c in candidates if c in by_name), None)
        if key is None and style in TRAIN_STYLES and style != "fxemoji":
            # Not an emoji of Unicode's (openmoji has hundreds): a concept of its own
            name = icon.replace("-", " ")
            key = "x-" + slug(name)
            if key not in concepts:
                group = "letters" if name.startswith(("letter ", "digit ")) else ""
                concepts[key] = Concept(key, name, group, base=name)
        if key is not None:
            found[icon] = key
    return found


def split_task(concepts: dict[str, Concept], drawn: set[str]) -> dict[str, str]:
    """Concept key -> train, val or test. Variants of one base concept stay together."""
    rng = random.Random(SEED)
    split = {}
    for class_name in TASK_CLASSES:
        members = [c for c in concepts.values() if c.task_class == class_name and c.key in drawn]
        groups: dict[str, list[str]] = {}
        for concept in members:
            groups.setdefault(concept.base, []).append(concept.key)
        order = sorted(groups)
        rng.shuffle(order)
        total = min(len(members), PER_CLASS)
        wanted = {"train": min(16, round(0.55 * total)), "val": min(4, round(0.15 * total))}
        wanted["test"] = total - sum(wanted.values())
        left = [groups[base] for base in order]
        for part, number in wanted.items():
            taken = 0
            for group in sorted(left, key=len, reverse=True) if part == "train" else list(left):
                if taken + len(group) <= number:
                    taken += len(group)
                    left.remove(group)
                    split.update(dict.fromkeys(group, part))
    return split


def build_task(sets: Path, concepts: dict[str, Concept], out: Path) -> None:
    """Write the few-shot task: images on white, by style and class, and `task.json`."""
    classes = list(TASK_CLASSES)
    svgs = {style: read_style(sets, style) for style in TASK_STYLES}
    keys = {style: match_concepts(sets, style, concepts) for style in TASK_STYLES}
    source = TASK_STYLES[0]
    split = split_task(concepts, set(keys[source].values()))
    domains: dict[str, dict[str, list]] = {}
    for style in TASK_STYLES:
        parts = domains[style] = (
            {"train": [], "val": [], "test": []} if style == source else {"test": []}
        )
        seen: set[str] = set()
        number: Counter[str] = Counter()
        icons = sorted(keys[style].items())
        random.Random(SEED).shuffle(icons)
        for icon, key in icons:
            class_name = concepts[key].task_class
            part = split.get(key)
            if class_name is None or (key in seen and style != "streamline-emojis"):
                continue
            if style == "streamline-emojis":
                # Another designer's drawings: all of them, but no concept of the support set
                part = None if part in ("train", "val") else "test"
            if part not in parts:
                continue
            if style == "streamline-emojis" and number[class_name] == PER_TARGET_CLASS:
                continue
            seen.add(key)
            number[class_name] += 1
            path = out / style / class_name.replace(" ", "_") / f"{icon}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rasterise(svgs[style][icon], TASK_PX))
            white = Image.new("RGBA", image.size, "white")
            Image.alpha_composite(white, image).convert("RGB").save(path, optimize=True)
            parts[part].append([path.relative_to(out).as_posix(), classes.index(class_name)])
        for items in parts.values():
            items.sort(key=lambda item: (item[1], item[0]))
    task = {"name": "drawings", "class_names": classes, "template": TEMPLATE,
            "domains": domains}  # fmt: skip
    (out / "task.json").write_text(json.dumps(task, indent=1) + "\n")
    print({s: {p: len(items) for p, items in parts.items()} for s, parts in domains.items()})


def _raster_train(svg: str) -> np.ndarray | None:
    try:
        return rasterise(svg, TRAIN_PX)
    except Exception as error:  # one bad drawing must not end the build
        print("skipped:", error)
        return None


def build_training(sets: Path, concepts: dict[str, Concept], out: Path) -> None:
    """Write the training drawings with their styles and concepts."""
    rows, svgs = [], []
    for style in TRAIN_STYLES:
        drawings = read_style(sets, style)
        matches = match_concepts(sets, style, concepts)
        for icon, key in matches.items():
            rows.append((style, key))
            svgs.append(drawings[icon])
    with ProcessPoolExecutor(2) as pool:
        arrays = list(pool.map(_raster_train, svgs, chunksize=200))
    kept = [i for i, a in enumerate(arrays) if a is not None and a[..., 3].any()]
    np.save(out / "drawings.npy", np.stack([arrays[i] for i in kept]))
    used = sorted({rows[i][1] for i in kept})
    index = {key: i for i, key in enumerate(used)}
    meta = {
        "styles": list(TRAIN_STYLES),
        "style": [TRAIN_STYLES.index(rows[i][0]) for i in kept],
        "concept": [index[rows[i][1]] for i in kept],
        "concepts": [asdict(concepts[key]) for key in used],
    }
    (out / "drawings.json").write_text(json.dumps(meta))
    print(len(kept), "drawings of", len(used), "concepts")


def main() -> None:
    """Parse arguments and build both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=Path, default=Path("node_modules"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    concepts = load_concepts(args.sets / "emojibase-data")
    build_task(args.sets, concepts, args.out / "task")
    build_training(args.sets, concepts, args.out)


if __name__ == "__main__":
    main()
