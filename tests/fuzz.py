"""Files from strangers as bytes: what reads each kind, for atheris and for the kept corpus.

``make fuzz`` gives every kind in `TARGETS` many inputs, guided by which code they reach, starting
from ``tests/corpus/<kind>/``. What goes wrong there is kept in that folder, which the tests read
anew: mend it, and give the file a name that says what it was.

    python tests/fuzz.py [--seconds N] [KIND ...]
"""

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")


# What reads bytes in Python, whose branches guide the search.
GUIDES = ("dapt", "csv", "json", "pickletools", "PIL", "tarfile", "webdataset", "yaml", "zipfile")


def start(program):
    """Run atheris in this process."""
    import atheris

    kind = program.pop(1)
    os.sync = lambda: None  # unpacking asks for it each time
    for name in [n for n in sys.modules if n.partition(".")[0] in GUIDES]:
        del sys.modules[name]  # only what is imported from here on is watched
    with tempfile.TemporaryDirectory() as place:

        def once(content):
            TARGETS[kind](content, Path(place))

        with atheris.instrument_imports(include=GUIDES):
            once(b"")  # imports, and makes what is made but once
        atheris.Setup(program, once)
        atheris.Fuzz()


@contextlib.contextmanager
def read_or_refused():
    """Nothing but `UserError` may come of a file; it is one printable line."""
    from dapt.errors import UserError

    try:
        yield
    except UserError as error:
        said = str(error)
        assert said.isprintable() or said.replace("\u3000", "").strip()
        assert "\n" not in said
        assert len(said) < 7000


def put(place, name, content):
    file = place / name
    file.write_bytes(content)
    return file


# ------------------------------------------------------------------------ what reads each kind


def weights(content, place):
    from dapt.safe.weights import read_state_dict

    for name in ("a.pt", "a.safetensors"):
        with read_or_refused():
            read_state_dict(put(place, name, content))


def checkpoint(content, place):
    """A pickle, in a zip, which would else be refused for the sum of its bytes."""
    from dapt.share.exchange import read_published

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/a", bytes(16))
    for whole in (file.getvalue(), content):
        with read_or_refused():
            read_published(put(place, "a.pth.tar", whole))


def settings(content, place):
    """YAML and JSON that people write."""
    from dapt.grid import make_plan, read_suite
    from dapt.safe.files import read_json
    from dapt.settings import make_settings, read_settings_file

    file = put(place, "a.yaml", content)
    with read_or_refused():
        make_settings(read_settings_file(file))
    with read_or_refused():
        make_plan(read_suite(file), place / "grids")
    with read_or_refused():
        read_json(file, "file")


def split(content, place):
    """Lists of images: split files, support sets, tables."""
    from dapt.data import Item, Task, load_support_set, open_task, read_split

    file = put(place, "a.json", content)
    with read_or_refused():
        read_split(file)
    item = Item("a.png", 0, "a")
    with read_or_refused():
        load_support_set(file, Task("a", place, ("a",), (item,), (), (item,)))
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.json"):
        with read_or_refused():
            open_task(str(put(place, name, content)))


def run(content, place):
    """A run directory, one of whose files is named by the first line and is what follows."""
    from dapt.errors import UserError
    from dapt.report.collect import collect, read_confusion, read_log
    from dapt.run.directory import RunDirectory
    from dapt.run.load import load_classifier
    from dapt.share.card import model_card

    good, backbone = _good_run(place)
    stranger = place / "stranger"
    shutil.rmtree(stranger, ignore_errors=True)
    shutil.copytree(good, stranger)
    names = sorted(p.name for p in good.iterdir() if p.suffix in (".json", ".csv", ".safetensors"))
    name, _, content = content.partition(b"\n")
    known = name.decode(errors="replace")
    put(stranger, known if known in names else names[len(name) % len(names)], content)
    directory = RunDirectory(stranger)
    with read_or_refused():
        load_classifier(directory, backbone=backbone).text_features()
    with read_or_refused():
        model_card(directory)
    with read_or_refused():
        directory.read_checkpoint()
    with read_or_refused():
        for found in collect([stranger])[0]:
            for reading in (read_confusion, read_log):
                with contextlib.suppress(UserError):
                    reading(found)


@cache
def _good_run(place):
    from miniatures import make_photos, make_weights

    from dapt.engine.features import backbone_of
    from dapt.run.train import train
    from dapt.settings import make_settings

    make_photos(place / "photos")
    make_weights(place / "tiny.safetensors")
    given = {"dataset": place / "photos", "backbone": place / "tiny.safetensors", "device": "cpu",
             "method": "dapt", "shots": 1, "epochs": 1, "text_vectors": 2, "visual_vectors": 1,
             "lr": 0.02, "checkpoint_every": 1}  # fmt: skip
    done = train(make_settings({k: str(v) for k, v in given.items()}), place / "good")
    shutil.rmtree(done.tensorboard, ignore_errors=True)
    return done.path, backbone_of(done.read_settings())


def backbone(content, place):
    """The configuration in a backbone's folder."""
    from dapt.clip.sources import load_backbone

    folder = _good_backbone(place)
    put(folder, "open_clip_config.json", content)
    with read_or_refused():
        load_backbone(str(folder), device="cpu").tokenize(["a"])


@cache
def _good_backbone(place):
    from miniatures import make_weights

    folder = place / "backbone"
    folder.mkdir()
    make_weights(folder / "open_clip_model.safetensors", vocabulary=300)
    return folder


def shard(content, place):
    from dapt.data import open_task

    os.environ["DAPT_CACHE"] = str(place / "cache")
    try:
        with read_or_refused():
            open_task(str(put(place, "a.tar", content)))
    finally:
        del os.environ["DAPT_CACHE"]
        shutil.rmtree(place / "cache", ignore_errors=True)


def image(content, place):
    from dapt.data import decode_image

    with read_or_refused():
        assert decode_image(io.BytesIO(content), "upload").mode == "RGB"


TARGETS = {f.__name__: f for f in (weights, checkpoint, settings, split, run, backbone, shard,
                                   image)}  # fmt: skip


# ------------------------------------------------------------------------------------ atheris


def main():
    """One process a kind, as atheris ends its own at the first find."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=int, default=120, help="for each kind")
    parser.add_argument("kinds", nargs="*", help=", ".join(TARGETS))
    given = parser.parse_args()
    failed = []
    for kind in given.kinds or TARGETS:
        found = Path("build/fuzz") / kind  # inputs that reach something new, to go on from
        found.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={given.seconds}", "-timeout=20", "-rss_limit_mb=4096"]
        limits += ["-max_len=8192", "-print_final_stats=1", f"-artifact_prefix={CORPUS / kind}/"]
        command = [sys.executable, __file__, "--one", kind, found, CORPUS / kind, *limits]
        print(f"== {kind}", flush=True)
        if subprocess.run(list(map(str, command))).returncode:
            failed.append(kind)
    sys.exit(f"something was found in {', '.join(failed)}; see tests/corpus" if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        start([sys.argv[0], *sys.argv[2:]])
    else:
        main()
