"""Check that an integration has been tested with the installed version of its framework.

An integration goes through parts of a framework that may change, and where it goes wrong a framework writes into memory
that others read. So a version that is not between two that were run is refused before anything is loaded.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from weightd.errors import WeightdError

ALLOW_UNTESTED = "WEIGHTD_ALLOW_UNTESTED_VERSIONS"
"""Set to 1, this environment variable lets any version pass."""

TESTED: dict[str, tuple[tuple[str, str], ...]] = {
    "transformers": (("4.56", "4.57"), ("5.0", "5.24")),
    "diffusers": (("0.35", "0.42"),),
}
"""By package: ranges of minor versions whose ends were run, and one or more in between (docs/integrations.md)."""


class UntestedVersionError(WeightdError):
    """A framework is missing, or of a version with which its integration was never run."""


def require_tested(package: str) -> tuple[int, int]:
    """The package's (major, minor) version. Errors: UntestedVersionError."""
    extra = f"pip install '.[{package}]' in weightd's checkout"
    try:
        installed = version(package)
    except PackageNotFoundError:
        raise UntestedVersionError(f"{package} is not installed; {extra}") from None
    found = _minor(installed)
    if any(_minor(first) <= found <= _minor(last) for first, last in TESTED[package]):
        return found
    if os.environ.get(ALLOW_UNTESTED) == "1":
        return found
    ranges = " and ".join(f"{first} to {last}" for first, last in TESTED[package])
    raise UntestedVersionError(
        f"{package} {installed} is not known to this version of weightd, which was run with {ranges}; {extra}, or set "
        f"{ALLOW_UNTESTED}=1 at your own risk: a framework that writes into shared weights changes them for everybody"
    )


def _minor(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()) or 0)
