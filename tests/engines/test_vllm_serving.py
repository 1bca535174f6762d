"""vLLM serves on weightd's memory, on the CPU: engines share weights, answer as on their own, and outlive the daemon.

oneDNN is off in all of them: with it vLLM's CPU backend packs linear weights anew, and shares none of them. Engines
take long to start, so the tests of this file share four: SmolLM2 by vLLM's own load, twice on weightd's memory, and a
fine-tune of it there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support import memory
from support.daemon import Daemon
from support.engine_models import CHANGED, FINE_TUNE, SMOLLM2
from support.engines import EngineProcess
from support.vllm_serving import PROMPTS, TOKENS

MiB = 2**20
INITIALISED = "made with values before it was loaded"


class Engines(NamedTuple):
    """Processes with engines that run, and what each answered at its start; `measured` is of the first on weightd."""

    own: EngineProcess
    first: EngineProcess
    second: EngineProcess
    tuned: EngineProcess
    answers: dict[str, list[Any]]
    measured: dict[str, int]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    found = Daemon()
    yield found
    found.close(check=False)  # a test has killed it


@pytest.fixture(scope="module")
def engines(daemon: Daemon, checkpoints: dict[str, Path], engine_folder: Path) -> Iterator[Engines]:
    names = ("own", "first", "second", "tuned")
    more = {"XDG_CACHE_HOME": str(engine_folder / "groups")}
    processes = {name: EngineProcess(daemon.socket, engine_folder, more) for name in names}
    try:
        for process in processes.values():
            process.start("from support import vllm_serving as serving")
        for process in processes.values():
            process.finish()
        base, tuned = str(checkpoints[SMOLLM2]), str(checkpoints[FINE_TUNE])
        measured = processes["first"].run("result = serving.measured_with(path)", path=base)
        start = "serving.start(path, load_format); result = serving.answers()"
        processes["own"].start(start, path=base, load_format="auto")
        processes["first"].start(start, path=base, load_format="weightd")
        answers = {"own": processes["own"].finish(), "first": processes["first"].finish()}
        processes["second"].start(start, path=base, load_format="weightd")
        processes["tuned"].start(start, path=tuned, load_format="weightd")
        answers |= {"second": processes["second"].finish(), "tuned": processes["tuned"].finish()}
        yield Engines(**processes, answers=answers, measured=measured)
    finally:
        for process in processes.values():
            process.close()


def kept(process: EngineProcess) -> dict[str, int]:
    """Bytes of a process that are its own, and its part of memory that is shared; without files that it has mapped."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in rollup.splitlines()[1:]}
    return {"private": found["Pss_Anon"], "all": found["Pss_Anon"] + found["Pss_Shmem"]}


def test_answers_are_those_of_vllms_own_load(engines: Engines) -> None:
    own = engines.answers["own"]
    assert [len(tokens) for tokens, _ in own] == [TOKENS] * len(PROMPTS)
    assert engines.answers["first"] == own, "tokens and log-probabilities"
    assert engines.answers["second"] == own
    assert engines.answers["tuned"] != own


@pytest.mark.parametrize("name", ["first", "second", "tuned"])
def test_every_parameter_lies_in_a_segment_or_is_listed(name: str, engines: Engines) -> None:
    """By addresses, after the first answers: what runs has not moved or written to what was shared."""
    process = getattr(engines, name)
    segments = memory.Segments(process.pid)
    places, found = process.run("result = [serving.places(), serving.sharing()]")
    outside = {name for name, address, nbytes in places if not segments.hold(address, nbytes)}
    assert outside == found["private"].keys()
    assert all(found["private"].values())
    inside = {(address, nbytes) for name, address, nbytes in places if name not in outside}
    assert sum(nbytes for _, nbytes in inside) == found["shared"]
    assert found["shared"] > 0.99 * sum(nbytes for _, _, nbytes in places)
    assert found["shared"] > 200 * MiB
    assert memory.written(process.pid) == 0, "bytes of segments that became this process's own"
    assert re.match(r"99\.[0-9] % of the parameters shared: ", found["text"])


def test_engines_have_the_weights_once_between_them(engines: Engines) -> None:
    """What N engines take is N times what is private, and once the weights, within 5 %."""
    first, second, own = kept(engines.first), kept(engines.second), kept(engines.own)
    weights = engines.first.run("result = serving.sharing()")["shared"]
    with_tuned = kept(engines.tuned)
    private = first["private"] + second["private"] + with_tuned["private"]
    together = first["all"] + second["all"] + with_tuned["all"]
    changed = 2 * MiB + 576 * 1536 * 2  # the fine-tune's own tensors, and a little more
    assert together == pytest.approx(private + weights, abs=0.05 * (private + weights) + changed)
    for one in (first, second):
        assert own["private"] - one["private"] > 0.9 * weights, "an engine of its own has them privately"


def test_a_fine_tune_shares_what_is_equal_and_is_not_taken_for_its_base(
    engines: Engines, daemon: Daemon, checkpoints: dict[str, Path]
) -> None:
    files = {name: [str(one) for one in checkpoints[name].glob("*.safetensors")] for name in (SMOLLM2, FINE_TUNE)}
    own, base = (
        engines.tuned.run("result = serving.equal_to(files)", files=files[name]) for name in (FINE_TUNE, SMOLLM2)
    )
    assert set(own) - set(base) == {name for name in CHANGED if "q_proj" not in name}, "q is a part of qkv_proj"
    private = engines.tuned.run("result = serving.sharing()")["private"]
    assert [name for name, why in private.items() if why != INITIALISED] == ["model.layers.5.self_attn.qkv_proj.weight"]
    with daemon.connect() as client:
        found = client.checkpoints()
        assert len(found) == 2
        sizes = [one.total_bytes for one in found]
        assert client.stats().resident_bytes < 1.05 * max(sizes), "the common bytes are there once"


