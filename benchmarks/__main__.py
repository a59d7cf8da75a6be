"""``python -m benchmarks`` is ``dapt bench``."""

from benchmarks.command import app

app(prog_name="python -m benchmarks")
