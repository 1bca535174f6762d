"""A node of a Kubernetes cluster, through the API server. The only module that imports kubernetes."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final, TypeVar

import kubernetes.client
import kubernetes.config
import urllib3.exceptions

from weightd.errors import InvalidReferenceError

from .kubernetes_labels import NodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

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
            named = os.environ.get("KUBECONFIG")  # read here: the package reads it when it is imported
            if named or "KUBERNETES_SERVICE_HOST" not in os.environ:
                kubernetes.config.load_kube_config(named, client_configuration=configuration)
            else:
                kubernetes.config.load_incluster_config(client_configuration=configuration)
        except Exception as error:  # a malformed file leads to whatever error its content leads to
            raise InvalidReferenceError(
                f"node {name}: its cluster is not known: {_line(error).rstrip('.')}; set KUBECONFIG, or run in a pod "
                "that has the token of its service account"
            ) from error
        self._api = kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(configuration))

    def labels(self) -> Mapping[str, str]:
        """All labels of the node. Errors: NodeError."""

        def read() -> Mapping[str, str]:
            return self._api.read_node(self._name, _request_timeout=_TIMEOUTS).metadata.labels or {}

        return self._asked(read)

    def change(self, changes: Mapping[str, str | None]) -> None:
        """Set labels, and remove those that are None, in one request. Errors: NodeError."""
        patch = {"metadata": {"labels": dict(changes)}}
        self._asked(lambda: self._api.patch_node(self._name, patch, _request_timeout=_TIMEOUTS))

    def _asked(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except kubernetes.client.ApiException as error:
            # Of an answer that cannot be read and of a certificate that is not trusted, the status is 0.
            answer = _line(error.reason) if error.status == 0 else f"{error.status} {_line(error.reason)}"
            raise NodeError(f"node {self._name}: the API server answers {answer}") from error
        except kubernetes.config.ConfigException as error:  # the token is read again now and then
            raise NodeError(f"node {self._name}: its token cannot be read: {_line(error)}") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise NodeError(f"node {self._name}: no answer of the API server: {_line(error)}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise NodeError(f"node {self._name}: the API server's answer is no node: {_line(error)}") from error


def _line(text: object) -> str:
    return " ".join(str(text).split())[:500]
