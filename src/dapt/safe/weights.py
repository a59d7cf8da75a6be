"""State dicts from files, with nothing that is inside them run, imported or given behaviour.

They are safetensors, PyTorch's zip files, its older files, and OpenAI's TorchScript archives, zips
whose pickle names classes that only exist inside them. All but the first are pickles that describe
tensors, among any foreign objects, with the tensors' bytes beside them: entries of a zip, or (until
PyTorch 1.6) simply what follows in the file. A pickle is a program for a small machine, which may
name any function and ask for it to be called. This is that machine without functions: `pickletools`
takes a pickle apart, and of its steps those are carried out that describe tensors and plain
containers (`pickles.yaml`). Each takes about the same small time and memory, and there are at most
`_MAX_STEPS`: nothing is copied, compared or hashed but text and small numbers.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from dapt.errors import UserError, reason_of
from dapt.safe.files import open_regular, read_json, read_yaml
from dapt.safe.wrappers import renamed, unwrapped

StateDict = dict[str, Tensor]

# Tensors that describe a model or its training and are no weights.
_DESCRIPTIONS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids",
                 "n_averaged")  # fmt: skip
_INDEX = ".index.json"  # ends the name of a file that tells in which file each tensor is

# A pickle of names and shapes; the tensors' bytes are elsewhere. A thousand tensors take about
# 100 KB and 30,000 steps.
_MAX_HEADER, _MAX_STEPS, _MAX_TENSORS = 2**22, 2**19, 2**16
_MAX_PARTS, _MAX_NAME = 64, 1000  # of a tensor's dimensions or a call's arguments; of characters


class Checkpoint(NamedTuple):
    """What training code saved: its state dict, after which epoch if it says so, and metadata."""

    state: StateDict
    epoch: int | None
    facts: Mapping[str, Any] = MappingProxyType({})  # texts and numbers, not looked at


def read_state_dict(path: Path) -> StateDict:
    """The weights in a file, by name, on the CPU; a `UserError` if none, or of `read_checkpoint`.

    Files are ``.safetensors``, PyTorch's (``.pt``, ``.pth``, ``.ckpt``, ``.bin``), TorchScript
    archives, or the index (``.index.json``) of such files. What training code puts around a state
    dict and before its names is taken off.
    """
    files = _shards(path) if path.name.endswith(_INDEX) else [path]
    state = StateDict()
    for file in files:
        state |= read_checkpoint(file, _DESCRIPTIONS, what="weights").state
    if not state:
        raise UserError(f"{path} holds no state dict; save model.state_dict() into it")
    # The scale of logits, which every CLIP has, tells below which attribute of others' code it is.
    scales = [name for name in state if name.endswith(".logit_scale")]
    if "logit_scale" not in state and len(scales) == 1:
        before = scales[0].removesuffix("logit_scale")
        state = {name.removeprefix(before): tensor for name, tensor in state.items()}
    return state


def _shards(index: Path) -> list[Path]:
    """The files beside an index over which it says that weights are spread."""
    listed = read_json(index, "the index of weights")
    places = listed.get("weight_map") if isinstance(listed, dict) else None
    names = set(places.values()) if isinstance(places, dict) and _plain(places.values()) else set()
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{index} lists no files beside it; give the one that came with them")
    if absent := sorted(name for name in names if not (index.parent / name).is_file()):
        raise UserError(f"{index} lists {absent[0]}, which is not beside it; put it there")
    return [index.parent / name for name in sorted(names)]


def _plain(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def read_checkpoint(
    path: Path, ignore: Container[str] = (), *, what: str = "a checkpoint"
) -> Checkpoint:
    """Read the state dict, alone or as ``{"state_dict": ..., "epoch": ...}``, of training code.

    Other wrappers and what wrapped modules put into names are taken off too.

    Tensors whose names end in a part to ``ignore`` are not read; ``what`` is for messages. It is a
    `UserError` if the file is missing or damaged, holds no state dict, anything but tensors in it,
    or an empty one, or asks for something to be run.
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
                value: Any = load_file(path)
            else:
                value = _read_pickled(file)
            state = unwrapped(value, _is_tensor)
            if not isinstance(state, dict) or not _plain(state):
                raise UserError(f"{path} holds no state dict; save model.state_dict() into it")
            state = renamed(state, ignore, path)
            described = {name: v for name, v in state.items() if isinstance(v, _Described)}
            state |= _build_tensors(described, path.stat().st_size)
    except (UserError, MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged files fail in whatever way
        raise UserError(f"{refused}: {reason_of(error)}; save it as safetensors") from error
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path} holds '{name}', which is no tensor; save only tensors there")
        if not tensor.numel():
            shape = tuple(tensor.shape)
            raise UserError(f"{path} holds '{name}' of shape {shape}, a tensor without numbers")
    epoch, facts = (
        value.get(n) if isinstance(value, dict) else None for n in ("epoch", "metadata")
    )
    said = {k: v for k, v in facts.items() if type(k) is str} if isinstance(facts, dict) else {}
    plain = {name: v for name, v in said.items() if isinstance(v, int | float | str)}
    return Checkpoint(state, epoch if type(epoch) is int and 0 < epoch < 2**31 else None, plain)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | _Described)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the form of OpenAI's own weights."""
    # Of what cannot be opened, whoever reads it says so.
    with suppress(OSError, ValueError, zipfile.BadZipFile), open_regular(path) as file:
        names = archive.namelist() if (archive := _open_zip(file)) else []
        return any(name.endswith("/constants.pkl") for name in names)
    return False


