"""Who may ask the server of `weightd web`."""

from __future__ import annotations

import pytest

from weightd.web.access import knows_token, refusal

HOST = {"Host": "127.0.0.1:8080"}


@pytest.mark.parametrize(
    "headers",
    [
        HOST,
        {"Host": "localhost"},
        {"Host": "[::1]:80"},
        HOST | {"Origin": "http://127.0.0.1:8080", "Sec-Fetch-Site": "same-origin"},
        HOST | {"Sec-Fetch-Site": "none"},
        HOST | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    ],
)
def test_the_own_page_may_ask(headers: dict[str, str]) -> None:
    assert refusal("GET", headers) is None
    assert refusal("HEAD", headers) is None


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({}, "Host"),
        ({"Host": "evil.example:8080"}, "Host"),
        ({"Host": "127.0.0.1.evil.example"}, "Host"),
        ({"Host": "localhost:8080\n"}, "Host"),
        ({"Host": "10.0.0.1:8080"}, "Host"),
        (HOST | {"Origin": "http://evil.example"}, "Origin"),
        (HOST | {"Origin": "http://127.0.0.1:8081"}, "Origin"),
        (HOST | {"Origin": "https://127.0.0.1:8080"}, "Origin"),
        (HOST | {"Origin": "null"}, "Origin"),
        (HOST | {"Sec-Fetch-Site": "cross-site"}, "another page"),
        (HOST | {"Sec-Fetch-Site": "same-site"}, "another page"),
        (HOST | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, "another page"),
        (HOST | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, "another"),
    ],
)
def test_foreign_pages_may_not(headers: dict[str, str], named: str) -> None:
    refused = refusal("GET", headers)
    assert refused is not None
    status, reason = refused
    assert status == 403
    assert named in reason


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT"])
def test_nothing_can_be_changed(method: str) -> None:
    assert (refusal(method, HOST) or (0,))[0] == 405


@pytest.mark.parametrize(
    "given",
    [
        *("", "secret", "Bearer", "Bearer ", "Bearer secre", "Bearer secret ", "bearer secret", "Bearer é"),
        "Bearer \udcff",
    ],
)
def test_a_wrong_token(given: str) -> None:
    assert not knows_token({"Authorization": given}, "secret")
    assert not knows_token({}, "secret")


def test_the_token() -> None:
    assert knows_token({"Authorization": "Bearer secret"}, "secret")
