"""The recorded load of a toy engine, on a daemon: equal values, views wherever there can be, and words for the rest."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import weightd
from support import toy_engine
from support.daemon import Daemon
from support.toy_engine import EXPERTS, SIZE, Engine
from weightd.binding import NOT_ADJACENT, NOT_LOADED, Binding, BindingError, bind
from weightd.recording import Recording
from weightd.types import TensorKey

SQUARE = 2 * SIZE * SIZE


class Loaded:
    """An engine by a recorded load, and what came of it."""

    def __init__(self, attachment: weightd.Attachment, make: Callable[[], Engine] = Engine, **options: Any) -> None:
        self.attachment = attachment
        self.recording = Recording("cpu", [attachment])
        with self.recording.building():
            self.engine = make()
        with self.recording.loading():
            self.engine.load_weights((key.name, attachment.tensor(key.name)) for key in attachment.tensors)
        self.binding: Binding = bind(self.engine, self.recording, **options)

    def shared(self, tensor: torch.Tensor) -> bool:
        """By address, whatever the binding says."""
        return self.attachment.locate(tensor) is not None


@pytest.fixture
def attached(daemon: Daemon, tmp_path: Path) -> Iterator[Callable[..., weightd.Attachment]]:
    """Attach the toy checkpoint, with changes to it."""
    with daemon.connect() as client:
        opened = []

        def attach(**changed: torch.Tensor) -> weightd.Attachment:
            path = tmp_path / f"{len(opened)}" / "model.safetensors"
            path.parent.mkdir()
            tensors = toy_engine.checkpoint() | {name.replace("__", "."): one for name, one in changed.items()}
            safetensors.torch.save_file(tensors, path)
            opened.append(client.attach(path))
            return opened[-1]

        yield attach
        for one in opened:
            one.close()
        gc.collect()


Attach = Callable[..., weightd.Attachment]


def equal(one: Engine, other: Engine) -> bool:
    """Whether every tensor of two engines is equal, bit by bit, under every name, and what they compute."""
    mine, theirs = (
        {**dict(each.named_parameters(remove_duplicate=False)), **dict(each.named_buffers())} for each in (one, other)
    )
    plain = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("first_rows", "plain"))
    hidden = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(9)).bfloat16()
    return (
        mine.keys() == theirs.keys()
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
        and plain
        and torch.equal(one(hidden), other(hidden))
    )


def test_an_engine_is_what_it_would_have_loaded_by_itself(attached: Attach) -> None:
    loaded = Loaded(attached())
    expected = toy_engine.own_load(toy_engine.checkpoint())
    assert equal(loaded.engine, expected)
    with loaded.recording.guarding(loaded.binding.name_at):
        loaded.engine.post_process()
    expected.post_process()
    assert equal(loaded.engine, expected)


def test_what_lies_in_a_row_is_a_view_and_all_else_says_why_not(attached: Attach) -> None:
    loaded = Loaded(attached())
    engine, reasons = loaded.engine, {one.name: one.reason for one in loaded.binding.parameters}
    for name in ("qkv", "experts", "captured", "embed", "twice"):
        assert reasons.pop(name) == ""
        assert loaded.shared(getattr(engine, name))
        assert not getattr(engine, name).requires_grad
    assert reasons == {
        "cast": "cast from bfloat16 to float32",
        "transposed": "sliced, transposed or expanded while it is loaded: its bytes are no run of stored ones",
        "padded": "written by aten::fill_.Scalar",
        "apart": NOT_ADJACENT,
        "in_place": "written by aten::mul_.Scalar"
        if reasons["in_place"].endswith("Scalar")
        else "written by aten::mul_.Tensor",
        "norm": "made with values before it was loaded",
        "lonely": NOT_LOADED,
    }
    assert not any(loaded.shared(getattr(engine, name)) for name in reasons)
    assert loaded.binding.missing == ("lonely",)
    assert not engine.lonely.any()
    assert loaded.binding.shared_bytes == SQUARE * (3 + 2 * EXPERTS + 2 + 1) + 2 * 4 * SIZE


def test_tensors_stay_the_same_objects_for_whoever_holds_them(attached: Attach) -> None:
    loaded = Loaded(attached())
    engine = loaded.engine
    assert engine.router.bias is engine.captured
    assert engine.head is engine.embed
    assert type(engine.qkv) is toy_engine.Weight
    assert engine.qkv.loader is engine
    assert engine.first_rows.data_ptr() == engine.qkv.data_ptr()
    assert loaded.binding.objects > 0
    for tensor in (engine.plain, engine.scratch, engine.like, engine.running, engine.cos):
        assert not tensor.is_meta
        assert not loaded.shared(tensor)


def test_there_is_no_sweep_where_modules_have_all_tensors(attached: Attach) -> None:
    class Plain(Engine):
        def __init__(self) -> None:
            super().__init__()
            del self.first_rows, self.plain, self.scratch, self.like

        def load_weights(self, weights: Any) -> None:
            super().load_weights((name, one) for name, one in weights if name != "plain")

    gc.collect()
    assert Loaded(attached(), Plain).binding.objects == 0


def test_groups_name_what_should_lie_in_a_row(attached: Attach) -> None:
    assert Loaded(attached()).binding.groups == (tuple(TensorKey("", name) for name in "zxy"),)


def test_a_fine_tune_shares_all_but_the_parameter_that_it_changes(attached: Attach, daemon: Daemon) -> None:
    base = Loaded(attached())
    changed = toy_engine.checkpoint(seed=1)["self_attn.q_proj.weight"]
    tuned = Loaded(attached(self_attn__q_proj__weight=changed))
    expected = toy_engine.own_load(toy_engine.checkpoint() | {"self_attn.q_proj.weight": changed})
    assert equal(tuned.engine, expected)
    assert not equal(tuned.engine, base.engine)
    with daemon.connect() as client:
        assert client.stats().devices[0].live_bytes < 1.2 * sum(one.nbytes for one in toy_engine.checkpoint().values())


def test_a_parameter_that_is_to_be_private_is(attached: Attach) -> None:
    loaded = Loaded(attached(), private=lambda name, module: "quantised" if name == "qkv" else "")
    assert {one.name: one.reason for one in loaded.binding.parameters}["qkv"] == "quantised"
    assert not loaded.shared(loaded.engine.qkv)
    assert loaded.engine.first_rows.data_ptr() == loaded.engine.qkv.data_ptr()
    assert equal(loaded.engine, toy_engine.own_load(toy_engine.checkpoint()))
    with loaded.recording.guarding():
        loaded.engine.post_process(writes=True)


def test_a_write_to_stored_bytes_is_refused_and_named(attached: Attach) -> None:
    loaded = Loaded(attached())
    words = r"Engine\.post_process would write to qkv .*the option `private`"
    with loaded.recording.guarding(loaded.binding.name_at), pytest.raises(weightd.SharedWeightsError, match=words):
        loaded.engine.post_process(writes=True)
    assert torch.equal(loaded.engine.qkv[:4], loaded.attachment.tensor("self_attn.q_proj.weight")[:4])


@pytest.mark.parametrize(
    "write",
    [
        lambda tensor: tensor.add_(1),
        lambda tensor: torch.add(tensor.clone(), 1, out=tensor.data),
        lambda tensor: torch._foreach_mul_([tensor.data], 2),
        lambda tensor: tensor.data.view(torch.uint8).zero_(),
        lambda tensor: tensor.data.t().copy_(torch.zeros(1).expand(tensor.t().shape)),
        lambda tensor: tensor.data.index_fill_(0, torch.tensor([1]), 0),
    ],
)
def test_every_way_to_write_is_refused(attached: Attach, write: Callable[[torch.Tensor], object]) -> None:
    loaded = Loaded(attached())
    with loaded.recording.guarding(), pytest.raises(weightd.SharedWeightsError), torch.no_grad():
        write(loaded.engine.embed)
    assert torch.equal(loaded.engine.embed, toy_engine.checkpoint()["embed"])


def test_memory_outlives_attachment_and_recording(attached: Attach) -> None:
    loaded = Loaded(attached())
    engine = loaded.engine
    loaded.attachment.close()
    del loaded
    gc.collect()
    assert equal(engine, toy_engine.own_load(toy_engine.checkpoint()))


def test_a_parameter_with_a_weak_reference_is_an_error_not_a_hole(attached: Attach) -> None:
    kept = []

    class Watched(Engine):
        def __init__(self) -> None:
            super().__init__()
            kept.append(weakref.ref(self.qkv))

    with pytest.raises(BindingError, match=r"cannot be replaced.*weak references"):
        Loaded(attached(), Watched)


def test_an_engine_that_asks_a_parameter_for_its_device_gets_memory_there(attached: Attach) -> None:
    class Asking(Engine):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.ones(4, device=self.qkv.device)
            self.sums = torch.zeros_like(self.qkv)

        def load_weights(self, weights: Any) -> None:
            super().load_weights((name, one.to(self.qkv.device)) for name, one in weights)

    loaded = Loaded(attached(), Asking)
    assert not loaded.engine.table.is_meta
    assert not loaded.engine.sums.is_meta
    assert loaded.shared(loaded.engine.qkv)
    assert equal(loaded.engine, toy_engine.own_load(toy_engine.checkpoint()))


def test_a_read_while_loading_sees_what_was_loaded_so_far(attached: Attach) -> None:
    seen = []

    class Reading(Engine):
        def load_weights(self, weights: Any) -> None:
            super().load_weights(weights)
            seen.append(self.qkv.data[:SIZE].float().sum().item())

    loaded = Loaded(attached(), Reading)
    stored = toy_engine.checkpoint()["self_attn.q_proj.weight"]
    assert seen == [stored.float().sum().item()]
    assert {one.name: one.reason for one in loaded.binding.parameters}["qkv"].startswith("read by aten::")
    assert equal(loaded.engine, toy_engine.own_load(toy_engine.checkpoint()))


def test_memory_of_a_replaced_parameter_is_given_back(attached: Attach) -> None:
    """Engines repack weights one layer at a time: nobody may keep what was there before."""
    loaded = Loaded(attached())
    before = loaded.engine.padded.data.untyped_storage()
    assert torch._C._storage_Use_Count(before._cdata) == 2, "the parameter's, and ours"
    loaded.engine.padded.data = torch.zeros(1, dtype=torch.bfloat16)
    assert torch._C._storage_Use_Count(before._cdata) == 1


def test_stored_tensors_that_an_engine_keeps_are_private_as_buffers_and_listed_as_parameters(attached: Attach) -> None:
    class Keeping(Engine):
        def load_weights(self, weights: Any) -> None:
            every = dict(weights)
            super().load_weights(every.items())
            self.register_buffer("table", every["plain"])
            self.kept = torch.nn.Parameter(every["z"], requires_grad=False)
            self.refused = torch.nn.Parameter(every["x"], requires_grad=False)

    loaded = Loaded(attached(), Keeping, private=lambda name, module: "no" if name == "refused" else "")
    engine, reasons = loaded.engine, {one.name: one.reason for one in loaded.binding.parameters}
    assert not loaded.shared(engine.get_buffer("table"))
    assert torch.equal(engine.get_buffer("table"), toy_engine.checkpoint()["plain"])
    assert (reasons["kept"], reasons["refused"]) == ("", "no")
    assert loaded.shared(engine.get_parameter("kept"))
    assert loaded.binding.name_at(engine.get_parameter("kept").data_ptr()) == "kept"
    assert not loaded.shared(engine.get_parameter("refused"))


def test_two_parameters_of_one_stored_tensor_stay_apart(attached: Attach) -> None:
    class Twin(Engine):
        def __init__(self) -> None:
            super().__init__()
            self.twin = torch.nn.Parameter(torch.empty_like(self.embed), requires_grad=False)

        def load_weights(self, weights: Any) -> None:
            every = dict(weights)
            super().load_weights(every.items())
            self.twin.data.copy_(every["embed"])

    loaded = Loaded(attached(), Twin)
    assert {one.name: one.reason for one in loaded.binding.parameters}["twin"].endswith("another parameter, too")
    loaded.engine.twin.data.zero_()
    assert torch.equal(loaded.engine.embed, toy_engine.checkpoint()["embed"])


def test_a_tied_parameter_is_private_by_any_of_its_names(attached: Attach) -> None:
    loaded = Loaded(attached(), private=lambda name, module: "no" if name == "head" else "")
    assert {one.name: one.reason for one in loaded.binding.parameters}["embed"] == "no"
    assert not loaded.shared(loaded.engine.embed)


def test_a_tied_parameter_of_another_module_is_private_by_that_modules_rules_and_circles_end(attached: Attach) -> None:
    class Head(torch.nn.Module):
        def __init__(self, engine: Engine) -> None:
            super().__init__()
            self.weight = engine.embed
            self.engine = engine  # which contains this

    class Circle(Engine):
        def __init__(self) -> None:
            super().__init__()
            self.last = Head(self)

    loaded = Loaded(attached(), Circle, private=lambda name, module: "no" if isinstance(module, Head) else "")
    assert {one.name: one.reason for one in loaded.binding.parameters}["embed"] == "no"
    assert loaded.engine.last.weight is loaded.engine.embed


def test_what_is_loaded_in_part_is_missing(attached: Attach) -> None:
    class Half(Engine):
        def load_weights(self, weights: Any) -> None:
            super().load_weights((name, one) for name, one in weights if "k_proj" not in name)

    loaded = Loaded(attached(), Half)
    assert set(loaded.binding.missing) == {"lonely", "qkv"}
    assert not loaded.engine.qkv[SIZE : 2 * SIZE].any()


def test_a_copy_that_an_engine_moves_and_changes_is_its_own(attached: Attach) -> None:
    class Moving(Engine):
        def load_weights(self, weights: Any) -> None:
            super().load_weights(weights)
            own = torch.ones(SIZE, dtype=torch.bfloat16)
            own.to(self.lonely.device, copy=True).mul_(3)
            self.lonely.data.copy_(own)

    assert Loaded(attached(), Moving).engine.lonely.eq(1).all()


def test_other_threads_are_left_alone(attached: Attach) -> None:
    made: list[torch.Tensor] = []

    class Threaded(Engine):
        def __init__(self) -> None:
            super().__init__()
            thread = threading.Thread(target=lambda: made.append(torch.empty(4)))
            thread.start()
            thread.join()

    Loaded(attached(), Threaded)
    assert not made[0].is_meta


def test_where_a_tensor_lies(attached: Attach) -> None:
    attachment = attached()
    loaded = Loaded(attachment)
    place = attachment.locate(loaded.engine.qkv)
    assert place is not None
    assert [key.name for key in place.tensors] == [f"self_attn.{part}_proj.weight" for part in "qkv"]
    assert (place.address, place.length) == (loaded.engine.qkv.data_ptr(), 3 * SQUARE)
    inner = attachment.locate(loaded.engine.qkv[SIZE : SIZE + 2, 1:3])
    assert inner is not None
    assert [key.name for key in inner.tensors] == ["self_attn.k_proj.weight"]
    assert inner.length == 2 * (SIZE + 2)
    assert attachment.locate(torch.ones(4)) is None
    assert attachment.locate(torch.empty(4, device="meta")) is None


def test_nothing_warns(attached: Attach) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loaded(attached())
