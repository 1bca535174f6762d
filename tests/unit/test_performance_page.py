"""docs/performance.md is what bench/page.py makes of the committed results, and no figure on it is another's."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))  # its scripts import each other so

import suite  # noqa: E402  # bench is on the path since the line before
from _page import BLOCK, NOT_MEASURED, PAGES, digest, figure, homeless, picture, renewed  # noqa: E402
from _results import FOLDER, Comparison, Part, latest, read, to_json  # noqa: E402

PAGE = (ROOT / "docs/performance.md").read_text()
_, _, FAST = (ROOT / "README.md").read_text().partition("\n## How fast is it?\n")
FAST, _, _ = FAST.partition("\n## ")
PARTS = latest(FOLDER)
NUMBER = re.compile(r"(?<![\w.,])-?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")


def made(*comparisons: Comparison, part: str = "peers", path: Path = Path("made-up.json"), **head: Any) -> Part:
    """A part as it is read from a file."""
    usual = {
        "part": part, "date": "2026-01-02", "command": "python bench/peers.py", "commit": "abc", "seconds": 1.5,
        "load_average": [0.25, 0.5], "machine": {"cores": 2}, "versions": {"torch": "2.13"},
        "parameters": {"bytes": 4096},
    }  # fmt: skip
    return Part(path, usual | head, {one.name: one for one in comparisons})


def numbers(text: str) -> set[str]:
    """All that stands in a text as a number of its own; dates, versions and names are none."""
    return set(NUMBER.findall(text))


def prose(text: str) -> str:
    """A page without what is made, without code and without links."""
    return re.sub(r"`[^`]*`|\]\([^)]*\)|^#.*$", "", BLOCK.sub("", text), flags=re.M)


def leaves(value: Any) -> Iterator[Any]:
    """All strings and numbers in JSON."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield key
            yield from leaves(below)
    elif isinstance(value, list):
        for below in value:
            yield from leaves(below)
    else:
        yield value


def known(paths: list[Path]) -> set[str]:
    """Every number that a page may hold: those of the results, as they are and as figures, and those in their words."""
    found: set[str] = set()
    for path in paths:
        body = json.loads(path.read_text())
        for one in body["comparisons"]:
            found.add(str(len(next(iter(one["samples"].values())))))
        for leaf in leaves(body):
            if isinstance(leaf, str):
                found |= numbers(leaf)
            else:
                found |= {figure(leaf), str(leaf), f"{leaf:,}"}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_made_of_the_committed_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert renewed(text, PARTS) == text, "run `.venv-peers/bin/python bench/page.py`"


def test_there_are_results() -> None:
    assert PARTS


@pytest.mark.parametrize("name", PARTS)
def test_a_picture_is_made_of_the_committed_results(name: str) -> None:
    drawn = (ROOT / "docs/images" / picture(name)).read_text()
    assert digest(PARTS[name]) in drawn, "run `.venv-peers/bin/python bench/page.py`"


def test_no_number_on_the_page_is_missing_in_the_results() -> None:
    blocks = "\n".join(body for _, _, body, _ in BLOCK.findall(PAGE))
    assert len(numbers(blocks)) > 20 * len(PARTS)
    assert numbers(blocks) - known([part.path for part in PARTS.values()]) == set()


def test_no_figure_is_written_into_the_prose() -> None:
    assert numbers(prose(PAGE)) == numbers(prose(FAST)) == set()


def test_the_readme_quotes_figures_of_the_page() -> None:
    quoted = numbers("".join(body for _, _, body, _ in BLOCK.findall(FAST)))
    assert len(quoted) >= 10
    assert quoted - numbers(PAGE) == set()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_a_committed_result_says_what_its_samples_say(path: Path) -> None:
    body = json.loads(path.read_text())
    assert path.name == f"{body['date']}-{body['part']}.json"
    for one, row in zip(read(path).comparisons.values(), body["comparisons"], strict=True):
        assert to_json(one) == row
    assert not re.search(r"/(?:tmp|home|root|work)\b", path.read_text()), "it names folders of a machine"


def test_figures_have_three_digits() -> None:
    values = [0.00012345, 0.0512, 0.5, 5.137, 47.96, 123.4, 99_999.6, 0.0, -0.034]
    assert [figure(value) for value in values] == [
        "0.000123", "0.0512", "0.5", "5.14", "48", "123", "100,000", "0", "-0.034",
    ]  # fmt: skip


