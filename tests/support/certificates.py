"""Certificates of a fleet: trustme's authority, and leaves with the URIs that give roles, which trustme lacks."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

if TYPE_CHECKING:
    import trustme


def write(folder: Path, authority: trustme.CA, role: str, *, host: str = "127.0.0.1", expired: bool = False) -> Path:
    """Write ca.pem, cert.pem and key.pem of a node with a role ("agent", "client", or "" for none); return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    signing = serialization.load_pem_private_key(authority.private_key_pem.bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(host))]
    if role:
        names.append(x509.UniformResourceIdentifier(f"weightd://{role}"))
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "weightd tests")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * day)
        .not_valid_after(now - day if expired else now + day)
        .add_extension(x509.SubjectAlternativeName(names), critical=True)
        .sign(signing, hashes.SHA256())  # type: ignore[arg-type]  # trustme's keys are of a kind that signs
    )
    (folder / "ca.pem").write_bytes(authority.cert_pem.bytes())
    (folder / "cert.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder
