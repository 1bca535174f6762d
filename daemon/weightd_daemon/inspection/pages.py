"""Pages of long answers: how many rows one has, and the token that asks for the next one.

A token says where its page begins, in base64. It is no secret and not signed: a client may make up its own, so a
position is checked like anything else that clients send, and leads to nothing that its caller may not see.
"""

from __future__ import annotations

import base64
import json

from weightd.errors import InvalidReferenceError

MAX_ROWS = 5000
"""Rows of a page."""
_MAX_TOKEN = 1024
_MAX_NUMBER = (1 << 63) - 1

Position = tuple[int | str, ...]
"""Where a page begins. Numbers are from 0 to 2**63 - 1."""


def rows_of(page_size: int) -> int:
    """How many rows a page of `page_size` may have; 0 asks for the most. Errors: InvalidReferenceError."""
    if not 0 <= page_size <= MAX_ROWS:
        raise InvalidReferenceError(f"page_size {page_size}: must be from 1 to {MAX_ROWS}, or 0 for {MAX_ROWS}")
    return page_size or MAX_ROWS


def token_of(call: str, position: Position) -> str:
    """The token of the page of `call` that begins at `position`."""
    return base64.urlsafe_b64encode(json.dumps([call, *position], separators=(",", ":")).encode()).decode()


def position_of(token: str, call: str, first: Position) -> Position:
    """Where the page of a token begins: at `first` without one, otherwise at values of the types that `first` has.

    Errors: InvalidReferenceError (the token is not one that `call` has given).
    """
    if not token:
        return first
    wrong = InvalidReferenceError(f"page_token: is not one that {call} has given; leave it out for the first page")
    if len(token) > _MAX_TOKEN:
        raise wrong
    try:
        values = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate could be in no error
    except (ValueError, RecursionError):
        raise wrong from None
    if not isinstance(values, list) or values[:1] != [call] or len(values) != 1 + len(first):
        raise wrong
    position = tuple(values[1:])
    for value, like in zip(position, first, strict=True):
        if type(value) is not type(like) or (isinstance(value, int) and not 0 <= value <= _MAX_NUMBER):
            raise wrong
    return position
