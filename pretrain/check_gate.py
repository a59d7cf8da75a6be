"""The gate: is the backbone worth shipping? Prints and saves what it reaches and the controls.

    python check_gate.py --backbone DIR --task DIR [--part val]

Zero-shot by class words, a linear probe on the 16-shot support sets of three seeds, and the
controls: a probe on 8 x 8 pixels, a probe on the tower with random weights, and zero-shot with
permuted labels. Prompt tuning itself is measured by `dapt train`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import TOKENIZER, build_clip, load
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor

SEEDS = (1, 2, 3)
SHOTS = 16


def read_images(root: Path, items: list, px: int = 40) -> tuple[Tensor, Tensor]:
    """Images as the exported preprocessing gives them, and labels."""
    arrays = []
    for path, _ in items:
        image = Image.open(root / path).convert("RGB").resize((px, px), Image.Resampling.BICUBIC)
        arrays.append(np.asarray(image, dtype=np.float32) / 127.5 - 1)
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for _, label in items])


def pixels(images: Tensor) -> np.ndarray:
    """8 x 8 pixels of each image, flat."""
    return F.interpolate(images, (8, 8), mode="area").flatten(1).numpy()


@torch.no_grad()
def features(model, images: Tensor) -> np.ndarray:
    """Normalised image features."""
    return F.normalize(torch.cat([model.visual(x) for x in images.split(256)]), dim=-1).numpy()


@torch.no_grad()
def class_features(model, names: list[str], template: str) -> np.ndarray:
    """Normalised text features of the class names."""
    tokens = TOKENIZER([template.format(name) for name in names])
    return F.normalize(model.encode_text(tokens), dim=-1).numpy()


def support(labels: Tensor, seed: int) -> list[int]:
    """Indices of the 16-shot support set: classes in order of appearance, as in the protocol."""
    rng = random.Random(seed)
    by_class: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        by_class.setdefault(label, []).append(i)
    return [i for items in by_class.values() for i in rng.sample(items, min(SHOTS, len(items)))]


def probe(train: np.ndarray, y: Tensor, test: np.ndarray, t: Tensor, val=None) -> float:
    """Mean test accuracy over seeds of logistic regression; its strength is chosen on val."""
    scores = []
    for seed in SEEDS:
        index = support(y, seed)
        fits = [
            LogisticRegression(C=c, max_iter=2000).fit(train[index], y[index].numpy())
            for c in (0.01, 0.1, 1, 10, 100, 1000)
        ]
        best = max(fits, key=lambda fit: fit.score(val[0], val[1].numpy()))
        scores.append(100 * best.score(test, t.numpy()))
    return float(np.mean(scores))


def check(backbone: Path, task_dir: Path, part: str) -> dict:
    """All figures, in percent."""
    torch.manual_seed(0)
    task = json.loads((task_dir / "task.json").read_text())
    names, domains = task["class_names"], task["domains"]
    source = next(iter(domains))
    model, blank = load(backbone), build_clip().eval()
    sets = {p: read_images(task_dir, domains[source][p]) for p in ("train", "val", part)}
    words = class_features(model, names, task["template"])
    result = {"part": part, "classes": len(names), "chance": round(100 / len(names), 2)}

    def zero_shot(images: Tensor, labels: Tensor, order=None) -> float:
        text = words if order is None else words[order]
        guess = (features(model, images) @ text.T).argmax(1)
        return 100 * float((guess == labels.numpy()).mean())

    result["zero_shot"] = zero_shot(*sets[part])
    rng = np.random.default_rng(0)
    result["permuted"] = float(
        np.mean([zero_shot(*sets[part], rng.permutation(len(names))) for _ in range(20)])
    )
    readers = {
        "probe": lambda x: features(model, x),
        "random_probe": lambda x: features(blank, x),
        "pixel_probe": pixels,
    }
    for name, read in readers.items():
        x = {p: read(images) for p, (images, _) in sets.items()}
        result[name] = probe(
            x["train"], sets["train"][1], x[part], sets[part][1], (x["val"], sets["val"][1])
        )
    for style in list(domains)[1:]:
        if part == "test":
            result[f"zero_shot/{style}"] = zero_shot(*read_images(task_dir, domains[style]["test"]))
    result = {k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}
    result["gate_zero_shot"] = result["zero_shot"] >= 10 * result["chance"]
    result["gate_probe"] = result["probe"] >= result["pixel_probe"] + 15
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--part", default="test", choices=["val", "test"])
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    figures = check(args.backbone, args.task, args.part)
    print(json.dumps(figures, indent=1))
    if args.log:
        with args.log.open("a") as log:
            log.write(json.dumps({"stage": "check", **figures}) + "\n")
