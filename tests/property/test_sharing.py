"""The sharing index against a walk through all checkpoints, however far behind it was when things changed."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from weightd_daemon.core import partners as partners_module
from weightd_daemon.core import sharing as sharing_module
from weightd_daemon.core.blob import Blob, BlobKey
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey
from weightd_daemon.core.partners import Partners, count_components
from weightd_daemon.core.sharing import Sharer, SharingIndex

if TYPE_CHECKING:
    from collections.abc import Iterable

DEVICES = ("host", "GPU-1")
COMPONENTS = ("", "unet", "vae")
PICK = st.integers(0, 59)
PARTS = st.dictionaries(st.sampled_from(COMPONENTS), st.lists(st.integers(0, 5), max_size=5), min_size=1)


def length_of(blobs: Iterable[Blob]) -> int:
    return sum(blob.length for blob in set(blobs))


def go_through(steps: Iterable[None]) -> None:
    for _ in steps:
        pass


class SharingMachine(RuleBasedStateMachine):
    """Checkpoints come, go, are pinned and leased, and the index gets on by some steps in between."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(sharing_module, "WORK_IN_A_STEP", 2)
        self.patch.setattr(partners_module, "WORK_IN_A_STEP", 2)
        self.leased: set[CheckpointKey] = set()
        self.index = SharingIndex(self.leased.__contains__)
        self.resident: list[Checkpoint] = []
        self.count = 0
        self.begin(*DEVICES)

    def teardown(self) -> None:
        self.patch.undo()

    def begin(self, *devices: str) -> None:
        """New memory: blobs of the lengths 1, 10, 100 and so on, so that each sum says what is in it."""
        if devices == DEVICES:
            self.blobs: dict[str, list[Blob]] = {}
        for device in devices:
            keys = (BlobKey(device, "", bytes([at]) * 16, 10**at) for at in range(6))
            self.blobs[device] = [Blob(at, key, 0, 1, 0, 0) for at, key in enumerate(keys)]

    def on(self, device: str) -> list[Checkpoint]:
        return [checkpoint for checkpoint in self.resident if checkpoint.key.device == device]

    def pick(self, pick: int) -> Checkpoint | None:
        return self.resident[pick % len(self.resident)] if self.resident else None

    @rule(device=st.sampled_from(DEVICES), parts=PARTS, pinned=st.booleans(), leased=st.booleans())
    def come(self, device: str, parts: dict[str, list[int]], pinned: bool, leased: bool) -> None:
        self.count += 1
        key = CheckpointKey(device, "", f"sha256:{self.count}")
        components = {name: [self.blobs[device][at] for at in some] for name, some in parts.items()}
        unique = {blob.number: blob for blobs in components.values() for blob in blobs}
        total = sum(len(blobs) for blobs in components.values())
        checkpoint = Checkpoint(key, components, {}, total, None, 0.0, 0.0, unique=unique)
        if pinned:
            checkpoint.pins.add(None)
        if leased:
            self.leased.add(key)
        self.resident.append(checkpoint)
        self.index.came(checkpoint)

    @rule(pick=PICK)
    def go(self, pick: int) -> None:
        if (checkpoint := self.pick(pick)) is not None:
            self.resident.remove(checkpoint)
            self.leased.discard(checkpoint.key)
            self.index.went(checkpoint)

    @rule(pick=PICK)
    def pin_or_unpin(self, pick: int) -> None:
        if (checkpoint := self.pick(pick)) is not None:
            checkpoint.pins ^= {None}
            self.index.marked(checkpoint)

    @rule(pick=PICK)
    def lease_or_end(self, pick: int) -> None:
        if (checkpoint := self.pick(pick)) is not None:
            self.leased ^= {checkpoint.key}
            self.index.marked(checkpoint)

    @rule(device=st.sampled_from(DEVICES), pick=PICK)
    def lose(self, device: str, pick: int) -> None:
        if pick % 6 == 0:
            for checkpoint in self.on(device):
                self.resident.remove(checkpoint)
                checkpoint.forget_blobs()
            self.index.lose(device)
            self.begin(device)

    @rule(steps=st.integers(1, 8))
    def get_on(self, steps: int) -> None:
        for _ in range(steps):
            assert self.index.go_on() == self.index.behind

    @rule()
    def catch_up(self) -> None:
        while self.index.go_on():
            pass

    # -- what a walk finds -----------------------------------------------------------------------------------------

    @invariant()
    def agrees_with_a_walk(self) -> None:
        if self.index.behind:
            return
        for device in DEVICES:
            there = self.on(device)
            self.check_sums(device, there)
            self.check_sets(device, there)
            for checkpoint in there:
                others = [other for other in there if other is not checkpoint]
                self.check_pairs(checkpoint, others)

    def check_sums(self, device: str, there: list[Checkpoint]) -> None:
        sums = self.index.on(device)
        used = {blob for checkpoint in there for blob in checkpoint.unique.values()}
        pinned = {blob for checkpoint in there if checkpoint.pinned for blob in checkpoint.unique.values()}
        leased = {blob for one in there if one.key in self.leased for blob in one.unique.values()}
        assert sums.used_bytes == length_of(used)
        assert sums.pinned_bytes == length_of(pinned)
        assert sums.leased_bytes == length_of(leased)
        assert sums.evictable_bytes == length_of(used - pinned - leased)

    def check_sets(self, device: str, there: list[Checkpoint]) -> None:
        sets: dict[frozenset[Checkpoint], set[object]] = defaultdict(set)
        for blob in self.blobs[device]:
            users = self.index.of(blob)
            using = [checkpoint for checkpoint in there if blob.number in checkpoint.unique]
            assert ([] if users is None else users.checkpoints()) == using
            assert users is None or users.sharers == len(using)
            parts = {(c.key, name) for c in using for name, blobs in c.components.items() if blob in blobs}
            assert parts == set() if users is None else {(p.sharer.checkpoint.key, p.component) for p in users.parts}
            sets[frozenset(using)].add(users)
        there_now = {users for some in sets.values() for users in some if users is not None}
        assert set(self.index.on(device).sets.values()) == there_now, "no set is left that no blob has"
        for users in there_now:
            assert all(users in part.sets for part in users.parts)  # type: ignore[attr-defined]  # BlobUsers

    def check_pairs(self, one: Checkpoint, others: list[Checkpoint]) -> None:
        sharer = self.index.sharer(one)
        assert sharer is not None
        mine = set(one.unique.values())
        others_have = {blob for other in others for blob in other.unique.values()}
        assert sharer.exclusive_bytes == length_of(mine - others_have)
        shared, only, components = {}, {}, {}
        for other in others:
            if common := mine & set(other.unique.values()):
                third = {blob for more in others if more is not other for blob in more.unique.values()}
                shared[other] = length_of(common)
                only[other] = length_of(common - third)
                components[other] = {
                    (my_name, name): length_of(both)
                    for my_name, my_blobs in one.components.items()
                    for name, blobs in other.components.items()
                    if (both := set(my_blobs) & set(blobs))
                }
        partners = Partners(sharer)
        go_through(partners.count())
        assert {partner.checkpoint: length for partner, length in partners.shared.items()} == shared
        assert {partner.checkpoint: partners.only[partner] for partner in partners.shared} == only
        found: dict[Sharer, dict[tuple[str, str], int]] = {}
        go_through(count_components(sharer, partners.shared, found))
        assert {partner.checkpoint: pairs for partner, pairs in found.items()} == components
        later = Partners(sharer, later=True)
        go_through(later.count())
        after = self.resident[self.resident.index(one) + 1 :]
        assert later.shared == {
            partner: length for partner, length in partners.shared.items() if partner.checkpoint in after
        }


TestSharing = SharingMachine.TestCase
