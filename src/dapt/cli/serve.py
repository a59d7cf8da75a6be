"""A run behind HTTP: ``dapt serve``."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from dapt.cli import common
from dapt.cli.common import app, say_error
from dapt.errors import UserError
from dapt.progress import RichReporter, say


@app.command()
def serve(
    run: common.RunArgument,
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token: Annotated[
        str | None, Option(envvar="DAPT_TOKEN", help="That clients must send as a Bearer token.")
    ] = None,
    nearest: Annotated[bool, Option(help="Show nearest support images, if they are here.")] = True,
    max_upload: Annotated[float, Option(min=0.01, help="MB of a request.")] = 20,
    max_pixels: Annotated[float, Option(min=0.01, help="Megapixels of an image.")] = 50,
    max_images: Annotated[int, Option(min=1, help="Images of a request.")] = 32,
    queue: Annotated[int, Option(min=1, help="Images that may wait, in all.")] = 128,
    batch_size: Annotated[int, Option(min=1, help="Images the model takes at a time.")] = 32,
    timeout: Annotated[float, Option(min=0.1, help="Seconds a request may take.")] = 30,
    allow_host: Annotated[
        list[str] | None, Option(help="Another name of this server, such as a proxy's before it.")
    ] = None,
    device: common.DeviceOption = None,
) -> None:
    """Serve a run: a page to drop photos on, and predictions for other programs.

    The page is at /, what programs can ask for at /docs, metrics for Prometheus at /metrics. Only
    this machine can reach it, unless --host says otherwise; then give a token too. Ctrl-C or
    SIGTERM stops it once all that was accepted is answered.

    **Examples**

    - `dapt serve runs/photos`
    - `curl -F images=@a.jpg -F images=@b.jpg 'http://127.0.0.1:8000/predict?top=3'`
    - `DAPT_TOKEN=secret dapt serve runs/photos --host 0.0.0.0 --port 80`
    """
    try:
        from dapt.serve import server
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'dapt[serve]'") from error
    from dapt.run.directory import RunDirectory
    from dapt.serve.gate import is_loopback
    from dapt.serve.served import load_served
    from dapt.serve.uploads import Limits

    _check(token, max_images, queue)
    directory = RunDirectory(run)
    directory.require()
    listening = server.open_socket(host, port)
    address, port, *_ = listening.getsockname()
    if token is None and not is_loopback(address):
        say_error(
            "dapt: warning: whoever reaches this machine can use the server and see support "
            "images; give --token or DAPT_TOKEN"
        )
    served = load_served(directory, device=device, nearest=nearest, reporter=RichReporter())
    sizes = {"upload": int(max_upload * 1e6), "pixels": int(max_pixels * 1e6), "batch": batch_size}
    classes = f"{len(served.class_names):,} classes"
    where = f"http://{f'[{address}]' if ':' in address else address}:{port}"
    made = server.make_server(
        served,
        listening,
        Limits(images=max_images, queue=queue, timeout=timeout, **sizes),
        token=token and token.strip(),
        names=(host, *(allow_host or ())),
        ready=lambda: say(f"{served.name}, {classes}, at {where} (Ctrl-C stops)"),
    )
    made.run(sockets=[listening])


def _check(token: str | None, images: int, queue: int) -> None:
    if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
        raise UserError("--token must be printable ASCII, such as 'openssl rand -hex 16' makes")
    if images > queue:
        raise UserError(f"--max-images {images} do not fit --queue {queue}; change one of them")
