"""The documentation's pages: their commands and code run, and what they mention is there."""

import json
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks.command import app as yardsticks
from conftest import REPOSITORY
from dapt.cli import app
from dapt.clip import sources
from dapt.errors import DISTRIBUTION
from dapt.methods import METHODS, plugins
from notebooks import execute, shown

DOCS = REPOSITORY / "docs"
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
PAGES = sorted(
    [*DOCS.rglob("*.md"), *NOTEBOOKS, REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
)
PROJECT = (REPOSITORY / "pyproject.toml").read_text("utf-8")
NOT_RUN = "Not run by the tests: "  # how the title of such a block begins
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
LOADED = cache(sources.load_model)  # once for all pages, as reading it is half of a short command
# Options of other programs that pages mention.
_OTHERS = {"--nproc-per-node", "--index-url", "--target", "--minutes", "--help"}


class Block(NamedTuple):
    language: str
    title: str
    text: str

    @property
    def commands(self):
        """Lines of dapt's command, as lists of words; what stands around it beside."""
        lines = (line[2:] for line in self.text.splitlines() if line.startswith("$ "))
        return [Command.of(line) for line in lines]


class Command(NamedTuple):
    """``before | VARIABLE=value dapt arguments > output``; no arguments of another program."""

    before: str
    arguments: list[str] | None
    output: str

    @classmethod
    def of(cls, line):
        before, _, own = line.rpartition(" | ")
        words = [] if own.startswith("docker") else shlex.split(own)
        output = words.pop() if ">" in words else ""
        words = [word for word in words if word != ">"]
        for place, word in enumerate(words):
            if word in ("dapt.cli", "dapt") or word.endswith("/dapt"):
                return cls(before, words[place + 1 :], output)
        return cls(before, None, output)


def text_of(page):
    """A page in Markdown; of a notebook, without its code."""
    text = page.read_text("utf-8")
    if page.suffix == ".ipynb":
        cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"]
        return "\n\n".join("".join(cell["source"]) for cell in cells)
    return text


def blocks_of(page):
    return [Block(*found) for found in _BLOCK.findall(text_of(page) + "\n")]


def name_of(page):
    return str(page.relative_to(REPOSITORY))


def parse(arguments):
    """Have a command read its arguments, without running it; another option is an error."""
    command, words = get_command(app), list(arguments)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        command = command.commands[words.pop(0)]
    if not hasattr(command, "commands"):
        with patch("dapt.cli.common.find_run", Path):  # a run of the hub's is not fetched
            command.make_context(command.name, words)


def put_photos(folder, count, generator):
    for name, colour in (("daisy", 210), ("rose", 120), ("tulip", 40)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.normal((colour, 255 - colour, 90), 40, (48, 40, 3))
            image = Image.fromarray(np.clip(pixels, 0, 255).astype("uint8"))
            image.save(folder / name / f"{i}.jpg")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What pages take as given: photos/, flowers/ in parts, new/, and the run runs/photos."""
    place, generator = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    put_photos(place / "photos", 8, generator)
    for part in ("train", "test"):
        put_photos(place / "flowers" / part, 4, generator)
    (place / "new").mkdir()
    for name, source in (("a", "daisy"), ("b", "rose"), ("c", "tulip")):
        shutil.copy(place / "photos" / source / "0.jpg", place / "new" / f"{name}.jpg")
    arguments = ["train", str(place / "photos"), "-o", str(place / "runs/photos")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return place


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "load_model", LOADED)
    for known in ("_ROWS", "_FILES"):
        monkeypatch.setattr(plugins, known, {})
    before = dict(METHODS)
    yield tmp_path
    METHODS.clear()
    METHODS.update(before)


def run(command):
    """Do what a line says, in few epochs."""
    if command.arguments is None:
        return
    given = None
    if command.before:
        given = subprocess.run(
            ["bash", "-c", command.before], capture_output=True, check=True
        ).stdout
    asked = list(command.arguments)
    if asked[0] == "train" and "--resume" not in asked:
        asked += ["--epochs", "2", "--overwrite"]  # which may be there twice
    if asked[0] == "experiment" and not {"--quick", "--yaml", "--methods"}.intersection(asked):
        asked += ["--set", "epochs=2"]
    result = CliRunner().invoke(app, asked, input=given)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 0, f"dapt {shlex.join(asked)}: {said} {result.exception!r}"
    if command.output:
        Path(command.output).write_text(result.stdout)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_code_of_a_page_run(page, place):
    blocks, names = blocks_of(page), {}
    if page in NOTEBOOKS:
        pytest.importorskip("nbclient")
        assert shown(execute(page, place)) == shown(json.loads(page.read_text("utf-8")))
    for block in blocks:
        if block.title.startswith(NOT_RUN):
            for command in block.commands:
                parse(command.arguments or [])
        elif block.language == "python" and not block.title:
            exec(compile(block.text, name_of(page), "exec"), names)
        elif block.language == "console":
            for command in block.commands:
                run(command)
        elif block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
    # Whatever stands in a fence is seen above; one that begins otherwise would not be.
    fences = re.findall(r"^ *```", text_of(page), re.M)
    assert len(fences) == 2 * len(blocks)


@pytest.mark.parametrize("page", NOTEBOOKS, ids=name_of)
def test_a_notebook_shows_results_and_no_noise(page):
    outputs = shown(json.loads(page.read_text("utf-8")))
    assert sum(map(len, outputs)) >= 2
    assert not {name for cell in outputs for _, name, _ in cell} - {None, "stdout"}
    assert not re.search(r"/home/|/tmp/|/root/|/work/|site-packages", page.read_text("utf-8"))
    assert page.stat().st_size < 60_000


def test_a_block_that_does_not_run_says_why():
    shown = {b.title for page in PAGES for b in blocks_of(page) if b.language == "console"}
    assert all(title.startswith(NOT_RUN) for title in shown - {""})


def test_an_option_that_is_not_there_would_be_noticed():
    parse(["data", "check", "photos/", "--quick"])
    with pytest.raises(Exception, match="--quickly"):
        parse(["data", "check", "photos/", "--quickly"])


def test_options_that_pages_mention_are_there():
    def options(command):
        inner = getattr(command, "commands", {}).values()
        own = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        return own.union(*map(options, inner))

    known = options(get_command(app)) | options(get_command(yardsticks)) | _OTHERS
    for page in PAGES:
        spans = re.findall(r"`([^`\n]+)`", text_of(page))
        mentioned = {o for span in spans for o in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
        assert mentioned <= known, name_of(page)


def test_extras_that_pages_and_messages_mention_are_there():
    files = [*PAGES, *(REPOSITORY / "src").rglob("*.py")]
    listed = PROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", listed, re.M))
    texts = {file: file.read_text("utf-8") for file in files}
    for file, text in texts.items():
        named = re.findall(rf"{DISTRIBUTION}\[([\w,]+)\]", text)
        named += re.findall(r"\binstall\(['\"](\w+)['\"]\)", text)
        asked = {extra for names in named for extra in names.split(",")}
        assert asked <= extras, file
        assert not re.search(r"pip install '?dapt\b(?!-)", text), file  # a stranger's package


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.is_relative_to(DOCS)], ids=lambda page: name_of(page)
)
def test_a_page_begins_with_what_its_reader_will_be_able_to_do(page):
    heading, first, *_ = text_of(page).split("\n\n")
    assert heading.startswith("# ")
    assert not first.startswith(("#", "```", "|", "- ", "!"))
    assert re.search(r"\b(you|runs|needs)\b", first, re.I)
    assert first.rstrip().endswith(".")


def test_every_method_has_words_for_its_page():
    said = yaml.safe_load((DOCS / "methods.yaml").read_text("utf-8"))
    assert list(said) == [name for name in METHODS if name in said]
    assert set(said) == set(METHODS)
    assert all(own["when"].endswith((".", ")")) for own in said.values())


def test_the_distribution_is_called_the_same_everywhere():
    assert f'\nname = "{DISTRIBUTION}"\n' in PROJECT
    assert f"{DISTRIBUTION}[" in PROJECT  # its own extras, among those of tests
