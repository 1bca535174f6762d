"""Root records as tests write them: a body in today's form, or in the first one (commit cf42aab)."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from typing import Any

from weightd_daemon.persistence.root_record import SLOT_BYTES, RootRecordChange


def rows_of(body: dict[str, Any]) -> tuple[list[RootRecordChange], dict[str, int]]:
    """The rows and counters that `read_root` makes this body of."""
    tables = {key: value for key, value in body.items() if isinstance(value, list)}
    rows = [
        RootRecordChange(table, f"row {at}", row) for table, there in tables.items() for at, row in enumerate(there)
    ]
    return rows, {key: value for key, value in body.items() if key not in tables}


def write_first_form(descriptor: int, sequence: int, body: object, schema: int = 1) -> None:
    """Write a body as that daemon did: a header and JSON in the slot of its number."""
    payload = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    digest = hashlib.sha256(struct.pack("<IQQ", schema, sequence, len(payload)) + payload).digest()
    header = struct.pack("<8sIQQ32s", b"weightd\x01", schema, sequence, len(payload), digest)
    os.pwrite(descriptor, header + payload, sequence % 2 * SLOT_BYTES)
