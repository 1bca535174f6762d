"""transformers on shared memory: in several processes, with outputs equal to those of private loads, bit by bit."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import weightd
import weightd.torch
from support import models
from support.backends import HOST
from support.daemon import Daemon
from support.shared import SharedDaemons
from support.worker import Worker

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def processes(shared_daemons: SharedDaemons) -> Iterator[list[Worker]]:
    """Two processes that have transformers in memory, which takes seconds."""
    with shared_daemons.on(HOST) as daemon:
        started = [Worker(daemon.socket) for _ in range(2)]
        try:
            for worker in started:
                worker.start("import gc; from support import models; models.quiet(); kept = {*globals(), 'kept'}")
            for worker in started:
                worker.finish()
            yield started
        finally:
            for worker in started:
                worker.close()


@pytest.fixture
def daemon(shared_daemons: SharedDaemons, processes: list[Worker], monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    with shared_daemons.on(HOST) as found:
        monkeypatch.setenv("WEIGHTD_SOCKET", str(found.socket))
        yield found
        for worker in processes:
            worker.run("[globals().pop(name) for name in globals().keys() - kept]; gc.collect()")
        gc.collect()
        with weightd.connect(found.socket) as client:
            client.verify()  # nothing that the frameworks did has changed a byte


@pytest.fixture
def worker(daemon: Daemon, processes: list[Worker]) -> Worker:
    return processes[0]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return models.write("llama", tmp_path)


@pytest.mark.parametrize("name", models.TRANSFORMERS)
def test_models_are_shared_and_compute_what_private_ones_do(
    daemon: Daemon, processes: list[Worker], tmp_path: Path, name: str
) -> None:
    path = models.write(name, tmp_path)
    for worker in processes:
        worker.start("result = models.compare(name, path)", name=name, path=str(path))
    for worker in processes:
        found = worker.finish()
        assert found["copied"] == {}
        assert (found["ratio"], found["written"]) == (1.0, 0)
        assert found["equal"]
        assert found["frozen"]
        assert found["tied"]
        assert found["class"]
    assert daemon.connect().stats().checkpoints == 1


def test_shards_and_half_precision(worker: Worker, tmp_path: Path) -> None:
    path = models.write("llama", tmp_path, "bfloat16", max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    found = worker.run("result = models.compare('llama', path)", path=str(path))
    assert (found["ratio"], found["equal"], found["written"]) == (1.0, True, 0)


def test_generating_and_saving(worker: Worker, tmp_path: Path) -> None:
    """All-ones norms are equal tensors, which safetensors refuses to save when they share an address."""
    for name in ("llama", "llama-tied", "mixtral"):
        path = models.write(name, tmp_path)
        assert worker.run(
            """
import torch
from weightd.integrations.transformers import from_pretrained
model = from_pretrained(path)
private = models.auto_class(name).from_pretrained(path)
ids = torch.arange(1, 7)[None]
options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
generated = torch.equal(model.generate(ids, **options), private.generate(ids, **options))
model.save_pretrained(path + "-saved")
result = [generated, models.equal_files(path + "/model.safetensors", path + "-saved/model.safetensors")]
""",
            name=name, path=str(path),
        ) == [True, True], name  # fmt: skip


def test_a_forward_pass_in_every_dtype(worker: Worker, llama: Path) -> None:
    ran = worker.run(
        """
import torch
from weightd.integrations.transformers import from_pretrained
result = []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    model = from_pretrained(path, dtype=dtype, allow_copy=True)
    assert models.run("llama", model).dtype is dtype
    result.append(model.dtype == dtype)
""",
        path=str(llama),
    )
    assert ran == [True] * 4


def test_a_change_in_place_is_this_processes_and_this_parameters_own(
    daemon: Daemon, processes: list[Worker], llama: Path
) -> None:
    """The norms of a new Llama are all ones, and have one digest."""
    one, other = processes
    load = """
