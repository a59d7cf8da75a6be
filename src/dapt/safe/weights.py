"""State dicts from files, read without running anything that is inside them.

Four containers hold CLIP weights in the wild: safetensors, PyTorch's zip files, its older files,
and OpenAI's TorchScript archives, zips whose pickle names classes that only exist inside them.
Checkpoints of training code are such files too, full of foreign objects. All but safetensors hold
pickles, which `dapt.safe.unpickle` reads; it knows tensors and plain containers and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Container
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dapt.errors import UserError, reason_of
from dapt.safe.files import open_regular
from dapt.safe.unpickle import (
    MAX_HEADER,
    MAX_NAME,
    AsksToRun,
    Described,
    ReadBytes,
    Record,
    build,
    read_legacy,
    read_zip,
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

    Accepts ``.safetensors``, PyTorch's files (``.pt``, ``.pth``, ``.bin``; a nested
    ``state_dict`` and a ``module.`` prefix are unwrapped) and TorchScript archives.

    Raises:
        UserError: the file is missing, is none of these, holds anything but tensors, or an empty
            one, or asks for something to be run.
    """
    state = read_checkpoint(path, _DESCRIPTIONS, what="weights").state
    if not state:
        raise UserError(f"{path} holds no state dict; save model.state_dict() into it")
    return state


def read_checkpoint(
    path: Path, ignore: Container[str] = (), *, what: str = "a checkpoint"
) -> Checkpoint:
    """Read the state dict of a checkpoint that other people's training code saved.

    Args:
        path: the file; ``{"state_dict": ..., "epoch": ...}`` or a state dict alone.
        ignore: last parts of the names of tensors not to read.
        what: the file's role, for messages.

    Raises:
        UserError: it is missing or damaged, holds no state dict, something else than tensors in
            it, or an empty one, or asks for something to be run.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the path of a file that holds {what}")
    try:
        with ExitStack() as stack:
            value, read = _open(path, stack)
            epoch = value.get("epoch") if isinstance(value, dict) else None
            state = _state_of(value)
            if state is None:
                raise UserError(f"{path} holds no state dict; save model.state_dict() into it")
            wanted = {
                name.removeprefix("module."): v
                for name, v in state.items()
                if name.rpartition(".")[2] not in ignore
            }
            described = {name: v for name, v in wanted.items() if isinstance(v, Described)}
            if read is not None:
                wanted.update(build(described, read, path.stat().st_size))
    except (UserError, MemoryError, PermissionError):
        raise
    except AsksToRun as error:
        raise UserError(
            f"{path} could not be read as {what}: it asks for {error} to be run, which no tensors "
            "need; nothing in it was executed, and it should not be trusted"
        ) from error
    except Exception as error:  # damaged files fail in whatever way
        raise UserError(f"{path} could not be read as {what}: {_reason(path, error)}") from error
    for name, tensor in wanted.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path} holds '{name}', which is no tensor; save only tensors there")
        if not tensor.numel():
            shape = tuple(tensor.shape)
            raise UserError(f"{path} holds '{name}' of shape {shape}, a tensor without numbers")
    return Checkpoint(wanted, epoch if type(epoch) is int and 0 < epoch < 2**31 else None)


def _open(path: Path, stack: ExitStack) -> tuple[Any, ReadBytes | None]:
    """A file's value, and what reads the tensors described in it, if it is not read already."""
    if path.suffix == ".safetensors":
        check_safetensors(path)
        return load_file(path), None
    if _is_zip(path):
        return read_zip(stack.enter_context(_zip(path)))
    return read_legacy(path)


def _state_of(value: Any) -> dict[str, Any] | None:
    """The state dict in what was read."""
    if isinstance(value, Record):
        return _flat(value)
    state = value.get("state_dict", value) if isinstance(value, dict) else None
    if isinstance(state, Tensor | Described):  # one tensor of that name
        state = value
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        return None
    return state


def _flat(module: Record) -> dict[str, Described]:
    """The tensors of a TorchScript module and of those inside it, by their dotted names."""
    state: dict[str, Described] = {}
    waiting, seen = [("", module)], set[int]()
    while waiting:
        place, record = waiting.pop()
        if id(record.fields) in seen:  # shared, or a ring: once is enough
            continue
        seen.add(id(record.fields))
        for name, value in record.fields.items():
            if not isinstance(name, str) or len(place) + len(name) > MAX_NAME:
                raise ValueError("it has a name that no module has")
            if isinstance(value, Described):
                state[f"{place}{name}"] = value
            elif isinstance(value, Record):
                waiting.append((f"{place}{name}.", value))
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
    return f"{reason_of(error)}; save it as safetensors or as a plain state dict"


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the form of OpenAI's own weights."""
    if not _is_zip(path):
        return False
    try:
        with _zip(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (ValueError, zipfile.BadZipFile):  # whoever reads it says so
        return False


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it is one, but so damaged that not even that can be told
        return True


def _zip(path: Path) -> zipfile.ZipFile:
    """A zip whose directory is small enough to be listed, which `ZipFile` does whatever it is."""
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    _check_header(end[zipfile._ECD_SIZE] if end else 0)  # type: ignore[attr-defined]
    return zipfile.ZipFile(path)


def check_safetensors(path: Path, largest: int | None = None) -> None:
    """See that a safetensors file is an ordinary one and lists no more tensors than a model has.

    The library would make an object of each, a hundred megabytes of names if need be. ``largest``
    is the most bytes it may have.

    Raises:
        OSError, ValueError: it is not.
    """
    with open_regular(path) as file:
        _check_header(int.from_bytes(file.read(8), "little"))
        size = os.fstat(file.fileno()).st_size
    if largest is not None and size > largest:
        raise ValueError(f"it has {size:,} bytes, and {largest:,} are read")


def _check_header(size: int) -> None:
    if size > MAX_HEADER:
        raise ValueError(f"its list of tensors has {size:,} bytes, and {MAX_HEADER:,} are read")
