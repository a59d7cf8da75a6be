"""A socket, a server on it, what every request passes on its way, and how the two end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import re
import secrets
import signal
import socket
import struct
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import python_multipart  # noqa: F401  (forms need it, which would only show at the first one)
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.process_collector import ProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dapt.errors import UserError
from dapt.serve.app import Limits, create_app
from dapt.serve.decoders import Decoders
from dapt.serve.feedback import Feedback
from dapt.serve.served import Served

SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client looks for a folder
# Seconds in which a client that has connected, or has had its answer, must send a whole header.
_HEADER_SECONDS = 10.0
# Bytes a second in which a client must take an answer that does not fit the buffers.
_SLOWEST = 10_000
_MOST_AHEAD = 16  # requests that a client may send before it has the first one's answer


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens, so that an address in use is known before a model is loaded.

    A `UserError` where the address is in use, not this machine's, or none.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        found = socket.create_server(address, family=family, backlog=128, dualstack_ipv6=both)
        # Answers go at once; asyncio sees to it only where a socket was made with TCP's number.
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return found
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"host '{host}' is no address; try 127.0.0.1 or 0.0.0.0") from error
    except OSError as error:
        reason = {
            errno.EADDRINUSE: f"port {port} of {host} is in use; choose another with --port",
            errno.EACCES: f"port {port} is reserved; choose one above 1023 with --port",
            errno.EADDRNOTAVAIL: f"host {host} is no address of this machine; use 127.0.0.1",
        }
        said = reason.get(error.errno or 0, f"cannot listen on {host}:{port} ({error.strerror})")
        raise UserError(said) from error


def make_server(
    served: Served,
    found: socket.socket,
    limits: Limits,
    *,
    token: str | None = None,
    names: Sequence[str] = (),
    origins: Sequence[str] = (),
    root_path: str = "",
    feedback: Feedback | None = None,
    ready: Callable[[], None] = lambda: None,
) -> uvicorn.Server:
    """A server that answers until SIGINT or SIGTERM, then finishes what was accepted.

    The socket is `open_socket`'s; the server's ``run`` wants it, too. Token, names, origins and
    root path are as for `Gate`; corrected photos go to ``feedback``; ``ready`` is called once it
    answers.
    """
    registry = _Registry()  # of one server: a process may hold several
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    app, address = create_app(served, limits, registry, ready, feedback), found.getsockname()[0]
    gate: ASGIApp = Gate(app, registry, address, token, *names, origins=origins, below=root_path)
    if origins:
        # Around it, so that their pages can read refusals, too.
        gate = CORSMiddleware(gate, allow_origins=origins, **_CORS)
    config = uvicorn.Config(
        gate,
        loop="asyncio",
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        h11_max_incomplete_event_size=16 * 2**10,  # of a header
        timeout_graceful_shutdown=int(limits.timeout) + 5,
    )
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(_SPARING)
    return _Server(config, app.state.decoders)


class _Registry(CollectorRegistry):
    """Metrics of a server; of one of several workers, those of all."""

    def collect(self) -> Iterator[Metric]:
        """What is told of the process is left out where it would be of any."""
        several = SHARED_METRICS in os.environ
        yield from (
            MultiProcessCollector(CollectorRegistry()).collect() if several else (super().collect())
        )


class _Sparing(logging.Filter):
    """Of lines that clients can cause without end, lets the 1st, 2nd, 4th, 8th, … through.

    Those of errors are told apart by their kind and place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: Counts[tuple[Any, ...]] = Counts()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is one of those."""
        place = record.exc_info[2] if record.exc_info else None
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        kind = record.exc_info[0] if record.exc_info else None
        key = (record.name, record.msg, kind, place and (place.tb_frame.f_code, place.tb_lineno))
        self._seen[key] += 1
        if (count := self._seen[key]) > 1:
            record.msg = f"{record.msg} ({count:,} times by now)"
        return count & (count - 1) == 0


_SPARING = _Sparing()
# What pages of origins that may ask can do.
_CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST"], "allow_headers": ["Authorization", "Content-Type"],
    "expose_headers": ["Retry-After"], "allow_private_network": True,
}  # fmt: skip


class _Server(uvicorn.Server):
    """Ends in order on a signal; uvicorn's own would have the signal kill the process after."""

    def __init__(self, config: uvicorn.Config, decoders: Decoders) -> None:
        super().__init__(config)
        self.decoders = decoders

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A first signal ends it in order, a second SIGINT at once, whatever threads are at."""
        if self.should_exit and sig == signal.SIGINT:
            self.decoders.kill()
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.should_exit = True
        self.decoders.hurry()


class _Protocol(H11Protocol):
    """HTTP with an end to connections on which nothing comes of waiting.

    A request that has begun has the application's timeout. Before and after one, a client has some
    seconds to send a header, or the rest of a body that was refused, and to take what is sent to
    it. One that asks on and on before it has its answers is to ask again.
    """

    _untaken: asyncio.TimerHandle | None = None
    _ahead = 0  # requests that have come before the last one's answer, in a row

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * (self.limit_concurrency or 0):
            transport.abort()  # past the limit, where requests are refused, not even a header
        self.loop.call_later(_HEADER_SECONDS, self._end, None)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        self._ahead = 0 if self.cycle is answered else self._ahead + 1
        if self._ahead == _MOST_AHEAD:
            self.headers.append((b"connection", b"close"))  # as if the next one had said so
        self.loop.call_later(_HEADER_SECONDS, self._end, answered)

    def pause_writing(self) -> None:
        super().pause_writing()  # more is waiting than there is room for
        room = _HEADER_SECONDS + self.transport.get_write_buffer_size() / _SLOWEST
        self._untaken = self.loop.call_later(room, self._reset)

    def _reset(self) -> None:
        """End a connection at once, in the system's buffers too."""
        if (opened := self.transport.get_extra_info("socket")) is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taken()
        self.loop.call_later(_HEADER_SECONDS, self._end, self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._taken()

    def _taken(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None

    def _end(self, last: Any) -> None:
        # No request has begun since; one that is being answered has its own time.
        if self.cycle is last and (last is None or last.response_complete) and not self._untaken:
            self.transport.abort()


# What needs no token, beside /static/: the pages, which ask for it, and whether the server is up.
_OPEN = frozenset({"/", "/docs", "/openapi.json", "/healthz"})
# What metrics tell apart; others are counted as "other".
_COUNTED = _OPEN | {"/predict", "/feedback", "/classes", "/metrics"}

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Gate:
    """ASGI middleware around everything: who may ask, and how often what is asked.

    With a token, ``Authorization: Bearer`` must bring it. Without, a request must call this server
    by its name, which is one of ``names``, of a loopback address, or, where others can reach it,
    any IP address, "localhost" and this machine's name. A page elsewhere that has its own name lead
    here (DNS rebinding) would otherwise read what only this machine should; addresses and
    "localhost" it cannot have lead here. Nor may a browser ask on behalf of a page from elsewhere:
    it could not read the answer, but have work done. A page is this server's own if scheme, host
    and port are those that the request was sent to, or it is of ``names`` or ``origins``.

    ``below`` is a path that a proxy does not take off; one that it does, it may tell.
    """

    def __init__(
        self,
        app: ASGIApp,
        registry: CollectorRegistry,
        address: str,
        token: str | None,
        *names: str,
        origins: Sequence[str] = (),
        below: str = "",
    ) -> None:
        self.app, self.token, self.below = app, token, below
        self.anywhere = not is_loopback(address)
        own = {socket.gethostname()} if self.anywhere else {"localhost", "127.0.0.1", "::1"}
        found = [_authority(name, scheme) for name in names for scheme in _PORTS]
        self.hosts = {n.lower() for n in (*own, address)} | {f[0] for f in found if f}
        called = (f"{scheme}://{name}" for name in names for scheme in _PORTS)
        self.origins = {_origin(one) for one in (*origins, *called)} - {None}
        about, labels = "Requests answered.", ("path", "status")
        self.requests = Counter("dapt_requests", about, labels, registry=registry)
        about = "Seconds from a request's headers to the end of its answer."
        self.seconds = Histogram(
            "dapt_request_seconds", about, ("path",), buckets=_SECONDS, registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or have the application answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, headers, path = 500, Headers(scope=scope), scope["path"]

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-cache")
            await send(message)

        if self.below and f"{path}/".startswith(f"{self.below}/"):
            path = path.removeprefix(self.below) or "/"
        told = headers.get("x-forwarded-prefix", "").rstrip("/")
        below = self.below or (told if BELOW.fullmatch(told) else "")
        # As ASGI has it. What answers HEAD is what answers GET; the server sends no body.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        asked = {**scope, "method": method, "root_path": below, "path": f"{below}{path}"}
        counted = path if path in _COUNTED else "other"
        with self.seconds.labels(counted).time():
            try:
                await (self._refusal(headers, path) or self.app)(asked, receive, answer)
            finally:
                self.requests.labels(counted, str(status)).inc()

    def _refusal(self, headers: Headers, path: str) -> JSONResponse | None:
        if self.token is None:
            host = _authority(headers.get("host", ""), "http")
            if not host or not (host[0] in self.hosts or (self.anywhere and _is_address(host[0]))):
                said = "this server does not go by that name; start it with --allow-host NAME, or "
                return JSONResponse({"detail": f"{said}with a token"}, 403)
            given = {_origin(one) for one in headers.getlist("origin")}  # None for a file's page
            if not given <= self.origins | _sent_to(headers):
                said = "this server answers to no page of another server; --allow-origin lets one"
                return JSONResponse({"detail": said}, 403)
            return None
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        # Headers are latin-1 once they arrive; the time taken tells nothing of where they differ.
        right = secrets.compare_digest(bearer.strip().encode("latin-1"), self.token.encode())
        if path in _OPEN or path.startswith("/static/") or (right and kind.lower() == "bearer"):
            return None
        said = "this server asks for a token; send it as 'Authorization: Bearer TOKEN'"
        return JSONResponse({"detail": said}, 401, {"www-authenticate": "Bearer"})


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address of its own."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_origin(text: str) -> bool:
    """Whether a text is scheme, host and, if need be, port of pages, as browsers send them."""
    return _origin(text) is not None


BELOW = re.compile(r"(?:/[\w~-][\w.~-]*)+", re.ASCII)  # a path below which a server may be
_PORTS = {"http": 80, "https": 443}
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^][:/?#@\\,\s]+))(?::([0-9]{0,5}))?")


def _authority(text: str, scheme: str) -> tuple[str, int] | None:
    """Host, an IPv6 address without brackets, and port of HOST[:PORT]; None where it is none."""
    if (found := _AUTHORITY.fullmatch(text.lower())) is None:
        return None
    six, host, port = found.groups()
    try:
        host = host or str(ipaddress.IPv6Address(six))
    except ValueError:
        return None
    number = int(port or _PORTS[scheme])
    return (host, number) if number < 2**16 else None


def _origin(text: str) -> tuple[str, str, int] | None:
    scheme, _, rest = text.partition("://")
    where = _authority(rest, scheme) if scheme in _PORTS else None
    return where and (scheme, *where)


def _sent_to(headers: Headers) -> set[tuple[str, str, int] | None]:
    """Origins that a request was sent to: its host's, or a proxy's that tells of itself.

    A page from elsewhere cannot tell such things: a browser would ask first whether it may.
    """
    scheme = headers.get("x-forwarded-proto", "http").partition(",")[0].strip().lower()
    scheme = scheme if scheme in _PORTS else "http"
    hosts = (headers.get(name, "") for name in ("host", "x-forwarded-host"))
    return {_origin(f"{scheme}://{host.partition(',')[0].strip()}") for host in hosts} - {None}


def _is_address(name: str) -> bool:
    try:
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
