"""A daemon whose loaders do not hash: every blob gets a number for a digest. For bench/load.py; not for use.

`serve …` runs the daemon; `--loader …` runs one of its loaders.
"""

from __future__ import annotations

import os
import sys
from itertools import count

from weightd_daemon.__main__ import main as serve
from weightd_daemon.loader.job import main as load

_numbers = count(int.from_bytes(os.urandom(8), "little") << 60)


class NoHash:
    """Takes bytes and forgets them. Its digest is new each time, so that no tensor looks like another."""

    def update(self, data: object, /) -> None:
        """Nothing."""

    def digest(self) -> bytes:
        """A number that was not there before."""
        return next(_numbers).to_bytes(16, "little")


if __name__ == "__main__":
    if sys.argv[1] == "--loader":
        sys.exit(load(sys.argv[2:], new_hasher=NoHash))
    sys.exit(serve(sys.argv[1:], loader_argv=[sys.executable, "-P", __file__, "--loader"]))