from weightd.integrations.transformers import from_pretrained
model = from_pretrained(path)
before = {name: parameter.clone() for name, parameter in model.named_parameters()}
"""
    for worker in processes:
        worker.run(load, path=str(llama))
    one.run("import torch\nwith torch.no_grad(): model.model.layers[0].input_layernorm.weight.mul_(3)")
    changed = "result = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]"
    assert one.run(changed) == ["model.layers.0.input_layernorm.weight"]
    assert other.run(f"import torch; {changed}") == []


def test_another_dtype_is_an_error_unless_it_may_copy(worker: Worker, tmp_path: Path) -> None:
    path = models.write("t5", tmp_path, "float16")
    load = "from weightd.integrations.transformers import from_pretrained, report\nmodel = from_pretrained(path"
    with pytest.raises(AssertionError, match=r"InvalidReferenceError: .*bfloat16 is asked for, but torch\.float16 is"):
        worker.run(f"{load}, dtype='bfloat16')", path=str(path))
    said = "result = [one.reason for one in report(model).copied], report(model).shared_ratio"
    reasons, ratio = worker.run(f"{load}, dtype='bfloat16', allow_copy=True)\n{said}", path=str(path))
    assert ratio == 0.0
    # T5 keeps one matrix of each layer in float32; since when not in bfloat16, is transformers' business.
    assert "stored as F16, used as bfloat16" in reasons
    assert set(reasons) <= {"stored as F16, used as bfloat16", "stored as F16, used as float32"}
    reasons, ratio = worker.run(f"{load})\n{said}", path=str(path))
    assert set(reasons) == {"stored as F16, used as float32"}
    assert 0.5 < ratio < 1.0


def test_what_is_not_in_the_checkpoint_is_named(worker: Worker, llama: Path) -> None:
    found = worker.run(
        """
import transformers
from weightd.integrations.transformers import from_pretrained, report
model = from_pretrained(path, model_class=transformers.LlamaForSequenceClassification, num_labels=3)
result = [(one.name, one.reason, one.nbytes) for one in report(model).copied]
""",
        path=str(llama),
    )
    assert found == [["score.weight", "not in the checkpoint: transformers has initialised it", 3 * 64 * 4]]


def test_buffers_are_private_and_training_writes_to_them_only(worker: Worker, tmp_path: Path) -> None:
    found = worker.run(
        """
