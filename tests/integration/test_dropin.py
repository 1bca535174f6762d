"""The drop-in beside safetensors: what callers catch, closed files, numpy, a tensor's header entry, prefetch.

Values, dtypes and slices of torch are in test_torch.py; `make test-safetensors` runs safetensors' own tests.
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

import weightd
import weightd.torch
from support import checkpoints, fake_torch
from support.backends import CUDA, Backend
from support.daemon import Daemon, environment
from support.shared import SharedDaemons
from support.users import ALICE
from weightd import _safetensors

on_gpus = pytest.mark.backends(*CUDA)


@pytest.fixture(scope="module")
def shared_daemons() -> Iterator[SharedDaemons]:
    daemons = SharedDaemons()
    yield daemons
    forget_client()
    daemons.close()


def forget_client() -> None:
    """Close the client that weightd.torch keeps for this process."""
    while weightd.torch._shared:
        weightd.torch._shared.popitem()[1].close()


@pytest.fixture
def here(shared_daemons: SharedDaemons, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A daemon that weightd.torch finds; it makes tensors also of what lies on the double."""
    if backend.library is not None:
        monkeypatch.setattr("weightd._tensors._raw", fake_torch._raw)
    with shared_daemons.on(backend) as daemon:
        monkeypatch.setenv("WEIGHTD_SOCKET", str(daemon.socket))
        yield daemon


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a tensor "a" of shape (3, 4), a scalar, an empty one, and dtypes that not everybody has."""
    return checkpoints.write(
        tmp_path / "m.safetensors",
        {
            "a": np.arange(12, dtype=np.float32).reshape(3, 4), "scalar": np.array(7, np.int64),
            "empty": np.zeros((0, 4), np.float32), "b": ("BF16", (2,), bytes(4)), "e": ("F8_E4M3", (2,), bytes(2)),
            "pair": ("F4", (4,), bytes(2)), "six": ("F6_E2M3", (4, 4), bytes(12)), "z": np.ones((2, 2), np.float32),
        },
        {"format": "pt"},
    )  # fmt: skip


# -- what callers catch -----------------------------------------------------------------------------------------------

Case = Callable[[Any, Any, Path], object]


def closed(library: Any, path: Path) -> Any:
    with library.safe_open(path, framework="pt") as file:
        pass
    return file


# Each is given safetensors or weightd.torch as a library, its module with load_file, and the path of a file.
FAILURES: dict[str, Case] = {
    "missing file": lambda _, m, path: m.load_file(path.parent / "none.safetensors"),
    "missing folder": lambda _, m, path: m.load_file(path.parent / "none" / "m.safetensors"),
    "file as folder": lambda _, m, path: m.load_file(path / "m.safetensors"),
    "dangling link": lambda _, m, path: m.load_file(path.parent / "dangling"),
    "name too long": lambda _, m, path: m.load_file("x" * 5000),
    "name with NUL": lambda _, m, path: m.load_file("x\0y"),
    "no name": lambda _, m, path: m.load_file(""),
    "folder": lambda _, m, path: m.load_file(path.parent),
    "device file": lambda _, m, path: m.load_file("/dev/null"),
    "bad file": lambda _, m, path: m.load_file(path.parent / "bad"),
    "pickle": lambda _, m, path: m.load_file(path.parent / "x.bin"),
    "pickle as checkpoint": lambda _, m, path: m.load_file(path.parent / "x.ckpt"),
    "index": lambda _, m, path: m.load_file(path.parent / "m.safetensors.index.json"),
    "GGUF file": lambda _, m, path: m.load_file(path.parent / "x.gguf"),
    "missing GGUF file": lambda _, m, path: m.load_file(path.parent / "none.gguf"),
    "empty file": lambda _, m, path: m.load_file(path.parent / "nothing"),
    "framework": lambda lib, _, path: lib.safe_open(path, framework="bogus"),
    "backend": lambda lib, _, path: lib.safe_open(path, framework="pt", backend="gpu"),
    "unknown device": lambda _, m, path: m.load_file(path.parent / "plain", device="foo"),
    "negative device": lambda _, m, path: m.load_file(path.parent / "plain", device=-1),
    "meta device": lambda _, m, path: m.load_file(path.parent / "plain", device="meta"),
    "missing tensor": lambda lib, _, path: lib.safe_open(path, framework="pt").get_tensor("zz"),
    "missing slice": lambda lib, _, path: lib.safe_open(path, framework="pt").get_slice("zz"),
    "torch has no dtype": lambda lib, _, path: lib.safe_open(path, framework="pt").get_tensor("six"),
    "torch has no dtype to slice": lambda lib, _, path: lib.safe_open(path, framework="pt").get_slice("six")[:],
    "torch has not all dtypes": lambda _, m, path: m.load_file(path),
    "torch's index": lambda lib, _, path: lib.safe_open(path, framework="pt").get_slice("a")[7],
    "numpy on a GPU": lambda lib, _, path: lib.safe_open(path, framework="np", device="cuda:0"),
    "numpy has no BF16": lambda lib, _, path: lib.safe_open(path, framework="np").get_tensor("b"),
    "numpy has no BF16 to slice": lambda lib, _, path: lib.safe_open(path, framework="np").get_slice("b")[:],
    "numpy has no F8": lambda lib, _, path: lib.safe_open(path, framework="np").get_tensor("e"),
    "numpy has no F4": lambda lib, _, path: lib.safe_open(path, framework="np").get_tensor("pair"),
    "numpy has no F6": lambda lib, _, path: lib.safe_open(path, framework="np").get_tensor("six"),
    "numpy has not all dtypes": lambda lib, _, path: lib.safe_open(path, framework="np").get_tensors(),
    "numpy's index": lambda lib, _, path: lib.safe_open(path, framework="np").get_slice("a")[7],
    "numpy's index of a wrong type": lambda lib, _, path: lib.safe_open(path, framework="np").get_slice("a")["x"],
    "closed keys": lambda lib, _, path: closed(lib, path).keys(),
    "closed offset_keys": lambda lib, _, path: closed(lib, path).offset_keys(),
    "closed metadata": lambda lib, _, path: closed(lib, path).metadata(),
    "closed get_tensor": lambda lib, _, path: closed(lib, path).get_tensor("a"),
    "closed get_tensors": lambda lib, _, path: closed(lib, path).get_tensors(),
    "closed get_slice": lambda lib, _, path: closed(lib, path).get_slice("a"),
    "closed and entered": lambda lib, _, path: closed(lib, path).__enter__().keys(),
}


@pytest.fixture
def plain_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy as it is without ml_dtypes, which another test of this process may have imported: onnx does."""
    for name in [name for name in np.sctypeDict if str(name).startswith(("bfloat", "float4", "float6", "float8"))]:
        monkeypatch.delitem(np.sctypeDict, name)


