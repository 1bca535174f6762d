"""`weightd stats` and `weightd inspect`: what is pinned, leased and evictable, and who shares with whom."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from support.fake_client import CHECKPOINT, DIGEST, MIB, FakeClient, Terminal
from weightd.cli import main
from weightd.errors import NotFoundError, ProtocolMismatchError
from weightd.inspection import SharedComponents, SharedPair

pytest.importorskip("typer")

if TYPE_CHECKING:
    from collections.abc import Sequence


def pair(one: str, other: str, shared: int = 2, *components: tuple[str, str], device: str = "host") -> SharedPair:
    parts = tuple(SharedComponents(*names, MIB) for names in components)
    return SharedPair(device, one[-1:] * 64, other[-1:] * 64, one, other, shared * MIB, MIB, parts)


def lines_of(printed: str) -> list[list[str]]:
    return [line.split() for line in printed.splitlines()]


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_stats_have_figures_pairs_and_components(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["sharing"] = [pair("a", "b", 2, ("vae", "vae"), ("te", "te_2")), pair("", "c", 1)]
    assert main(["stats"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert lines[0][6:11] == ["PINNED", "LEASED", "EVICTABLE", "HOLES", "REUSABLE"]
    assert " ".join(lines[1]).endswith("1.00 GiB 1.00 GiB 1.00 MiB 3.00 MiB 1.00 GiB 0 B 5.00 GiB 3")
    assert ["SHARED", "ONLY", "THEY", "BETWEEN", "AND", "COMPONENTS"] in lines
    assert ["2.00", "MiB", "1.00", "MiB", "a", "b", "te,", "te_2,", "vae"] in lines
    assert fake.calls[-1] == ("sharing", None, None, 11), "no more than the table has, and whether there are"


def test_the_keys_of_pairs(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["sharing"] = [pair("a", "b", 2, ("vae", "")), pair("b", "x", device="GPU-1")]
    found = as_json(capsys, "stats", "--wide")
    first, second = found["pairs"]
    assert first == {
        "device": "host", "checkpoints": ["a", "b"], "content_digests": ["a" * 64, "b" * 64],
        "shared_bytes": 2 * MIB, "only_bytes": MIB, "components": ["vae"],
        "component_pairs": [{"one": "vae", "other": "", "shared_bytes": MIB}],
    }  # fmt: skip
    assert (second["device"], second["components"]) == ("GPU-1", [])
    (device,) = found["devices"]
    figures = [device[f"{what}_bytes"] // MIB for what in ("pinned", "leased", "evictable", "hole")]
    assert figures == [1024, 1024, 1, 3]
    assert fake.calls[-1] == ("sharing", None, None, None)


def test_only_the_biggest_pairs_are_shown(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["sharing"] = lambda _reference, _device, most: [pair("a", "b") for _ in range(28)][:most]
    assert main(["stats"]) == 0
    printed = capsys.readouterr().out
    assert "\nand more; --wide lists all\n" in printed
    assert sum(line.startswith("2.00 MiB") for line in printed.splitlines()) == 10
    assert main(["stats", "--wide"]) == 0
    printed = capsys.readouterr().out
    assert sum(line.startswith("2.00 MiB") for line in printed.splitlines()) == 28
    assert "and more" not in printed


@pytest.mark.parametrize("command", [["stats"], ["inspect", "base"]])
@pytest.mark.parametrize("width", [60, 80, 160])
def test_it_fits(command: Sequence[str], width: int, fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "/home/alice/models/of/a/long/name/"
    fake.answers["sharing"] = [pair(long + "a" * 30, long + "b" * 30, 2, ("text_encoder", "text_encoder_2"))]
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    with contextlib.redirect_stdout(Terminal()) as stream:
        assert main([*command]) == 0
    assert max(map(len, stream.getvalue().splitlines())) <= width, stream.getvalue()
    expected = {"PINNED", "LEASED", "EVICTABLE", "BETWEEN"} if command == ["stats"] else {"SHARED", "WITH"}
    assert expected <= set(stream.getvalue().split())


def test_a_program_that_polls_asks_for_no_pairs(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "stats")
    assert (found["pairs"], found["devices"][0]["evictable_bytes"]) == (None, MIB)
    assert {call[0] for call in fake.calls} == {"stats"}


def test_what_an_old_daemon_does_not_say_is_not_known(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["sharing"] = ProtocolMismatchError("it is too old")
    fake.answers["stats"] = replace(fake.stats(), revision=0)
    assert main(["stats"]) == 0
    printed = capsys.readouterr().out
    assert "PINNED, LEASED, EVICTABLE, HOLES and pairs are not known: the daemon is too old to say\n" in printed
    assert lines_of(printed)[1][-11:-7] == ["-", "-", "-", "-"]
    found = as_json(capsys, "stats", "--wide")
    assert (found["pairs"], found["devices"][0]["evictable_bytes"]) == (None, None)
    assert as_json(capsys, "inspect", "base")["partners"] is None


def test_inspect_names_partners(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["sharing"] = [pair("base", "tuned", 2, ("vae", "vae"))]
    assert main(["inspect", "base"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert ["SHARED", "ONLY", "THEY", "WITH", "COMPONENTS"] in lines
    assert ["2.00", "MiB", "1.00", "MiB", "tuned", "vae"] in lines
    assert fake.calls[-1] == ("sharing", DIGEST, "host", 11)
    assert as_json(capsys, "inspect", "base")["partners"] == [
        {
            "name": "tuned", "content_digest": "d" * 64, "shared_bytes": 2 * MIB, "only_bytes": MIB,
            "components": [{"component": "vae", "partner_component": "vae", "shared_bytes": MIB}],
        }
    ]  # fmt: skip


def test_inspect_asks_for_partners_only_where_there_are_any(
    fake: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "base", "--quiet"]) == 0
    details = fake.inspect("base")
    fake.answers["inspect"] = replace(details, checkpoint=replace(CHECKPOINT, shared_bytes=0))
    assert main(["inspect", "base"]) == 0
    assert "WITH" not in capsys.readouterr().out
    assert "sharing" not in {call[0] for call in fake.calls}
    fake.answers["inspect"] = details
    fake.answers["sharing"] = NotFoundError("it went meanwhile")
    assert as_json(capsys, "inspect", "base")["partners"] is None
