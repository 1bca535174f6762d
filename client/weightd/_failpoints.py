"""Named points of a program at which a test has it fail, wait or die. Nothing of weightd does so.

`reach` is called with the point's name where the next step is about to be taken, and does nothing. Tests exchange it,
in processes that they start (tests/failpoints): what it then does is in no package, so no setting, variable
or request of a service can ask for it. docs/faults.md lists the points, and what comes of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def _pass(point: str) -> None:
    """Go on."""


reach: Callable[[str], None] = _pass
"""Call it as `_failpoints.reach(…)`: who imports the name itself keeps the function that does nothing."""
