"""A stand-in of Triton's Python backend, which cannot be installed here: the module that models import, and its caller.

In Triton a model runs in a stub process, which imports model.py, calls `initialize` once, `execute` with each batch and
`finalize` at the end. The interface is that of the backend's README; checks that the stub makes are made here as well.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_DTYPES = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32}


class Tensor:
    """A named array: an input or an output."""

    def __init__(self, name: str, numpy_array: np.ndarray) -> None:
        self._name, self._array = name, numpy_array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    """What a response has in the place of outputs."""

    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class InferenceRequest:
    """The inputs of one request."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self._inputs = inputs

    def inputs(self) -> list[Tensor]:
        return self._inputs


class InferenceResponse:
    """Outputs, or an error."""

    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._outputs, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    """The input of that name; None where there is none."""
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def parse(text: str) -> dict[str, Any]:
    """A config.pbtxt as the JSON of `model_config`, as far as such files go: messages, lists and plain values."""
    tokens = re.findall(r'"[^"]*"|[\[\]{}:,]|[^\s\[\]{}:,"]+', re.sub(r"#.*", "", text))
    config = _message(tokens, end="")
    config["parameters"] = {one["key"]: one["value"] for one in config["parameters"]}
    return config


def _message(tokens: list[str], end: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while tokens and tokens[0] != end:
        name = tokens.pop(0)
        if tokens[0] == ":":
            tokens.pop(0)
        found[name] = _value(tokens)
    if end:
        tokens.pop(0)
    return found


def _value(tokens: list[str]) -> Any:
    token = tokens.pop(0)
    if token == "{":
        return _message(tokens, "}")
    if token == "[":
        values = []
        while tokens[0] != "]":
            values.append(_value(tokens))
            if tokens[0] == ",":
                tokens.pop(0)
        tokens.pop(0)
        return values
    return token.strip('"') if not re.fullmatch(r"-?\d+", token) else int(token)


class Instance:
    """One instance of a model of a repository, in this process: what Triton's stub process is.

    `parameters` replace those of the configuration. Errors: those of `initialize`.
    """

    def __init__(self, folder: Path, number: int, **parameters: str) -> None:
        self.config = parse((folder / "config.pbtxt").read_text())
        self.config["parameters"] |= {name: {"string_value": value} for name, value in parameters.items()}
        module = ModuleType("triton_python_backend_utils")
        for public in (Tensor, TritonError, InferenceRequest, InferenceResponse, get_input_tensor_by_name):
            setattr(module, public.__name__, public)
        sys.modules[module.__name__] = module
        spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        model = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(model)
        self._model = model.TritonPythonModel()
        (group,) = self.config["instance_group"]
        self._model.initialize(
            {
                "model_config": json.dumps(self.config),
                "model_instance_device_id": "0",
                "model_instance_kind": group["kind"].removeprefix("KIND_"),
                "model_instance_name": f"{self.config['name']}_0_{number}",
                "model_name": self.config["name"],
                "model_repository": str(folder),
                "model_version": "1",
            }
        )

    def execute(self, *batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """Outputs by name of each request, or {"error": its message}. Names and types are the configuration's."""
        types = {one["name"]: _DTYPES[one["data_type"]] for one in self.config["input"]}
        requests = []
        for inputs in batch:
            assert inputs.keys() == types.keys()
            requests.append(InferenceRequest([Tensor(name, np.array(v, types[name])) for name, v in inputs.items()]))
        for tensor in (tensor for request in requests for tensor in request.inputs()):
            tensor.as_numpy().flags.writeable = False  # shared memory of the server, which nobody may write to
        responses = self._model.execute(requests)
        assert len(responses) == len(requests), "one response for each request"
        return [self._told(response) for response in responses]

    def _told(self, response: InferenceResponse) -> dict[str, Any]:
        error = response.error()
        if error is not None:
            return {"error": error.message()}
        told = {}
        for config, tensor in zip(self.config["output"], response.output_tensors(), strict=True):
            array = tensor.as_numpy()
            assert tensor.name() == config["name"]
            assert array.dtype == _DTYPES[config["data_type"]]
            fits = [wanted in (-1, size) for wanted, size in zip(config["dims"], array.shape, strict=True)]
            assert all(fits), (config, array.shape)
            told[tensor.name()] = array.tolist()
        return told

    def finalize(self) -> None:
        """The model is unloaded; the process may serve on."""
        self._model.finalize()
