"""The order of what happens at a seal, an eviction and a loss, and what each step finds done when its turn comes."""

from __future__ import annotations

from itertools import count
from typing import Any, cast

import pytest

from support.prompt_memory import PromptMemory
from support.sealed import sealed_blobs
from weightd.errors import WeightdError
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey, Content
from weightd_daemon.core.events import CheckpointEvicted, CheckpointSealed, DeviceLost, DrainChanged, Event
from weightd_daemon.core.lease import LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore
from weightd_daemon.residency import Residency

WHO = Principal(1000, admin=False, domain="")
FILES = (ContentFile("", "f", None),)
REASONS = ["removed", "drained", "capacity", "lost"]


class Desk:
    """A real store and catalog, and everything else that Residency calls played by this; `steps` are in order.

    Each step says what it is, of which checkpoint, and by which names this is known at that moment.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[str, str, tuple[str, ...]]] = []
        self.events: list[Event] = []
        self.resident: list[bool] = []
        """At each event, whether the store has its checkpoint."""
        self.veto = False
        self.residency = Residency(self.publish)
        self.store = ContentStore(leases=LeaseTable(lambda _: True), on_event=self.residency.on_event)
        self.catalog = Catalog(self.store, UserLimits(), changed=self.residency.on_changed)
        numbers = count()
        self.store.memories["GPU-0"] = PromptMemory(
            budget=1 << 20, page=4096, sparse=True, pool_limit=0, create=lambda _: next(numbers)
        )
        played = cast("Any", self)
        self.residency.join(self.store, self.catalog, manifests=played, descriptor_store=played, loads=played)

    def note(self, what: str, key: CheckpointKey) -> None:
        names = {name for (_, name), tag in self.catalog.tags.items() if tag.content_digest == key.content_digest}
        self.steps.append((what, key.content_digest, tuple(sorted(names))))

    def publish(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, CheckpointSealed | CheckpointEvicted):
            self.resident.append(event.checkpoint.key in self.store.checkpoints)
            self.note(f"tell {type(event).__name__}", event.checkpoint.key)
        else:
            self.steps.append((f"tell {type(event).__name__}", "", ()))

    def sealed(self, key: CheckpointKey, manifest: object) -> None:
        if self.veto:
            raise OSError("no room for its manifest")
        self.note(f"keep {manifest}", key)

    def remove(self, key: CheckpointKey) -> None:
        self.note("close manifest", key)

    def evicted(self, gone: CheckpointKey | CheckpointEvicted) -> None:
        if isinstance(gone, CheckpointEvicted):
            self.note(f"load {gone.load} hears", gone.checkpoint.key)
        else:
            self.note("no longer kept", gone)

    def reserve(self, lease: int) -> None:
        self.steps.append((f"reserve {lease}", "", ()))

    def changed(self) -> None:
        self.steps.append(("changed", "", ()))

    def flip(self) -> None:
        self.steps.append(("flip", "", ()))

    def lose(self, device: str, error: WeightdError) -> None:
        self.steps.append((f"loads on {device} end: {error}", "", ()))

    def load(self, letter: str, length: int = 4096, name: str = "") -> Checkpoint:
        load = StoreTransaction(self.store, "GPU-0", "", 1000)
        extent = load.grant(length, length)
        assert extent is not None
        _, blob = load.settle(letter.encode() * 16, length, extent.segment, extent.offset)
        content = Content(letter, FILES, (ContentTensor("", "t", "U8", (length,), 0, length),), (blob,))
        try:
            checkpoint = load.seal(content, 0.0, "its manifest")
        finally:
            load.end()
        if name:
            self.catalog.set(WHO, name, letter)
        return checkpoint


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_a_sealed_checkpoint_is_kept_before_anybody_hears_of_it(desk: Desk) -> None:
    desk.load("a")
    assert desk.steps == [("keep its manifest", "a", ()), ("tell CheckpointSealed", "a", ())]
    assert desk.resident == [False], "it is there when this is over"


def test_what_cannot_be_kept_is_not_sealed_and_nobody_hears_of_it(desk: Desk) -> None:
    desk.veto = True
    with pytest.raises(OSError, match="no room for its manifest"):
        desk.load("a")
    assert (desk.steps, desk.events) == ([], [])
    assert (desk.store.checkpoints, sealed_blobs(desk.store)) == ({}, [])
    assert desk.store.memories["GPU-0"].in_flight == 0


@pytest.mark.parametrize("reason", REASONS[:3])
def test_an_eviction_is_told_while_names_are_known_and_kept_no_longer_at_its_end(desk: Desk, reason: str) -> None:
    """The names of a removed checkpoint go before the root record lets go of it, which `no longer kept` does."""
    checkpoint = desk.load("a", name="mine")
    desk.steps.clear()
    desk.store.remove(checkpoint, "a", reason)
    removed = reason == "removed"
    assert desk.steps == [
        ("tell CheckpointEvicted", "a", ("mine",)),
        ("close manifest", "a", ("mine",)),
        ("no longer kept", "a", () if removed else ("mine",)),
    ]
    assert desk.resident == [False, False], "it is gone when this begins"


def test_the_load_for_which_a_checkpoint_went_hears_of_it_while_its_names_are_known(desk: Desk) -> None:
    desk.load("a", 512 << 10, name="mine")
    desk.steps.clear()
    load = StoreTransaction(desk.store, "GPU-0", "", 1000)
    assert load.grant(768 << 10, 768 << 10) is None, "its memory is on its way back"
    steps = [what for what, *_ in desk.steps]
    assert steps == ["tell CheckpointEvicted", "close manifest", "load 2 hears", "no longer kept"]
    assert desk.steps[2] == ("load 2 hears", "a", ("mine",)), "so that it can say what went"


def test_a_lost_device_is_told_first_and_its_loads_end_last(desk: Desk) -> None:
    desk.load("a", name="mine")
    desk.load("b")
    desk.steps.clear()
    desk.residency.on_lost("GPU-0", "it fell off the bus")
    assert [what for what, *_ in desk.steps] == [
        "tell DeviceLost",
        *["tell CheckpointEvicted", "close manifest", "no longer kept"] * 2,
        "loads on GPU-0 end: device GPU-0: it fell off the bus; load it again",
    ]
    assert [digest for _, digest, _ in desk.steps[1:-1]] == ["a"] * 3 + ["b"] * 3
    assert all(names == ("mine",) for _, digest, names in desk.steps if digest == "a"), "names outlive a loss"
    assert DeviceLost("GPU-0", "it fell off the bus") in desk.events
    assert len(desk.store.lost) == 2


def test_what_changes_names_and_pins_is_written_and_lease_numbers_are_reserved(desk: Desk) -> None:
    checkpoint = desk.load("a", name="mine")
    assert desk.steps[-1] == ("changed", "", ())
    desk.steps.clear()
    desk.catalog.pin(WHO, checkpoint)
    desk.residency.before_answer()
    desk.residency.before_lock(7)
    assert [what for what, *_ in desk.steps] == ["changed", "flip", "reserve 7"]


def test_other_events_are_told_and_nothing_else(desk: Desk) -> None:
    desk.residency.on_event(DrainChanged("draining"))
    assert desk.steps == [("tell DrainChanged", "", ())]


def test_what_happens_too_early_is_a_bug_that_says_so() -> None:
    residency = Residency(lambda _: None)
    with pytest.raises(RuntimeError, match="before `join`"):
        residency.before_lock(1)
