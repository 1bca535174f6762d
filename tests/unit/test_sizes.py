"""weightd._sizes: how bytes are written, in one place for tables, errors and reports."""

from __future__ import annotations

import pytest

from weightd._sizes import size

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (KIB, "1.00 KiB"), (24 * KIB, "24.0 KiB"),
        (MIB - 1, "1.00 MiB"), (91 * MIB, "91.0 MiB"), (int(199.3 * MIB), "199 MiB"), (int(199.5 * MIB) + 1, "200 MiB"),
        (999 * MIB, "999 MiB"), (1000 * MIB, "0.977 GiB"), (GIB - 1, "1.00 GiB"), (GIB, "1.00 GiB"),
        (int(18.87 * GIB), "18.9 GiB"), (1023 * GIB, "0.999 TiB"), (1500 << 40, "1500 TiB"),
    ],
)  # fmt: skip
def test_a_size(count: int, text: str) -> None:
    assert size(count) == text


def test_every_size_below_a_thousand_tebibytes_has_three_digits() -> None:
    for exponent in range(10, 50):
        for offset in (-1, 0, 1, 3 << (exponent - 3)):
            number = size((1 << exponent) + offset).split()[0]
            assert len(number.replace(".", "").lstrip("0")) <= 3 <= len(number.replace(".", "")), number