def check_safetensors(path: Path, largest: int | None = None) -> None:
    """See that a safetensors file is an ordinary one and lists no more tensors than a model has.

    The library would make an object of each, a hundred megabytes of names if need be. An `OSError`
    or a `ValueError` if it is not, or has more than ``largest`` bytes.
    """
    with open_regular(path, largest) as file:
        _check_header(int.from_bytes(file.read(8), "little"))


def _check_header(size: int) -> None:
    if size > _MAX_HEADER:
        raise ValueError(f"its list of tensors has {size:,} bytes, and {_MAX_HEADER:,} are read")


@dataclass(frozen=True)
class _Storage:
    """A tensor's bytes, not read yet: dtype, key of the place they are at, number of elements."""

    dtype: torch.dtype
    key: str
    numel: int
    nbytes: int
    read: Callable[[_Storage], bytes] = field(compare=False)


@dataclass(frozen=True, eq=False)
class _Described:
    """A tensor as the pickle describes it: a view of a storage, or so it says."""

    storage: _Storage
    offset: Any
    size: Any
    stride: Any

    def __post_init__(self) -> None:
        known = isinstance(self.storage, _Storage)
        if not known or max(len(self.size), len(self.stride)) > _MAX_PARTS:
            raise UnpicklingError("it describes a tensor that cannot be")


@dataclass(eq=False)
class _Record:
    """Stands in for an object of a TorchScript archive: its attributes, no behaviour."""

    fields: dict[Any, Any] = field(default_factory=dict)


class _Name(str):
    """A dotted name in the pickle, no more than its text."""

    __slots__ = ()


# Stands in for every other object: takes whatever the pickle gives it and keeps nothing.
_NOTHING = object()


def _new(kind: Any, *_: Any) -> Any:
    """An object of a class, as it is before it gets its attributes."""
    if not isinstance(kind, _Name):
        raise UnpicklingError("it makes an object of what is no class")
    return _Record() if kind.startswith("__torch__") else _NOTHING


def _build(thing: Any, state: Any) -> Any:
    """Give an object its attributes; those of dictionaries (a state dict's metadata) go."""
    if isinstance(thing, _Record) and isinstance(state, dict):
        thing.fields = state
    elif thing is not _NOTHING and not isinstance(thing, _Record | dict):
        raise UnpicklingError("it tries to change what was checked")
    return thing


def _extend(container: Any, values: list[Any]) -> Any:
    if container is not _NOTHING:
        container.extend(values)
    return container


def _update(container: Any, items: Iterable[Any]) -> Any:
    """Put pairs of a key and a value into a dictionary."""
    for key, value in items if container is not _NOTHING else ():
        # Of other keys, which no tensor is found by, nothing but that they are there is kept:
        # hashing them may take as long as whoever made them likes.
        plain = type(key) is str or (type(key) is int and abs(key) < 2**64)
        if plain and key in container:
            raise UnpicklingError(f"the key {str(key)[:80]!r} is there twice")
        container[key if plain else object()] = value
    return container


