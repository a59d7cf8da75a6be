"""Stages 2 and 3: the text tower towards the concept table, then both towers jointly.

    python train_text.py --data DIR --out DIR --text-minutes 2.5 --joint-minutes 7

Reads `image.pt` of stage 1; writes `clip.pt` and an exported open_clip model in `OUT/backbone`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import CONTEXT_LENGTH, Caption, Phrases
from model import TOKENIZER, build_clip, export, fast_attention
from open_clip.model import CLIP
from torch import Tensor, nn
from train_image import (
    EMA,
    SCALE,
    Drawings,
    ImageSide,
    learning_rate,
    parameter_groups,
)

BATCH = 256
TEXT_LR = 2e-3
JOINT_LR = 3e-4
SCALE_START = 20.0
LEVEL = 0.6


class TextSide:
    """Runs the text tower on captions, cut to the longest of a batch (the tower is causal)."""

    def __init__(self, model: CLIP) -> None:
        self.model = model
        self.used = torch.zeros(model.vocab_size, dtype=torch.bool)
        self.cache: dict[str, list[int]] = {}

    def tokens(self, captions: list[Caption]) -> Tensor:
        """(B, L) padded token ids, marking which were used."""
        rows = []
        for caption in captions:
            row = self.cache.get(caption.text)
            if row is None:
                ids = TOKENIZER.encode(caption.text)[:75]
                row = [TOKENIZER.sot_token_id, *ids, TOKENIZER.eot_token_id]
                if len(self.cache) < 200_000:
                    self.cache[caption.text] = row
            rows.append(row)
        longest = -(-max(map(len, rows)) // 8) * 8  # few shapes
        out = torch.zeros(len(rows), min(77, longest), dtype=torch.long)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row)
            self.used[row] = True
        return out

    def encode(self, captions: list[Caption]) -> Tensor:
        """(B, D) normalised features at EOT."""
        model = self.model
        tokens = self.tokens(captions)
        length = tokens.shape[1]
        x = model.token_embedding(tokens)
        where = torch.tensor([c.random_context for c in captions])
        if where.any():
            spread = torch.empty(int(where.sum()), 1, 1).uniform_(0.005, 0.06)
            noise = torch.randn(int(where.sum()), CONTEXT_LENGTH, x.shape[-1]) * spread
            x = x.clone()
            x[where, 1 : 1 + CONTEXT_LENGTH] = noise
        x = x + model.positional_embedding[:length]
        mask = model.attn_mask[:length, :length]
        with torch.autocast("cpu", torch.bfloat16):
            x = model.transformer(x, attn_mask=mask)
        x = model.ln_final(x.float())
        x = x[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection
        return F.normalize(x, dim=-1)


def membership(captions: list[Caption], concepts: int) -> Tensor:
    """(B, K): 1 where a caption is true of a concept."""
    out = torch.zeros(len(captions), concepts)
    for i, caption in enumerate(captions):
        out[i, caption.concepts] = 1
    return out


def cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """Cross-entropy against positives, each row spread evenly over its own."""
    target = positives / positives.sum(1, keepdim=True).clamp(min=1)
    return -(target * logits.log_softmax(-1)).sum(1).mean()


class Average:
    """Exponential moving average of some parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {name: t.clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Every fourth step is enough."""
        if step % 4:
            return
        decay = min(EMA, (1 + step) / (10 + step)) ** 4
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)


def train_text(model: CLIP, table: Tensor, phrases: Phrases, minutes: float, log) -> TextSide:
    """Stage 2: captions against the fixed concept table."""
    rng = random.Random(2)
    side = TextSide(model)
    params = nn.ModuleList([model.transformer, model.token_embedding, model.ln_final])
    groups = parameter_groups(params)
    groups[0]["params"] += [model.text_projection, model.positional_embedding]
    groups[0]["weight_decay"] = 0.01
    optimiser = torch.optim.AdamW(groups, lr=TEXT_LR, betas=(0.9, 0.98), fused=True)
    average = Average(model)
    start = last = time.time()
    step, losses = 0, []
    count = len(table)
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(progress, TEXT_LR)
        captions = [phrases.draw(rng.randrange(count), rng) for _ in range(BATCH)]
        logits = SCALE_START * side.encode(captions) @ table.T
        loss = cross_entropy(logits, membership(captions, count))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params.parameters(), 1.0)
        optimiser.step()
        step += 1
        average.update(model, step)
        losses.append(loss.item())
        if time.time() - last > 30:
            row = {"stage": "text", "step": step, "minutes": round((time.time() - start) / 60, 2),
                   "loss": round(sum(losses) / len(losses), 4)}  # fmt: skip
            print(row, flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            last, losses = time.time(), []
    model.load_state_dict(average.state)
    return side


def train_joint(
    model: CLIP, table: Tensor, side: TextSide, drawings: Drawings, phrases: Phrases,
    minutes: float, log,
) -> None:  # fmt: skip
    """Stage 3: images against captions in the batch, and both against the table."""
    rng = random.Random(3)
    count = len(table)
    raw = nn.Parameter(table.clone())
    optimiser = torch.optim.AdamW(
        [*parameter_groups(model), {"params": [raw], "weight_decay": 0.0}],
        lr=JOINT_LR, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    average = Average(model)
    tower = torch.compile(model.visual)
    start = last = None
    step, rows = 0, []
    while True:
        progress = 0.0 if start is None else (time.time() - start) / (60 * minutes)
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(progress, JOINT_LR)
        x, y = drawings.sample(BATCH, LEVEL)
        captions = [phrases.draw(i, rng) for i in y.tolist()]
        with torch.autocast("cpu", torch.bfloat16):
            z = tower(x)
        z = F.normalize(z.float(), dim=-1)
        t = side.encode(captions)
        w = F.normalize(raw, dim=-1)
        scale = model.logit_scale.exp().clamp(max=60)
        true = membership(captions, count)
        pairs = true[:, y].T  # image i, caption j
        logits = scale * z @ t.T
        contrast = 0.5 * (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs.T))
        to_table = F.cross_entropy(scale * z @ w.T, y, label_smoothing=0.05)
        words = cross_entropy(scale * t @ w.T, true)
        loss = contrast + 0.5 * to_table + 0.5 * words
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if start is None:
            start = last = time.time()
        average.update(model, step)
        rows.append((contrast.item(), to_table.item(), words.item()))
        if time.time() - last > 60:
            means = [round(sum(c) / len(c), 4) for c in zip(*rows, strict=True)]
            row = {"stage": "joint", "step": step, "minutes": round((time.time() - start) / 60, 2),
                   "contrast": means[0], "to_table": means[1], "words": means[2],
                   "scale": round(scale.item(), 2)}  # fmt: skip
            print(row, flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            last, rows = time.time(), []
    model.load_state_dict(average.state)


def run(data: Path, out: Path, text_minutes: float, joint_minutes: float) -> None:
    """Both stages and the export."""
    torch.manual_seed(2)
    torch.set_num_threads(2)
    drawings = Drawings(data)
    image = ImageSide(len(drawings.concepts))
    image.load_state_dict(torch.load(out / "image.pt"), strict=False)
    table = F.normalize(image.table.detach(), dim=-1)
    model = build_clip()
    model.visual.load_state_dict(image.visual.state_dict())
    with torch.no_grad():
        mean_row = SCALE * image.table.norm(dim=1).mean().item()
        model.logit_scale.fill_(math.log(mean_row))
    model.train()
    fast_attention(model.visual)
    fast_attention(model)
    phrases = Phrases(drawings.concepts)
    with (out / "log.jsonl").open("a") as log:
        side = train_text(model, table, phrases, text_minutes, log)
        if joint_minutes:
            train_joint(model, table, side, drawings, phrases, joint_minutes, log)
    state = model.state_dict()
    # A word that no caption used has no meaning here: better silent than noise
    state["token_embedding.weight"][~side.used] = 0
    torch.save(state, out / "clip.pt")
    export(state, out / "backbone")
    print("tokens in use:", int(side.used.sum()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text-minutes", type=float, default=2.5)
    parser.add_argument("--joint-minutes", type=float, default=7)
    args = parser.parse_args()
    run(args.data, args.out, args.text_minutes, args.joint_minutes)
