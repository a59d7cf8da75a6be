"""State dicts from files, read without running anything that is inside them.

Four containers hold CLIP weights in the wild: safetensors, PyTorch's zip files, its older files,
and OpenAI's TorchScript archives, zips whose pickle names classes that only exist inside them.
Checkpoints of training code are such files too, full of foreign objects. All but safetensors hold
pickles, which `dapt.safe.unpickle` reads.
"""

from __future__ import annotations

import zipfile
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from dapt.errors import UserError, reason_of
from dapt.safe.files import open_regular
from dapt.safe.unpickle import Described, build, check_header, open_zip, read_pickled

StateDict = dict[str, Tensor]

# Tensors of OpenAI's archives that describe the model and are no weights.
_DESCRIPTIONS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


class Checkpoint(NamedTuple):
    """What training code saved: its state dict, and after which epoch if it says so."""

    state: StateDict
    epoch: int | None


def read_state_dict(path: Path) -> StateDict:
    """The weights in a file, by name, on the CPU; a `UserError` if none, or of `read_checkpoint`.

    Files are ``.safetensors``, PyTorch's (``.pt``, ``.pth``, ``.bin``; a nested ``state_dict``
    and a ``module.`` prefix are unwrapped) or TorchScript archives.
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
    refused = f"{path} could not be read as {what}"
    try:
        with open_regular(path) as file:
            if file.read(23) == b"version https://git-lfs":
                raise UserError(f"{refused}: it is a git-lfs pointer; run 'git lfs pull'")
            if path.suffix == ".safetensors":
                check_safetensors(path)
                value = load_file(path)
            else:
                value = read_pickled(file)
            wanted = {
                name.removeprefix("module."): v
                for name, v in _state_of(value, path).items()
                if name.rpartition(".")[2] not in ignore
            }
            described = {name: v for name, v in wanted.items() if isinstance(v, Described)}
            wanted |= build(described, path.stat().st_size)
    except (UserError, MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged files fail in whatever way
        way_out = "save it as safetensors or as a plain state dict"
        raise UserError(f"{refused}: {reason_of(error)}; {way_out}") from error
    for name, tensor in wanted.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path} holds '{name}', which is no tensor; save only tensors there")
        if not tensor.numel():
            shaped = f"'{name}' of shape {tuple(tensor.shape)}"
            raise UserError(f"{path} holds {shaped}, a tensor without numbers")
    epoch = value.get("epoch") if isinstance(value, dict) else None
    return Checkpoint(wanted, epoch if type(epoch) is int and 0 < epoch < 2**31 else None)


def _state_of(value: Any, path: Path) -> dict[str, Any]:
    """The state dict in what was read."""
    state = value.get("state_dict", value) if isinstance(value, dict) else None
    if isinstance(state, Tensor | Described):  # one tensor of that name
        state = value
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds no state dict; save model.state_dict() into it")
    return state


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the form of OpenAI's own weights."""
    # Of what cannot be opened, whoever reads it says so.
    with suppress(OSError, ValueError, zipfile.BadZipFile), open_regular(path) as file:
        archive = open_zip(file)
        names = archive.namelist() if archive else []
        return any(name.endswith("/constants.pkl") for name in names)
    return False


def check_safetensors(path: Path, largest: int | None = None) -> None:
    """See that a safetensors file is an ordinary one and lists no more tensors than a model has.

    The library would make an object of each, a hundred megabytes of names if need be.

    Raises:
        OSError, ValueError: it is not, or has more than ``largest`` bytes.
    """
    with open_regular(path, largest) as file:
        check_header(int.from_bytes(file.read(8), "little"))
