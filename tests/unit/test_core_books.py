"""The daemon's own books have one limit: what a checkpoint takes of it, who goes for another, and who is refused."""

from __future__ import annotations

from itertools import count

import pytest

from support.prompt_memory import PromptMemory
from weightd.errors import CapacityError
from weightd_daemon.core.books import BookkeepingMemory
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import BYTES_OF_TENSOR, Checkpoint, Content
from weightd_daemon.core.events import CheckpointEvicted, Event
from weightd_daemon.core.lease import Lease, LeasePeer, LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore

PAGE = 4096
K = 444
FILE = (ContentFile("", "f", None),)


class Daemon:
    """A store of two devices, whose checkpoints have tensors without bytes: `limit` is in K tensors."""

    def __init__(self, limit: int) -> None:
        self.events: list[Event] = []
        self.held: set[str] = set()
        self.store = ContentStore(leases=LeaseTable(self._is_held), on_event=self.events.append)
        self.store.books.limit = limit * K * BYTES_OF_TENSOR
        for device in ("host", "GPU-1"):
            self.store.memories[device] = PromptMemory(
                budget=64 * PAGE, page=PAGE, sparse=True, pool_limit=0, create=lambda _: 1, available=lambda: None
            )
        self._numbers = count(1)

    def _is_held(self, lease: Lease) -> bool:
        return lease.checkpoint[2] in self.held  # type: ignore[index]  # a CheckpointKey

    def begin(self, device: str = "host", domain: str = "all", owner: int = 1000) -> StoreTransaction:
        return StoreTransaction(self.store, device, domain, owner, LeasePeer(7, 7, 1000, "loader"))

    def load(
        self, name: str, tensors: int = 1, device: str = "host", domain: str = "all", owner: int = 1000
    ) -> Checkpoint:
        """Load a checkpoint of so many K tensors, whose manifest takes nothing."""
        load = self.begin(device, domain, owner)
        try:
            load.reserve_books(tensors * K * BYTES_OF_TENSOR, 0, tensors * K)
            entries = [ContentTensor("", f"{name}{number}", "U8", (0,), 0, 0) for number in range(tensors * K)]
            content = Content(name, FILE, tuple(entries), (None,) * len(entries))
            return load.seal(content, next(self._numbers))
        finally:
            load.end()

    def hold(self, checkpoint: Checkpoint) -> None:
        self.held.add(checkpoint.key.content_digest)
        self.store.leases.begin(checkpoint.key, LeasePeer(1, 1, 1000, "holder"), 0.0)

    @property
    def there(self) -> set[str]:
        return {key.content_digest for key in self.store.checkpoints}

    @property
    def used(self) -> float:
        return self.store.books.used / K / BYTES_OF_TENSOR


def fit(store: ContentStore) -> None:
    for _ in store.fit_books():
        pass


def test_what_a_checkpoint_takes_is_its_manifest_and_so_much_a_tensor() -> None:
    daemon = Daemon(limit=10)
    load = daemon.begin()
    entries = (ContentTensor("", "t", "U8", (0,), 0, 0),)
    checkpoint = load.seal(Content("a", FILE, entries, (None,)), 1.0, None, 777)
    load.end()
    assert checkpoint.books_bytes == daemon.store.books.used == 777 + BYTES_OF_TENSOR
    daemon.store.remove(checkpoint)
    assert daemon.store.books.used == 0


def test_what_is_lost_with_its_device_takes_nothing() -> None:
    daemon = Daemon(limit=10)
    daemon.load("a", 3, device="GPU-1")
    daemon.load("b", 2)
    daemon.store.lose("GPU-1", "it fell off")
    assert daemon.used == 2


def test_without_a_limit_nobody_goes() -> None:
    daemon = Daemon(limit=0)
    for name in "abcdefgh":
        daemon.load(name, 5)
    assert len(daemon.there) == 8


def test_the_least_recently_used_go_on_whatever_device() -> None:
    daemon = Daemon(limit=10)
    daemon.load("a", 3, device="GPU-1")
    daemon.load("b", 3)
    daemon.load("c", 3)
    daemon.load("d", 3)
    assert daemon.there == {"b", "c", "d"}
    gone = [event for event in daemon.events if isinstance(event, CheckpointEvicted)]
    assert [(e.checkpoint.key.content_digest, e.reason, e.load) for e in gone] == [("a", "capacity", 4)]
    assert gone[0].by is not None, "of one domain, so it is said who asked"
    assert daemon.store.evictions == 1


