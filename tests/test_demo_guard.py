"""What stands before the demo's page."""

import asyncio

import pytest

from uplift_diffusers.demo import guard
from uplift_diffusers.demo.guard import Guard, is_loopback


def ask(app, method="GET", path="/", headers=(), kind="http"):
    """The status that `app` answers a request with; the code of a websocket that is closed."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}

    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
    }
    return app(scope, receive, send), sent


async def answers(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1"])
def test_names_of_the_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "192.168.0.1", "localhost.other.example", "127.0.0.1.other.example"])
def test_names_that_others_can_have(host):
    assert not is_loopback(host)


def status(app, **request):
    answer, sent = ask(app, **request)
    asyncio.run(answer)
    return sent[0].get("status", sent[0].get("code"))


def test_a_websocket_of_another_site_is_closed():
    app = Guard(answers, loopback_only=True)
    headers = [("Host", "127.0.0.1:7860"), ("Origin", "http://other.example")]
    assert status(app, kind="websocket", headers=headers) == 1008
    assert status(app, kind="websocket", headers=headers[:1]) == 200


@pytest.mark.parametrize("headers", [[], [("Host", "localhost"), ("Host", "localhost")], [("Host", "[::1")]])
def test_without_one_host_nothing_is_answered(headers):
    assert status(Guard(answers, loopback_only=True), headers=headers) == 403


def test_other_machines_are_answered_where_they_are_let_in():
    assert status(Guard(answers, loopback_only=False), headers=[("Host", "demo.example")]) == 200


def test_logins_come_one_after_the_other_and_too_many_are_refused(monkeypatch):
    monkeypatch.setattr(guard, "LOGIN_S", 0.02)
    monkeypatch.setattr(guard, "MAX_LOGINS", 3)
    app, order = Guard(answers, loopback_only=False), []

    async def log_in(number):
        answer, sent = ask(app, method="POST", path="/login/")
        await answer
        order.append((number, sent[0]["status"]))

    async def attack():
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await asyncio.gather(*(log_in(number) for number in range(4)))
        assert loop.time() - begun >= 3 * 0.02

    asyncio.run(attack())
    assert order == [(3, 429), (0, 200), (1, 200), (2, 200)]
