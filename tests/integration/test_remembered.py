"""An engine that fuses tensors whose names no table has: private, remembered, and shared after `rm` and a new load."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import weightd
from support import checkpoints
from support.daemon import Daemon
from support.worker import Worker
from weightd import remembered
from weightd.binding import NOT_ADJACENT, Binding, bind
from weightd.recording import Recording

SIZE = 64
PARTS = ("zeta", "alpha", "mu")
LAYERS = 3
GROUP = len(PARTS) * SIZE * SIZE * 2


class Mixer(torch.nn.Module):
    """Layers whose one parameter has three stored tensors, in an order that is no order of names or files."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(
            torch.nn.Parameter(torch.empty(len(PARTS) * SIZE, SIZE, dtype=torch.bfloat16)) for _ in range(LAYERS)
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Put each stored tensor where it belongs, as engines do."""
        for name, stored in weights:
            _, layer, _, part, _ = name.split(".")
            self.layers[int(layer)].data.narrow(0, PARTS.index(part) * SIZE, SIZE).copy_(stored)


def stored(seed: int = 0, layers: int = LAYERS) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {
        f"net.{layer}.odd.{part}.weight": torch.randn(SIZE, SIZE, generator=chance).bfloat16()
        for layer in range(layers)
        for part in sorted(PARTS)
    }


def own_load(tensors: Mapping[str, torch.Tensor]) -> Mixer:
    engine = Mixer()
    with torch.no_grad():
        engine.load_weights(tensors.items())
    return engine


def serve(attachment: weightd.Attachment) -> tuple[Mixer, Binding, str]:
    """A recorded load, and what its report says of groups."""
    recording = Recording("cpu", [attachment])
    with recording.building():
        engine = Mixer()
    with recording.loading():
        engine.load_weights((key.name, attachment.tensor(key.name)) for key in attachment.tensors)
    binding = bind(engine, recording)
    return engine, binding, remembered.remember(attachment, binding.groups)


def equal(engine: Mixer, tensors: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(mine, own) for mine, own in zip(engine.layers, own_load(tensors).layers, strict=True))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own, also for the processes that a test spawns."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    yield folder / "weightd" / "groups"
    gc.collect()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(tmp_path / "m.safetensors", stored())


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file(tensors, path)
    return path


def inspected(daemon: Daemon, path: Path) -> list[tuple[str, bool]]:
    """Name and place of the remembered groups that `weightd inspect` shows."""
    groups = json.loads(daemon.command("inspect", path, "--format", "json").stdout)["groups"]
    return [(one["name"], one["in_a_row"]) for one in groups if one["remembered"]]


def released(client: weightd.Client) -> None:
    gc.collect()
    assert not client.leases()


def test_private_at_first_then_remembered_and_shared_after_a_reload(daemon: Daemon, path: Path) -> None:
    with daemon.connect() as client:
        with client.attach(path, groups=remembered.groups_for) as attachment:
            engine, binding, said = serve(attachment)
        assert {one.reason for one in binding.parameters} == {NOT_ADJACENT}
        assert binding.shared_bytes == 0
        digest = attachment.content_digest.removeprefix("sha256:")[:12]
        assert said == (
            f"this load did not know the order yet: net.*.odd.{{zeta,alpha,mu}}.weight ({LAYERS} parameters, "
            f"{LAYERS * GROUP // 1024}.0 KiB) would be shared after `weightd rm {digest}` and a new load, for "
            "which their order is remembered, unless another checkpoint has some of their tensors"
        )
        assert equal(engine, stored())
        released(client)
        daemon.command("rm", digest)
        with client.attach(path, groups=remembered.groups_for) as attachment:
            assert attachment.loaded is not None
            assert (attachment.loaded.order, attachment.loaded.groups) == ("requested", LAYERS)
            engine, binding, said = serve(attachment)
        assert said == ""
        assert binding.copied_bytes == 0
        assert binding.shared_bytes == LAYERS * GROUP
        assert equal(engine, stored())


@pytest.mark.parametrize("copied", [False, True])
def test_a_resident_checkpoint_in_another_order_says_so(
    daemon: Daemon, path: Path, tmp_path: Path, copied: bool
) -> None:
    """Whoever comes second, with the order known by then, is told that nothing is moved; by a load, too."""
    checkpoints.rest(path)
    with daemon.connect() as client:
        daemon.command("load", path)
        for number in range(2):
            file = save(tmp_path / f"{number}.safetensors", stored()) if copied else path
            with client.attach(file, groups=remembered.groups_for) as attachment:
                assert (attachment.loaded is not None) is copied
                _, binding, said = serve(attachment)
            assert binding.shared_bytes == 0
            why = "the checkpoint was resident in another order, and nothing in memory is moved"
            assert said.startswith(f"{why}: net.*.odd.")


SERVE = """
import sys
sys.path.insert(0, folder)
import weightd
from weightd import remembered
from integration import test_remembered
with weightd.connect() as client, client.attach(path, groups=remembered.groups_for) as attachment:
    engine, binding, said = test_remembered.serve(attachment)
