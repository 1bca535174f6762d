"""Who may ask an agent for what: certificates, roles, and plain text. Nobody needs a daemon here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from support import certificates, checkpoints
from support.agents import NO_DAEMON, Agent, Receiver, agent, published
from support.daemon import eventually
from weightd.errors import DaemonUnreachableError, DrainingError, InvalidReferenceError, PermissionDeniedError
from weightd_fleet._proto.v1 import peer_pb2
from weightd_fleet.agent.addresses import AgentAddress, parse_address
from weightd_fleet.agent.agent import NodeSettings, running_agent
from weightd_fleet.agent.peer import Peer
from weightd_fleet.agent.tls import TlsFolder, require_loopback
from weightd_fleet.service.fleet_service import AgentAccess, FleetService
from weightd_fleet.service.members import FleetMember


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def secured(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Agent, str]]:
    """An agent with TLS, and the name of what it serves."""
    folder = tmp_path_factory.mktemp("secured")
    digest = published(folder / "state", checkpoints.write_random(folder / "m" / "model.safetensors", 3, 1000))
    tls = certificates.write(folder / "tls", authority, "agent")
    with agent(folder / "state", Path("/nonexistent"), f"--tls-dir={tls}") as started:
        yield started, digest


@pytest.mark.parametrize("role", ["agent", "client"])
def test_both_roles_read(role: str, secured: tuple[Agent, str], authority: trustme.CA, tmp_path: Path) -> None:
    source, digest = secured
    tls = certificates.write(tmp_path / "tls", authority, role)
    fetched = Receiver(tmp_path / "state", tls=tls).fetch(digest, source.address, folder=tmp_path / "files")
    assert fetched.moved_bytes == 3000
    with Peer(source.address, TlsFolder(tls)) as peer:
        assert [entry.name for entry in peer.inventory()] == [digest]


def test_no_role_reads_nothing(secured: tuple[Agent, str], authority: trustme.CA, tmp_path: Path) -> None:
    source, digest = secured
    for role in ("", "admin"):
        tls = TlsFolder(certificates.write(tmp_path / f"tls{role}", authority, role))
        with Peer(source.address, tls) as peer:
            for call in (peer.inventory, lambda peer=peer: peer.manifest(digest)):
                with pytest.raises(PermissionDeniedError, match="weightd://agent"):
                    call()
            with pytest.raises(PermissionDeniedError):
                next(peer.rows(digest, [(bytes(32), 1)], ""))


def test_agents_may_not_order(secured: tuple[Agent, str], authority: trustme.CA, tmp_path: Path) -> None:
    source, digest = secured
    with Peer(source.address, TlsFolder(certificates.write(tmp_path / "tls", authority, "agent"))) as peer:
        with pytest.raises(PermissionDeniedError):
            peer.drain()
        order = peer_pb2.FetchRequest(name=digest, sources=["127.0.0.1:1"], sink=peer_pb2.SINK_FILES)
        with pytest.raises(PermissionDeniedError):
            next(peer.fetch(order, 60.0))


def test_a_catalogue_needs_the_role_of_a_client(
    secured: tuple[Agent, str], authority: trustme.CA, tmp_path: Path
) -> None:
    source, digest = secured
    for role, answer in (("", "unknown"), ("agent", "live"), ("client", "live")):
        tls = certificates.write(tmp_path / f"tls{role}", authority, role)
        with contextlib.closing(FleetService(AgentAccess(source.address.port, str(tls)), "here")) as service:
            service.update([FleetMember("id", "n0", source.address.host)])
            (node,) = service.nodes()
            assert (node.state, node.serves) == (answer, (digest,) if answer == "live" else ())
            if role == "agent":
                with pytest.raises(PermissionDeniedError, match="'client'"):
                    service.load(digest, ["n0"])
                with pytest.raises(PermissionDeniedError, match="'client'"):
                    service.drain("n0")
            elif role == "client":
                with pytest.raises(DaemonUnreachableError, match="no weightd daemon"):
                    service.load(digest, ["n0"])
            else:
                assert "weightd://agent" in node.problem


@pytest.mark.parametrize("fault", ["foreign", "expired", "plaintext"])
def test_no_connection(fault: str, secured: tuple[Agent, str], authority: trustme.CA, tmp_path: Path) -> None:
    source, digest = secured
    issuer = trustme.CA() if fault == "foreign" else authority
    tls = certificates.write(tmp_path / "tls", issuer, "client", expired=fault == "expired")
    if fault == "foreign":  # it trusts the server; the server must not trust it
        (tls / "ca.pem").write_bytes(authority.cert_pem.bytes())
    receiver = Receiver(tmp_path / "state", tls=None if fault == "plaintext" else tls, patience=20.0)
    with pytest.raises(DaemonUnreachableError):
        receiver.fetch(digest, source.address)
    assert not (tmp_path / "state" / "files").exists()


def test_a_server_of_another_name_or_authority(authority: trustme.CA, tmp_path: Path) -> None:
    client = certificates.write(tmp_path / "client", authority, "client")
    for number, (issuer, host) in enumerate([(trustme.CA(), "127.0.0.1"), (authority, "127.0.0.2")]):
        folder = tmp_path / str(number)
        tls = certificates.write(folder, issuer, "agent", host=host)
        (folder / "ca.pem").write_bytes(authority.cert_pem.bytes())
        with (
            agent(folder / "state", Path("/nonexistent"), f"--tls-dir={tls}") as started,
            Peer(started.address, TlsFolder(client), 20.0) as peer,
            pytest.raises(DaemonUnreachableError),
        ):
            peer.inventory()


def test_certificates_are_read_again(authority: trustme.CA, tmp_path: Path) -> None:
    client = certificates.write(tmp_path / "client", authority, "client")
    tls = certificates.write(tmp_path / "tls", authority, "agent", expired=True)
    with agent(tmp_path / "state", Path("/nonexistent"), f"--tls-dir={tls}") as started:

        def reached() -> bool:
            try:
                with Peer(started.address, TlsFolder(client), 20.0) as peer:
                    return peer.inventory() == []
            except DaemonUnreachableError:
                return False

        assert not reached()
        certificates.write(tls, authority, "agent")
        eventually(reached)


def test_plain_text_stays_on_the_loopback(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        require_loopback(AgentAddress(host, 1), None)
    for host in ("10.0.0.1", "0.0.0.0", "::", "example.org", "localhost.example.org"):
        with pytest.raises(PermissionDeniedError, match="needs TLS"):
            require_loopback(AgentAddress(host, 1), None)
    with pytest.raises(PermissionDeniedError):
        Receiver(tmp_path).fetch("b3:" + "0" * 64, AgentAddress("10.0.0.1", 7411))


@pytest.mark.parametrize(
    ("listen", "advertise"),
    [("0.0.0.0:0", ""), ("[::]:0", ""), ("127.0.0.1:0", "0.0.0.0:7411"), ("0.0.0.0:0", "127.0.0.1:0")],
)
def test_an_agent_tells_no_address_that_nobody_can_connect_to(
    listen: str, advertise: str, authority: trustme.CA, tmp_path: Path
) -> None:
    tls = certificates.write(tmp_path / "tls", authority, "agent")
    settings = NodeSettings(str(tmp_path), str(NO_DAEMON), str(tls))
    told = parse_address(advertise) if advertise else None
    refused = pytest.raises(InvalidReferenceError, match="give --advertise HOST:PORT")
    with refused, running_agent(parse_address(listen), settings, 1, print, told):
        pass


def test_an_agent_listens_on_all_addresses_and_tells_one(authority: trustme.CA, tmp_path: Path) -> None:
    tls = certificates.write(tmp_path / "tls", authority, "agent")
    options = (f"--tls-dir={tls}", "--advertise=127.0.0.1:7411")
    with (
        agent(tmp_path, NO_DAEMON, *options, listen="0.0.0.0:0") as started,
        Peer(AgentAddress("127.0.0.1", started.address.port), TlsFolder(tls)) as peer,
    ):
        assert peer.inventory() == []


def test_drain_and_fetch_are_ordered(tmp_path: Path) -> None:
    digest = published(tmp_path / "one", checkpoints.write_random(tmp_path / "m" / "model.safetensors", 3, 1000))
    with agent(tmp_path / "one") as one, agent(tmp_path / "two") as two:
        order = peer_pb2.FetchRequest(name=digest, sources=[str(one.address)], sink=peer_pb2.SINK_FILES)
        with Peer(two.address, None) as peer:
            *progress, last = peer.fetch(order, 60.0)
            assert last.result.moved_bytes == 3000
            assert progress[-1].progress.done_bytes == progress[-1].progress.total_bytes
            assert [entry.name for entry in peer.inventory()] == [digest]
        with Peer(one.address, None) as peer:
            peer.drain()
        with pytest.raises(DrainingError):
            Receiver(tmp_path / "three").fetch(digest, one.address)
        assert Receiver(tmp_path / "three").fetch(digest, one.address, two.address).moved_bytes == 3000
