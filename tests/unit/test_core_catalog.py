"""The catalog: whose a name is, and what a reference means."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from support.counting import operations
from support.prompt_memory import PromptMemory
from weightd.errors import (
    CapacityError,
    DeviceError,
    InUseError,
    InvalidReferenceError,
    NotFoundError,
    PermissionDeniedError,
)
from weightd_daemon.core.catalog import NAME_BYTES, Catalog, CatalogTag
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey
from weightd_daemon.core.events import CatalogNameChanged, CheckpointEvicted, Event
from weightd_daemon.core.lease import LeasePeer, LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore

ALICE, BOB = Principal(1000, admin=False, domain="all"), Principal(1001, admin=False, domain="all")
ROOT = Principal(0, admin=True, domain="all")
OVERFLOW = Principal(None, admin=False, domain="all")
A, B = "sha256:" + "a1" * 32, "sha256:" + "a2" * 32


class Shelf:
    """A catalog over a store whose checkpoints have no tensors."""

    def __init__(self) -> None:
        self.store = ContentStore(leases=LeaseTable(lambda _: True), on_event=self.happened)
        self.catalog = Catalog(self.store, UserLimits())
        for device in ("host", "GPU-1"):
            self.store.memories[device] = PromptMemory(
                budget=1, page=1, sparse=False, pool_limit=0, create=lambda size: size
            )

    def happened(self, event: Event) -> None:
        if isinstance(event, CheckpointEvicted):
            self.catalog.forget(event.checkpoint, chosen=event.reason == "removed")

    def add(
        self, digest: str, *names: str, who: Principal = ALICE, device: str = "host", domain: str | None = None
    ) -> Checkpoint:
        key = CheckpointKey(device, domain or who.domain, digest)
        checkpoint = Checkpoint(key, {}, {}, 0, who.uid, 0.0, 0.0)
        self.store.enter(checkpoint)
        for name in names:
            self.catalog.set(who, name, digest)
        return checkpoint


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def test_a_name_is_found_and_so_are_digests_and_their_beginnings(shelf: Shelf) -> None:
    there = shelf.add(A, "org/name")
    for reference in ("org/name", A, A[7:], A[:13], A[7:13]):
        assert shelf.catalog.find(BOB, reference) is there
    for reference in ("other", "sha256:ff" + "0" * 6, A[7:12], A + "0"):
        with pytest.raises(NotFoundError, match="weightd load"):
            shelf.catalog.find(BOB, reference)


def test_a_name_comes_before_the_digest_that_it_looks_like(shelf: Shelf) -> None:
    shelf.add(A)
    named = shelf.add(B, A[7:15])
    assert shelf.catalog.find(ALICE, A[7:15]) is named


def test_a_beginning_that_two_share_is_ambiguous(shelf: Shelf) -> None:
    one, two = "sha256:" + "abcdef" + "0" * 58, "sha256:" + "abcdef" + "1" * 58
    there = shelf.add(one)
    shelf.add(two)
    with pytest.raises(InvalidReferenceError, match="more digits"):
        shelf.catalog.find(ALICE, "abcdef")
    assert shelf.catalog.find(ALICE, "abcdef0") is there


def test_one_content_on_two_devices_needs_the_device(shelf: Shelf) -> None:
    shelf.add(A, "name")
    gpu = shelf.add(A, device="GPU-1")
    with pytest.raises(InvalidReferenceError, match="--device"):
        shelf.catalog.find(ALICE, "name")
    assert shelf.catalog.find(ALICE, "name", "GPU-1") is gpu
    with pytest.raises(NotFoundError, match="GPU-2"):
        shelf.catalog.find(ALICE, "name", "GPU-2")


def test_a_name_belongs_to_who_made_it(shelf: Shelf) -> None:
    shelf.add(A, "name")
    shelf.add(B)
    with pytest.raises(PermissionDeniedError, match="belongs to uid 1000"):
        shelf.catalog.set(BOB, "name", B)
    shelf.catalog.set(BOB, "name", A)  # changes nothing
    shelf.catalog.set(ROOT, "name", B)
    with pytest.raises(PermissionDeniedError):
        shelf.catalog.set(BOB, "name", A)
    shelf.catalog.set(ALICE, "name", A)


def test_who_has_no_identity_owns_nothing(shelf: Shelf) -> None:
    there = shelf.add(A, who=OVERFLOW)
    with pytest.raises(PermissionDeniedError, match="user id is not known"):
        shelf.catalog.set(OVERFLOW, "name", A)
    for action in ("remove", "pin"):
        with pytest.raises(PermissionDeniedError):
            shelf.catalog.check_owner(OVERFLOW, there, action)
    with pytest.raises(PermissionDeniedError):
        shelf.catalog.remove(OVERFLOW, A)
    shelf.catalog.check_owner(ROOT, there, "pin")


@pytest.mark.parametrize("name", ["", "a\nb", "a\x7fb", "a\x9b2J", "\u20ac" * NAME_BYTES, A, "sha256:", "sha256:abc"])
def test_names_that_cannot_be(shelf: Shelf, name: str) -> None:
    with pytest.raises(InvalidReferenceError):
        shelf.catalog.check(ALICE, name)


@pytest.mark.parametrize("name", ["a", "org/name@main", "/models/a b", "ünïcode", "x" * NAME_BYTES, "abcdef"])
def test_names_that_can_be(shelf: Shelf, name: str) -> None:
    shelf.add(A, name)
    assert shelf.catalog.find(ALICE, name).key.content_digest == A


def test_names_are_listed_sorted_and_their_first_says_the_owner(shelf: Shelf) -> None:
    there = shelf.add(A)
    assert (shelf.catalog.names(there), shelf.catalog.owner(there)) == ([], 1000)
    shelf.catalog.set(ALICE, "z", A)
    shelf.catalog.set(BOB, "a", A)
    assert (shelf.catalog.names(there), shelf.catalog.owner(there)) == (["a", "z"], 1001)


def test_removing_one_of_several_names_keeps_the_checkpoint(shelf: Shelf) -> None:
    there = shelf.add(A, "one", "two")
    assert shelf.catalog.remove(ALICE, "one") == 0
    assert shelf.catalog.names(there) == ["two"]
    assert there.key in shelf.store.checkpoints
    shelf.catalog.remove(ALICE, "two")
    assert shelf.store.checkpoints == {}
    assert shelf.catalog.names(there) == []


def test_removing_by_digest_drops_all_names_if_all_are_ones_own(shelf: Shelf) -> None:
    there = shelf.add(A, "mine")
    shelf.catalog.set(BOB, "his", A)
    for who in (ALICE, BOB):
        with pytest.raises(PermissionDeniedError):
            shelf.catalog.remove(who, A)
    assert shelf.catalog.names(there) == ["his", "mine"]
    shelf.catalog.remove(ROOT, A)
    assert shelf.catalog.names(there) == []


def test_a_foreign_name_cannot_be_removed_but_ones_own_on_it_can(shelf: Shelf) -> None:
    there = shelf.add(A, "mine")
    with pytest.raises(PermissionDeniedError, match="mine belongs to uid 1000"):
        shelf.catalog.remove(BOB, "mine")
    shelf.catalog.set(BOB, "his", A)
    shelf.catalog.remove(BOB, "his")
    assert shelf.catalog.names(there) == ["mine"]


def test_nothing_changes_when_it_is_in_use(shelf: Shelf) -> None:
    there = shelf.add(A, "name")
    shelf.store.leases.begin(there.key, LeasePeer(1, 2, 3, "python"), 0.0)
    with pytest.raises(InUseError):
        shelf.catalog.remove(ALICE, "name")
    assert shelf.catalog.find(ALICE, "name") is there


def test_a_moved_name_leaves_the_old_content_where_it_is(shelf: Shelf) -> None:
    old, new = shelf.add(A, "name"), shelf.add(B)
    shelf.catalog.set(ALICE, "name", B)
    assert shelf.catalog.find(ALICE, "name") is new
    assert shelf.catalog.find(ALICE, A) is old
    assert shelf.catalog.names(old) == []


def test_names_live_as_long_as_the_content_is_on_any_device(shelf: Shelf) -> None:
    host, gpu = shelf.add(A, "name"), shelf.add(A, device="GPU-1")
    shelf.store.remove(host)
    assert shelf.catalog.find(ALICE, "name") is gpu
    shelf.store.remove(gpu)
    shelf.add(A)
    with pytest.raises(NotFoundError):
        shelf.catalog.find(ALICE, "name")


def test_users_apart_do_not_see_each_other_and_admins_see_all(shelf: Shelf) -> None:
    one, two = Principal(1, admin=False, domain="uid:1"), Principal(2, admin=False, domain="uid:2")
    first = shelf.add(A, "name", who=one)
    second = shelf.add(B, "name", who=two)
    assert shelf.catalog.find(one, "name") is first
    assert shelf.catalog.find(two, "name") is second
    with pytest.raises(NotFoundError):
        shelf.catalog.find(two, A)
    assert shelf.catalog.visible(two) == [second]
    assert shelf.catalog.visible(ROOT) == [first, second]
    with pytest.raises(InvalidReferenceError):
        shelf.catalog.find(ROOT, "name")


def test_an_admin_finds_what_is_its_own_first(shelf: Shelf) -> None:
    shelf.add(A, "name", who=Principal(1, admin=False, domain="uid:1"))
    own = shelf.add(B, "name", who=ROOT)
    assert shelf.catalog.find(ROOT, "name") is own


def test_each_owner_takes_back_only_its_own_pin(shelf: Shelf) -> None:
    there = shelf.add(A, "alice's", who=ALICE)
    shelf.catalog.set(BOB, "bob's", A)
    shelf.catalog.pin(ALICE, there, "alice's")
    shelf.catalog.pin(BOB, there, "bob's")
    shelf.catalog.unpin(BOB, there, "bob's")
    assert there.pinned
    with pytest.raises(PermissionDeniedError, match="belongs to uid 1000"):
        shelf.catalog.unpin(BOB, there, "alice's")
    shelf.catalog.pin(BOB, there, "bob's")
    shelf.catalog.unpin(ROOT, there)
    assert not there.pinned


# -- lost checkpoints --------------------------------------------------------------------------------------------------


def test_who_asks_for_a_lost_checkpoint_hears_why(shelf: Shelf) -> None:
    there = shelf.add(A, "name")
    shelf.store.lose("host", "the GPU was reset")
    for reference in ("name", A, A[:13]):
        with pytest.raises(DeviceError, match=f"checkpoint {reference} was lost: the GPU was reset; load it again"):
            shelf.catalog.find(BOB, reference)
    with pytest.raises(NotFoundError):
        shelf.catalog.find(BOB, "name", "GPU-1")
    assert shelf.catalog.visible(BOB) == []
    assert [lost.checkpoint for lost in shelf.catalog.lost(BOB)] == [there]
    assert shelf.catalog.names(there) == ["name"]


def test_what_is_resident_elsewhere_is_found_before_what_is_lost(shelf: Shelf) -> None:
    shelf.add(A, "name", device="GPU-1")
    host = shelf.add(A)
    shelf.store.lose("GPU-1", "gone")
    assert shelf.catalog.find(ALICE, "name") is host
    with pytest.raises(DeviceError):
        shelf.catalog.find(ALICE, "name", "GPU-1")


def test_a_lost_name_comes_before_the_digest_that_it_looks_like(shelf: Shelf) -> None:
    shelf.add(B, A[7:15], device="GPU-1")
    shelf.add(A)
    shelf.store.lose("GPU-1", "gone")
    with pytest.raises(DeviceError):
        shelf.catalog.find(ALICE, A[7:15])


def test_users_apart_do_not_hear_of_each_others_losses(shelf: Shelf) -> None:
    one, two = Principal(1, admin=False, domain="uid:1"), Principal(2, admin=False, domain="uid:2")
    shelf.add(A, "name", who=one)
    shelf.store.lose("host", "gone")
    with pytest.raises(NotFoundError):
        shelf.catalog.find(two, "name")
    assert shelf.catalog.lost(two) == []
    assert len(shelf.catalog.lost(one)) == len(shelf.catalog.lost(ROOT)) == 1


def test_removing_a_lost_checkpoint_drops_its_record_and_name_for_its_owner(shelf: Shelf) -> None:
    there = shelf.add(A, "one", "two")
    shelf.store.lose("host", "gone")
    with pytest.raises(PermissionDeniedError):
        shelf.catalog.remove(BOB, "one")
    assert shelf.catalog.remove(ALICE, "one") == 0
    assert there.key in shelf.store.lost
    assert shelf.catalog.remove(ALICE, "two") == 0
    assert (shelf.store.lost, shelf.catalog.names(there)) == ({}, [])
    with pytest.raises(NotFoundError):
        shelf.catalog.find(ALICE, "two")


def test_names_that_go_with_a_lost_checkpoint_are_told_of(shelf: Shelf) -> None:
    """No eviction implies it, as where a checkpoint that is resident is removed."""
    shelf.add(A, "one", "two")
    told: list[Event] = []
    catalog = Catalog(shelf.store, UserLimits(), on_event=told.append)
    for (domain, name), tag in shelf.catalog.tags.items():
        catalog.restore(domain, name, tag)
    shelf.store.lose("host", "gone")
    holder = LeasePeer(1, 12, 1000, "weightd rm")
    catalog.remove(ALICE, A, by=holder)
    assert told == [CatalogNameChanged("all", name, "", A, holder) for name in ("one", "two")]
    assert catalog.tags == {}


def test_a_name_stays_while_its_content_is_resident_or_lost_on_any_device(shelf: Shelf) -> None:
    gpu, host = shelf.add(A, "name", device="GPU-1"), shelf.add(A)
    shelf.store.lose("GPU-1", "gone")
    shelf.catalog.remove(ALICE, "name", "host")
    assert host.key not in shelf.store.checkpoints
    assert shelf.catalog.names(gpu) == ["name"]
    shelf.catalog.remove(ALICE, A)
    assert shelf.catalog.names(gpu) == []


# -- names that were only a path ---------------------------------------------------------------------------------------


def test_a_default_name_goes_with_its_content_and_a_chosen_one_stays(shelf: Shelf) -> None:
    there = shelf.add(A, "chosen")
    shelf.catalog.set(ALICE, "/m", A, is_default=True)
    shelf.store.evict(there, "capacity")
    assert shelf.catalog.listed(ALICE) == [("chosen", CatalogTag(A, 1000), "evicted")]
    with pytest.raises(PermissionDeniedError, match="belongs to uid 1000"):
        shelf.catalog.set(BOB, "chosen", B)
    shelf.catalog.set(BOB, "/m", B, is_default=True)  # nobody's any more
    assert shelf.catalog.tag("all", "/m") == CatalogTag(B, 1001, is_default=True)


def test_a_default_name_stays_while_its_content_is_resident_or_lost_elsewhere(shelf: Shelf) -> None:
    there, gpu = shelf.add(A), shelf.add(A, device="GPU-1")
    shelf.catalog.set(ALICE, "/m", A, is_default=True)
    shelf.store.evict(there, "capacity")
    assert shelf.catalog.listed(ALICE) == [("/m", CatalogTag(A, 1000, is_default=True), "resident")]
    shelf.store.lose("GPU-1", "broken")
    assert shelf.catalog.listed(ALICE) == [("/m", CatalogTag(A, 1000, is_default=True), "lost")]
    assert shelf.catalog.remove(ALICE, "/m") == 0
    assert gpu.key not in shelf.store.lost
    assert shelf.catalog.listed(ALICE) == []


def test_a_default_name_that_its_owner_chooses_is_chosen_and_stays_so(shelf: Shelf) -> None:
    there = shelf.add(A)
    shelf.catalog.set(ALICE, "/m", A, is_default=True)
    shelf.catalog.set(BOB, "/m", A)  # not his to choose
    assert shelf.catalog.tag("all", "/m") == CatalogTag(A, 1000, is_default=True)
    shelf.catalog.set(ALICE, "/m", A)
    assert shelf.catalog.tag("all", "/m") == CatalogTag(A, 1000)
    shelf.add(B)
    shelf.catalog.set(ALICE, "/m", B, is_default=True)
    shelf.store.evict(there, "capacity")
    assert shelf.catalog.listed(ALICE) == [("/m", CatalogTag(B, 1000), "resident")]


def test_a_default_name_that_moves_stays_one(shelf: Shelf) -> None:
    shelf.add(A)
    shelf.catalog.set(ALICE, "/m", A, is_default=True)
    there = shelf.add(B)
    shelf.catalog.set(ALICE, "/m", B, is_default=True)
    shelf.store.evict(there, "drained")
    assert shelf.catalog.listed(ALICE) == []


def test_names_are_listed_by_domain_and_admins_see_all(shelf: Shelf) -> None:
    other = Principal(1002, admin=False, domain="other")
    shelf.add(A, "mine")
    shelf.add(A, "mine", who=other)
    assert [name for name, _, _ in shelf.catalog.listed(other)] == ["mine"]
    assert [tag.owner for _, tag, _ in shelf.catalog.listed(ROOT)] == [1000, 1002]


def test_names_are_counted_by_owner_wherever_they_go(shelf: Shelf) -> None:
    shelf.catalog._limits.names = 2
    there = shelf.add(A, "one")
    shelf.catalog.set(ALICE, "/m", A, is_default=True)
    shelf.add(B)
    with pytest.raises(CapacityError, match="2 of 2 names"):
        shelf.catalog.set(ALICE, "two", B)
    shelf.catalog.set(ROOT, "/m", B)  # moved, it stays hers
    with pytest.raises(CapacityError, match="2 of 2 names"):
        shelf.catalog.set(ALICE, "two", B)
    shelf.catalog.set(BOB, "his", B)
    shelf.store.remove(there)
    shelf.catalog.set(ALICE, "two", B)
    assert shelf.catalog.names(shelf.catalog.find(ALICE, B)) == ["his", "two", "/m"]


def test_what_a_catalog_does_costs_the_same_however_much_is_there(shelf: Shelf) -> None:
    """A name, an attach by name or whole digest, a pin and an eviction are not looked for among all others."""
    costs = []
    for size in (50, 500):
        for number in range(size):
            digest = f"sha256:{size:032x}{number:032x}"
            shelf.add(digest, f"name {size} {number}")

        def use(digest: str = f"sha256:{size:032x}{7:032x}", name: str = f"name {size} 7") -> None:
            there = shelf.catalog.find(BOB, name)
            assert shelf.catalog.find(BOB, digest) is there
            shelf.catalog.pin_loaded(ALICE, there)
            shelf.catalog.unpin(ALICE, there)
            shelf.catalog.set(ALICE, "/m", digest, is_default=True)
            with pytest.raises(NotFoundError):
                shelf.catalog.find(BOB, "no such name")
            shelf.store.evict(there, "capacity")

        costs.append(operations(use))
    assert costs[1] <= costs[0] * 1.1


def test_one_of_many_names_of_a_checkpoint_costs_the_same(shelf: Shelf) -> None:
    """Each attach says the first name, each event the first few, and a pin asks for the owner of the first."""
    costs = []
    for size, digest in ((50, A), (500, B)):
        there = shelf.add(digest, *(f"{kind}name {size} {number}" for number in range(size) for kind in ("", "/")))

        def use(there: Checkpoint = there, size: int = size) -> None:
            assert shelf.catalog.name(there) == f"name {size} 0"
            assert len(shelf.catalog.names(there, 8)) == 8
            shelf.catalog.pin(ROOT, there)
            shelf.catalog.remove(ROOT, f"name {size} 7")

        costs.append(operations(use))
    assert costs[1] <= costs[0] * 1.1, costs


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans()), max_size=20))
def test_the_counts_of_names_are_what_they_count(steps: list[tuple[int, int, bool, bool]]) -> None:
    shelf = Shelf()
    for name, content, is_default, evict in steps:
        digest = f"sha256:{content:064x}"
        key = CheckpointKey("host", "all", digest)
        if key not in shelf.store.checkpoints:
            shelf.add(digest)
        shelf.catalog.set((ALICE, ROOT)[name % 2], f"name {name}", digest, is_default=is_default)
        if evict:
            shelf.store.evict(shelf.store.checkpoints[key], "capacity")
        tags = shelf.catalog.tags
        assert shelf.catalog._owned == Counter(tag.owner for tag in tags.values())
        named = shelf.catalog._named
        assert {(d, n) for (d, _), names in named.items() for _, n in names} == tags.keys()
        assert all(names == sorted(names) for names in named.values())
        assert all(not tag.is_default or shelf.catalog._is_known(d, tag.content_digest) for (d, _), tag in tags.items())


def test_one_name_is_seen_by_who_may_see_it_its_own_domain_first(shelf: Shelf) -> None:
    apart = Principal(1002, admin=False, domain="uid-1002")
    shelf.add(A, "name")
    assert shelf.catalog.named(BOB, "name") == (CatalogTag(A, 1000), "resident")
    assert shelf.catalog.named(apart, "name") is None
    assert shelf.catalog.named(Principal(0, admin=True, domain="uid-0"), "name") == (CatalogTag(A, 1000), "resident")
    shelf.catalog.set(apart, "name", B)
    assert shelf.catalog.named(apart, "name") == (CatalogTag(B, 1002), "evicted")
    assert shelf.catalog.named(ROOT, "name") == (CatalogTag(A, 1000), "resident")
    assert shelf.catalog.named(ROOT, "other") is None


@pytest.mark.parametrize("reference", ["x" * (NAME_BYTES + 1), "\u20ac" * (NAME_BYTES // 3 + 1)])
def test_a_reference_longer_than_any_name_is_refused_and_not_repeated_in_full(shelf: Shelf, reference: str) -> None:
    for ask in (shelf.catalog.find, shelf.catalog.remove):
        with pytest.raises(InvalidReferenceError, match=f"has {len(reference.encode())} bytes, and may have") as caught:
            ask(ALICE, reference)
        assert len(str(caught.value)) < 200


def test_a_name_whose_content_was_evicted_is_dropped_by_its_owner_alone(shelf: Shelf) -> None:
    shelf.store.evict(shelf.add(A, "chosen"), "capacity")
    with pytest.raises(NotFoundError):
        shelf.catalog.remove(BOB, "chosen")
    assert shelf.catalog.tag("all", "chosen") == CatalogTag(A, 1000)
    assert shelf.catalog.remove(ALICE, "chosen") == 0
    assert shelf.catalog.tag("all", "chosen") is None
    with pytest.raises(NotFoundError):
        shelf.catalog.remove(ALICE, "chosen")


def test_of_a_name_that_a_record_has_twice_the_later_counts(shelf: Shelf) -> None:
    there = shelf.add(A)
    shelf.catalog.restore("all", "name", CatalogTag(A, 1000))
    shelf.catalog.restore("all", "name", CatalogTag(B, 1001))
    assert shelf.catalog.tags == {("all", "name"): CatalogTag(B, 1001)}
    assert shelf.catalog.names(there) == []
    assert shelf.catalog._owned == {1001: 1}
