"""The one settings object: every knob of the service, read from the environment (prefix ``LETHEON_``) or ``.env``."""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

Quantization = Literal["none", "int8", "nf4"]

_LOCAL = frozenset({"", "localhost", "127.0.0.1", "::1"})


class Mode(StrEnum):
    """How the prompts in force act together, and what a prompt is trained for."""

    ROUTED = "routed"
    CONCATENATE = "concatenate"


class Settings(BaseSettings):
    """Letheon's configuration.

    Embedded defaults need no server: SQLite, Celery's filesystem transport and a key file, all under ``home``.
    ``DATABASE_URL`` and ``BROKER_URL`` (no prefix, as deployment platforms set them) switch to PostgreSQL and Redis.
    """

    model_config = SettingsConfigDict(env_prefix="LETHEON_", env_file=".env", extra="ignore", frozen=True)

    home: Path = Field(default=Path("var"), description="State directory of the embedded defaults.")

    # Storage and broker. Empty = embedded, derived from `home`.
    database_url: str = Field(default="", validation_alias=AliasChoices("LETHEON_DATABASE_URL", "DATABASE_URL"))
    broker_url: str = Field(default="", validation_alias=AliasChoices("LETHEON_BROKER_URL", "BROKER_URL"))
    master_key: SecretStr | None = Field(
        default=None, description="Base64 of 32 bytes that wraps every data key. Unset: `home`/master.key, made once."
    )

    # HTTP
    host: str = "127.0.0.1"
    port: int = Field(default=8600, ge=0, le=65535)
    first_key: bool = Field(
        default=True,
        description="Without any key in force, make one with every scope and print it. Off where stderr is kept.",
    )
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    max_held_body_bytes: int = Field(
        default=256 * 2**20, ge=1024, description="Bodies of all requests in progress; beyond it 503."
    )
    body_seconds: float = Field(default=60.0, gt=0, description="For a whole body to arrive.")
    max_forget_texts: int = Field(default=4096, ge=1, le=16_384)
    max_classify_texts: int = Field(default=256, ge=1, le=16_384)
    max_text_tokens: int = Field(default=256, ge=8, description="Tokens of one text, template excluded.")
    max_training_steps: int = Field(
        default=100_000, ge=1, le=100_000, description="Steps that one request may ask for in its options."
    )
    max_queued_texts: int = Field(default=2048, ge=1, description="Waiting classify texts; beyond it 503.")
    max_batch_texts: int = Field(
        default=64, ge=1, le=16_384, description="Texts that wait together and run together. 1: no batching."
    )
    classify_deadline_seconds: float = Field(
        default=30.0, gt=0, description="Without an answer by then, 503. A client may ask for less, not for more."
    )

    # Who may ask how much. A key's own limits (`letheon keys create --limit`) come before these; 0: no limit.
    rate_per_minute: int = Field(default=0, ge=0, description="Calls of one key to one replica, but for /classify.")
    classify_texts_per_minute: int = Field(default=0, ge=0, description="Texts that one key may have one replica read.")
    requests_per_day: int = Field(default=0, ge=0, description="Unlearn requests of one key within 24 hours.")
    texts_per_day: int = Field(default=0, ge=0, description="Forget texts of one key within 24 hours.")
    active_prompts: int = Field(default=0, ge=0, description="Requests of one key that wait, train or are in force.")

    # The life of a request
    require_approval: bool = Field(
        default=False, description="Another key, of the scope `approve`, has to agree before a prompt comes into force."
    )
    revoke_needs_two: bool = Field(
        default=False, description="A revoke is carried out when a second admin asks for it."
    )
    deadline_months: int = Field(default=1, ge=1, le=12, description="From receipt to the date by which it is due.")
    idempotency_hours: float = Field(default=24.0, gt=0, description="For which an Idempotency-Key is remembered.")
    keep_texts_hours: float = Field(
        default=0.0,
        ge=0,
        description="Forget texts stay sealed for this long after a request is active or ended; 0: shredded at once.",
    )

    dry_run_seconds: float = Field(
        default=120.0, gt=0, description="Without a report by then, 503. What was read is kept for the next one."
    )

    # Trust
    previous_master_keys: list[SecretStr] = Field(
        default=[], description="Keys that still open what they sealed, until `letheon vault rotate` has been run."
    )
    keystore_url: str = Field(
        default="",
        description="Database of the key shares, apart from the main one and from its backups: without a share nothing "
        "opens. Empty: `home`/keystore.db beside an embedded database, else no shares.",
    )
    audit_checkpoint_seconds: float = Field(
        default=300.0, gt=0, description="The worker signs the audit log's head this often, where it has moved."
    )
    webhook_private: bool = Field(
        default=False, description="Webhooks may go to http:// and to loopback, private and link-local addresses."
    )
    webhook_timeout_seconds: float = Field(default=10.0, gt=0, le=60, description="For a whole attempt, name included.")
    webhook_attempts: int = Field(default=8, ge=1, description="Per message, with growing pauses; then it has failed.")
    webhook_log_days: float = Field(
        default=30.0, gt=0, description="Deliveries that have ended are kept for this long."
    )

    export_prompts: bool = Field(
        default=False,
        description="Admins may export prompts in clear. No revoke reaches a copy that is outside.",
    )
    console_session_hours: float = Field(
        default=8.0, gt=0, le=168, description="After this long a person logs in to the console again."
    )

    traces: bool = Field(
        default=False, description="OpenTelemetry traces; needs `letheon[otel]`. OTEL_… variables say where they go."
    )

    # The frozen model
    model: str = Field(default="", description="Hub id, local directory or GGUF file. Empty = the pulled demo model.")
    adapter: str | None = Field(default=None, description="LoRA adapter directory, merged before quantization.")
    quantization: Quantization = "nf4"
    device: str = "auto"
    template: str = Field(default="instruction-first", description="A name or a string with one {text}.")
    labels: list[str] = ["negative", "positive"]
    generic_labels: list[str] = ["neutral", "unknown"]

    # Training
    retain: str = Field(default="", description="JSONL/CSV/TSV/Parquet file or dataset id. Empty = the demo's data.")
    retain_split: str = Field(default="train", description="The split, where `retain` is a dataset id.")
    precision: Literal["auto", "exact"] = Field(
        default="auto",
        description="`auto` may train against a bfloat16 copy on CPU; checks never do. `exact`: no copy.",
    )
    num_virtual_tokens: int = Field(default=30, ge=1, le=1024)
    alpha: float | None = Field(default=None, ge=0, description="Weight of L_r. Unset: 0.3 routed, 1 concatenated.")
    beta: float = Field(default=0.5, ge=0)
    learning_rate: float = Field(default=3e-2, gt=0)
    max_steps: int | None = Field(
        default=None, ge=1, description="Unset: 60 routed, 140 concatenated, at least 3 epochs."
    )
    seed: int = 0
    training_deadline_seconds: float = Field(
        default=6 * 3600.0, gt=0, description="A safety net: a training that it cuts short goes to the checks as it is."
    )
    checkpoint_seconds: float = Field(default=20.0, gt=0)

    # Many requests at once (docs/decisions/0009)
    mode: Mode = Field(
        default=Mode.ROUTED,
        description="`routed`: a gate per request decides which queries run behind its prompt. `concatenate`: every "
        "active prompt before every query.",
    )
    max_false_claim_rate: float = Field(
        default=0.002,
        gt=0,
        le=1,
        description="Share of other texts that one request's gate may claim, by a fitted tail.",
    )
    max_certain_claim_rate: float = Field(
        default=0.0005,
        ge=0,
        le=1,
        description="The same of what a gate may decide without asking its prompt. 0: the prompt decides everything.",
    )
    max_total_claim_rate: float = Field(
        default=0.1, ge=0, le=1, description="Share of the retain set that all gates together may claim."
    )
    active_set_poll_seconds: float = Field(
        default=5.0, gt=0, description="An idle API lets go of revoked prompts after this long at the latest."
    )
    max_prompts_per_query: int = Field(default=4, ge=1, description="A query runs behind at most this many prompts.")
    gate_rows: int = Field(
        default=4096,
        ge=16,
        description="Retain rows that gates read: half to whiten on, a quarter each to calibrate and to check with.",
    )

    # Checks before activation
    min_forget_abstain: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Share of a request's texts answered `unknown`, as they would be served.",
    )
    max_retain_drop: float = Field(default=0.03, ge=0, le=1, description="Retain accuracy may fall by this, overall.")
    max_class_drop: float = Field(default=0.06, ge=0, le=1, description="The same, in the worst class.")
    max_neighbour_drop: float = Field(
        default=0.25, ge=0, le=1, description="The same, on the retain rows that are nearest to the forget texts."
    )
    max_prompt_norm: float = Field(
        default=64.0, gt=0, description="Longest row of a prompt, in mean lengths of the model's own word embeddings."
    )
    check_retain_rows: int = Field(default=256, ge=8)
    max_tries: int = Field(
        default=3,
        ge=1,
        description="A prompt that fails its checks is trained again, with other weights or tokens: trainings in all.",
    )
    evidence_texts: int = Field(
        default=64,
        ge=0,
        le=512,
        description="Texts of each kind (forget, retain, held out) that a request's evidence is made of; 0: none is.",
    )
    held_out: str = Field(
        default="",
        description="Texts that the model has never been trained on, in a file as `retain` is: the other side of the "
        "evidence's attack. Empty: the demo's with the demo's data, else retain rows are.",
    )
    min_retain_rows: int = Field(
        default=32,
        ge=1,
        description="With fewer rows left a request fails: nothing could be said about its side effects.",
    )

    # Queue
    lease_seconds: float = Field(default=60.0, gt=0)
    heartbeat_seconds: float = Field(default=10.0, gt=0)
    reaper_seconds: float = Field(default=10.0, gt=0)
    ring_seconds: float = Field(default=60.0, gt=0, description="A waiting request is re-announced this often.")
    max_attempts: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError("lease_seconds must be at least twice heartbeat_seconds")
        if set(self.labels) & set(self.generic_labels):
            raise ValueError("labels and generic_labels must not overlap")
        keystore = self.effective_keystore_url
        if keystore and _same_database(keystore, self.effective_database_url):
            raise ValueError("keystore_url must not be database_url: its backups would hold the key shares")
        return self

    @property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite:///{(self.home / 'letheon.db').resolve()}"

    @property
    def effective_keystore_url(self) -> str:
        """Empty: keys have no shares."""
        if self.keystore_url or self.database_url:
            return self.keystore_url
        return f"sqlite:///{(self.home / 'keystore.db').resolve()}"

    @property
    def broker_dir(self) -> Path:
        """Folder of the embedded filesystem broker."""
        return (self.home / "broker").resolve()


def _same_database(one: str, other: str) -> bool:
    """However it is spelt. What is no URL at all is left to whoever opens it, whose error does not quote it."""
    try:
        return _identity(make_url(one)) == _identity(make_url(other))
    except (ArgumentError, ValueError):
        return False


def _identity(url: URL) -> tuple[str, ...]:
    if url.get_backend_name() == "sqlite":
        return ("sqlite", str(Path((url.database or "").removeprefix("file:")).resolve()))
    host = url.host or url.query.get("host", "")
    names = [host] if isinstance(host, str) else list(host)
    # A socket's folder is this machine too; libpq takes the user's name where no database is named.
    local = all(name.lower() in _LOCAL or name.startswith("/") for name in names)
    port = str(url.port or url.query.get("port", 5432))
    return ("server", "" if local else ",".join(names).lower(), port, url.database or url.username or "")


@lru_cache
def get_settings() -> Settings:
    """The process-wide settings, read once."""
    return Settings()
