"""The fleet's catalogue, against sets; and that its columns stay small."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from weightd.errors import FormatError, InvalidReferenceError, NotFoundError
from weightd_fleet.core.catalogue import DeviceReport, FleetCatalogue
from weightd_fleet.core.columns import BlobColumns

REPORT = DeviceReport("n0/host", "n0", "run", 1, 10_000, 0, 0, 1, (), ())


def name(number: int) -> str:
    return f"b3:{number:064x}"


def blob(number: int) -> bytes:
    """Digests that begin alike in groups of three."""
    return bytes([number // 3]) * 8 + number.to_bytes(24, "big")


class Model:
    """What a catalogue must answer, from plain sets."""

    def __init__(self) -> None:
        self.blobs: dict[str, set[int]] = {}
        self.reports: dict[str, DeviceReport] = {}

    def resident(self, device: str) -> set[str]:
        report = self.reports[device]
        return {*report.firm, *report.evictable} & self.blobs.keys()

    def missing(self, device: str, checkpoint: str) -> int:
        there = set().union(*(self.blobs[other] for other in self.resident(device)))
        return sum(1 + number for number in self.blobs[checkpoint] - there)


@pytest.mark.parametrize("seed", range(8))
def test_it_answers_as_sets_do_under_random_events(seed: int) -> None:
    chance = random.Random(seed)
    catalogue, model = FleetCatalogue(), Model()
    for step in range(150):
        event = chance.choice(["add", "report", "report", "remove"])
        device = f"n{chance.randrange(6)}/host"
        if event == "add":
            checkpoint = name(chance.randrange(12))
            if checkpoint not in model.blobs:
                model.blobs[checkpoint] = set(chance.sample(range(40), chance.randrange(15)))
            catalogue.add(checkpoint, [(blob(number), 1 + number) for number in model.blobs[checkpoint]])
        elif event == "report":
            held = [name(number) for number in chance.sample(range(12), chance.randrange(5))]
            cut = chance.randrange(len(held) + 1)
            report = replace(REPORT, device=device, revision=step, firm=tuple(held[:cut]), evictable=tuple(held[cut:]))
            model.reports[device] = report
            assert catalogue.report(report) == tuple(sorted(set(held) - model.blobs.keys()))
        elif device in model.reports:
            del model.reports[device]
            catalogue.remove(device)
        assert {report.device: report for report in catalogue.devices()} == model.reports
        for checkpoint in model.blobs:
            holders = sorted(at for at in model.reports if checkpoint in model.resident(at))
            assert catalogue.sources(checkpoint) == tuple(holders)
            for at in model.reports:
                assert catalogue.missing(at, checkpoint) == model.missing(at, checkpoint)


def filled(**devices: tuple[str, ...]) -> FleetCatalogue:
    catalogue = FleetCatalogue()
    catalogue.add(name(0), [(blob(0), 700), (blob(1), 300)])
    catalogue.add(name(1), [(blob(0), 700), (blob(2), 200)])
    catalogue.add(name(2), [(blob(3), 500)])
    for node, held in devices.items():
        catalogue.report(replace(REPORT, device=f"{node}/host", node=node, used_bytes=len(held), evictable=held))
    return catalogue


def test_the_device_that_misses_least_is_chosen() -> None:
    catalogue = filled(empty=(), base=(name(0),), other=(name(2),))
    found = catalogue.choose(name(1), 2)
    assert [(at.device, at.missing_bytes, at.partner, at.partner_bytes) for at in found.targets] == [
        ("base/host", 200, name(0), 700),
        ("empty/host", 900, "", 0),
    ]
    assert found.explain() == [
        f"base/host: 200 B of 900 B missing; 700 B are those of {name(0)}",
        "empty/host: 900 B of 900 B missing",
    ]


def test_a_device_that_has_it_comes_first_and_nodes_come_once() -> None:
    catalogue = filled(n0=(), n1=(name(1),))
    catalogue.report(replace(REPORT, device="n1/gpu", node="n1"))
    assert [at.device for at in catalogue.choose(name(1), 3).targets] == ["n1/host", "n0/host"]


def test_only_what_cannot_be_evicted_takes_room() -> None:
    catalogue = filled(n0=(name(2),))
    full = replace(REPORT, budget_bytes=1000, used_bytes=1000)
    catalogue.report(replace(full, revision=2, evictable=(name(2),)))
    assert [at.missing_bytes for at in catalogue.choose(name(1), 1).targets] == [900]
    catalogue.report(replace(full, revision=3, firm_bytes=500, firm=(name(2),)))
    assert catalogue.choose(name(1), 1).targets == ()
    assert catalogue.choose(name(1), 1).explain() == [
        "0 of 1 replicas placed: each node takes one, and 1 devices have no room for it"
    ]
    catalogue.report(replace(full, revision=4, firm_bytes=1000, firm=(name(0),)))
    assert catalogue.choose(name(1), 1).targets == (), "200 bytes are missing, and there is no room for them"
    catalogue.report(replace(full, revision=5, budget_bytes=1200, firm_bytes=1000, firm=(name(0),)))
    assert [at.missing_bytes for at in catalogue.choose(name(1), 1).targets] == [200]


def test_a_report_that_is_late_is_ignored_and_a_new_run_is_not() -> None:
    catalogue = filled(n0=())
    assert catalogue.report(replace(REPORT, revision=0, evictable=(name(0),))) == ()
    assert catalogue.sources(name(0)) == ()
    catalogue.report(replace(REPORT, epoch="next", revision=0, evictable=(name(0),)))
    assert catalogue.sources(name(0)) == ("n0/host",)


@pytest.mark.parametrize(
    ("blobs", "said"),
    [
        ([(b"short", 1)], "32 bytes"),
        ([(blob(9), -1)], "negative"),
        ([(blob(9), 1), (blob(9), 2)], "two lengths"),
        ([(blob(0), 701)], "another length than in a manifest before"),
    ],
)
def test_impossible_blobs_are_refused_and_leave_nothing(blobs: list[tuple[bytes, int]], said: str) -> None:
    catalogue = filled(n0=())
    with pytest.raises(FormatError, match=said):
        catalogue.add(name(9), blobs)
    assert name(9) not in catalogue
    catalogue.add(name(9), [(blob(9), 5)])
    assert catalogue.missing("n0/host", name(9)) == 5


def test_unknown_names_are_named() -> None:
    catalogue = filled(n0=())
    with pytest.raises(NotFoundError, match="publish it"):
        catalogue.choose(name(7), 1)
    with pytest.raises(NotFoundError, match="is its agent running"):
        catalogue.missing("n7/host", name(0))
    with pytest.raises(InvalidReferenceError, match="64 hex digits"):
        catalogue.add("org/name", [])


def test_a_blob_takes_at_most_64_bytes_of_the_columns() -> None:
    columns = BlobColumns()
    chance = np.random.default_rng(0)
    for _ in range(20):
        columns.number([(chance.bytes(32), 1) for _ in range(1000)])
    assert len(columns) == 20_000
    assert columns.nbytes <= 64 * len(columns)
