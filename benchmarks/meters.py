"""What is measured with: a clock, the rate of matrix products, their operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

MATMUL_SIDE = 2048


def now(device: torch.device) -> float:
    """Seconds on the clock, once all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of square matrix products, the best of some."""
    a, b = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=device).to(dtype) for _ in range(2))
    product, best = torch.empty_like(a), 0.0
    for _ in range(5):
        started = now(device)
        # Into memory already there: clearing new pages is no part of the rate.
        torch.mm(a, b, out=product)
        best = max(best, 2 * MATMUL_SIDE**3 / (now(device) - started))
    return best


def count_operations(loss: Callable[[], torch.Tensor]) -> int:
    """Floating-point operations of the matrix products of a loss and its gradients.

    What checkpoints compute a second time counts once: it is no work that the loss asks for.
    """
    # Attention is known by its matrix products, not by its fused kernel.
    with sdpa_kernel(SDPBackend.MATH), _Operations() as counter:
        total = loss()
        counter.backward = True
        total.backward()
    return counter.total


class _Operations(TorchDispatchMode):
    """Sums the formulas of `FlopCounterMode`, but not over what a backward pass computes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.backward = 0, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        # A backward pass itself runs without gradients; what it computes anew runs with them.
        if formula and not (self.backward and torch.is_grad_enabled()):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
