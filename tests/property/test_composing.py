"""Composed of parts that came through memory, a checkpoint is what a load of its files brings, whatever these are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weightd
from support import checkpoints
from support.backends import HOST
from support.composed import Recipe
from support.gguf_files import F32, Q8_0, STRING, key, whole
from support.shared import SharedDaemons
from weightd._references.files import ReferencedFile
from weightd.resolve import Resolved

SIZES = (0, 4, 272, 1000, 70_000)
"""Bytes of tensors: none, less than a copy is worth, and more; 272 are eight blocks of GGUF's Q8_0."""
CONTENTS = 3

_tensor = st.tuples(st.sampled_from(SIZES), st.integers(0, CONTENTS - 1))
_file = st.tuples(
    st.sampled_from(("", "unet", "vae")), st.booleans(), st.none() | st.dictionaries(st.text(max_size=3), st.text()),
    st.lists(_tensor, max_size=8),
)  # fmt: skip


@pytest.fixture(scope="module")
def client(shared_daemons: SharedDaemons) -> Iterator[weightd.Client]:
    with shared_daemons.on(HOST) as daemon, weightd.connect(daemon.socket, timeout=60.0) as client:
        yield client


def saved(folder: Path, number: int, file: tuple[str, bool, dict[str, str] | None, list[tuple[int, int]]]) -> Path:
    """A safetensors file, or a GGUF file, of tensors whose bytes are told by size and content."""
    _, is_gguf, metadata, tensors = file
    named = {
        f"f{number}.t{at}": (size, checkpoints.random_bytes(made, size)) for at, (size, made) in enumerate(tensors)
    }
    if not is_gguf:
        rows = {name: ("U8", (size,), data) for name, (size, data) in named.items()}
        return checkpoints.write(folder / f"{number}.safetensors", rows, metadata)
    path = folder / f"{number}.gguf"
    quantised = {name: (Q8_0, (4, 64), data) for name, (size, data) in named.items() if size == 272}
    plain = {name: (F32, (size // 4,), data) for name, (size, data) in named.items() if size != 272}
    path.write_bytes(whole({**quantised, **plain}, [key("general.name", STRING, "n" * number)]))
    return path


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(_file, min_size=1, max_size=4), data=st.data())
def test_composed_is_as_loaded(
    client: weightd.Client,
    files: list[tuple[str, bool, dict[str, str] | None, list[tuple[int, int]]]],
    data: st.DataObject,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            ReferencedFile(file[0], str(number), saved(Path(folder), number, file)) for number, file in enumerate(files)
        ]
        with client.attach(Resolved("loaded", tuple(sources))) as attachment:
            recipe = Recipe(attachment)
    client.remove("loaded")
    of_row = data.draw(st.lists(st.integers(0, 2), min_size=len(recipe.rows), max_size=len(recipe.rows)))
    used = client.stats().devices[0]
    assert used.live_bytes == 0
    places = recipe.load_parts(client, of_row)
    live = client.stats().devices[0].live_bytes
    composed = client.compose(recipe.files, recipe.tensors(places), name="composed")
    assert client.stats().devices[0].live_bytes == live, "nothing was moved"
    for part in {place.content_digest for place in places if place} - {composed.content_digest}:
        client.remove(part)
    assert composed.content_digest == recipe.content_digest
    assert (composed.total_bytes, composed.unique_bytes, composed.read_bytes) == (sum(map(len, recipe.bytes)), 0, 0)
    with client.attach("composed") as attachment:
        again = Recipe(attachment)
        assert (again.files, again.rows, again.bytes) == (recipe.files, recipe.rows, recipe.bytes)
    client.remove("composed")
