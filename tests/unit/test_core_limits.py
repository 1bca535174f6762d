"""What one user may hold: who is bound, where the line is, and what the error says."""

from __future__ import annotations

import pytest

from weightd.errors import CapacityError
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.principal import Principal

USER = Principal(1000, False, "")
MIB = 1 << 20


@pytest.mark.parametrize("what", ["leases", "bytes", "offers", "names"])
def test_a_limit_binds_from_its_number_on(what: str) -> None:
    limits = UserLimits(**{what: 3})
    limits.check(USER, what, 2)
    with pytest.raises(CapacityError) as caught:
        limits.check(USER, what, 3)
    assert caught.value.limit == f"max_user_{what}"
    assert "uid 1000" in str(caught.value)
    for other in {"leases", "bytes", "offers", "names"} - {what}:
        limits.check(USER, other, 10**9)


def test_the_error_says_how_many_of_how_many_and_what_to_do() -> None:
    with pytest.raises(CapacityError) as caught:
        UserLimits(leases=5).check(USER, "leases", 7)
    assert str(caught.value) == (
        "the limit max_user_leases is reached: uid 1000 has 7 of 5 leases; "
        "end a process that holds one (`weightd ps`), or ask for a higher limit"
    )
    with pytest.raises(CapacityError) as caught:
        UserLimits(bytes=4 * MIB).check(USER, "bytes", 3 * MIB, 2 * MIB)
    assert "has 3.00 MiB of 4.00 MiB, and this takes 2.00 MiB; remove or unpin" in str(caught.value)
    assert (caught.value.requested_bytes, caught.value.free_bytes) == (2 * MIB, MIB)


def test_admins_have_no_limits_and_those_without_an_identity_have_one_together() -> None:
    limits = UserLimits(leases=1)
    limits.check(Principal(1000, True, ""), "leases", 100)
    with pytest.raises(CapacityError, match="who has no identity here has 1 of 1 leases"):
        limits.check(Principal(None, False, ""), "leases", 1)


def test_limits_are_taken_over_from_others() -> None:
    limits = UserLimits(leases=1, names=1)
    limits.copy_from(UserLimits(bytes=5))
    assert limits == UserLimits(bytes=5)
