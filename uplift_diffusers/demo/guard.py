"""What stands before the page: who may ask at all, and how fast passwords can be tried."""

import asyncio
import ipaddress
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOGIN_S = 1.0
"""Seconds that every login takes, one after the other."""

MAX_LOGINS = 10
"""Logins that may wait; further ones are refused."""


def is_loopback(host: str) -> bool:
    """Whether a host, without its port, is this machine under a name that no other machine can have."""
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
        app: what is guarded.
        loopback_only: answer only requests whose Host is the loopback, and whose Origin, where there is one, is it
            too, at the same port. Then no page of another site can use the demo, neither by sending requests to it
            nor by a name of its own that leads here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, loopback_only: bool):
        self._app = app
        self._loopback_only = loopback_only
        self._login = asyncio.Lock()
        self._num_logins = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._loopback_only and not _comes_from_here(scope):
            answer = PlainTextResponse("This demo answers on this machine only. Open it at 127.0.0.1.", 403)
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
    """Host and port of an address; None for what is none, as the Origin `null`."""
    try:
        parts = urlsplit(address)
        return None if parts.hostname is None else (parts.hostname, parts.port)
    except ValueError:
        return None
