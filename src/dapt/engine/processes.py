"""One run over several processes that ``torchrun`` started: each takes its part of every batch.

Every process holds the whole model and the same prompts. Gradients of the parts are summed, so
that a step is that of one process at the same batch, up to the order in which floats are added.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dapt.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; by itself, unless ``torchrun`` started it.

    Attributes:
        rank: its number; 0 keeps the run directory.
        count: how many there are.
        local: its number on its machine, which is its GPU's.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process keeps the run directory."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    def device(self, device: str) -> str | None:
        """Its own GPU where several processes would take the same; None leaves it as it is."""
        if self.alone or device not in ("auto", "cuda") or not torch.cuda.is_available():
            return None
        return f"cuda:{self.local}"

    def part(self, batch: Sequence[int]) -> slice:
        """Which images of a batch are this process's.

        Raises:
            UserError: there is not one for each process.
        """
        if len(batch) < self.count:
            raise UserError(
                f"a batch of {len(batch)} images cannot be divided among {self.count} processes; "
                "start fewer, or use more shots or a larger --set batch_size"
            )
        starts = [len(batch) * rank // self.count for rank in range(self.count + 1)]
        return slice(starts[self.rank], starts[self.rank + 1])

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum each parameter's gradient over all processes."""
        for parameter in parameters:
            if parameter.grad is not None:
                self.sum(parameter.grad)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process: all learn the same."""
        return flag if self.alone else bool(self.sum(torch.tensor(float(flag))).item() > 0)

    def share(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def join_processes() -> Processes:
    """This process's place among those that ``torchrun`` started with it, if it did."""
    if not dist.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    if not dist.is_initialized():
        # Both kinds of tensors are summed: flags on the CPU, gradients where the prompts are.
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        atexit.register(dist.destroy_process_group)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return Processes(dist.get_rank(), dist.get_world_size(), local)
