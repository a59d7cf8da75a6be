"""Where a frozen model comes from: this package, open_clip, the hub, a folder, a file.

Nothing that comes with it is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from huggingface_hub import snapshot_download
from open_clip.model import CustomTextCLIP, convert_to_custom_text_state_dict
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import nn

from dapt.clip import hub, hub_format, hub_vision, image_only, known, shapes
from dapt.clip.backbone import PRECISIONS, Backbone, Preprocessing, choose_device, usable_precision
from dapt.clip.joined import Joined
from dapt.errors import UserError, lacking, nearest, refusing
from dapt.progress import errors, quietly, say
from dapt.safe.files import parse_json, read_text, user_path
from dapt.safe.weights import StateDict, is_torchscript, read_state_dict

BUNDLED = known.BUNDLED
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".index.json")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+")  # listed in an index
_HUB_CONFIG = ("open_clip_config.json", hub_format.CONFIG)
# transformers' on the hub, of which the first kind that is there is fetched.
_THEIR_WEIGHTS = (["model.safetensors", "model-*.safetensors"], ["pytorch_model*.bin"])
_REVISION, _COMMIT = re.compile(r"[\w-][\w.-]{0,99}"), re.compile(r"[0-9a-f]{40}")
# Of what open_clip hands on to other libraries, the part that its own configurations use.
_HANDED_ON = {"tokenizer_kwargs": {"clean", "strip_sep_token"}, "norm_kwargs": {"eps"},
              "act_kwargs": {"approximate"}}  # fmt: skip
# Far beyond any CLIP: a text tower keeps a mask of its length squared, an image is made this large.
_LONGEST_CONTEXT, _LARGEST_IMAGE = 1024, hub_format.LARGEST_IMAGE

# What comes of configurations that are none, here and in open_clip.
_ODD = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
        ValueError)  # fmt: skip

Loaded = tuple[nn.Module, Any, Preprocessing]


def load_backbone(
    name: known.Names = BUNDLED,
    pretrained: known.Each = None,
    *,
    device: str = "auto",
    precision: str = "fp32",
    revision: known.Each = None,
) -> Backbone:
    """Load a frozen backbone; of several names, with as many of what goes by name, `Joined` ones.

    Args:
        name: one of
            ``"bundled"``, the small CLIP in this package, which knows drawings;
            ``"auto"``, the one in ``known.yaml`` that is best for photographs on this machine, or
            the bundled one, with a warning, where that cannot be had;
            a model of timm's, which reads no text (``"timm:vit_small_patch14_dinov2.lvd142m"``);
            an open_clip model (``"ViT-B-16"``), with ``pretrained`` one of its tags;
            a Hugging Face hub id (``"hf-hub:org/repo"`` or ``"org/repo"``), of its latest commit
            or of one, ``"org/repo@commit"``;
            a directory with ``open_clip_config.json`` and weights, or one of transformers' with
            ``config.json`` (of types clip, siglip, siglip2, metaclip_2, chinese_clip; of images
            alone, vit, dinov2, dinov2_with_registers, dinov3_vit);
            a file of weights with OpenAI's key names (``.safetensors``, ``.pt``, TorchScript),
            whose architecture is read from the shapes.
        pretrained: tag or weights file for a name of open_clip's or timm's; ``"random"`` for
            untrained weights, always the same; by default OpenAI's weights where the model has
            them, of timm's models those that timm takes.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
        precision: ``"fp32"``, ``"bf16"`` (fp16 on a GPU without it) or ``"fp16"``.
        revision: commit of a hub id that names none.

    What is not here yet is named on standard error before it is fetched. What of these is unknown,
    and weights that are unreadable or do not fit, are a `UserError`.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision '{precision}'; use one of {', '.join(PRECISIONS)}")
    names, tags = known.names_of(name), known.each_of(name, pretrained)
    commits = known.each_of(name, revision, "the run's revision")
    each = zip(names, tags, commits, strict=True)
    found = [_load_one(*one, choose_device(device), precision) for one in each]
    return found[0] if len(found) == 1 else Joined(found)


def _load_one(
    name: str, pretrained: str | None, revision: str | None, place: torch.device, precision: str
) -> Backbone:
    if name == known.SUITED and pretrained is None:
        return _load_suited(place, precision)
    precision = usable_precision(precision, place)
    remote = pretrained is None and _is_hub_id(name)
    source = _from_hub(name, revision) if remote else Path(name)
    model, tokenizer, preprocess = load_model(str(source) if remote else name, pretrained)
    commit = source.name if remote and source.parent.name == "snapshots" else None
    how: dict[str, Any] = {"device": place, "precision": precision, "revision": commit}
    label = name if pretrained is None else f"{name}/{pretrained}"
    return Backbone(model, tokenizer, preprocess, name=label, **how)


