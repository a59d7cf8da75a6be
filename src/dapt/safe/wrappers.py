"""What training code puts around a state dict and into its names, taken off again."""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from dapt.errors import UserError

# Under what training code keeps a state dict; of several, the first.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema")
# What DistributedDataParallel, torch.compile, FSDP and checkpointed activations put into names.
_IN_NAMES = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BEFORE_NAMES = {"model", "net"}  # attributes in which training code keeps its model
MOST_PARTS, MOST_LETTERS = 64, 1000  # of what is nested; of a name
IsTensor = Callable[[Any], bool]


def unwrapped(value: Any, is_tensor: IsTensor) -> Any:
    """The state dict in what training code saved, which may be wrapped more than once."""
    for _ in range(MOST_PARTS):
        if not isinstance(value, dict):
            break
        wrapped = any(name in value for name in _WRAPPERS)
        inner = [v for name in (*_WRAPPERS, "weights") if isinstance(v := value.get(name), dict)]
        if not inner:
            if any(map(is_tensor, value.values())):
                break
            if wrapped:
                return None  # a whole model, say, which would have to be run
            # Under another name: what holds nothing but tensors, if that is one thing.
            inner = [v for v in value.values() if isinstance(v, dict) and v]
            inner = [v for v in inner if all(map(is_tensor, v.values()))]
            if len(inner) != 1:
                break
        value = inner[0]
    return _dotted(value, is_tensor) if isinstance(value, dict) else value


def _dotted(value: dict[Any, Any], is_tensor: IsTensor) -> dict[Any, Any]:
    """A dictionary of dictionaries of tensors as one, by dotted names; others as they are."""
    found, seen, left = dict[Any, Any](), set[int](), [("", value)]
    while left:
        place, inner = left.pop()
        for name, one in inner.items():
            if not isinstance(name, str) or len(place) + len(name) > MOST_LETTERS:
                return value
            if is_tensor(one) and place:
                found[place + name] = one
            elif isinstance(one, dict) and id(one) not in seen:  # each once: there may be rings
                seen.add(id(one))
                left.append((f"{place}{name}.", one))
            else:
                return value
    return found


def renamed(state: dict[str, Any], ignore: Container[str], path: Path) -> dict[str, Any]:
    """A state dict without what is to be ignored, under names as its bare model has them."""
    found, was = dict[str, Any](), dict[str, str]()
    for name, value in state.items():
        parts = [part for part in name.split(".") if part not in _IN_NAMES]
        while len(parts) > 1 and parts[0] in _BEFORE_NAMES:
            del parts[0]
        if (bare := ".".join(parts)) in found:
            raise UserError(f"{path} holds both '{was[bare]}' and '{name}'; keep one of them")
        if parts and parts[-1] not in ignore:
            found[bare], was[bare] = value, name
    return found
