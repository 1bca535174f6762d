"""ONNX Runtime: the sessions of several processes compute with one copy of the weights, in host memory.

    pip install '.[examples]'
    weightd serve &
    python examples/onnx_sessions.py split MODEL.onnx FOLDER
    python examples/onnx_sessions.py run FOLDER

`split` runs once: it moves the weights of a model into FOLDER/weights.safetensors, which the daemon can load. What is
left, FOLDER/graph.onnx, refers to that file as its external data, and is still a model that works without weightd.
`run` is what each worker does. docs/servers.md says what is shared, and why the settings of `SharedSession` are needed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

import weightd

if TYPE_CHECKING:
    import onnx

WEIGHTS, GRAPH = "weights.safetensors", "graph.onnx"
SMALLEST = 1024
"""Bytes of the smallest initializer that is moved. Shapes and axes must stay in the graph: ONNX Runtime reads them."""
DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8, "U8": np.uint8, "I64": np.int64}


def split(model: Path, folder: Path) -> None:
    """Write the weights of a model, and its graph without them. Errors: OSError, and those of onnx."""
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    whole = onnx.load(model)
    graph = whole.graph
    moved = {}
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes >= SMALLEST and array.dtype in DTYPES.values():
            moved[tensor.name] = restore_rows(graph, tensor, array)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(moved, folder / WEIGHTS)
    with (folder / WEIGHTS).open("rb") as file:  # the length of the header, the header, the tensors' bytes
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for tensor in graph.initializer:
        if tensor.name in moved:
            begin, end = header[tensor.name]["data_offsets"]
            refer(tensor, moved[tensor.name], 8 + size + begin, end - begin)
    (folder / GRAPH).write_bytes(whole.SerializeToString())
    print(f"moved {len(moved)} of {len(graph.initializer)} initializers, {sum(a.nbytes for a in moved.values())} bytes")


def restore_rows(graph: onnx.GraphProto, tensor: onnx.TensorProto, array: np.ndarray) -> np.ndarray:
    """Undo the transposition with which exporters store the weight of a linear layer.

    torch keeps it as (outputs, inputs), and MatMul wants (inputs, outputs). As torch keeps it, its bytes are those of
    the checkpoint, and so weightd shares them with every process that has the checkpoint attached. The graph gets a
    node that transposes; ONNX Runtime makes one multiplication of both, which reads the weight as it is stored.
    """
    from onnx import helper

    users = [node for node in graph.node if tensor.name in node.input]
    if array.ndim != 2 or not all(node.op_type == "MatMul" and node.input[1] == tensor.name for node in users):
        return array
    transposed = f"{tensor.name}/transposed"
    for node in users:
        node.input[1] = transposed
    graph.node.insert(0, helper.make_node("Transpose", [tensor.name], [transposed], perm=[1, 0]))
    return np.ascontiguousarray(array.T)


def refer(tensor: onnx.TensorProto, array: np.ndarray, offset: int, length: int) -> None:
    """Replace the bytes of an initializer by the place in the weights' file where they lie."""
    import onnx

    kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=array.shape)
    kept.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": WEIGHTS, "offset": str(offset), "length": str(length)}.items():
        kept.external_data.add(key=key, value=value)
    tensor.CopyFrom(kept)


class SharedSession:
    """An InferenceSession on attached weights. It keeps them: ONNX Runtime asks that they outlive the session."""

    def __init__(self, folder: Path, attachment: weightd.Attachment) -> None:
        self.weights = {
            key.name: onnxruntime.OrtValue.ortvalue_from_numpy(attached_array(attachment, key.name))
            for key in attachment.tensors
        }
        options = onnxruntime.SessionOptions()
        # Else each session copies the weights into the layout that its kernels like best.
        options.add_session_config_entry("session.disable_prepacking", "1")
        for name, value in self.weights.items():
            options.add_initializer(name, value)
        # Constant folding would transpose the weights of linear layers, into a copy. And it does not take them from
        # add_initializer: it reads those of the file that the graph refers to.
        self.session = onnxruntime.InferenceSession(
            folder / GRAPH, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )

    def run(self, **inputs: np.ndarray) -> list[Any]:
        """The model's outputs."""
        return self.session.run(None, inputs)

    def __del__(self) -> None:
        # The session goes before the weights. It is not there where its graph was refused.
        self.__dict__.pop("session", None)


def attached_array(attachment: weightd.Attachment, name: str) -> np.ndarray:
    """An attached tensor as an array on the shared memory, which the array keeps."""
    (info,) = (info for key, info in attachment.tensors.items() if key.name == name)
    return np.frombuffer(attachment.buffer(name), DTYPES[info.dtype]).reshape(info.shape)


def anonymous() -> int:
    """Bytes of memory that are this process's own."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024


def run(folder: Path) -> None:
    """Open a session on shared weights, run it once, and print what memory that took."""
    with weightd.connect() as client, client.attach(folder / WEIGHTS, device="cpu") as attachment:
        before = anonymous()
        shared = SharedSession(folder, attachment)
    inputs = {}
    for one in shared.session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in one.shape]
        inputs[one.name] = np.ones(shape, {"tensor(float)": np.float32}.get(one.type, np.int64))
    outputs = shared.run(**inputs)
    size = sum(math.prod(value.shape()) * value.numpy().itemsize for value in shared.weights.values())
    print(f"outputs: {[output.shape for output in outputs]}")
    print(f"{size / 2**20:.1f} MiB of weights; anonymous memory grew by {(anonymous() - before) / 2**20:.1f} MiB")


def main() -> None:
    """Split a model, or run one that was split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, dest="verb")
    splitting = verbs.add_parser("split")
    splitting.add_argument("model", type=Path)
    splitting.add_argument("folder", type=Path)
    verbs.add_parser("run").add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.verb == "split":
        split(options.model, options.folder)
    else:
        run(options.folder)


if __name__ == "__main__":
    main()
