"""Fixtures for fleets on Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.ray_nodes import RayCluster, ray_cluster

RAYS_WARNINGS = ("ignore:Using extra keyword arguments on `Field` is deprecated:DeprecationWarning",)


def pytest_configure(config: pytest.Config) -> None:
    """Ignore warnings of Ray's own code."""
    for line in RAYS_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Three nodes with daemons and agents, on which this process is no driver yet: see `RayCluster.driver`."""
    with ray_cluster() as started:
        yield started
