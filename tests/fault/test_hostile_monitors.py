"""Monitors that ask for what is not there, too much, too slowly or not at all: the daemon goes on, for others too."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.daemon import Daemon, eventually
from support.http import ask, dial, everything, get
from support.launch import launcher
from weightd_daemon.monitoring import http

StartDaemon = Callable[..., Daemon]


@pytest.fixture
def page(start_daemon: StartDaemon, short_path: Path) -> Path:
    """The pages of a daemon that gives a monitor 1 s."""
    start_daemon(argv=launcher(page=1.0), metrics=short_path / "m.sock")
    return short_path / "m.sock"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", 405),
        (b"get /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /secrets HTTP/1.1\r\n\r\n", 404),
        (b"GET /../metrics HTTP/1.1\r\n\r\n", 404),
        (b"GET \xff\x00 HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics HTTP/2\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00 is TLS\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * http.MAX_REQUEST + b"\r\n\r\n", 431),
        (b"x" * (http.MAX_REQUEST + 5), 431),
        (b"GET /healthz?verbose=1 HTTP/1.0\r\n\r\nbody that nobody reads", 200),
    ],
)
def test_what_is_no_good_request(page: Path, request_: bytes, status: int) -> None:
    found, headers, _ = ask(page, request_)
    assert found == status
    assert headers.get("allow") == ("GET" if status == 405 else None)
    assert get(page, "/healthz") == (200, "ok\n")


def test_one_connection_is_one_answer(page: Path) -> None:
    request = b"GET /healthz HTTP/1.1\r\nConnection: keep-alive\r\n\r\n"
    with dial(page) as connection:
        connection.sendall(request + request)
        assert everything(connection).count(b"HTTP/1.1") == 1


def test_a_slow_request_is_hung_up_on(page: Path) -> None:
    with dial(page) as connection:

        def is_hung_up_on() -> bool:
            time.sleep(0.1)
            try:
                connection.sendall(b"x")
            except ConnectionError:
                return True
            return False

        eventually(is_hung_up_on, what="it is hung up on, for a byte now and then does not buy more time")
        assert everything(connection) == b""


def test_those_who_only_hold_the_line_make_way(start_daemon: StartDaemon, short_path: Path) -> None:
    page = short_path / "m.sock"
    start_daemon(argv=launcher(page=4.0), metrics=page)
    with ExitStack() as stack:
        held = [stack.enter_context(dial(page)) for _ in range(http.MOST_CONNECTIONS)]
        with dial(page) as another:
            assert everything(another) == b"", "it is hung up on at once"
        for connection in held:
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
            connection.settimeout(60)
        eventually(lambda: get_or_none(page) == (200, "ok\n"), what="they are gone when their time is over")
        assert all(everything(connection) == b"" for connection in held)


def get_or_none(page: Path) -> tuple[int, str] | None:
    """The page, or None while there is no place for us."""
    try:
        return get(page, "/healthz")
    except (AssertionError, ConnectionError):
        return None


def test_one_who_leaves_in_the_middle(page: Path) -> None:
    for request in (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n"):
        with dial(page) as connection:
            connection.sendall(request)
    assert get(page, "/healthz") == (200, "ok\n")
