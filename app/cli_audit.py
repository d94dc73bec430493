"""``letheon audit | receipt``: the log, the receipts, and their verification without server or database."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from sqlalchemy.orm import Session

from app import audit, db, receipt_format
from app.audit_export import Verified, verify_lines
from app.cli_local import local_session
from app.cli_output import CommandGroup, JsonOption, emit, note
from app.cli_remote import make_client
from app.errors import InvalidInput
from app.settings import Settings, get_settings
from app.signing import PublicKey, canonical
from app.signing_key import load_signer, verify_audit
from app.vault import Vault

audit_app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="The audit log, of the database that is configured here or of a file."
)
receipt = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Signed receipts of requests.")

KeyOption = Annotated[
    str | None,
    typer.Option("--public-key", help="64 hex digits, of `letheon audit public-key`. Default: the file's own."),
]


@audit_app.command("verify")
def verify(
    file: Annotated[
        Path | None, typer.Argument(help="An export; - is standard input. Without it the configured database.")
    ] = None,
    public_key: KeyOption = None,
    against: Annotated[
        Path | None, typer.Option(help="An older export or checkpoint, which the log must still begin with.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove chain, checkpoints and signatures; of the configured database also that its requests, prompts and active
    set are what the log says. Exit status 1 and the first thing that is wrong when they do not hold.
    """
    if file is None:
        if public_key is not None or against is not None:
            raise InvalidInput("--public-key and --against are about a file: make one with `letheon audit export`")
        with local_session(get_settings()) as session:
            entries = verify_audit(session, Vault.from_settings(get_settings()))
        emit({"entries": entries}) if as_json else note(
            f"{entries} entries, chain and checkpoints intact, and the state is what they say"
        )
        return
    key = _key(public_key)
    with _reading(file) as lines:
        if against is None:
            found = verify_lines(lines, key)
        else:
            with _reading(against) as older:
                found = verify_lines(lines, key, older)
    _report(found, key, as_json)


def _vault(session: Session, settings: Settings) -> Vault:
    """The vault, known to be the service's: a signing key that is made under another one could never be used there."""
    vault = Vault.from_settings(settings)
    vault.adopt(session)
    return vault


@audit_app.command("export")
def export() -> None:
    """Write the whole log to stdout, a JSON object a line, the last one signed. Keep it elsewhere."""
    settings = get_settings()
    with local_session(settings) as session:  # committed before anything is written that depends on it
        signer = load_signer(session, _vault(session, settings))
        head = audit.checkpoint(session, signer)
    engine = db.make_engine(settings.effective_database_url)
    try:
        for chunk in audit.export(db.make_sessions(engine), signer, head):
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    finally:
        engine.dispose()


@audit_app.command("public-key")
def public_key(as_json: JsonOption = False) -> None:
    """The key that checkpoints, exports and receipts of this deployment are signed by."""
    settings = get_settings()
    with local_session(settings) as session:
        key = load_signer(session, _vault(session, settings)).public
    if as_json:
        emit({"algorithm": "Ed25519", "key_id": key.key_id, "public_key": key.hex()})
    else:
        typer.echo(key.hex())


@receipt.command("get")
def receipt_get(request_id: str) -> None:
    """Print a request's receipt as the server signed it. Redirect it to a file to keep it."""
    with make_client() as client:
        document = client.receipt(request_id)
    typer.echo(canonical(document))


@receipt.command("extract")
def receipt_extract(file: Path) -> None:
    """Print the signed receipt that a report (JSON, HTML or PDF) holds. It is not verified: that is `verify`."""
    with _reading(file) as lines:
        typer.echo(receipt_format.extract(lines.read()))


@receipt.command("verify")
def receipt_verify(file: Path, public_key: KeyOption = None, as_json: JsonOption = False) -> None:
    """Prove that a receipt is what the deployment gave out, without a server. Exit status 1 when it is not."""
    key = _key(public_key)
    with _reading(file) as lines:
        found, signed_by = receipt_format.verify(lines.read(), key)
    if as_json:
        emit(found)
        return
    request = found["request"]
    note(f"intact: {request['id']}, {request['state']}, {request['num_texts']} texts; signed by {signed_by.key_id}")
    _warn_of_own_key(key)


def _report(found: Verified, key: PublicKey | None, as_json: bool) -> None:
    if as_json:
        emit(
            {
                "entries": found.entries,
                "checkpoints": found.checkpoints,
                "hash": found.hash,
                "exported_at": found.at,
                "key_id": found.public_key.key_id,
                "public_key": found.public_key.hex(),
            }
        )
        return
    note(
        f"{found.entries} entries and {found.checkpoints} checkpoints intact, exported {found.at}, last hash "
        f"{found.hash}, signed by {found.public_key.key_id}"
    )
    _warn_of_own_key(key)


def _warn_of_own_key(key: PublicKey | None) -> None:
    if key is None:
        note("the key is the file's own: give the one you know with --public-key, or compare it")


def _key(text: str | None) -> PublicKey | None:
    return None if text is None else PublicKey.from_hex(text)


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    with path.open("rb") as file:
        yield file
