"""`python -m support.fuzzing.guided TARGET [libFuzzer's options]`: one target under Atheris, in this process."""

from __future__ import annotations

import logging
import sys

import atheris

_OURS = ("weightd", "weightd_daemon", "weightd_fleet")


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=list(_OURS)):
        from .registry import TARGETS
        from .target import outcome
    target = TARGETS[name]
    logging.disable(logging.NOTSET)
    atheris.Setup(sys.argv, lambda data: outcome(target, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
