"""What the table of methods says of itself, without the library that it computes with.

torch takes seconds and 600 MB to import, and parts are classes of its. But their names, settings
and descriptions need nothing of it: only the class statements do. So commands that list import the
table beside a stand-in for torch, as tools do that make documentation of code, and forget both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

_HEAVY = "torch"


class _Kind(type):
    def __getattr__(cls, name: str) -> Any:
        return _some(name)


class _Anything(metaclass=_Kind):
    """A base of a class, a decorator that changes nothing, or what has any attribute."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, function: Any = None, *_: Any, **__: Any) -> Any:
        return function

    def __getattr__(self, name: str) -> Any:
        return _some(name)


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _some(name)


def _some(name: str) -> Any:
    if name.startswith("__"):  # what Python asks for by itself
        raise AttributeError(name)
    return _Kind(name, (_Anything,), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        ours = fullname.partition(".")[0] == _HEAVY
        return ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


@contextmanager
def outlines() -> Iterator[None]:
    """Inside, modules are imported to be asked what they say, not to compute.

    Where torch is there already, it stays: nothing is to be gained. So it does where packages add
    methods, which may ask anything of it.
    """
    if _HEAVY in sys.modules or entry_points(group="dapt.methods"):
        yield
        return
    before, finder = set(sys.modules), _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:  # whoever imports them later is to get the real ones
        sys.meta_path.remove(finder)
        for name in sorted(set(sys.modules) - before):
            if name.partition(".")[0] in (_HEAVY, "dapt"):
                parent, _, child = name.rpartition(".")
                vars(sys.modules.get(parent, sys)).pop(child, None)
                del sys.modules[name]
