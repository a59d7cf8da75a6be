"""Augmentation of RGBA drawings, a whole batch at a time.

The drawings come in a few styles and the tower must read new ones, so style is what is varied:
colours are rotated, mixed, greyed and inverted, backgrounds change, and some drawings are reduced
to black and white or to their edges. Otherwise a set that alone is black on white would become a
shortcut.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = torch.tensor([0.299, 0.587, 0.114])


def _chance(n: int, p: float) -> Tensor:
    return torch.rand(n) < p


def warp(rgba: Tensor, flip: Tensor, strong: Tensor, px: int) -> Tensor:
    """Rotate, scale, shear, shift and (where allowed) mirror. (B, 4, h, w) -> (B, 4, px, px)."""
    n = len(rgba)
    angle = torch.randn(n).clamp(-2.5, 2.5) * math.radians(10)
    scale = torch.empty(n).uniform_(0.8, 1.35)  # above 1: the drawing gets smaller
    aspect = torch.exp(torch.randn(n).clamp(-2, 2) * 0.10)
    shear = torch.randn(n).clamp(-2, 2) * 0.08
    cos, sin = angle.cos() * scale, angle.sin() * scale
    mirror = torch.where(flip & _chance(n, 0.5), -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = cos * aspect * mirror
    theta[:, 0, 1] = -sin + shear
    theta[:, 1, 0] = sin * mirror
    theta[:, 1, 1] = cos / aspect
    theta[:, :, 2] = torch.randn(n, 2).clamp(-2, 2) * 0.10
    identity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    still = identity.repeat(n, 1, 1)  # nearly as it will be met
    still[:, 0, 0] = mirror
    still[:, :, 2] = theta[:, :, 2] * 0.5
    theta = torch.where(strong.view(-1, 1, 1), theta, still)
    grid = F.affine_grid(theta, [n, 4, px, px], align_corners=False)
    return F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def colour_matrices(n: int) -> tuple[Tensor, Tensor]:
    """A linear map of colours for each image: (B, 3, 3) and an offset (B, 3, 1)."""
    eye = torch.eye(3).expand(n, 3, 3)
    grey = LUMA.expand(3, 3).expand(n, 3, 3)
    # Rotation about the grey axis changes the hue and keeps the brightness roughly
    angle = torch.randn(n) * math.radians(18)
    wild = _chance(n, 0.2)
    angle[wild] = torch.empty(n).uniform_(-math.pi, math.pi)[wild]
    k = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    mean = torch.full((3, 3), 1 / 3)
    c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
    matrix = c * eye + (1 - c) * mean + s * k
    saturation = torch.empty(n).uniform_(0.5, 1.4)
    saturation[_chance(n, 0.15)] = 0.0
    saturation = saturation[:, None, None]
    matrix = saturation * matrix + (1 - saturation) * grey @ matrix
    contrast = torch.empty(n, 1, 1).uniform_(0.6, 1.3)
    offset = (1 - contrast) * 0.5 + torch.randn(n, 1, 1) * 0.08
    return matrix * contrast, offset.expand(n, 3, 1)


def backgrounds(n: int) -> Tensor:
    """(B, 3, 1, 1): white mostly, otherwise a colour or something dark."""
    colour = torch.rand(n, 3)
    kind = torch.rand(n)
    colour[kind < 0.10] = colour[kind < 0.10] * 0.3
    white = kind > 0.35
    colour[white] = 1 - 0.03 * torch.rand(int(white.sum()), 1).expand(-1, 3)
    return colour[:, :, None, None]


def to_lines(rgb: Tensor) -> Tensor:
    """Dark edges on white."""
    luma = (rgb * LUMA.view(1, 3, 1, 1)).sum(1, keepdim=True)
    dx = F.pad(luma, (1, 1, 0, 0), mode="replicate")
    dy = F.pad(luma, (0, 0, 1, 1), mode="replicate")
    edge = (dx[..., 2:] - dx[..., :-2]).abs() + (dy[..., 2:, :] - dy[..., :-2, :]).abs()
    strength = torch.empty(len(rgb), 1, 1, 1).uniform_(1.5, 5.0)
    return (1 - edge * strength).clamp(0, 1).expand(-1, 3, -1, -1)


def to_two_tones(rgb: Tensor) -> Tensor:
    """Black and white by a threshold near the mean brightness, sometimes inverted."""
    luma = (rgb * LUMA.view(1, 3, 1, 1)).sum(1, keepdim=True)
    mean = luma.mean((1, 2, 3), keepdim=True)
    cut = 0.5 * mean + 0.5 * torch.empty_like(mean).uniform_(0.2, 0.8)
    tone = ((luma - cut) * 20).sigmoid()
    swap = _chance(len(rgb), 0.15).view(-1, 1, 1, 1)
    return torch.where(swap, 1 - tone, tone).expand(-1, 3, -1, -1)


def augment(batch: Tensor, flip: Tensor, level: float = 0.8, px: int = 40) -> Tensor:
    """(B, h, w, 4) uint8 drawings -> (B, 3, px, px) normalised to -1..1.

    `level` is the share of drawings that are varied strongly; the others are only shifted a
    little and mirrored. A tower that starts on strong variation alone learns very slowly.
    """
    rgba = batch.permute(0, 3, 1, 2).float() / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)  # premultiplied
    n = len(rgba)
    strong = _chance(n, level)
    rgba = warp(rgba, flip, strong, px)
    alpha = rgba[:, 3:]
    matrix, offset = colour_matrices(n)
    matrix = torch.where(strong.view(-1, 1, 1), matrix, torch.eye(3))
    offset = offset * strong.view(-1, 1, 1)
    ground = torch.where(strong.view(-1, 1, 1, 1), backgrounds(n), torch.ones(()))
    # Premultiplied colours map linearly, the offset weighted by alpha
    rgb = torch.baddbmm(offset * alpha.flatten(2), matrix, rgba[:, :3].flatten(2))
    rgb = rgb.view(n, 3, px, px) + (1 - alpha) * ground
    rgb = rgb.clamp(0, 1)
    kind = torch.where(strong, torch.rand(n), 0.5)
    lines, tones, blurred = kind < 0.08, (kind > 0.08) & (kind < 0.17), kind > 0.9
    rgb[lines] = to_lines(rgb[lines])
    rgb[tones] = to_two_tones(rgb[tones])
    rgb[blurred] = F.avg_pool2d(rgb[blurred], 3, 1, 1, count_include_pad=False)
    for i in (strong & _chance(n, 0.25)).nonzero().flatten().tolist():  # erase a rectangle
        h, w = torch.randint(6, 18, (2,)).tolist()
        y, x = torch.randint(0, px - h, (1,)).item(), torch.randint(0, px - w, (1,)).item()
        rgb[i, :, y : y + h, x : x + w] = torch.rand(3, 1, 1)
    return rgb * 2 - 1


def plain(batch: Tensor, px: int = 40) -> Tensor:
    """The same without augmentation: on white, resized."""
    rgba = batch.permute(0, 3, 1, 2).float() / 255
    rgb = rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]
    rgb = F.interpolate(rgb, (px, px), mode="bicubic", antialias=True, align_corners=False)
    return rgb.clamp(0, 1) * 2 - 1
