"""The page of `weightd web` on a client that holds what the test says."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from dataclasses import replace
from http.server import HTTPServer, SimpleHTTPRequestHandler
from itertools import product
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from support.fake_holdings import GIB, MIB, FakeHoldings, crowd, family
from support.pages import WIDTHS, OpenPage, fits, shown, until
from support.served_page import served
from weightd._sizes import size
from weightd.cli import browsing
from weightd.types import Stats

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Serve = Callable[[FakeHoldings], str]
REFUSED = ("401 (Unauthorized)",)
GONE = ("ERR_CONNECTION_REFUSED", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET", "401 (Unauthorized)")


@pytest.fixture
def held() -> FakeHoldings:
    return family()


@pytest.fixture
def address(held: FakeHoldings, serve: Serve) -> str:
    return serve(held)


def test_the_file_by_which_the_command_opens_a_browser_leads_to_the_page(
    browser: Browser, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    page = browser.new_page()
    with browsing._opened(address):
        page.goto(opened[0])
        page.wait_for_url(address)
        page.get_by_role("heading", name="Checkpoints").wait_for()
    page.close()


def texts(page: Page, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


@pytest.mark.parametrize(("width", "scheme"), [*product(WIDTHS, ("light", "dark"))])
def test_it_fits_and_is_accessible(
    address: str,
    open_page: OpenPage,
    inaccessible: Callable[[Page], list[str]],
    tmp_path: Path,
    width: int,
    scheme: str,
) -> None:
    page = open_page(address, width=width, scheme=scheme)
    shown(page)
    page.get_by_role("button", name="org/merged-adapter").first.click()
    page.get_by_role("button", name="Show the 40 tensors").click()
    page.get_by_text("Segments as a table").click()
    until(page, "document.querySelector('details table') && document.querySelector('.detail .window [data-row]')")
    assert fits(page)
    assert inaccessible(page) == []
    page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)


def test_the_map_has_the_colours_of_the_checkpoints(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    shown(page)
    colours = page.evaluate(
        """() => {
            const canvas = document.querySelector("canvas.map");
            const found = {};
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            for (let at = 0; at < data.length; at += 4) {
                const key = [data[at], data[at + 1], data[at + 2]].join();
                found[key] = (found[key] ?? 0) + 1;
            }
            return found;
        }"""
    )
    for wanted in ("0,114,178", "230,159,0", "0,158,115", "204,121,167", "86,180,233", "195,201,209"):
        assert colours.get(wanted, 0) > 500, wanted


def test_a_click_on_the_map_opens_the_checkpoint(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    shown(page)
    canvas = page.locator("canvas.map")
    canvas.hover(position={"x": 100, "y": 25})
    until(page, "document.querySelector('.tip').innerText.includes('org/base + org/merged-adapter')")
    canvas.click(position={"x": 100, "y": 25})
    assert page.locator(".detail h2").inner_text() == "org/base"
    canvas.click(position={"x": 100, "y": 25})
    assert page.locator(".detail h2").inner_text() == "org/merged-adapter"


def test_from_a_checkpoint_to_its_partners_and_tensors(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    shown(page)
    page.get_by_role("button", name="org/merged-adapter").first.focus()
    page.keyboard.press("Enter")
    detail = page.locator(".detail")
    until(page, "document.querySelector('.detail').innerText.includes('Only these two')")
    assert "Removing it frees 1.25 GiB" in detail.inner_text()
    partner = detail.get_by_role("row", name="org/base")
    assert "1.25 GiB" in partner.inner_text()
    assert "50 %" in partner.inner_text()
    detail.get_by_role("button", name="Show the 40 tensors").click()
    until(page, "document.querySelector('.detail .window [data-row]') !== null")
    first = detail.locator(".window [data-row]").first.inner_text()
    assert first.split() == ["layers.0.base0", "BF16", "33554432", "64.0", "MiB", "3", "checkpoints", "1"]
    detail.get_by_role("button", name="org/base").click()
    assert page.locator(".detail h2").inner_text() == "org/base"
    assert "python serve.py --model org/base" in detail.inner_text()
    page.get_by_role("button", name="Close").click()
    assert not detail.is_visible()


def test_what_to_remove(address: str, open_page: OpenPage, held: FakeHoldings) -> None:
    page = open_page(address)
    shown(page)
    for name in ("org/full-fine-tune", "org/merged-adapter"):
        page.get_by_label(f"What if {name} were removed").check()
    assert "Without 2 checkpoints: 3.69 GiB less." in page.locator("main").inner_text()
    page.get_by_label("What if pipeline/small were removed").check()
    page.get_by_label("What if pipeline/large were removed").check()
    text = page.locator("main").inner_text()
    assert f"Without 4 checkpoints: {size(9456 * MIB)} less, 2.81 GiB of it shared only between them." in text
    assert "pipeline/large cannot be removed while processes hold it." in text
    needed = page.get_by_label("Bytes needed")
    needed.fill("10 GiB")
    assert "Nothing: 12.3 GiB can be had at once." in page.locator("main").inner_text()
    needed.fill("14g")
    text = page.locator("main").inner_text()
    assert "this has to go: org/full-fine-tune (2.44 GiB only here, used 1 day ago). It gives back 2.44 GiB" in text
    needed.fill("18 GiB")
    text = page.locator("main").inner_text()
    assert "Everything idle gives back 4.47 GiB, which is not enough." in text
    assert "org/base (pinned, 2 leases), pipeline/large (1 lease)" in text
    needed.fill("much")
    assert "This is no size" in page.locator("main").inner_text()
    needed.fill("30 GiB")
    assert "more than the whole budget" in page.locator("main").inner_text()
    assert held.budget == 24 * GIB


class Several(FakeHoldings):
    """As FakeHoldings, with a second device that is absent."""

    def stats(self) -> Stats:
        found = super().stats()
        (host,) = found.devices
        gpu = replace(host, uuid="GPU-0b5a8f7e-1", kind="cuda_vmm", name="A GPU", absence="its driver hangs")
        return replace(found, devices=(host, gpu))


def test_a_device_that_is_absent(serve: Serve, open_page: OpenPage) -> None:
    held = Several()
    held.hold("base", [("a", 8 * MIB)])
    page = open_page(serve(held))
    shown(page)
    text = page.locator("section", has_text="A GPU (GPU-0b5a8f7e)").inner_text()
    assert "The device is absent: its driver hangs" in text
    assert page.locator("canvas.map:visible").count() == 1
    page.get_by_label("Bytes needed").fill("1 GiB")
    page.get_by_label("Device", exact=True).select_option("GPU-0b5a8f7e-1")
    assert "The device is absent, nothing can be loaded there." in page.locator("main").inner_text()


def test_sorting_and_filtering(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    shown(page)
    names = "[aria-label=Checkpoints] [data-row] th"
    page.get_by_role("button", name="Only here").click()
    assert texts(page, names)[0] == "org/full-fine-tune"
    page.get_by_role("button", name="Only here").click()
    assert texts(page, names)[0] == "pipeline/small"
    assert page.locator("th[aria-sort=ascending]").first.inner_text().startswith("Only here")
    page.get_by_label("Filter").first.fill("PIPE")
    assert sorted(texts(page, names)) == ["pipeline/large", "pipeline/small"]
    assert "2 of 5 checkpoints" in page.locator("main").inner_text()


def test_names_are_text_whatever_they_hold(held: FakeHoldings, serve: Serve, open_page: OpenPage) -> None:
    evil = "<img src=//evil.example onerror=alert(1)>\u202e\x1b[31m</script>"
    held.hold(evil, [("evil", 9 * GIB), ("base0", 64 * MIB)], holders=1)
    address = serve(held)
    page = open_page(address)
    shown(page)
    assert page.locator("img").count() == 0
    written = r"<img src=//evil.example onerror=alert(1)>\u{202e}\u{1b}[31m</script>"
    page.get_by_role("button", name=written).first.click()
    assert page.locator(".detail h2").inner_text() == written


def test_it_draws_only_what_has_changed(serve: Serve, open_page: OpenPage) -> None:
    held = crowd(1000)
    address = serve(held)
    page = open_page(address)
    shown(page)
    until(page, "document.querySelector('.sharing .cell') !== null")
    assert page.locator("[data-row]").count() < 80
    assert page.locator("[aria-rowcount='1001']").count() == 1
    assert page.locator(".sharing tbody tr").count() == 16
    draws = "[weightd.parts.checkpoints.table.draws, weightd.parts.devices.map('host').draws]"
    rows, maps = page.evaluate(draws)
    held.hold("org/another", [("another", 900 * MIB)])
    until(page, "weightd.state.checkpoints.length === 1001 && weightd.state.stats.checkpoints === 1001")
    until(page, f"({draws})[1] === {maps + 1}")
    assert page.evaluate(draws) == [rows + 1, maps + 1]
    page.evaluate("document.querySelector('.window').scrollTop = 20000")
    until(page, "Number(document.querySelector('.window [data-row]').ariaRowIndex) > 500")
    assert page.locator("[data-row]").count() < 100
    assert fits(page)


def test_a_scroll_makes_only_the_rows_that_come_into_view(serve: Serve, open_page: OpenPage) -> None:
    address = serve(crowd(1000))
    page = open_page(address)
    shown(page)
    before = page.evaluate("weightd.parts.checkpoints.table.draws")
    for step in range(1, 6):
        page.evaluate(f"document.querySelector('.window').scrollTop = {step * 408}")
        until(page, f"Number(document.querySelector('.window [data-row]').ariaRowIndex) > {step * 12 - 12}")
    assert page.evaluate("weightd.parts.checkpoints.table.draws") - before <= 5 * 12 + 2


def test_a_daemon_that_goes_and_comes_back(held: FakeHoldings, address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    shown(page)
    held.gone = True
    until(page, "document.querySelector('[role=alert]').innerText.includes('The daemon is gone')")
    assert "org/base" in page.locator("main").inner_text()
    assert page.locator("body.old").count() == 1
    held.gone, held.pid = False, 78
    held.remove("org/full-fine-tune")
    until(page, "document.querySelector('[role=alert]').hidden && !document.querySelector('body.old')")
    until(page, "document.querySelectorAll('[aria-label=Checkpoints] [data-row]').length === 4")
    assert "process 78" in page.locator(".status").inner_text()


def test_a_command_that_goes_and_one_that_comes(held: FakeHoldings, open_page: OpenPage) -> None:
    with served(held) as address:
        page = open_page(address, expected=GONE)
        shown(page)
    alert = "document.querySelector('[role=alert]').innerText"
    until(page, f"{alert}.includes('The command `weightd web` has gone')")
    port = int(address.split("#")[0].rsplit(":", 1)[1].strip("/"))
    with served(held, port) as again:
        until(page, f"{alert}.includes('does not know this page')")
        page.evaluate(f"location.hash = '{again.split('#')[1]}'")
        page.reload()
        shown(page)


def test_a_wrong_token(address: str, open_page: OpenPage) -> None:
    page = open_page(address.split("#")[0] + "#token=wrong", expected=REFUSED)
    until(page, "document.querySelector('[role=alert]').innerText.includes('does not know this page')")
    assert page.locator("[data-row]").count() == 0
    assert page.evaluate("weightd.state.stats") is None


def test_a_foreign_page_cannot_ask(address: str, browser: Browser) -> None:
    url, token = address.split("#token=")
    foreign = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    serving = Thread(target=foreign.serve_forever)
    serving.start()
    try:
        page = browser.new_page()
        own = f"http://127.0.0.1:{foreign.server_port}/missing"
        page.goto(own)
        ask = "([url, headers]) => fetch(url, { headers }).then((answer) => answer.status, (error) => error.name)"
        state = f"{url}api/state"
        assert page.evaluate(ask, [own, {}]) == 404
        assert page.evaluate(ask, [state, {}]) == "TypeError"
        assert page.evaluate(ask, [state, {"Authorization": f"Bearer {token}"}]) == "TypeError"
        page.close()
    finally:
        foreign.shutdown()
        serving.join()
        foreign.server_close()
