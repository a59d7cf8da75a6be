"""State dicts from files, read without running anything that is inside them.

Three containers hold CLIP weights in the wild: safetensors, PyTorch's zip files and OpenAI's
TorchScript archives. The last is a zip whose ``data.pkl`` names classes that only exist inside
the archive, so ``weights_only`` loading refuses it and ``torch.jit.load`` would compile the
code that comes along. Here the pickle is walked by an unpickler that knows tensors and plain
containers and nothing else.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dapt.errors import UserError

StateDict = dict[str, Tensor]

# Tensors of OpenAI's archives that describe the model and are no weights.
_DESCRIPTIONS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


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
        elif _is_torchscript(path):
            state = _read_torchscript(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(
            f"{path} could not be read as weights ({reason}); "
            "save it as safetensors or as a plain state dict"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
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


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class _Record:
    """Stands in for an object of the archive's own classes: its attributes, no behaviour."""

    def __setstate__(self, state: Any) -> None:
        self.fields = state if isinstance(state, dict) else {}


class _ArchiveUnpickler(pickle.Unpickler):
    """Builds tensors, plain containers and attribute records; refuses every other name."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(archive.open(f"{prefix}/data.pkl"))
        self.archive, self.prefix = archive, prefix

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Record
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # typed lists and tags; their content is kept as is
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it holds an unknown kind of storage")
        raw = bytearray(self.archive.read(f"{self.prefix}/data/{key}"))
        if len(raw) < numel * dtype.itemsize:
            raise pickle.UnpicklingError(f"its storage {key} is cut short")
        return torch.frombuffer(raw, dtype=dtype, count=numel) if numel else torch.empty(0)


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset).clone()


def _read_torchscript(path: Path) -> StateDict:
    with zipfile.ZipFile(path) as archive:
        prefix = next(n for n in archive.namelist() if n.endswith("/data.pkl")).rsplit("/", 1)[0]
        root = _ArchiveUnpickler(archive, prefix).load()
    state: StateDict = {}

    def collect(record: _Record, path: str) -> None:
        for name, value in getattr(record, "fields", {}).items():
            if isinstance(value, Tensor):
                state[path + name] = value
            elif isinstance(value, _Record):
                collect(value, f"{path}{name}.")

    collect(root, "")
    return state
