"""Tensors out of pickles, with nothing in a pickle imported, called or given behaviour.

PyTorch's files are pickles that describe tensors, with the tensors' bytes beside them: entries of
a zip, or, before PyTorch 1.6, simply what follows in the file. A pickle is a program for a small
machine, which may name any function and ask for it to be called. This is that machine without
functions: `pickletools` takes a pickle apart, and of its steps those are carried out that describe
tensors and plain containers. A name is no more than its text.

Whatever a pickle says, each step takes about the same small time and memory, and there are at most
`_MAX_STEPS`: nothing is copied, compared or hashed but text and small numbers.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

# A pickle of names and shapes; the tensors' bytes are elsewhere. A thousand tensors take about
# 100 KB and 30,000 steps.
MAX_HEADER = 2**22
_MAX_STEPS = 2**19
MAX_TENSORS = 2**16
_MAX_DIMENSIONS = 64
_MAX_ARGUMENTS = 16
MAX_NAME = 1000

_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}


class AsksToRun(UnpicklingError):
    """The pickle wants something called; its message is the name of that, such as posix.system."""


@dataclass(frozen=True)
class Storage:
    """A tensor's bytes, not read yet: dtype, key of the place they are at, number of elements."""

    dtype: torch.dtype
    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        """How many bytes there should be."""
        return self.numel * self.dtype.itemsize


# Gives a storage's bytes: all of them, or an error.
ReadBytes = Callable[[Storage], bytes]


class Described:
    """A tensor as the pickle describes it: a view of a storage, and inside it."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        shaped = type(size) is type(stride) is tuple and len(size) == len(stride) <= _MAX_DIMENSIONS
        if not isinstance(storage, Storage) or not shaped:
            raise UnpicklingError("it describes a tensor that cannot be")
        if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
            raise UnpicklingError("it describes a tensor that cannot be")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        elements = prod(size)
        if elements > storage.numel or (elements and last >= storage.numel):
            raise UnpicklingError(f"its storage {storage.key} does not hold its tensor")
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on its own."""
        return prod(self.size) * self.storage.dtype.itemsize


class Record:
    """Stands in for an object of a TorchScript archive: its attributes, no behaviour."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: dict[Any, Any] = {}


class _Name:
    """A name in the pickle: module and attribute with a space between."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class _Nothing:
    """Stands in for every other object: takes whatever the pickle gives it and keeps nothing."""

    __slots__ = ()


_NOTHING, _MARK = _Nothing(), object()


def _first(value: Any, *_: Any) -> Any:
    return value


# What the pickles of state dicts and of ordinary objects (optimisers, schedulers, numbers) call
# to make them. Only what may lead to a tensor is made.
_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": Described,
    "torch._utils _rebuild_parameter": _first,
    "torch._utils _rebuild_parameter_with_state": _first,
    "collections defaultdict": lambda *_: {},
}
_MAPPINGS = {"collections OrderedDict", "collections Counter"}
_NAMES_OF_VALUES = {
    *(f"{module} _reconstructor" for module in ("copyreg", "copy_reg")),
    *(f"{module} {kind}" for module in ("builtins", "__builtin__")
      for kind in ("set", "frozenset")),
    *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core")
      for name in ("scalar", "_reconstruct")),
    "numpy dtype",
    "torch Size",
    "torch device",
    "_codecs encode",
}  # fmt: skip

_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip


