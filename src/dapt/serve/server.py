"""A socket, a server on it, what every request passes on its way, and how the two end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import re
import secrets
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

import python_multipart  # noqa: F401  (forms need it, which would only show at the first one)
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dapt.errors import UserError
from dapt.serve.app import Limits, create_app
from dapt.serve.decoders import Decoders
from dapt.serve.served import Served

# Seconds in which a client that has connected, or has had its answer, must send a whole header.
_HEADER_SECONDS = 10.0


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
    ready: Callable[[], None] = lambda: None,
) -> uvicorn.Server:
    """A server that answers until SIGINT or SIGTERM, then finishes what was accepted.

    The socket is `open_socket`'s; the server's ``run`` wants it, too. Token and names are as for
    `Gate`, and ``ready`` is called once it answers.
    """
    registry = CollectorRegistry()  # of one server: a process may hold several
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    app, address = create_app(served, limits, registry, ready), found.getsockname()[0]
    config = uvicorn.Config(
        Gate(app, registry, address, token, *names),
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
    return _Server(config, app.state.decoders)


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
    seconds to send a header, or the rest of a body that was refused.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * (self.limit_concurrency or 0):
            transport.abort()  # past the limit, where requests are refused, not even a header
        self.loop.call_later(_HEADER_SECONDS, self._end, None)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        self.loop.call_later(_HEADER_SECONDS, self._end, answered)

    def _end(self, last: Any) -> None:
        if self.cycle is last:  # no request has begun since
            self.transport.abort()


# What needs no token, beside /static/: the pages, which ask for it, and whether the server is up.
_OPEN = frozenset({"/", "/docs", "/openapi.json", "/healthz"})
# What metrics tell apart; others are counted as "other".
_COUNTED = _OPEN | {"/predict", "/classes", "/metrics"}

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
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
    it could not read the answer, but have work done. A page that goes by an address is this
    server's own only where the request does too, for there "localhost" may be another machine.
    """

    def __init__(
        self,
        app: ASGIApp,
        registry: CollectorRegistry,
        address: str,
        token: str | None,
        *names: str,
    ) -> None:
        self.app, self.token = app, token
        self.anywhere = not is_loopback(address)
        own = {"localhost", "127.0.0.1", "[::1]", address, f"[{address}]"}
        own = {socket.gethostname()} if self.anywhere else own
        self.hosts = {name.lower() for name in (*own, *names) if name}
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
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-cache")
            await send(message)

        path = scope["path"] if scope["path"] in _COUNTED else "other"
        with self.seconds.labels(path).time():
            try:
                await (self._refusal(scope) or self.app)(scope, receive, answer)
            finally:
                self.requests.labels(path, str(status)).inc()

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers, path = Headers(scope=scope), scope["path"]
        if self.token is None:
            host = _host_name(headers.get("host", ""))
            if not (host in self.hosts or (self.anywhere and _is_address(host))):
                said = "this server does not go by that name; start it with --allow-host NAME, or "
                return JSONResponse({"detail": f"{said}with a token"}, 403)
            origin = headers.get("origin")  # of browsers; "null" for a file or a sandboxed page
            own = {host, *self.hosts}
            if origin is not None and _host_name(origin.partition("://")[2]) not in own:
                said = "this server answers to no page of another server"
                return JSONResponse({"detail": said}, 403)
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        # Headers are latin-1 once they arrive; the time taken tells nothing of where they differ.
        right = secrets.compare_digest(given.strip().encode("latin-1"), self.token.encode())
        if path in _OPEN or path.startswith("/static/") or (right and kind.lower() == "bearer"):
            return None
        said = "this server asks for a token; send it as 'Authorization: Bearer TOKEN'"
        return JSONResponse({"detail": said}, 401, {"www-authenticate": "Bearer"})


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address of its own."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _host_name(host: str) -> str:
    """Without the port."""
    return re.sub(r":\d*$", "", host).lower()


def _is_address(name: str) -> bool:
    try:
        return name == "localhost" or bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False