def _load_suited(place: torch.device, precision: str) -> Backbone:
    """The model for photographs, fetched once into the usual cache; else the bundled one."""
    model = known.recommended(place.type, memory_of(place))
    if model is None:
        why = "this machine has too little memory for a model that knows photographs"
    else:
        try:
            if not hub.has_weights(model.name, model.pretrained):
                hub.reach(model.name, model.pretrained)
                what = f"{model} ({model.megabytes:,} MB, licence {model.licence})"
                say(f"dapt: {what} is the model for photographs on this machine", to=errors)
            return _load_one(model.name, model.pretrained, None, place, precision)
        except UserError as error:
            why = f"{model}, the model for photographs on this machine, cannot be had: {error}"
    say(f"dapt: warning: {why}. {known.STAND_IN}; see 'dapt backbones'", to=errors)
    return _load_one(BUNDLED, None, None, place, precision)


def memory_of(place: torch.device) -> float:
    """GiB of a device in all (untested on a GPU)."""
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[1] / 2**30
    return known.memory_of_machine()


def load_model(name: str, pretrained: str | None) -> Loaded:
    """open_clip's own model, tokenizer and preprocessing; sources and errors of `load_backbone`."""
    path = user_path(name)
    if name.startswith(image_only.PREFIX):
        return _from_timm(name.removeprefix(image_only.PREFIX), pretrained)
    if pretrained is not None and (name == BUNDLED or path.exists() or "/" in name):
        what = f"pretrained {pretrained} goes with open_clip model names"
        raise UserError(f"{what}; backbone '{name}' brings its own weights, so leave it out")
    if name == BUNDLED:
        path = Path(str(files("dapt") / "assets/backbone"))
    if path.is_dir():
        return _from_directory(path)
    if path.is_file() or path.name.endswith(_WEIGHTS):
        return _from_file(path)
    if _is_hub_id(name):
        return _from_directory(_from_hub(name))
    return _from_open_clip(name, pretrained)


def _is_hub_id(name: str) -> bool:
    path = user_path(name)
    local = path.exists() or path.name.endswith(_WEIGHTS) or name.startswith(image_only.PREFIX)
    return not local and (name.startswith("hf-hub:") or "/" in name)


def taken_for_granted(name: str) -> str | None:
    """What a file of weights does not tell and is guessed, in a sentence; None where nothing is.

    Such a file may be another's CLIP with OpenAI's key names, which would do worse in silence.
    """
    path = user_path(name)
    if path.is_dir() and not (path / _HUB_CONFIG[0]).is_file() and hub_format.is_transformers(path):
        words = not hub_vision.is_of_images(path)
        absent = " or ".join(hub_format.missing_files(path, words=words))
        usual = "what is usual for models of its type is taken"
        return f"{name} holds no {absent}: {usual}" if absent else None
    if name == BUNDLED or not path.is_file() or is_torchscript(path):
        return None
    return (
        f"{name} is taken for one of OpenAI's models: QuickGELU, heads {shapes.HEAD_WIDTH} wide, "
        "their normalisation of images; if it is not, give a folder with open_clip_config.json, or "
        "its open_clip name and this file as pretrained"
    )


def _from_directory(path: Path) -> Loaded:
    config_file = path / _HUB_CONFIG[0]
    if not config_file.is_file():
        return _from_transformers(path)
    config = _told_by_open_clip(config_file)
    model_config = config["model_cfg"]
    weights = _weights_in(path, "open_clip")
    model = _build(model_config, read_state_dict(weights), weights)
    # The standard CLIP vocabulary ships with open_clip; others are files beside the weights.
    tokenizer = _tokenizer(f"local-dir:{path}", model_config)
    return model, tokenizer, _preprocessing(model, config.get("preprocess_cfg", {}), config_file)


def _told_by_open_clip(config_file: Path) -> dict[str, Any]:
    with refusing(
        f"{config_file} is no open_clip configuration",
        "give the one that came with the weights", OSError, *_ODD,
    ):  # fmt: skip
        config = dict(parse_json(read_text(config_file)))
        return config | {"model_cfg": dict(config["model_cfg"])}


