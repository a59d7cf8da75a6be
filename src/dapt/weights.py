"""State dicts from files, read without running anything that is inside them.

Three containers hold CLIP weights in the wild: safetensors, PyTorch's zip files and OpenAI's
TorchScript archives. The last is a zip whose ``data.pkl`` names classes that only exist inside
the archive, so ``weights_only`` loading refuses it and ``torch.jit.load`` would compile the
code that comes along. Here the pickle is walked by an unpickler that knows tensors and plain
containers and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import torch
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
    if path.suffix != ".safetensors" and not zipfile.is_zipfile(path) and start[:1] != b"\x80":
        return "it is no PyTorch file; give safetensors or a saved state dict"
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        return "it holds more than tensors; save only the model's state dict"
    first = " ".join(str(error).split())[:120] or type(error).__name__
    return f"{first}; save it as safetensors or as a plain state dict"


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the form of OpenAI's own weights."""
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


# A pickle of names and shapes; the tensors' bytes are other entries of the archive.
_MAX_PICKLE = 2**26


class _Record:
    """Stands in for an object of the archive's own classes: its attributes, no behaviour."""

    def __setstate__(self, state: Any) -> None:
        self.fields = state if isinstance(state, dict) else {}


class _Storage:
    """A tensor's bytes, not read yet: dtype, entry of the archive, number of elements."""

    __slots__ = ("dtype", "key", "numel")

    def __init__(self, dtype: torch.dtype, key: str, numel: int) -> None:
        self.dtype, self.key, self.numel = dtype, key, numel


class _Rebuilt:
    """A tensor as the pickle describes it; built only once the pickle is read."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        numbers = [offset, *size, *stride]
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError("it describes a tensor that cannot be")
        self.storage, self.offset = storage, offset
        self.size, self.stride = tuple(size), tuple(stride)

    def build(self, archive: zipfile.ZipFile, prefix: str) -> Tensor:
        """Read the bytes and give them their shape; never more than the file holds."""
        storage, size = self.storage, self.size
        entry = archive.getinfo(f"{prefix}/data/{storage.key}")
        wanted = storage.numel * storage.dtype.itemsize
        last = self.offset + sum((n - 1) * s for n, s in zip(size, self.stride, strict=True))
        inside = prod(size) == 0 or last < storage.numel
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size >= wanted
        if not stored or not inside or prod(size) > storage.numel:
            raise pickle.UnpicklingError(f"its storage {storage.key} does not hold its tensor")
        if prod(size) == 0:
            return torch.empty(size, dtype=storage.dtype)
        raw = bytearray(archive.read(entry))
        flat = torch.frombuffer(raw, dtype=storage.dtype, count=storage.numel)
        return flat.as_strided(size, self.stride, self.offset).clone()


class _Maker:
    """What a name in the pickle stands for: callable, and nothing else can be done to it."""

    __slots__ = ("make",)
    make: Any

    def __init__(self, make: Any) -> None:
        object.__setattr__(self, "make", make)

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it tries to change what reads it")


class _ArchiveUnpickler(pickle.Unpickler):
    """Builds descriptions of tensors, plain containers and records; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type("Record", (_Record,), {})  # a fresh class: nothing done to it lasts
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Maker(_Rebuilt)
        if (module, name) == ("collections", "OrderedDict"):
            return _Maker(dict)
        if module == "torch.jit._pickle":  # typed lists and tags; their content is kept as is
            return _Maker(lambda value, *_: value)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, numel = pid
        fits = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not fits or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("it holds an unknown kind of storage")
        return _Storage(dtype, key, numel)


def _read_torchscript(path: Path) -> StateDict:
    state: StateDict = {}
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        if not names or archive.getinfo(names[0]).file_size > _MAX_PICKLE:
            raise pickle.UnpicklingError("it has no data.pkl of a sensible size")
        prefix = names[0].rsplit("/", 1)[0]
        root = _ArchiveUnpickler(io.BytesIO(archive.read(names[0]))).load()
        waiting, seen = [("", root)], set[int]()
        while waiting:
            place, record = waiting.pop()
            if id(record) in seen:  # shared, or a ring: once is enough
                continue
            seen.add(id(record))
            for name, value in getattr(record, "fields", {}).items():
                if isinstance(value, _Rebuilt):
                    state[f"{place}{name}"] = value.build(archive, prefix)
                elif isinstance(value, _Record):
                    waiting.append((f"{place}{name}.", value))
    return state
