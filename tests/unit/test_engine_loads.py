"""What engines' integrations have in common: options and settings that cannot be, and loads that use thread pools."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from weightd.errors import DeviceMismatchError, InvalidReferenceError
from weightd.integrations.engines import (
    PRIVATE_BY_OPTION,
    EngineOptionError,
    EngineOptions,
    by_quantisation,
    class_name,
    in_this_thread,
    refuse_settings,
    store_device,
)

REFUSED = {"cpu_offload_gb": (0, "moves weights"), "enable_eplb": (False, "writes experts")}


def test_options_that_are_not_given_are_the_usual_ones() -> None:
    assert EngineOptions.of({}, "here") == EngineOptions("error", (), 0.0, None)


def test_options_are_taken_as_they_are_given() -> None:
    given = {"fallback": "wait", "private": ["*.bias", "head*"], "require": 1, "socket": "/run/w.sock"}
    options = EngineOptions.of(given, "here")
    assert options == EngineOptions("wait", ("*.bias", "head*"), 1.0, "/run/w.sock")
    assert EngineOptions.of({"private": "*.bias"}, "here").private == ("*.bias",)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (True, "here is True: must be an object with options of weightd"),
        (
            {"nope": 1, "fallback": "wait"},
            "here has no option 'nope'; weightd knows fallback, private, require, socket",
        ),
        ({"fallback": "maybe"}, "fallback 'maybe' in here: must be 'error', 'wait' or 'local'"),
        ({"private": [1]}, r"private \[1\] in here: must be a list of patterns"),
        ({"require": "all"}, "require 'all' in here: must be a share from 0 to 1"),
        ({"require": 99}, "require 99 in here"),
        ({"require": True}, "require True in here"),
        ({"socket": 7}, "socket 7 in here: must be a path"),
    ],
)
def test_options_that_cannot_be_are_refused(given: object, sentence: str) -> None:
    with pytest.raises(EngineOptionError, match=sentence) as caught:
        EngineOptions.of(given, "here")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, InvalidReferenceError)


def test_parameters_are_private_by_the_patterns_of_their_names() -> None:
    options = EngineOptions.of({"private": ["model.layers.0.*", "*.bias"]}, "here")
    assert options.private_reason("model.layers.0.mlp.weight") == PRIVATE_BY_OPTION
    assert options.private_reason("lm_head.bias") == PRIVATE_BY_OPTION
    assert options.private_reason("lm_head.weight") == ""


@pytest.mark.parametrize("settings", [{}, {"cpu_offload_gb": 0, "enable_eplb": False}, {"cpu_offload_gb": None}])
def test_settings_that_do_no_harm_pass(settings: dict[str, object]) -> None:
    refuse_settings(SimpleNamespace(**settings), REFUSED, "leave us out")


def test_settings_that_write_to_weights_are_refused() -> None:
    with pytest.raises(EngineOptionError, match=r"--cpu-offload-gb \(4\) moves weights, .*: leave it out, or do else"):
        refuse_settings(SimpleNamespace(cpu_offload_gb=4, enable_eplb=False), REFUSED, "do else")


def test_modules_without_a_method_are_left_alone_and_methods_are_asked_about() -> None:
    module = torch.nn.Linear(2, 2)
    assert by_quantisation(module, lambda method, _: class_name(method)) == ""
    module.quant_method = SimpleNamespace()  # type: ignore[assignment]  # as engines have it
    assert by_quantisation(module, lambda method, _: class_name(method)) == "types.SimpleNamespace"


def test_only_host_and_nvidia_memory_can_be_had() -> None:
    assert store_device(torch.device("cpu")) == "cpu"
    for name in ("xpu", "mps"):
        with pytest.raises(DeviceMismatchError, match="weightd has memory on the host and on NVIDIA GPUs only"):
            store_device(torch.device(name))


def test_what_a_load_submits_to_a_pool_runs_in_its_own_thread() -> None:
    here = threading.get_ident()
    with ThreadPoolExecutor() as pool:
        with in_this_thread():
            assert pool.submit(threading.get_ident).result() == here
            assert list(pool.map(lambda one: (one, threading.get_ident()), "ab")) == [("a", here), ("b", here)]
            failed = pool.submit(lambda: 1 // 0)
            assert isinstance(failed.exception(), ZeroDivisionError)
        assert pool.submit(threading.get_ident).result() != here


def test_other_threads_have_their_pools_meanwhile() -> None:
    found = []

    def elsewhere() -> None:
        with ThreadPoolExecutor() as pool:
            found.append(pool.submit(threading.get_ident).result() != threading.get_ident())

    with in_this_thread():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(60)
    assert found == [True]
