"""weightd.torch against safetensors.torch 0.8: the same signatures, keys, values, dtypes, shapes and errors."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

import weightd
import weightd.torch
from support import checkpoints, fake_torch
from support.backends import EVERY, Backend
from support.daemon import ROOT, Daemon, environment
from support.leash import leashed
from support.shared import SharedDaemons
from support.worker import Worker
from weightd._mapping import cuda_driver

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]

PLAIN = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
]  # fmt: skip
FLOAT8 = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip
FLOAT4 = [torch.float4_e2m1fn_x2]
everywhere = pytest.mark.backends(*EVERY)
SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 4), (2, 3, 4), (0,), (3, 0, 2), (300, 70)]


def forget_client() -> None:
    """Close the client that weightd.torch keeps for this process."""
    while weightd.torch._shared:
        weightd.torch._shared.popitem()[1].close()


@pytest.fixture(scope="module")
def shared_daemons() -> Iterator[SharedDaemons]:
    daemons = SharedDaemons()
    yield daemons
    forget_client()
    daemons.close()


@pytest.fixture
def here(shared_daemons: SharedDaemons, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A daemon that weightd.torch finds; it makes tensors also of what lies on the double."""
    if backend.library is not None:
        monkeypatch.setattr("weightd._tensors._raw", fake_torch._raw)
    with shared_daemons.on(backend) as daemon:
        monkeypatch.setenv("WEIGHTD_SOCKET", str(daemon.socket))
        yield daemon


