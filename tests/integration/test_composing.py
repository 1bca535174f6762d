"""Checkpoints that are composed of resident tensors, and checkpoints that come through memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY, Backend
from support.composed import Recipe, sealed
from support.content import content
from support.daemon import Daemon, eventually
from support.manager import Manager
from support.shared import SharedDaemons
from support.users import ADMIN, ALICE, BOB, needs_root, open_to_all
from support.worker import Worker
from weightd.composing import ComposedTensor, TensorSource
from weightd.types import CheckpointFile
from weightd_daemon.core.checkpoint import BYTES_OF_TENSOR

StartDaemon = Callable[..., Daemon]
User = Callable[[Daemon, int], Worker]

LENGTH = 1 << 17
FILES = (CheckpointFile("", "model.safetensors", {"format": "pt"}),)


@pytest.fixture
def daemon(shared_daemons: SharedDaemons, backend: Backend) -> Iterator[Daemon]:
    """A daemon that holds nothing."""
    with shared_daemons.on(backend) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[weightd.Client]:
    with weightd.connect(daemon.socket, timeout=60.0) as client:
        yield client


def load_part(client: weightd.Client, seed: str, count: int = 2, **options: bool) -> str:
    """Load tensors "t0", "t1" … through memory; returns the content digest."""
    rows = {f"t{at}": ("U8", (LENGTH,), checkpoints.random_bytes((seed, at), LENGTH)) for at in range(count)}
    with sealed(rows) as descriptor:
        loaded = client.load_memory(descriptor, **options)  # type: ignore[arg-type]  # passed through
    assert loaded is not None
    return loaded.content_digest


def tensor(
    name: str, digest: str, there: str = "t0", dtype: str = "U8", shape: tuple[int, ...] = (LENGTH,)
) -> ComposedTensor:
    return ComposedTensor(0, name, dtype, shape, TensorSource(digest, "", there))


@pytest.mark.backends(*EVERY)
def test_parts_become_one_checkpoint_and_may_go(client: weightd.Client, daemon: Daemon, tmp_path: Path) -> None:
    """Also a pipeline with an index, groups of equal tensors, and tensors without bytes."""
    zeros, shared = bytes(1 << 12), checkpoints.random_bytes("shared", LENGTH)
    layers = {f"l{at}.{name}": ("F32", (1 << 10,), zeros) for at in range(3) for name in ("bias", "scale")}
    one = {**layers, "embed": ("F32", (LENGTH // 4,), shared), "none": ("F32", (0, 4), b"")}
    two = {**layers, "head": ("F32", (LENGTH // 8, 2), shared)}
    checkpoints.write(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", one, {"format": "pt"})
    checkpoints.write(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", two)
    checkpoints.describe_pipeline(tmp_path)
    with client.attach(tmp_path) as attachment:
        recipe = Recipe(attachment)
    client.remove(recipe.content_digest)
    places = recipe.load_parts(client, [row % 3 for row in range(len(recipe.rows))])
    result = client.compose(recipe.files, recipe.tensors(places), name="whole", pin=True, reference="b3:1234")
    assert (result.content_digest, result.name, result.read_bytes) == (recipe.content_digest, "whole", 0)
    for digest in {place.content_digest for place in places if place}:
        client.remove(digest)
    (info,) = client.checkpoints()
    assert (info.name, info.pinned, info.leases) == ("whole", True, 1)
    with client.attach("whole") as attachment:
        again = Recipe(attachment)
        assert (again.files, again.rows, again.bytes) == (recipe.files, recipe.rows, recipe.bytes)
    assert client.verify("whole").done_blobs
    shown = daemon.command("inspect", "whole").stdout
    assert "b3:1234" in shown
    assert "files      none: it was composed of resident tensors" in shown
    loaded = client.load_report(tmp_path, name="whole")
    assert loaded is not None
    assert (loaded.content_digest, loaded.unique_bytes) == (recipe.content_digest, 0)
    assert client.inspect("whole").sources, "from now on its files are known"
    client.unpin("whole")


def test_a_type_and_a_shape_are_the_new_checkpoints_own(client: weightd.Client) -> None:
    digest = load_part(client, "a")
    halves = tensor("w", digest, dtype="BF16", shape=(LENGTH // 4, 2))
    client.compose(FILES, [halves], name="halves")
    with client.attach("halves") as attachment:
        (info,) = attachment.tensors.values()
        assert (info.dtype, info.shape) == ("BF16", (LENGTH // 4, 2))
        assert content(attachment, "w") == checkpoints.random_bytes(("a", 0), LENGTH)
        assert attachment.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (tensor("w", "sha256:" + "0" * 64), weightd.NotFoundError, "source sha256:0+ is not resident on host"),
        (tensor("w", "", there="gone"), weightd.NotFoundError, "source sha256:.*: tensor 'gone' is not in the"),
        (tensor("w", "", shape=(LENGTH, 2)), weightd.InvalidReferenceError, f"take {2 * LENGTH} bytes, and 't0'"),
        (tensor("w", "", dtype="GGML_Q8_0", shape=(LENGTH,)), weightd.InvalidReferenceError, "and 't0' of source"),
        (tensor("w", "", dtype="GGML_Q8_0", shape=(33,)), weightd.InvalidReferenceError, "none of GGML_Q8_0 with"),
        (tensor("w", "", dtype="F4", shape=(3,)), weightd.InvalidReferenceError, r"none of F4 with the shape \(3,\)"),
        (tensor("w", "", shape=(1 << 62, 4)), weightd.InvalidReferenceError, "none of U8 with the shape"),
        (tensor("good", ""), weightd.InvalidReferenceError, "tensor 'good' is named twice"),
        (ComposedTensor(1, "w", "U8", (0,)), weightd.InvalidReferenceError, "a file that it does not name"),
        (tensor("n" * 5000, ""), weightd.InvalidReferenceError, "longer than 4096 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_leaves_nothing(
    client: weightd.Client, wrong: ComposedTensor, error: type[Exception], message: str
) -> None:
    digest = load_part(client, "a")
    if wrong.source is not None and not wrong.source.content_digest:
        wrong = wrong._replace(source=wrong.source._replace(content_digest=digest))
    before = client.stats()
    with pytest.raises(error, match=message):
        client.compose(FILES, [tensor("good", digest, "t1"), wrong], name="new", pin=True)
    eventually(lambda: client.stats().books == before.books)
    assert [info.content_digest for info in client.checkpoints()] == [digest]
    assert client.names() == []
    assert len(client.leases()) == 1, "what was loaded waits still"


def test_names_are_refused_before_anything_is_done(client: weightd.Client) -> None:
    digest = load_part(client, "a")
    for name in ("a\nb", "sha256:", "n" * 1025):
        with pytest.raises(weightd.InvalidReferenceError):
            client.compose(FILES, [tensor("w", digest)], name=name)
    assert len(client.checkpoints()) == 1


def test_a_source_that_was_only_loaded_for_it_waits_no_more(client: weightd.Client, daemon: Daemon) -> None:
    digest = load_part(client, "a")
    with weightd.connect(daemon.socket, timeout=60.0) as other:
        load_part(other, "a")
        client.compose(FILES, [tensor("w", digest)], detached=True)
        assert len(client.leases()) == 1, "that of the other"
        with pytest.raises(weightd.InUseError):
            client.remove(digest)
    eventually(lambda: client.leases() == [])
    client.remove(digest)
    (composed,) = client.checkpoints()
    assert (composed.total_bytes, composed.leases, composed.names) == (LENGTH, 0, ())


def test_the_events_of_a_composition_are_those_of_a_load(client: weightd.Client) -> None:
    digest = load_part(client, "a", detached=False)
    result = client.compose(FILES, [tensor("w", digest)], name="whole")
    told = [event for event in client.events() if event.load and event.load == max(e.load for e in client.events())]
    assert [event.kind for event in told] == ["load_begun", "sealed", "load_ended"]
    assert (told[-1].reason, told[-1].content_digest, told[-1].unique_bytes, told[-1].read_bytes) == (
        "OK", result.content_digest, 0, 0,
    )  # fmt: skip


@pytest.mark.parametrize("seals", ["none", "file"])
def test_memory_that_somebody_may_change_is_not_loaded(client: weightd.Client, tmp_path: Path, seals: str) -> None:
    path = checkpoints.write_random(tmp_path / "a.safetensors", 1, 100)
    descriptor = os.open(path, os.O_RDONLY) if seals == "file" else os.memfd_create("a", os.MFD_ALLOW_SEALING)
    try:
        with pytest.raises(weightd.InvalidReferenceError, match="is no memfd that is sealed"):
            client.load_memory(descriptor)
    finally:
        os.close(descriptor)


def test_books_have_room_or_it_is_refused(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(books="1MiB")
    client = daemon.connect()
    digest = load_part(client, "a")
    many = [ComposedTensor(0, f"e{at}", "F32", (0,)) for at in range((1 << 20) // BYTES_OF_TENSOR)]
    with pytest.raises(weightd.CapacityError) as caught:
        client.compose(FILES, [tensor("w", digest), *many], name="many")
    assert caught.value.metadata["limit"] == "books"
    client.compose(FILES, [tensor("w", digest), *many[:200]], name="few")
    assert {info.name for info in client.checkpoints()} == {"", "few"}


COMPOSE = """
from weightd.composing import ComposedTensor, TensorSource
from weightd.types import CheckpointFile
tensors = [ComposedTensor(0, "w", "U8", (100,), TensorSource(digest, "", "t0"))]
result = attempt(lambda: client.compose([CheckpointFile("", "model")], tensors).content_digest)
"""


@needs_root
def test_tensors_of_another_sharing_domain_are_not_there(
    start_daemon: StartDaemon, user: User, short_path: Path
) -> None:
    """Not for an admin either, who may list them: blobs are shared within a domain only."""
    short_path.chmod(0o755)
    path = checkpoints.write_random(short_path / "a.safetensors", 1, 100)
    daemon = open_to_all(start_daemon, isolation="uid", admins=str(ADMIN))
    alice = user(daemon, ALICE)
    digest = alice.run("result = client.load(path).content_digest", path=str(path))
    for uid in (BOB, ADMIN):
        refused = user(daemon, uid).run(COMPOSE, digest=digest)
        assert refused[0] == "NotFoundError"
        assert "is not resident on host" in refused[1]
    assert alice.run(COMPOSE, digest=digest).startswith("sha256:")


def test_it_outlives_the_daemon_and_its_parts(start_daemon: StartDaemon, short_path: Path) -> None:
    manager = Manager(short_path / "notify")
    try:
        daemon = start_daemon(manager=manager)
        client = daemon.connect()
        digest = load_part(client, "a")
        client.compose(FILES, [tensor("w", digest, "t1")], name="whole", pin=True)
        client.compose(FILES, [tensor("w", digest, "t1")], name="whole", reference="b3:12")
        client.remove(digest)
        daemon.kill()
        daemon.start()
        client = daemon.connect()
        (info,) = client.checkpoints()
        assert (info.name, info.pinned) == ("whole", True)
        details = client.inspect("whole")
        assert (details.sources, details.reference) == ((), "b3:12")
        with client.attach("whole") as attachment:
            assert content(attachment, "w") == checkpoints.random_bytes(("a", 1), LENGTH)
        again = load_part(client, "b")
        client.compose(FILES, [tensor("w", info.content_digest, "w"), tensor("v", again)], name="more")
    finally:
        manager.close()