def _from_transformers(path: Path) -> Loaded:
    theirs, tokenizer = _told_by_transformers(path)
    weights = _weights_in(path, "model", "pytorch_model")
    state = read_state_dict(weights)
    with refusing(f"the weights in {weights} do not fit their model", "check both", *_ODD):
        state = theirs.weights(state)
    with quietly():
        model = _build(theirs.config, state, weights, theirs.family.make, theirs.name_of)
    return model, tokenizer, _preprocessing(model, theirs.preprocessing, path)


@quietly()
def _told_by_transformers(
    path: Path,
) -> tuple[hub_format.Translated | hub_vision.Translated, Any]:
    """What the small files of a folder of transformers' say, and its tokenizer."""
    if not hub_format.is_transformers(path):
        what = f"{path} has no {_HUB_CONFIG[0]}, and no {_HUB_CONFIG[1]} of transformers'"
        raise UserError(f"{what}; a folder of a backbone holds one of them")
    hint = "give the files that came with the weights"
    with refusing(f"{path} is no transformers model that can be read", hint, OSError, *_ODD):
        theirs = hub_vision.translate(path)
    with refusing(f"the vocabulary in {path} cannot be used", hint, Exception):
        return theirs, theirs.tokenizer()


def _weights_in(folder: Path, *names: str) -> Path:
    """The file of a folder's weights: of several, one that begins with these names, safetensors."""
    found = [p for p in folder.glob("*") if p.name.endswith(_WEIGHTS) and not _SHARD.match(p.name)]
    if not found:
        raise UserError(f"{folder} holds no weights; put {names[0]}*.safetensors there")
    # A snapshot from a hub may hold the model in another library's form, or training's, beside it.
    ours = [p for p in found if p.name.startswith(names)] or found
    return min(ours, key=lambda p: (".safetensors" not in p.name, len(p.name), p))


def _from_hub(name: str, revision: str | None = None) -> Path:
    """What open_clip put on the hub is, fetched into the hub's cache, such a directory.

    All of it is of one commit, that of ``revision`` or of the name itself, else the latest.
    """
    repo, _, own = name.removeprefix("hf-hub:").partition("@")
    at = own or revision or None
    if at is not None and not _REVISION.fullmatch(at):
        raise UserError(f"backbone '{name}' asks for no commit, branch or tag of the hub; give one")
    kinds = ["*.json", "*.txt", "*.model"]
    # Of a branch, there may be something new.
    weights = (*hub.HUB_WEIGHTS, "model.safetensors", "pytorch_model.bin")
    whole = all(hub.cached(repo, *files, at=at) for files in (_HUB_CONFIG, weights))
    if not (whole and at and _COMMIT.fullmatch(at)):
        hub.tell_of(f"backbone '{repo}{f'@{at}' if at else ''}'")
    # First what is small: configuration and vocabulary. The weights arrive beside them, and only
    # if those can be used.
    with hub.fetching(repo):
        folder = Path(snapshot_download(repo, revision=at, allow_patterns=kinds))
    pinned = folder.name if folder.parent.name == "snapshots" else None
    if (folder / _HUB_CONFIG[0]).is_file():
        _told_by_open_clip(folder / _HUB_CONFIG[0])
        with hub.fetching(repo):
            download_pretrained_from_hf(repo, **({"revision": pinned} if pinned else {}))
        return folder
    if not whole:
        _told_by_transformers(folder)
    for patterns in _THEIR_WEIGHTS:
        with hub.fetching(repo):
            snapshot_download(repo, revision=pinned or at, allow_patterns=patterns)
        if any(match for pattern in patterns for match in folder.glob(pattern)):
            break
    return folder


def _from_file(path: Path) -> Loaded:
    state = read_state_dict(path)
    if "text.text_projection" in state:  # of open_clip's newer models, the same tower
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    if "visual.conv1.weight" not in state or "text_projection" not in state:
        what = f"{path} has no weights named as OpenAI's CLIP names them, but '{min(state)}'"
        ways = "give a folder that says what they are: open_clip_config.json, or config.json of"
        raise UserError(f"{what}; {ways} transformers, beside them")
    if "visual.proj" not in state:
        hint = "load it by its open_clip name, such as RN50 with pretrained openai"
        raise UserError(f"{path} holds a ResNet image tower, which shapes do not tell; {hint}")
    model = _build(shapes.configuration(state), state, path)
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    return model, tokenizer, _preprocessing(model, {}, path)


