"""A socket, a server on it, and how the two end."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

import python_multipart  # noqa: F401  (forms need it, which would only show at the first one)
import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from uvicorn.protocols.http.h11_impl import H11Protocol

from dapt.errors import UserError
from dapt.serve.app import create_app
from dapt.serve.gate import Gate
from dapt.serve.served import Served
from dapt.serve.uploads import Limits

# Seconds in which a client that has connected, or has had its answer, must send a whole header.
_HEADER_SECONDS = 10.0


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens, so that an address in use is known before a model is loaded.

    Raises:
        UserError: the address is in use, not this machine's, or none.
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

    Args:
        served: from `load_served`.
        found: from `open_socket`; the server's ``run`` wants it, too.
        limits: bounds.
        token, names: as for `Gate`.
        ready: called once it answers.
    """
    registry = CollectorRegistry()  # of one server: a process may hold several
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    app, address = create_app(served, limits, registry, ready), found.getsockname()[0]
    config = uvicorn.Config(
        Gate(app, registry, address=address, token=token, names=names),
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
    return _Server(config)


class _Server(uvicorn.Server):
    """Ends in order on a signal; uvicorn's own would have the signal kill the process after."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A first signal ends it in order, a second SIGINT at once."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


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