def test_memory_is_attached_before_vllm_measures_it(engines: Engines, daemon: Daemon) -> None:
    """The worker for GPUs asks the loader first, and its load uses the attachment that this has made."""
    measured = engines.measured
    assert measured["before"] == 0
    assert measured["measured"] > 0
    weights = engines.first.run("result = serving.sharing()")["shared"]
    assert weights <= measured["external"] < 1.01 * weights
    assert memory.mappings(engines.first.pid) == measured["measured"], "the load has mapped nothing more"
    with daemon.connect() as client:
        holders = [one.pid for one in client.leases()]
    assert sorted(holders) == sorted(one.pid for one in (engines.first, engines.second, engines.tuned))


def test_a_draft_is_attached_with_its_model(engines: Engines, checkpoints: dict[str, Path]) -> None:
    found = engines.own.run(
        "result = serving.ahead_of_draft(path, draft)", path=str(checkpoints["llama"]), draft=str(checkpoints["qwen3"])
    )
    assert found["external"] == found["parameters"]
    assert found["attached"] == found["loaded"], "the loads have mapped nothing more"


@pytest.mark.parametrize(
    ("extra", "changes", "error"),
    [
        ({"falback": "local"}, {}, "EngineOptionError: --model-loader-extra-config has no option 'falback'"),
        ({"fallback": "disk"}, {}, "EngineOptionError: fallback 'disk'"),
        ({"require": 0.999999}, {}, "LeastSharedError: require 0.999999: of LlamaForCausalLM only 99."),
        ({"socket": "/nonexistent/w.sock"}, {}, "DaemonUnreachableError: no weightd daemon at /nonexistent/w.sock"),
        ({}, {"model_config.enable_sleep_mode": True}, "EngineOptionError: --enable-sleep-mode (True) gives up"),
        ({}, {"parallel_config.enable_eplb": True}, "EngineOptionError: --enable-eplb (True) writes experts"),
        ({}, {"offload_config.uva.cpu_offload_gb": 1}, "EngineOptionError: --cpu-offload-gb (1) moves weights"),
        ({}, {"offload_config.prefetch.offload_group_size": 2}, "EngineOptionError: --offload-group-size (2) moves"),
        ({}, {"weight_transfer_config": {}}, "EngineOptionError: --weight-transfer-config ({}) writes new weights"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    extra: dict[str, Any], changes: dict[str, Any], error: str, engines: Engines, checkpoints: dict[str, Path]
) -> None:
    said = engines.own.run(
        "result = serving.refusal(path, extra, changes)", path=str(checkpoints["llama"]), extra=extra, changes=changes
    )
    assert said.startswith(error)


def test_online_quantisation_is_refused(engines: Engines, checkpoints: dict[str, Path]) -> None:
    said = engines.own.run("result = serving.refusal(path, {}, quantization='fp8')", path=str(checkpoints["llama"]))
    assert "would be quantised while it is loaded" in said


def test_private_parameters_and_a_local_load_are_as_the_options_say(
    engines: Engines, checkpoints: dict[str, Path]
) -> None:
    look = (
        "from weightd.integrations.vllm import report\n"
        "model = serving.load(path, extra)\n"
        "try:\n"
        "    result = {one.name: one.reason for one in report(model).copied}\n"
        "except Exception as error:\n"
        "    result = str(error)\n"
        "del model"
    )
    path = str(checkpoints["llama"])
    named = engines.own.run(look, path=path, extra={"private": ["*.down_proj.*", "lm_head.*"]})
    said = {name for name, reason in named.items() if reason == "the option `private` names it"}
    assert said == {"lm_head.weight", *(f"model.layers.{number}.mlp.down_proj.weight" for number in (0, 1))}
    left = engines.own.run(look, path=path, extra={"fallback": "local", "socket": "/nonexistent/w.sock"})
    assert "shares no memory: vLLM has loaded it by itself, for no weightd daemon" in left


def test_other_weights_are_refused_in_place(engines: Engines) -> None:
    before = engines.first.run("result = serving.answers()")
    for call in (
        "serving._engine.collective_rpc('reload_weights')",
        "serving.in_worker(lambda model: model.load_weights([]))",
        "serving.in_worker(lambda model: get_model_loader(ours).load_weights(model, None))",
    ):
        said = engines.first.run(
            "from vllm.config import LoadConfig\nfrom vllm.model_executor.model_loader import get_model_loader\n"
            "ours = LoadConfig(load_format='weightd')\n"
            f"result = serving.errors_of(lambda: {call})"
        )
        assert any(one.startswith("SharedWeightsError") for one in said), (call, said)
    assert engines.first.run("result = serving.answers()") == before


def test_killed_daemon_leaves_engines_as_they_are(engines: Engines, daemon: Daemon) -> None:
    daemon.kill()
    for name in ("first", "tuned"):
        assert getattr(engines, name).run("result = serving.answers()") == engines.answers[name]