@pytest.fixture
def device(backend: Backend) -> str:
    """What torch calls where tensors are: on the double they are the CPU's."""
    return "cuda:0" if backend.is_real_gpu else "cpu"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A socket path where no daemon is."""
    path = tmp_path / "nobody.sock"
    monkeypatch.setenv("WEIGHTD_SOCKET", str(path))
    return path


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A tensor of any dtype; its bytes are random, but a bool is one."""
    size = torch.empty(shape, dtype=dtype).nbytes
    data = bytearray(checkpoints.random_bytes((seed, str(dtype), shape), size))
    if dtype is torch.bool:
        data = bytearray(byte & 1 for byte in data)
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).clone().view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, whatever its dtype."""
    if not tensor.nbytes:
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, name: object = "") -> None:
    assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device), name
    assert ours.stride() == theirs.stride(), name
    assert raw(ours) == raw(theirs), name
    assert ours.requires_grad is theirs.requires_grad is False, name


def assert_own_storage(tensors: dict[str, torch.Tensor]) -> None:
    """Each tensor fills a storage of its own."""
    pointers = set()
    for name, tensor in tensors.items():
        assert tensor.storage_offset() == 0, name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        assert tensor.is_contiguous(), name
        if tensor.nbytes:
            pointers.add(tensor.untyped_storage().data_ptr())
    assert len(pointers) == sum(bool(tensor.nbytes) for tensor in tensors.values())


# -- signatures ------------------------------------------------------------------------------------------------------


def test_load_file_has_the_signature_of_safetensors_and_fallback() -> None:
    ours = dict(inspect.signature(weightd.torch.load_file).parameters)
    theirs = inspect.signature(safetensors.torch.load_file).parameters
    extra = ours.pop("fallback")
    assert (extra.kind, extra.default) == (inspect.Parameter.KEYWORD_ONLY, "error")
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        assert (one.name, one.kind, one.default) == (other.name, other.kind, other.default)


def test_safe_open_takes_what_safetensors_takes() -> None:
    ours = dict(inspect.signature(weightd.torch.safe_open).parameters)
    theirs = inspect.signature(safetensors.safe_open).parameters
    assert ours.pop("fallback").kind is inspect.Parameter.KEYWORD_ONLY
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
    methods = {name for name in dir(safetensors.safe_open) if not name.startswith("_")}
    assert methods <= set(dir(weightd.torch.safe_open))


# -- values ----------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", [*PLAIN, *FLOAT8, *FLOAT4], ids=str)
def test_every_dtype_in_many_shapes(
    dtype: torch.dtype, backend: Backend, device: str, here: Daemon, tmp_path: Path
) -> None:
    tensors = {f"{number}": random_tensor(dtype, shape, number) for number, shape in enumerate(SHAPES)}
    if dtype in FLOAT4:
        del tensors["0"]  # torch counts pairs, so there is no scalar
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(tensors, path)
    ours, theirs = weightd.torch.load_file(path, backend.device), safetensors.torch.load_file(path, device)
    # Two tensors without bytes lie at one place; which comes first differs from one run of safetensors to the next.
    assert [n for n in ours if tensors[n].nbytes] == [n for n in theirs if tensors[n].nbytes]
    assert set(ours) == set(theirs)
    assert_own_storage(ours)
    for name in tensors:
        assert_same(ours[name], theirs[name], name)
        assert raw(ours[name]) == raw(tensors[name])
    with (
        weightd.torch.safe_open(path, "pt", backend.device) as one,
        safetensors.safe_open(path, "pt", device) as other,
    ):
        for name in tensors:
            assert_same(one.get_tensor(name), other.get_tensor(name), name)
            assert one.get_slice(name).get_dtype() == other.get_slice(name).get_dtype()
            assert one.get_slice(name).get_shape() == other.get_slice(name).get_shape()


def test_keys_and_their_orders(here: Daemon, tmp_path: Path) -> None:
    tensors: checkpoints.Tensors = {
        "z.weight": np.ones((2, 2), np.float32), "a": np.zeros(3, np.int64), "B": np.ones(5, np.uint8),
        "empty": np.ones((0, 4), np.float16), "é": np.ones(1, np.float64), "a.1": np.array(3, np.int32),
    }  # fmt: skip
    path = checkpoints.write(tmp_path / "m.safetensors", tensors)
    with weightd.torch.safe_open(path, framework="pt") as ours, safetensors.safe_open(path, framework="pt") as theirs:
        assert ours.keys() == theirs.keys()
        assert ours.offset_keys() == theirs.offset_keys()
        assert list(ours.get_tensors()) == list(theirs.get_tensors())
    assert list(weightd.torch.load_file(path)) == list(safetensors.torch.load_file(path))


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"b": "2", "a": "é\n", "": "x" * 5000}])
def test_metadata(metadata: dict[str, str] | None, here: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", {"a": np.ones(3, np.float32)}, metadata)
    with weightd.torch.safe_open(path, "pt") as ours, safetensors.safe_open(path, "pt") as theirs:
        assert ours.metadata() == theirs.metadata() == metadata


@everywhere
def test_a_file_without_tensors(backend: Backend, here: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", {}, {"only": "words"})
    assert weightd.torch.load_file(path, backend.device) == safetensors.torch.load_file(path) == {}
    with weightd.torch.safe_open(path, "pt", backend.device) as ours:
        assert ours.keys() == []
        assert ours.metadata() == {"only": "words"}


INDICES: list[Any] = [
    slice(None), slice(2, 5), slice(5, 2), slice(-3, None), slice(None, 100), slice(0, 0), 0, 3, -1, ...,
    (slice(None), slice(1, 3)), (slice(None), 2), (2, slice(None)), (slice(1, 4), 0, slice(None)), (..., 0),
    (..., slice(1, 2)), (1, 2, 3), (-1, -1, -1), (slice(None), slice(None), slice(2, 4)),
    (slice(1, 3), ..., slice(0, 2)), (slice(None), slice(3, 3)), (), (0, 0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_slices(dtype: torch.dtype, index: Any, here: Daemon, slices: dict[torch.dtype, Path]) -> None:
    with weightd.torch.safe_open(slices[dtype], "pt") as one, safetensors.safe_open(slices[dtype], "pt") as other:
        assert_same(one.get_slice("t")[index], other.get_slice("t")[index], index)


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """A file with a tensor "t" of shape (6, 5, 4) for each dtype."""
    folder = tmp_path_factory.mktemp("slices")
    paths = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        paths[dtype] = folder / f"{dtype}.safetensors"
        safetensors.torch.save_file({"t": random_tensor(dtype, (6, 5, 4), 1)}, paths[dtype])
    return paths


@pytest.mark.parametrize("index", [7, (0, 0, 0, 0), "x"], ids=repr)
def test_slices_that_cannot_be(index: Any, here: Daemon, slices: dict[torch.dtype, Path]) -> None:
    path = slices[torch.float32]
    with weightd.torch.safe_open(path, "pt") as one, safetensors.safe_open(path, "pt") as other:
        for file in (one, other):
            with pytest.raises((IndexError, TypeError, safetensors.SafetensorError)):
                file.get_slice("t")[index]


# -- names, devices, errors ------------------------------------------------------------------------------------------


def test_names_may_be_str_or_path_and_relative(here: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints.write(tmp_path / "sub" / "m.safetensors", {"a": np.arange(4, dtype=np.float32)})
    monkeypatch.chdir(tmp_path)
    for name in (path, str(path), "sub/m.safetensors", Path("sub/m.safetensors"), "./sub/m.safetensors"):
        assert weightd.torch.load_file(name)["a"].tolist() == [0, 1, 2, 3], name
    monkeypatch.chdir(tmp_path / "sub")
    for device in ("cpu", torch.device("cpu")):
        assert weightd.torch.load_file("m.safetensors", device=device)["a"].device == torch.device("cpu")
    # What is a path for safetensors is a path here, too, whatever it looks like.
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    assert weightd.torch.load_file("org/name")["a"].tolist() == [0, 1, 2, 3]


def test_missing_file(here: Daemon, tmp_path: Path) -> None:
    for name in (tmp_path / "nope.safetensors", "nope.safetensors"):
        with pytest.raises(FileNotFoundError):
            safetensors.torch.load_file(name)
        with pytest.raises(weightd.NotFoundError, match=r"nope\.safetensors"):
            weightd.torch.load_file(name)


@pytest.mark.parametrize("device", ["cuda:0", "cuda", 0, "mps", "meta", torch.device("cuda", 1)])
def test_devices_that_are_not_there_are_refused(
    device: Any, here: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_driver, "device_count", lambda: 0)  # whatever this machine has
    path = checkpoints.write(tmp_path / "m.safetensors", {"a": np.ones(3, np.float32)})
    with pytest.raises(weightd.DeviceMismatchError, match=r"device '(cuda|mps|meta)"):
        weightd.torch.load_file(path, device=device)


def test_arguments_that_cannot_be(here: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", {"a": np.ones(3, np.float32)})
    with pytest.raises(weightd.InvalidReferenceError, match="framework 'tensorflowish'"):
        weightd.torch.safe_open(path, framework="tensorflowish")
    with pytest.raises(weightd.InvalidReferenceError, match="backend 'gpu'"):
        weightd.torch.load_file(path, backend="gpu")
    with weightd.torch.safe_open(path, "pt") as file:
        for call in (file.get_tensor, file.get_slice):
            with pytest.raises(weightd.NotFoundError, match="'nope'"):
                call("nope")
    with pytest.raises(weightd.WeightdError):
        file.get_tensor("a")


def test_dtypes_that_torch_has_not(here: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write(
        tmp_path / "m.safetensors", {"six": ("F6_E2M3", (4, 4), bytes(12)), "one": ("F32", (1,), bytes(4))}
    )
    with pytest.raises(weightd.FormatError, match=r"F6_E2M3.*torch has no such dtype"):
        weightd.torch.load_file(path)
    with weightd.torch.safe_open(path, "pt") as file:
        assert file.get_tensor("one").tolist() == [0.0]
        with pytest.raises(weightd.FormatError, match="F6_E2M3"):
            file.get_tensor("six")
    with weightd.connect(here.socket) as client, client.attach(path) as attachment:
        assert bytes(attachment.buffer("six")) == bytes(12)


def test_corrupt_file(here: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", {"a": np.ones(3, np.float32)})
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(weightd.FormatError, match=r"m\.safetensors"):
        weightd.torch.load_file(path)


# -- tensors in use ----------------------------------------------------------------------------------------------------


@pytest.fixture
def repetitive(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file in which equal tensors occur, small ones and some that are too large to be stored twice."""
    tensors = {f"norm{i}": torch.ones(128) for i in range(4)}
    tensors |= {f"table{i}": torch.full((200, 200), 0.5) for i in range(3)}
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return path, tensors