class _Machine:
    """Carries out the pickles of one file (protocol 2 and later, as PyTorch writes them).

    Attributes:
        storages: those that it named, by their keys.
    """

    def __init__(self, stream: io.BytesIO) -> None:
        self.stream, self.left = stream, _MAX_STEPS
        self.stack: list[Any] = []
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """The value of the pickle where the stream is; the stream is left behind it."""
        memo: dict[int, Any] = {}
        push, pop = self.stack.append, self.pop
        steps: Iterable[tuple[pickletools.OpcodeInfo, Any, Any]] = pickletools.genops(self.stream)
        for opcode, argument, _ in steps:
            self.spend(1)
            name = opcode.name
            if name in _LITERALS:
                push(argument)
                continue
            match name:
                case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                    memo[len(memo) if argument is None else argument] = self.top()
                case "BINGET" | "LONG_BINGET":
                    push(memo[argument])
                case "MARK":
                    push(_MARK)
                case "NONE":
                    push(None)
                case "NEWTRUE" | "NEWFALSE":
                    push(name == "NEWTRUE")
                case "EMPTY_TUPLE":
                    push(())
                case "TUPLE":
                    push(tuple(self.pop_to_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    push(tuple([pop() for _ in range(int(name[-1]))][::-1]))
                case "EMPTY_LIST":
                    push([])
                case "APPEND":
                    value = pop()
                    self.extend([value])
                case "APPENDS":
                    self.extend(self.pop_to_mark())
                case "EMPTY_DICT":
                    push({})
                case "SETITEM":
                    value, key = pop(), pop()
                    self.update([key, value])
                case "SETITEMS":
                    self.update(self.pop_to_mark())
                case "EMPTY_SET":
                    push(_NOTHING)
                case "ADDITEMS":
                    self.extend(self.pop_to_mark())
                case "FROZENSET":
                    self.pop_to_mark()
                    push(_NOTHING)
                case "GLOBAL":
                    push(_Name(argument))
                case "STACK_GLOBAL":
                    attribute, module = pop(), pop()
                    if not isinstance(module, str) or not isinstance(attribute, str):
                        raise UnpicklingError("it holds a name that is no text")
                    push(_Name(f"{module[:MAX_NAME]} {attribute[:MAX_NAME]}"))
                case "REDUCE":
                    arguments, called = pop(), pop()
                    push(self.call(called, arguments))
                case "NEWOBJ" | "NEWOBJ_EX":
                    for _argument in range(1 if name == "NEWOBJ" else 2):
                        pop()
                    push(self.new(pop()))
                case "BUILD":
                    state = pop()
                    self.build(self.top(), state)
                case "BINPERSID":
                    push(self.storage(pop()))
                case "POP":
                    self.stack.pop()
                case "POP_MARK":
                    self.pop_to_mark()
                case "FRAME":
                    if argument > len(self.stream.getbuffer()) - self.stream.tell():
                        raise UnpicklingError("it ends before it should")
                case "PROTO":
                    pass
                case "STOP":
                    break
                case _:
                    raise UnpicklingError(f"it has a step, {name}, that no tensor needs")
        value = pop()
        if self.stack:
            raise UnpicklingError("it leaves something over")
        return value

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise UnpicklingError(f"it takes more than {_MAX_STEPS:,} steps to read")

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise UnpicklingError("it takes what is not there")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def pop_to_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while place >= 0 and self.stack[place] is not _MARK:
            place -= 1
        if place < 0:
            raise UnpicklingError("it takes what is not there")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def extend(self, values: list[Any]) -> None:
        container = self.top()
        if isinstance(container, list):
            container.extend(values)
        elif container is not _NOTHING:
            raise UnpicklingError("it adds to what is no list")

    def update(self, items: list[Any]) -> None:
        """Put keys and values, in turns, into what is on top."""
        container = self.top()
        if container is _NOTHING:
            return
        if not isinstance(container, dict) or len(items) % 2:
            raise UnpicklingError("it sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Of other keys, which no tensor is found by, nothing but that they are there is kept:
            # hashing them may take as long as whoever made them likes.
            plain = type(key) is str or (type(key) is int and abs(key) < 2**64)
            if plain and key in container:
                raise UnpicklingError(f"the key {str(key)[:80]!r} is there twice")
            container[key if plain else object()] = value

    def call(self, called: Any, arguments: Any) -> Any:
        few = type(arguments) is tuple and len(arguments) <= _MAX_ARGUMENTS
        if not isinstance(called, _Name) or not few:
            raise UnpicklingError("it calls what is no function")
        if called.text in _MAKERS:
            return _MAKERS[called.text](*arguments)
        if called.text in _MAPPINGS:
            return self.mapping(*arguments)
        if called.text in _NAMES_OF_VALUES:
            return _NOTHING
        if called.text.startswith("torch.jit._pickle "):  # a typed list or tag: its content
            return _first(*arguments)
        said = "".join(c if c.isprintable() else "?" for c in called.text.replace(" ", ".", 1))
        raise AsksToRun(said[:100])

    def new(self, kind: Any) -> Any:
        """An object of a class, as it is before it gets its attributes."""
        if not isinstance(kind, _Name):
            raise UnpicklingError("it makes an object of what is no class")
        return Record() if kind.text.startswith("__torch__") else _NOTHING

    def mapping(self, items: Any = (), *_: Any) -> dict[Any, Any]:
        """A dictionary of pairs, as Python 2 wrote them, or the one that it is given."""
        if isinstance(items, dict):
            return items
        if not isinstance(items, list | tuple):
            raise UnpicklingError("it makes a dictionary of something else")
        self.spend(len(items))
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in items):
            raise UnpicklingError("it makes a dictionary of something else")
        self.stack.append({})
        self.update([part for pair in items for part in pair])
        return self.pop()

    def build(self, thing: Any, state: Any) -> None:
        """Give an object its attributes; those of dictionaries (a state dict's metadata) go."""
        if isinstance(thing, Record) and isinstance(state, dict):
            thing.fields = state
        elif not isinstance(thing, Record | dict | _Nothing):
            raise UnpicklingError("it tries to change what was checked")

    def storage(self, pid: Any) -> Storage:
        few = type(pid) is tuple and 5 <= len(pid) <= 6
        if not few or not isinstance(pid[1], _Name):
            raise UnpicklingError("it holds an unknown kind of storage")
        kind, named, key, _device, numel, *view = pid
        dtype = _DTYPES.get(named.text)
        if (
            dtype is None
            or (kind, view) not in (("storage", []), ("storage", [None]))
            or not (type(key) is str and len(key) <= MAX_NAME)
            or not (type(numel) is int and 0 <= numel < 2**63)
        ):
            raise UnpicklingError("it holds an unknown kind of storage")
        storage = Storage(dtype, key, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise UnpicklingError(f"its storage {key} has two sizes")
        return storage


def read_zip(archive: zipfile.ZipFile) -> tuple[Any, ReadBytes]:
    """The value in a PyTorch zip, and what reads its storages; no entry is ever extracted.

    Raises:
        AsksToRun: its pickle asks for a call.
        Exception: it is no such zip, or damaged, in one of many ways.
    """
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise UnpicklingError("it has two entries of one name")
    found = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
    if not found or found[0] == "/data.pkl" or archive.getinfo(found[0]).file_size > MAX_HEADER:
        raise UnpicklingError("it has no data.pkl of a sensible size")
    prefix = found[0].rsplit("/", 1)[0]

    def read(storage: Storage) -> bytes:
        entry = archive.getinfo(f"{prefix}/data/{storage.key}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < storage.nbytes:
            raise UnpicklingError(f"its storage {storage.key} does not hold its tensor")
        with archive.open(entry) as file:
            return file.read(storage.nbytes)

    return _Machine(io.BytesIO(archive.read(found[0]))).run(), read


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_legacy(path: Path) -> tuple[Any, ReadBytes]:
    """The value in a file of PyTorch before 1.6, and what reads its storages.

    Such a file is five pickles (a magic number, a version, facts of the machine, the value, the
    storages' keys in order), then for each key the number of elements and the bytes.

    Raises:
        AsksToRun: its pickle asks for a call.
        Exception: it is no such file, or damaged, in one of many ways.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(MAX_HEADER))
    pickles = _Machine(stream)
    magic, _version, machine = (pickles.run() for _ in range(3))
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise UnpicklingError("it is no PyTorch file")
    if not machine["little_endian"]:
        raise UnpicklingError("it was written on a big-endian machine")
    value, storages, keys = pickles.run(), pickles.storages, pickles.run()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UnpicklingError("its list of storages is no list of names")
    if len(keys) != len(storages) or set(keys) != set(storages):
        raise UnpicklingError("its list of storages is not that of its tensors")
    places, position = dict[str, int](), stream.tell()
    for key in keys:
        places[key] = position
        position += 8 + storages[key].nbytes
    if position > size:
        raise UnpicklingError("it ends before its tensors do")

    def read(storage: Storage) -> bytes:
        with path.open("rb") as file:
            file.seek(places[storage.key])
            if int.from_bytes(file.read(8), "little") != storage.numel:
                raise UnpicklingError(f"its storage {storage.key} has another size")
            return file.read(storage.nbytes)

    return value, read


def build(described: Mapping[str, Described], read: ReadBytes, size: int) -> dict[str, Tensor]:
    """Give descriptions their bytes; each storage is read once.

    Args:
        described: what is wanted, by name.
        read: gives the bytes of a storage.
        size: of the file. Views may overlap: no more than its bytes is built of them.

    Raises:
        UnpicklingError: it describes more than it holds.
    """
    storages = {d.storage.key: d.storage for d in described.values() if d.nbytes}
    held = max(sum(d.nbytes for d in described.values()), sum(s.nbytes for s in storages.values()))
    if held > size or len(described) > MAX_TENSORS:
        raise UnpicklingError("it describes more than it holds")
    flat = {
        key: torch.frombuffer(bytearray(read(s)), dtype=s.dtype, count=s.numel)
        for key, s in storages.items()
    }
    built = {}
    for name, d in described.items():
        if not d.nbytes:
            built[name] = torch.empty(d.size, dtype=d.storage.dtype)
            continue
        view = flat[d.storage.key].as_strided(d.size, d.stride, d.offset)
        # A part would keep all of its storage.
        built[name] = view if d.nbytes == d.storage.nbytes else view.clone()
    return built
