"""The network of examples/ as a model of ONNX, in the form in which exporters write it, and sessions on it.

Imported by the processes that tests spawn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from support.daemon import ROOT
from support.memory import anonymous

sys.path.append(str(ROOT / "examples"))

Open = Callable[[Path, Any], tuple[Any, dict[str, Any]]]


def write(checkpoint: Path, path: Path) -> Path:
    """Write a checkpoint's network as one file: weights inline, those of linear layers transposed for MatMul."""
    from onnx import TensorProto, helper, numpy_helper

    state = load_file(checkpoint)
    depth = sum(name.startswith("layers.") and name.endswith(".weight") for name in state)
    nodes = [
        helper.make_node("Gather", ["embed.weight", "tokens"], ["embedded"]),
        helper.make_node("ReduceMean", ["embedded"], ["hidden"], axes=[1], keepdims=0),
    ]
    hidden = "hidden"
    for layer in [*(f"layers.{number}" for number in range(depth)), "head"]:
        nodes.append(helper.make_node("MatMul", [hidden, f"{layer}.weight"], [f"{layer}.product"]))
        hidden = "scores" if layer == "head" else f"{layer}.sum"
        nodes.append(helper.make_node("Add", [f"{layer}.product", f"{layer}.bias"], [hidden]))
        if layer != "head":
            nodes.append(helper.make_node("Relu", [hidden], [f"{layer}.out"]))
            hidden = f"{layer}.out"
    is_linear = {name: name.endswith(".weight") and name != "embed.weight" for name in state}
    weights = [
        numpy_helper.from_array(np.ascontiguousarray(array.T) if is_linear[name] else array, name)
        for name, array in state.items()
    ]
    graph = helper.make_graph(
        nodes, "network",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["texts", "tokens"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["texts", state["head.bias"].size])],
        weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def scores(session: Any, text: str) -> list[float]:
    """What a session of the network says of a text."""
    return session.run(None, {"tokens": np.array([list(text.encode())])})[0][0].tolist()


def _options(values: dict[str, Any], add: bool = True, **config: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in config.items():
        options.add_session_config_entry(f"session.{key}", value)
    if add:
        for name, value in values.items():
            options.add_initializer(name, value)
    return options


def _session(graph: bytes | Path, options: Any, *disabled: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )


def prepacked(folder: Path, values: dict[str, Any]) -> Any:
    """As the recipe, without its setting for prepacking."""
    return _session(folder / "graph.onnx", _options(values), "ConstantFolding")


def folded(folder: Path, values: dict[str, Any]) -> Any:
    """As the recipe, without its setting for constant folding."""
    return _session(folder / "graph.onnx", _options(values, disable_prepacking="1"))


def external(folder: Path, values: dict[str, Any]) -> Any:
    """By `add_external_initializers` in the place of `add_initializer`."""
    options = _options(values, add=False, disable_prepacking="1")
    options.add_external_initializers(list(values), list(values.values()))
    return _session(folder / "graph.onnx", options, "ConstantFolding")


def inline(folder: Path, values: dict[str, Any]) -> Any:
    """`add_initializer` over the weights of the model itself, which has them inline."""
    import onnx

    path = folder / "inline.onnx"  # from a file: a session keeps a model that it is given as bytes
    if not path.exists():
        onnx.save(onnx.load(folder / "graph.onnx"), path)  # load brings external data in
    return _session(path, _options(values, disable_prepacking="1"), "ConstantFolding")


class _Fed:
    """A session whose weights are inputs: they come with each run."""

    def __init__(self, session: Any, values: dict[str, Any]) -> None:
        self._session, self._values = session, values

    def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        from onnxruntime import OrtValue

        given = {name: OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        return [one.numpy() for one in self._session.run_with_ort_values(None, self._values | given)]


def inputs(folder: Path, values: dict[str, Any]) -> Any:
    """With the weights as inputs of the graph; all settings are ONNX Runtime's own."""
    import onnx

    model = onnx.load(folder / "graph.onnx", load_external_data=False)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in values]:
        model.graph.initializer.remove(tensor)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return _Fed(_session(model.SerializeToString(), _options(values, add=False)), values)


def shared(folder: Path, attachment: Any) -> Any:
    """The recipe's session, on one thread, as the others are."""
    import onnx_sessions

    return onnx_sessions.SharedSession(folder, attachment)


def grown(pid: int, before: int) -> int:
    """By how many bytes anonymous memory has grown, once the allocator has returned what is free."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous(pid) - before