def test_a_missed_prediction_is_listed_and_marked() -> None:
    samples = {"weightd": [5.0, 6.0], "mmap": [1.0, 1.0], "copy": [10.0, 10.0]}
    warm = Comparison("warm", "a load", "s", samples, "1.2 × mmap, 0.6 × copy", aims={"mmap": 1.2, "copy": 0.6})
    slope = Comparison("attach", "attach over names", "", {"weightd": [0.8, 0.9]}, "at most 0.3", aims={"weightd": 0.3})
    rate = Comparison("rate", "a rate", "GB/s", {"weightd": [1.0, 1.0], "mmap": [2.0, 2.0]}, "", "more", {"mmap": 1.5})
    template = "<!-- made: missed -->\n<!-- end -->\n<!-- made: peers -->\n<!-- end -->\n"
    listed, peers = (body for _, _, body, _ in BLOCK.findall(renewed(template, {"peers": made(rate, slope, warm)})))
    assert listed.splitlines()[2:] == [
        "| peers | a load | mmap | at most 1.2 × | 5.5 (5.25–5.75) × |",
        "| peers | a rate | mmap | at least 1.5 × | 0.5 (0.5–0.5) × |",
        "| peers | attach over names |  | at most 0.3 | 0.85 (0.825–0.875) |",
    ]
    assert "| a load | weightd | 5.5 (5.25–5.75) s |  | 1.2 × mmap, 0.6 × copy |" in peers
    assert "|  | mmap | 1 (1–1) s | 5.5 (5.25–5.75) × | **missed** |" in peers
    assert "| attach over names | weightd | 0.85 (0.825–0.875) |  | at most 0.3: **missed** |" in peers


def test_without_aims_no_prediction_is_missed() -> None:
    assert "\nNone.\n" in renewed("<!-- made: missed -->\n<!-- end -->\n", {"peers": made(SLOWER)})


def test_a_part_that_is_measured_apart_is_shown_with_a_result_only() -> None:
    template = "<!-- made: attacks -->\n<!-- end -->\n"
    assert renewed(template, {}) == template
    assert homeless(PAGE, {"attacks": None}) == []
    assert "| a load | weightd |" in renewed(template, {"attacks": made(SLOWER, part="attacks")})


TEMPLATE = """# Page

<!-- made: losses -->
old
<!-- end -->

<!-- made: peers -->
<!-- end -->

<!-- made: memory -->
<!-- end -->
"""
SLOWER = Comparison("warm", "a load", "s", {"weightd": [2.0, 4.0], "mmap": [1.0, 1.0], "copy": [8.0, 8.0]}, "twice")


def test_what_other_sides_do_better_stands_first() -> None:
    text = renewed(TEMPLATE, {"peers": made(SLOWER)})
    losses, peers, memory = (body for _, _, body, _ in BLOCK.findall(text))
    assert "| a load | 3 s | mmap | 1 s | 3 (2.5–3.5) × |" in losses
    assert "copy" not in losses
    assert "old" not in text
    assert "| a load | weightd | 3 (2.5–3.5) s |  | twice |" in peers
    assert "|  | copy | 8 (8–8) s | 0.375 (0.312–0.438) × |  |" in peers
    assert "rounds 2, bytes 4,096" in peers
    assert memory == f"{NOT_MEASURED}\n"


def test_the_worst_loss_is_the_first() -> None:
    worse = Comparison("cold", "a cold load", "s", {"weightd": [9.0, 9.0], "mmap": [1.0, 1.0]})
    less = Comparison("rate", "a rate", "GB/s", {"weightd": [1.0, 1.0], "mmap": [20.0, 20.0]}, better="more")
    text = renewed(TEMPLATE, {"peers": made(SLOWER, worse, less)})
    assert [text.index(f"| {what} |") for what in ("a rate", "a cold load", "a load")] == sorted(
        text.index(f"| {what} |") for what in ("a rate", "a cold load", "a load")
    )


def test_a_loss_within_the_spread_is_none() -> None:
    near = Comparison("warm", "a load", "s", {"weightd": [0.9, 1.2, 1.3, 0.8], "mmap": [1.0, 1.0, 1.0, 1.0]})
    assert "Nothing, by more than the spread." in renewed(TEMPLATE, {"peers": made(near)})


def test_making_a_page_twice_changes_nothing() -> None:
    once = renewed(TEMPLATE, {"peers": made(SLOWER)})
    assert renewed(once, {"peers": made(SLOWER)}) == once


def test_a_part_has_a_place_on_the_page() -> None:
    assert homeless(PAGE, PARTS) == homeless(PAGE, suite.PARTS) == []
    assert homeless(TEMPLATE, {name: made(SLOWER, part=name) for name in ("peers", "scale")}) == ["scale"]


def test_the_summary_quotes_what_is_measured_and_what_is_lost_first() -> None:
    warm = Comparison(
        "warm", "a load", "s", {"weightd": [2.0, 4.0], "fastsafetensors": [8.0, 8.0], "safetensors mmap": [1.0, 1.0]}
    )
    text = renewed("<!-- made: summary -->\n<!-- end -->\n", {"peers": made(warm)})
    assert [line for line in text.splitlines() if "a load" in line] == [
        "| a load | 3 s | safetensors mmap | 1 s | 3 (2.5–3.5) × |",
        "| a load | 3 s | fastsafetensors | 8 s | 0.375 (0.312–0.438) × |",
    ]
