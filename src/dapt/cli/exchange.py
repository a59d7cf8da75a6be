"""Prompts in, classifiers out: ``dapt import``, ``dapt export``, ``dapt push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.filesize import decimal
from typer import Argument, Context, Option

from dapt.cli import common
from dapt.cli.common import app
from dapt.progress import RichReporter, say


@app.command(name="import")
def import_(
    context: Context,
    checkpoint: Annotated[Path, Argument(help="File, or a directory with model.pth.tar-N.")],
    output: Annotated[Path, Option("--output", "-o", help="Run directory to write.")],
    backbone: common.BackboneOption = "bundled",
    pretrained: common.PretrainedOption = None,
    class_names: Annotated[Path | None, Option(help="JSON list, in label order.")] = None,
    dataset: Annotated[str | None, Option(help="Evaluate on its test images.")] = None,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    method: common.MethodOption = None,
    template: Annotated[str | None, Option(help="Where no text prompt is: a {} in words.")] = None,
    shots: common.ShotsOption = None,
    seed: common.SeedOption = None,
    epochs: common.EpochsOption = None,
    precision: common.PrecisionOption = None,
    device: common.DeviceOption = None,
    overwrite: common.OverwriteOption = False,
) -> None:
    """Make a run of prompts that the field's published code has tuned, on the same backbone.

    Checkpoints of CoOp's code and its descendants are read, with nothing in them executed; not
    class-specific contexts, nor CoCoOp's meta-network. The class name is taken to stand at the
    end. Of a directory, model-best.pth.tar is taken, else the highest model.pth.tar-N. Shots, seed
    and epochs are only recorded (16, 1 and the checkpoint's own if not given); the method is coop,
    vpt or dapt if not given, by which prompts there are.

    **Examples**

    - `dapt import output/prompt_learner -o runs/coop -b ViT-B-16 --class-names names.json`
    - `dapt import model.pth.tar-200 -o runs/pets -b ViT-B-16 --dataset oxford_pets --root /data`
    """
    from dapt.share.exchange import import_checkpoint

    told, given = RichReporter(), common.given_settings(context)
    run = import_checkpoint(checkpoint, output, given, overwrite=overwrite, reporter=told)
    if run.finished:
        common.show_run(run, "imported")
    else:
        say(f"not evaluated, for want of a dataset; everything is in {run.path}")


@app.command()
def export(
    run: common.RunArgument,
    output: Annotated[Path, Option("--output", "-o", help="File to write.")],
    form: Annotated[str, Option("--format", "-f", help="onnx, torch or coop.")] = "onnx",
    int8: Annotated[bool, Option("--int8", help="ONNX in 8 bits: smaller, a bit worse.")] = False,
) -> None:
    """Write a run's classifier to one file that needs no dapt, with a model card beside it.

    onnx and torch: normalised images in, probabilities out, batches of any size; labels,
    preprocessing and provenance are in the file's metadata. The file is compared with the run's
    classifier and not left if a probability differs by more than 0.0001. coop: the prompts alone,
    as CoOp's code and its descendants save them.

    **Examples**

    - `dapt export runs/photos -o photos-int8.onnx --int8`
    - `dapt export runs/photos -o photos.pt2 --format torch`
    - `dapt export runs/photos -o prompt_learner/model.pth.tar-200 --format coop`
    """
    from dapt.run.directory import RunDirectory
    from dapt.share import export

    made = export.export(RunDirectory(run), output, form, int8=int8, reporter=RichReporter())
    if made.difference is not None:
        same = f"same class for {made.agreement:.0%}, on {made.images}"
        say(f"largest difference of a probability {made.difference:.1e}, {same}")
    say(f"{made.file} ({decimal(made.file.stat().st_size)}) and {made.card}")


@app.command()
def push(
    run: common.RunArgument,
    repo_id: Annotated[str, Argument(help="Model repository, such as name/flowers.")],
    private: Annotated[bool, Option("--private", help="Make it a private one.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only list what would be uploaded.")] = False,
) -> None:
    """Upload a run and its model card to the Hugging Face hub, in one commit.

    Paths on this machine can be read in settings.json, environment.json and support_set.json, which
    lists the images it was tuned on; they go along as they are. Log in first, with 'hf auth login'.
    So far this was tried against a stub of the hub only.

    **Example:** `dapt push runs/photos name/photos --dry-run`
    """
    from dapt.run.directory import RunDirectory
    from dapt.share.card import files_to_push
    from dapt.share.card import push as run_push

    directory = RunDirectory(run)
    if not dry_run:
        say(run_push(directory, repo_id, private=private, reporter=RichReporter()))
        return
    for name, content in files_to_push(directory).items():
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        say(f"{name}  {size:,} bytes")
