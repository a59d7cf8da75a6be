"""Runs that `dapt push` put on the Hugging Face hub, fetched by name; without torch."""

from __future__ import annotations

import re
from pathlib import Path

from dapt.errors import UserError, lacking, refusing
from dapt.progress import errors, quietly, say
from dapt.safe.files import nearest_path, require_there, user_path

# All that a run is read from: tensors and JSON. Nothing else that lies there is fetched.
FILES = ("settings.json", "environment.json", "task.json", "support_set.json",
         "prompts.safetensors", "metrics.json", "log.csv")  # fmt: skip
_NAME = re.compile(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@([\w-][\w.-]{0,99}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def find_run(name: Path | str) -> Path:
    """The folder of a run: one that is here, or ``org/name`` of the hub, ``@`` any commit or tag.

    It is told before anything is fetched, and by which commit to ask for the same again; a commit
    that the hub's cache holds is not asked for. A `UserError` where neither is.
    """
    path, found = user_path(name), _NAME.fullmatch(str(name))
    if path.exists():
        return path
    # What begins with a folder here, or with a name like one's, is meant to be in it.
    here = path.parent.is_dir() or nearest_path(path)
    if found is None or (here and not str(name).startswith("hf-hub:")):
        require_there(path, "run directory", "give one that 'dapt train' wrote")
    assert found is not None
    return _fetched(*found.groups())


def _fetched(repo: str, at: str | None) -> Path:
    with lacking(f"fetching '{repo}' from the hub"):
        from huggingface_hub import snapshot_download, try_to_load_from_cache
    pinned = at is not None and _COMMIT.fullmatch(at) is not None
    if pinned:
        kept = try_to_load_from_cache(repo, "prompts.safetensors", revision=at)
        if isinstance(kept, str):
            return Path(kept).parent
    asked = f"'{repo}{f'@{at}' if at else ''}'"
    say(f"dapt: no run {asked} is here, so it is looked for on the Hugging Face hub", to=errors)
    what = f"{asked} is no run here and could not be fetched from the hub"
    with refusing(what, "check the name and the connection", Exception), quietly():
        folder = Path(snapshot_download(repo, revision=at, allow_patterns=[*FILES]))
    if not (folder / "prompts.safetensors").is_file():
        raise UserError(f"repository {asked} holds no run of dapt; give one that 'dapt push' made")
    if not pinned:
        say(f"dapt: fetched; {repo}@{folder.name} is this very one", to=errors)
    return folder
