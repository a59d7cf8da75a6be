"""Make the bundled backbone and task from nothing but the pinned npm packages.

    python run.py --out DIR [--minutes 50] [--text-minutes 2.5] [--joint-minutes 7] [--install]

npm install, rasterise, train in three stages, export, check. Each stage that has left its result
in DIR is skipped, so an interrupted run is simply started again. With `--install` the results
are copied to the package's assets.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ASSETS = HERE.parent / "src" / "dapt" / "assets"


def step(name: str, done: Path, *command: str | Path) -> None:
    """Run a command unless its result is there."""
    if done.exists():
        print(f"{name}: {done} exists, skipped", flush=True)
        return
    print(f"{name} ...", flush=True)
    subprocess.run([str(c) for c in command], check=True)


def main() -> None:
    """Parse arguments and run every stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", default="50", help="stage 1: image tower")
    parser.add_argument("--text-minutes", default="2.5", help="stage 2: text tower")
    parser.add_argument("--joint-minutes", default="7", help="stage 3: both")
    parser.add_argument("--install", action="store_true", help="copy the results to the package")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, out / name)
    sets, data, python = out / "node_modules", out / "data", sys.executable
    step("npm", sets, "npm", "ci", "--prefix", out, "--no-audit", "--no-fund")
    step("drawings", data / "drawings.json",
         python, HERE / "build_drawings.py", "--sets", sets, "--out", data)  # fmt: skip
    step("image tower", out / "image_done.pt",
         python, HERE / "train_image.py", "--data", data, "--out", out,
         "--minutes", args.minutes)  # fmt: skip
    step("text tower, joint", out / "backbone" / "open_clip_model.safetensors",
         python, HERE / "train_text.py", "--data", data, "--out", out,
         "--text-minutes", args.text_minutes, "--joint-minutes", args.joint_minutes)  # fmt: skip
    for part in ("val", "test"):
        subprocess.run([python, HERE / "check_gate.py", "--backbone", out / "backbone",
                        "--task", data / "task", "--part", part,
                        "--log", out / "log.jsonl"], check=True)  # fmt: skip
    if args.install:
        for name, source in (("backbone", out / "backbone"), ("task", data / "task")):
            for old in (ASSETS / name).glob("*"):
                if old.name != "MODEL_CARD.md":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            shutil.copytree(source, ASSETS / name, dirs_exist_ok=True)
        shutil.copy(out / "log.jsonl", HERE / "log.jsonl")


if __name__ == "__main__":
    main()
