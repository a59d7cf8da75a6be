"""Tensors out of pickles, with nothing in a pickle imported, called or given behaviour.

PyTorch's files are pickles that describe tensors, with the tensors' bytes beside them: entries of
a zip, or, before PyTorch 1.6, simply what follows in the file. A pickle may name any function and
ask for it to be called. Here each name stands for one of a few makers of our own or, in
checkpoints of other people's training code, for an inert stand-in; nothing is ever imported.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A pickle of names and shapes; the tensors' bytes are elsewhere.
_MAX_PICKLE = 2**26

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class AsksToRun(pickle.UnpicklingError):
    """The pickle wants something called; its message is the name of that, such as posix.system."""


class Storage:
    """A tensor's bytes, not read yet: dtype, key of the place they are at, number of elements."""

    __slots__ = ("dtype", "key", "numel")

    def __init__(self, dtype: torch.dtype, key: str, numel: int) -> None:
        self.dtype, self.key, self.numel = dtype, key, numel

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it tries to change what was checked")

    @property
    def nbytes(self) -> int:
        """How many bytes there should be."""
        return self.numel * self.dtype.itemsize


# Gives a storage's bytes: all of them, or an error.
ReadBytes = Callable[[Storage], bytes]


class Described:
    """A tensor as the pickle describes it; built only once the pickle is read."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        numbers = [offset, *size, *stride]
        if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError("it describes a tensor that cannot be")
        self.storage, self.offset = storage, offset
        self.size, self.stride = tuple(size), tuple(stride)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it tries to change what was checked")

    def build(self, read: ReadBytes) -> Tensor:
        """Give the bytes their shape; never more elements than the storage has."""
        storage, size = self.storage, self.size
        last = self.offset + sum((n - 1) * s for n, s in zip(size, self.stride, strict=True))
        inside = prod(size) == 0 or last < storage.numel
        if not inside or prod(size) > storage.numel:
            raise pickle.UnpicklingError(f"its storage {storage.key} does not hold its tensor")
        raw = bytearray(read(storage))
        if prod(size) == 0:
            return torch.empty(size, dtype=storage.dtype)
        flat = torch.frombuffer(raw, dtype=storage.dtype, count=storage.numel)
        return flat.as_strided(size, self.stride, self.offset).clone()


class Record:
    """Stands in for an object of a TorchScript archive: its attributes, no behaviour."""

    def __setstate__(self, state: Any) -> None:
        self.fields = state if isinstance(state, dict) else {}


class _Mapping(dict[Any, Any]):
    """Any kind of dictionary; attributes it had as an object (a state dict's metadata) are lost."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _ForeignName(type):
    """A name that means nothing here; to call it is to run something, whatever it is."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise AsksToRun(cls.__name__)


class _Foreign:
    """Stands in for a foreign object: takes whatever the pickle gives it and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Keep nothing."""

    def extend(self, values: Any) -> None:
        """Keep nothing."""

    add = append


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


def _first(value: Any, *_: Any) -> Any:
    return value


class _Unpickler(pickle.Unpickler):
    """Builds descriptions of tensors and plain containers; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Maker(Described)
        if (module, name) == ("collections", "OrderedDict"):
            return _Maker(_Mapping)
        return self.find_other(module, name)

    def find_other(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _device, numel, *view = pid
        fits = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not fits or type(numel) is not int or numel < 0 or any(v is not None for v in view):
            raise pickle.UnpicklingError("it holds an unknown kind of storage")
        return Storage(dtype, key, numel)


class ArchiveUnpickler(_Unpickler):
    """For TorchScript archives, whose classes only exist inside them: these become records."""

    def find_other(self, module: str, name: str) -> Any:
        """A record, or a typed list or tag as its content."""
        if module.startswith("__torch__"):
            return type("Record", (Record,), {})  # a fresh class: nothing done to it lasts
        if module == "torch.jit._pickle":
            return _Maker(_first)
        return super().find_other(module, name)


# What the pickles of ordinary objects (optimisers, schedulers, numbers) call to make them. Only
# what may lead to a tensor is made; the others leave a stand-in.
_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("collections", "defaultdict"): lambda *_: _Mapping(),
    ("collections", "Counter"): _Mapping,
}
_NAMES_OF_VALUES = {
    *((module, "_reconstructor") for module in ("copyreg", "copy_reg")),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core")
      for name in ("scalar", "_reconstruct")),
    ("numpy", "dtype"),
    ("torch", "Size"),
    ("torch", "device"),
    ("_codecs", "encode"),
}  # fmt: skip


