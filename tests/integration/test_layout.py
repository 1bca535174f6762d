"""What frameworks fuse is a view of the store: where tensors lie, what is copied, and why."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import weightd
from support import checkpoints, fake_torch
from support.backends import CUDA, EVERY, Backend
from support.daemon import Daemon, eventually
from support.shared import SharedDaemons
from weightd.attachment import Attachment
from weightd.integrations.fusing import TorchFusionMode

StartDaemon = Callable[..., Daemon]
Arrays = dict[str, np.ndarray]
MIB = 1 << 20
WIDTH, INNER, EXPERTS = 128, 256, 4
everywhere = pytest.mark.backends(*EVERY, swept="cuda_ipc")


@pytest.fixture
def here(shared_daemons: SharedDaemons, tensors_on_the_double: None, backend: Backend) -> Iterator[Daemon]:
    with shared_daemons.on(backend) as daemon:
        yield daemon


@pytest.fixture
def tensors_on_the_double(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.library is not None:
        monkeypatch.setattr("weightd._tensors._raw", fake_torch._raw)


def random(seed: object, *shape: int) -> np.ndarray:
    size = int(np.prod(shape)) * 4
    return np.frombuffer(checkpoints.random_bytes(seed, size), np.uint32).view(np.float32).reshape(shape)


def mixtral(seed: object = "base", layers: int = 2) -> Arrays:
    """A Mixtral of random bits, names sorted as in its files."""
    found: Arrays = {"lm_head.weight": random((seed, "head"), 64, WIDTH)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes = {f"{block}.block_sparse_moe.gate.weight": (EXPERTS, WIDTH)}
        for expert in range(EXPERTS):
            stem = f"{block}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{stem}.{part}.weight": (INNER, WIDTH) for part in ("w1", "w3")}
            shapes[f"{stem}.w2.weight"] = (WIDTH, INNER)
        shapes |= {f"{block}.self_attn.{part}_proj.weight": (64 if part in "kv" else WIDTH, WIDTH) for part in "qkvo"}
        found |= {name: random((seed, name), *shapes[name]) for name in sorted(shapes)}
    return found


def fused(arrays: Arrays) -> Arrays:
    """What is made of the experts of each layer."""
    found: Arrays = {}
    for there in sorted({name.partition(".experts.")[0] for name in arrays if ".experts." in name}):
        experts = [f"{there}.experts.{expert}" for expert in range(EXPERTS)]
        pairs = [np.concatenate([arrays[f"{e}.w1.weight"], arrays[f"{e}.w3.weight"]]) for e in experts]
        found[f"{there}.experts.gate_up_proj"] = np.stack(pairs)
        found[f"{there}.experts.down_proj"] = np.stack([arrays[f"{e}.w2.weight"] for e in experts])
    return found


def fuse(attachment: Attachment, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What torch makes of the experts of a layer, as transformers does; and of what is private the reasons."""
    state = attachment.state_dict()
    stem = f"model.layers.{layer}.block_sparse_moe.experts"
    parts = {part: [state[f"{stem}.{e}.{part}.weight"] for e in range(EXPERTS)] for part in ("w1", "w2", "w3")}
    with TorchFusionMode(attachment) as fusing:
        made = {
            GATE_UP.format(layer): torch.cat([torch.stack(parts["w1"]), torch.stack(parts["w3"], dim=0)], dim=1),
            DOWN.format(layer): torch.stack(parts["w2"]),
        }
    private = {name: one for name, one in made.items() if not attachment.holds(one.data_ptr(), one.nbytes)}
    return made, {name: fusing.reason(one) for name, one in private.items()}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())


