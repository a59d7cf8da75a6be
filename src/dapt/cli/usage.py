"""What is wrong with a command line, in one sentence that names what was meant."""

from __future__ import annotations

import re
import sys
from typing import Any

from typer import BadParameter
from typer.core import TyperGroup

from dapt.cli.outline import outlines
from dapt.errors import UserError, nearest
from dapt.progress import errors, say

# Of typer's own click, or of click: whichever it comes with.
UsageError: Any = BadParameter.__bases__[0]

# How other programs call what is ours: options, arguments and settings.
_OPTIONS = {
    "lr": ("learning-rate", "learning-rate-init", "eta", "base-lr"),
    "epochs": ("num-epochs", "n-epochs", "max-epochs", "num-train-epochs", "epoch"),
    "output": ("output-dir", "out", "out-dir", "outdir", "save-dir", "run-dir", "log-dir"),
    "out": ("output", "html"),
    "shots": ("num-shots", "n-shots", "k-shot", "k-shots", "n-shot", "images-per-class"),
    "seed": ("random-seed", "random-state"),
    "backbone": ("model", "arch", "model-name", "clip-model", "encoder"),
    "pretrained": ("weights", "checkpoint"),
    "method": ("trainer", "algorithm", "algo"),
    "device": ("gpu", "cuda", "cpu", "accelerator"),
    "precision": ("fp16", "bf16", "amp", "half", "dtype"),
    "config": ("config-file", "cfg", "yaml"),
    "top": ("topk", "top-k"),
    "json": ("as-json",),
    "format": ("output-format", "csv"),
    "overwrite": ("force", "overwrite-output-dir"),
    "resume": ("continue", "resume-from", "resume-from-checkpoint"),
    "batch-size": ("batch", "bs", "train-batch-size", "per-device-train-batch-size"),
    "weight-decay": ("wd", "l2"),
    "test-fraction": ("test-size", "test-split", "val-split", "validation-split"),
    "optimizer": ("optim",),
    "schedule": ("scheduler", "lr-scheduler"),
    "dataset": ("data", "data-dir", "data-path", "dataset-dir", "train-dir", "input"),
    "images": ("image", "input", "source", "data"),
    "run": ("checkpoint", "model", "weights"),
}
_COMMANDS = {
    "train": ("fit", "tune", "finetune", "run", "learn"),
    "eval": ("evaluate", "test", "score", "validate", "val"),
    "predict": ("classify", "infer", "inference", "label"),
    "new": ("init", "create", "start"),
    "compare": ("benchmark", "versus", "vs"),
    "serve": ("server", "web", "ui", "gui", "app"),
    "settings": ("config", "options"),
    "methods": ("models", "algorithms"),
    "push": ("upload", "publish"),
}


# What is said to all names arguments, as `class_names`; on the command line these are options.
_NAMED = re.compile(
    "`(baseline|batch|class_names|dataset|domain|effort|fp16|int8|method|out|output|overwrite|"
    "plugin|pretrained|ray|report|resume|root|shots|threads|workers)`"
)


def as_options(sentence: str) -> str:
    """A sentence that names arguments of Python, with the options that they are here."""
    return _NAMED.sub(lambda found: f"--{found[1].replace('_', '-')}", sentence)


class OneSentence(TyperGroup):
    """A group of commands that tells what is wrong in one sentence, with exit code 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command, and end the process if ``standalone_mode``."""
        try:
            run: Any = super().main  # which returns the exit code, then
            code = run(*args, standalone_mode=False, **extra)
        except UserError as error:  # of an argument that is checked before its command begins
            _end(as_options(str(error)))
        except UsageError as error:
            # Help that was printed for want of a command is an error of its own.
            _end("" if type(error).__name__ == "NoArgsIsHelpError" else _sentence(error))
        return sys.exit(code or 0) if standalone_mode else code


def _end(said: str) -> None:
    if said:
        say(f"dapt: {said}", to=errors)
    sys.exit(2)


def _sentence(error: Any) -> str:
    context = error.ctx
    if context is None:
        return str(error.format_message())
    path, names, above = "dapt", list[str](), context
    while above.parent is not None:
        names, above = [above.info_name, *names], above.parent
    path = " ".join([path, *names])
    if type(error).__name__ == "NoSuchOption":
        return f"'{path}' has no option {error.option_name}{_meant(error, path)}"
    message = error.format_message().rstrip(".")
    if found := re.match(r"No such command '(.*?)'", message):
        known = {n: c for n, c in context.command.commands.items() if not c.hidden}
        word = next((n for n in known if found[1] in _COMMANDS.get(n, ())), None)
        near = f" (did you mean '{word}'?)" if word else nearest(found[1], [*known])
        return f"'{path}' has no command '{found[1]}'{near}; '{path} --help' lists all"
    lists = any("--methods" in p.opts for p in context.command.params)
    if lists and message.startswith("Got unexpected extra argument"):
        extra = message.rpartition(" (")[2].rstrip(")")
        return f"{extra}: a list has commas and no spaces, as 1,2; '{path} --help' shows how"
    return f"{message[:1].lower()}{message[1:]}; '{path} --help' shows how"


def _meant(error: Any, path: str) -> str:
    """What an option of another name is here: an option, an argument, or a setting."""
    word, parameters = error.option_name.lstrip("-").replace("_", "-"), error.ctx.command.params
    options = [o for p in parameters if p.param_type_name == "option" for o in p.opts]
    arguments = [p.name for p in parameters if p.param_type_name == "argument"]
    for own in (word, *(own for own, others in _OPTIONS.items() if word in others)):
        for name in (own, f"{own}s"):  # an experiment has lists: --methods, --seeds
            if f"--{name}" in options:
                return f"; write --{name}"
        if own in arguments:
            return f"; write it without one: {path} {own.upper()}"
        if "--set" in options and own.replace("-", "_") in _settings():
            return f"; write --set {own.replace('-', '_')}=VALUE"
    return f"{nearest(f'--{word}', options)}; '{path} --help' lists all"


def _settings() -> list[str]:
    with outlines():
        from dapt.settings import all_fields

        return [*all_fields()]
