"""``letheon doctor``: what works here, what does not, and what to do about it. Changes nothing."""

from __future__ import annotations

import json
import os
import platform
import stat
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from kombu.exceptions import KombuError
from sqlalchemy import Engine, make_url
from sqlalchemy.exc import SQLAlchemyError

from app import audit_state, broker, db
from app.cli_output import JsonOption, emit, print_table
from app.cli_remote import make_client
from app.defaults import resolve_model, resolve_retain
from app.errors import LetheonError
from app.key_file import FORMER
from app.keystore import KeyStore
from app.settings import Settings, get_settings
from app.signing_key import verify_audit
from app.vault import Vault

_AS_LOGGED = "chain intact, and the state is what it says"


@dataclass(frozen=True)
class Check:
    """One line of the report. A ``fail`` sets the exit status; a ``warn`` is for the reader to judge."""

    name: str
    status: str  # "ok" | "warn" | "fail"
    detail: str


def doctor(as_json: JsonOption = False) -> None:
    """Check interpreter, model, data, database, broker, keys and audit chain. Exit status 1 when something fails."""
    settings = get_settings()
    found = [_guarded(name, check, settings) for name, check in CHECKS]
    healthy = all(check.status != "fail" for check in found)
    if as_json:
        emit({"healthy": healthy, "checks": [asdict(check) for check in found]})
    else:
        print_table(("check", "status", "detail"), [(c.name, c.status, c.detail) for c in found])
    if not healthy:
        raise typer.Exit(1)


def _guarded(name: str, check: Callable[[Settings], tuple[str, str]], settings: Settings) -> Check:
    """A check that raises what it is there to find has failed; anything else is a bug and shows as one."""
    try:
        return Check(name, *check(settings))
    except LetheonError as error:
        return Check(name, "fail", error.detail)
    except (OSError, ValueError, SQLAlchemyError, ImportError, KombuError) as error:
        return Check(name, "fail", type(error).__name__)  # its message may hold an address with a password


def _python(settings: Settings) -> tuple[str, str]:
    good = sys.version_info >= (3, 11)
    return ("ok" if good else "fail"), platform.python_version() + ("" if good else ": 3.11 or newer is needed")


def _torch(settings: Settings) -> tuple[str, str]:
    import torch

    return "ok", torch.__version__


def _device(settings: Settings) -> tuple[str, str]:
    import torch

    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        return "fail", "LETHEON_DEVICE asks for CUDA, which this torch or machine does not have"
    if settings.device.startswith("cuda") or (settings.device == "auto" and torch.cuda.is_available()):
        return "ok", f"cuda: {torch.cuda.get_device_name()}"
    return "ok", f"cpu, {torch.get_num_threads()} threads"


def _bitsandbytes(settings: Settings) -> tuple[str, str]:
    if settings.quantization == "none":
        return "ok", "not needed without quantization"
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values = torch.linspace(-1, 1, 4096).reshape(64, 64)
    packed, state = quantize_4bit(values, quant_type="nf4")
    error = float((dequantize_4bit(packed, state) - values).abs().max())
    status = "ok" if error < 0.2 else "fail"
    return status, f"{bitsandbytes.__version__}, NF4 round trip within {error:.2f}"


def _model(settings: Settings) -> tuple[str, str]:
    source, adapter = resolve_model(settings)
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        return "fail", f"{adapter} holds no adapter_config.json"
    recipe = Path(adapter) / "recipe.json" if adapter is not None else None
    if recipe is not None and recipe.is_file():
        learned = json.loads(recipe.read_text()).get("template")
        if learned != settings.template:
            return "warn", f"the adapter learned with template '{learned}', but '{settings.template}' is set"
    where = "" if Path(source).exists() else " (not a local path: a hub id)"
    return "ok", f"{source}{where}, adapter {adapter or 'none'}, {settings.quantization}"


def _retain(settings: Settings) -> tuple[str, str]:
    source = resolve_retain(settings)
    return "ok", source if Path(source).exists() else f"{source} (not a local path: a dataset id)"


def _master_key(settings: Settings) -> tuple[str, str]:
    if settings.master_key is not None:
        vault = Vault.from_settings(settings)
        previous = len(vault.key_ids) - 1
        return "ok", f"{vault.key_id}, from LETHEON_MASTER_KEY" + (f", and {previous} previous" if previous else "")
    path = settings.home / "master.key"
    if not path.exists():
        return "warn", f"{path} is not there yet: the first start makes it"
    Vault.from_settings(settings).close()
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return "fail", f"{path} can be read by others (mode {mode:03o}): chmod 600 it"
    if (settings.home / FORMER).exists():
        return "warn", f"a rotation of {path} was begun: finish it with `letheon vault rotate`"
    return "ok", f"{path}, mode {mode:03o}"


def _key_store(settings: Settings) -> tuple[str, str]:
    url = settings.effective_keystore_url
    if not url:
        return "warn", (
            "none (LETHEON_KEYSTORE_URL is empty): an old backup of the database and the master key together open "
            "what was shredded after it was made"
        )
    kind, name = make_url(url).get_backend_name(), KeyStore(url).place
    if kind == "sqlite" and not Path(make_url(url).database or "").is_file():
        return "ok", f"{name}: not there yet, the first key makes it"
    KeyStore(url).check(make=False)
    return "ok", f"{name}: leave it out of the database's backups"


def _engine(settings: Settings) -> Engine | None:
    """None when the embedded database does not exist: opening it would make it."""
    url = make_url(settings.effective_database_url)
    if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).is_file()):
        return None
    return db.make_engine(settings.effective_database_url)


def _schema(settings: Settings) -> tuple[str, str]:
    engine = _engine(settings)
    if engine is None:
        return "warn", "no database yet: the first start makes it"
    try:
        db.check_schema(engine)
    finally:
        engine.dispose()
    return "ok", f"{engine.dialect.name}, at head"


def _audit(settings: Settings) -> tuple[str, str]:
    engine = _engine(settings)
    if engine is None:
        return "warn", "no database yet"
    try:
        with db.make_sessions(engine)() as session:
            if settings.master_key is None and not (settings.home / "master.key").exists():  # asking would make one
                return "ok", f"{audit_state.verify(session)} entries, {_AS_LOGGED}; signatures need the master key"
            return "ok", f"{verify_audit(session, Vault.from_settings(settings))} entries, {_AS_LOGGED}"
    finally:
        engine.dispose()


def _broker(settings: Settings) -> tuple[str, str]:
    if not settings.broker_url:
        folder = settings.broker_dir
        while not folder.exists():
            folder = folder.parent
        good = os.access(folder, os.W_OK)
        return ("ok" if good else "fail"), f"folder {settings.broker_dir}" + ("" if good else " is not writable")
    celery = broker.make_celery(settings)
    try:
        with celery.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=3)
            return "ok", str(connection.transport_cls)
    finally:
        celery.close()


def _server(settings: Settings) -> tuple[str, str]:
    with make_client() as client:
        where = ", ".join(client.base_urls)
        return ("ok", f"ready at {where}") if client.ready() else ("warn", f"none is ready at {where}")


CHECKS: tuple[tuple[str, Callable[[Settings], tuple[str, str]]], ...] = (
    ("python", _python),
    ("torch", _torch),
    ("device", _device),
    ("bitsandbytes", _bitsandbytes),
    ("model", _model),
    ("retain set", _retain),
    ("master key", _master_key),
    ("key store", _key_store),
    ("database schema", _schema),
    ("audit chain", _audit),
    ("broker", _broker),
    ("server", _server),
)