def _build(
    config: dict[str, Any],
    state: StateDict,
    source: Path,
    make: Callable[..., nn.Module] = CustomTextCLIP,
    name_of: Callable[[str], str] = str,
) -> nn.Module:
    """The model of a configuration and its weights, either of which may be a stranger's.

    It is laid out without memory first, and made only if the weights fill it. ``name_of`` says what
    the file calls a tensor.
    """
    config.pop("custom_text", None)
    with refusing(f"the weights in {source} do not fit their model", "check both", *_ODD):
        _check_config(config, state, source)
        if odd := [k for k, v in state.items() if not bool(v.isfinite().all())]:
            raise ValueError(f"'{name_of(odd[0])}' holds numbers that are not finite")
        if "text_projection" in state:  # OpenAI's names, of which those of the text tower change
            state, name_of = convert_to_custom_text_state_dict(state), _openai_name
        _need_transformers(config, f"the text tower of {source}", "hf_model_name")
        hub.tell_of_text(config, "hf_model_name")
        with torch.device("meta"):
            _check_fit(make(**config).state_dict(), state, name_of)
        model = make(**config)
        model.load_state_dict({k: v.float() for k, v in state.items()})
    return model


def _openai_name(name: str) -> str:
    return name.removeprefix("text.")


def _check_fit(needed: StateDict, state: StateDict, name_of: Callable[[str], str]) -> None:
    """A `ValueError` that names a tensor that is absent, of another shape, or of no use."""
    for name, tensor in needed.items():
        if name not in state:
            raise ValueError(f"'{name_of(name)}' is not among them")
        if (shape := tuple(state[name].shape)) != (right := tuple(tensor.shape)):
            # Of what is laid out otherwise here, the shapes are those that it has here.
            raise ValueError(f"'{name_of(name)}' has shape {shape}, where {right} is needed")
    if odd := [name for name in state if name not in needed]:
        raise ValueError(f"the model has no place for '{name_of(odd[0])}'")