def test_nobody_goes_without_whom_the_others_would_do() -> None:
    """As with a device's bytes (decision 0019), by what each gives back of the books."""
    daemon = Daemon(limit=10)
    for name, tensors in (("small", 1), ("large", 5), ("late", 4)):
        daemon.load(name, tensors)
    daemon.load("new", 5)
    assert daemon.there == {"small", "late", "new"}


def test_the_pinned_and_the_leased_stay() -> None:
    daemon = Daemon(limit=10)
    pinned, held, _ = daemon.load("pinned", 3), daemon.load("held", 3), daemon.load("free", 3)
    pinned.pins.add(1000)
    daemon.hold(held)
    daemon.load("new", 4)
    assert daemon.there == {"pinned", "held", "new"}


def test_users_who_are_kept_apart_are_not_told_of_each_other() -> None:
    daemon = Daemon(limit=5)
    daemon.load("a", 3, domain="uid-1")
    daemon.load("b", 3, domain="uid-2")
    assert [event.by for event in daemon.events if isinstance(event, CheckpointEvicted)] == [None]


def test_what_can_never_fit_is_refused_before_it_is_read_and_nobody_goes() -> None:
    daemon = Daemon(limit=10)
    daemon.load("a", 3)
    load = daemon.begin()
    with pytest.raises(CapacityError) as caught:
        load.reserve_books(11 * K * BYTES_OF_TENSOR, 0, 11 * K)
    load.end()
    assert caught.value.limit == "books"
    assert str(caught.value) == (
        "the limit books is reached: the list of tensors needs 10.7 MiB of the daemon's own memory, and of 9.76 MiB, "
        "0 B are of checkpoints that are pinned, leased or on an absent device; that is more than the whole limit; "
        "raise --books"
    )
    assert daemon.there == {"a"}
    assert daemon.store.books.coming == 0


def test_what_pins_and_leases_leave_no_room_for_is_refused() -> None:
    daemon = Daemon(limit=10)
    daemon.load("pinned", 4).pins.add(1000)
    daemon.hold(daemon.load("held", 4))
    daemon.load("free", 2)
    with pytest.raises(CapacityError, match=r"7.80 MiB are .* pinned, leased or on an absent device; remove") as caught:
        daemon.load("new", 3)
    assert (caught.value.requested_bytes, caught.value.free_bytes) == (3 * K * BYTES_OF_TENSOR, 2 * K * BYTES_OF_TENSOR)
    assert daemon.there == {"pinned", "held", "free"}, "nobody goes for nothing"


def test_loads_under_way_are_reckoned_with() -> None:
    daemon = Daemon(limit=10)
    first, second = daemon.begin(), daemon.begin("GPU-1")
    first.reserve_books(6 * K * BYTES_OF_TENSOR, 0, 6 * K)
    with pytest.raises(CapacityError, match=r"5\.85 MiB of loads under way"):
        second.reserve_books(6 * K * BYTES_OF_TENSOR, 0, 6 * K)
    assert daemon.store.books.coming == 6 * K * BYTES_OF_TENSOR, "who is refused is not reckoned with"
    second.end()
    first.reserve_books(7 * K * BYTES_OF_TENSOR, 0, 7 * K)
    assert daemon.store.books.coming == 7 * K * BYTES_OF_TENSOR, "its own are not counted twice"
    first.end()
    assert daemon.store.books.coming == 0


@pytest.mark.parametrize("limit", [6, 5])
def test_what_is_resident_needs_none_of_it(limit: int) -> None:
    """Not even where the limit is reached, or is a smaller one by now."""
    daemon = Daemon(limit=7)
    daemon.load("a", 6).pins.add(1000)
    daemon.store.books.limit = limit * K * BYTES_OF_TENSOR
    assert daemon.load("a", 6).key.content_digest == "a"
    assert daemon.used == 6
    assert daemon.store.books.coming == 0


def seal(load: StoreTransaction, name: str, tensors: int) -> Checkpoint:
    """With other names of tensors than `Daemon.load`: a content of the same figures."""
    entries = tuple(ContentTensor("", f"{name}{number}", "U8", (0,), 0, 0) for number in range(tensors * K))
    return load.seal(Content(name, FILE, entries, (None,) * len(entries)), 9.0)


def test_a_load_that_may_be_of_what_is_resident_is_reckoned_with() -> None:
    """A fine-tune has the figures of its base. What is refused is refused before it is read."""
    daemon = Daemon(limit=4)
    daemon.hold(daemon.load("base", 2))
    tuned, other = daemon.begin(), daemon.begin()
    tuned.reserve_books(2 * K * BYTES_OF_TENSOR, 0, 2 * K)
    assert daemon.store.books.coming == 2 * K * BYTES_OF_TENSOR
    with pytest.raises(CapacityError, match=r"1\.95 MiB of loads under way"):
        other.reserve_books(K * BYTES_OF_TENSOR, 0, K)
    other.end()
    daemon.hold(seal(tuned, "tuned", 2))
    tuned.end()
    assert (daemon.there, daemon.store.books.coming) == ({"base", "tuned"}, 0)


