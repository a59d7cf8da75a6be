"""What every request passes on its way in and out: host, token, headers, metrics."""

from __future__ import annotations

import ipaddress
import secrets
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What may be had without the token: the pages, which ask for it, and whether the server is up.
_OPEN = frozenset({"/", "/docs", "/openapi.json", "/healthz"})
_OPEN_FOLDER = "/static/"
# What metrics tell apart; others are counted as "other".
_COUNTED = _OPEN | {"/predict", "/classes", "/metrics"}

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Metrics:
    """What Prometheus is told; of one server, so that a process may hold several."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        GCCollector(registry=own)
        self.requests = Counter(
            "dapt_requests", "Requests answered.", ("path", "status"), registry=own
        )
        self.seconds = Histogram(
            "dapt_request_seconds",
            "Seconds from a request's headers to the end of its answer.",
            ("path",),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=own,
        )
        about = "Images received, by what came of them."
        self.images = Counter("dapt_images", about, ("result",), registry=own)
        about = "Images admitted that wait for an answer."
        self.queue = Gauge("dapt_queue_images", about, registry=own)
        about, sizes = "Images the model took at a time.", [2**i for i in range(8)]
        self.batch = Histogram("dapt_batch_images", about, buckets=sizes, registry=own)


class Gate:
    """ASGI middleware around everything.

    Args:
        app: what is behind it.
        metrics: counts requests.
        token: that ``Authorization: Bearer`` must bring, if one is asked for.
        hosts: names of this server that a request may call it by, in lower case; any, if empty.
            A page elsewhere that has its own name point to a loopback address (DNS rebinding)
            would otherwise read what only this machine should. Nor may a browser ask on behalf of
            a page from elsewhere: it could not read the answer, but have work done.
        addresses: whether any IP address will do as well, and "localhost": no page elsewhere can
            have these lead here. A page that goes by one is this server's own only where the
            request does too, for there "localhost" may be another machine.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        token: str | None,
        hosts: frozenset[str],
        addresses: bool,
    ) -> None:
        self.app, self.metrics = app, metrics
        self.token, self.hosts, self.addresses = token, hosts, addresses

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
        with self.metrics.seconds.labels(path).time():
            try:
                await (self._refusal(scope) or self.app)(scope, receive, answer)
            finally:
                self.metrics.requests.labels(path, str(status)).inc()

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host = _host_name(headers.get("host", ""))
        if self.hosts and not (host in self.hosts or (self.addresses and _is_address(host))):
            return _sentence(
                403,
                "this server does not go by that name; start it with --allow-host NAME, or with "
                "a token",
            )
        origin = headers.get("origin")  # sent by browsers, "null" for a file or a sandboxed page
        if self.hosts and origin is not None and not self._is_own(origin, host):
            return _sentence(403, "this server answers to no page of another server")
        path: str = scope["path"]
        if self.token is None or path in _OPEN or path.startswith(_OPEN_FOLDER):
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        # Headers are latin-1 once they arrive; the time taken tells nothing of where they differ.
        if kind.lower() == "bearer" and secrets.compare_digest(
            given.strip().encode("latin-1"), self.token.encode()
        ):
            return None
        return _sentence(
            401,
            "this server asks for a token; send it as 'Authorization: Bearer TOKEN'",
            {"www-authenticate": "Bearer"},
        )

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            return _host_name(urlsplit(origin).netloc) in {host, *self.hosts}
        except ValueError:  # a bracket that is not closed
            return False


def _host_name(host: str) -> str:
    """Without the port."""
    name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    return name.lower()


def _is_address(name: str) -> bool:
    try:
        return name == "localhost" or bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


def _sentence(status: int, detail: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)
