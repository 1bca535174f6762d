"""Triton's Python backend: all instances of a model answer from one copy of the weights.

    weightd serve &
    python examples/_network.py /models/network.safetensors
    tritonserver --model-repository=examples/triton_repository

Triton runs each instance (`instance_group` in ../config.pbtxt) as a process of its own, which imports this file and
calls `initialize`. The Python that Triton embeds needs weightd with the extra `torch`. In a container the daemon's
socket must be mounted, and WEIGHTD_SOCKET must name it.

Triton is not on PyPI, so the test of this file drives it through a stand-in of `triton_python_backend_utils`
(tests/support/triton_backend.py): it has not been run in Triton itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils

import weightd

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the network of these examples; yours comes from a package

from _network import attached


class TritonPythonModel:
    """One instance of the model, under the name that Triton looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Attach. An error here makes Triton report that the model cannot be loaded, with weightd's message."""
        parameters = json.loads(args["model_config"])["parameters"]
        self._client = weightd.connect(timeout=60)  # stays open: so a daemon that restarts learns which process this is
        with self._client.attach(Path(parameters["checkpoint"]["string_value"]), device="cpu") as attachment:
            self._network = attached(attachment)  # its parameters keep the memory, and the lease

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; an invalid one gets an error and does not fail the others of the batch."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        tokens = pb_utils.get_input_tensor_by_name(request, "tokens").as_numpy()
        try:
            with torch.inference_mode():
                scores = self._network(torch.tensor(tokens))  # a copy: the request's memory is Triton's
        except (IndexError, RuntimeError) as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("scores", scores.numpy())])

    def finalize(self) -> None:
        """Let go of the weights: the lease ends, and the daemon may evict the checkpoint."""
        del self._network
        self._client.close()
