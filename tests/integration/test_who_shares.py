"""What a daemon says of who shares with whom, and of what is pinned, leased and evictable: with real loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY
from support.daemon import Daemon, eventually
from support.users import ALICE, BOB, needs_root, open_to_all
from support.worker import Worker
from weightd.inspection import SharedComponents, SharedPair

StartDaemon = Callable[..., Daemon]
User = Callable[[Daemon, int], Worker]
MIB = 1 << 20


def pipeline(folder: Path, name: str, *, vae: str, unet: str) -> Path:
    """A pipeline of two components, each with four tensors that the seed decides."""
    root = folder / name
    checkpoints.write_random(root / "vae" / "diffusion_pytorch_model.safetensors", 4, MIB, seed=vae)
    checkpoints.write_random(root / "unet" / "diffusion_pytorch_model.safetensors", 4, 2 * MIB, seed=unet)
    part = '["diffusers", "X"]'
    (root / "model_index.json").write_text(f'{{"_class_name": "P", "vae": {part}, "unet": {part}}}')
    return root


def figures(client: weightd.Client) -> list[int]:
    """Pinned, leased, evictable and live MiB."""
    (device,) = client.stats().devices
    return [getattr(device, f"{what}_bytes") // MIB for what in ("pinned", "leased", "evictable", "live")]


@pytest.mark.backends(*EVERY, swept="cuda_ipc")
def test_pairs_and_figures_follow_what_happens(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.connect()
    assert client.sharing() == []
    with daemon.connect() as loading:
        loading.load_report(pipeline(tmp_path, "a", vae="v", unet="u"), name="a")
        loading.load_report(pipeline(tmp_path, "b", vae="v", unet="w"), name="b")
        loading.load_report(checkpoints.write_random(tmp_path / "vae.safetensors", 4, MIB, seed="v"), name="plain")
        assert figures(client) == [0, 20, 0, 20], "they wait for their client to attach"
    eventually(lambda: figures(client) == [0, 0, 20, 20])
    digests = {info.name: info.content_digest for info in client.checkpoints()}
    device = client.checkpoints()[0].device

    def pair(one: str, other: str, *components: tuple[str, str], only: int = 0) -> SharedPair:
        parts = tuple(SharedComponents(mine, theirs, 4 * MIB) for mine, theirs in components)
        return SharedPair(device, digests[one], digests[other], one, other, 4 * MIB, only * MIB, parts)

    assert client.sharing() == [
        pair("a", "b", ("vae", "vae")), pair("a", "plain", ("vae", "")), pair("b", "plain", ("vae", "")),
    ]  # fmt: skip
    assert client.sharing("b") == [pair("b", "a", ("vae", "vae")), pair("b", "plain", ("vae", ""))]
    assert client.sharing(device=device) == client.sharing()
    assert client.sharing(most=1) == client.sharing()[:1]
    alone = {info.name: info.exclusive_bytes // MIB for info in client.checkpoints()}
    assert alone == {"a": 8, "b": 8, "plain": 0}
    client.pin("a")
    assert figures(client) == [12, 0, 8, 20]
    with client.attach("plain"):
        assert figures(client) == [12, 4, 8, 20]
        client.unpin("a")
        assert figures(client) == [0, 4, 16, 20]
    eventually(lambda: figures(client) == [0, 0, 20, 20])
    client.remove("plain")
    assert client.sharing() == [pair("a", "b", ("vae", "vae"), only=4)]
    client.remove("b")
    assert client.sharing() == []
    assert client.inspect("a").checkpoint.exclusive_bytes == 12 * MIB
    with pytest.raises(weightd.NotFoundError):
        client.sharing("b")
    with pytest.raises(weightd.NotFoundError):
        client.sharing(device="GPU-00000000-nowhere")


@needs_root
def test_users_see_the_pairs_of_what_they_may_see(start_daemon: StartDaemon, user: User, short_path: Path) -> None:
    short_path.chmod(0o755)
    daemon = open_to_all(start_daemon, isolation="uid")
    paths = [
        str(checkpoints.write_random(short_path / f"{name}.safetensors", 4, MIB, seed="s", shared={0: ("t", at)}))
        for at, name in enumerate("ab")
    ]
    see = "result = attempt(lambda: [(pair.one_name, pair.other_name, pair.shared_bytes) for pair in client.sharing()])"
    alice, bob = user(daemon, ALICE), user(daemon, BOB)
    for who, name in ((alice, "a"), (alice, "b"), (bob, "a")):
        who.run("load(path, name=name)", path=paths["ab".index(name)], name=name)
    assert alice.run(see) == [["a", "b", 3 * MIB]]
    assert bob.run(see) == []
    with daemon.connect() as admin:
        assert len(admin.sharing()) == 1, "equal bytes of two users are not shared"
        assert figures(admin) == [0, 9, 0, 9]
    bob.run("a = client.attach('a'); a.close(); del a; client.remove('a')")