# What is made of what a step takes from the stack, or of its argument, or of a call's arguments.
_MAKE: dict[str, Callable[..., Any]] = {
    "first": lambda value, *_: value,
    "none": lambda *_: None,
    "nothing": lambda *_: _NOTHING,
    "true": lambda: True,
    "false": lambda: False,
    "parts": lambda *parts: parts,
    "tuple": tuple,
    "list": list,
    "dict": lambda *_: {},
    "append": lambda container, value: _extend(container, [value]),
    "extend": _extend,
    "set one": lambda container, *item: _update(container, [item]),
    "set many": lambda old, new: _update(old, zip(new[::2], new[1::2], strict=True)),
    "name": lambda *p: _Name(".".join(part[:_MAX_NAME] for part in p).replace(" ", ".", 1)),
    "new": _new,
    "build": _build,
    # Of pairs, as Python 2 wrote them, or of a dictionary.
    "mapping": lambda items=(): items if isinstance(items, dict) else _update({}, items),
    "tensor": lambda *parts: _Described(*parts[:4]),
}
_TABLE = read_yaml(Path(__file__).with_name("pickles.yaml"), "table of pickles")
_STEPS, _CALLS = (
    {name: _MAKE[how] for how, names in _TABLE[kind].items() for name in names}
    for kind in ("steps", "calls")
)
_DTYPES = {name: getattr(torch, dtype) for name, dtype in _TABLE["dtypes"].items()}


class _Machine:
    """Carries out the pickles of one file (protocol 2 and later, as PyTorch writes them)."""

    def __init__(self, stream: io.BytesIO, read: Callable[[_Storage], bytes]) -> None:
        self.stream, self.read, self.left = stream, read, _MAX_STEPS
        self.storages: dict[str, _Storage] = {}  # that it named, by their keys
        self.steps = _STEPS | {"REDUCE": self.call, "BINPERSID": self.storage}
        # A mark puts the stack aside for a new one; what takes all above the mark gets it back.
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []

    def run(self) -> Any:
        """The value of the pickle where the stream is; the stream is left behind it."""
        self.memo: dict[int, Any] = {}
        argument: Any
        try:
            for opcode, argument, _ in pickletools.genops(self.stream):
                self.spend(1)
                match opcode.name:
                    case "STOP":
                        break
                    case "MARK":
                        self.below.append(self.stack)
                        self.stack = []
                    case "POP" if not self.stack:
                        self.stack = self.below.pop()
                    case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                        place = len(self.memo) if argument is None else argument
                        self.memo[place] = self.stack[-1]
                    case "BINGET" | "LONG_BINGET":
                        self.stack.append(self.memo[argument])
                    case "FRAME" if argument > len(self.stream.getbuffer()) - self.stream.tell():
                        raise UnpicklingError("it ends before it should")
                    case name if name in self.steps:
                        taken = self.take(opcode) if argument is None else [argument]
                        made = self.steps[name](*taken)
                        if opcode.stack_after:
                            self.stack.append(made)
                    case name:
                        raise UnpicklingError(f"it has a step, {name}, that no tensor needs")
            (value,) = self.take(opcode)
        except LookupError as error:
            raise UnpicklingError("it takes what is not there") from error
        if self.stack or self.below:
            raise UnpicklingError("it leaves something over")
        return value

    def take(self, opcode: pickletools.OpcodeInfo) -> list[Any]:
        """Take from the stack what a step needs, of the types that it needs."""
        taken = []
        for kind in reversed(opcode.stack_before):
            if kind is pickletools.stackslice:
                taken.append(self.stack)
                self.stack = self.below.pop()
            elif kind is not pickletools.markobject:
                taken.append(self.stack.pop())
                if taken[-1] is not _NOTHING and not isinstance(taken[-1], kind.obtype):
                    raise UnpicklingError(f"its step {opcode.name} is given no {kind.name}")
        return taken[::-1]

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise UnpicklingError(f"it takes more than {_MAX_STEPS:,} steps to read")

    def call(self, called: Any, arguments: Any) -> Any:
        few = type(arguments) is tuple and len(arguments) <= _MAX_PARTS
        if not isinstance(called, _Name) or not few:
            raise UnpicklingError("it calls what is no function")
        make = _CALLS.get(called)
        if make is _MAKE["mapping"]:
            self.spend(sum(map(len, arguments)))
        elif called.startswith("torch.jit._pickle."):  # a typed list or tag: its content
            make = _MAKE["first"]
        elif not make:
            what = f"it asks for {called[:80]} to be run, which no tensors need"
            raise UnpicklingError(f"{what}; nothing in it was run, as it should not be trusted")
        return make(*arguments)

    def storage(self, pid: Any) -> _Storage:
        kind, named, key, _device, numel, *view = pid[:7]
        whole = (kind, view) in (("storage", []), ("storage", [None]))
        dtype = _DTYPES.get(named) if whole and isinstance(named, _Name) else None
        keyed = type(key) is str and len(key) <= _MAX_NAME
        if dtype is None or not keyed or type(numel) is not int or not 0 <= numel < 2**63:
            raise UnpicklingError("it holds an unknown kind of storage")
        storage = _Storage(dtype, key, numel, numel * dtype.itemsize, self.read)
        if self.storages.setdefault(key, storage) != storage:
            raise UnpicklingError(f"its storage {key} has two sizes")
        return storage


