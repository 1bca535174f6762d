"""Documents of pages: they hold all that they need, allow nothing else, and quote what they are given."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from weightd.page.document import read_assets, report_html, web_document

MODULES = {name: asset.content.decode() for name, asset in read_assets().items() if name.endswith(".js")}


def between(text: str, begin: str, end: str) -> str:
    return text.partition(begin)[2].partition(end)[0]


def hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def imported(source: str) -> set[str]:
    return set(re.findall(r'^import [^;]+? from "([^"]+)";', source, re.MULTILINE | re.DOTALL))


def test_modules_import_what_is_there_and_nothing_else() -> None:
    known = {f"weightd/{name}" for name in MODULES}
    assert {name: imported(source) - known for name, source in MODULES.items() if imported(source) - known} == {}
    for name, source in MODULES.items():
        assert len(imported(source)) == len(re.findall(r"^import ", source, re.MULTILINE)), name


def test_modules_do_not_import_in_circles() -> None:
    edges = {f"weightd/{name}": imported(source) for name, source in MODULES.items()}
    while leaves := {name for name, needed in edges.items() if not needed & edges.keys()}:
        edges = {name: needed for name, needed in edges.items() if name not in leaves}
    assert edges == {}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_small_and_says_what_it_is(name: str) -> None:
    lines = MODULES[name].splitlines()
    assert lines[0].startswith("// ")
    assert len(lines) <= 400


@pytest.mark.parametrize(
    "forbidden", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:"]
)
def test_no_module_parses_html_or_names_a_host(forbidden: str) -> None:
    assert [name for name, source in MODULES.items() if forbidden in source] == []


def test_the_report_is_one_file() -> None:
    made = report_html({"title": "A plan"})
    modules = json.loads(between(made, '<script type="importmap">', "</script>"))["imports"]
    for name, source in MODULES.items():
        kind, _, content = modules[f"weightd/{name}"].partition(";base64,")
        assert (kind, base64.b64decode(content).decode()) == ("data:text/javascript", source)
    outside = made.replace(json.dumps({"imports": modules}), "")
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", outside) == []
    assert "url(" not in outside


def test_the_report_allows_what_it_holds_by_its_hash() -> None:
    made = report_html({})
    policy = between(made, 'http-equiv="Content-Security-Policy" content="', '"')
    inline = [
        between(made, '<script type="importmap">', "</script>"),
        between(made, '<script type="module">', "</script>"),
    ]
    assert all(hashed(text) in between(policy, "script-src", ";") for text in inline)
    assert hashed(between(made, "<style>", "</style>")) in between(policy, "style-src", ";")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


def test_a_name_cannot_leave_its_place_in_the_report() -> None:
    evil = '</script></title><script>alert(1)</script><!-- "$modules" é'
    made = report_html({"title": evil, "checkpoints": [{"name": evil}]})
    assert "<script>alert" not in made
    assert json.loads(between(made, '<script type="application/json" id="report">', "</script>")) == {
        "title": evil,
        "checkpoints": [{"name": evil}],
    }


def test_the_page_names_its_modules_and_allows_its_own_alone() -> None:
    document = web_document("/assets/")
    page = document.content.decode()
    modules = between(page, '<script type="importmap">', "</script>")
    assert json.loads(modules)["imports"] == {f"weightd/{name}": f"/assets/{name}" for name in MODULES}
    assert f"script-src 'self' {hashed(modules)};" in document.policy
    assert "unsafe" not in document.policy
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page)) == {"data:,", "/assets/page.css", "/assets/live.js"}
