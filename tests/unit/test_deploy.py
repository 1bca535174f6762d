"""What deploy/ asks Prometheus for: metrics, labels and values of labels that the daemon's page has."""

from __future__ import annotations

import json
import re
import tomllib
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from support.daemon import ROOT
from support.filled import Filled

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

metrics = pytest.importorskip("weightd_daemon.monitoring.metrics")
promql_parser = pytest.importorskip("promql_parser")
yaml = pytest.importorskip("yaml")

OF_PROMETHEUS = ("job", "instance")
"""Labels that Prometheus adds to what it scrapes."""
RANGE = "5m"


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def panels() -> list[dict[str, Any]]:
    board = json.loads((ROOT / "deploy/grafana/weightd.json").read_text())
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", RANGE)


@pytest.fixture(scope="module")
def series() -> Mapping[str, list[dict[str, str]]]:
    """The labels of all series of a metric, by its name."""
    filled = Filled(1)
    page = metrics.Metrics(filled.statistics)
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for metric in page._registry.collect():
        for sample in metric.samples:
            found[sample.name].append(sample.labels)
    found["up"].append({})
    return found


@pytest.mark.parametrize(("where", "expression"), list(expressions()), ids=lambda part: str(part)[:30])
def test_what_is_asked_for_is_there(series: Mapping[str, list[dict[str, str]]], where: str, expression: str) -> None:
    parsed = promql_parser.parse(expression).prettify()
    selectors = re.findall(r"([a-z_]+)\{([^}]*)\}", parsed)
    assert selectors, f"{where}: {parsed}"
    for name, inside in selectors:
        assert name in series, where
        matchers = {label: (how, value) for label, how, value in re.findall(r'(\w+)(=~|!=|!~|=)"([^"]*)"', inside)}
        assert "job" in matchers, f"{where}: {name} of any job"
        for label, (how, value) in matchers.items():
            if label not in OF_PROMETHEUS:
                values = {one[label] for one in series[name]}
                assert how == "!=" or value in values, f"{where}: {name} has {sorted(values)}"
    labels = {label for name, _ in selectors for one in series[name] for label in one} | set(OF_PROMETHEUS)
    for grouping in re.findall(r"by \(([^)]*)\)", parsed):
        assert set(grouping.replace(" ", "").split(",")) <= labels, where


def test_the_image_is_given_what_the_wheel_takes() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    taken = [*wheel["packages"], *wheel["force-include"], *wheel["shared-data"]]
    copied = re.findall(r"^COPY (\w+) /src/\1$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert {path.partition("/")[0] for path in taken} <= set(copied)


def test_alerts_say_what_has_happened_and_what_to_do() -> None:
    for rule in alerts():
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        headings = re.findall(r'See "([^"]+)" in the runbook', rule["annotations"]["description"])
        for heading in headings:
            assert f"### {heading}\n" in (ROOT / "docs/operations.md").read_text()


def test_every_metric_of_the_documentation_is_on_the_board_or_named_here() -> None:
    asked = " ".join(expression for _, expression in expressions())
    documented = set(re.findall(r"^\| `(weightd_\w+)`", (ROOT / "docs/operations.md").read_text(), re.MULTILINE))
    left_out = {name for name in documented if name not in asked}
    assert left_out == {
        "weightd_blobs", "weightd_books_limit_bytes", "weightd_build_info", "weightd_device_segments",
        "weightd_device_system_free_bytes", "weightd_digest_variants_total",
    }  # fmt: skip


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