def _open_zip(file: BinaryIO) -> zipfile.ZipFile | None:
    """The zip that a file is, None if it is none; `ValueError` if its directory is too long."""
    if not (end := zipfile._EndRecData(file)):  # type: ignore[attr-defined]
        return None
    _check_header(end[zipfile._ECD_SIZE])  # type: ignore[attr-defined]
    return zipfile.ZipFile(file)


def _read_pickled(file: BinaryIO) -> Any:
    """The value in a PyTorch file, or a TorchScript archive's tensors by name, all `_Described`."""
    if (archive := _open_zip(file)) is None:
        return _read_legacy(file)
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise UnpicklingError("it has two entries of one name")
    found = next((n for n in names if n.endswith("/data.pkl") and n.count("/") == 1), "data.pkl")
    _check_header(archive.getinfo(found).file_size)

    def read(storage: _Storage) -> bytes:  # nothing is ever extracted
        entry = archive.getinfo(f"{found.removesuffix('.pkl')}/{storage.key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UnpicklingError(f"its storage {storage.key} is compressed")
        with archive.open(entry) as content:
            return content.read(storage.nbytes)

    value = _Machine(io.BytesIO(archive.read(found)), read).run()
    return _flat(value, "", {}, set()) if isinstance(value, _Record) else value


def _flat(module: _Record, place: str, state: dict[str, Any], seen: set[int]) -> dict[str, Any]:
    """Add a module's tensors, and those of the modules inside it, to ``state``."""
    if id(module.fields) not in seen:  # shared, or a ring: once is enough
        seen.add(id(module.fields))
        for name, value in module.fields.items():
            if not isinstance(name, str) or len(place) + len(name) > _MAX_NAME:
                raise UnpicklingError("it has a name that no module has")
            if isinstance(value, _Described):
                state[f"{place}{name}"] = value
            elif isinstance(value, _Record):
                _flat(value, f"{place}{name}.", state, seen)
    return state


def _read_legacy(file: BinaryIO) -> Any:
    """The value in a file of PyTorch before 1.6, the fourth of its five pickles."""
    # The others are a magic number, a version, facts of the machine, and the storages' keys; for
    # each of these, in order, the number of elements and the bytes follow.
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    stream, places = io.BytesIO(file.read(_MAX_HEADER)), dict[str, int]()

    def read(storage: _Storage) -> bytes:
        file.seek(places[storage.key])
        if int.from_bytes(file.read(8), "little") != storage.numel:
            raise UnpicklingError(f"its storage {storage.key} has another size")
        return file.read(storage.nbytes)

    pickles = _Machine(stream, read)
    if stream.getbuffer()[:1] != b"\x80" or pickles.run() != 0x1950A86A20F9469CFC6C:
        raise UnpicklingError("it is no PyTorch file")
    _version, machine, value, keys = (pickles.run() for _ in range(4))
    if not machine["little_endian"]:
        raise UnpicklingError("it was written on a big-endian machine")
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or len(keys) != len(pickles.storages) or set(keys) != set(pickles.storages):
        raise UnpicklingError("its list of storages is not that of its tensors")
    position = stream.tell()
    for key in keys:
        places[key] = position
        position += 8 + pickles.storages[key].nbytes
    if position > size:
        raise UnpicklingError("it ends before its tensors do")
    return value


def _build_tensors(described: dict[str, _Described], size: int) -> StateDict:
    """Give descriptions their bytes; of views, which may overlap, no more than the file's size."""
    storages = {d.storage.key: d.storage for d in described.values()}
    too_much = UnpicklingError("it describes more than it holds")
    if len(described) > _MAX_TENSORS or sum(s.nbytes for s in storages.values()) > size:
        raise too_much
    flat, tensors = StateDict(), StateDict()
    for key, s in storages.items():
        flat[key] = torch.empty(0, dtype=s.dtype)
        if s.numel:
            flat[key] = torch.frombuffer(bytearray(s.read(s)), dtype=s.dtype, count=s.numel)
    for name, d in described.items():
        # A view inside of its storage, of sizes that can be: `as_strided` sees to that.
        view = flat[d.storage.key].as_strided(d.size, d.stride, d.offset)
        if (size := size - view.nbytes) < 0:
            raise too_much
        # A part would keep all of its storage.
        tensors[name] = view if view.nbytes == d.storage.nbytes else view.clone()
    return tensors
