"""weightd._sizes: how bytes are written, in one place for tables, errors and reports."""

from __future__ import annotations

import pytest

from weightd._sizes import size

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 MiB"), (91 * MIB, "91.0 MiB"), (102 * MIB, "102.0 MiB"), (103 * MIB, "0.10 GiB"), (GIB, "1.00 GiB")],
)
def test_a_size(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (KIB - 1, "1023 B"), (KIB, "1.0 KiB"), (MIB - 1, "1024.0 KiB"), (MIB, "1.0 MiB"), (GIB, "1.00 GiB")],
)
def test_a_fine_size_has_smaller_units_too(count: int, text: str) -> None:
    assert size(count, fine=True) == text
