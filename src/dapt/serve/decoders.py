"""Decoders of strangers' pictures: processes that are ended where a picture holds them up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge

import dapt
from dapt.data import BadImage, TooManyPixels

_STUCK = 5.0  # seconds at one picture after which a decoder counts as stuck
_CLOSING = 2.0  # seconds that a decoder may still be at a picture when the server ends
_LOOK = 0.1  # seconds between looks at how long decoders have been at theirs
_START = ("import sys; sys.path[:] = [p for p in sys.path if p]; "
          "from dapt.serve.decoder import main; main()")  # fmt: skip


class Decoders:
    """As many processes as threads that wait for them.

    A picture may take ``seconds`` of computing and ``patience`` of waiting; then its decoder is
    ended, it is told to be bad, and another decoder takes the place.
    """

    def __init__(
        self,
        views: dict[str, Any],
        max_pixels: int,
        registry: CollectorRegistry,
        *,
        seconds: float,
        patience: float,
    ) -> None:
        grey = views.pop("grey")
        self._asked = {"max_pixels": max_pixels, "seconds": seconds, "views": views, "grey": grey}
        self.count, self._patience = min(4, os.cpu_count() or 1), patience
        self.threads = ThreadPoolExecutor(self.count, "dapt-images")
        self._idle: list[subprocess.Popen[bytes]] = []
        self._busy: dict[subprocess.Popen[bytes], float] = {}  # since when
        self._lock, self._closed = threading.Lock(), threading.Event()
        # Set now and then, as several servers' are added up in files and cannot be asked for.
        about = "Decoders that are at a picture."
        how: dict[str, Any] = {"registry": registry, "multiprocess_mode": "livesum"}
        self._gauge = Gauge("dapt_decoders_busy", about, **how)
        about = "Seconds that a decoder has been at its picture, of the one that has been longest."
        how = {"registry": registry, "multiprocess_mode": "livemax"}
        self._longest = Gauge("dapt_decoder_longest_seconds", about, **how)
        about = "Decoders that a picture held up or brought down."
        self._ended = Counter("dapt_decoders_ended", about, registry=registry)

    def start(self) -> None:
        """Start the processes, and to watch them."""
        self._place = tempfile.TemporaryDirectory(prefix="dapt-", ignore_cleanup_errors=True)
        self._idle = [self._new() for _ in range(self.count)]
        threading.Thread(target=self._watch, name="dapt-watch", daemon=True).start()

    @property
    def stuck(self) -> int:
        """How many have been at one picture for long."""
        return sum(age > _STUCK for age in self._ages().values())

    def view(self, file: BinaryIO, name: str) -> np.ndarray:
        """(S, S, 3) uint8 of an image file, as the model wants to see it; called in a thread.

        A `UserError`, which calls it ``name``, where it cannot be read: `TooManyPixels` where its
        header tells of more, and nothing was decoded.
        """
        content = file.read()
        with self._lock:
            process = self._idle.pop() if self._idle else self._new()
            if process.poll() is not None:  # something else has ended it
                process = self._new()
            self._busy[process] = time.monotonic()
        try:
            answer, view = self._ask(process, {**self._asked, "name": name}, content)
        except (OSError, ValueError):  # it was ended, or came to its end
            process.kill()
            process.wait()
            if self._closed.is_set():
                raise BadImage(f"image {name} was not decoded, as the server ends") from None
            self._ended.inc()
            said = f"image {name} takes too long to decode, or brings its decoder down"
            raise BadImage(f"{said}; save it anew") from None
        finally:
            with self._lock:
                del self._busy[process]
                if process.returncode is None:
                    self._idle.append(process)
        if "error" in answer:
            raise (TooManyPixels if answer["many"] else BadImage)(answer["error"])
        return np.frombuffer(view, np.uint8).reshape(answer["size"], answer["size"], 3)

    @staticmethod
    def _ask(
        process: subprocess.Popen[bytes], request: dict[str, Any], content: bytes
    ) -> tuple[dict[str, Any], bytes]:
        assert process.stdin is not None
        assert process.stdout is not None
        head = json.dumps({**request, "bytes": len(content)}).encode()
        process.stdin.write(head + b"\n" + content)
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        size = 3 * answer.get("size", 0) ** 2
        if len(view := process.stdout.read(size)) < size:
            raise EOFError
        return answer, view

    def _new(self) -> subprocess.Popen[bytes]:
        """A decoder, which a Ctrl-C at this terminal does not reach."""
        own = str(Path(dapt.__file__).parents[1])
        path = os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        return subprocess.Popen(
            [sys.executable, "-c", _START, str(Path(self._place.name, "large"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": path},
            start_new_session=True,
        )

    def _ages(self) -> dict[subprocess.Popen[bytes], float]:
        now = time.monotonic()
        with self._lock:
            return {process: now - since for process, since in self._busy.items()}

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK):
            ages = self._ages()
            self._gauge.set(len(ages))
            self._longest.set(max(ages.values(), default=0.0))
            for process, age in ages.items():
                if age > self._patience:
                    process.kill()

    def hurry(self) -> None:
        """The server ends: what has been at a picture for long is not waited for."""
        self._patience = min(self._patience, _CLOSING)

    def kill(self) -> None:
        """End all processes at once."""
        self._closed.set()
        # Without the lock: in a signal's handler, whoever holds it may be waiting for that.
        for process in (*self._idle, *self._busy):
            with suppress(OSError):
                process.kill()

    def close(self) -> None:
        """End all processes, and the threads that wait for them."""
        self.kill()
        self.threads.shutdown(wait=True, cancel_futures=True)
        for process in self._idle:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    if pipe is not None:
                        pipe.close()
        self._place.cleanup()
