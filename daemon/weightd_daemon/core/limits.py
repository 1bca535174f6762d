"""Limits per user, so that one user cannot take everything. Admins have no limits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from weightd._sizes import size
from weightd.errors import CapacityError

if TYPE_CHECKING:
    from .principal import Principal

_ADVICE = {
    "leases": "end a process that holds one (`weightd ps`)",
    "bytes": "remove or unpin one of your checkpoints (`weightd ls`)",
    "offers": "wait until a load of yours has begun",
    "names": "remove a name of yours (`weightd rm`)",
}


@dataclass(slots=True)
class UserLimits:
    """Maximum of names, leases and bytes that the books allow one user; 0 is no limit.

    Each is the setting `max_user_` and its name.
    """

    leases: int = 0
    bytes: int = 0
    offers: int = 0
    names: int = 0

    def copy_from(self, other: UserLimits) -> None:
        """Have the limits of another from now on. What somebody has beyond them stays."""
        for limit in fields(UserLimits):
            setattr(self, limit.name, getattr(other, limit.name))

    def most(self, who: Principal, what: str) -> int:
        """The limit that binds a user; 0 where none does."""
        return 0 if who.admin else int(getattr(self, what))

    def check(self, who: Principal, what: str, held: int, more: int = 1) -> None:
        """Whether a user who holds so many may have more. Errors: CapacityError, which names the limit."""
        most = self.most(who, what)
        if not most or held + more <= most:
            return
        user = "who has no identity here" if who.uid is None else f"uid {who.uid}"
        counted, metadata = f"{held} of {most} {what}", {"limit": f"max_user_{what}"}
        if what == "bytes":
            counted = f"{size(held)} of {size(most)}, and this takes {size(more)}"
            metadata |= {"requested_bytes": str(more), "free_bytes": str(max(0, most - held))}
        raise CapacityError(
            f"the limit max_user_{what} is reached: {user} has {counted}; {_ADVICE[what]}, or ask for a higher limit",
            metadata,
        )
