"""The page on a real daemon: it shows what `stats`, `ls` and `ps` say, and outlives the daemon."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import weightd
from support.checkpoints import describe_pipeline, write_random
from support.daemon import Daemon, eventually
from support.pages import OpenPage, shown, until
from support.served_page import served
from weightd._sizes import size
from weightd.client import Client
from weightd.top.memory import parts as split

if TYPE_CHECKING:
    from playwright.sync_api import Page

MIB = 1 << 20
Serve = Callable[[Client], str]
NAMES = (
    """[...document.querySelectorAll("[aria-label=Checkpoints] [data-row] th")].map((cell) => cell.innerText.trim())"""
)
FREED = """async (digests) => {
    const { freed, groupsOf } = await import("weightd/map-layout.js");
    return freed(groupsOf(weightd.parts.devices.map("host").segments), new Set(digests));
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune of it, one that shares nothing, and two pipelines with one text encoder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_random(folder / "base.safetensors", 20, 2 * MIB, "base")
    write_random(folder / "tuned.safetensors", 20, 2 * MIB, "tuned", {at: ("base", at) for at in range(13)})
    write_random(folder / "other.safetensors", 7, 3 * MIB, "other")
    for name in ("large", "small"):
        write_random(folder / name / "text_encoder" / "model.safetensors", 5, 2 * MIB, "encoder")
        write_random(folder / name / "unet" / "diffusion_pytorch_model.safetensors", 4, MIB, name)
        describe_pipeline(folder / name)
    return folder


@pytest.fixture(scope="module")
def filled(folder: Path) -> Iterator[Daemon]:
    """A daemon that has held them all, and holds them but one."""
    daemon = Daemon(budget="512MiB")
    fill(daemon, folder)
    yield daemon
    daemon.close(check=True)


def fill(daemon: Daemon, folder: Path) -> None:
    for name in ("base", "tuned", "other", "large", "small"):
        path = folder / name if (folder / name).is_dir() else folder / f"{name}.safetensors"
        daemon.command("load", path, "--name", name, *(["--pin"] if name == "base" else []))
    daemon.command("rm", "other")


def asked(daemon: Daemon, *arguments: str) -> Any:
    return json.loads(daemon.command(*arguments, "--format", "json").stdout)


def rows(page: Page, table: str) -> list[list[str]]:
    script = """(table) => [...document.querySelectorAll(`[aria-label="${table}"] [data-row]`)]
        .map((row) => [...row.children].map((cell) => cell.innerText.trim()))"""
    found: list[list[str]] = page.evaluate(script, table)
    return found


def tiles(page: Page) -> dict[str, str]:
    script = (
        """[...document.querySelectorAll(".tile")].map((tile) => [...tile.children].map((part) => part.innerText))"""
    )
    return {label: value for label, value, _ in page.evaluate(script)}


def test_the_page_shows_what_the_commands_say(filled: Daemon, serve: Serve, open_page: OpenPage) -> None:
    client = filled.connect()
    with client.attach("tuned"), client.attach("large"):
        page = open_page(serve(client))
        shown(page)
        until(page, "document.querySelectorAll('[aria-label=Holders] [data-row]').length === 2")
        until(page, "document.querySelectorAll('.sharing tbody tr').length === 4")

        stats = asked(filled, "stats")
        assert tiles(page) == {
            "Resident": size(stats["resident_bytes"]),
            "Logical": size(stats["logical_bytes"]),
            "Saved": size(stats["saved_bytes"]),
            "Checkpoints": str(stats["checkpoints"]),
            "Leases": str(stats["leases"]),
        }
        known = page.evaluate("weightd.state")
        (device,) = stats["devices"]
        for key in ("budget_bytes", "used_bytes", "live_bytes", "reusable_bytes", "in_flight_bytes", "free_bytes"):
            assert known["stats"]["devices"][0][key] == device[key]
        parts = page.evaluate(
            "import('weightd/devices.js').then(({ budgetParts }) => budgetParts(weightd.state.stats.devices[0]))"
        )
        assert sum(part["bytes"] for part in parts) == device["budget_bytes"]
        assert all(part["bytes"] >= 0 for part in parts)
        by_use = {part["kind"]: part["bytes"] for part in parts}
        (counted,) = (split(found) for found in filled.connect().stats().devices)
        assert (by_use["pinned"], by_use["leased"], by_use["idle"]) == (counted.pinned, counted.leased, counted.idle), (
            "as weightd top says it"
        )
        said = " ".join(page.locator(".legend").first.inner_text().split())
        assert [
            part["label"] for part in parts if part["bytes"] and f"{part['label']} {size(part['bytes'])}" not in said
        ] == []

        listed = asked(filled, "ls")
        assert sorted((row[0], *row[2:6]) for row in rows(page, "Checkpoints")) == sorted(
            (
                row["name"],
                *map(size, (row["total_bytes"], row["shared_bytes"], row["exclusive_bytes"])),
                str(row["leases"]),
            )
            for row in listed
        )
        held = asked(filled, "ps")
        assert sorted((row[0], row[1], row[2]) for row in rows(page, "Holders")) == sorted(
            (str(lease["pid"]), lease["checkpoint"], size(lease["bytes"])) for lease in held
        )


def test_the_map_agrees_with_the_books(filled: Daemon, serve: Serve, open_page: OpenPage) -> None:
    client = filled.connect()
    address = serve(client)
    page = open_page(address)
    shown(page)
    until(page, "weightd.state.pairs.pairs.length === 2")
    (device,) = client.stats().devices
    sums = page.evaluate(
        """() => {
            const sums = {};
            for (const { extents } of weightd.parts.devices.map("host").segments) {
                for (const { kind, length } of extents) sums[kind] = (sums[kind] ?? 0) + length;
            }
            return sums;
        }"""
    )
    assert sums["blobs"] == device.live_bytes
    assert sums.get("hole", 0) == device.reusable_bytes
    checkpoints = {info.name: info for info in client.checkpoints()}
    for info in checkpoints.values():
        assert page.evaluate(FREED, [info.content_digest]) == info.exclusive_bytes
    pair = [checkpoints[name].content_digest for name in ("large", "small")]
    alone = sum(checkpoints[name].exclusive_bytes for name in ("large", "small"))
    assert page.evaluate(FREED, pair) == alone + 10 * MIB
    page.get_by_role("button", name="large").first.click()
    until(page, "document.querySelector('.detail').innerText.includes('text_encoder 10.0 MiB')")


def test_what_it_says_would_be_freed_is_freed(filled: Daemon, folder: Path, serve: Serve, open_page: OpenPage) -> None:
    filled.command("load", folder / "other.safetensors", "--name", "other")
    client = filled.connect()
    address = serve(client)
    page = open_page(address)
    shown(page)
    until(page, f"{NAMES}.includes('other')")
    for name in ("other", "large", "small"):
        page.get_by_label(f"What if {name} were removed").check()
    until(page, "document.querySelector('.answer').innerText.startsWith('Without 3 checkpoints')")
    said = re.search(r"Without 3 checkpoints: ([\d.]+ [KMG]iB) less", page.locator("main").inner_text())
    assert said
    before = client.stats().devices[0].live_bytes
    for name in ("other", "large", "small"):
        client.remove(name)
    assert size(before - client.stats().devices[0].live_bytes) == said[1]
    until(page, f"{NAMES}.length === 2")


def test_a_daemon_that_is_restarted(folder: Path, open_page: OpenPage) -> None:
    daemon = Daemon(budget="512MiB")
    try:
        fill(daemon, folder)
        with weightd.connect(daemon.socket) as client, served(client) as address:
            page = open_page(address, expected=("ERR_CONNECTION_REFUSED",))
            shown(page)
            daemon.kill()
            until(page, "document.querySelector('[role=alert]').innerText.includes('The daemon is gone')")
            assert len(rows(page, "Checkpoints")) == 4
            daemon.start()
            until(page, "document.querySelector('[role=alert]').hidden")
            until(page, "document.querySelectorAll('[aria-label=Checkpoints] [data-row]').length === 0")
            daemon.command("load", folder / "other.safetensors", "--name", "again")
            eventually(lambda: [row[0] for row in rows(page, "Checkpoints")] == ["again"])
    finally:
        daemon.close(check=False)
