"""The page of the documentation that `benchmarks.architectures` writes of what it found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LIBRARIES = ("open_clip_torch", "timm", "torch", "transformers")
_INTRODUCTION = """# Architectures

Here you can look up what works with each of open_clip's architectures, and how much time prompts
cost in each family of towers.

Two commands make this page, with random weights:

```console title="Not run by the tests: it takes an hour or more"
$ python -m benchmarks.architectures --speed --json build/all.json
$ python -m benchmarks.architectures --json build/all.json --markdown {page}
```

The first measures times. The second tries what is not in the JSON file yet. The versions were
{versions}.
"""
_WORKS = """## What works

The table has {count} architectures with at most {most:.0f} million parameters, and small models in
the format of transformers. "Yes" means that it was tried: the features equal those of the model's
own towers, gradients reach everything that is learned, and the exported graph computes the same. A
number means that it is refused, for the reason below the table. An empty cell was not tried.

{meanings}

Text towers from transformers (`text tower: …`) were tried as small models, because open_clip's
architectures with such towers are larger than the limit.
"""
_SPEED = """## What prompts cost

This table compares a training step of {prompt} prompt vectors in a small random tower with the
plain forward and backward pass of the same tower. "Tokens, times" says how many times as many
tokens the tower sees with the prompt; a step may take that many times as long. "Time, times" says
how long it really takes. Both were measured in turns: the table shows the median of {rounds}
rounds and the middle half. In a text tower, a prompt replaces other words, and padding that nothing
sees is left out.
"""
PAGE = "docs/reference/architectures.md"


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    names = list(head)
    lines = [names, ["---"] * len(names), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def versions() -> str:
    """Such as "timm 1.0.31, torch 2.14.1": of what is installed."""
    found = list[str]()
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def written(kept: Mapping[str, Any], columns: Mapping[str, str], most: float) -> str:
    """The page: what was found (`architectures`), its columns with what each stands for."""
    meanings = "\n".join(f"- **{name}**: {about}" for name, about in columns.items())
    parts = [
        _INTRODUCTION.format(versions=kept["versions"], page=PAGE),
        _WORKS.format(count=len(kept["rows"]), most=most, meanings=meanings),
        works(kept["rows"], list(columns)),
    ]
    if speed := kept["speed"]:
        told = {name: speed[0][name] for name in ("prompt", "rounds")}
        parts += [_SPEED.format(**told), costs(speed)]
    return "\n".join(parts)


def works(found: Mapping[str, Any], columns: list[str]) -> str:
    """Architectures with the same results share a row; sentences are told once, below."""
    notes = dict[str, int]()
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, row in found.items():
        entries = []
        for column in columns:
            entry, why = row.get(column, ("", ""))
            # An architecture's own name makes no sentence another one.
            for own in (f"{name}/random", name):
                why = why.replace(f"'{own}'", "'…'")
            number = notes.setdefault(why, len(notes) + 1) if why else 0
            told = {"works": "yes", "refused": "", "FAILS": "FAILS "}.get(entry, "")
            entries.append(told + (f"({number})" if number else ""))
        groups[tuple(entries)].append(name)
    body = (
        [", ".join(f"`{name}`" for name in names), *entries] for entries, names in groups.items()
    )
    said = "".join(f"{number}. {why}\n" for why, number in notes.items())
    return f"{rows(['architecture', *columns], body)}\n{said}"


def costs(speed: list[dict[str, Any]]) -> str:
    """Times beside tokens."""
    body = (
        [f"{row['tower']}: {row['family']}", row["layers"], f"{row['tokens']:.2f}",
         f"{row['time']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"]
        for row in speed
    )  # fmt: skip
    return rows(["tower", "prompt in", "tokens, times", "time, times", "middle half"], body)
