"""Fixtures for fleets on Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.ray_nodes import RayCluster, ray_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Three nodes with daemons and agents, on which this process is no driver yet: see `RayCluster.driver`."""
    with ray_cluster() as started:
        yield started
