"""Format numbers of bytes for people, in the client and in the daemon. `config/notation.py` parses them."""

from __future__ import annotations

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


def size(count: int, *, fine: bool = False) -> str:
    """Write bytes as GiB with two decimals, below 0.1 GiB as MiB with one.

    Below 1 MiB a `fine` size goes on with KiB and bytes: for a report of what may be a few tensors.
    """
    if count >= _GIB / 10:
        return f"{count / _GIB:.2f} GiB"
    if count >= _MIB or not fine:
        return f"{count / _MIB:.1f} MiB"
    return f"{count / _KIB:.1f} KiB" if count >= _KIB else f"{count} B"
