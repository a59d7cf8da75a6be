"""This process: its place among those that ``torchrun`` started for a run, and its memory.

Every process holds the whole model and takes its part of every batch. Gradients of the parts are
summed: a step is that of one process at the same batch, up to the order of adding floats.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dapt.errors import UserError

_GROUP = Path("/sys/fs/cgroup")  # of a container, as it sees itself
# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; by itself, unless ``torchrun`` started it."""

    rank: int = 0
    count: int = 1
    local: int = 0  # number on its machine, which is its GPU's

    @property
    def first(self) -> bool:
        """Whether this process keeps the run directory."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    def device(self, device: str) -> str | None:
        """Its own GPU where several processes would take the same; None leaves it as it is.

        Where there are fewer GPUs than processes, some share one.
        """
        if self.alone or device not in ("auto", "cuda") or not torch.cuda.is_available():
            return None
        return f"cuda:{self.local % torch.cuda.device_count()}"

    def part(self, batch: Sequence[int]) -> slice:
        """Which images of a batch are its own; a `UserError` if there is not one for each."""
        if len(batch) < self.count:
            raise UserError(
                f"a batch of {len(batch)} images cannot be divided among {self.count} processes; "
                "start fewer, or use more shots or a larger batch_size"
            )
        start, end = (len(batch) * rank // self.count for rank in (self.rank, self.rank + 1))
        return slice(start, end)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process: all learn the same."""
        return flag if self.alone else bool(self.sum(torch.tensor(float(flag))).item() > 0)

    def share(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        box = [value]
        if not self.alone:
            dist.broadcast_object_list(box, src=0)
        return box[0]


def join_processes() -> Processes:
    """This process's place among those that ``torchrun`` started with it, if it did."""
    if not dist.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not dist.is_initialized():
        if gpus := torch.cuda.device_count() if torch.cuda.is_available() else 0:
            torch.cuda.set_device(local % gpus)
        # Both kinds of tensors are summed: flags on the CPU, gradients where the prompts are. NCCL
        # takes one process a GPU; gloo sums for those that share one, and knows both kinds.
        each = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= gpus
        dist.init_process_group("cpu:gloo,cuda:nccl" if each else "gloo")
        atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size(), local)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on a device; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    free = int(found[1]) * 1024 if found else None
    with suppress(OSError, ValueError):  # of a container, which may have less
        most, taken = (int((_GROUP / f"memory.{n}").read_text()) for n in ("max", "current"))
        # Pages of files that nobody has used lately count as taken; they are given back on demand.
        stat = _GROUP / "memory.stat"
        told = stat.read_text() if stat.is_file() else ""
        pages = re.search(r"^inactive_file (\d+)$", told, re.M)
        taken -= int(pages[1]) if pages else 0
        free = most - taken if free is None else min(free, most - taken)
    return free


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next allocation instead of giving it back.

    Every step allocates and frees the same activations. By default glibc returns each large one
    to the system, and getting it again costs the clearing of all its pages; kept, a step on a CPU
    is a tenth or more faster, and peak memory is the same. True if it took effect.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
