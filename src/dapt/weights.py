"""State dicts from files, read without running anything that is inside them.

Three containers hold CLIP weights in the wild: safetensors, PyTorch's zip files and OpenAI's
TorchScript archives. The last is a zip whose ``data.pkl`` names classes that only exist inside
the archive, so ``weights_only`` loading refuses it and ``torch.jit.load`` would compile the
code that comes along. Checkpoints of training code are a fourth: pickles full of foreign objects.
Both are read by `dapt.unpickle`, which knows tensors and plain containers and nothing else.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Container
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dapt.errors import UserError
from dapt.unpickle import (
    ArchiveUnpickler,
    AsksToRun,
    CheckpointUnpickler,
    Described,
    ReadBytes,
    Record,
    read_legacy,
    read_zip,
    unpickle,
)

StateDict = dict[str, Tensor]

# Tensors of OpenAI's archives that describe the model and are no weights.
_DESCRIPTIONS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


@dataclass(frozen=True)
class Checkpoint:
    """What training code saved: its state dict, and after which epoch if it says so."""

    state: StateDict
    epoch: int | None


def read_state_dict(path: Path) -> StateDict:
    """Read the weights in ``path`` as a flat mapping from name to tensor, on the CPU.

    Accepts ``.safetensors``, PyTorch zip files (``.pt``, ``.pth``, ``.bin``; a nested
    ``state_dict`` and a ``module.`` prefix are unwrapped) and TorchScript archives.

    Raises:
        UserError: the file is missing, is none of these, or holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist; give the path of a file")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        elif is_torchscript(path):
            state = _read_torchscript(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged files fail in whatever way
        raise UserError(f"{path} could not be read as weights: {_reason(path, error)}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds no state dict; save model.state_dict() into it")
    if not all(isinstance(k, str) for k in state):
        raise UserError(f"{path} holds no state dict; save model.state_dict() into it")
    state = {
        k.removeprefix("module."): v
        for k, v in state.items()
        if k.rpartition(".")[2] not in _DESCRIPTIONS
    }
    odd = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if odd:
        raise UserError(f"{path} holds '{odd[0]}', which is no tensor; save only weights in it")
    return state


def digest(state: StateDict) -> str:
    """SHA-256 over names, shapes and bytes of a state dict, in hexadecimal.

    Lets a run say which weights it was tuned on, wherever they were loaded from.
    """
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be read, in a few words."""
    with path.open("rb") as file:
        start = file.read(32)
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; fetch the file itself with 'git lfs pull'"
    if path.suffix != ".safetensors" and not _is_zip(path) and start[:1] != b"\x80":
        return "it is no PyTorch file; give safetensors or a saved state dict"
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        return "it holds more than tensors; save only the model's state dict"
    first = " ".join(str(error).split())[:120] or type(error).__name__
    return f"{first}; save it as safetensors or as a plain state dict"


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the form of OpenAI's own weights."""
    if not _is_zip(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:  # whoever reads it says so
        return False


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it is one, but so damaged that not even that can be told
        return True


def read_checkpoint(path: Path, ignore: Container[str] = ()) -> Checkpoint:
    """Read the state dict of a checkpoint that other people's training code saved.

    Such files hold optimisers and schedulers too, so ``weights_only`` loading refuses them. Zip
    files and those of PyTorch before 1.6 are read, and safetensors for completeness.

    Args:
        path: the file; ``{"state_dict": ..., "epoch": ...}`` or a state dict alone.
        ignore: tensors not to read.

    Raises:
        UserError: it is missing or damaged, holds no state dict, or asks for something to be run.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; check the path")
    size = path.stat().st_size
    try:
        with ExitStack() as stack:
            read: ReadBytes | None = None
            if path.suffix == ".safetensors":
                value: Any = load_file(path)
            elif _is_zip(path):
                pickled, read = read_zip(stack.enter_context(zipfile.ZipFile(path)))
                value = unpickle(pickled, CheckpointUnpickler)
            else:
                value, read = read_legacy(path)
            state = value.get("state_dict", value) if isinstance(value, dict) else None
            if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
                raise UserError(f"checkpoint {path} holds no state dict; give one that does")
            wanted = {k.removeprefix("module."): v for k, v in state.items()}
            wanted = {k: v for k, v in wanted.items() if k not in ignore}
            described = [v for v in wanted.values() if isinstance(v, Described)]
            if sum(prod(v.size) * v.storage.dtype.itemsize for v in described) > size:
                raise pickle.UnpicklingError("it describes more than it holds")
            for name, tensor in wanted.items():
                if isinstance(tensor, Described) and read is not None:
                    wanted[name] = tensor.build(read)
    except (UserError, MemoryError, PermissionError):
        raise
    except AsksToRun as error:
        raise UserError(
            f"checkpoint {path} asks for {error} to be run, which no prompts need; nothing in it "
            "was executed, and it should not be trusted"
        ) from error
    except Exception as error:  # damaged files fail in whatever way
        raise UserError(
            f"{path} could not be read as a checkpoint: {_reason(path, error)}"
        ) from error
    if odd := [k for k, v in wanted.items() if not isinstance(v, Tensor)]:
        raise UserError(f"the state dict in {path} holds '{odd[0]}', which is no tensor")
    epoch = value.get("epoch")
    return Checkpoint(wanted, epoch if type(epoch) is int and epoch > 0 else None)


def _read_torchscript(path: Path) -> StateDict:
    state: StateDict = {}
    with zipfile.ZipFile(path) as archive:
        pickled, read = read_zip(archive)
        waiting, seen = [("", unpickle(pickled, ArchiveUnpickler))], set[int]()
        while waiting:
            place, record = waiting.pop()
            if id(record) in seen:  # shared, or a ring: once is enough
                continue
            seen.add(id(record))
            for name, value in getattr(record, "fields", {}).items():
                if isinstance(value, Described):
                    state[f"{place}{name}"] = value.build(read)
                elif isinstance(value, Record):
                    waiting.append((f"{place}{name}.", value))
    return state
