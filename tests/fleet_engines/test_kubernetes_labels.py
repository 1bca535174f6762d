"""Labels of a node through the real client of Kubernetes, on an API server that kmock plays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import StartDaemon
from support.agents import agent
from support.checkpoints import write_random
from support.daemon import environment, eventually
from support.kubernetes import GIB, ApiServer, api_server, checkpoint, label
from weightd.errors import InvalidReferenceError

pytest.importorskip("kmock")
pytest.importorskip("kubernetes")

import kubernetes.config

from weightd_fleet.engines.kubernetes_labels import NodeError, NodeLabels
from weightd_fleet.engines.kubernetes_node import KubernetesNode

OTHERS = {"kubernetes.io/hostname": "n0", "weightd.io/enabled": "true"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with api_server({**OTHERS, label(9): "4"}) as started:
        monkeypatch.setenv("KUBECONFIG", str(started.write_kubeconfig(tmp_path / "kubeconfig")))
        yield started


def test_labels_are_written_and_own_stale_ones_removed(server: ApiServer) -> None:
    pinned = [checkpoint(number, number * GIB) for number in range(40, 80)]
    labels = NodeLabels(KubernetesNode("n0"), lambda: pinned)
    labels.step()
    assert server.labels == {**OTHERS, **{label(n): "64" if n <= 64 else "128" for n in range(48, 80)}}
    del pinned[:]
    labels.step()
    labels.step()
    assert server.labels == OTHERS
    assert [len(server.requests(method)) for method in ("GET", "PATCH")] == [1, 2]


def test_a_patch_is_one_that_an_api_server_merges(server: ApiServer) -> None:
    """A real one replaces nothing else then; the emulator merges whatever it gets."""
    KubernetesNode("n0").change({label(9): None})
    (request,) = server.requests("PATCH")
    assert request.headers["Content-Type"] in (
        "application/strategic-merge-patch+json",
        "application/merge-patch+json",
    )
    assert request.data == {"metadata": {"labels": {label(9): None}}}


@pytest.mark.parametrize("status", [403, 404, 409, 429, 500, 503])
def test_an_error_of_the_server_is_a_line(server: ApiServer, status: int) -> None:
    server.kmock["get"] << status
    server.kmock["patch"] << status
    node = KubernetesNode("n0")
    for call in (node.labels, lambda: node.change({label(1): "1"})):
        with pytest.raises(NodeError, match=f"^node n0: the API server answers {status} [A-Z][A-Za-z ]+$"):
            call()
    assert NodeLabels(node, lambda: [checkpoint(1)]).step() == 60.0


@pytest.mark.parametrize("answer", [{"kind": "Node", "metadata": None}, [], b"<html>proxy</html>", {"metadata": 5}])
def test_what_is_no_node_is_a_line(server: ApiServer, answer: object) -> None:
    server.kmock["get"] << answer
    with pytest.raises(NodeError, match=r"^node n0: the API server('s answer is no node| answers Unsupported)"):
        KubernetesNode("n0").labels()


def test_a_token_that_is_gone_is_a_line(server: ApiServer) -> None:
    """The package reads it again every minute, in the middle of a request."""
    node = KubernetesNode("n0")

    def empty(_: object) -> None:
        raise kubernetes.config.ConfigException("Token file exists but empty.")

    configuration = node._api.api_client.configuration
    configuration.api_key["BearerToken"] = "bearer t"
    configuration.refresh_api_key_hook = empty
    with pytest.raises(NodeError, match=r"^node n0: its token cannot be read: Token file exists but empty\.$"):
        node.labels()


def test_no_server_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = ApiServer(None, "http://127.0.0.1:9")
    monkeypatch.setenv("KUBECONFIG", str(nobody.write_kubeconfig(tmp_path / "kubeconfig")))
    with pytest.raises(NodeError, match="no answer of the API server"):
        KubernetesNode("n0").labels()


@pytest.mark.parametrize("name", ["", "Node", "n0/status", "-n", "n" * 254, "a b"])
def test_a_name_that_no_node_can_have(server: ApiServer, name: str) -> None:
    with pytest.raises(InvalidReferenceError, match="is no name of a node"):
        KubernetesNode(name)
    assert server.requests("GET") == []


@pytest.mark.parametrize("content", ["a: [b", "text", "clusters: 5", ""])
def test_a_malformed_configuration_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    (tmp_path / "kubeconfig").write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(InvalidReferenceError, match="node n0: its cluster is not known"):
        KubernetesNode("n0")


def test_without_a_cluster_the_agent_says_so_and_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "weightd", "fleet", "agent", "--insecure", "--listen=127.0.0.1:0", "--node-labels=n0",
         f"--state-dir={tmp_path}"],
        env=environment() | {"KUBECONFIG": "/nonexistent"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "node n0: its cluster is not known" in done.stderr
    assert "ready" not in done.stdout


def test_an_agent_labels_its_node_by_its_daemon(server: ApiServer, start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    client = daemon.connect()
    for name, pin in (("kept", True), ("other", False)):
        client.load(write_random(tmp_path / f"{name}.safetensors", 2, 4096, seed=name), name=name, pin=pin)
    digest = client.inspect("kept").checkpoint.content_digest
    with agent(tmp_path / "state", daemon.socket, "--node-labels=n0"):
        eventually(lambda: label(9) not in server.labels)
    digits = digest.removeprefix("sha256:")[:16]
    assert server.labels == {**OTHERS, f"weightd.io/c-{digits}": "1"}  # and they stay when the agent ends