@everywhere
def test_duplicates_are_apart_and_can_be_saved_again(
    repetitive: tuple[Path, dict[str, torch.Tensor]], backend: Backend, here: Daemon, tmp_path: Path
) -> None:
    path, tensors = repetitive
    loaded = weightd.torch.load_file(path, backend.device)
    assert_own_storage(loaded)
    for name, tensor in loaded.items():
        assert raw(tensor) == raw(tensors[name]), name
    safetensors.torch.save_file(loaded, tmp_path / "again.safetensors", {"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_write_to_one_of_several_duplicates_changes_no_other(
    repetitive: tuple[Path, dict[str, torch.Tensor]], here: Daemon
) -> None:
    path, tensors = repetitive
    loaded = weightd.torch.load_file(path)
    loaded["norm0"].zero_()
    loaded["table1"].zero_()
    changed = {name for name, tensor in loaded.items() if not torch.equal(tensor, tensors[name])}
    assert changed == {"norm0", "table1"}
    fresh = weightd.torch.load_file(path)
    assert all(torch.equal(fresh[name], tensors[name]) for name in tensors)


@everywhere
def test_tensors_outlive_the_file(backend: Backend, here: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 2, 3000)
    with weightd.torch.safe_open(path, "pt", backend.device) as file:
        tensor, part = file.get_tensor("t0"), file.get_slice("t1")[10:20]
    unclosed = weightd.torch.safe_open(path, "pt", backend.device)
    again = unclosed.get_tensor("t0")
    del unclosed  # as safetensors allows: no warning
    path.unlink()
    assert raw(tensor) == raw(again) == checkpoints.random_bytes((0, 0), 3000)
    assert raw(part) == checkpoints.random_bytes((0, 1), 3000)[10:20]


class Net(torch.nn.Module):
    """Two layers, a norm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(40, 50)
        self.norm = torch.nn.LayerNorm(50)
        self.second = torch.nn.Linear(50, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(torch.relu(self.first(batch)))) * self.scale  # type: ignore[no-any-return]  # a tensor


@pytest.fixture
def net_path(tmp_path: Path) -> Path:
    """The weights of a Net."""
    torch.manual_seed(1)
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(Net().state_dict(), path)
    return path


def assigned(path: Path, device: str) -> Net:
    """A Net on shared weights."""
    with torch.device("meta"):
        net = Net()
    state = weightd.torch.load_file(path, device)
    net.load_state_dict(state, assign=True)
    assert net.first.weight.data_ptr() == state["first.weight"].data_ptr(), "it was copied"
    return net


@everywhere
def test_module_computes_the_same_from_assigned_weights(
    net_path: Path, backend: Backend, device: str, here: Daemon
) -> None:
    net, original = assigned(net_path, backend.device), Net().to(device)
    original.load_state_dict(safetensors.torch.load_file(net_path))
    batch = torch.randn(16, 40, device=device)
    with torch.inference_mode():
        assert torch.equal(net(batch), original(batch))


def test_module_trains_on_assigned_weights(net_path: Path, here: Daemon) -> None:
    """Gradients are the process's own; a step of the optimizer writes to private pages."""
    net, private, batch = assigned(net_path, "cpu"), Net(), torch.randn(16, 40)
    private.load_state_dict(safetensors.torch.load_file(net_path))
    for module in (net, private):
        module.requires_grad_(True)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(batch).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in private.state_dict().items())
    assert torch.equal(
        weightd.torch.load_file(net_path)["first.weight"], safetensors.torch.load_file(net_path)["first.weight"]
    )


