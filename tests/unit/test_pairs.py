"""`weightd stats`: what is pinned, leased and evictable, and who shares with whom, of known tensors."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from support.fake_client import CHECKPOINT, MIB, FakeAttachment, FakeClient, Terminal
from weightd.cli import main
from weightd.errors import DrainingError
from weightd.types import TensorInfo, TensorKey

pytest.importorskip("typer")
pairs = pytest.importorskip("weightd.cli.pairs")

if TYPE_CHECKING:
    from weightd.types import CheckpointInfo


def one(name: str, *, pinned: bool = False, leases: int = 0, device: str = "host", tensors: int = 3) -> CheckpointInfo:
    return replace(
        CHECKPOINT,
        names=(name,),
        content_digest=name * 64,
        pinned=pinned,
        leases=leases,
        device=device,
        tensors=tensors,
    )


def blobs(letters: str, component: str = "") -> list[TensorInfo]:
    """A tensor of nearly 1 MiB for each letter, which decides its content; the daemon counts whole MiB."""
    return [
        TensorInfo(component, f"{at}{letter}", "U8", (MIB - 1,), 0, 0, MIB - 1, letter.encode() * 16, 0, 0)
        for at, letter in enumerate(letters)
    ]


def holds(fake: FakeClient, checkpoints: dict[CheckpointInfo, list[TensorInfo]]) -> None:
    """Let the daemon hold these."""
    fake.answers["checkpoints"] = list(checkpoints)
    by_digest = {(info.content_digest, info.device): tensors for info, tensors in checkpoints.items()}

    def attach(reference: str, device: str | None, _: bool) -> FakeAttachment:
        attachment = FakeAttachment()
        tensors = by_digest[reference, device or ""]
        attachment.tensors = {TensorKey(each.component, each.name): each for each in tensors}  # type: ignore[misc]
        return attachment

    fake.answers["attach"] = attach


def as_json(capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["stats", "--wide", "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_bytes_count_once_whoever_has_them(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    holds(fake, {
        one("a", pinned=True): blobs("stuv"),
        one("b", leases=1): blobs("tuvw"),
        one("c"): [*blobs("vxy"), *blobs("y")],  # y twice
        one("d"): blobs("xz"),
        one("a", device="GPU-1"): blobs("st"),  # of the same content, elsewhere
    })  # fmt: skip
    found = as_json(capsys)
    (device,) = found["devices"]
    assert [device[f"{what}_bytes"] // MIB for what in ("pinned", "leased", "evictable")] == [4, 4, 3]
    found_pairs = {"".join(pair["checkpoints"]): pair["shared_bytes"] // MIB for pair in found["pairs"]}
    assert found_pairs == {"ab": 3, "ac": 1, "bc": 1, "cd": 1}, "and none across devices"
    assert all(call[3] is True for call in fake.calls if call[0] == "attach"), "looking is no use"


def test_stats_name_pairs_and_components(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    holds(fake, {one("a"): blobs("st", "vae"), one("b"): blobs("su", "vae")})
    assert main(["stats"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["SHARED", "BETWEEN", "AND", "COMPONENTS"] in lines
    assert ["1.00", "MiB", "a", "b", "vae"] in lines
    head, row = lines[:2]
    assert head[:9] == ["DEVICE", "KIND", "NAME", "BUDGET", "USED", "LIVE", "PINNED", "LEASED", "EVICTABLE"]
    assert " 3.00 MiB " in printed.splitlines()[1], row


def test_only_the_biggest_pairs_are_shown(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    holds(fake, {one(letter): blobs("s") for letter in "abcdefgh"})
    assert main(["stats"]) == 0
    assert "and 18 pairs more; --wide lists all\n" in capsys.readouterr().out
    assert main(["stats", "--wide"]) == 0
    assert sum(line.startswith("1.00 MiB") for line in capsys.readouterr().out.splitlines()) == 28


@pytest.mark.parametrize("width", [60, 80, 160])
def test_it_fits(width: int, fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "/home/alice/models/of/a/long/name/"
    named = {replace(one(name), names=(long + name * 30,)): blobs("st", "text_encoder") for name in "ab"}
    holds(fake, named)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    with contextlib.redirect_stdout(Terminal()) as stream:
        assert main(["stats"]) == 0
    assert max(map(len, stream.getvalue().splitlines())) <= width, stream.getvalue()
    assert {"PINNED", "LEASED", "EVICTABLE"} <= set(stream.getvalue().split())


def test_whoever_polls_asks_for_no_lists(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    """Each list that is read is an event, and the daemon remembers so many."""
    holds(fake, {one("a"): blobs("s"), one("b"): blobs("s")})
    assert main(["stats", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pairs"], found["devices"][0]["evictable_bytes"]) == (None, None)
    assert "attach" not in {call[0] for call in fake.calls}


@pytest.mark.parametrize("many", [True, False])
def test_what_is_not_known_is_said(many: bool, fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    holds(fake, {one("a", tensors=pairs.MOST_TENSORS + 1 if many else 1): blobs("s")})
    if not many:
        fake.answers["attach"] = DrainingError("it drains")
    assert main(["stats"]) == 0
    printed = capsys.readouterr().out
    why = "the checkpoints have 200,001 tensors, more than 200,000" if many else "it drains"
    assert f"PINNED, LEASED, EVICTABLE and pairs are not known: {why}\n" in printed
    found = as_json(capsys)
    assert (found["pairs"], found["devices"][0]["evictable_bytes"]) == (None, None)
    assert many == ("attach" not in {call[0] for call in fake.calls})