@pytest.mark.parametrize("name", FAILURES)
def test_what_catches_safetensors_error_catches_ours(name: str, here: Daemon, path: Path, plain_numpy: None) -> None:
    (path.parent / "bad").write_bytes(b"x" * 30)
    torch.save({"a": torch.zeros(2)}, path.parent / "x.bin")
    (path.parent / "x.ckpt").write_bytes(pickle.dumps({}))
    (path.parent / "m.safetensors.index.json").write_text('{"weight_map": {"a": "m.safetensors"}}')
    (path.parent / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    (path.parent / "nothing").touch()
    (path.parent / "dangling").symlink_to("none")
    checkpoints.write(path.parent / "plain", {"a": np.ones(2, np.float32)})
    theirs = failure(FAILURES[name], safetensors, safetensors.torch, path)
    ours = failure(FAILURES[name], weightd.torch, weightd.torch, path)
    assert isinstance(ours, type(theirs))
    if type(theirs) is not IndexError:  # torch's own, in both
        assert isinstance(ours, weightd.WeightdError)
        assert ours.message.isprintable()
    again = pickle.loads(pickle.dumps(ours))
    assert (type(again), str(again)) == (type(ours), str(ours))


def failure(case: Case, library: Any, module: Any, path: Path) -> Exception:
    """What a case raises, without the frames that would keep its file and lease."""
    try:
        case(library, module, path)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is compared
        cause: BaseException | None = error
        while cause is not None:
            cause.__traceback__ = None
            cause = cause.__cause__ or cause.__context__
        return error
    raise AssertionError("no error")


def test_a_file_that_may_not_be_read(here: Daemon, path: Path) -> None:
    """safetensors raises FileNotFoundError; ours is that, and says what it is."""
    weightd.torch.shared_client()  # connects while it may
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(ALICE)
    try:
        theirs = failure(lambda library, module, path: module.load_file(path), safetensors, safetensors.torch, path)
        ours = failure(lambda library, module, path: module.load_file(path), weightd.torch, weightd.torch, path)
    finally:
        if root:
            os.seteuid(0)
    assert type(theirs) is FileNotFoundError
    assert isinstance(ours, FileNotFoundError)
    assert isinstance(ours, PermissionError)
    assert isinstance(ours, weightd.PermissionDeniedError)
    assert "may not be read by this user" in ours.message


def test_what_is_not_permitted_and_not_the_file_keeps_its_own_error(
    here: Daemon, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that this user may not reach is not a file that cannot be opened."""

    def refuse() -> weightd.Client:
        raise weightd.PermissionDeniedError("you may not reach the weightd daemon")

    monkeypatch.setattr("weightd.torch.shared_client", refuse)
    with pytest.raises(weightd.PermissionDeniedError, match=r"^you may not reach") as caught:
        weightd.torch.load_file(path)
    assert not isinstance(caught.value, FileNotFoundError)


def test_what_was_not_found_and_is_no_file_keeps_its_own_error(
    here: Daemon, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that was evicted before it could be attached is not a file that is missing."""

    class Evicting:
        def attach(self, *_: object, **__: object) -> None:
            raise weightd.NotFoundError("the checkpoint was evicted")

    monkeypatch.setattr(weightd.torch, "shared_client", Evicting)
    with pytest.raises(weightd.NotFoundError, match="evicted") as caught:
        weightd.torch.load_file(path)
    assert not isinstance(caught.value, FileNotFoundError)


NO_SAFETENSORS = """
import sys
sys.modules["safetensors"] = None
import pickle, weightd, weightd.torch
path, missing = sys.argv[1:]
with weightd.torch.safe_open(path, "pt") as file:
    assert file.get_tensor("a").shape == (3, 4)
    for call in (file.get_tensor, file.get_slice):
        try:
            call("zz")
        except weightd.NotFoundError as error:
            assert str(pickle.loads(pickle.dumps(error))) == str(error)
        else:
            raise AssertionError("no error")
try:
    weightd.torch.load_file(missing)
except FileNotFoundError as error:
    assert isinstance(error, weightd.NotFoundError)
    assert isinstance(pickle.loads(pickle.dumps(error)), FileNotFoundError)
print("ok")
"""


def test_without_safetensors_all_works(here: Daemon, path: Path) -> None:
    command = [sys.executable, "-c", NO_SAFETENSORS, str(path), str(path.parent / "none")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment(here.socket), check=False
    )
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


@pytest.mark.parametrize(
    "name", ["m.bin", "m.ckpt", "m", "m.gguf", "m-00001-of-00002.gguf", "m.safetensors.index.json", "m.SAFETENSORS"]
)
def test_a_file_is_what_its_header_says_whatever_it_is_called(name: str, here: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "own" / name, {"a": np.arange(4, dtype=np.float32)})
    assert safetensors.torch.load_file(path)["a"].tolist() == [0, 1, 2, 3]
    assert weightd.torch.load_file(path)["a"].tolist() == [0, 1, 2, 3]


WITHOUT = """
import sys
package, path, framework = sys.argv[1:]
sys.modules[package] = None
import pickle, warnings, weightd, weightd.torch
warnings.simplefilter("error")
try:
    weightd.torch.safe_open(path, framework, fallback="local")
except weightd.WeightdError as error:
    again = pickle.loads(pickle.dumps(error))
    print(*(kind.__name__ for kind in type(again).__mro__[:3]), str(again), sep="|")
"""


@pytest.mark.parametrize(
    ("package", "framework", "kinds"),
    [
        ("safetensors", "pt", ["DaemonUnreachableError", "WeightdError", "ConnectionError"]),
        ("numpy", "np", ["MissingPackageError", "InvalidReferenceError"]),
    ],
)
def test_what_a_missing_package_is_needed_for_is_said(
    package: str, framework: str, kinds: list[str], path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, str(path), framework],
        capture_output=True, text=True, timeout=60, env=environment(path.parent / "nobody.sock"), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *found, message = done.stdout.strip().split("|")
    assert found[: len(kinds)] == kinds
    assert message.endswith(f"not installed: pip install {package}")


# -- files, devices ---------------------------------------------------------------------------------------------------


def test_no_device_is_the_cpu(here: Daemon, path: Path) -> None:
    for framework in ("pt", "np"):
        with (
            weightd.torch.safe_open(path, framework, device=None) as ours,
            safetensors.safe_open(path, framework, device=None) as theirs,
        ):
            assert ours.get_tensor("a").tolist() == theirs.get_tensor("a").tolist()
    checkpoints.write(path, {"a": np.ones(2, np.float32)})
    assert weightd.torch.load_file(path, device=None)["a"].device == torch.device("cpu")


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_a_slice_outlives_its_file(framework: str, here: Daemon, path: Path) -> None:
    for library in (safetensors, weightd.torch):
        with library.safe_open(path, framework=framework) as file:
            part = file.get_slice("a")
        assert part[1:, 2].tolist() == [6, 10]
        assert (part.get_shape(), part.get_dtype()) == ([3, 4], "F32")


def test_closing_twice_is_allowed(here: Daemon, path: Path) -> None:
    file = closed(weightd.torch, path)
    file.__exit__(None, None, None)


# -- numpy ------------------------------------------------------------------------------------------------------------

ARRAYS = [np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64,
          np.float16, np.float32, np.float64, np.complex64]  # fmt: skip


def of_bytes(dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    data = checkpoints.random_bytes((str(dtype), shape), int(np.prod(shape)) * np.dtype(dtype).itemsize)
    if dtype is np.bool_:
        data = bytes(byte & 1 for byte in data)
    return np.frombuffer(data, dtype).reshape(shape)


@pytest.mark.parametrize("framework", ["np", "numpy"])
def test_arrays_are_those_of_safetensors(framework: str, here: Daemon, tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [(), (1,), (3, 4), (0,), (3, 0, 2), (300, 70)]
    arrays = {f"{np.dtype(dtype)}{shape}": of_bytes(dtype, shape) for dtype in ARRAYS for shape in shapes}
    safetensors.numpy.save_file(arrays, tmp_path / "m.safetensors")
    with (
        weightd.torch.safe_open(tmp_path / "m.safetensors", framework) as ours,
        safetensors.safe_open(tmp_path / "m.safetensors", framework) as theirs,
    ):
        everything = ours.get_tensors()
        assert list(everything) == ours.offset_keys()
        for name in arrays:
            other = theirs.get_tensor(name)
            for one in (ours.get_tensor(name), everything[name], ours.get_slice(name)[...]):
                assert (type(one), one.dtype, one.shape) == (np.ndarray, other.dtype, other.shape), name
                assert one.tobytes() == other.tobytes(), name
            assert ours.get_tensor(name).flags.writeable == other.flags.writeable
            assert ours.get_tensor(name).flags.c_contiguous


@pytest.mark.parametrize("index", [slice(None), (), (slice(1, 3), 0), (2, -1), [], (..., slice(0, 2))], ids=repr)
def test_slices_of_arrays(index: Any, here: Daemon, path: Path) -> None:
    with weightd.torch.safe_open(path, "np") as ours, safetensors.safe_open(path, "np") as theirs:
        one, other = ours.get_slice("a")[index], theirs.get_slice("a")[index]
        assert (type(one), one.dtype, one.shape) == (type(other), other.dtype, other.shape)
        assert one.tolist() == other.tolist()


def test_an_array_is_shared_memory_and_a_write_is_seen_by_nobody_else(here: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", {"a": np.zeros((64, 1024), np.float32)})
    with weightd.torch.safe_open(path, "np") as file:
        array, twin = file.get_tensor("a"), file.get_tensor("a")
    assert array.__array_interface__["data"] == twin.__array_interface__["data"]
    array[3] = 1
    assert weightd.torch.load_file(path)["a"].sum() == 0
    with weightd.torch.safe_open(path, "np") as file:
        assert file.get_tensor("a").sum() == 0
    assert array.sum() == 1024


def test_numpy_without_a_daemon(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTD_SOCKET", str(tmp_path / "nobody.sock"))
    with pytest.warns(RuntimeWarning, match="loaded privately"):
        file = weightd.torch.safe_open(path, "np", fallback="local")
    assert type(file.get_tensor("a")) is np.ndarray
    with file:
        pass
    with pytest.raises(safetensors.SafetensorError):
        file.keys()


# -- what safetensors 0.9 adds ----------------------------------------------------------------------------------------


def test_the_header_entry_of_each_tensor(here: Daemon, path: Path) -> None:
    with path.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    del header["__metadata__"]
    for framework in ("pt", "np"):
        with weightd.torch.safe_open(path, framework) as file:
            assert set(file.keys()) == set(header)
            for name, entry in header.items():
                meta = file.get_tensor_meta(name)
                found = meta.dtype, meta.shape, list(meta.data_offsets)
                assert found == (entry["dtype"], entry["shape"], entry["data_offsets"])
            with pytest.raises(safetensors.SafetensorError, match="'zz'"):
                file.get_tensor_meta("zz")
    with pytest.raises(safetensors.SafetensorError, match="closed"):
        file.get_tensor_meta("a")


def test_prefetch_has_the_signature_of_safetensors() -> None:
    """As 0.9.0rc1 has it; where it is newer than what is installed here, nothing can be compared."""
    parameters = inspect.signature(weightd.torch.safe_open.prefetch).parameters
    assert [(p.name, p.kind.name, p.default) for p in list(parameters.values())[1:]] == [
        ("plan", "POSITIONAL_OR_KEYWORD", None), ("device", "KEYWORD_ONLY", None), ("threads", "KEYWORD_ONLY", 8),
    ]  # fmt: skip
    methods = {name for name in dir(_safetensors.PrefetchLoader) if not name.startswith("_")}
    assert methods == {"names", "take", "close"}


@on_gpus
def test_prefetch_hands_out_each_tensor_once(backend: Backend, here: Daemon, tmp_path: Path) -> None:
    arrays = {"b": np.arange(12, dtype=np.float32).reshape(3, 4), "a": np.array(7, np.int64), "c": np.zeros((0, 2))}
    path = checkpoints.write(tmp_path / "m.safetensors", arrays)
    with weightd.torch.safe_open(path, "pt", backend.device) as file:
        with file.prefetch(threads=2) as loader:
            assert loader.names() == file.offset_keys()
            assert len(loader) == 3
            assert loader.take("b").tolist() == arrays["b"].tolist()
            rest = dict(loader)
            assert {name: tensor.tolist() for name, tensor in rest.items()} == {"a": 7, "c": []}
            assert list(loader) == []
            for name, message in (("b", "already delivered"), ("zz", "not in the prefetch plan")):
                with pytest.raises(safetensors.SafetensorError, match=message):
                    loader.take(name)
        planned = file.prefetch({"b": slice(-2, None), "a": None})
    assert sorted(planned.names()) == ["a", "b"]
    assert planned.take("b").tolist() == arrays["b"][-2:].tolist()  # the file is closed by now
    planned.close()
    with pytest.raises(safetensors.SafetensorError, match="closed"):
        planned.take("a")
    with pytest.raises(safetensors.SafetensorError, match="closed"):
        list(planned)


def test_prefetch_to_another_device(
    start_daemon: Callable[..., Daemon], fake_driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(Backend("double", "cuda_vmm", fake_driver), device="host,cuda:0")
    monkeypatch.setattr("weightd._tensors._raw", fake_torch._raw)
    monkeypatch.setenv("WEIGHTD_SOCKET", str(daemon.socket))
    path = checkpoints.write(tmp_path / "m.safetensors", {"a": np.arange(4, dtype=np.float32)})
    with weightd.torch.safe_open(path, "pt", "cpu") as file, file.prefetch(device="cuda:0") as loader:
        assert loader.take("a").tolist() == [0, 1, 2, 3]
        checkpoints.write(path, {"a": np.ones(4, np.float32)})
        with pytest.raises(safetensors.SafetensorError, match="changed since it was opened"):
            file.prefetch(device="cuda:0")
    forget_client()


PLANS: dict[str, tuple[Any, str]] = {
    "empty": ({}, "selects no tensors"),
    "unknown tensor": ({"zz": None}, "does not contain tensor 'zz'"),
    "key that is no name": ({3: None}, "not 3"),
    "value that is no slice": ({"a": 3}, "must be None or a slice, not 3"),
    "step": ({"a": slice(0, 1, 2)}, "must have step 1, not 2"),
    "rows of a scalar": ({"scalar": slice(0, 1)}, "is 0-d and has no rows"),
    "beyond": ({"a": slice(0, 9)}, "9 is out of range for 3 rows"),
    "before": ({"a": slice(-4, None)}, "-4 is out of range for 3 rows"),
    "bounds of text": ({"a": slice("a", 2)}, "whole numbers or None, not 'a'"),
    "rows of half a byte": ({"pair": slice(0, 2)}, "not a whole number of bytes"),
    "dtype that torch lacks": ({"six": None}, "F6_E2M3"),
    "everything, with a dtype that torch lacks": (None, "F6_E2M3"),
}


@pytest.mark.backends("cuda_vmm")
@pytest.mark.parametrize("name", PLANS)
def test_plans_that_cannot_be(name: str, backend: Backend, here: Daemon, path: Path) -> None:
    plan, message = PLANS[name]
    with (
        weightd.torch.safe_open(path, "pt", backend.device) as file,
        pytest.raises(safetensors.SafetensorError, match=message) as caught,
    ):
        file.prefetch(plan)
    assert isinstance(caught.value, weightd.WeightdError)


def test_prefetch_is_for_torch_on_gpus(here: Daemon, path: Path) -> None:
    with weightd.torch.safe_open(path, "pt") as file:
        for device in (None, "cpu"):
            with pytest.raises(safetensors.SafetensorError, match="cuda devices, not cpu"):
                file.prefetch(device=device)
    with pytest.raises(safetensors.SafetensorError, match="closed"):
        file.prefetch()
    with weightd.torch.safe_open(path, "np") as file, pytest.raises(safetensors.SafetensorError, match="torch tensors"):
        file.prefetch()


@pytest.mark.skipif(not hasattr(safetensors.safe_open, "prefetch"), reason="safetensors 0.9 has it")
def test_what_safetensors_refuses_in_a_plan_we_refuse(path: Path) -> None:
    file = safetensors.safe_open(path, "pt")
    for plan, _ in PLANS.values():
        with pytest.raises(safetensors.SafetensorError):
            file.prefetch(plan, device=0)
