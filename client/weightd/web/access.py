"""Who may ask the server of `weightd web`: a program of this machine that knows the token, and no foreign web page."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping

_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")


def refusal(method: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
    """Return the HTTP status and the reason for which a request is refused, whatever it asks for; None if it is not.

    `headers` finds names in any case. The port of Host is not checked, for a tunnel may have another one. A foreign
    page whose own name resolves to this machine is refused by its Host, one that sends its requests here by its Origin.
    That another page leads to this one is allowed: so does the file by which the command opens a browser.
    """
    if method not in ("GET", "HEAD"):
        return 405, "nothing can be changed here: only GET and HEAD are served"
    host = headers.get("Host", "")
    if not _HOST.fullmatch(host):
        return 403, "the header Host must be 127.0.0.1, localhost or [::1]"
    if headers.get("Origin", f"http://{host}") != f"http://{host}":
        return 403, "the header Origin names another page"
    navigates = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
    if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and not navigates:
        return 403, "another page has sent this request"
    return None


def knows_token(headers: Mapping[str, str], token: str) -> bool:
    """Return whether the header Authorization has the token; the time that this takes says nothing about it."""
    given = headers.get("Authorization", "").encode(errors="surrogateescape")  # it may be any bytes
    return hmac.compare_digest(given, f"Bearer {token}".encode())