import os, torch, transformers
from support.memory import written
from weightd.integrations.transformers import from_pretrained, report
config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
transformers.ResNetModel(config).save_pretrained(path)
before = written(os.getpid())
model = from_pretrained(path)
stored = {name: buffer.clone() for name, buffer in model.named_buffers()}
model.train()(torch.rand(2, 3, 32, 32))
moved = sum(not torch.equal(buffer, stored[name]) for name, buffer in model.named_buffers())
result = [moved, len(report(model).buffers), report(model).shared_ratio, written(os.getpid()) - before]
""",
        path=str(tmp_path / "resnet"),
    )
    moved, buffers, ratio, written = found
    assert moved == buffers > 0
    assert (ratio, written) == (1.0, 0)


def test_a_model_keeps_its_memory_and_gives_it_up_with_its_last_tensor(
    daemon: Daemon, worker: Worker, llama: Path
) -> None:
    worker.run(
        "from weightd.integrations.transformers import from_pretrained; model = from_pretrained(path)", path=str(llama)
    )
    client = daemon.connect()
    (name,) = client.checkpoints()[0].names
    with pytest.raises(weightd.InUseError):
        client.remove(name)
    worker.run("import gc; model = None; gc.collect()")  # transformers' modules are cycles of their own
    client.remove(name)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache with org/tiny: a Llama, and another one in its folder `sub`."""
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "c0ffee"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("c0ffee")
    shutil.copytree(models.write("llama", tmp_path), snapshot)
    shutil.copytree(models.write("llama-tied", tmp_path), snapshot / "sub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def test_a_name_in_the_cache_is_the_checkpoints_name(daemon: Daemon, cache: Path) -> None:
    worker = Worker(daemon.socket)  # the library of the hub reads its environment once
    try:
        found = worker.run(
            """
from support import models; models.quiet()
from weightd.integrations.transformers import from_pretrained, report
whole, part = from_pretrained('org/tiny'), from_pretrained('org/tiny', subfolder='sub')
result = [(report(m).shared_ratio, m.name_or_path, m.config.tie_word_embeddings) for m in (whole, part)]
result += [len(list(m.parameters())) for m in (whole, part)]
"""
        )
    finally:
        worker.close()
    assert found == [[1.0, "org/tiny", False], [1.0, "org/tiny", True], 21, 20]
    names = sorted(checkpoint.name for checkpoint in daemon.connect().checkpoints())
    assert names == ["org/tiny", "org/tiny/sub"]


def test_a_base_model_has_views_too(worker: Worker, tmp_path: Path) -> None:
    """Its names lack the prefix that those of the checkpoint have."""
    path = models.write("mixtral", tmp_path)
    found = worker.run(
        """
import torch, transformers
from weightd.integrations.transformers import from_pretrained, report
model = from_pretrained(path, model_class=transformers.AutoModel)
private = transformers.AutoModel.from_pretrained(path)
result = [report(model).shared_ratio, torch.equal(models.run("", model), models.run("", private))]
""",
        path=str(path),
    )
    assert found == [1.0, True]


def test_what_else_lies_in_the_folder_is_no_matter(daemon: Daemon, installed: Any, llama: Path, tmp_path: Path) -> None:
    """A trainer's checkpoints, half of one, another layout of the same weights, and an index beside the one file."""
    transformers = models.quiet()
    other = models.write("llama-tied", tmp_path)
    shutil.copytree(other, llama / "checkpoint-1")
    (llama / "checkpoint-2").mkdir()
    (llama / "checkpoint-2" / "model.safetensors").write_bytes(b"half")
    shutil.copy(llama / "model.safetensors", llama / "consolidated.safetensors")
    index = {"weight_map": {"model.norm.weight": "consolidated.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    installed.install()
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert installed.report(model).shared_ratio == 1.0
    assert model.name_or_path == str(llama)
    (checkpoint,) = daemon.connect().checkpoints()
    assert checkpoint.total_bytes == installed.report(model).shared_bytes


def test_loading_in_place_is_refused_while_weights_are_shared(daemon: Daemon, llama: Path) -> None:
    from weightd.integrations.transformers import from_pretrained, make_private

    model = from_pretrained(llama)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    with pytest.raises(weightd.InvalidReferenceError, match="load_state_dict writes into weights, and those of Llama"):
        model.load_state_dict(state)
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == state.keys()
    make_private(model)
    model.load_state_dict(state)
    assert daemon.connect().leases() == []


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "means 2 devices"),
        ({"device": "cuda:0", "device_map": "cpu"}, "say one"),
        ({"cache_dir": "/elsewhere"}, "it has a cache of its own"),
        ({"torch_dtype": "float16"}, r"float16 is asked for, but torch\.float32 is"),
        ({"gguf_file": "x.gguf"}, "gguf_file is not supported on attached tensors"),
        ({"use_safetensors": False}, "asks for pickles"),
        ({"dtype": "float7"}, "torch has no such dtype"),
        ({"device": "cuda:9"}, "cuda:9"),
    ],
)
def test_arguments_that_cannot_be(daemon: Daemon, llama: Path, arguments: dict[str, Any], message: str) -> None:
    from weightd.integrations.transformers import from_pretrained

    with pytest.raises(weightd.WeightdError, match=message):
        from_pretrained(llama, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "adapter_config.json").write_text("{}"), "it is an adapter"),
        (lambda path: (path / "config.json").rename(path / "adapter_config.json"), "it is an adapter"),
        (lambda path: edit(path, quantization_config={"quant_method": "fp8"}), "it is quantised"),
        (lambda path: edit(path, architectures=["NoSuchModel"]), "names no class of transformers"),
        (lambda path: (path / "model.safetensors").rename(path / "model.bin"), "has neither model.safetensors nor"),
        (lambda path: edit(path, transformers_weights="other.safetensors"), "names a file of its own"),
    ],
)
def test_checkpoints_that_cannot_be(daemon: Daemon, llama: Path, change: Any, message: str) -> None:
    from weightd.integrations.transformers import from_pretrained

    change(llama)
    with pytest.raises(weightd.WeightdError, match=message):
        from_pretrained(llama)
    assert daemon.connect().leases() == []