def _check_config(config: dict[str, Any], state: StateDict, source: Path) -> None:
    """Refuse an open_clip configuration that would run or fetch something, or be too large.

    open_clip hands ``tokenizer_kwargs`` on to transformers, which takes ``trust_remote_code``
    there, and model names to timm and transformers, which fetch those that are not their own. One
    that is no configuration at all ends in any of `_ODD`.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    refused = [
        f"{setting}.{key}"
        for setting, known in _HANDED_ON.items()
        for part in (vision, text)
        for key in (part.get(setting) or {}).keys() - known
    ]
    # Of transformers' text towers, those that open_clip's own configurations name.
    ours = [open_clip.get_model_config(name)["text_cfg"] for name in open_clip.list_models()]
    if text.get("hf_model_name") not in (None, "", *(c.get("hf_model_name") for c in ours)):
        refused.append("hf_model_name")
    if (timm_name := vision.get("timm_model_name")) and not timm.is_model(timm_name):
        refused.append("timm_model_name")
    if refused:
        what = f"the configuration that came with {source} asks for '{refused[0]}'"
        why = "by which others' code or files may be fetched or run"
        raise UserError(f"{what}, {why}; take it out if the model does without")
    vision["timm_model_pretrained"] = text["hf_model_pretrained"] = False  # weights are here
    # What takes time or memory even where a model is laid out without memory.
    deep = [n for part in (vision, text) for n in _numbers(part.get("layers", 0))]
    if sum(deep) > len(state):
        raise ValueError(f"{len(state)} tensors do not make {sum(deep):,} layers")
    if text.get("context_length", 0) > _LONGEST_CONTEXT:
        raise ValueError(f"its texts are longer than {_LONGEST_CONTEXT} tokens")
    if max(_numbers(vision.get("image_size", 0))) > _LARGEST_IMAGE:
        raise ValueError(f"its images are larger than {_LARGEST_IMAGE} px")
    if vision.get("pos_embed_type", "learnable") != "learnable":
        raise ValueError("its positions are computed; only learned ones are known here")


def _numbers(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _need_transformers(config: dict[str, Any], what: str, key: str) -> None:
    """See, before anything is fetched, that transformers is there where open_clip asks for it."""
    if config["text_cfg"].get(key) and find_spec("transformers") is None:
        with lacking(what):
            raise ModuleNotFoundError(name="transformers")


@quietly()  # of activations too it warns, which are settled here
def _from_open_clip(name: str, pretrained: str | None) -> Loaded:
    config = open_clip.get_model_config(name)
    if config is None:
        what = f"unknown backbone '{name}'{nearest(name, open_clip.list_models())}"
        ways = (
            "'bundled', an open_clip model name, timm:NAME, a hub id org/repo, or a file of weights"
        )
        raise UserError(f"{what}; use {ways}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    _need_transformers(config, f"the text tower of '{name}'", "hf_model_name")
    _need_transformers(config, f"the tokenizer of '{name}'", "hf_tokenizer_name")
    hub.tell_of_text(config, "hf_model_name", "hf_tokenizer_name")
    ways = f"one of {', '.join(tags) or 'none'}, a weights file, or 'random'"
    if pretrained is None and "openai" not in tags:
        raise UserError(f"backbone '{name}' needs pretrained weights: {ways}")
    pretrained = pretrained or "openai"
    file = Path(pretrained)
    if pretrained == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # untrained, yet the same everywhere
            # Of a text tower by transformers, open_clip would fetch weights that were learned.
            model = open_clip.create_model(name, force_custom_text=True, pretrained_hf=False)
    elif pretrained in tags:
        # Which activation the weights were trained with is the tag's to say, not the name's.
        quick = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False))
        what = f"weights '{pretrained}' of '{name}' could not be fetched"
        hint = "check the connection, or download them and pass the file"
        with refusing(what, hint, RuntimeError), lacking(f"backbone '{name}'"):
            given = {"pretrained": pretrained, "force_custom_text": True, "quick_gelu": quick}
            hub.tell_of_open_clip(name, pretrained)
            model = open_clip.create_model(name, **given)
    elif file.is_file():
        # OpenAI's own have theirs, whatever the name's config says.
        activation = {"quick_gelu": True} if is_torchscript(file) else {}
        model = _build(config | activation, read_state_dict(file), file)
    else:
        what = f"unknown weights '{pretrained}' for '{name}'{nearest(pretrained, tags)}"
        raise UserError(f"{what}; use {ways}")
    seen = getattr(model.visual, "preprocess_cfg", {})
    return model, _tokenizer(name, config), _preprocessing(model, seen, name)


@quietly()
def _from_timm(name: str, pretrained: str | None) -> Loaded:
    file = Path(pretrained or "")
    if pretrained not in (None, "random") and not file.is_file():
        if "." in name or file.name.endswith(_WEIGHTS):
            raise UserError(f"there is no weights file {file} for 'timm:{name}'; check the path")
        name, pretrained = f"{name}.{pretrained}", None
    seed = torch.random.fork_rng(devices=[])
    with seed, refusing(f"timm cannot make '{name}'", "give another model", *_ODD):
        torch.manual_seed(0)  # untrained, yet the same everywhere
        trunk = image_only.new_trunk(name)
    if pretrained != "random":
        file = file if pretrained else hub.timm_weights(name)
        with refusing(f"the weights in {file} do not fit 'timm:{name}'", "check both", *_ODD):
            state = image_only.adapted(read_state_dict(file), trunk, name)
            _check_fit(trunk.state_dict(), state, str)
            trunk.load_state_dict({n: t.float() if t.is_floating_point() else t
                                   for n, t in state.items()})  # fmt: skip
    seen = image_only.preprocessing_of(trunk)
    model = image_only.ImageOnly(image_only.ImageTower(trunk, seen["size"]))
    return model, None, _preprocessing(model, seen, f"timm:{name}")


@quietly()
def _tokenizer(source: str, config: dict[str, Any]) -> Any:
    # transformers would ask on the terminal whether it may run what lies beside a vocabulary.
    never = {"trust_remote_code": False} if config["text_cfg"].get("hf_tokenizer_name") else {}
    what = f"the tokenizer of '{source.removeprefix('local-dir:')}'"
    hint = "its files are needed: beside the weights, or once a connection to the hub"
    with refusing(f"{what} could not be loaded", hint, Exception), lacking(what):
        return open_clip.get_tokenizer(source, **never)


def _preprocessing(model: Any, config: Any, source: Path | str) -> Preprocessing:
    what = f"{source} says of images what cannot be"
    hint = "three finite means and positive deviations are needed, and a size of at most"
    with refusing(what, f"{hint} {_LARGEST_IMAGE}", *_ODD):
        seen = merge_preprocess_dict(PreprocessCfg(), config)
        size = getattr(model.visual, "image_size", seen["size"])
        side = int(size[0] if isinstance(size, list | tuple) else size)
        mean, std = (tuple(map(float, seen[k])) for k in ("mean", "std"))
        finite = all(map(isfinite, mean + std)) and min(std) > 0
        if not 0 < side <= _LARGEST_IMAGE or not finite or not len(mean) == len(std) == 3:
            raise ValueError(f"size {side}, mean {mean}, std {std}")
    return Preprocessing(side, mean, std, seen["interpolation"], seen["resize_mode"])
