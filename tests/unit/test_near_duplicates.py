"""How near two checkpoints are: samples against all bytes, what is read for it, and who is compared at all."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from support import checkpoints
from weightd.plan_report import PlanReport
from weightd_daemon import planning
from weightd_daemon.loader.source import LoaderSource
from weightd_daemon.plans import near_duplicates

MIB = 1 << 20


def plan(*paths: Path, **options: Any) -> PlanReport:
    return planning.plan(planning.Question([str(path) for path in paths], **options))


def changed(values: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The same numbers, a share of them a little larger."""
    random = np.random.default_rng(seed)
    chosen = random.random(values.shape) < share
    return np.where(chosen, values * np.float32(1.0001), values).astype(values.dtype)


def tensors(count: int, size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {f"t{i}": random.normal(size=size // 4).astype(np.float32) for i in range(count)}


def full(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> tuple[float, float]:
    """Equal elements and the size of the difference, over all bytes."""
    a, b = (np.concatenate(list(values.values())) for values in (first, second))
    difference = a.view(np.uint32) ^ b.view(np.uint32)
    frames = [
        difference[at : at + MIB // 4].view(np.uint8).reshape(-1, 4) for at in range(0, len(difference), MIB // 4)
    ]
    compressed = sum(len(zstandard.ZstdCompressor(level=1).compress(frame.T.tobytes())) for frame in frames)
    return float((difference == 0).mean()), compressed / a.nbytes


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes read for comparing, by file name."""
    read: Counter[str] = Counter()
    estimate = near_duplicates.estimate
    read_into = LoaderSource.read_into

    def counting(source: LoaderSource, buffer: memoryview, offset: int) -> None:
        read[Path(source.name).name] += len(buffer)
        read_into(source, buffer, offset)

    def watched(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoaderSource, "read_into", counting)
            return estimate(*arguments)

    monkeypatch.setattr(near_duplicates, "estimate", watched)
    return read


def test_small_ones_are_compared_whole(tmp_path: Path, counted: Counter[str]) -> None:
    first = tensors(5, MIB // 2 + 12)
    second = {name: changed(values, 0.3, 1) for name, values in first.items()} | {"t2": first["t2"]}
    a = checkpoints.write(tmp_path / "a.safetensors", first)
    b = checkpoints.write(tmp_path / "b.safetensors", second)
    (near,) = plan(a, b).near_duplicates or ()
    equal, ratio = full(first, second)
    assert (near.a, near.b) == (str(a), str(b))
    assert near.equal_elements == pytest.approx(equal)
    assert near.delta_ratio == pytest.approx(ratio, abs=0.002)
    assert near.sampled_bytes == 8 * (MIB // 2 + 12), "equal tensors are known to be"
    assert counted == {"a.safetensors": near.sampled_bytes // 2, "b.safetensors": near.sampled_bytes // 2}


def test_a_sample_is_near_the_whole_and_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tensors(8, 2 * MIB + 64)
    # How much is changed depends on the tensor, so that a sample of some tensors only would be far off.
    second = {name: changed(values, 0.1 * number, number) for number, (name, values) in enumerate(first.items())}
    paths = [checkpoints.write(tmp_path / f"{name}.safetensors", some) for name, some in (("a", first), ("b", second))]
    estimate = near_duplicates.estimate
    monkeypatch.setattr(near_duplicates, "estimate", lambda *arguments: estimate(*arguments, 4 * MIB))
    (near,) = plan(*paths).near_duplicates or ()
    assert 3.9 * MIB < near.sampled_bytes <= 4 * MIB, "an eighth"
    equal, ratio = full(first, second)
    assert near.equal_elements == pytest.approx(equal, abs=0.02)
    assert near.delta_ratio == pytest.approx(ratio, abs=0.02)
    assert plan(*paths).near_duplicates == (near,)


def test_small_tensors_count_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tensors(1, 8 * MIB) | {f"small{name}": values for name, values in tensors(512, 8196).items()}
    second = {name: changed(values, 0.9 if "small" in name else 0.05, 1) for name, values in first.items()}
    paths = [checkpoints.write(tmp_path / f"{name}.safetensors", some) for name, some in (("a", first), ("b", second))]
    estimate = near_duplicates.estimate
    monkeypatch.setattr(near_duplicates, "estimate", lambda *arguments: estimate(*arguments, 4 * MIB))
    (near,) = plan(*paths).near_duplicates or ()
    assert 3.9 * MIB < near.sampled_bytes <= 4 * MIB
    equal, ratio = full(first, second)
    assert near.equal_elements == pytest.approx(equal, abs=0.02)
    assert near.delta_ratio == pytest.approx(ratio, abs=0.02)


def test_who_is_compared(tmp_path: Path) -> None:
    base = tensors(2, MIB)
    tuned = base | {"t1": changed(base["t1"], 0.5, 1)}
    folder = {
        "base": base,
        "copy": base,
        "other-name": {"x0": base["t0"], "t1": tuned["t1"]},
        "other-shape": base | {"t1": tuned["t1"].reshape(2, -1)},
        "tuned": tuned,
    }
    paths = {name: checkpoints.write(tmp_path / f"{name}.safetensors", some) for name, some in folder.items()}
    found = plan(*paths.values())
    pairs = [(Path(near.a).stem, Path(near.b).stem) for near in found.near_duplicates or ()]
    assert pairs == [("base", "tuned"), ("copy", "tuned")]
    assert plan(paths["base"], paths["copy"]).near_duplicates == ()
    assert plan(*paths.values(), headers=True).near_duplicates is None, "that would be reading more than headers"


def test_tensors_without_bytes_are_equal(tmp_path: Path) -> None:
    first = tensors(1, MIB) | {"empty": np.zeros((0, 4), np.float32)}
    paths = [checkpoints.write(tmp_path / f"{name}.safetensors", first) for name in "ab"]
    assert plan(*paths).near_duplicates == ()


def test_the_number_of_pairs_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MOST_PAIRS", 2)
    paths = [checkpoints.write_random(tmp_path / f"{seed}.safetensors", 1, 4096, seed) for seed in range(4)]
    found = plan(*paths)
    assert (len(found.near_duplicates or ()), found.near_duplicates_left_out) == (2, 4)


@pytest.mark.parametrize("missing", ["numpy", "zstandard"])
def test_without_the_extra_there_are_none_and_it_says_why(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(checkpoints.write_random(tmp_path / f"{seed}.safetensors", 1, 4096, seed)) for seed in range(2)]
    monkeypatch.setitem(sys.modules, missing, None)
    notes: list[str] = []
    found = planning.plan(planning.Question(paths), note=notes.append)
    assert found.near_duplicates is None
    assert notes == ["near duplicates need numpy and zstandard: pip install '.[plan]' in weightd's checkout"]
    notes.clear()
    assert planning.plan(planning.Question(paths[:1]), note=notes.append).near_duplicates == ()
    assert notes == [], "nobody misses what there is nothing to compare for"


def test_a_file_that_is_gone_by_then_costs_its_pair_alone(tmp_path: Path) -> None:
    paths = [checkpoints.write_random(tmp_path / f"{seed}.safetensors", 1, 4096, seed) for seed in range(3)]
    notes: list[str] = []

    def advance(what: str, done: int, total: int) -> None:
        if what == "comparing":
            paths[2].unlink(missing_ok=True)

    found = planning.plan(planning.Question([str(path) for path in paths]), advance=advance, note=notes.append)
    assert [(near.a, near.b) for near in found.near_duplicates or ()] == [(str(paths[0]), str(paths[1]))]
    assert len(notes) == 2
    assert "cannot be compared" in notes[0]