@pytest.mark.parametrize("integration", ["transformers", "install"])
@pytest.mark.parametrize("name", ["checkpoint-500", "tuned.safetensors", "~", "llama@main"])
def test_what_is_no_folder_is_never_another_one(
    daemon: Daemon, installed: Any, llama: Path, integration: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a trainer's checkpoint that was deleted, below the folder of a model; transformers knows neither `~` nor @."""
    transformers = models.quiet()
    shutil.copy(llama / "model.safetensors", llama / "tuned.safetensors")
    monkeypatch.setenv("HOME", str(llama))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = name if name == "~" or "@" in name else str(llama / name)
    if integration == "install":
        installed.install()
        with pytest.raises((OSError, ValueError)):  # by version
            transformers.AutoModelForCausalLM.from_pretrained(path)
    elif name != "~":  # which weightd knows
        with pytest.raises(weightd.WeightdError) as error:
            installed.from_pretrained(path, model_class=transformers.AutoModelForCausalLM)
        assert name in str(error.value)
        assert "config.json" not in str(error.value)
    assert daemon.connect().leases() == []


def test_a_folder_without_a_configuration_is_named(daemon: Daemon, installed: Any, llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(weightd.NotFoundError, match=rf"{llama}: has no config\.json"):
        installed.from_pretrained(llama)


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16", "object"])
def test_a_dtype_in_every_spelling(daemon: Daemon, installed: Any, tmp_path: Path, spelling: str, value: str) -> None:
    import torch

    path = models.write("llama", tmp_path, "bfloat16")
    stored, other = (torch.bfloat16, torch.float32) if value == "object" else (value, value.replace("bfloat16", "half"))
    assert installed.report(installed.from_pretrained(path, **{spelling: stored})).shared_ratio == 1.0
    with pytest.raises(weightd.InvalidReferenceError, match=r"is asked for, but torch\.bfloat16 is stored"):
        installed.from_pretrained(path, **{spelling: other})
    cast = installed.from_pretrained(path, allow_copy=True, **{spelling: other})
    assert cast.dtype is (torch.float32 if value == "object" else torch.float16)


def test_a_variant(
    daemon: Daemon, installed: Any, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Given, or the only one there is; in unmodified code only where it is given, as transformers does."""
    import torch

    transformers = models.quiet()
    only, load = tmp_path / "only", transformers.AutoModelForCausalLM.from_pretrained
    load(llama, dtype=torch.float16).save_pretrained(only, variant="fp16")
    shutil.copy(only / "model.fp16.safetensors", llama)
    for path, given, dtype in [(only, {}, "float16"), (llama, {}, "float32"), (llama, {"variant": "fp16"}, "float16")]:
        model = installed.from_pretrained(path, **given)
        assert (installed.report(model).shared_ratio, model.dtype) == (1.0, getattr(torch, dtype))
    names = {name for checkpoint in daemon.connect().checkpoints() for name in checkpoint.names}
    assert {str(llama), f"fp16:{llama}"} <= names, "neither takes the other's"
    assert "of the variant fp16 only" in caplog.text
    with pytest.raises(weightd.NotFoundError, match=r"model\.fp8\.safetensors"):
        installed.from_pretrained(llama, variant="fp8")
    installed.install()
    assert installed.report(load(llama, variant="fp16")).shared_ratio == 1.0
    with pytest.raises(OSError, match=r"no file named"):
        load(only)


def edit(path: Path, **values: object) -> None:
    """Set keys of config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def test_a_model_that_was_loaded_otherwise_has_no_report(daemon: Daemon, llama: Path) -> None:
    from weightd.integrations.transformers import from_pretrained, make_private, report

    transformers = models.quiet()
    with pytest.raises(weightd.InvalidReferenceError, match="was not loaded through weightd"):
        report(transformers.AutoModel.from_pretrained(llama))
    model = from_pretrained(llama)
    make_private(model)
    with pytest.raises(weightd.InvalidReferenceError, match="or is private now"):
        report(model)
    assert daemon.connect().leases() == []


@pytest.mark.parametrize("version", ["4.55.9", "5.25.0", "6.0.0"])
def test_an_unknown_version_is_refused_before_anything_else(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from weightd.integrations import versions

    monkeypatch.setattr(versions, "version", lambda package: version)
    with pytest.raises(versions.UntestedVersionError, match=rf"transformers {version} is not known .* 4\.56 to 4\.57"):
        versions.require_tested("transformers")
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    assert versions.require_tested("transformers") == tuple(int(part) for part in version.split(".")[:2])


def test_a_missing_framework_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightd.integrations import versions

    monkeypatch.setitem(versions.TESTED, "no-such-framework", (("1.0", "1.0"),))
    with pytest.raises(versions.UntestedVersionError, match=r"no-such-framework is not installed; pip install"):
        versions.require_tested("no-such-framework")


# -- unmodified code ---------------------------------------------------------------------------------------------------


@pytest.fixture
def installed() -> Iterator[Any]:
    """The integration, whose `install` is undone."""
    from weightd.integrations import transformers as integration

    yield integration
    integration.uninstall()


def test_unmodified_code_goes_through_the_store(daemon: Daemon, installed: Any, llama: Path) -> None:
    transformers = models.quiet()
    installed.install()
    for model in (
        transformers.AutoModelForCausalLM.from_pretrained(str(llama)),
        transformers.LlamaForCausalLM.from_pretrained(llama, device_map="cpu", dtype="auto"),
        transformers.AutoModel.from_pretrained(llama.parent, subfolder=llama.name),
    ):
        assert installed.report(model).shared_ratio == 1.0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(llama, output_loading_info=True)
    assert not info["missing_keys"]
    assert installed.report(model).shared_ratio == 1.0
    installed.uninstall()
    with pytest.raises(weightd.InvalidReferenceError, match="was not loaded through weightd"):
        installed.report(transformers.AutoModelForCausalLM.from_pretrained(llama))


def test_what_cannot_go_through_the_store_is_left_to_transformers(
    daemon: Daemon, installed: Any, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = models.quiet()
    installed.install()
    caplog.set_level("INFO", "weightd.integrations.transformers")
    config = transformers.LlamaConfig(**models.SIZES)
    state = transformers.LlamaForCausalLM(config).state_dict()
    transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    for _ in range(2):
        model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype={"": "float32"})
    with pytest.raises(
        weightd.InvalidReferenceError, match="LlamaForCausalLM shares no memory: it has a dtype for each"
    ):
        installed.report(model)
    with pytest.raises((OSError, ValueError), match="nowhere"):  # by version
        transformers.AutoModelForCausalLM.from_pretrained(llama / "nowhere")
    assert "names no checkpoint" in caplog.text
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        f"{llama} is left to transformers and shares no memory: it has a dtype for each of its parts",
    ]
    assert daemon.connect().checkpoints() == []


@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", "sequential", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}]
)
def test_a_device_map_that_comes_to_one_device_is_shared(
    daemon: Daemon, installed: Any, llama: Path, device_map: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert installed.report(installed.from_pretrained(llama, device_map=device_map)).shared_ratio == 1.0
    transformers = models.quiet()
    installed.install()
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, device_map=device_map)
    assert installed.report(model).shared_ratio == 1.0


@pytest.mark.parametrize(
    ("usable", "device"),
    [({0: 1, "cpu": 9}, "cuda:0"), ({"cpu": 9}, "cpu"), ({0: 1, 1: 1, "cpu": 9}, None), ({"mps": 9}, None)],
)
def test_a_strategy_places_on_the_one_gpu_that_there_is(
    installed: Any, monkeypatch: pytest.MonkeyPatch, usable: dict[Any, int], device: str | None
) -> None:
    from weightd.integrations import placement

    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: usable)
    if device is None:
        with pytest.raises(weightd.InvalidReferenceError, match="device_map 'auto' means"):
            placement.one_device("auto")
    else:
        assert placement.one_device("auto") == device


def test_where_a_strategy_meets_no_room_transformers_places_the_model(
    daemon: Daemon, installed: Any, llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = models.quiet()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    def full(*args: object, **kwargs: object) -> None:
        raise weightd.CapacityError("there is no room")

    monkeypatch.setattr(weightd.Client, "attach", full)
    installed.install()
    with pytest.raises(weightd.CapacityError):
        transformers.AutoModelForCausalLM.from_pretrained(llama)
    transformers.AutoModelForCausalLM.from_pretrained(llama, device_map="auto")
    assert f"{llama} is left to transformers and shares no memory: there is no room" in caplog.text


def test_a_revision_names_the_one_that_is_loaded(installed: Any) -> None:
    from weightd.integrations import weight_files

    assert weight_files.at_revision("org/name", "v2") == weight_files.at_revision("org/name@v2", "v2") == "org/name@v2"
    assert weight_files.at_revision("./folder", "v2") == "./folder"
    with pytest.raises(weightd.InvalidReferenceError, match="say one"):
        weight_files.at_revision("org/name@v1", "v2")
    with pytest.raises(weightd.NotFoundError, match="v2"):
        installed.from_pretrained("org/no-such-name-in-the-cache", revision="v2")


def test_weights_in_files_of_their_own_are_not_forgotten(
    daemon: Daemon, installed: Any, llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some classes have names of files that transformers loads besides; a state_dict would lack what is in them."""
    transformers = models.quiet()
    monkeypatch.setattr(transformers.LlamaConfig, "extra_files", ("head.safetensors",), raising=False)
    assert installed.report(installed.from_pretrained(llama)).shared_ratio == 1.0
    shutil.copy(llama / "model.safetensors", llama / "head.safetensors")
    with pytest.raises(weightd.InvalidReferenceError, match=r"some of its weights are in head\.safetensors"):
        installed.from_pretrained(llama)
    installed.install()
    transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert "is left to transformers and shares no memory: some of its weights are in head.safetensors" in caplog.text


def test_ties_of_biases_have_a_reason(daemon: Daemon, tmp_path: Path) -> None:
    from weightd.integrations.transformers import from_pretrained, report

    transformers = models.quiet()
    for kind in ("Bert", "Roberta"):
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        path = tmp_path / kind
        getattr(transformers, f"{kind}ForMaskedLM")(config).save_pretrained(path)
        found = report(from_pretrained(path))
        reasons = [one.reason for one in found.copied]
        assert reasons in ([], ["transformers pads the bias of tied output embeddings, which copies it"])  # by version


# -- training and threads ----------------------------------------------------------------------------------------------


def test_training_on_shared_weights_says_what_to_do(
    daemon: Daemon, installed: Any, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    ids = torch.arange(1, 7)[None]
    model = installed.from_pretrained(llama)
    for _ in range(2):
        model.train()
    told = [record.getMessage() for record in caplog.records if "stay as they are" in record.getMessage()]
    assert told == [
        "LlamaForCausalLM: its weights are shared with other processes and stay as they are; only what is private is "
        "trained. To train them, call make_private on that model first"
    ]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"weights of LlamaForCausalLM are shared .*call make_private on that model"):
        model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(weightd.InvalidReferenceError, match="requires_grad_ writes into weights"):
        model.requires_grad_(True)
    assert model.requires_grad_(False) is model
    installed.make_private(model)
    before = model.model.norm.weight.clone()
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    assert not torch.equal(model.model.norm.weight, before)
    with pytest.raises(
        RuntimeError, match="does not require grad"
    ) as error:  # torch's own words, where nothing is ours
        torch.ones(1).sum().backward()
    assert not isinstance(error.value, weightd.WeightdError)


def test_one_thread_loads_at_a_time(
    daemon: Daemon, installed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers itself leaves ties without memory where several do. Plain loads wait for ours as well."""
    from weightd.integrations import pretrained

    transformers = models.quiet()
    path = models.write("llama-tied", tmp_path)
    loading, most, original = [], [], pretrained.original

    def counted(*args: Any, **kwargs: Any) -> Any:
        loading.append(None)
        most.append(len(loading))
        try:
            return original(*args, **kwargs)
        finally:
            loading.pop()

    monkeypatch.setattr(pretrained, "original", counted)
    ways = [installed.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda number: ways[number % 2](path), range(16)))
    assert most == [1] * 16
    assert not [name for model in made for name, parameter in model.named_parameters() if parameter.is_meta]
    assert {installed.report(model).shared_ratio for model in made[::2]} == {1.0}


def test_another_dtype_in_unmodified_code(daemon: Daemon, installed: Any, llama: Path) -> None:
    transformers = models.quiet()
    installed.install()
    with pytest.raises(weightd.InvalidReferenceError, match=r"leave dtype out, or say install\(allow_copy=True\)"):
        transformers.AutoModelForCausalLM.from_pretrained(llama, dtype="bfloat16")
    installed.install(allow_copy=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype="bfloat16")
    assert installed.report(model).shared_ratio == 0.0


def test_without_a_daemon(
    installed: Any, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = models.quiet()
    monkeypatch.setenv("WEIGHTD_SOCKET", str(tmp_path / "nobody.sock"))
    installed.install()
    with pytest.raises(weightd.DaemonUnreachableError):
        transformers.AutoModelForCausalLM.from_pretrained(llama)
    installed.install(fallback="local")
    transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert f"{llama} is left to transformers and shares no memory: no weightd daemon" in caplog.text
    with pytest.raises(weightd.InvalidReferenceError, match="fallback 'never'"):
        installed.install(fallback="never")