@everywhere
def test_pipeline_has_a_state_dict_per_component(here: Daemon, tmp_path: Path) -> None:
    for component in ("unet", "vae"):
        checkpoints.write(tmp_path / component / "model.safetensors", {"w": np.full(3, len(component), np.float32)})
    checkpoints.describe_pipeline(tmp_path)
    with weightd.connect(here.socket) as client:
        with client.attach(tmp_path) as attachment:
            assert attachment.components == ("unet", "vae")
            with pytest.raises(weightd.InvalidReferenceError, match="'unet', 'vae'"):
                attachment.state_dict()
            assert attachment.state_dict("unet")["w"].tolist() == [4, 4, 4]
            assert attachment.state_dict(component="vae")["w"].tolist() == [3, 3, 3]
            with pytest.raises(weightd.NotFoundError, match="'text'"):
                attachment.state_dict("text")
        with client.attach(tmp_path, components=["vae"]) as attachment:
            assert attachment.state_dict()["w"].tolist() == [3, 3, 3]
            with pytest.raises(weightd.NotFoundError):
                attachment.tensor("w", "unet")


# -- without a daemon --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    return checkpoints.write(tmp_path / "m.safetensors", tensors, {"k": "v"})


def test_no_daemon_is_an_error(nowhere: Path, saved: Path) -> None:
    with pytest.raises(weightd.DaemonUnreachableError, match=r"nobody\.sock"):
        weightd.torch.load_file(saved)
    with pytest.raises(weightd.DaemonUnreachableError, match=r"nobody\.sock"):
        weightd.torch.safe_open(saved, "pt", fallback="error")


