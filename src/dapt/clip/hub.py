"""What is fetched: whether it is here already, where it comes from, and that it is told before."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

from dapt.clip import image_only
from dapt.errors import UserError, lacking, refusing
from dapt.progress import errors, quietly, say

HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_PATIENCE = 5.0  # seconds in which the hub must answer, before it is done without


def reach(name: str, pretrained: str) -> None:
    """See that a tag's weights can be fetched; a `UserError` if the hub does not answer soon."""
    repo = _place(name, pretrained)[0]
    asked = futures.ThreadPoolExecutor(1)  # names may take longer to look up than any time-out
    with refusing("the hub does not answer", "see to the connection", Exception):
        try:
            asked.submit(HfApi().model_info, repo, timeout=_PATIENCE).result(_PATIENCE)
        finally:
            asked.shutdown(wait=False)


@contextmanager
def fetching(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises, a wide family, into sentences."""
    what = f"'{repo}' is no local file and could not be fetched from the hub"
    hint = "check the name and the connection"
    with refusing(what, hint, Exception), lacking(f"fetching '{repo}' from the hub"), quietly():
        yield


def cached(repo: str, *files: str, at: str | None = None) -> bool:
    """Whether one of these files of a repository, at a commit, is in the hub's cache."""
    found = (try_to_load_from_cache(repo, file, revision=at) for file in files)
    return any(isinstance(place, str) for place in found)


def tell_of(what: str, where: str = "the Hugging Face hub") -> None:
    """Name what is about to be fetched, as it may be a stranger's run that asks for it."""
    say(f"dapt: fetching {what} from {where}", to=errors)


def _place(name: str, pretrained: str) -> tuple[str, str, str]:
    """Of a tag's weights the repository on the hub and the file there, or else their address."""
    found = open_clip.get_pretrained_cfg(name, pretrained)
    repo, _, file = str(found.get("hf_hub", "")).rpartition("/")
    return repo, file, str(found.get("url", ""))


def has_weights(name: str, pretrained: str) -> bool:
    """Whether open_clip has fetched a tag's weights before."""
    repo, file, url = _place(name, pretrained)
    files = (file, str(Path(file).with_suffix(".safetensors"))) if file else HUB_WEIGHTS
    here = Path("~/.cache/clip").expanduser() / Path(url).name
    return cached(repo, *files) if repo else here.is_file()


def tell_of_open_clip(name: str, pretrained: str) -> None:
    """Name a tag's weights, where open_clip has not fetched them before."""
    if not has_weights(name, pretrained):
        repo, _, url = _place(name, pretrained)
        where = f"'{repo}' of the Hugging Face hub" if repo else url
        tell_of(f"weights '{pretrained}' of '{name}'", where)


def tell_of_text(config: dict[str, Any], *keys: str) -> None:
    """Name the repositories from which transformers has a text tower's form or its vocabulary."""
    for key in keys:
        repo = config["text_cfg"].get(key)
        if repo and not cached(repo, "config.json", "tokenizer_config.json"):
            tell_of(f"{'tokenizer' if 'tokenizer' in key else 'configuration'} '{repo}'")


def timm_weights(name: str) -> Path:
    """timm's weights of a model as safetensors, fetched into the hub's cache."""
    found = image_only.configuration(name)
    file = found.hf_hub_filename or "model.safetensors"
    if not found.hf_hub_id or not file.endswith(".safetensors"):
        what = f"timm has no weights of '{name}' on the hub that can be read without running them"
        raise UserError(f"{what}; name others, or give `pretrained` a file or random")
    if not cached(found.hf_hub_id, file):
        tell_of(f"weights of 'timm:{name}'", f"'{found.hf_hub_id}' of the Hugging Face hub")
    what = f"weights of 'timm:{name}' could not be fetched from the hub"
    with refusing(what, "check the connection, or give `pretrained` a file", Exception):
        return Path(hf_hub_download(found.hf_hub_id, file))
