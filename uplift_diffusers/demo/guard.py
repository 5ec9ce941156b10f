"""Access control: which requests are answered, and a rate limit on logins."""

import asyncio
import ipaddress
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOGIN_S = 1.0
"""Seconds per login; logins are processed one at a time."""

MAX_LOGINS = 10
"""Logins that may wait; further ones are rejected."""


def is_loopback(host: str) -> bool:
    """Whether a host, without its port, is a loopback name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """
    ASGI middleware.

    Args:
        app: the app to protect.
        loopback_only: answer only requests with a loopback Host and, if there is an Origin, a loopback Origin at the
            same port. Then no other web page can use the demo, neither by cross-origin requests nor by DNS rebinding.
    """

    def __init__(self, app: ASGIApp, *, loopback_only: bool):
        self._app = app
        self._loopback_only = loopback_only
        self._login = asyncio.Lock()
        self._num_logins = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._loopback_only and not _comes_from_here(scope):
            answer = PlainTextResponse("This demo is available on this machine only. Open it at 127.0.0.1.", 403)
            return await answer(scope, receive, send)
        if scope["type"] == "websocket" and self._loopback_only and not _comes_from_here(scope):
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/login"):
            if self._num_logins >= MAX_LOGINS:
                return await PlainTextResponse("Too many logins at once. Try again.", 429)(scope, receive, send)
            self._num_logins += 1
            try:
                async with self._login:
                    await asyncio.sleep(LOGIN_S)
            finally:
                self._num_logins -= 1
        return await self._app(scope, receive, send)


def _comes_from_here(scope: Scope) -> bool:
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
    if len(hosts) != 1 or len(origins) > 1:
        return False
    host = _place(f"//{hosts[0]}")
    if host is None or not is_loopback(host[0]):
        return False
    origin = _place(origins[0]) if origins else host
    return origin is not None and is_loopback(origin[0]) and origin[1] == host[1]


def _place(address: str) -> tuple[str, int | None] | None:
    """Host and port of an address; None if it is not one, such as the Origin `null`."""
    try:
        parts = urlsplit(address)
        return None if parts.hostname is None else (parts.hostname, parts.port)
    except ValueError:
        return None
