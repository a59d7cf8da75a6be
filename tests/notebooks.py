"""Tutorials that are notebooks, run in a kernel. As a program, it keeps what they show:

python tests/notebooks.py
"""

import re
import tempfile
from functools import partial
from pathlib import Path

from patience import LONG

DOCS = Path(__file__).parents[1] / "docs"
# Numbers and pictures, which are other ones on another machine.
_VARIES = re.compile(r"data:image/[\w;]+,[\w+/=]+|\d[\d.]*")


def execute(file, folder):
    """The notebook, with what its cells show when they are run in a folder; an error is raised."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    make = partial(
        NotebookClient,
        notebook,
        record_timing=False,
        startup_timeout=LONG,
        iopub_timeout=LONG,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        make().execute()
    except RuntimeError as error:  # others took a port between its choice and the kernel's start
        if "died before" not in str(error):
            raise
        make().execute()
    notebook.metadata.language_info = {"name": "python"}  # of any version
    return notebook


def shown(notebook):
    """What each cell shows: kinds of output and texts, without numbers and pictures."""
    return [
        [
            (o["output_type"], o.get("name"), _masked(o.get("data", o.get("text"))))
            for o in c["outputs"]
        ]
        for c in notebook["cells"]
        if c["cell_type"] == "code"
    ]


def _masked(data):
    texts = data if isinstance(data, dict) else {"text": data}
    return {kind: _VARIES.sub("#", "".join(text)) for kind, text in texts.items()}


def main():
    import nbformat

    for file in sorted(DOCS.rglob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(file, folder), file)


if __name__ == "__main__":
    main()
