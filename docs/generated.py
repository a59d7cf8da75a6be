"""What the code says of itself, for the documentation: MkDocs calls this while it builds the site.

A comment such as ``<!-- generated: settings -->`` on a page is replaced by what is told here, and
each method gets a page of its own.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from typer.main import get_command

from dapt.cli import app
from dapt.data import BENCHMARKS
from dapt.grid.plan import SUITES, Suite
from dapt.methods import METHODS, Method, TowerPart
from dapt.methods.contract import cross_entropy
from dapt.run import records
from dapt.settings import (
    TUNING,
    Settings,
    all_fields,
    default_settings,
    idle_settings,
    make_settings,
    settings_class,
)

DOCS = Path(__file__).parent
ROOT = DOCS.parent
SAID = yaml.safe_load((DOCS / "methods.yaml").read_text("utf-8"))
# Files of a run that are told field by field.
FILES = (
    "Metrics",
    "TaskRecord",
    "SupportRecord",
    "Environment",
    "EvaluationRecord",
    "SearchRecord",
    "FailureRecord",
)
# What a page may load: nothing of another server.
_ELSEWHERE = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+\"")
_REMOTE_ALLOWED = re.compile(r"rel=\"(?:canonical|license)\"")


# Called by MkDocs


def on_config(config: Any) -> None:
    """A page for each method goes into the navigation."""
    section = next(own["Methods"] for own in config.nav if "Methods" in own)
    section += [{METHODS[name].title: page_of(name)} for name in METHODS]


def on_files(files: Files, config: Any) -> None:
    """These pages are made here."""
    for name in METHODS:
        files.append(File.generated(config, page_of(name), content=method(name)))
    for uri in [file.src_uri for file in files if file.src_uri.endswith(".ipynb")]:
        page = uri.replace(".ipynb", ".md")
        files.append(File.generated(config, page, content=notebook(DOCS / uri)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each comment that asks for something generated; a notebook is read as its page."""
    markdown = re.sub(r"(\]\([^)]*tutorials/[\w-]+)\.ipynb", r"\1.md", markdown)
    return re.sub(r"<!-- generated: (\w+)(?: (\S+))? -->", _told, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Refuse a page that would load something from elsewhere."""
    found = [tag for tag in _ELSEWHERE.findall(output) if not _REMOTE_ALLOWED.search(tag)]
    if found:
        raise PluginError(f"{page.file.src_uri} loads from another server: {found[0]}")


def _told(found: re.Match[str]) -> str:
    name, of = found.groups()
    return PARTS[name](*filter(None, [of]))


# Words


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    names = list(head)
    lines = [names, ["---"] * len(names), *body]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines) + "\n"


def cell(text: str) -> str:
    """What may stand in a table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def code(value: Any) -> str:
    """A value as one would type it; nothing of None."""
    shown = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
    return "" if shown is None or shown == "" else f"`{shown}`"


def paragraphs(thing: Any) -> str:
    """A docstring, from its first line on."""
    return inspect.cleandoc(inspect.getdoc(thing) or "")


def kind_of(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(kind_of(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return ", ".join(code(one) for one in schema["enum"])
    if schema.get("type") == "array":
        inner = kind_of(schema.get("items", {}))
        return f"list of {inner}" if inner else "list"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    # Bounds that only keep a number within what the machine can hold say nothing to a reader.
    bounds = (
        f"{sign} {schema[name]:g}"
        for name, sign in signs.items()
        if abs(schema.get(name, 1e9)) < 1e6
    )
    names = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    named = names.get(schema.get("type", ""), schema.get("type", ""))
    return " ".join(["mapping" if named == "object" else named, ", ".join(bounds)]).strip()


# Notebooks


def notebook(file: Path) -> str:
    """The page of a notebook: its cells, and below each what it showed."""
    text = []
    for cell in json.loads(file.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        text.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        text += map(_shown, cell.get("outputs", ()))
    return "\n\n".join(text) + "\n"


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "text/html" in data:
        return f'<div class="shown">{"".join(data["text/html"])}</div>'
    return f"```{{ .text .shown }}\n{''.join(data['text/plain']).rstrip()}\n```"


# Reference


def commands() -> str:
    """Every command: what it does, its arguments and options."""
    return "\n".join(_command(("dapt", name), one) for name, one in _leaves())


def _leaves() -> Iterable[tuple[str, Any]]:
    for name, one in get_command(app).commands.items():
        inner = getattr(one, "commands", None)
        yield from ((f"{name} {n}", c) for n, c in inner.items()) if inner else [(name, one)]


def _command(path: tuple[str, str], one: Any) -> str:
    shown = [p for p in one.params if not p.hidden] if one.name != "bench" else []
    arguments = [p for p in shown if not p.opts[0].startswith("-")]
    usage = " ".join(
        [
            *path,
            *(p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments),
            "[OPTIONS]",
        ]
    )
    body = [[f"`{_option(p)}`", p.help or "", _default(p)] for p in shown if p.name != "help"]
    about = (one.help or "").replace("**Example", "\n**Example")
    about = re.sub(r"docs/([\w/-]+\.md)", r"[\g<0>](../\1)", about)
    table = rows(["argument or option", "meaning", "default"], body) if body else ""
    return f"## {' '.join(path)}\n\n```text\n{usage}\n```\n\n{about}\n\n{table}\n"


def _option(parameter: Any) -> str:
    if not parameter.opts[0].startswith("-"):
        return parameter.name.upper()
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    told = "" if value is None or value is False or callable(value) else code(value)
    variable = f"environment: `{parameter.envvar}`" if parameter.envvar else ""
    return " ".join(filter(None, [told, variable]))


def settings() -> str:
    """Every setting, those of all runs first and then those of parts."""
    usual = default_settings({"dataset": "my photos", "shots": 16})
    schema = settings_class().model_json_schema()["properties"]
    general = [name for name in all_fields() if name in Settings.model_fields]
    others = [name for name in all_fields() if name not in general]
    tables = []
    for title, names in (("Every run", general), ("Parts of methods", others)):
        users = title != "Every run"
        body = [
            [
                f"`{name}`",
                kind_of(schema[name]),
                code(usual.get(name, schema[name].get("default"))),
                all_fields()[name].description or "",
                *([_users(name)] if users else []),
            ]
            for name in names
        ]
        head = ["setting", "value", "default", "meaning", *(["used by"] if users else [])]
        tables.append(f"## {title}\n\n{rows(head, body)}")
    return "\n".join(tables)


def _users(setting: str) -> str:
    named = [name for name, row in METHODS.items() if setting in row.settings]
    return ", ".join(f"[{name}](../{page_of(name)})" for name in named)


def published() -> str:
    """Learning rate and loss weights by dataset, as published."""
    names = ("lr", "beta_visual", "beta_text")
    body = []
    for dataset in BENCHMARKS:
        own = default_settings({"dataset": dataset, "shots": 16, "method": "dapt"})
        body.append([f"`{dataset}`", *(f"{own[name]:g}" for name in names), str(own["epochs"])])
    return rows(["dataset", *names, "epochs at 16 shots"], body)


def suite_keys() -> str:
    """Keys of a suite file: what the source says beside each."""
    said = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Suite), re.M))
    schema = Suite.model_json_schema()["properties"]
    body = [[f"`{n}`", kind_of(own), said.get(n, "")] for n, own in schema.items()]
    return rows(["key", "value", "meaning"], body)


def suites() -> str:
    """The suites that ship."""
    read = {name: yaml.safe_load(file.read_text("utf-8")) for name, file in SUITES.items()}
    body = [
        [f"`{name}`", own["about"], str(len(own["datasets"])), ", ".join(own["methods"])]
        for name, own in read.items()
    ]
    return rows(["suite", "what it is for", "datasets", "methods"], body)


def suite(name: str) -> str:
    """A suite's file as it is."""
    return f"```yaml\n{SUITES[name].read_text('utf-8')}```\n"


def record(name: str) -> str:
    """The fields of a file of a run."""
    own = getattr(records, FILES[FILES.index(name)])
    return _fields(own.__doc__ or "", own.model_json_schema(by_alias=True))


def inside() -> str:
    """What is inside the files of a run, each once."""
    found: dict[str, Any] = {}
    for name in FILES:
        found |= getattr(records, name).model_json_schema(by_alias=True).get("$defs", {})
    tables = (f"### {n}\n\n{_fields(s.get('description', ''), s)}" for n, s in found.items())
    return "\n".join(tables)


def _fields(about: str, schema: dict[str, Any]) -> str:
    needed = schema.get("required", [])
    body = [
        [f"`{name}`", kind_of(own), "always" if name in needed else ""]
        for name, own in schema.get("properties", {}).items()
    ]
    return f"{inspect.cleandoc(about)}\n\n{rows(['field', 'value', 'present'], body)}"


def rest() -> str:
    """What the server answers, as OpenAPI says it."""
    api = yaml.safe_load((ROOT / "src/dapt/serve/api.yaml").read_text("utf-8"))
    text = []
    for path, ways in api["paths"].items():
        for way, one in ways.items():
            asked = [
                [f"`{p['name']}`", kind_of(p["schema"]), p.get("description", "")]
                for p in one.get("parameters", [])
            ]
            bodies = [[f"`{kind}`"] for kind in one.get("requestBody", {}).get("content", {})]
            answers = [[code, own["description"]] for code, own in one["responses"].items()]
            text += [
                f"### {way.upper()} {path}\n\n{one['description']}\n",
                rows(["parameter", "value", "meaning"], asked) if asked else "",
                rows(["body"], bodies) if bodies else "",
                rows(["status", "when"], answers),
            ]
    text.append("## Answers\n")
    for name, schema in api["components"]["schemas"].items():
        text.append(f"### {name}\n\n{_fields(schema.get('description', ''), schema)}")
    return "\n".join(text)


def benchmarks() -> str:
    """Datasets that are known by name."""
    body = [
        [f"`{r.name}`", f"{r.classes:,}", f"{r.gigabytes:g}", f"`{r.folder}`", r.licence]
        for r in BENCHMARKS.values()
    ]
    return rows(["name", "classes", "GB", "folder below --root", "licence"], body)


def included(file: str) -> str:
    """A file of the repository, without its first heading: the page has one."""
    text = (ROOT / file).read_text("utf-8")
    return re.sub(r"\A# .*\n", "", text)


# Methods


def page_of(name: str) -> str:
    """Where the page of a method is."""
    return f"methods/{name.replace('+', '-plus')}.md"


def methods() -> str:
    """The table of methods."""
    body = []
    for name, row in METHODS.items():
        learned = row.describe(_usual(name)).rstrip(",") or "nothing"
        losses = ", ".join(term.name for term in row.losses)
        body.append([f"[`{name}`]({page_of(name)[8:]})", row.title, learned, losses])
    return rows(
        ["name", "title", "what is learned or fitted", "losses besides cross-entropy"], body
    )


def _usual(name: str) -> Settings:
    return make_settings({"dataset": "my photos", "method": name, "shots": 16})


def method(name: str) -> str:
    """The page of a method."""
    row, said = METHODS[name], SAID[name]
    learned = row.describe(_usual(name)).rstrip(",")
    facts = [
        ["learned or fitted", learned or "nothing"],
        ["changes", ", ".join(t for t in ("text", "image") if row.changes(t)) or "no tower"],
        ["cost", cost(row)],
        ["classes it was not tuned on", known(row, _usual(name))],
        ["several labels per image", "yes" if _multilabel(row) else "no"],
        ["modules", ", ".join(f"`{one}`" for one in _modules(row))],
    ]
    paper = said.get("paper")
    source = f"## Source\n\n{_paper(paper)}\n" if paper else ""
    return f"""# {row.title}

On this page you find what `{name}` learns, when to use it and which settings it has.

**When to use it.** {said["when"]}

```console
$ dapt train photos/ -o runs/{name} -m {name}
```

{rows(["", f"`{name}`"], facts)}
## How it works

{_parts(row)}
## Settings

{_own_settings(name, row)}
{source}"""


def known(row: Method, settings: Settings) -> str:
    """Whether classes that it was not tuned on can be named."""
    closed = row.closed(settings)
    return f"not recognised: it learns {closed}" if closed else "recognised by their names"


def cost(row: Method) -> str:
    """What work it is, as follows from its parts."""
    if row.still:
        return "none: the class names are encoded once"
    once = "each image is encoded once"
    if row.head.reads_views:
        once = "each image is encoded in several views"
    if not row.learns:
        return f"seconds: {once}, and the head is fitted on these features"
    towers = " and ".join(t for t in ("text", "image") if row.changes(t))
    steps = f"steps of gradient descent through the {towers} tower"
    if row.reads_images:
        steps += ", with class features made for each image"
    return f"{steps}; then a head is fitted" if row.head.fitted else steps


def _multilabel(row: Method) -> bool:
    return row.head.multilabel or row.still


def _pieces(row: Method) -> list[tuple[str, Any]]:
    """Parts, losses, head and finish, each with the words that it goes by."""
    found: list[tuple[str, Any]] = [(_tower_words(part), part) for part in row.parts]
    found += [("Loss", row.loss)] if row.loss is not cross_entropy else []
    found += [(f"Loss term `{t.name}`, weighted by `{t.weight}`", t.compute) for t in row.losses]
    found += [("Head", row.head)] if row.head.fitted or not row.learns else []
    return [*found, *([("At the end", row.finish)] if row.finish.__name__ != "Finish" else [])]


def _tower_words(part: type[TowerPart]) -> str:
    return "In the " + " and the ".join(sorted(part.towers, reverse=True)) + " tower"


def _modules(row: Method) -> list[str]:
    return list(dict.fromkeys(inspect.getmodule(one).__name__ for _, one in _pieces(row)))


def _parts(row: Method) -> str:
    text = []
    for name in _modules(row):
        about = paragraphs(import_module(name))
        if name.rpartition(".")[2] not in ("contract", "losses", "prompts"):
            text.append(about + "\n")
    for title, one in _pieces(row):
        text.append(f"**{title}.** {_unwrapped(one)}\n")
    return "\n".join(text)


def _unwrapped(one: Any) -> str:
    """Its docstring; that of the function that a private one calls, where it has none."""
    if own := one.__doc__:
        text = inspect.cleandoc(own.partition("\n\n    Attributes:")[0])
        return text.replace("][", "]\\[")  # no link
    beside = inspect.getmodule(one).__dict__
    called = (beside.get(name) for name in re.findall(r"\b(\w+)\(", inspect.getsource(one)))
    return next((paragraphs(f) for f in called if inspect.isfunction(f) and f is not one), "")


def _own_settings(name: str, row: Method) -> str:
    idle = idle_settings(name)
    fields = [n for n in all_fields() if n in row.settings or (n in TUNING and n not in idle)]
    own, bench = (
        make_settings({"dataset": dataset, "method": name, "shots": 16, "root": root})
        for dataset, root in (("my photos", None), ("caltech101", "/data"))
    )
    body = [
        [f"`{n}`", code(getattr(own, n)), code(getattr(bench, n)), all_fields()[n].description]
        for n in fields
    ]
    if not body:
        return "This method has no settings.\n"
    return rows(["setting", "your data, 16 shots", "`caltech101`, 16 shots", "meaning"], body)


def _paper(paper: list[str]) -> str:
    authors, *more = paper
    if not more:
        return f"{authors}."
    title, number = more
    return f"{authors}, *{title}*, [arXiv {number}](https://arxiv.org/abs/{number})."


PARTS: dict[str, Callable[..., str]] = {
    "benchmarks": benchmarks,
    "commands": commands,
    "included": included,
    "inside": inside,
    "methods": methods,
    "published": published,
    "record": record,
    "rest": rest,
    "settings": settings,
    "suite": suite,
    "suite_keys": suite_keys,
    "suites": suites,
}
