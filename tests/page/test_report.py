"""The report of `weightd plan --html`, opened as a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.pages import WIDTHS, OpenPage, fits, until
from weightd._sizes import size
from weightd.page.document import report_html

if TYPE_CHECKING:
    from playwright.sync_api import Page

GIB = 1 << 30
EVIL = "<img src=//evil.example>\u202e</script>"


def checkpoint(name: str, total: int, exclusive: int, *components: tuple[str, int, int]) -> dict[str, Any]:
    return {
        "name": name, "tensors": 291, "total_bytes": total, "exclusive_bytes": exclusive,
        "shared_bytes": total - exclusive, "shared_with": 1,
        "components": [
            {"name": part, "tensors": 100, "total_bytes": whole, "shared_bytes": shared}
            for part, whole, shared in components
        ],
    }  # fmt: skip


def plan() -> dict[str, Any]:
    """A base, a merged adapter, a full fine-tune, two pipelines, and one with a hostile name."""
    encoder = ("text_encoder", 18 * GIB, 18 * GIB)
    return {
        "title": f"Plan of {EVIL}",
        "made_at": "2026-01-02T03:04:05Z",
        "total_bytes": 100 * GIB, "unique_bytes": 75 * GIB, "saved_bytes": 25 * GIB, "saved_ratio": 0.25,
        "at_most": False,
        "checkpoints": [
            checkpoint("org/base", 15 * GIB, 8 * GIB),
            checkpoint("org/merged", 15 * GIB, 8 * GIB),
            checkpoint("org/full-fine-tune-with-a-name-that-goes-on-and-on-and-on", 15 * GIB, 15 * GIB),
            checkpoint("pipe/large", 34 * GIB, 16 * GIB, encoder, ("unet", 16 * GIB, 0)),
            checkpoint("pipe/small", 23 * GIB, 5 * GIB, encoder, ("unet", 5 * GIB, 0)),
            checkpoint(EVIL, GIB, GIB),
        ],
        "pairs": [
            {
                "checkpoints": ["pipe/large", "pipe/small"], "shared_bytes": 18 * GIB,
                "parts": [{"components": ["text_encoder", "text_encoder"], "shared_bytes": 18 * GIB}],
            },
            {
                "checkpoints": ["org/base", "org/merged"], "shared_bytes": 7 * GIB,
                "parts": [{"components": ["", ""], "shared_bytes": 7 * GIB}],
            },
        ],
        "pairs_left_out": 0,
        "differences": [
            {
                "checkpoints": ["org/base", "org/merged"], "equal_tensors": 227, "differing_tensors": 64,
                "differing_bytes": 8 * GIB, "only_tensors": [0, 1],
                "differing": [{"name": "layers.*.q_proj.weight", "count": 32, "bytes": 5 * GIB}],
                "only": [[], [{"name": "extra.*", "count": 1, "bytes": 12}]],
            }
        ],
        "near_duplicates": [
            {
                "a": "org/base", "b": "org/full-fine-tune-with-a-name-that-goes-on-and-on-and-on",
                "equal_elements": 0.83, "delta_ratio": 0.41, "sampled_bytes": 64 << 20,
            }
        ],
        "near_duplicates_left_out": 2,
        "budget": {
            "budget_bytes": 48 * GIB, "used_bytes": 39 * GIB, "fitting": 3,
            "order": [
                {"name": EVIL, "added_bytes": GIB, "total_bytes": GIB, "fits": True, "remove": []},
                {"name": "org/base", "added_bytes": 15 * GIB, "total_bytes": 16 * GIB, "fits": True, "remove": []},
                {"name": "pipe/small", "added_bytes": 23 * GIB, "total_bytes": 39 * GIB, "fits": True, "remove": []},
                {
                    "name": "pipe/large", "added_bytes": 16 * GIB, "total_bytes": 55 * GIB, "fits": False,
                    "remove": ["org/base"],
                },
            ],
        },
        "skipped": [{"path": "/models/broken.safetensors", "reason": "the header is longer than the file"}],
        "notes": ["Unique and shared come from the bytes."],
    }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """Write a report, and return its address."""

    def written(data: dict[str, Any]) -> str:
        path = tmp_path / "report.html"
        path.write_text(report_html(data))
        return path.as_uri()

    return written


@pytest.mark.parametrize(("width", "scheme"), [*product(WIDTHS, ("light", "dark"))])
def test_it_fits_and_is_accessible(
    write: Callable[[dict[str, Any]], str],
    open_page: OpenPage,
    inaccessible: Callable[[Page], list[str]],
    tmp_path: Path,
    width: int,
    scheme: str,
) -> None:
    page = open_page(write(plan()), width=width, scheme=scheme)
    until(page, "document.querySelectorAll('section').length === 7")
    assert fits(page)
    assert inaccessible(page) == []
    page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)


def test_it_answers_whether_two_would_share(write: Callable[[dict[str, Any]], str], open_page: OpenPage) -> None:
    page = open_page(write(plan()))
    page.get_by_label("Compare").select_option("org/merged")
    page.locator("select").nth(1).select_option("org/base")
    text = page.locator("main").inner_text()
    assert "They share 7.00 GiB: 47 % of org/merged, 47 % of org/base." in text
    assert "227 are equal and 64 differ (8.00 GiB)" in text
    assert "layers.*.q_proj.weight" in text
    assert "1 tensor only in org/merged" in text
    page.locator("select").nth(1).select_option("pipe/small")
    assert "They share nothing." in page.locator("main").inner_text()
    page.get_by_role("button", name="18.0 GiB of pipe/small").click()
    assert page.get_by_label("Compare").input_value() == "pipe/small"
    assert "They share 18.0 GiB: 78 % of pipe/small, 53 % of pipe/large." in page.locator("main").inner_text()


def test_it_says_what_fits_and_what_to_leave_out(write: Callable[[dict[str, Any]], str], open_page: OpenPage) -> None:
    page = open_page(write(plan()))
    text = page.locator("main").inner_text()
    assert "3 of 4 checkpoints fit" in text
    assert "no: remove org/base" in text
    assert "none of this is saved by weightd today" in text
    assert "2 pairs were not compared." in text
    assert page.locator("img").count() == 0
    assert r"<img src=//evil.example>\u{202e}</script>" in page.locator("h1").inner_text()


def test_figures_from_headers_are_bounds(write: Callable[[dict[str, Any]], str], open_page: OpenPage) -> None:
    page = open_page(write(plan() | {"at_most": True, "differences": [], "near_duplicates": None, "budget": None}))
    tiles = page.locator(".tile b").all_inner_texts()
    assert tiles == ["6", "100 GiB", "at least 75.0 GiB", "at most 25.0 GiB"]
    assert "not bytes" in page.locator(".notice").inner_text()
    assert "They share at most 18.0 GiB" in page.locator("main").inner_text()


def test_a_thousand_checkpoints(write: Callable[[dict[str, Any]], str], open_page: OpenPage) -> None:
    names = [f"org/model-{at:04}" for at in range(1000)]
    pairs = [{"checkpoints": [one, other], "shared_bytes": GIB, "parts": []} for one, other in pairwise(names)]
    data = plan() | {"checkpoints": [checkpoint(name, 3 * GIB, GIB) for name in names], "pairs": pairs, "budget": None}
    page = open_page(write(data | {"differences": [], "near_duplicates": []}))
    until(page, "document.querySelector('[aria-rowcount=\"1001\"]') !== null")
    assert page.locator("[data-row]").count() < 60
    assert page.locator(".sharing tbody tr").count() == 16


def test_sizes_are_written_as_the_command_writes_them(
    write: Callable[[dict[str, Any]], str], open_page: OpenPage
) -> None:
    page = open_page(write(plan()))
    edges = [0, 1, 999, 1000, 1023, 1024, 1 << 20, GIB, 1 << 40]
    values = sorted(
        {
            max(0, edge * factor // 1000 + step)
            for edge in edges
            for factor in (999, 1000, 9994, 99949)
            for step in (-1, 0, 1)
        }
    )
    script = "async (values) => { const { size } = await import('weightd/format.js'); return values.map(size); }"
    assert page.evaluate(script, values) == [size(value) for value in values]


def test_paths_are_shown_below_their_common_folder(write: Callable[[dict[str, Any]], str], open_page: OpenPage) -> None:
    data = json.loads(
        json.dumps(plan()).replace('"org/', '"/models/family/org/').replace('"pipe/', '"/models/family/pipe/')
    )
    data["checkpoints"].pop()
    page = open_page(write(data))
    text = page.locator("main").inner_text()
    assert "Names are below /models/family/" in text
    assert text.count("/models/family/") == 1
    assert "They share 18.0 GiB: 53 % of pipe/large, 78 % of pipe/small." in text


def test_names_of_paths_are_brief(write: Callable[[dict[str, Any]], str], open_page: OpenPage) -> None:
    page = open_page(write(plan()))
    script = "async (names) => { const { brief } = await import('weightd/format.js'); return names.map(brief); }"
    names = ["/models/a/model.gguf", "/model.gguf", "/a/b", "org/base", "/x/y/z/w", "a/b/c/d"]
    assert page.evaluate(script, names) == ["…/a/model.gguf", "/model.gguf", "/a/b", "org/base", "…/z/w", "a/b/c/d"]
