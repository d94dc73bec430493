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

    # docs/generate.py makes docs/settings.md of what follows: a comment that stands alone begins a part of that page.

    # Where things are
    home: Path = Field(
        default=Path("var"),
        description="Folder of everything that is embedded or fetched: database, key store, master key, broker, demo "
        "model and data, caches.",
    )

    # Storage and broker. Empty: embedded, in files under `LETHEON_HOME`.
    database_url: str = Field(
        default="",
        validation_alias=AliasChoices("LETHEON_DATABASE_URL", "DATABASE_URL"),
        description="URL of the PostgreSQL database with requests, prompts, keys and audit log. Empty: SQLite, "
        "`letheon.db`.",
    )
    broker_url: str = Field(
        default="",
        validation_alias=AliasChoices("LETHEON_BROKER_URL", "BROKER_URL"),
        description="URL of the Redis that rings at workers when a request comes. Empty: files in a folder `broker`.",
    )
    master_key: SecretStr | None = Field(
        default=None,
        description="The key that wraps every data key: 32 bytes in base64. Unset: the file `master.key`, made once.",
    )

    # HTTP
    host: str = Field(
        default="127.0.0.1", description="Address to listen on; `0.0.0.0` listens on all, and TLS is a proxy's affair."
    )
    port: int = Field(default=8600, ge=0, le=65535, description="TCP port to listen on. 0: any free one.")
    max_connections: int = Field(
        default=2048,
        ge=1,
        description="Connections that may be open at one replica. One more takes an idle one's place, or is "
        "answered 503.",
    )
    first_key: bool = Field(
        default=True,
        description="Where no key is in force at the start, make one with every scope and print it to stderr. Turn it "
        "off where stderr is kept.",
    )
    max_body_bytes: int = Field(
        default=4 * 2**20, ge=1024, description="Bytes of one request's body; a larger one is answered 413."
    )
    max_held_body_bytes: int = Field(
        default=256 * 2**20,
        ge=1024,
        description="Bytes of the bodies of all requests in progress together; beyond it 503.",
    )
    body_seconds: float = Field(
        default=60.0, gt=0, description="Seconds in which a whole body has to arrive; else it is answered 408."
    )
    max_forget_texts: int = Field(default=4096, ge=1, le=16_384, description="Texts of one erasure request.")
    max_classify_texts: int = Field(default=256, ge=1, le=16_384, description="Texts of one call of `/classify`.")
    max_text_tokens: int = Field(
        default=256,
        ge=8,
        description="Tokens of one text, without the template. A longer one is refused, or left out of a retain set.",
    )
    max_training_steps: int = Field(
        default=100_000, ge=1, le=100_000, description="Training steps that one request may ask for in its options."
    )
    max_queued_texts: int = Field(
        default=2048, ge=1, description="Texts that may wait to be classified; beyond it 503 with `Retry-After`."
    )
    max_batch_texts: int = Field(
        default=64, ge=1, le=16_384, description="Texts that wait together and run together. 1: no batching."
    )
    prefix_cache_bytes: int = Field(
        default=256 * 2**20,
        ge=0,
        description="Bytes of the prompts' keys and values that are kept between batches. A prompt that claims a text "
        "and whose are not there costs a pass of one row first. `docs/sizing.md` has their size.",
    )
    compile: Literal["off", "try", "on"] = Field(
        default="off",
        description="`try`: when a server starts, measure the layers under `torch.compile` beside the plain ones, and "
        "keep what is quicker on this machine; takes minutes, and a C++ compiler. `on`: keep them in any case. The "
        "log and `letheon_compiled` say what became of it.",
    )
    classify_deadline_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Seconds after which a classification without an answer gets 503. A client may ask for less time, "
        "not for more.",
    )

    # Who may ask how much. A key's own limits (`letheon keys create --limit`) come before these; 0 is no limit.
    rate_per_minute: int = Field(
        default=0, ge=0, description="Calls a minute of one key to one replica, those of `/classify` left out."
    )
    classify_texts_per_minute: int = Field(
        default=0, ge=0, description="Texts a minute that one key may have one replica read."
    )
    requests_per_day: int = Field(default=0, ge=0, description="Erasure requests of one key within 24 hours.")
    texts_per_day: int = Field(default=0, ge=0, description="Forget texts of one key within 24 hours.")
    active_prompts: int = Field(
        default=0, ge=0, description="Requests of one key that wait, train, await approval or are in force."
    )
    max_event_streams: int = Field(
        default=20,
        ge=1,
        description="Event streams that one key may have open at one replica, those of the console's pages included; "
        "always a limit, and the same for all keys.",
    )

    # The life of a request
    require_approval: bool = Field(
        default=False,
        description="Every request has to be agreed to by another key, of the scope `approve`, before its prompt comes "
        "into force; set for workers, too, also one that waits when this is turned on.",
    )
    revoke_needs_two: bool = Field(
        default=False, description="A revoke is carried out when a second admin's key asks for it, too."
    )
    deadline_months: int = Field(
        default=1, ge=1, le=12, description="Calendar months from the receipt of a request to the date it is due by."
    )
    idempotency_hours: float = Field(
        default=24.0, gt=0, description="Hours for which an `Idempotency-Key` is remembered at least."
    )
    keep_texts_hours: float = Field(
        default=0.0,
        ge=0,
        description="Hours for which forget texts stay, sealed, after their request is active or has ended. 0: they "
        "are shredded at once.",
    )
    dry_run_seconds: float = Field(
        default=120.0,
        gt=0,
        description="Seconds after which a dry run without a report ends with 503. What it has read is kept for the "
        "next one.",
    )

    # Trust
    previous_master_keys: list[SecretStr] = Field(
        default=[],
        description="Master keys of before, as a JSON list: they open what they sealed until `letheon vault rotate` "
        "has been run.",
    )
    keystore_url: str = Field(
        default="",
        description="URL of the database of the key shares, apart from the main one and from its backups: without its "
        "share nothing opens. Empty: `keystore.db` beside an embedded database, else no shares.",
    )
    audit_checkpoint_seconds: float = Field(
        default=300.0, gt=0, description="Seconds between two signatures of the audit log's head, where it has moved."
    )
    webhook_private: bool = Field(
        default=False,
        description="Webhooks may go to `http://` and to loopback, private and link-local addresses.",
    )
    webhook_timeout_seconds: float = Field(
        default=10.0, gt=0, le=60, description="Seconds of a whole attempt to deliver, the name's look-up included."
    )
    webhook_attempts: int = Field(
        default=8, ge=1, description="Attempts to deliver a message, with growing pauses; then it has failed."
    )
    webhook_log_days: float = Field(
        default=30.0, gt=0, description="Days for which deliveries that have ended stay in the log."
    )
    export_prompts: bool = Field(
        default=False,
        description="Admins may export prompts in clear. No revoke reaches a copy that is outside.",
    )
    console_session_hours: float = Field(
        default=8.0, gt=0, le=168, description="Hours after which a person logs in to the console again."
    )
    traces: bool = Field(
        default=False,
        description="Send OpenTelemetry traces; needs `letheon[otel]`. The standard `OTEL_…` variables say where to.",
    )

    # The frozen model. API and worker need the same: each part of it is in the fingerprint that a prompt is bound to.
    model: str = Field(default="", description="Hub id, local folder or GGUF file. Empty: the pulled demo model.")
    adapter: str | None = Field(
        default=None,
        description="Folder of a LoRA adapter that is merged before quantization. Unset: the demo's with the demo "
        "model, else none.",
    )
    quantization: Quantization = Field(
        default="nf4", description="What the layers' weights are quantized to after loading, the head left out."
    )
    device: str = Field(
        default="auto", description="`cpu`, `cuda`, or a device by number (`cuda:1`). `auto`: CUDA where there is one."
    )
    template: str = Field(
        default="instruction-first",
        description="The prompt around a text: `instruction-first`, `paper`, or a string with one `{text}`.",
    )
    labels: list[str] = Field(
        default=["negative", "positive"],
        description="The words that the model answers with, as a JSON list; each has to be one token.",
    )
    generic_labels: list[str] = Field(
        default=["neutral", "unknown"],
        description="The words that a suppressed text is trained towards, one token each; any of them is answered as "
        "`unknown`.",
    )

    # Training
    retain: str = Field(
        default="",
        description="The retain set: a JSONL, CSV, TSV or Parquet file, or a dataset id. Empty: the demo's data.",
    )
    retain_split: str = Field(default="train", description="The split to read, where `retain` is a dataset id.")
    precision: Literal["auto", "exact"] = Field(
        default="auto",
        description="`auto` may take gradients from a bfloat16 copy on a CPU with such units; checks never do. "
        "`exact`: no copy.",
    )
    num_virtual_tokens: int = Field(
        default=30, ge=1, le=1024, description="Virtual tokens of a prompt. Part of what API and workers must agree on."
    )
    alpha: float | None = Field(
        default=None, ge=0, description="Weight of L_r in the loss. Unset: 0.3 in mode `routed`, 1 in `concatenate`."
    )
    beta: float = Field(default=0.5, ge=0, description="Weight of L_kl in the loss.")
    learning_rate: float = Field(
        default=3e-2, gt=0, description="Adam's learning rate at its highest; it falls by a cosine to zero."
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps of one training. Unset: 60 in mode `routed`, 140 in `concatenate`, and at least 3 epochs of "
        "the texts.",
    )
    seed: int = Field(default=0, description="Seed of batches, samples and pictures; the same seed repeats a training.")
    training_deadline_seconds: float = Field(
        default=6 * 3600.0,
        gt=0,
        description="Seconds of all trainings of one attempt, a safety net: what it cuts short goes to the checks as "
        "it is.",
    )
    checkpoint_seconds: float = Field(
        default=20.0, gt=0, description="Seconds between two checkpoints of a training, sealed in the database."
    )

    # Many requests at once. Why it is so: decision 9.
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
        description="Share of other texts that one gate may decide without asking its prompt. 0: the prompt decides "
        "everything.",
    )
    max_total_claim_rate: float = Field(
        default=0.1, ge=0, le=1, description="Share of the retain set that all gates together may claim."
    )
    active_set_poll_seconds: float = Field(
        default=5.0, gt=0, description="Seconds after which an idle API lets go of revoked prompts at the latest."
    )
    max_prompts_per_query: int = Field(
        default=4, ge=1, description="Prompts that one query runs behind at most: of the gates that claim it clearest."
    )
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
        description="Share of a request's texts that have to be answered `unknown`, as they would be served.",
    )
    max_retain_drop: float = Field(
        default=0.03, ge=0, le=1, description="Retain accuracy may fall by this much, of all retain rows sampled."
    )
    max_class_drop: float = Field(
        default=0.06, ge=0, le=1, description="Retain accuracy may fall by this much in the worst class."
    )
    max_neighbour_drop: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Retain accuracy may fall by this much on the retain rows nearest to the forget texts.",
    )
    max_prompt_norm: float = Field(
        default=64.0,
        gt=0,
        description="Longest row of a prompt, in mean lengths of the model's own word embeddings.",
    )
    check_retain_rows: int = Field(default=256, ge=8, description="Retain rows that accuracy is measured on.")
    max_tries: int = Field(
        default=3,
        ge=1,
        description="Trainings of one request in all: a prompt that fails its checks is trained again, with other "
        "weights or tokens.",
    )
    evidence_texts: int = Field(
        default=64,
        ge=0,
        le=512,
        description="Texts of each kind (forget, retain, held out) that a request's evidence is made of. 0: none is "
        "made.",
    )
    held_out: str = Field(
        default="",
        description="Texts that the model has never been trained on, in a file as `retain` is: the other side of the "
        "evidence's attack. Empty: the demo's with the demo's data, else retain rows.",
    )
    min_retain_rows: int = Field(
        default=32,
        ge=1,
        description="Different retain texts that have to be left, or a request fails: nothing could be said about its "
        "side effects.",
    )

    # Queue
    lease_seconds: float = Field(
        default=60.0,
        gt=0,
        description="Seconds for which a worker holds a request without a sign of life; at least two heartbeats.",
    )
    heartbeat_seconds: float = Field(
        default=10.0, gt=0, description="Seconds between two signs of life of a worker that trains."
    )
    reaper_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Seconds between two looks of a worker into the database: for requests that wait or were lost, and "
        "for what has expired or is to be shredded.",
    )
    ring_seconds: float = Field(
        default=60.0, gt=0, description="Seconds after which a request that waits is announced to the workers again."
    )
    max_attempts: int = Field(
        default=3, ge=1, description="Workers that may be lost over one request before it ends as `attempts-exhausted`."
    )

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
