"""What every request passes on its way in and out: host, token, headers, metrics."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
    """ASGI middleware around everything.

    Without a token, a request must call this server by its name, which is one of ``names``, of a
    loopback address, or, where others can reach it, any IP address, "localhost" and this machine's
    name. A page elsewhere that has its own name lead here (DNS rebinding) would otherwise read what
    only this machine should; addresses and "localhost" it cannot have lead here. Nor may a browser
    ask on behalf of a page from elsewhere: it could not read the answer, but have work done. A page
    that goes by an address is this server's own only where the request does too, for there
    "localhost" may be another machine.

    Args:
        app: what is behind it.
        registry: of metrics, which get to know requests.
        address: that is listened on.
        token: that ``Authorization: Bearer`` must bring, if one is asked for.
        names: others of this server.
    """

    def __init__(
        self,
        app: ASGIApp,
        registry: CollectorRegistry,
        *,
        address: str,
        token: str | None,
        names: Iterable[str],
    ) -> None:
        self.app, self.token = app, token
        self.hosts = {name.lower() for name in names if name}
        self.anywhere = not is_loopback(address)
        if self.anywhere:
            self.hosts.add(socket.gethostname().lower())
        else:
            self.hosts |= {"localhost", "127.0.0.1", "[::1]", address, f"[{address}]"}
        about = "Requests answered."
        self.requests = Counter("dapt_requests", about, ("path", "status"), registry=registry)
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
