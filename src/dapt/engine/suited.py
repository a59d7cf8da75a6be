"""What becomes of settings on a backbone that does not take all they ask for.

Who left the backbone to this machine has its name from here on. Who asked for no method gets
another in place of the default one, where a tower takes no prompt. A text prompt has no more
vectors than the longest class name leaves. The last two are told, and nothing else is changed: what
cannot be is refused by the parts themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dapt.clip.backbone import Backbone
from dapt.clip.known import SUITED, as_one, each_of, names_of
from dapt.clip.text import ClassTokens
from dapt.engine.classifier import Classifier, inside_of, new_classifier, parts_of
from dapt.errors import UserError
from dapt.methods import AUTOMATIC, get_method
from dapt.settings import Settings, make_settings, with_method


def nobody(_sentence: str) -> None:
    """Hears nothing."""


def suited(
    settings: Settings,
    class_names: Sequence[str],
    backbone: Backbone,
    tell: Callable[[str], Any] = nobody,
) -> Settings:
    """The settings, or nearest ones that a backbone takes with these classes.

    Given what it returned, it returns the same. Whether a method was asked for is known of settings
    from `make_settings`; of those that were read from a file, all were.
    """
    settings = _with_taken_method(_with_named_backbone(settings, backbone), backbone, tell)
    _tell_of_depth(settings, backbone, tell)
    return _short_enough(settings, class_names, backbone, tell)


def differing(settings: Settings, other: Settings) -> dict[str, Any]:
    """Values of settings that are others in ``other``."""
    values = other.model_dump()
    return {name: v for name, v in settings.model_dump().items() if values[name] != v}


def _with_named_backbone(settings: Settings, backbone: Backbone) -> Settings:
    names = names_of(settings.backbone)
    if SUITED not in names:
        return settings
    tags = each_of(names, settings.pretrained)
    used, its = list[str](), list[str | None]()
    for name, tag, model in zip(names, tags, backbone.members, strict=True):
        own, _, of = model.name.partition("/")
        used.append(own if name == SUITED else name)
        its.append((of or None) if name == SUITED else tag)
    return settings.model_copy(update={"backbone": as_one(used), "pretrained": as_one(its)})


def _with_taken_method(
    settings: Settings, backbone: Backbone, tell: Callable[[str], Any]
) -> Settings:
    refused = _refusal(settings.method, backbone)
    if refused is None or "method" in settings.model_fields_set:
        return settings
    # Without words, what is left of a method of both towers is not what it is known for.
    ways = get_method(settings.method).instead if backbone.reads_text else (AUTOMATIC,)
    other = next((name for name in ways if _refusal(name, backbone) is None), settings.method)
    if other == settings.method:
        return settings
    tell(f"{refused.partition(';')[0]}: {other} in place of {settings.method}")
    return with_method(settings, other)


def _refusal(method: str, backbone: Backbone) -> str | None:
    """Why a tower takes nothing of what a method learns there; None where all do."""
    towers = {tower for part in get_method(method).parts for tower in part.towers}
    return next(filter(None, map(backbone.refusal, sorted(towers))), None)


def usual_classifier(method: str, backbone: Backbone, names: Sequence[str]) -> Classifier:
    """A method's classifier of these classes, at its usual settings and not tuned.

    A `UserError` says why the backbone does not take the method.
    """
    settings = suited(make_settings({"dataset": "bundled", "method": method}), names, backbone)
    return new_classifier(backbone, names, "{}", get_method(method), settings)


def _tell_of_depth(settings: Settings, backbone: Backbone, tell: Callable[[str], Any]) -> None:
    """Tell of prompts that are asked for in more layers than a tower has; by default they are."""
    layers, values = {"text": "text_layers", "visual": "vision_layers"}, settings.model_dump()
    for kind, count in layers.items():
        if (name := f"{kind}_depth") not in get_method(settings.method).settings:
            continue
        if values[name] > (there := getattr(backbone, count)):
            same = ("dataset", "shots", "method", "loss_weights")
            usual = make_settings({one: values[one] for one in same}).model_dump()
            if values[name] != usual[name]:
                tower = f"{'text' if kind == 'text' else 'image'} tower of '{backbone.name}'"
                has = f"the {tower} has {there} layers: each has a prompt"
                tell(f"{name}={values[name]}, and {has}")


def _short_enough(
    settings: Settings, class_names: Sequence[str], backbone: Backbone, tell: Callable[[str], Any]
) -> Settings:
    if "text_vectors" not in get_method(settings.method).settings:
        return settings
    own: Any = settings  # those of parts come from the parts
    excess = _excess(settings, class_names, backbone)
    if excess <= 0:
        return settings
    # Words that it would start from are left out if they do not fit.
    for words in dict.fromkeys((own.text_init, None)):
        found: Any = settings.model_copy(update={"text_init": words})
        count = own.text_vectors - (excess if words else _excess(found, class_names, backbone))
        if count < 1:
            continue
        found = found.model_copy(update={"text_vectors": min(count, own.text_vectors)})
        try:
            fits = _excess(found, class_names, backbone) <= 0
        except UserError:  # the words are more than the vectors
            fits = False
        if fits:
            name = ClassTokens.room(backbone, class_names)[1]
            left = f" and no start from '{own.text_init}'" if words != own.text_init else ""
            tell(
                f"the text tower of '{backbone.name}' reads {backbone.context_length} tokens: with "
                f"class name '{name}' its prompt has {found.text_vectors} vectors in place of "
                f"{own.text_vectors}{left}"
            )
            return found
    return settings


def _excess(settings: Settings, class_names: Sequence[str], backbone: Backbone) -> int:
    """Tokens by which a text prompt is too long for the longest class name."""
    rows = [p for p in get_method(settings.method).parts if "text" in p.towers]
    parts = parts_of((part.create(backbone, settings) for part in rows), "text")
    context, after = inside_of(parts, "text").tokens, " ".join(p.after for p in parts if p.after)
    length = 0 if context is None else context.shape[-2]
    return length - ClassTokens.room(backbone, class_names, after)[0]