def test_what_is_reserved_is_not_for_a_load_that_was_not_checked() -> None:
    """It is refused at its seal, and what it may evict for others does not go for it."""
    daemon = Daemon(limit=4)
    daemon.hold(daemon.load("base", 2))
    other, tuned, again = daemon.begin(), daemon.begin(), daemon.begin()
    other.reserve_books(1 * K * BYTES_OF_TENSOR, 0, 1 * K)
    for load in (tuned, again):
        load.reserve_books(2 * K * BYTES_OF_TENSOR, 0, 2 * K)
    with pytest.raises(CapacityError, match=r"999 KiB of loads under way"):
        seal(tuned, "tuned", 2)
    tuned.end()
    daemon.hold(seal(other, "other", 1))
    other.end()
    assert seal(again, "base", 2).key.content_digest == "base"
    again.end()
    assert (daemon.there, daemon.store.books.coming) == ({"base", "other"}, 0)


def test_loads_that_were_not_checked_are_no_reason_to_refuse_each_other() -> None:
    daemon = Daemon(limit=4)
    daemon.hold(daemon.load("base", 2))
    tuned, again = daemon.begin(), daemon.begin()
    for load in (tuned, again):
        load.reserve_books(2 * K * BYTES_OF_TENSOR, 0, 2 * K)
    seal(tuned, "tuned", 2)
    assert seal(again, "base", 2).key.content_digest == "base"


def test_a_seal_that_others_have_left_no_room_for_fails_and_changes_nothing() -> None:
    """Pins and leases may come while a load is under way."""
    daemon = Daemon(limit=10)
    other = daemon.load("other", 6)
    load = daemon.begin()
    load.reserve_books(5 * K * BYTES_OF_TENSOR, 0, 5 * K)
    other.pins.add(1000)
    entries = tuple(ContentTensor("", f"t{number}", "U8", (0,), 0, 0) for number in range(5 * K))
    with pytest.raises(CapacityError, match="the limit books is reached"):
        load.seal(Content("new", FILE, entries, (None,) * len(entries)), 9.0)
    load.end()
    assert (daemon.there, daemon.used) == ({"other"}, 6)


def test_a_smaller_limit_evicts_what_it_can() -> None:
    daemon = Daemon(limit=10)
    daemon.load("a", 3)
    daemon.load("b", 3).pins.add(1000)
    daemon.load("c", 3)
    daemon.store.books.limit = 7 * K * BYTES_OF_TENSOR
    fit(daemon.store)
    assert daemon.there == {"b", "c"}
    daemon.store.books.limit = K
    fit(daemon.store)
    assert daemon.there == {"b"}, "the pinned stay, beyond the limit"
    with pytest.raises(CapacityError):
        daemon.load("d", 1)


def test_a_smaller_limit_evicts_one_in_each_step_and_none_that_was_leased_meanwhile() -> None:
    daemon = Daemon(limit=10)
    for name in "abcde":
        daemon.load(name, 2)
    daemon.store.books.limit = 4 * K * BYTES_OF_TENSOR
    steps = daemon.store.fit_books()
    next(steps)
    assert daemon.there == {*"bcde"}
    daemon.hold(next(c for c in daemon.store.checkpoints.values() if c.key.content_digest == "b"))
    next(steps)
    assert daemon.there == {*"bde"}
    assert len(list(steps)) == 1
    assert daemon.there == {*"be"}, "d in the place of b"


def test_books_count_in_what_a_user_may_have() -> None:
    daemon = Daemon(limit=0)
    checkpoint = daemon.load("a", 3)
    catalog = Catalog(daemon.store, UserLimits(bytes=4 * K * BYTES_OF_TENSOR))
    assert daemon.store.index.bytes_of(1000) == checkpoint.books_bytes == 3 * K * BYTES_OF_TENSOR
    other = Principal(1001, admin=False, domain="all")
    daemon.load("b", 2, owner=1001)
    with pytest.raises(CapacityError, match=r"uid 1001 has 1\.95 MiB of 3\.90 MiB"):
        catalog.pin_loaded(other, checkpoint)


def test_an_empty_list_of_candidates_is_a_refusal_only_where_something_is_needed() -> None:
    books = BookkeepingMemory(100)
    assert books.chosen_for(100, []) == []
    with pytest.raises(CapacityError):
        books.chosen_for(101, [])
    assert books.chosen_beyond([]) == []
