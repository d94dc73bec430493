"""The database's address in the example of the secret, against a PostgreSQL with a certificate: whom it believes."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from manifests import find
from sqlalchemy import make_url
from worker_kit import ROOT

from bench.fault_processes import Postgres, postgres_programs

pytestmark = pytest.mark.skipif(postgres_programs() is None, reason="PostgreSQL's programs are not installed")

CONNECT = "import sys, psycopg; print(psycopg.connect(sys.argv[1]).execute('SELECT 1').fetchone())"


def certificate(folder: Path) -> tuple[bytes, bytes]:
    """A certificate for 127.0.0.1 and its key, by an authority of its own, whose certificate is ``folder/ca.pem``."""
    now = datetime.datetime.now(datetime.UTC)
    authority, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = {name: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("authority", "server")}

    def sign(name: str, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> bytes:
        made = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["authority"])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .sign(authority, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM)

    (folder / "ca.pem").write_bytes(sign("authority", authority, x509.BasicConstraints(ca=True, path_length=0)))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    plain = serialization.NoEncryption()
    key = own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    return sign("server", own, address), key


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    server = Postgres()
    try:
        server.stop_at_once()
        owner = server.data.stat()
        for name, content in zip(("server.crt", "server.key"), certificate(tmp_path), strict=True):
            (server.data / name).write_bytes(content)
            (server.data / name).chmod(0o600)
            shutil.chown(server.data / name, owner.st_uid, owner.st_gid)
        with (server.data / "postgresql.conf").open("a") as settings:
            settings.write("ssl = on\n")
        server.start()
        yield server
    finally:
        server.close()


def connect(url: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CONNECT, url]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_example_believes_the_authorities_of_the_image(postgres: Postgres, tmp_path: Path) -> None:
    example = make_url(find("Secret", "letheon")["stringData"]["DATABASE_URL"])
    assert example.query == {"sslmode": "verify-full", "sslrootcert": "system"}
    url = make_url(postgres.admin_url).set(query=example.query).render_as_string(hide_password=False)
    bare = {name: value for name, value in os.environ.items() if not name.startswith("SSL_CERT")}

    found = connect(url, {**bare, "SSL_CERT_FILE": str(tmp_path / "ca.pem")})
    assert found.stdout == "(1,)\n", found.stderr
    refused = connect(url, bare)
    assert refused.returncode and "certificate verify failed" in refused.stderr
    assert re.search(
        r"^ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates\.crt$", (ROOT / "Dockerfile").read_text(), re.M
    )
