"""Check that an integration has been tested with the installed version of its framework.

An integration goes through parts of a framework that may change, and where it goes wrong a framework writes into memory
that others read. So a version that is not between two that were run is refused before anything is loaded.
"""

from __future__ import annotations

import itertools
import os
from importlib.metadata import PackageNotFoundError, version

from weightd.errors import WeightdError

ALLOW_UNTESTED = "WEIGHTD_ALLOW_UNTESTED_VERSIONS"
"""Set to 1, this environment variable lets any version pass."""

TESTED: dict[str, tuple[tuple[str, str], ...]] = {
    "transformers": (("4.56", "4.57"), ("5.0", "5.24")),
    "diffusers": (("0.35", "0.42"),),
    "sglang": (("0.5.23", "0.5.23"),),
    "vllm": (("0.28", "0.32"),),
}
"""By package: ranges of versions whose ends were run, and one or more in between (docs/integrations.md).

A range of minor versions has all their patches.
"""


class UntestedVersionError(WeightdError):
    """A framework is missing, or of a version with which its integration was never run."""


def require_tested(package: str, installed: str | None = None) -> tuple[int, int]:
    """The package's (major, minor) version; `installed` is what it says of itself, where its metadata may say less.

    Errors: UntestedVersionError.
    """
    extra = f"pip install '.[{package}]' in weightd's checkout" if installed is None else "install one of these"
    try:
        installed = version(package) if installed is None else installed
    except PackageNotFoundError:
        raise UntestedVersionError(f"{package} is not installed; {extra}") from None
    found = _numbers(installed)[0], _numbers(installed)[1]
    for first, last in TESTED[package]:
        if _numbers(first) <= _numbers(installed)[: len(_numbers(first))] <= _numbers(last):
            return found
    if os.environ.get(ALLOW_UNTESTED) == "1":
        return found
    ranges = " and ".join(f"{first} to {last}" for first, last in TESTED[package])
    raise UntestedVersionError(
        f"{package} {installed} is not known to this version of weightd, which was run with {ranges}; {extra}, or set "
        f"{ALLOW_UNTESTED}=1 at your own risk: a framework that writes into shared weights changes them for everybody"
    )


def _numbers(text: str) -> tuple[int, ...]:
    """Major, minor and, where it has one, patch of a version: those of 4.57.0.dev0 are 4, 57, 0."""
    return tuple(int("".join(itertools.takewhile(str.isdigit, part)) or 0) for part in text.split(".")[:3])
