"""Stage 1: the image tower against a table of learned concept vectors.

    python train_image.py --data DIR --out DIR --minutes 50

Cross-entropy over every concept, without a text tower in the loop: on a corpus this small,
contrast within a batch wastes most of the compute. A part of each target is spread over the
concept's subgroup, so that birds end up near birds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from augment import augment, plain
from concepts import NO_FLIP
from model import build_clip, fast_attention
from torch import Tensor, nn

BATCH = 256
LR = 1.2e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.02
EMA = 0.9995
SCALE = 16.0
LEVEL_START, LEVEL_SLOPE = 0.1, 1.75  # augmentation grows over the first 40 % of the time
SUBGROUP_SHARE = 0.15
PATCH_DROPOUT = 0.2
# Drawings of a black-and-white set and of concepts that only one designer drew count less.
STYLE_WEIGHT = {"emojione-monotone": 0.7}
ALONE_WEIGHT = 0.4


class Drawings:
    """The corpus in memory, sampled with replacement by weight."""

    def __init__(self, data: Path) -> None:
        self.pixels = torch.from_numpy(np.load(data / "drawings.npy"))
        meta = json.loads((data / "drawings.json").read_text())
        self.concepts = meta["concepts"]
        self.styles = meta["styles"]
        self.style = torch.tensor(meta["style"])
        self.concept = torch.tensor(meta["concept"])
        self.flip = torch.tensor(
            [self.concepts[c]["subgroup"] not in NO_FLIP for c in meta["concept"]]
        )
        drawn = Counter(meta["concept"])
        self.weight = torch.tensor(
            [
                STYLE_WEIGHT.get(self.styles[s], 1.0) * (ALONE_WEIGHT if drawn[c] == 1 else 1.0)
                for s, c in zip(meta["style"], meta["concept"], strict=True)
            ]
        )

    def sample(self, n: int, level: float = 0.8) -> tuple[Tensor, Tensor]:
        """Augmented images and their concepts."""
        index = torch.multinomial(self.weight, n, replacement=True)
        return augment(self.pixels[index], self.flip[index], level), self.concept[index]

    def soft_targets(self) -> Tensor:
        """(K, K): for each concept, where the target lies."""
        groups = [c["subgroup"] for c in self.concepts]
        names = sorted(set(groups))
        member = F.one_hot(torch.tensor([names.index(g) for g in groups])).float()
        if "" in names:
            member[:, names.index("")] = 0
        same = member @ member.T
        same = same / same.sum(1, keepdim=True).clamp(min=1)
        eye = torch.eye(len(groups))
        share = SUBGROUP_SHARE * (same.sum(1, keepdim=True) > 0)
        return (1 - share) * eye + share * same


class ImageSide(nn.Module):
    """The image tower and the concept table."""

    def __init__(self, concepts: int, patch_dropout: float = 0.0) -> None:
        super().__init__()
        self.visual = build_clip(patch_dropout).visual
        self.table = nn.Parameter(torch.randn(concepts, self.visual.output_dim) * 0.05)

    def logits(self, z: Tensor) -> Tensor:
        """Scores of every concept; the rows' own lengths act as the scale."""
        return SCALE * F.normalize(z.float(), dim=-1) @ self.table.T


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine to zero; progress is 0..1 of the time."""
    if progress < WARMUP:
        return peak * (progress + 1e-3) / (WARMUP + 1e-3)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module) -> list[dict]:
    """Weight decay for matrices only."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0}]  # fmt: skip


@torch.no_grad()
def seen_accuracy(side: ImageSide, drawings: Drawings, n: int = 1024) -> float:
    """How many training drawings, not augmented, are named right among all concepts."""
    index = torch.randperm(len(drawings.pixels), generator=torch.Generator().manual_seed(0))[:n]
    side.eval()
    guess = side.logits(side.visual(plain(drawings.pixels[index]))).argmax(1)
    side.train()
    return (guess == drawings.concept[index]).float().mean().item()


def train(data: Path, out: Path, minutes: float, seed: int = 1) -> None:
    """Run the stage; `image.pt` holds the averaged weights and is renewed every few minutes."""
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    drawings = Drawings(data)
    targets = drawings.soft_targets()
    side = ImageSide(len(drawings.concepts), PATCH_DROPOUT).train()
    average = {name: t.clone() for name, t in side.state_dict().items()}
    fast_attention(side.visual)
    tower = torch.compile(side.visual)
    optimiser = torch.optim.AdamW(parameter_groups(side), lr=LR, betas=(0.9, 0.98), fused=True)
    log = (out / "log.jsonl").open("a")
    step, loss_sum, hits, shown, images = 0, 0.0, 0.0, 0, 0
    start = last = None
    while True:
        elapsed = 0.0 if start is None else time.time() - start
        progress = elapsed / (60 * minutes)
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(progress, LR)
        if progress > 0.85 and getattr(side.visual.patch_dropout, "prob", 0) > 0:
            side.visual.patch_dropout = nn.Identity()  # end on whole images
            tower = torch.compile(side.visual)
        x, y = drawings.sample(BATCH, level=min(0.8, LEVEL_START + progress * LEVEL_SLOPE))
        with torch.autocast("cpu", torch.bfloat16):
            z = tower(x)
        logits = side.logits(z)
        loss = -(targets[y] * logits.log_softmax(-1)).sum(1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(side.parameters(), 1.0)
        optimiser.step()
        step += 1
        if start is None:  # the first step compiles
            start = last = time.time()
        decay = min(EMA, (1 + step) / (10 + step)) ** 4
        if step % 4 == 0:
            state = side.state_dict()
            for name, value in average.items():
                value.lerp_(state[name], 1 - decay)
        with torch.no_grad():
            loss_sum += loss.item()
            hits += (logits.argmax(1) == y).float().mean().item()
            shown += 1
            images += BATCH
        if time.time() - last > 60:
            row = {"stage": "image", "step": step, "images": images,
                   "minutes": round((time.time() - start) / 60, 2),
                   "loss": round(loss_sum / shown, 4), "augmented": round(hits / shown, 4),
                   "plain": round(seen_accuracy(side, drawings), 4),
                   "table": round(side.table.norm(dim=1).mean().item(), 3)}  # fmt: skip
            print(row, flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            torch.save(average, out / "image.pt")
            last, loss_sum, hits, shown = time.time(), 0.0, 0.0, 0
    torch.save(average, out / "image.pt")
    (out / "image_done.pt").hardlink_to(out / "image.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50)
    args = parser.parse_args()
    train(args.data, args.out, args.minutes)
