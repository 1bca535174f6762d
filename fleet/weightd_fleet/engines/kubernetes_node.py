"""A node of a Kubernetes cluster, through the API server. The only module that imports kubernetes."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Final

import kubernetes.client
import kubernetes.config
import urllib3.exceptions

from weightd.errors import InvalidReferenceError

from .kubernetes_labels import NodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_NAME: Final = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_TIMEOUTS: Final = (5.0, 15.0)
"""Seconds to connect, and to answer."""


class KubernetesNode:
    """A node by its name. It is a LabelledNode."""

    def __init__(self, name: str) -> None:
        """Find the cluster: by KUBECONFIG, else as a pod in it, else by ~/.kube/config.

        Errors: InvalidReferenceError (no name of a node, or no cluster). Nothing is connected to.
        """
        if not _NAME.fullmatch(name):
            raise InvalidReferenceError(f"{name[:253]!r}: is no name of a node; `kubectl get nodes` lists them")
        self._name = name
        configuration = kubernetes.client.Configuration()
        try:
            if os.environ.get("KUBECONFIG") or "KUBERNETES_SERVICE_HOST" not in os.environ:
                kubernetes.config.load_kube_config(client_configuration=configuration)
            else:
                kubernetes.config.load_incluster_config(client_configuration=configuration)
        except (kubernetes.config.ConfigException, OSError) as error:
            raise InvalidReferenceError(
                f"node {name}: its cluster is not known: {error}; set KUBECONFIG, or run in a pod that has the token of "
                "its service account"
            ) from error
        self._api = kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(configuration))

    def labels(self) -> Mapping[str, str]:
        """All labels of the node. Errors: NodeError."""
        node = self._answer(self._api.read_node)
        return node.metadata.labels or {}

    def change(self, changes: Mapping[str, str | None]) -> None:
        """Set labels, and remove those that are None, in one request. Errors: NodeError."""
        self._answer(self._api.patch_node, {"metadata": {"labels": dict(changes)}})

    def _answer(self, call: Callable[..., Any], *arguments: object) -> Any:
        try:
            return call(self._name, *arguments, _request_timeout=_TIMEOUTS)
        except kubernetes.client.ApiException as error:
            raise NodeError(f"node {self._name}: the API server answers {error.status} {error.reason}") from error
        except (kubernetes.client.OpenApiException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise NodeError(f"node {self._name}: no answer of the API server: {error}") from error
