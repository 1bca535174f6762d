"""Certificates and roles of agents and their clients: mutual TLS, or plain text on the loopback alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc

from weightd._references.files import show
from weightd.errors import InvalidReferenceError, PermissionDeniedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .addresses import AgentAddress

ROLES: Final = {b"weightd://agent": "agent", b"weightd://client": "client"}
"""URIs among a certificate's alternative names, and the roles that they give."""
_SAN: Final = "x509_subject_alternative_name"
_MAX_PEM_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class TlsFolder:
    """A folder with ca.pem, cert.pem and key.pem, which are read whenever a connection needs them."""

    folder: Path

    def _read(self, name: str) -> bytes:
        path = self.folder / name
        try:
            with open(path, "rb") as file:
                return file.read(_MAX_PEM_BYTES)
        except OSError as error:
            raise InvalidReferenceError(f"{show(path)}: cannot be read: {error.strerror}; give --tls-dir") from error

    def channel(self) -> grpc.ChannelCredentials:
        """What a client proves itself by. Errors: InvalidReferenceError."""
        return grpc.ssl_channel_credentials(self._read("ca.pem"), self._read("key.pem"), self._read("cert.pem"))

    def server(self) -> grpc.ServerCredentials:
        """What a server proves itself by; it reads changed files from the next connection on.

        Every client must have a certificate of the same authority. Errors: InvalidReferenceError.
        """
        stamps = self._stamps()
        first = self._configuration()

        def renewed() -> Any:
            nonlocal stamps
            now = self._stamps()
            if now == stamps:
                return None  # gRPC keeps what it has
            configuration = self._configuration()
            stamps = now
            return configuration

        return grpc.dynamic_ssl_server_credentials(first, renewed, require_client_authentication=True)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (self._read("key.pem"), self._read("cert.pem"))
        return grpc.ssl_server_certificate_configuration([pair], self._read("ca.pem"))

    def _stamps(self) -> list[int]:
        stamps = []
        for name in ("ca.pem", "cert.pem", "key.pem"):
            try:
                stamps.append(os.stat(self.folder / name).st_mtime_ns)
            except OSError:
                stamps.append(0)
        return stamps


def require_loopback(address: AgentAddress, tls: TlsFolder | None) -> None:
    """Errors: PermissionDeniedError (without TLS, and not on the loopback)."""
    if tls is None and not address.is_loopback:
        raise PermissionDeniedError(f"{address}: is not on the loopback, so it needs TLS; give --tls-dir")


def check_role(auth_context: dict[str, Iterable[bytes]], allowed: Iterable[str]) -> None:
    """Check that the caller's certificate has an allowed role. Errors: PermissionDeniedError."""
    roles = {ROLES[name] for name in auth_context.get(_SAN, ()) if name in ROLES}
    if not roles & set(allowed):
        raise PermissionDeniedError(
            f"the caller's certificate gives the roles {sorted(roles) or 'none'}, and the call needs one of "
            f"{sorted(allowed)}: a URI such as weightd://agent among its alternative names"
        )