class CheckpointUnpickler(_Unpickler):
    """For what training code saves beside its tensors: foreign objects become stand-ins.

    Objects are made from their class and attributes, which runs nothing here. A call of anything
    else raises `AsksToRun`.
    """

    def find_other(self, module: str, name: str) -> Any:
        """A maker, a maker of stand-ins, or the class of stand-ins for this name."""
        if (module, name) in _MAKERS:
            return _Maker(_MAKERS[module, name])
        if (module, name) in _NAMES_OF_VALUES:
            return _Maker(lambda *_: object.__new__(_Foreign))
        said = "".join(c if c.isprintable() else "?" for c in f"{module}.{name}")
        return _ForeignName(said[:100], (_Foreign,), {"__slots__": ()})


def unpickle(raw: bytes, kind: type[_Unpickler]) -> Any:
    """The value of one pickle.

    Raises:
        AsksToRun: it asks for a call that `CheckpointUnpickler` does not know.
        Exception: it is damaged, in one of many ways.
    """
    return _next_pickle(io.BytesIO(raw), kind)


def _next_pickle(stream: io.BytesIO, kind: type[_Unpickler]) -> Any:
    """The value of the pickle that starts where the stream is; leaves the stream behind it."""
    start = stream.tell()
    # Read without effect first. Lengths beyond the end are found here, and so are numbers of
    # memo slots, for which the unpickler would reserve memory up to the highest.
    for opcode, argument, position in pickletools.genops(stream):
        slot = int(argument or 0) if opcode.name.endswith("PUT") else 0
        if not 0 <= slot <= (position or 0):
            raise pickle.UnpicklingError("it numbers more objects than it can hold")
    end = stream.tell()
    stream.seek(start)
    value = kind(io.BytesIO(stream.read(end - start))).load()
    stream.seek(end)
    return value


def read_zip(archive: zipfile.ZipFile) -> tuple[bytes, ReadBytes]:
    """The pickle in a PyTorch zip, and what reads its storages; no entry is ever extracted.

    Raises:
        Exception: it is no such zip.
    """
    names = [n for n in archive.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
    if not names or names[0] == "/data.pkl" or archive.getinfo(names[0]).file_size > _MAX_PICKLE:
        raise pickle.UnpicklingError("it has no data.pkl of a sensible size")
    prefix = names[0].rsplit("/", 1)[0]

    def read(storage: Storage) -> bytes:
        entry = archive.getinfo(f"{prefix}/data/{storage.key}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < storage.nbytes:
            raise pickle.UnpicklingError(f"its storage {storage.key} does not hold its tensor")
        return archive.read(entry)

    return archive.read(names[0]), read


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_legacy(path: Path) -> tuple[Any, ReadBytes]:
    """The value in a file of PyTorch before 1.6, and what reads its storages.

    Such a file is five pickles (a magic number, a version, facts of the machine, the value, the
    storages' keys in order), then for each key the number of elements and the bytes.

    Raises:
        AsksToRun: as `unpickle`.
        Exception: it is no such file, or damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(_MAX_PICKLE))
    if _next_pickle(stream, _Unpickler) != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("it is no PyTorch file")
    _version, machine = (_next_pickle(stream, _Unpickler) for _ in range(2))
    if not machine["little_endian"]:
        raise pickle.UnpicklingError("it was written on a big-endian machine")
    storages: dict[str, Storage] = {}

    class Unpickler(CheckpointUnpickler):
        def persistent_load(self, pid: Any) -> Storage:
            storage = super().persistent_load(pid)
            return storages.setdefault(storage.key, storage)

    value = _next_pickle(stream, Unpickler)
    keys = _next_pickle(stream, _Unpickler)
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise pickle.UnpicklingError("its list of storages is not that of its tensors")
    places, position = dict[str, int](), stream.tell()
    for key in keys:
        places[key] = position + 8
        position += 8 + storages[key].nbytes
    if position > size:
        raise pickle.UnpicklingError("it ends before its tensors do")

    def read(storage: Storage) -> bytes:
        with path.open("rb") as file:
            file.seek(places[storage.key] - 8)
            if int.from_bytes(file.read(8), "little") != storage.numel:
                raise pickle.UnpicklingError(f"its storage {storage.key} has another size")
            return file.read(storage.nbytes)

    return value, read