def test_local_loads_privately_and_warns(nowhere: Path, saved: Path) -> None:
    with pytest.warns(RuntimeWarning, match="loaded privately") as warned:
        state = weightd.torch.load_file(saved, fallback="local")
    assert warned[0].filename == __file__, "the warning does not point at the caller"
    assert state["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.warns(RuntimeWarning, match=r"nobody\.sock") as warned:
        opened = weightd.torch.safe_open(saved, "pt", fallback="local")
    assert warned[0].filename == __file__, "the warning does not point at the caller"
    with opened as file:
        assert (file.keys(), file.offset_keys(), file.metadata()) == (["a"], ["a"], {"k": "v"})
        assert file.get_slice("a")[:, 1].tolist() == [1, 4]
        assert file.get_tensor("a").shape == (2, 3)
        assert list(file.get_tensors()) == ["a"]


def test_local_is_not_used_where_a_daemon_is(here: Daemon, saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weightd.torch.load_file(saved, fallback="local")["a"].shape == (2, 3)


def test_local_where_the_file_does_not_fit(
    start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(budget="1MiB")
    monkeypatch.setenv("WEIGHTD_SOCKET", str(daemon.socket))
    path = checkpoints.write_random(tmp_path / "m.safetensors", 4, 1 << 20)
    with pytest.raises(weightd.CapacityError):
        weightd.torch.load_file(path)
    with pytest.warns(RuntimeWarning, match="do not fit"):
        state = weightd.torch.load_file(path, fallback="local")
    assert raw(state["t3"]) == checkpoints.random_bytes((0, 3), 1 << 20)
    forget_client()


def test_a_child_forked_while_another_thread_connects_has_a_client(
    here: Daemon, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_client()
    connecting, go_on = threading.Event(), threading.Event()

    def connect() -> weightd.Client:
        connecting.set()
        assert go_on.wait(60)
        return weightd.connect()

    monkeypatch.setattr(weightd.torch, "connect", connect)
    thread = threading.Thread(target=weightd.torch.shared_client)
    thread.start()
    try:
        assert connecting.wait(60)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
            child = os.fork()
        if child == 0:
            signal.alarm(30)  # ends a child that hangs
            try:
                weightd.torch.connect = weightd.connect
                os._exit(0 if weightd.torch.load_file(saved)["a"].shape == (2, 3) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        go_on.set()
        thread.join(60)
        forget_client()


def test_wait_waits_for_the_daemon(tmp_path: Path, saved: Path) -> None:
    """A process that waits, and a daemon that comes up a second later."""
    socket = tmp_path / "late.sock"
    code = "import sys, weightd.torch; print(weightd.torch.load_file(sys.argv[1], fallback='wait')['a'].sum().item())"
    waiting = subprocess.Popen(
        leashed([sys.executable, "-c", code, str(saved)]),
        stdout=subprocess.PIPE, text=True, env=environment(socket), cwd=ROOT,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(waiting.wait)
        stack.callback(waiting.kill)
        assert waiting.stdout is not None
        stack.enter_context(waiting.stdout)
        time.sleep(2.5)  # torch takes up to two seconds to import
        assert waiting.poll() is None
        daemon = subprocess.Popen(
            leashed([
                sys.executable, "-m", "weightd_daemon", "serve", f"--socket={socket}", "--budget=64MiB",
                f"--state-dir={tmp_path / 'state'}", "--log-level=error",
            ]),
            stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
        )  # fmt: skip
        assert daemon.stdout is not None
        stack.enter_context(daemon.stdout)
        stack.callback(daemon.wait, 60)
        stack.callback(daemon.terminate)
        assert waiting.communicate(timeout=60)[0] == "15.0\n"
        assert waiting.returncode == 0