def check(attachment: Attachment, arrays: Arrays) -> dict[str, str]:
    """Stored tensors, each view, and what torch makes of experts hold the files' bits. Returns why any is private."""
    state = attachment.state_dict()
    assert set(state) == set(arrays)
    for name, tensor in state.items():
        assert tuple(tensor.shape) == arrays[name].shape
        assert raw(tensor) == arrays[name].tobytes(), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    for key, view in attachment.views.items():
        assert raw(attachment.view(*key[::-1])) == b"".join(arrays[member].tobytes() for member in view.members)
    reasons: dict[str, str] = {}
    expected = fused(arrays)
    for layer in range(len(expected) // 2):
        made, private = fuse(attachment, layer)
        reasons |= private
        for name, tensor in made.items():
            assert tuple(tensor.shape) == expected[name].shape
            assert raw(tensor) == expected[name].tobytes(), name
            if name not in private and tensor.is_contiguous():
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
    return reasons


GATE_UP = "model.layers.{}.block_sparse_moe.experts.gate_up_proj"
DOWN = "model.layers.{}.block_sparse_moe.experts.down_proj"
QKV = "model.layers.{}.self_attn.qkv_proj.weight"


def names(*layers: int) -> set[str]:
    return {name.format(layer) for name in (GATE_UP, DOWN, QKV) for layer in layers}


def listed(attachment: Attachment) -> set[str]:
    return {view.name for view in attachment.views.values()}


# -- one checkpoint --------------------------------------------------------------------------------------------------


@everywhere
def test_what_is_fused_is_a_view(here: Daemon, backend: Backend, tmp_path: Path) -> None:
    arrays = mixtral()
    path = checkpoints.write(tmp_path / "m.safetensors", arrays)
    with weightd.connect(here.socket) as client, client.attach(path, device=backend.device) as attachment:
        assert listed(attachment) == names(0, 1)
        assert check(attachment, arrays) == {}
        view = attachment.views["", QKV.format(1)]
        assert view.members == tuple(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
        assert view.shape == (256, WIDTH)
        member = attachment.tensor(view.members[0])
        assert attachment.view(view.name).data_ptr() == member.data_ptr()
        private = attachment.view(view.name, writable="copy")
        assert private.data_ptr() != member.data_ptr()
        private.zero_()
        assert check(attachment, arrays) == {}
        with pytest.raises(weightd.NotFoundError, match="view 'nothing'"):
            attachment.view("nothing")


@everywhere
def test_a_view_keeps_its_memory_and_the_lease(here: Daemon, backend: Backend, tmp_path: Path) -> None:
    arrays = mixtral()
    path = checkpoints.write(tmp_path / "m.safetensors", arrays)
    with weightd.connect(here.socket) as client:
        attachment = client.attach(path, device=backend.device)
        view = attachment.view(GATE_UP.format(0))
        attachment.close()
        with pytest.raises(weightd.InvalidReferenceError, match="closed"):
            attachment.view(GATE_UP.format(0))
        assert len(client.leases()) == 1
        with pytest.raises(weightd.InUseError):
            client.remove(str(path))
        assert raw(view) == fused(arrays)[GATE_UP.format(0)].tobytes()
        del view
        gc.collect()
        eventually(lambda: not client.leases(), what="the lease ends with the view")


def test_members_may_be_in_several_files(here: Daemon, tmp_path: Path) -> None:
    arrays = mixtral()
    every = sorted(arrays, key=lambda name: checkpoints.random_bytes(name, 8))
    for number in range(5):
        part = {name: arrays[name] for name in every[number::5]}
        checkpoints.write(tmp_path / f"model-{number + 1}-of-5.safetensors", part)
    with weightd.connect(here.socket) as client, client.attach(tmp_path) as attachment:
        assert listed(attachment) == names(0, 1)
        check(attachment, arrays)


def test_views_of_some_tensors_and_components(here: Daemon, tmp_path: Path) -> None:
    arrays = mixtral(layers=1)
    for component in ("one", "two"):
        checkpoints.write(tmp_path / component / "model.safetensors", arrays if component == "one" else mixtral("two"))
    checkpoints.describe_pipeline(tmp_path)
    members = [("one", f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv"]
    with weightd.connect(here.socket) as client:
        with client.attach(tmp_path) as attachment:
            assert [key.component for key in attachment.views] == ["one"] * 3 + ["two"] * 6
            with pytest.raises(weightd.InvalidReferenceError, match="several components"):
                attachment.state_dict()
            assert raw(attachment.view(QKV.format(0), "two")) != raw(attachment.view(QKV.format(0), "one"))
        with client.attach(tmp_path, components=["one"]) as attachment:
            assert [key.component for key in attachment.views] == ["one"] * 3
            assert check(attachment, arrays) == {}
        with client.attach(tmp_path, tensors=members) as attachment:
            assert list(attachment.views) == [("one", QKV.format(0))]
            assert raw(attachment.view(QKV.format(0), "one")) == b"".join(arrays[name].tobytes() for _, name in members)
        with client.attach(tmp_path, tensors=members[:2]) as attachment:
            assert attachment.views == {}
        with client.attach(tmp_path, manifest_only=True) as attachment:
            assert len(attachment.views) == 9
            with pytest.raises(weightd.NotFoundError, match="only the manifest"):
                attachment.view(QKV.format(0), "one")


def test_other_architectures_have_no_views(here: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 5, 1000)
    with weightd.connect(here.socket) as client, client.attach(path) as attachment:
        assert attachment.views == {}
        assert list(attachment.state_dict()) == [f"t{number}" for number in range(5)]


def test_what_no_slot_can_hold_in_a_row_is_copied(here: Daemon, tmp_path: Path) -> None:
    arrays = {f"self_attn.{part}_proj.weight": random(part, 3, 5) for part in "qkv"}
    arrays |= {f"mlp.experts.{e}.down_proj.weight": random(e, 3, 5) for e in range(2)}
    path = checkpoints.write(tmp_path / "m.safetensors", arrays)
    with weightd.connect(here.socket) as client, client.attach(path) as attachment:
        assert attachment.views == {}
        parts = [attachment.tensor(f"mlp.experts.{e}.down_proj.weight") for e in range(2)]
        with TorchFusionMode(attachment) as fusing:
            stacked = torch.cat(parts)
        assert "has 60 bytes, no multiple of 256" in fusing.reason(stacked)
        assert raw(stacked) == b"".join(arrays[f"mlp.experts.{e}.down_proj.weight"].tobytes() for e in range(2))


@pytest.mark.parametrize("threads", [1, 3])
def test_files_that_are_cut_into_lanes(start_daemon: StartDaemon, threads: int, tmp_path: Path) -> None:
    daemon = start_daemon(reader_threads=threads)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for layer in range(8):
        for part, rows in (("mlp.down", 3), ("mlp.gate", 8), ("mlp.up", 8), ("self_attn.k", 1), ("self_attn.o", 4),
                           ("self_attn.q", 4), ("self_attn.v", 1)):  # fmt: skip
            data = checkpoints.random_bytes((layer, part), rows * MIB)
            tensors[f"model.layers.{layer}.{part}_proj.weight"] = "U8", (rows * MIB,), data
    path = checkpoints.write(tmp_path / "m.safetensors", tensors)
    client = daemon.connect()
    client.load(path)
    assert client.inspect(str(path)).segments == threads
    with client.attach(path) as attachment:
        assert len(attachment.views) == 16
        for key, view in attachment.views.items():
            assert raw(attachment.view(key.name)) == b"".join(tensors[name][2] for name in view.members)


# -- what is shared wins -----------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("hash_first", [False, True])
@pytest.mark.parametrize("base_first", [True, False])
def test_a_fine_tune_shares_the_rest_and_says_what_is_copied(
    start_daemon: StartDaemon, tensors_on_the_double: None, backend: Backend, base_first: bool, hash_first: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    base = mixtral()
    changed = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    tuned = base | {changed: random("tuned", INNER, WIDTH)}
    paths = {name: checkpoints.write(tmp_path / f"{name}.safetensors", arrays) for name, arrays in
             (("base", base), ("tuned", tuned))}  # fmt: skip
    first, second = (base, tuned) if base_first else (tuned, base)
    one, other = paths.values() if base_first else reversed(paths.values())
    daemon = start_daemon(budget=4 * MIB + backend.page if hash_first else 64 * MIB)  # each has 3.4 MiB
    with daemon.connect() as client, client.attach(one, device=backend.device) as attachment:
        assert check(attachment, first) == {}
        assert listed(attachment) == names(0, 1)
        assert client.load_report(other, device=backend.device).unique_bytes == base[changed].nbytes
        with client.attach(other, device=backend.device) as another:
            assert listed(another) == names(0, 1) - {GATE_UP.format(0)}
            (copied,) = check(another, second).items()
            assert copied[0] == GATE_UP.format(0)
            assert "the 8 stored tensors that it is made of lie in 3 places" in copied[1]
        assert check(attachment, first) == {}


@everywhere
def test_what_differs_as_a_whole_is_a_view_of_its_own(here: Daemon, backend: Backend, tmp_path: Path) -> None:
    base = mixtral()
    tuned = {
        name: random(("tuned", name), *array.shape)
        if "0.self_attn.q" in name or "1.block_sparse_moe" in name
        else array
        for name, array in base.items()
    }
    one, other = (checkpoints.write(tmp_path / f"{len(a)}{n}.safetensors", a) for n, a in enumerate((base, tuned)))
    with weightd.connect(here.socket) as client:
        client.load(one, device=backend.device, pin=True)
        with client.attach(other, device=backend.device) as attachment:
            assert listed(attachment) == names(0, 1) - {QKV.format(0)}
            assert check(attachment, tuned) == {}, "no parameter of transformers"


@everywhere
def test_equal_layers_are_held_once_and_have_addresses_of_their_own(
    here: Daemon, backend: Backend, tmp_path: Path
) -> None:
    arrays = mixtral()
    for name in arrays:
        if "layers.1.block_sparse_moe.experts" in name:
            arrays[name] = arrays[name.replace("layers.1", "layers.0")]
    arrays["model.layers.1.block_sparse_moe.experts.3.w2.weight"] = random("other", WIDTH, INNER)
    path = checkpoints.write(tmp_path / "m.safetensors", arrays)
    with weightd.connect(here.socket) as client, client.attach(path, device=backend.device) as attachment:
        assert listed(attachment) == names(0, 1) - {DOWN.format(1)}
        copied = check(attachment, arrays)
        assert DOWN.format(1) in copied
        assert (GATE_UP.format(1) in copied) is (backend.kind == "cuda_ipc"), "CUDA IPC maps memory once only"
        one, other = (attachment.view(GATE_UP.format(layer)) for layer in (0, 1))
        assert one.data_ptr() != other.data_ptr()
        assert raw(one) == raw(other)


def test_tensors_of_which_some_are_equal_to_others_are_no_view(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """They lie in a row, but no mapping of the row is theirs alone."""
    daemon = start_daemon(reader_threads=1)
    part = "mlp.experts.0.{}_proj.weight"
    arrays = {name: random(name, 128, 128) for name in ("a", part.format("up"))}
    base = checkpoints.write(tmp_path / "base.safetensors", arrays)
    arrays[part.format("gate")] = arrays["a"]  # so up lies behind gate, which is the second name for its bytes
    path = checkpoints.write(tmp_path / "m.safetensors", arrays)
    with daemon.connect() as client:
        client.load(base)
        attachment = client.attach(path)
    with attachment:
        places = {name: attachment.tensors["", name].offset // (128 * 128 * 4) for name in arrays}
        assert places == {"a": 0, part.format("gate"): 0, part.format("up"): 1}
        assert attachment.views == {}
        state = attachment.state_dict()
        with TorchFusionMode(attachment):
            made = torch.cat([state[part.format("gate")], state[part.format("up")]])
        assert not attachment.holds(made.data_ptr(), made.nbytes)
        state["a"].zero_()
        assert raw(made) == arrays["a"].tobytes() + arrays[part.format("up")].tobytes()


# -- memory in pieces ------------------------------------------------------------------------------------------------


@pytest.mark.backends(*CUDA, double_only=True)
def test_what_cannot_be_had_in_one_piece_is_loaded_all_the_same(
    start_daemon: StartDaemon, tensors_on_the_double: None, backend: Backend, tmp_path: Path
) -> None:
    """A GPU's memory with holes for a tensor each; nobody is evicted for the sake of order."""
    daemon = start_daemon(budget="16MiB")
    size, shape = 2 * MIB, (1024, 512)
    full = checkpoints.write_random(tmp_path / "full.safetensors", 8, size)
    half = {f"t{i}": ("U8", (size,), checkpoints.random_bytes((0, i), size)) for i in range(0, 8, 2)}
    other = checkpoints.write(tmp_path / "half.safetensors", half)
    experts = {f"mlp.experts.{e}.{part}_proj.weight": random((e, part), *shape) for e in range(1)
               for part in ("gate", "up", "down")}  # fmt: skip
    path = checkpoints.write(tmp_path / "m.safetensors", experts)
    with daemon.connect() as client:
        client.load(full, device=backend.device, name="full")
        client.load(other, device=backend.device, name="half")
    with daemon.connect() as client:
        client.remove("full")
        with client.attach(path, device=backend.device) as attachment:
            assert listed(attachment) == {"mlp.experts.down_proj"}
            parts = [f"mlp.experts.0.{part}_proj.weight" for part in ("gate", "up")]
            with TorchFusionMode(attachment) as fusing:
                made = torch.cat([attachment.tensor(part) for part in parts])
            assert "lie in 2 places" in fusing.reason(made)
            assert raw(made) == b"".join(experts[part].tobytes() for part in parts)
        assert {checkpoint.name for checkpoint in client.checkpoints()} == {"half", str(path)}
        assert client.stats().evictions == 0