result = binding.shared_bytes, binding.copied_bytes, said
"""


def test_another_process_of_the_same_user_profits(
    daemon: Daemon, spawn: Callable[[Daemon], Worker], path: Path, tmp_path: Path
) -> None:
    """So does a fine-tune: what is remembered goes by names, dtypes and shapes, not by content or path."""
    here = str(Path(__file__).parents[1])
    first, second = spawn(daemon), spawn(daemon)
    shared, copied, said = first.run(SERVE, folder=here, path=str(path))
    assert (shared, copied) == (0, LAYERS * GROUP)
    assert "`weightd rm " in said
    tuned = save(tmp_path / "tuned.safetensors", stored(seed=1))
    assert second.run(SERVE, folder=here, path=str(tuned)) == [LAYERS * GROUP, 0, ""]


def test_weightd_load_places_what_is_remembered(daemon: Daemon, path: Path) -> None:
    with daemon.connect() as client:
        with client.attach(path) as attachment:
            serve(attachment)
        assert inspected(daemon, path) == [(f"net.{at}.odd.{{zeta,alpha,mu}}.weight", False) for at in range(LAYERS)]
        assert (
            "\nnet.*.odd.{zeta,alpha,mu}.weight     0 of 3   72.0 KiB\n3 groups would lie in a row after `weightd rm`"
            in (daemon.command("inspect", path).stdout)
        )
        released(client)
        client.remove(attachment.content_digest)
        assert json.loads(daemon.command("load", path, "--format", "json").stdout)[0]["order"] == "requested"
        with client.attach(path) as attachment:
            engine, binding, said = serve(attachment)
        assert (binding.copied_bytes, said) == (0, "")
        assert [in_a_row for _, in_a_row in inspected(daemon, path)] == [True] * LAYERS
        assert equal(engine, stored())


def test_parts_that_another_checkpoint_has_are_no_promise(daemon: Daemon, path: Path, tmp_path: Path) -> None:
    """A base is resident in another order; of its fine-tune, whose order is known, one part is the base's."""
    base = stored()
    tuned = base | {name: one + 1 for name, one in base.items() if ".1." in name and "mu" not in name}
    with daemon.connect() as client:
        with client.attach(path) as attachment:
            serve(attachment)
        second = save(tmp_path / "tuned.safetensors", tuned)
        with client.attach(second, groups=remembered.groups_for) as attachment:
            engine, binding, said = serve(attachment)
    assert binding.shared_bytes == 0
    assert said == (
        f"net.*.odd.{{zeta,alpha,mu}}.weight ({LAYERS} parameters, {LAYERS * GROUP // 1024}.0 KiB) stay private "
        "although this load asked for their order: another checkpoint has some of their tensors already, or "
        "free memory is in pieces"
    )
    assert equal(engine, tuned)


@pytest.mark.parametrize("content", [b"", b"[", b'{"format":1,"groups":[[0,1],[99,2]]}', b"\xff" * 100])
def test_a_damaged_file_costs_no_load_and_is_written_anew(
    daemon: Daemon, path: Path, cache: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    def load(client: weightd.Client) -> tuple[Binding, str]:
        with client.attach(path, groups=remembered.groups_for) as attachment:
            engine, binding, said = serve(attachment)
        assert equal(engine, stored())
        del engine
        released(client)
        client.remove(attachment.content_digest)
        return binding, said

    with daemon.connect() as client:
        load(client)
        (file,) = cache.iterdir()
        file.write_bytes(content)
        assert load(client)[0].shared_bytes == 0
        assert [record.getMessage() for record in caplog.records] == [
            f"a remembered order of tensors is ignored: {file.name} is damaged"
        ]
        assert load(client)[0].copied_bytes == 0


def test_groups_of_hostile_files_change_no_value(daemon: Daemon, path: Path, cache: Path) -> None:
    with daemon.connect() as client:
        with client.attach(path) as attachment:
            serve(attachment)
        released(client)
        client.remove(attachment.content_digest)
        (file,) = cache.iterdir()
        file.write_text(json.dumps({"format": 1, "groups": [[0, 0], [], [1], [8, 0, 4], [0, 2], list(range(9))]}))
        with client.attach(path, groups=remembered.groups_for) as attachment:
            assert attachment.loaded is not None
            assert (attachment.loaded.groups, attachment.loaded.ignored_groups) == (1, ())
            engine, _, said = serve(attachment)
        assert "this load did not know the order yet" in said
        assert equal(engine, stored())


def test_a_cache_that_cannot_be_written_to_is_said(
    daemon: Daemon, path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file in the place of the folder")
    with daemon.connect() as client, client.attach(path, groups=remembered.groups_for) as attachment:
        _, binding, said = serve(attachment)
    assert binding.copied_bytes == LAYERS * GROUP
    assert "but their order cannot be remembered: " in said
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "a remembered order of tensors is ignored", "the order of tensors cannot be remembered",
    ]  # fmt: skip


def test_what_remember_is_given_is_checked(daemon: Daemon, path: Path, cache: Path) -> None:
    names = [f"net.0.odd.{part}.weight" for part in PARTS]
    with daemon.connect() as client, client.attach(path, tensors=names[:1]) as attachment:
        assert remembered.remember(attachment, []) == ""
        assert remembered.remember(attachment, [["no", "such"], [names[0], ("other", names[1])], []]) == ""
        assert not cache.exists()
        said = remembered.remember(attachment, [names, names[::-1]])
        assert said.count("`weightd rm ") == 1
        assert said.endswith("cannot be shared: one of its tensors is in a group already")
        known: Any = remembered.groups_for(list(attachment._manifest.tensors))
        assert known == [[("", name) for name in names]], "also where the attachment has only some of them"
