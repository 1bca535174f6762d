"""The `weightd` command against a fake client: what it prints, what it calls and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from support.fake_client import CHECKPOINT, DIGEST, GIB, LOADED, RESULT, TENSOR, FakeClient, Terminal
from weightd import remembered
from weightd.cli import main
from weightd.errors import (
    CapacityError,
    DaemonBusyError,
    DaemonUnreachableError,
    DigestMismatchError,
    InUseError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolMismatchError,
    WeightdError,
)
from weightd.inspection import StoredTensor
from weightd.resolve import files_of
from weightd.types import (
    DigestIndexStats,
)

pytest.importorskip("typer")
output = pytest.importorskip("weightd.cli.output")

LONG = "org/" + "long-name-" * 30
LS_KEYS = [
    "name",
    "content_digest",
    "device",
    "tensors",
    "total_bytes",
    "exclusive_bytes",
    "shared_bytes",
    "leases",
    "pinned",
    "loaded_at",
    "last_used_at",
    "state",
    "names",
    "owner",
    "owner_uid",
]


def as_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# Listings


def test_ls_json_has_exactly_the_contracted_keys(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--format", "json"]) == 0
    (row,) = as_json(capsys)
    assert list(row) == LS_KEYS
    assert row["name"] == "org/base"
    assert row["total_bytes"] == 2 * GIB
    assert row["loaded_at"] == "2026-01-02T03:04:05.678Z"
    assert row["last_used_at"] is None
    assert row["pinned"] is True
    assert fake.closed == 1


@pytest.mark.parametrize("alias", ["ls", "list"])
def test_ls_table(alias: str, fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["checkpoints"] = [
        replace(CHECKPOINT, last_used_at=datetime.now(UTC) - timedelta(minutes=3, seconds=2)),
        replace(CHECKPOINT, names=(LONG,), pinned=False, state="loading", content_digest=""),
    ]
    assert main([alias]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", header)[:5] == ["NAME", "DIGEST", "DEVICE", "STATE", "OWNER"]
    assert re.split(r"\s{2,}", first) == [
        "org/base, base",
        "ab" * 6,
        "host",
        "resident",
        "ada",
        "2.00 GiB",
        "50.0 MiB",
        "2",
        "yes",
        "3 minutes ago",
    ]
    assert LONG in second, "nothing is cut where there is no terminal"
    assert "loading" in second


def test_no_trunc_prints_whole_digests(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--no-trunc"]) == 0
    assert DIGEST in capsys.readouterr().out


def test_ls_quiet_names_or_digests(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    nameless = replace(CHECKPOINT, names=())
    fake.answers["checkpoints"] = [CHECKPOINT, nameless, replace(nameless, content_digest="", state="loading")]
    assert main(["ls", "-q"]) == 0
    assert capsys.readouterr().out == f"org/base\nbase\n{DIGEST}\n"


def test_names_cannot_steer_the_terminal(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["checkpoints"] = [replace(CHECKPOINT, names=("[red]x\x1b[2J\ny\udc80",))]
    assert main(["ls"]) == 0
    assert len(lines := capsys.readouterr().out.splitlines()) == 2
    assert lines[1].startswith(r"[red]x\x1b[2J\ny\udc80 ")


def test_ps(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--format", "json"]) == 0
    (row,) = as_json(capsys)
    assert list(row) == ["lease", "pid", "uid", "user", "command", "checkpoint", "device", "bytes", "since", "waiting"]
    assert row["since"].endswith("Z")
    assert main(["ps", "-q"]) == 0
    assert capsys.readouterr().out == "7\n"
    assert main(["ps"]) == 0
    assert "python serve.py" in capsys.readouterr().out


def test_what_is_not_known_is_unknown_and_null(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    (lease,) = fake.leases()
    fake.answers["leases"] = [replace(lease, pid=None, uid=None, user="?", command="")]
    assert main(["ps", "--format", "json"]) == 0
    (row,) = as_json(capsys)
    assert (row["pid"], row["uid"]) == (None, None)
    assert main(["ps"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["7", "unknown", "?"]
    details = fake.inspect("base", device=None)
    fake.answers["inspect"] = replace(details, checkpoint=replace(CHECKPOINT, owner_uid=None, owner="?"))
    assert main(["inspect", "base"]) == 0
    assert "owner      unknown\n" in capsys.readouterr().out
    assert main(["inspect", "base", "--format", "json"]) == 0
    assert as_json(capsys)["checkpoint"]["owner_uid"] is None
    assert main(["drain"]) == 0
    assert capsys.readouterr().err == "weightd: waiting for pid unknown, which holds org/base\n"


def test_stats(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats"]) == 0
    printed = capsys.readouterr().out
    assert "3 checkpoints, logical 4.00 GiB, resident 2.70 GiB, saved 1.30 GiB (32.4 %)\n" in printed
    assert "host memory itself has 4.00 GiB free: other processes use the rest\n" in printed
    assert "300 blobs, 1 lease, 2 evictions, 0 digest collisions\n" in printed
    assert main(["stats", "--format=json"]) == 0
    found = as_json(capsys)
    assert found["saved_ratio"] == 0.324
    contracted = [
        "uuid",
        "kind",
        "name",
        "budget_bytes",
        "used_bytes",
        "live_bytes",
        "reusable_bytes",
        "free_bytes",
        "segments",
    ]
    assert set(contracted) <= set(found["devices"][0])


def test_stats_say_that_the_digest_index_fails(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    stats = replace(fake.stats(), digest_index=DigestIndexStats("/state/index", "disk is full", 3))
    for index, words in (
        (stats.digest_index, ["digest index /state/index cannot be used: disk is full; loads read more, 3 failures"]),
        (DigestIndexStats("/state/index", "", 1), ["digest index /state/index can be used again, 1 failure since"]),
        (DigestIndexStats("/state/index", "", 0), []), (None, []),
    ):  # fmt: skip
        fake.answers["stats"] = replace(stats, digest_index=index)
        assert main(["stats"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "digest index" in line]
        assert [line.startswith(word) for line, word in zip(lines, words, strict=True)] == [True] * len(words)
    fake.answers["stats"] = stats
    assert main(["stats", "--format", "json"]) == 0
    assert as_json(capsys)["digest_index"] == {"path": "/state/index", "problem": "disk is full", "failures": 3}


def test_inspect(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "base", "--format", "json", "--device", "host"]) == 0
    found = as_json(capsys)
    assert "tensors" not in found
    assert found["groups"] == []
    assert found["checkpoint"]["names"] == ["org/base", "base"]
    assert found["sources"][0]["modified_at"] == "2026-01-02T03:04:05.000Z"
    asked = [("tensors", DIGEST, "host"), ("sharing", DIGEST, "host", None)]
    assert fake.calls == [("inspect", "base", "host"), *asked]
    assert main(["inspect", "base", "--format", "json", "--tensors"]) == 0
    (tensor,) = as_json(capsys)["tensors"]
    assert tensor == {
        "component": "unet", "name": "w", "dtype": "F32", "shape": [2, 3], "length": 24, "digest": "01" * 16,
        "variant": 0, "segment": 3, "offset": 256, "file": "model.safetensors", "checkpoints": [f"sha256:{DIGEST}"],
        "others": 0,
    }  # fmt: skip
    assert fake.calls[-2:] == asked, "what was inspected, and nothing else that is so called"
    assert main(["inspect", "base", "--tensors"]) == 0
    printed = capsys.readouterr().out
    assert "2x3" in printed
    assert "model.safetensors" in printed
    assert re.search(r"^from +/models/base$", printed, re.M)
    fake.calls.clear()
    assert main(["inspect", "base", "-q"]) == 0
    assert capsys.readouterr().out == f"{DIGEST}\n"
    assert fake.calls == [("inspect", "base", None)]


def layer(number: int, offset: int, *, dtype: str = "BF16", component: str = "") -> list[StoredTensor]:
    """q, k, v of a layer, one behind the other from an offset on."""
    names = [f"m.layers.{number}.self_attn.{part}_proj.weight" for part in "qkv"]
    one = replace(TENSOR, component=component, dtype=dtype, shape=(64, 64), length=8192)
    return [replace(one, name=name, offset=offset + at * 8192) for at, name in enumerate(names)]


def shows(fake: FakeClient, tensors: list[StoredTensor]) -> None:
    fake.answers["tensors"] = tensors


def test_inspect_says_which_groups_lie_in_a_row(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    apart = [replace(one, offset=one.offset + 256 * at) for at, one in enumerate(layer(2, 1 << 20))]
    shows(fake, [*layer(0, 0), *layer(1, 1 << 16), *apart])
    assert main(["inspect", "base"]) == 0
    printed = capsys.readouterr().out
    assert "groups     2 of 3 in a row\n" in printed
    assert printed.endswith(
        "\nGROUP                                  IN A ROW       SIZE\n"
        "m.layers.*.self_attn.qkv_proj.weight     2 of 3   72.0 KiB\n"
        "1 group would lie in a row after `weightd rm` and `weightd load`,\n"
        "unless other checkpoints have some of their tensors\n"
    )
    assert main(["inspect", "base", "--format", "json"]) == 0
    found = as_json(capsys)
    assert found["groups"][2] == {
        "component": "", "name": "m.layers.2.self_attn.qkv_proj.weight", "tensors": 3, "bytes": 24576,
        "in_a_row": False, "remembered": False, "reason": "",
    }  # fmt: skip
    assert main(["inspect", "base", "--format", "json", "--tensors"]) == 0
    assert as_json(capsys)["groups"][0]["members"] == [f"m.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]


def test_inspect_names_groups_in_full_where_no_terminal_is(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = "deep." * 20
    shows(fake, [replace(one, name=f"{deep}{one.name}") for one in layer(0, 0)])
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", "base"]) == 0
    assert f"\n{deep}m.layers.*.self_attn.qkv_proj.weight " in capsys.readouterr().out


def test_inspect_says_nothing_of_groups_where_there_are_none(
    fake: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers["tensors"] = ProtocolMismatchError("it is too old")
    assert main(["inspect", "base"]) == 0
    assert "GROUP" not in (printed := capsys.readouterr().out)
    assert "groups " not in printed
    assert main(["inspect", "base", "--tensors"]) == ProtocolMismatchError.exit_code
    fake.calls.clear()
    fake.answers["inspect"] = replace(fake.inspect("m"), checkpoint=replace(CHECKPOINT, content_digest=""))
    fake.calls.clear()
    assert main(["inspect", "base"]) == 0
    assert [call[0] for call in fake.calls] == ["inspect"], "one that is being loaded has no tensors"


@pytest.mark.parametrize("columns", [80, 60, 132])
def test_groups_fit_the_terminal(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    long = [replace(one, name=f"{'very_long_name.' * 8}{one.name}", component="text_encoder") for one in layer(0, 0)]
    odd = [replace(one, shape=(1, 5), length=10) for one in layer(1, 1 << 20)]
    shows(fake, [*long, *odd])
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    with contextlib.redirect_stdout(Terminal()) as stream:
        assert main(["inspect", "base"]) == 0
    printed = stream.getvalue()
    lines = printed[printed.index("\nGROUP") + 1 :].splitlines()
    assert max(map(len, lines[:3])) <= columns
    assert [line.split()[1:] for line in lines[1:3]] == [["-", "never", "30", "B"],
                                                        ["text_encoder", "1", "of", "1", "24.0", "KiB"]]  # fmt: skip
    assert "…" in lines[2]
    assert " ".join(lines[3:]) == "1 group never: one of its tensors has a length that is no multiple of 256 bytes"
    assert main(["inspect", "base", "--no-trunc"]) == 0
    assert f"{'very_long_name.' * 8}m.layers.*.self_attn.qkv_proj.weight" in capsys.readouterr().out


def test_inspect_says_that_what_is_remembered_is_damaged(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = layer(0, 0)
    shows(fake, tensors)
    folder = Path(os.environ["XDG_CACHE_HOME"], "weightd", "groups")
    folder.mkdir(parents=True, mode=0o700)
    name = f"{remembered._structure(remembered._ordered(tensors))}.json"
    (folder / name).write_text("no JSON")
    assert main(["inspect", "base"]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"weightd: a remembered order of tensors is ignored: {name} is damaged\n"
    assert "groups     1 of 1 in a row" in captured.out


# Loading


def test_load_json(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["load", "./m", "--name", "n", "--pin", "--device", "host", "--verify", "--format", "json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    keys = "name content_digest tensors total_bytes unique_bytes shared_bytes read_bytes seconds device"
    keys += " evicted evicted_others order groups ignored_groups"
    (loaded,) = json.loads(captured.out)
    assert list(loaded) == keys.split()
    assert captured.err == "", "no progress where stderr is no terminal"
    options = {"name": "n", "device": "host", "pin": True, "detached": False, "verify": True}
    assert fake.calls == [("load", "./m", options | {"groups": ()})]


def test_load_asks_for_what_is_remembered_if_anything_is(fake: FakeClient) -> None:
    folder = Path(os.environ["XDG_CACHE_HOME"], "weightd", "groups")
    folder.mkdir(parents=True)
    (folder / "other").touch()
    assert main(["load", "./m"]) == 0
    (folder / f"{'0' * 64}.json").touch()
    assert main(["load", "./m"]) == 0
    assert [options["groups"] for _, _, options in fake.calls] == [(), remembered.groups_for]


def test_load_says_what_it_chooses(fake: FakeClient, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Notes of the client's own resolving, which the fake has not, and the hint of a shard that is named."""
    (tmp_path / "model.fp16.safetensors").touch()
    (tmp_path / "model-00001-of-00004.safetensors").touch()
    shard = tmp_path / "model-00001-of-00004.safetensors"
    fake.answers["load"] = lambda reference, _: files_of(reference) and RESULT
    assert main(["load", str(shard)]) == 0
    assert capsys.readouterr().err == f"weightd: {shard}: is shard 1 of 4 alone; give its folder for all of them\n"
    shard.unlink()
    assert main(["load", str(tmp_path)]) == 0
    note = f"weightd: {tmp_path}: has weights of the variant fp16 only, which are taken\n"
    assert capsys.readouterr().err == note
    assert main(["load", str(tmp_path), "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["load", str(tmp_path), "--variant", "bf16"]) == 3
    assert "has no weights of variant bf16" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["load", "inspect", "pin", "unpin", "rm", "verify"])
def test_variant(fake: FakeClient, tmp_path: Path, command: str) -> None:
    """Every command that takes a reference takes one; where the files are gone, its name is still looked for."""
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.fp16.safetensors").touch()
    assert main([command, str(tmp_path), "--variant", "fp16"]) == 0
    resolved = fake.calls[0][1]
    assert resolved.name == f"fp16:{tmp_path}"
    assert [source.file for source in resolved.sources] == ["model.fp16.safetensors"]
    if command != "load":
        fake.calls.clear()
        assert main([command, f"{tmp_path}/gone", "--variant", "fp16"]) == 0
        assert fake.calls[0][1] == f"fp16:{tmp_path}/gone"


def test_load_several(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "a", "b", "--format", "json"]) == 0
    assert len(as_json(capsys)) == 2
    assert main(["load", "a", "b", "-q"]) == 0
    assert capsys.readouterr().out == f"{DIGEST}\n" * 2
    assert main(["load", "a", "b", "--name", "n"]) == 2
    assert "--name" in capsys.readouterr().err


def test_load_no_wait(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["load"] = lambda *_: None
    assert main(["load", "a", "--no-wait"]) == 0
    assert capsys.readouterr().out.startswith("loading a; ")
    assert fake.calls[0][2]["detached"] is True
    assert main(["load", "a", "--no-wait", "--format", "json"]) == 0
    assert as_json(capsys) == [{"name": "a", "state": "loading"}]


@pytest.mark.parametrize("references", [["a"], ["a", "b"]])
def test_load_json_is_a_list_however_many_there_are(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], references: list[str]
) -> None:
    assert main(["load", *references, "--format", "json"]) == 0
    assert len(as_json(capsys)) == len(references)
    fake.answers["load"] = NotFoundError("not there")
    assert main(["load", *references, "--format", "json"]) == 3
    assert as_json(capsys) == []


def test_load_says_what_was_evicted_for_it(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    evicted = ("tuned", f"sha256:{DIGEST}", "bad\x1b[31m")
    fake.answers["load"] = replace(RESULT, evicted=evicted, evicted_others=2)
    assert main(["load", "a"]) == 0
    said = f"weightd: evicted tuned, {DIGEST[:12]}, bad\\x1b[31m, 2 of other users to make room\n"
    assert capsys.readouterr().err == said
    assert main(["load", "a", "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    (loaded,) = json.loads(captured.out)
    assert (loaded["evicted"], loaded["evicted_others"]) == (list(evicted), 2)
    assert main(["load", "a", "-q"]) == 0
    assert capsys.readouterr() == (f"{DIGEST}\n", "")


def test_load_shows_progress_on_a_terminal(fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.redirect_stderr(Terminal()) as stream:
        assert main(["load", "a[b]"]) == 0
    assert "copying a[b]" in stream.getvalue()
    with contextlib.redirect_stderr(Terminal()) as stream:
        assert main(["load", "a", "-q"]) == 0
    assert stream.getvalue() == ""


@pytest.mark.parametrize("value", [None, "1"])
def test_no_color_is_honoured(value: str | None, fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLORTERM", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    with contextlib.redirect_stderr(Terminal()) as stream:
        assert main(["load", "a"]) == 0
    coloured = re.search(r"\x1b\[[0-9;]*(3|9|38;5;)[0-9]+m", stream.getvalue())
    assert (coloured is None) == bool(value)


def test_interrupted_load_leaves_the_daemon(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["load"] = KeyboardInterrupt()
    assert main(["load", "a", "b"]) == 130
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "interrupted" in captured.err
    assert captured.out == ""
    assert len(fake.calls) == 1, "the second reference is not tried"
    assert fake.closed == 1, "closing is what cancels"


def test_verify(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    assert capsys.readouterr().out == "verified 300 blobs, 3.00 GiB: clean\n"
    assert fake.calls == [("verify", None, None, None)]
    fake.answers["verify"] = DigestMismatchError("blob x of base differs")
    assert main(["verify", "base"]) == 1
    assert capsys.readouterr().err == "weightd: blob x of base differs\n"


# Changing


def test_pin_and_unpin(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pin", "a", "-d", "host"]) == 0
    assert main(["unpin", "a", "--quiet"]) == 0
    assert fake.calls == [("pin", "a", "host"), ("unpin", "a", None)]
    assert capsys.readouterr().out == "pinned a\n"


def test_rm_goes_on_and_exits_with_the_first_error(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    errors: dict[str, WeightdError] = {"b": InUseError("b is in use by pid 7"), "c": NotFoundError("no c")}
    fake.answers["remove"] = lambda reference, _: errors.get(reference, GIB)
    assert main(["rm", "a", "b", "c", "d"]) == 4
    captured = capsys.readouterr()
    assert captured.out == "removed a, freed 1.00 GiB\nremoved d, freed 1.00 GiB\n"
    assert captured.err == "weightd: b is in use by pid 7\nweightd: no c\n"


def test_rm_stops_when_the_daemon_is_gone(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["remove"] = DaemonUnreachableError("no daemon at /x")
    assert main(["rm", "a", "b"]) == 69
    assert capsys.readouterr().err == "weightd: no daemon at /x\n"


# The daemon


def test_ping(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping"]) == 0
    assert capsys.readouterr().out == "1.25 ms from /run/w.sock\n"
    assert main(["ping", "--format", "json"]) == 0
    assert as_json(capsys) == {"socket": "/run/w.sock", "seconds": 0.00125}


def test_version_with_and_without_a_daemon(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--format", "json"]) == 0
    assert as_json(capsys) == {
        "client": "1.2.3",
        "daemon": {"version": "9.9", "pid": 77, "uptime_seconds": 12.0},
        "socket": "/run/w.sock",
    }
    assert main(["version"]) == 0
    assert capsys.readouterr().out == "client  1.2.3\ndaemon  9.9 (pid 77, up 12 s)\nsocket  /run/w.sock\n"
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "weightd 1.2.3\n"


@pytest.mark.parametrize("place", ["connect", "version"])
@pytest.mark.parametrize(
    "error",
    [DaemonUnreachableError("no daemon at /x"), DaemonBusyError("it is full"), PermissionDeniedError("not for you")],
)
def test_version_without_a_daemon_fails_and_says_its_own(
    error: WeightdError, place: str, fake: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers[place] = error
    socket = "/x" if place == "connect" else "/run/w.sock"
    assert main(["version", "--format", "json", "--socket", "/x"]) == error.exit_code
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"client": "1.2.3", "daemon": None, "socket": socket}
    assert captured.err == f"weightd: {error}\n"
    assert main(["version", "--socket", "/x"]) == error.exit_code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"client  1.2.3\nsocket  {socket}\n", f"weightd: {error}\n")


@pytest.mark.parametrize("command", ["serve", "config"])
def test_serve_and_config_become_the_daemon(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReplacedError(Exception):
        pass

    executed: list[list[str]] = []

    def execv(path: str, arguments: list[str]) -> None:
        executed.append([path, *arguments])
        raise ReplacedError

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    main(["--socket", "/a", command, "--device", "host", "--device=cuda:0", "--budget=1GiB", "--socket", "/b"])
    main(["--socket", "/a", command, "--config", "f.toml", "--max-loads=-1", "--preload="])
    main([command])
    daemon = [sys.executable, sys.executable, "-P", "-m", "weightd_daemon", command]
    assert [*map(sorted, (executed[0], executed[1]))] == [
        sorted([*daemon, "--socket=/b", "--device=host", "--device=cuda:0", "--budget=1GiB"]),
        sorted([*daemon, "--config=f.toml", "--socket=/a", "--max-loads=-1", "--preload="]),
    ]
    assert executed[2] == daemon
    if command == "config":
        main(["config", "--format", "json"])
        assert executed[3] == [*daemon, "--format=json"]


def test_serve_without_the_daemon(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["serve"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# Options and errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ls"], None),
        (["--socket", "/a", "ls"], "/a"),
        (["ls", "--socket", "/b"], "/b"),
        (["--socket", "/a", "ls", "--socket", "/b"], "/b"),
    ],
)
def test_socket_before_and_after_the_command(arguments: list[str], expected: str | None, fake: FakeClient) -> None:
    assert main(arguments) == 0
    assert fake.asked == expected


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("it is\nnot here"), 3),
        (CapacityError("too big"), 5),
        (PermissionDeniedError("not yours"), 77),
        (DaemonUnreachableError("no daemon"), 69),
        (DaemonBusyError("full"), 75),
        (ProtocolMismatchError("of another kind"), 76),
    ],
)
def test_each_error_is_one_line_and_its_code(
    error: WeightdError, code: int, fake: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers["checkpoints"] = error
    assert main(["ls"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "weightd: {}\n".format(str(error).replace("\n", r"\n"))
    assert main(["--debug", "ls"]) == code
    *trace, last = capsys.readouterr().err.splitlines()
    assert trace[0].startswith("Traceback")
    assert last.startswith("weightd: ")


def test_unexpected_error_is_one_line(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["ping"] = ZeroDivisionError("oops")
    assert main(["ping"]) == 1
    assert capsys.readouterr().err == "weightd: ZeroDivisionError: oops (run with --debug for the traceback)\n"
    assert main(["--debug", "ping"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_events_are_json_lines(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events"]) == 0
    attached, drained = map(json.loads, capsys.readouterr().out.splitlines())
    assert attached == {
        "time": "2026-01-02T03:04:05.678Z", "event": "attached", "lease": 7, "content_digest": DIGEST, "device": "host",
        "names": ["org/base"], "total_bytes": 2 * GIB, "pid": 4242, "uid": 1000, "user": "ada",
        "command": "python serve.py",
    }  # fmt: skip
    assert drained == {"time": "2026-01-02T03:04:05.678Z", "event": "drained"}
    assert main(["events", "-f"]) == 0
    assert [call for call in fake.calls if call[0] == "events"] == [("events", False), ("events", True)]


def test_drain(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "--timeout", "2.5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "drained 3 checkpoints, freed 2.00 GiB\n"
    assert captured.err == "weightd: waiting for pid 4242 (python serve.py), which holds org/base\n"
    assert fake.calls[-1] == ("drain", 2.5)
    assert main(["drain", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["drain", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["state", "checkpoints", "freed_bytes", "seconds"]
    assert main(["drain", "--undo"]) == 0
    assert (capsys.readouterr().out, fake.calls[-1]) == ("serving again\n", ("undrain",))
    fake.answers["drain"] = KeyboardInterrupt()
    assert main(["drain", "-q"]) == 130
    assert "the daemon continues to drain; `weightd drain --undo`" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ls", "stats"])
def test_a_drain_is_shown(command: str, fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 0
    assert "attaches or loads" not in capsys.readouterr().out
    fake.answers["stats"] = replace(FakeClient().stats(), state="draining")
    assert main([command]) == 0
    assert capsys.readouterr().out.endswith(
        "\nthe daemon is draining: it accepts no attaches or loads; `weightd drain --undo` ends the drain\n"
    )


def test_interrupted_elsewhere(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["stats"] = KeyboardInterrupt()
    assert main(["stats"]) == 130
    assert capsys.readouterr().err == "weightd: interrupted\n"


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["load"], ["ls", "--format", "xml"], ["ls", "x"], ["pin", "a", "b"], ["--wrong"]]
)
def test_wrong_usage_is_one_line_and_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"weightd: .* '?weightd.* --help'\n", captured.err)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    listed = re.findall(r"^  ([a-z]+)  ", printed.split("Commands:")[1].split("Exit codes")[0], re.MULTILINE)
    assert listed == [
        "serve",
        "load",
        "ls",
        "ps",
        "inspect",
        "plan",
        "pin",
        "unpin",
        "rm",
        "stats",
        "map",
        "verify",
        "events",
        "top",
        "web",
        "drain",
        "doctor",
        "ping",
        "version",
        "token",
        "unit",
        "config",
        "fleet",
    ]
    assert "69   no daemon, no catalogue of a fleet, or the daemon is draining\n" in printed
    codes = {int(code) for code in re.findall(r"^\s*(\d+)  ", printed.split("Exit codes:")[1], re.MULTILINE)}
    assert {0, 1, 2, 3, 4, 5, 69, 75, 76, 77, 78, 130} == codes
    assert "..." not in printed.split("Commands:")[1], "every summary fits its line"
    assert main(["fleet", "--help"]) == 0
    assert "..." not in capsys.readouterr().out.split("Commands:")[1]
    for group in ([], ["fleet"]):
        assert main(group) == 2
        assert capsys.readouterr().err.startswith("Usage: weightd"), "the help as it is, and no error around it"


@pytest.mark.parametrize("command", ["load", "inspect", "pin", "unpin", "rm", "verify"])
def test_help_says_where_it_looks_without_a_device(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    default = "the daemon's only GPU, or host" if command == "load" else "the device that has the checkpoint"
    assert f"[default: {default}]" in " ".join(capsys.readouterr().out.split())


def test_closed_output_is_quiet() -> None:
    """A reader that has gone, as of `weightd --help | true`: no traceback, no message, and not success."""
    code = (
        "import sys, weightd.cli.context as c, weightd.cli.listing as l;"
        "from weightd.cli import main;"
        "import contextlib;"
        "l.open_client = lambda *_: contextlib.nullcontext(type('C', (), {'leases': lambda s: []})());"
        "sys.exit(main(['ps']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, check=False, env=environment(), text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_typer_or_rich_it_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from weightd.cli import main; sys.exit(main(['ls']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment(), text=True)
    assert done.returncode == 1
    assert done.stderr == "weightd's command needs typer and rich: pip install '.[cli]' in weightd's checkout\n"


def test_completion_knows_what_is_imported_when_it_is_first_used() -> None:
    code = (
        "import sys, weightd; listed = dir(weightd); assert set(weightd.__all__) <= set(listed), listed;"
        "sys.exit(any(name in sys.modules for name in ('weightd.client', 'weightd.attachment', 'grpc', 'google')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment()).returncode == 0


def test_module_runs_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "weightd", "nonsense"], capture_output=True, check=False, env=environment(), text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("weightd: ")


def environment() -> dict[str, str]:
    """This process's environment, with the packages under test on the path."""
    source = str(Path(sys.modules["weightd.cli"].__file__ or "").parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


# Formats


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "just now"),
        (0.4, "just now"),
        (1, "1 second ago"),
        (59, "59 seconds ago"),
        (60, "1 minute ago"),
        (7200, "2 hours ago"),
        (86400 * 3, "3 days ago"),
        (86400 * 400, "1 year ago"),
    ],
)
def test_ago(seconds: float, text: str) -> None:
    assert output.ago(LOADED, LOADED + timedelta(seconds=seconds)) == text


def test_digest_and_device_are_shortened_only_if_they_are_such() -> None:
    assert output.digest(DIGEST) == output.digest(f"sha256:{DIGEST}") == "ab" * 6
    assert output.digest("org/base") == "org/base"
    assert output.device("GPU-0123abcd-1111-2222-3333-444455556666") == "GPU-0123abcd"
    assert output.device("GPU-0123abcd-1111-2222-3333-444455556666", full=True).endswith("6666")
    assert output.device("host") == "host"
